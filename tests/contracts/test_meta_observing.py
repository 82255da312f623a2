"""Deliberately wrong trackers, one bug each, and the contract test that must catch it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import pytest
from contracts.test_observing import TestJsonl as JsonlContract
from posttrain.hookspecs import Component, hookimpl
from posttrain.protocols import ObservedRun, TrackerSession
from posttrain.testing import failures
from posttrain.trackers.jsonl import Jsonl


@hookimpl
def components() -> Iterable[Component]:
    """The tracker of this file."""
    yield Component("tracker", "mirror_of_tests", f"{__name__}:Mirror", "a line per step")


class Session:
    """Appends a line per step to `mirror.jsonl`; a resumed run goes on after the lines up to where it is."""

    def __init__(self, run: ObservedRun, path: Path) -> None:
        kept = len((run.directory / "metrics.jsonl").read_text().splitlines())
        there = path.read_text().splitlines(keepends=True) if path.exists() else []
        self.run, self.path = run, path.resolve()
        self.path.write_text("".join(there[:kept]))

    def phase_started(self, phase: str) -> None: ...

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "reward/mean": metrics.get("reward/mean", 0.0)}) + "\n")

    def finished(self, error: BaseException | None) -> None: ...


class KeepsAll(Session):
    def __init__(self, run: ObservedRun, path: Path) -> None:
        self.run, self.path = run, path.resolve()


class Forgets(Session):
    def __init__(self, run: ObservedRun, path: Path) -> None:
        super().__init__(run, path)
        self.path.write_text("")


class TidiesUp(Session):
    def finished(self, error: BaseException | None) -> None:
        shutil.rmtree(self.run.directory / "checkpoints", ignore_errors=True)


class Rewrites(Session):
    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        super().step_finished(step, metrics)
        with (self.run.directory / "samples.jsonl").open("a") as file:
            file.write('{"step": 0}\n')


class StrictJson(Session):
    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        json.dumps(dict(metrics), allow_nan=False)
        super().step_finished(step, metrics)


class Pops(Session):
    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        super().step_finished(step, metrics)
        dict.pop(metrics, "timing/seconds", None)  # type: ignore[arg-type]  # the bug


class DividesByProgress(Session):
    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        super().step_finished(step, {**metrics, "left": (self.run.steps - step) / step})


class ShowsTheCause(Session):
    def finished(self, error: BaseException | None) -> None:
        if error is not None:
            print(error.args[0])


class SkipsEveryOther(Session):
    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        if step % 2:
            super().step_finished(step, metrics)


OPEN: list[Path] = []


class Global(Session):
    def __init__(self, run: ObservedRun, path: Path) -> None:
        super().__init__(run, path)
        OPEN[:] = [self.path]

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        self.path = OPEN[0]
        super().step_finished(step, metrics)


class Exits(Session):
    def __init__(self, run: ObservedRun, path: Path) -> None:
        if not run.directory.is_dir():
            sys.exit("no such run")
        super().__init__(run, path)


@final
@dataclass(frozen=True)
class Mirror:
    """Starts a session of the given kind."""

    session: str = "Session"
    """Class of the session."""
    path: str = "mirror.jsonl"
    """File of the metrics."""

    def start(self, run: ObservedRun) -> TrackerSession:
        started: TrackerSession = globals()[self.session](run, Path(self.path))
        return started


BROKEN: Sequence[tuple[str, str]] = [
    ("KeepsAll", "test_a_resumed_run_has_no_step_twice"),
    ("Forgets", "test_a_resumed_run_has_no_step_twice"),
    ("TidiesUp", "test_leaves_the_run_alone"),
    ("Rewrites", "test_leaves_the_run_alone"),
    ("StrictJson", "test_survives_awkward_metrics"),
    ("Pops", "test_does_not_change_metrics"),
    ("DividesByProgress", "test_survives_any_order_of_events"),
    ("ShowsTheCause", "test_a_run_may_end_by_any_error"),
    ("SkipsEveryOther", "test_every_step_is_recorded_once"),
    ("Global", "test_runs_do_not_mix"),
    ("Exits", "test_where_it_cannot_write_the_run_goes_on"),
]


class MirrorContract(JsonlContract):
    """Of mirrors, on whatever component."""

    plugins = (sys.modules[__name__],)


@pytest.mark.parametrize(("session", "test"), BROKEN)
def test_a_broken_tracker_is_caught(session: str, test: str, tmp_path: Path) -> None:
    assert dict(failures(MirrorContract, Mirror(session), only=test, tmp_path=tmp_path)), f"{session} passes {test}"


@pytest.mark.parametrize("component", [Jsonl(path="mirror.jsonl"), Mirror()], ids=str)
def test_a_correct_tracker_passes(component: Any, tmp_path: Path) -> None:
    assert not dict(failures(MirrorContract, component, tmp_path=tmp_path))
