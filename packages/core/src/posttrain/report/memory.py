"""The report's section on memory, of runs with `memory.profile`: the peak of each phase over steps, beside what was
predicted, and what takes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.memory import HOST
from posttrain.profiling import CATEGORIES, FILE, PREFIX
from posttrain.report import svg
from posttrain.report.history import History
from posttrain.report.html import Html, chip, element, joined, section, table

_MIB = 2**20
_ORDER = ("load", "rollout", "reward", "score", "update", "backward", "optimiser", "sync", "evaluate", "checkpoint")
"""Of phases, as a step goes through them."""


def memory_section(runs: Sequence[History]) -> Html:
    """Nothing where no run has a profile."""
    parts = [part for i, run in enumerate(runs) if (part := _of_run(run, i, len(runs) > 1))]
    return section("Memory", *parts) if parts else Html()


def _of_run(run: History, number: int, several: bool) -> Html:
    phases = sorted({name.removeprefix(PREFIX).split("/")[0] for name in run.curves.names() if _is_peak(name)},
                    key=lambda phase: (_ORDER.index(phase) if phase in _ORDER else len(_ORDER), phase))
    if not phases:
        return Html()
    file = run.path / FILE
    record: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    mark = "allocated" if any(name.endswith("/allocated_mb") for name in run.curves.names()) else HOST
    base = 0 if mark != HOST else record.get("measured", {}).get("base", 0)
    predicted: Mapping[str, int] = record.get("predicted", {}).get("phases", {})
    return joined([
        *([element("h3", chip(number), run.label)] if several else []),
        element("div", _peaks(run, phases, mark, {phase: base + x for phase, x in predicted.items()}), _taken(run),
                class_="grid-of-charts"),
        _table(record, mark, base, predicted)])


def _is_peak(name: str) -> bool:
    return name.startswith(PREFIX) and name.count("/") == 3


def _peaks(run: History, phases: Sequence[str], mark: str, predicted: Mapping[str, int]) -> Html:
    """A line for each phase, and a level of the same colour at what was predicted for it."""
    lines, levels = [], []
    for color, phase in enumerate(phases):
        steps, values = run.curves.column(f"{PREFIX}{phase}/{mark}_mb")
        if any(map(math.isfinite, values)):
            lines.append(svg.Line(phase, steps, values, color))
        if phase in predicted:
            levels.append(svg.Level(f"{phase}, predicted", predicted[phase] / _MIB, color))
    keys = [element("span", chip(color), phase, class_="key") for color, phase in enumerate(phases)]
    keys += [element("span", "predicted", class_="key dotted")] if levels else []
    return _figure("Peak of each phase", f"MiB, {'of the process' if mark == HOST else mark}", keys,
                   svg.line_chart("Peak of each phase", lines, levels))


def _taken(run: History) -> Html:
    """What takes the memory at the largest, one on the other."""
    columns = {name: dict(zip(*run.curves.column(f"{PREFIX}{name}_mb"))) for name in CATEGORIES}
    steps = sorted({step for column in columns.values() for step in column})
    if not steps:
        return Html()
    layers = [svg.Layer(name.replace("_", " "), [column.get(step, 0.0) for step in steps])
              for name, column in columns.items() if column]
    keys = [element("span", chip(color), layer.label, class_="key") for color, layer in enumerate(layers)]
    return _figure("What takes memory", "MiB, the most of a step", keys,
                   svg.stacked_chart("What takes memory", steps, layers))


def _figure(title: str, unit: str, keys: Sequence[Html], chart: str) -> Html:
    return element("figure", element("figcaption", element("b", title), " ", element("span", unit, class_="unit")),
                   element("p", *keys, class_="legend"), Html(chart))


def _table(record: Mapping[str, Any], mark: str, base: int, predicted: Mapping[str, int]) -> Html:
    """The most of the run, above what the process took before anything was loaded."""
    measured = {phase: marks[mark] - base for phase, marks in record.get("measured", {}).get("phases", {}).items()
                if mark in marks}
    known = [phase for phase in (*_ORDER, *sorted({*measured} - {*_ORDER})) if phase in measured or phase in predicted]
    def row(phase: str) -> list[str]:
        m, p = measured.get(phase), predicted.get(phase)
        error = "" if not m or p is None else f"{100 * (p - m) / m:+.1f} %"
        return [phase, _mib(m), *([_mib(p), error] if predicted else [])]
    head = ["phase", "measured", *(["predicted", "error"] if predicted else [])]
    return table(head, map(row, known)) if known else Html()


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value / _MIB:.1f} MiB"
