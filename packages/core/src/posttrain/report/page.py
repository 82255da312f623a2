"""The report as one HTML page that needs nothing else: curves, samples, configuration and manifest of one or more runs.

The page names no other address and forbids itself to ask for one; the only script that may run is its own, by hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import final

from posttrain.checkpoint import JSON
from posttrain.errors import InputError, Problem
from posttrain.profiling import PREFIX
from posttrain.report import history, svg
from posttrain.report.history import MISSING, History
from posttrain.report.html import Html, chip, element, joined, section, table
from posttrain.report.memory import memory_section
from posttrain.rundir import TIMING

SHOWN_SAMPLES = 4
"""Samples of each sort that are shown of a run."""

_NO_PHASE = re.compile("memory|percent|per_second|time|gpu|^seconds$")
"""Entries of `timing` that are not the seconds of a phase."""
_INSIDE = {"rollout": ("reward",), "update": ("backward", "optimiser")}
"""Phases in which others are counted too; in a stack their seconds stand once."""


@final
@dataclass(frozen=True, slots=True)
class Chart:
    """Curves that belong together: metrics, solid and then dashed, and what is drawn beside them."""

    title: str
    unit: str
    metrics: tuple[tuple[str, str], ...]
    """(metric, its name in the legend); every second one is dashed."""
    spread: str = ""
    """Metric of the first one's standard deviation, drawn as a band."""
    target: str = ""
    """Key of the configuration that is drawn as a level."""


CHARTS = (
    Chart("Reward", "mean ± sd over episodes", (("reward/mean", ""),), spread="reward/std"),
    Chart("Reward on held-out prompts", "mean over episodes", (("eval/reward/mean", ""),)),
    Chart("KL to the reference", "nats per token", (("kl/reference", "measured"),), target="kl.target"),
    Chart("KL coefficient", "weight of the KL term", (("kl/coef", ""),)),
    Chart("Entropy of the policy", "nats per token", (("policy/entropy", ""),)),
    Chart("Length of answers", "tokens", (("episode/length", "training"), ("eval/length", "held out"))),
    Chart("Clip fraction", "share of actions", (("policy/clip_high", "above"), ("policy/clip_low", "below"))),
    Chart("Loss on held-out answers", "nats per token", (("eval/loss", ""),)),
    Chart("Gradient norm", "before clipping", (("grad_norm", ""),)),
    Chart("Learning rate", "", (("lr", ""),)),
    Chart("Throughput", "tokens per second", ((TIMING + "tokens_per_second", ""),)),
)


def write_page(run_directories: Sequence[Path], output: Path, labels: Sequence[str] | None = None) -> None:
    """Write the page of the runs to `output`. Raises `InputError` where no run has metrics or it cannot be written."""
    names = history.checked_labels(run_directories, labels)
    text = page([history.read(path, name) for path, name in zip(run_directories, names)])
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError([Problem(f"cannot write: {error.strerror or error}", str(output))]) from error


def page(runs: Sequence[History]) -> str:
    """The whole document. Raises `InputError` where no run has a metric."""
    if not any(run.curves.records for run in runs):
        raise InputError([Problem("no metrics to show", ", ".join(str(run.path) for run in runs))],
                         next_step="they appear after the first step: posttrain resume RUN")
    script = _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    head = joined([
        Html('<meta charset="utf-8">'), Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Html('<meta name="color-scheme" content="light dark">'),
        element("title", f"{title} - posttrain report"), element("style", Html(_resource("page.css")))])
    body = joined([element("header", element("h1", title), _legend(runs)), _overview(runs), _curves(runs), _times(runs),
                   memory_section(runs), _samples(runs), _configuration(runs), _manifest(runs), _other_metrics(runs),
                   Html('<div id="tip" hidden></div>'), element("script", Html(script))])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _overview(runs: Sequence[History]) -> Html:
    """A row for each run: how far it is and where its main curves began and ended."""
    def row(i: int, run: History) -> list[str]:
        planned = run.settings.get("steps", "")
        seconds = [v for v in run.curves.column(TIMING + "seconds")[1] if math.isfinite(v)]
        return [joined([chip(i), run.label]), run.state, f"{run.steps} of {planned}" if planned else str(run.steps),
                _first_to_last(run, "reward/mean"), _first_to_last(run, "eval/reward/mean"),
                _first_to_last(run, "kl/reference"), _first_to_last(run, "episode/length"), _duration(sum(seconds))]
    head = ("run", "state", "steps", "reward", "held-out reward", "KL", "length", "time")
    return section("Overview", table(head, (row(i, run) for i, run in enumerate(runs)), "overview"))


def _curves(runs: Sequence[History]) -> Html:
    charts = [*_training_losses(runs), *CHARTS[:2], *_reward_columns(runs), *CHARTS[2:], _memory(runs)]
    return section("Curves", element("p", "Over steps of the loop; point at a curve for its values.", class_="note"),
                    element("div", *(_figure(chart, runs) for chart in charts), class_="grid-of-charts"))


def _training_losses(runs: Sequence[History]) -> list[Chart]:
    """Loss terms of a policy gradient say little; those of learning from given answers say all."""
    if any(run.curves.first(["reward/mean"]) for run in runs):
        return []
    return [Chart(f"Training {name}", "per step", ((name, ""),)) for name in _names(runs) if name.startswith("loss/")]


def _reward_columns(runs: Sequence[History]) -> list[Chart]:
    """A chart for each named reward, unless it is the only one and so the reward itself."""
    names = [name for name in _names(runs) if name.startswith("reward/") and name.count("/") == 2
             and name.endswith("/mean")]
    equal = all(run.curves.column(name)[1] == run.curves.column("reward/mean")[1] for run in runs for name in names)
    return [] if equal and len(names) <= 1 else [
        Chart(f"Reward {name.split('/')[1]}", "mean over episodes", ((name, "training"), (f"eval/{name}", "held out")))
        for name in names]


def _memory(runs: Sequence[History]) -> Chart:
    names = [name for name in _names(runs) if name.startswith(TIMING) and "memory" in name
             and not name.startswith(PREFIX)]
    return Chart("Memory", "MiB", tuple((name, name.removeprefix(TIMING).removesuffix("_mb")) for name in names))


def _names(runs: Sequence[History]) -> list[str]:
    return sorted({name for run in runs for name in run.curves.names()})


def _figure(chart: Chart, runs: Sequence[History]) -> Html:
    """The chart with its caption, or nothing where no run has a finite value of it."""
    lines = [line for i, run in enumerate(runs) for line in _lines(chart, run, i, len(runs) > 1)]
    if not lines:
        return Html()
    levels = _targets(chart, runs)
    styles = [element("span", name, class_=f"key {'dashed' if k % 2 else 'solid'}")
              for k, (_, name) in enumerate(chart.metrics) if name and len(chart.metrics) > 1]
    styles += [element("span", "target", class_="key dotted")] if levels else []
    caption = element("figcaption", element("b", chart.title), " ", element("span", chart.unit, class_="unit"), *styles)
    return element("figure", caption, Html(svg.line_chart(chart.title, lines, levels)))


def _lines(chart: Chart, run: History, color: int, several: bool) -> list[svg.Line]:
    found = []
    for k, (metric, name) in enumerate(chart.metrics):
        steps, values = run.curves.column(metric)
        if not any(map(math.isfinite, values)):
            continue
        at, spread = run.curves.column(chart.spread) if chart.spread and k == 0 else ([], [])
        label = " ".join(part for part in (run.label if several else "", name) if part) or chart.title.lower()
        found.append(svg.Line(label, steps, values, color, bool(k % 2), spread if at == steps else ()))
    return found


def _targets(chart: Chart, runs: Sequence[History]) -> list[svg.Level]:
    """A level for each target; runs that share one share its line, which then has no run's colour."""
    owners: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        if text := run.settings.get(chart.target, ""):
            owners.setdefault(text, []).append(i)
    found = []
    for text, (first, *more) in owners.items():
        with suppress(ValueError):  # a reference such as ${...} is no number
            shared = bool(more) or len(runs) == 1
            found.append(svg.Level("target" if shared else f"{runs[first].label} target", float(text),
                                   svg.NEUTRAL if shared else first))
    return found


def _times(runs: Sequence[History]) -> Html:
    """Seconds of each step by phase, one chart for each run; phases have the same colour in all of them."""
    phases = [name for name in _names(runs) if _is_phase(name)]
    figures = [figure for run in runs if (figure := _time_figure(run, phases, len(runs) > 1))]
    if not figures:
        return Html()
    names = [*(phase.removeprefix(TIMING) for phase in phases), "other"]
    keys = [element("span", chip(i), name, class_="key") for i, name in enumerate(names)]
    return section("Time by phase", element("p", *keys, class_="legend"),
                    element("div", *figures, class_="grid-of-charts"))


def _is_phase(metric: str) -> bool:
    return metric.startswith(TIMING) and not _NO_PHASE.search(metric.removeprefix(TIMING))


def _time_figure(run: History, phases: Sequence[str], several: bool) -> Html:
    steps, totals = run.curves.column(TIMING + "seconds")
    if not steps:
        return Html()
    taken = {phase.removeprefix(TIMING): dict(zip(*run.curves.column(phase))) for phase in phases}
    inside = {name: [taken[other] for other in _INSIDE.get(name, ()) if other in taken] for name in taken}
    layers = [svg.Layer(name, [max(seconds.get(step, 0.0) - sum(x.get(step, 0.0) for x in inside[name]), 0.0)
                               for step in steps]) for name, seconds in taken.items()]
    known = [sum(layer.values[i] for layer in layers) for i in range(len(steps))]
    layers.append(svg.Layer("other", [max(total - part, 0.0) for total, part in zip(totals, known)]))
    title = run.label if several else "Seconds of a step"
    caption = element("figcaption", element("b", title), " ", element("span", "seconds per step", class_="unit"))
    return element("figure", caption, Html(svg.stacked_chart(title, steps, layers)))


def _samples(runs: Sequence[History]) -> Html:
    blocks = []
    for i, run in enumerate(runs):
        chosen = [(name, rows) for name, pick in SORTS.items() if (rows := pick(run.samples))]
        groups = [element("div", element("h4", name), *map(_sample, rows)) for name, rows in chosen]
        if groups:
            heading = [element("h3", chip(i), run.label)] if len(runs) > 1 else []
            blocks.append(joined([*heading, element("div", *groups, class_="samples")]))
    return section("Samples", *blocks) if blocks else Html()


def _first(samples: Sequence[Mapping[str, JSON]]) -> list[Mapping[str, JSON]]:
    """Those of the first recorded step."""
    start = min((s["step"] for s in samples), default=0)
    return [s for s in samples if s["step"] == start][:SHOWN_SAMPLES]


def _last(samples: Sequence[Mapping[str, JSON]]) -> list[Mapping[str, JSON]]:
    """Those of the last recorded step."""
    end = max((s["step"] for s in samples), default=0)
    return [s for s in samples if s["step"] == end][:SHOWN_SAMPLES]


def _by_reward(samples: Sequence[Mapping[str, JSON]], sign: int) -> list[Mapping[str, JSON]]:
    """Different ones with the greatest reward times `sign`, later ones before earlier ones."""
    rewarded = [s for s in samples if s.get("reward") is not None]
    ordered = sorted(rewarded, key=lambda s: (sign * s["reward"], s["step"]), reverse=True)
    different = {(str(s.get("prompt")), s.get("completion")): s for s in reversed(ordered)}
    return [s for s in ordered if different[str(s.get("prompt")), s.get("completion")] is s][:SHOWN_SAMPLES]


SORTS: Mapping[str, Callable[[Sequence[Mapping[str, JSON]]], list[Mapping[str, JSON]]]] = {
    "First": _first, "Last": _last, "Best": lambda samples: _by_reward(samples, 1),
    "Worst": lambda samples: _by_reward(samples, -1)}
"""Which samples are shown, under which heading."""


def _sample(sample: Mapping[str, JSON]) -> Html:
    reward = sample.get("reward")
    facts = [f"step {sample['step']}", str(sample.get("kind", "")), str(sample.get("finish", "")),
             "" if reward is None else f"reward {reward:g}"]
    return element(
        "article", element("p", " · ".join(fact for fact in facts if fact), class_="facts"),
        element("pre", _prompt_text(sample.get("prompt")), class_="prompt"),
        element("pre", str(sample.get("completion", "")), class_="completion"))


def _prompt_text(prompt: JSON) -> str:
    """A prompt as it is read: text, `role: content` for each message, or token ids."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(isinstance(m, Mapping) for m in prompt):
        return "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in prompt)
    return json.dumps(prompt, ensure_ascii=False)


def _configuration(runs: Sequence[History]) -> Html:
    blocks: list[Html] = []
    if len(runs) > 1:
        different = history.differences([run.settings for run in runs])
        rows = [[key, *(value if value != MISSING else "not set" for value in values)]
                for key, values in different.items() if key != "run"]
        blocks.append(element("h3", "What differs"))
        blocks.append(table(["key", *(run.label for run in runs)], rows) if rows else
                      element("p", "Nothing: the runs have one configuration."))
    for run in runs:
        if run.config:
            title = f"Whole configuration of {run.label}"
            blocks.append(element("details", element("summary", title), element("pre", run.config)))
    return section("Configuration", *blocks) if blocks else Html()


def _manifest(runs: Sequence[History]) -> Html:
    keys = dict.fromkeys(key for run in runs for key in run.manifest)
    rows = [[key, *(_readable(key, run.manifest.get(key, "")) for run in runs)] for key in keys]
    head = ["", *(run.label for run in runs)]
    return section("Versions, seed and machine", table(head, rows)) if rows else Html()


def _readable(key: str, value: str) -> str:
    return f"{int(value) / 2**30:.1f} GiB" if key == "memory_bytes" and value.isdigit() else value


def _other_metrics(runs: Sequence[History]) -> Html:
    """Every metric that has no chart above."""
    shown = {metric for chart in [*CHARTS, *_training_losses(runs), *_reward_columns(runs), _memory(runs)]
             for metric, _ in chart.metrics} | {"reward/std", TIMING + "seconds", TIMING + "unix_time"}
    left = [name for name in _names(runs)
            if name not in shown and not _is_phase(name) and not name.startswith(PREFIX)]
    figures = [figure for name in left if (figure := _figure(Chart(name, "", ((name, ""),)), runs))]
    return element("details", element("summary", f"All other metrics ({len(figures)})"),
                   element("div", *figures, class_="grid-of-charts small")) if figures else Html()


def _legend(runs: Sequence[History]) -> Html:
    return element("p", *(element("span", chip(i), run.label, class_="key") for i, run in enumerate(runs)),
                   class_="legend") if len(runs) > 1 else Html()


def _first_to_last(run: History, metric: str) -> str:
    """`0.244 → 0.69`: the first and the last finite value."""
    values = [v for v in run.curves.column(metric)[1] if math.isfinite(v)]
    return f"{values[0]:.3g} → {values[-1]:.3g}" if len(values) > 1 else f"{values[0]:.3g}" if values else "–"


def _duration(seconds: float) -> str:
    """`1 h 02 min`, `3 min 20 s` or `4.2 s`.

    >>> _duration(200.0)
    '3 min 20 s'
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _resource(name: str) -> str:
    return Path(__file__).with_name(name).read_text("utf-8")
