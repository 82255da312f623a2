"""What the person at the terminal sees: a live bar on a terminal, one plain line a step elsewhere, or JSON lines.

Knows the names of the usual metrics and shows those that are there. The clock and the stream come in as arguments.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO, final

from posttrain.errors import did_you_mean
from posttrain.protocols import ObservedRun, TrackerSession
from posttrain.rundir import metric_record
from posttrain.trackers import Silent

if TYPE_CHECKING:
    from rich.console import Console as Terminal

Clock = Callable[[], float]
"""Seconds, rising."""


@final
@dataclass(frozen=True, slots=True)
class Console:
    """Shows progress on standard output, in the form the command line asked for.

    >>> Console(every=10).every
    10
    """

    every: int = 1
    """Steps between printed lines; evaluations and the last step are always printed."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")

    def start(self, run: ObservedRun) -> TrackerSession:
        """Raises `ValueError` where `run.output` is none of the known forms."""
        form = _form_for(sys.stdout) if run.output == "auto" else run.output
        if form not in FORMS:
            raise ValueError(f"unknown output '{form}'{did_you_mean(form, FORMS)}; known: {', '.join(FORMS)}")
        return FORMS[form](run, self.every, sys.stdout, time.monotonic)


def _form_for(out: TextIO) -> str:
    """A live display needs a terminal that can move its cursor and somebody who looks at it."""
    return "live" if out.isatty() and os.environ.get("TERM") != "dumb" and "CI" not in os.environ else "plain"


@final
class Plain:
    """`step 12/100  reward 0.53±0.21  kl 0.011  entropy 1.32  length 5.1  4210 tok/s  412 MB  eta 0:41`."""

    def __init__(self, run: ObservedRun, every: int, out: TextIO, clock: Clock) -> None:
        self._run, self._every, self._out = run, every, out
        self._pace = Pace(run.steps, clock)

    def phase_started(self, phase: str) -> None:
        pass

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        self._pace.finish(step)
        for line in lines(step, self._run, metrics, self._every, self._pace):
            print(line, file=self._out, flush=True)

    def finished(self, error: BaseException | None) -> None:
        print(ending(self._run, self._pace, error), file=self._out, flush=True)


@final
class JsonObjects:
    """One JSON object a line, each with its `event`: `started`, `step` (as in metrics.jsonl) and `finished`."""

    def __init__(self, run: ObservedRun, every: int, out: TextIO, clock: Clock) -> None:
        self._run, self._every, self._out = run, every, out
        self._print({"event": "started", "directory": str(run.directory), "steps": run.steps, "loop": run.loop})

    def phase_started(self, phase: str) -> None:
        pass

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        if _is_due(step, self._run.steps, self._every) or _evaluation(metrics):
            self._print({"event": "step", **metric_record(step, metrics)})

    def finished(self, error: BaseException | None) -> None:
        self._print({"event": "finished", "directory": str(self._run.directory),
                     "error": None if error is None else f"{type(error).__name__}: {error}"})

    def _print(self, record: Mapping[str, object]) -> None:
        print(json.dumps(record, allow_nan=False), file=self._out, flush=True)


@final
class Live:
    """The plain lines, above a bar that moves: steps, time left, the phase the run is in and for how long."""

    def __init__(self, run: ObservedRun, every: int, terminal: Terminal, clock: Clock) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

        self._run, self._every = run, every
        self._pace = Pace(run.steps, clock)
        self._status = _Status(self._pace, clock)
        self._bar = Progress(
            SpinnerColumn(), TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}", markup=False), console=terminal, transient=True,
            refresh_per_second=4, get_time=clock)
        self._task = self._bar.add_task("", total=run.steps, status=self._status)
        self._bar.start()

    def phase_started(self, phase: str) -> None:
        self._status.enter(phase)

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        self._pace.finish(step)
        self._bar.update(self._task, completed=step)
        for line in lines(step, self._run, metrics, self._every, self._pace):
            self._bar.console.print(line, markup=False)

    def finished(self, error: BaseException | None) -> None:
        self._bar.stop()
        self._bar.console.print(ending(self._run, self._pace, error), markup=False,
                                style="green" if error is None else "red")


def _live(run: ObservedRun, every: int, out: TextIO, clock: Clock) -> TrackerSession:
    from rich.console import Console as Terminal

    return Live(run, every, Terminal(file=out), clock)


FORMS: Mapping[str, Callable[[ObservedRun, int, TextIO, Clock], TrackerSession]] = {
    "plain": Plain, "json": JsonObjects, "live": _live, "quiet": lambda run, every, out, clock: Silent(),
}


@final
class Pace:
    """How long the steps of this process took, and so how long the rest will take."""

    def __init__(self, steps: int, clock: Clock) -> None:
        self._steps, self._clock, self._start = steps, clock, clock()
        self._before: int | None = None
        self.step = 0
        """The last step finished."""

    def finish(self, step: int) -> None:
        """An evaluation before the first step is step 0."""
        self._before = max(step - 1, 0) if self._before is None else self._before
        self.step = step

    @property
    def elapsed(self) -> float:
        return self._clock() - self._start

    @property
    def left(self) -> float:
        """Seconds; 0 where nothing is left or nothing is known yet."""
        done = self.step - (self._before or 0)
        return self.elapsed / done * (self._steps - self.step) if done > 0 else 0.0


@final
class _Status:
    """Text that is made anew whenever the bar is drawn, so that a phase that hangs is seen to hang."""

    def __init__(self, pace: Pace, clock: Clock) -> None:
        self._pace, self._clock = pace, clock
        self.enter("starting")

    def enter(self, phase: str) -> None:
        self._phase, self._since = phase, self._clock()

    def __str__(self) -> str:
        eta = f"eta {duration(self._pace.left)}  " if self._pace.left else ""
        return f"{eta}{self._phase} {duration(self._clock() - self._since)}"


def lines(step: int, run: ObservedRun, metrics: Mapping[str, float], every: int, pace: Pace) -> list[str]:
    """What is printed of a step: its metrics where it is due, and an evaluation whenever there is one."""
    place = f"{step}/{run.steps}"
    found = []
    if _is_due(step, run.steps, every) and (shown := _training(metrics, run.loop)):
        left = [f"eta {duration(pace.left)}"] if pace.left else []
        found.append("  ".join([f"step {place}", *shown, *_speed(metrics), *left]))
    if shown := _evaluation(metrics):
        found.append("  ".join([f"eval {place}", *shown]))
    return found


def ending(run: ObservedRun, pace: Pace, error: BaseException | None) -> str:
    """The last line. The command line tells the error itself."""
    if error is None:
        return f"finished {pace.step}/{run.steps} steps in {duration(pace.elapsed)}  {run.directory}"
    return f"stopped after step {pace.step}/{run.steps} by {type(error).__name__}  {run.directory}"


def duration(seconds: float) -> str:
    """
    >>> duration(41.2), duration(3725)
    ('0:41', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _is_due(step: int, steps: int, every: int) -> bool:
    return step % every == 0 or step == steps


def _training(metrics: Mapping[str, float], loop: str) -> list[str]:
    measured = _spread(metrics, "reward") if loop == "rl" else _losses(metrics)
    shown = (("kl/reference", "kl {}", _small), ("kl/coef", "coef {}", _small),
             ("policy/entropy", "entropy {}", "{:.2f}".format), ("episode/length", "length {}", "{:.1f}".format))
    return measured + [text.format(form(metrics[name])) for name, text, form in shown
                       if name in metrics and (name != "kl/coef" or metrics[name])]


def _speed(metrics: Mapping[str, float]) -> list[str]:
    shown = (("timing/tokens_per_second", "{:.0f} tok/s"), ("timing/memory_mb", "{:.0f} MB"))
    return [text.format(metrics[name]) for name, text in shown if name in metrics]


def _evaluation(metrics: Mapping[str, float]) -> list[str]:
    loss = [f"loss {_small(metrics['eval/loss'])}"] if "eval/loss" in metrics else []
    return _spread(metrics, "eval/reward") + loss


def _spread(metrics: Mapping[str, float], name: str) -> list[str]:
    """Mean and, where known, standard deviation over episodes."""
    mean = metrics.get(f"{name}/mean", metrics.get(name))
    if mean is None:
        return []
    deviation = metrics.get(f"{name}/std")
    return [f"reward {mean:.2f}" + (f"±{deviation:.2f}" if deviation is not None else "")]


def _losses(metrics: Mapping[str, float]) -> list[str]:
    names = sorted(name for name in metrics if name.startswith("loss/"))
    return [f"{'loss' if len(names) == 1 else name} {_small(metrics[name])}" for name in names]


def _small(x: float) -> str:
    """Three decimals, or as many as it takes to see that a number is not 0."""
    return f"{x:.1e}" if 0 < abs(x) < 0.001 else f"{x:.3f}"
