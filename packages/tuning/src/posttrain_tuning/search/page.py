"""A study as one HTML page that needs nothing else: history, importance, parallel coordinates, the front, all trials.

Draws what `study.Study` holds, and knows no run. While the study runs the page loads itself anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import accumulate, combinations

from posttrain.report import svg
from posttrain.report.html import Html, element, joined, table
from posttrain.search import Choice, Domain, Goal, Space

from posttrain_tuning.search.importance import importances
from posttrain_tuning.search.study import Study, Trial

PAGE = "tune.html"
BEST, COMPLETE, PRUNED = 1, 0, 4
"""Colours of the report's page; what is under way or failed is `svg.NEUTRAL`."""
REFRESH = 10
"""Seconds after which the page of a running study is loaded anew."""
AXES = 12
"""Most parameters of the parallel coordinates: the most important ones."""


def page(study: Study, space: Space, title: str, live: bool = False) -> str:
    """The whole document."""
    style = (files("posttrain.report") / "page.css").read_text("utf-8")
    head = joined([
        Html('<meta charset="utf-8">'), Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'">'),
        Html('<meta name="color-scheme" content="light dark">'),
        Html(f'<meta http-equiv="refresh" content="{REFRESH}">' if live else ""),
        element("title", f"{title} - posttrain tune"), element("style", Html(style))])
    figures = [_figure(goal.name, "over trials", history(study, i)) for i, goal in enumerate(study.goals)]
    figures += [_figure(study.goals[j].name, f"over {study.goals[i].name}", scatter(study, i, j))
                for i, j in combinations(range(len(study.goals)), 2)]
    order = list(importances(space, study.trials, 0))
    for i, goal in enumerate(study.goals):
        if shares := importances(space, study.trials, i):
            figures.append(_figure("importance", f"for {goal.name}: share of the variance of its ranks", bars(shares)))
    body = joined([element("header", element("h1", title), _legend()), _summary(study),
                   element("div", *figures, class_="grid-of-charts"),
                   element("section", element("h2", "Parameters"), parallel(study, space, order)),
                   element("section", element("h2", "Trials"), _table(study, space))])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def history(study: Study, goal: int) -> Html:
    """Values over trials, and the best so far of those within the constraints."""
    measured = [t for t in study.trials if t.result]
    frame = _Frame((-0.5, max(len(study.trials), 1) - 0.5), svg.limits([t.result[goal] for t in measured]))
    better = max if study.goals[goal].maximize else min
    good = [t for t in measured if t.feasible]
    path = "".join(f"{'L' if i else 'M'}{frame.across(t.number):.1f} {frame.down(best):.1f}" for i, (t, best) in
                   enumerate(zip(good, accumulate((t.result[goal] for t in good), better))))
    curve = f'<path class="c{BEST} curve" d="{path}"/>' if len(good) > 1 else ""
    dots = (_dot(study, t, frame.across(t.number), frame.down(t.result[goal])) for t in measured)
    return _drawing("history", frame, curve + "".join(dots))


def scatter(study: Study, i: int, j: int) -> Html:
    """Two goals against each other; the front above the rest."""
    measured = sorted((t for t in study.trials if t.result), key=lambda t: _color(study, t) == BEST)
    x, y = (svg.limits([t.result[k] for t in measured]) for k in (i, j))
    frame = _Frame(x, y)
    return _drawing("front", frame, "".join(
        _dot(study, t, frame.across(t.result[i]), frame.down(t.result[j])) for t in measured))


def bars(shares: Mapping[str, float]) -> Html:
    """A bar from 0 to 1 for each parameter, the largest first."""
    rows = list(shares.items())[:AXES]
    step = min(26.0, (svg.HEIGHT - 10) / max(len(rows), 1))
    parts = []
    for number, (name, share) in enumerate(rows):
        y, width = 4 + number * step, share * (svg.WIDTH - 190)
        parts.append(f'<text class="tick end" x="150" y="{y + step / 2 + 3:.1f}">{escape(_shortened(name))}</text>'
                     f'<rect class="c{COMPLETE} bar" x="156" y="{y + 2:.1f}" width="{max(width, 0.6):.1f}" '
                     f'height="{step - 5:.1f}"><title>{escape(name)}: {share:.3f}</title></rect>'
                     f'<text class="tick" x="{160 + width:.1f}" y="{y + step / 2 + 3:.1f}">{share:.2f}</text>')
    return Html(f'<svg viewBox="0 0 {svg.WIDTH} {svg.HEIGHT}" role="img" aria-label="importance">'
                f'{"".join(parts)}</svg>')


def parallel(study: Study, space: Space, order: Sequence[str]) -> Html:
    """A line for each trial through the places of its parameters to its first goal: what good trials have in common."""
    domains = {name: domain for name, domain, always in space.parameters() if always}
    names = sorted(domains, key=lambda name: order.index(name) if name in order else len(order))[:AXES]
    measured = sorted((t for t in study.trials if t.result), key=lambda t: _color(study, t) == BEST)
    low, high = svg.limits([t.result[0] for t in measured])
    width, top, foot = 180 * len(names) + 120, 34, 230
    def across(axis: int) -> float:
        return 60 + axis * (width - 120) / len(names)
    def down(share: float) -> float:
        return foot - share * (foot - top)
    parts = [_axis(across(i), _shortened(name), *_ends(domains[name]), top, foot) for i, name in enumerate(names)]
    parts.append(_axis(across(len(names)), study.goals[0].name, f"{low:.3g}", f"{high:.3g}", top, foot))
    for trial in measured:
        places = [down(_share(domains[name], trial.values[name])) for name in names]
        places.append(down((trial.result[0] - low) / (high - low)))
        path = "L".join(f"{across(i):.1f} {y:.1f}" for i, y in enumerate(places))
        color = _color(study, trial)
        parts.append(f'<path class="c{color} curve" opacity="{1 if color == BEST else 0.45}" d="M{path}">'
                     f'<title>{escape(_said(study, trial))}</title></path>')
    return element("div", Html(f'<svg viewBox="0 0 {width} {foot + 24}" style="min-width: {width // 2}px" role="img" '
                               f'aria-label="parallel coordinates">{"".join(parts)}</svg>'), class_="wide")


class _Frame:
    """From numbers to places in a drawing."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x, self.y = x, y

    def across(self, value: float) -> float:
        low, high = self.x
        return svg.LEFT + (value - low) / (high - low) * (svg.WIDTH - svg.LEFT - svg.RIGHT)

    def down(self, value: float) -> float:
        low, high = self.y
        return svg.HEIGHT - svg.BOTTOM - (value - low) / (high - low) * (svg.HEIGHT - svg.TOP - svg.BOTTOM)

    def axes(self) -> Iterator[str]:
        foot, right = svg.HEIGHT - svg.BOTTOM, svg.WIDTH - svg.RIGHT
        yield f'<line class="axis" x1="{svg.LEFT}" x2="{right}" y1="{foot}" y2="{foot}"/>'
        for v in svg.ticks(*self.y):
            yield (f'<line class="grid" x1="{svg.LEFT}" x2="{right}" y1="{self.down(v):.1f}" y2="{self.down(v):.1f}"/>'
                   f'<text class="tick end" x="{svg.LEFT - 6}" y="{self.down(v) + 3.5:.1f}">{v:g}</text>')
        for v in svg.ticks(*self.x):
            x = f"{self.across(v):.1f}"
            yield (f'<line class="axis" x1="{x}" x2="{x}" y1="{foot}" y2="{foot + 4}"/>'
                   f'<text class="tick middle" x="{x}" y="{foot + 16}">{v:g}</text>')


def _drawing(label: str, frame: _Frame, body: str) -> Html:
    return Html(f'<svg viewBox="0 0 {svg.WIDTH} {svg.HEIGHT}" role="img" aria-label="{label}">'
                f'{"".join(frame.axes())}{body}</svg>')


def _dot(study: Study, trial: Trial, x: float, y: float) -> str:
    color = _color(study, trial)
    return (f'<circle class="c{color} dot" cx="{x:.1f}" cy="{y:.1f}" r="{5 if color == BEST else 3.5}">'
            f'<title>{escape(_said(study, trial))}</title></circle>')


def _axis(x: float, name: str, low: str, high: str, top: float, foot: float) -> str:
    return (f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{foot}"/>'
            f'<text class="tick middle" x="{x:.1f}" y="{top - 20}">{escape(name)}</text>'
            f'<text class="tick middle" x="{x:.1f}" y="{top - 6}">{escape(high)}</text>'
            f'<text class="tick middle" x="{x:.1f}" y="{foot + 14}">{escape(low)}</text>')


def _ends(domain: Domain) -> tuple[str, str]:
    if isinstance(domain, Choice):
        return _shortened(domain.options[0].label), _shortened(domain.options[-1].label)
    return f"{domain.low:g}", f"{domain.high:g}"


def _share(domain: Domain, value: object) -> float:
    """Where a value lies between the ends of its axis."""
    if isinstance(domain, Choice):
        return [option.label for option in domain.options].index(str(value)) / (len(domain.options) - 1)
    scale: Callable[[float], float] = math.log if domain.log else float
    return (scale(value) - scale(domain.low)) / (scale(domain.high) - scale(domain.low))  # type: ignore[arg-type]  # a number


def _color(study: Study, trial: Trial) -> int:
    if any(trial.number == best.number for best in study.best()):
        return BEST
    return COMPLETE if trial.feasible else PRUNED if trial.status in ("pruned", "waiting") else svg.NEUTRAL


def _said(study: Study, trial: Trial) -> str:
    measured = [f"{goal.name} {x:.4g}" for goal, x in zip(study.goals, trial.result)]
    return ", ".join([f"trial-{trial.number:04d}", *measured, *(f"{k} {_text(v)}" for k, v in trial.values.items())])


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _shortened(name: str, most: int = 24) -> str:
    return name if len(name) <= most else "..." + name[3 - most:]


def _figure(name: str, unit: str, chart: Html) -> Html:
    caption = element("figcaption", element("b", name), " ", element("span", unit, class_="unit"))
    return element("figure", caption, chart)


def _legend() -> Html:
    names = (("best", BEST), ("complete", COMPLETE), ("pruned, or waiting on a rung", PRUNED),
             ("failed, or outside the constraints", svg.NEUTRAL))
    return element("p", *(element("span", element("i", class_=f"chip c{color}"), name, class_="key")
                          for name, color in names), class_="legend")


def _summary(study: Study) -> Html:
    counts = [f"{n} {status}" for status in ("complete", "pruned", "failed", "waiting")
              if (n := sum(t.status == status for t in study.trials))]
    running = sum(t.status == "asked" for t in study.trials)
    best = study.best()
    counts += [f"{running} under way"] if running else []
    said: list[str] = [f"{len(study.trials)} trials: {', '.join(counts)}."]
    if best:
        said += [" Best: " if len(study.goals) == 1 else " On the front: ",
                 element("b", ", ".join(f"trial-{t.number:04d}" for t in best)), ". ",
                 _aims(study.goals)]
    return element("p", *said)


def _aims(goals: Sequence[Goal]) -> str:
    return "; ".join(f"{goal.name} is {'maximised' if goal.maximize else 'minimised'}" for goal in goals) + "."


def _table(study: Study, space: Space) -> Html:
    """A row for each trial, the best first; its name leads to the report of its run."""
    names = [name for name, _, _ in space.parameters()]
    ranked = [*study.ranked()]
    rest = [t for t in study.trials if t.number not in {r.number for r in ranked}]
    rows = [[element("a", f"trial-{t.number:04d}", href=f"trial-{t.number:04d}/report.html"),
             "under way" if t.status == "asked" else t.status,
             *([f"{x:.5g}" for x in t.result] or [""] * len(study.goals)), str(t.step),
             *(_text(t.values[name]) if name in t.values else "" for name in names),
             "; ".join([*([t.reason] if t.reason else []),
                        *(f"{name}: broken by {v:.3g}" for name, v in t.violations.items() if v > 0)])]
            for t in (*ranked, *rest)]
    return table(["trial", "", *(goal.name for goal in study.goals), "step", *names, "why"], rows)
