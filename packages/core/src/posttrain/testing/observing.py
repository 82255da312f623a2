"""Contract of trackers: they observe a run, and neither change nor stop nor lose it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import pytest

from posttrain import trackers
from posttrain.protocols import Tracker
from posttrain.rundir import RunDirectory
from posttrain.testing.contract import ComponentContract, named

METRIC = "reward/mean"
"""The metric whose values are looked for in what a tracker keeps."""

AWKWARD: Mapping[str, float] = {
    METRIC: float("nan"), "loss/policy": float("inf"), "loss/value": float("-inf"), "kl/coef": 1e300, "zero": -0.0,
    "whole": 3, "a/very/deep/" + "/".join("name" * 10): 1.0, "x" * 300: 1.0, "with spaces, and: signs": 1.0,
    "größe/奖励": 1.0, "[bold]markup[/bold]": 1.0, "100%": 1.0, "timing/seconds": 0.5, "timing/memory_mb": 412.5}
"""Metrics as a diverging run and foreign components have them."""


@final
@dataclass(frozen=True, slots=True)
class Observed:
    """A run as a tracker sees it."""

    directory: Path
    steps: int = 4
    loop: str = "rl"
    output: str = "plain"


class TrackerContract(ComponentContract):
    """Contract of trackers (`posttrain.protocols.Tracker`).

    Each test runs in a folder of its own, which is the working directory while the tracker works, so that a relative
    path of a component lies there. A metric is in the run directory before any tracker hears of it.
    """

    kind = "tracker"
    protocol = Tracker
    outputs: ClassVar[tuple[str, ...]] = ("plain", "json", "quiet")
    """What the command line may have been asked to show."""

    def recorded(self, component: Any, directory: Path) -> Sequence[tuple[int, float]] | None:
        """Step and value of the metric `reward/mean` that the tracker holds of the run in `directory`, all of them in
        the order in which they are kept, read from where it keeps them. None where it keeps nothing (it prints)."""
        pytest.fail(f"{type(self).__name__} does not say what was recorded; write def recorded(self, component, "
                    "directory): return [(step, value), ...]; or return None, where the tracker keeps nothing",
                    pytrace=False)

    def test_every_step_is_recorded_once(self, component: Any, tmp_path: Path) -> None:
        """What the run measured is what is seen later: each step once, in order, with its value."""
        with made(tmp_path / "once") as files:
            session = component.start(Observed(files.path))
            observe(session, files, range(1, 5))
            session.finished(None)
            self._assert_recorded(component, files.path, range(1, 5))

    def test_a_resumed_run_has_no_step_twice(self, component: Any, tmp_path: Path) -> None:
        """Resuming cuts the metrics back to the checkpoint and repeats the steps after it, equal as they were."""
        with made(tmp_path / "resumed") as files:
            session = component.start(Observed(files.path))
            observe(session, files, range(1, 4))
            session.finished(RuntimeError("the machine was taken away"))
            files.truncate_after(2)
            session = component.start(Observed(files.path))
            observe(session, files, range(3, 5))
            session.finished(None)
            self._assert_recorded(component, files.path, range(1, 5))

    def test_runs_do_not_mix(self, component: Any, tmp_path: Path) -> None:
        """What belongs to one run lives in its session: two at once do not know of each other."""
        with made(tmp_path / "one") as one:
            first = component.start(Observed(one.path))
            with made(tmp_path / "two") as two:
                second = component.start(Observed(two.path))
                observe(first, one, [1])
                observe(second, two, [1, 2])
                observe(first, one, [2, 3])
                second.finished(None)
                self._assert_recorded(component, two.path, [1, 2])
            with chdir(one.path.parent):
                first.finished(None)
                self._assert_recorded(component, one.path, [1, 2, 3])

    def test_leaves_the_run_alone(self, component: Any, tmp_path: Path) -> None:
        """Files of the run that the tracker did not make stay as they are, byte for byte."""
        with made(tmp_path / "alone") as files:
            (files.path / "checkpoints" / "step-1").mkdir(parents=True)
            (files.path / "checkpoints" / "step-1" / "weights.bin").write_bytes(b"weights")
            files.append_samples(1, [{"completion": "2"}])
            before = contents(files.path)
            session = component.start(Observed(files.path))
            unchanged(before, files.path, "start")
            for step in (1, 2):
                session.phase_started("rollout")
                files.append_metrics(step, metrics_of(step))
                before = {**before, **{name: data for name, data in contents(files.path).items() if name in before}}
                session.step_finished(step, metrics_of(step))
                unchanged(before, files.path, "step_finished")
            session.finished(None)
            unchanged(before, files.path, "finished")

    def test_does_not_change_metrics(self, component: Any, tmp_path: Path) -> None:
        """The same map of metrics goes to every tracker."""
        with made(tmp_path / "metrics") as files:
            session, metrics = component.start(Observed(files.path)), metrics_of(1)
            files.append_metrics(1, metrics)
            session.step_finished(1, metrics)
            session.finished(None)
            assert metrics == metrics_of(1), f"{named(component)} changed the metrics it was given"

    def test_survives_awkward_metrics(self, component: Any, tmp_path: Path) -> None:
        """NaN and infinity are what a tracker is there to show; names are other people's."""
        for output in self.outputs:
            with made(tmp_path / f"awkward-{output}") as files:
                session = component.start(Observed(files.path, output=output))
                for step, metrics in enumerate((AWKWARD, {}, {f"column{i}/mean": 1.0 for i in range(200)}), start=1):
                    files.append_metrics(step, metrics)
                    session.step_finished(step, metrics)
                session.finished(None)

    def test_survives_any_order_of_events(self, component: Any, tmp_path: Path) -> None:
        """Runs end before their first step, begin with an evaluation (step 0), go on from a later one, and are longer
        or shorter than they were meant to be."""
        for number, (loop, steps) in enumerate((("rl", []), ("supervised", [0]), ("rl", [0, 1]), ("rl", [7, 8, 9]))):
            with made(tmp_path / f"order-{number}") as files:
                session = component.start(Observed(files.path, loop=loop))
                for phase in ("rollout", "rollout", "a phase of the future"):
                    session.phase_started(phase)
                observe(session, files, steps)
                session.finished(None)

    def test_a_run_may_end_by_any_error(self, component: Any, tmp_path: Path) -> None:
        """The run's own error is told to the user; a tracker that raised would bury it."""
        errors = (ValueError("first line\nsecond line [not/markup] {} %s"), KeyboardInterrupt(), SystemExit(3),
                  RuntimeError())
        for number, error in enumerate(errors):
            with made(tmp_path / f"error-{number}") as files:
                session = component.start(Observed(files.path))
                observe(session, files, [1])
                session.finished(error)

    def test_where_it_cannot_write_the_run_goes_on(self, component: Any, tmp_path: Path) -> None:
        """A tracker may raise an `Exception`: core switches it off with a warning. It may not leave the process."""
        (tmp_path / "file").write_text("no folder")
        run = Observed(tmp_path / "file" / "run")
        with chdir(tmp_path):
            try:
                session = trackers.start({"it": component}, run)
                session.phase_started("rollout")
                session.step_finished(1, metrics_of(1))
                session.finished(None)
            except BaseException as error:
                pytest.fail(f"where the run directory cannot be written, {named(component)} lets {error!r} out, which "
                            "stops the training; raise an Exception, and never call sys.exit", pytrace=False)

    def _assert_recorded(self, component: Any, directory: Path, steps: Sequence[int]) -> None:
        found = self.recorded(component, directory)
        if found is not None:
            expected = [(step, metrics_of(step)[METRIC]) for step in steps]
            assert [step for step, _ in found] == list(steps), \
                f"steps {[step for step, _ in found]} are recorded of a run of the steps {list(steps)}"
            assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6), \
                f"{METRIC} is recorded as {found}, the run measured {expected}"


@contextmanager
def made(folder: Path) -> Iterator[RunDirectory]:
    """A run directory in a folder of its own, which is the working directory meanwhile."""
    folder.mkdir()
    manifest = {"posttrain": "0", "started": "2026-01-02T03:04:05+00:00"}
    with chdir(folder), RunDirectory.create(folder / "run", config="steps: 4\n", manifest=manifest) as files:
        yield files


def metrics_of(step: int) -> dict[str, float]:
    """What the run measured in a step."""
    return {METRIC: 0.125 * step, "loss/policy": -0.5, "timing/seconds": 0.25, "timing/unix_time": 1.7e9 + step}


def observe(session: Any, files: RunDirectory, steps: Sequence[int]) -> None:
    """Steps of a run, as the loop tells of them."""
    for step in steps:
        for phase in ("rollout", "reward", "update"):
            session.phase_started(phase)
        files.append_metrics(step, metrics_of(step))
        session.step_finished(step, metrics_of(step))


def contents(directory: Path) -> dict[str, bytes]:
    """Files by name, but for those that say who holds the run."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*"))
            if path.is_file() and not path.name.startswith(".")}


def unchanged(before: Mapping[str, bytes], directory: Path, during: str) -> None:
    """Fail where a file is gone or another one."""
    now = contents(directory)
    for name, data in before.items():
        assert name in now, f"{during} deleted {name} of the run directory"
        assert now[name] == data, f"{during} changed {name} of the run directory; a tracker writes to files of its own"
