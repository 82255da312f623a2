"""Curves of one or several runs as one picture, from their `metrics.jsonl` alone; works offline and on living runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import InputError, PluginError, Problem
from posttrain.report.history import Curves, checked_labels
from posttrain.rundir import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes: the first of `names` that a run has, and what belongs to it."""

    title: str
    unit: str
    names: tuple[str, ...]
    band: str = ""
    """Metric of the standard deviation, drawn as a band around the curve."""
    beside: str = ""
    """Metric drawn dashed, on an axis of its own."""


PANELS = (
    Panel("Reward", "mean ± sd over episodes", ("reward/mean",), band="reward/std"),
    Panel("Reward on held-out prompts", "mean over episodes", ("eval/reward/mean", "eval/reward")),
    Panel("KL to the reference", "nats per token", ("kl/reference",), beside="kl/coef"),
    Panel("Entropy of the policy", "nats per token", ("policy/entropy",)),
    Panel("Length of answers", "tokens", ("episode/length",)),
    Panel("Loss on held-out answers", "nats per token", ("eval/loss",)),
)


def plot(run_directories: Sequence[Path], output: Path, labels: Sequence[str] | None = None) -> None:
    """Draw the panels for which some run has numbers; `.png` or `.svg` by the name of `output`.

    `labels` name the runs, by default by their directories. Raises `PluginError` where matplotlib is missing and
    `InputError` where no run has anything to draw or the format is not known.
    """
    names = checked_labels(run_directories, labels)
    if output.suffix not in FORMATS:
        raise InputError([Problem(f"a picture ends in {' or '.join(FORMATS)}", str(output))])
    runs = [Curves(name.replace("$", r"\$"), read_metrics(path)) for name, path in zip(names, run_directories)]
    panels = _panels_of(runs)
    if not panels:
        raise InputError([Problem("no metrics to draw", ", ".join(map(str, run_directories)))],
                         next_step="they appear after the first step: posttrain resume RUN")
    figure = _drawn(runs, panels)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=140)
    except OSError as error:
        raise InputError([Problem(f"cannot write: {error.strerror or error}", str(output))]) from error


def _panels_of(runs: Sequence[Curves]) -> list[Panel]:
    """Panels with something to draw. Loss terms of a policy gradient say little; those of given answers say all."""
    rewarded = any(run.first(["reward/mean"]) for run in runs)
    losses = {name for run in runs for record in run.records for name in record if name.startswith("loss/")}
    training = [] if rewarded else [Panel(f"Training {name}", "per step", (name,)) for name in sorted(losses)]
    return [*training, *(panel for panel in PANELS if any(run.first(panel.names) for run in runs))]


def _drawn(runs: Sequence[Curves], panels: Sequence[Panel]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PluginError(["plots need matplotlib, which is not installed: "
                           "pip install 'posttrain-core[report]'"]) from error
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows + 0.5), layout="constrained")
    for place, panel in enumerate(panels, 1):
        _draw_panel(figure.add_subplot(rows, columns, place), panel, runs)
    if len(runs) > 1:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], color=f"C{i % 10}", label=run.label) for i, run in enumerate(runs)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(runs), 4))
    else:
        figure.suptitle(runs[0].label)
    return figure


def _draw_panel(axes: Axes, panel: Panel, runs: Sequence[Curves]) -> None:
    beside = axes.twinx() if any(panel.beside and run.column(panel.beside)[0] for run in runs) else None
    for i, run in enumerate(runs):
        color = f"C{i % 10}"
        if name := run.first(panel.names):
            steps, values = run.column(name)
            axes.plot(steps, values, color=color, marker="o" if len(steps) <= 20 else "", markersize=3)
            at, widths = run.column(panel.band)
            if at == steps:
                axes.fill_between(steps, [v - w for v, w in zip(values, widths)],
                                  [v + w for v, w in zip(values, widths)], color=color, alpha=0.15, linewidth=0)
        if beside is not None:
            beside.plot(*run.column(panel.beside), color=color, linestyle="--", linewidth=1)
    axes.set(title=panel.title, xlabel="step", ylabel=panel.unit)
    axes.grid(alpha=0.25)
    if beside is not None:
        beside.set_ylabel("coefficient (dashed)")
