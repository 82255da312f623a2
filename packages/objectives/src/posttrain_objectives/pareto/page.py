"""A covered front as one HTML page that needs nothing else, and as a picture: the front, hypervolume over points, the
recommended knee. Draws what `covering.Front` holds, and knows no run.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import PluginError
from posttrain.report import svg
from posttrain.report.html import Html, element, joined, table

from posttrain_objectives.pareto.archive import Point
from posttrain_objectives.pareto.covering import Front

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE, PICTURE = "pareto.html", "pareto.png"
FRONT, KNEE = 0, 1
"""Colours of the report's page; what is dominated is `svg.NEUTRAL`."""


def page(front: Front, title: str) -> str:
    """The whole document."""
    style = (files("posttrain.report") / "page.css").read_text("utf-8")
    head = joined([
        Html('<meta charset="utf-8">'), Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'">'),
        Html('<meta name="color-scheme" content="light dark">'),
        element("title", f"{title} - posttrain pareto"), element("style", Html(style))])
    volumes = svg.line_chart("Hypervolume", [svg.Line("hypervolume", range(1, len(front.points) + 1),
                                                      front.hypervolumes())])
    figures = [_figure(*names, scatter(front, *pair)) for pair, names in _pairs(front)]
    figures.append(_figure("points", "hypervolume", Html(volumes)))
    body = joined([element("header", element("h1", title), _legend()), _recommendation(front),
                   element("div", *figures, class_="grid-of-charts"),
                   element("section", element("h2", "Points"), _table(front))])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def draw(front: Front, title: str, output: Path) -> None:
    """Write the same charts as a picture. Raises `PluginError` where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PluginError(["a picture of the front needs matplotlib, which is not installed: "
                           "pip install 'posttrain-objectives[pareto]'"]) from error
    pairs = _pairs(front)
    figure = Figure(figsize=(4.6 * (len(pairs) + 1), 3.8), layout="constrained")
    for place, (pair, names) in enumerate(pairs, 1):
        _draw_pair(figure.add_subplot(1, len(pairs) + 1, place), front, pair, names)
    axes = figure.add_subplot(1, len(pairs) + 1, len(pairs) + 1)
    axes.plot(range(1, len(front.points) + 1), front.hypervolumes(), marker="o", markersize=3)
    axes.set(title="Hypervolume", xlabel="points", xticks=svg.ticks(0.5, len(front.points) + 0.5, whole=True))
    axes.grid(alpha=0.25)
    figure.suptitle(title.replace("$", r"\$"))
    figure.savefig(output, dpi=140)


def scatter(front: Front, i: int, j: int) -> Html:
    """An SVG of all points in two of the objectives; the front is joined by a line where there are only these two."""
    x, y = (svg.limits([p.values[k] for p in front.points]) for k in (i, j))
    def across(value: float) -> float:
        return svg.LEFT + (value - x[0]) / (x[1] - x[0]) * (svg.WIDTH - svg.LEFT - svg.RIGHT)
    def down(value: float) -> float:
        return svg.HEIGHT - svg.BOTTOM - (value - y[0]) / (y[1] - y[0]) * (svg.HEIGHT - svg.TOP - svg.BOTTOM)
    foot, right = svg.HEIGHT - svg.BOTTOM, svg.WIDTH - svg.RIGHT
    parts = [f'<line class="grid" x1="{svg.LEFT}" x2="{right}" y1="{down(v):.1f}" y2="{down(v):.1f}"/>'
             f'<text class="tick end" x="{svg.LEFT - 6}" y="{down(v) + 3.5:.1f}">{v:g}</text>' for v in svg.ticks(*y)]
    parts += [f'<line class="axis" x1="{across(v):.1f}" x2="{across(v):.1f}" y1="{foot}" y2="{foot + 4}"/>'
              f'<text class="tick middle" x="{across(v):.1f}" y="{foot + 16}">{v:g}</text>' for v in svg.ticks(*x)]
    best = front.archive().front()
    if len(front.objectives) == 2:
        places = "L".join(f"{across(p.values[i]):.1f} {down(p.values[j]):.1f}" for p in best)
        parts.append(f'<path class="c{FRONT} curve" d="M{places}"/>')
    drawn = sorted(zip(_colors(front), front.points), key=lambda row: -row[0])  # the front above what is dominated
    parts += [f'<circle class="c{color} dot" cx="{across(p.values[i]):.1f}" cy="{down(p.values[j]):.1f}" '
              f'r="{5 if color == KNEE else 3.5}"><title>{escape(_said(front, p))}</title></circle>'
              for color, p in drawn]
    return Html(f'<svg viewBox="0 0 {svg.WIDTH} {svg.HEIGHT}" role="img" aria-label="front">'
                f'<line class="axis" x1="{svg.LEFT}" x2="{right}" y1="{foot}" y2="{foot}"/>{"".join(parts)}</svg>')


def _pairs(front: Front) -> list[tuple[tuple[int, int], tuple[str, str]]]:
    names = front.objectives
    return [((i, j), (names[i], names[j])) for i, j in combinations(range(len(names)), 2)]


def _colors(front: Front) -> list[int]:
    """Of each point: the knee, the rest of the front, or dominated."""
    archive = front.archive()
    best, knee = {p.tag for p in archive.front()}, archive.knee().tag
    return [KNEE if p.tag == knee else FRONT if p.tag in best else svg.NEUTRAL for p in front.points]


def _said(front: Front, point: Point) -> str:
    return f"{point.tag}: " + ", ".join(f"{name} {x:.4g}" for name, x in zip(front.objectives, point.values))


def _figure(x: str, y: str, chart: Html) -> Html:
    caption = element("figcaption", element("b", y), " ", element("span", f"over {x}", class_="unit"))
    return element("figure", caption, chart)


def _legend() -> Html:
    names = (("the front", FRONT), ("recommended knee", KNEE), ("dominated", svg.NEUTRAL))
    return element("p", *(element("span", element("i", class_=f"chip c{color}"), name, class_="key")
                          for name, color in names), class_="legend")


def _recommendation(front: Front) -> Html:
    archive = front.archive()
    knee = archive.knee()
    return element("p", f"{len(archive)} of {len(front.points)} points are on the front; hypervolume "
                   f"{archive.hypervolume():.4g} above ({', '.join(f'{r:g}' for r in front.reference)}). Recommended: ",
                   element("b", knee.tag), f", weights in {knee.checkpoint}.")


def _table(front: Front) -> Html:
    """A row for each point, best in the first objective first; its name leads to the report of its run."""
    kinds = {KNEE: "knee", FRONT: "front", svg.NEUTRAL: ""}
    rows = sorted(zip(front.points, _colors(front)), key=lambda row: row[0].values, reverse=True)
    return table(["point", *front.objectives, "", "weights"], (
        [_link(p), *_with_errors(p), kinds[color], p.checkpoint] for p, color in rows))


def _link(point: Point) -> Html:
    """A soup has no run, and so no report."""
    is_run = "/checkpoints/" in point.checkpoint
    return element("a", point.tag, href=f"{point.tag}/report.html") if is_run else element("span", point.tag)


def _with_errors(point: Point) -> Sequence[str]:
    errors = [f" ± {e:.2g}" for e in point.errors] or [""] * len(point.values)
    return [f"{x:.4g}{e}" for x, e in zip(point.values, errors)]


def _draw_pair(axes: Axes, front: Front, pair: tuple[int, int], names: tuple[str, str]) -> None:
    i, j = pair
    best, knee = front.archive().front(), front.archive().knee()
    errors = [p.errors or (0.0,) * len(p.values) for p in front.points]
    axes.errorbar([p.values[i] for p in front.points], [p.values[j] for p in front.points],
                  xerr=[e[i] for e in errors], yerr=[e[j] for e in errors], fmt="o", color="0.6", markersize=4,
                  linewidth=0.8, label="dominated", zorder=1)
    axes.plot([p.values[i] for p in best], [p.values[j] for p in best], "o-" if len(front.objectives) == 2 else "o",
              color="C0", markersize=5, label="front")
    axes.plot([knee.values[i]], [knee.values[j]], "D", color="C1", markersize=7, label="knee")
    axes.set(xlabel=names[0].replace("$", r"\$"), ylabel=names[1].replace("$", r"\$"))
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small")
