"""Covers a front: trains or mixes each point of a plan, measures it on held-out prompts, and keeps what was measured.

After every point `pareto.json` is written whole, so a command that was killed goes on where it stopped, and inside a
run from its newest checkpoint. Knows plans and runs; draws nothing by itself.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, final

from posttrain import checkpoint, compose, config, run
from posttrain.errors import ConfigError, DataError, PosttrainError, Problem, RunInUse
from posttrain.progress import doing
from posttrain.registry import Registry
from posttrain.rundir import CONFIG, read_metrics, replace_text
from posttrain.timing import Phases

from posttrain_objectives.pareto.archive import ParetoArchive, Point
from posttrain_objectives.pareto.plan import Candidate, Plan, of_base
from posttrain_objectives.pareto.soups import soup

if TYPE_CHECKING:
    from collections.abc import Iterator

RECORD, FORMAT = "pareto.json", 1
"""The file in a front's folder, and the version of what it holds."""


@final
@dataclass(frozen=True, slots=True)
class Front:
    """What was measured so far, in the order of measuring."""

    objectives: tuple[str, ...]
    reference: tuple[float, ...]
    confidence: float
    base: str
    """`Plan.fingerprint` of what all points share."""
    points: tuple[Point, ...] = ()

    def archive(self, first: int | None = None) -> ParetoArchive:
        """Of all points, or of the `first` ones."""
        archive = ParetoArchive(self.objectives, reference=self.reference, confidence=self.confidence)
        for point in self.points[:first]:
            archive.insert(point.values, tag=point.tag, errors=point.errors, checkpoint=point.checkpoint)
        return archive

    def hypervolumes(self) -> list[float]:
        """After each point."""
        return [self.archive(n).hypervolume() for n in range(1, len(self.points) + 1)]

    def with_point(self, point: Point) -> Front:
        return Front(self.objectives, self.reference, self.confidence, self.base, (*self.points, point))

    def to_json(self) -> str:
        """Also what follows from the points, for other programs to read: front, knee and hypervolumes."""
        archive = self.archive()
        found = {"front": [p.tag for p in archive.front()], "knee": archive.knee().tag if len(archive) else None,
                 "hypervolume": self.hypervolumes()}
        return json.dumps({"format": FORMAT, **asdict(self), **found}, ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Self:
        """Raises `DataError` where it is none, or of another version."""
        try:
            given: Mapping[str, Any] = json.loads(text)
            if given["format"] != FORMAT:
                raise ValueError(f"it has format {given['format']!r}, this version reads {FORMAT}")
            points = tuple(Point(tuple(p["values"]), p["tag"], tuple(p["errors"]), p["checkpoint"])
                           for p in given["points"])
            front = cls(tuple(given["objectives"]), tuple(given["reference"]), given["confidence"], given["base"],
                        points)
            front.archive()
            return front
        except (ValueError, KeyError, TypeError) as error:
            raise DataError([Problem(f"not the record of a front: {error!r}", where)],
                            next_step="choose another folder: front=DIR") from error


def cover(plan: Plan, *, registry: Registry, output: run.Output = "auto",
          tell: Callable[[str], None] = lambda text: None,
          after: Callable[[Front], None] = lambda front: None) -> Front:
    """Measure every candidate that is not in the folder yet; `tell` takes lines of progress, `after` what was measured
    after each point. Raises `ConfigError` where the folder holds the front of something else, `RunInUse` where another
    process covers it, and what a run raises: called again it goes on there."""
    with _held(plan.directory):
        front = opened(plan)
        replace_text(plan.directory / RECORD, front.to_json())
        done = {point.tag for point in front.points}
        for number, candidate in enumerate(plan.candidates, 1):
            place = f"point {number} of {len(plan.candidates)}, {candidate.name}"
            if candidate.name in done:
                tell(f"{place}: is there")
                continue
            tell(f"{place}: {'mixing' if candidate.mix else 'training'}")
            point = (_mixed if candidate.mix else _trained)(plan, candidate, registry, output)
            front = front.with_point(point)
            replace_text(plan.directory / RECORD, front.to_json())
            means = ", ".join(f"{name} {x:.4g}" for name, x in zip(front.objectives, point.values))
            tell(f"{place}: {means}; hypervolume {front.archive().hypervolume():.4g}")
            after(front)
    return front


def opened(plan: Plan) -> Front:
    """What the folder holds, or a front without points. Raises `ConfigError` where it is of something else."""
    path, wanted = plan.directory / RECORD, plan.settings
    new = Front(wanted.objectives, wanted.reference, wanted.confidence, plan.fingerprint())
    if not path.is_file():
        return new
    front = Front.from_json(path.read_text("utf-8"), str(path))
    different = [name for name in ("objectives", "reference", "confidence", "base")
                 if getattr(front, name) != getattr(new, name)]
    if different:
        texts = [f"{name}: is {getattr(new, name)}, was {getattr(front, name)}" if name != "base" else
                 f"base: {plan.base.name}, or a Python file of it, is not what it was" for name in different]
        raise ConfigError([Problem(text, str(path)) for text in texts],
                          title="the folder holds a front whose points would not compare with further ones:",
                          next_step="choose another folder: front=DIR")
    return front


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """The folder, made and locked; the system lets go of the lock of a process that dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(directory / ".lock", timeout=0)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise RunInUse(f"another process covers the front in {directory}\n"
                       "wait for it, stop it, or choose another folder: front=DIR") from error
    except OSError as error:
        raise ConfigError([Problem(f"cannot be the folder of a front: {error.strerror or error}", str(directory))],
                          next_step="choose another folder: front=DIR") from error
    try:
        yield
    finally:
        lock.release()


def _trained(plan: Plan, candidate: Candidate, registry: Registry, output: run.Output) -> Point:
    """A run from its start, or from where it was stopped; measured by its own last evaluation."""
    directory = plan.directory / candidate.name
    try:
        if (directory / CONFIG).is_file():
            run.resume(directory, registry=registry, output=output)
        else:
            run.train(plan.base, plan.settings_of(candidate), registry=registry, output=output)
    except run.Interrupted as stop:
        raise run.Interrupted(f"{stop}\nor with it and all further points: "
                              f"{shlex.join(['posttrain', 'pareto', str(plan.file), *plan.overrides])}") from stop
    evaluated = [record for record in read_metrics(directory) if "eval/reward/mean" in record]
    _, newest = checkpoint.published(directory / checkpoint.FOLDER)[-1]
    return _measured(plan, candidate, evaluated[-1], newest)


def _mixed(plan: Plan, candidate: Candidate, registry: Registry, output: run.Output) -> Point:
    """The mixed weights of runs that are there, measured with the base configuration."""
    target = plan.directory / candidate.name / run.POLICY
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        for stage in target.parent.glob(".*"):  # of a command that was killed
            shutil.rmtree(stage)
        with doing(f"mixing {candidate.name}"):
            soup([plan.directory / name / run.POLICY for name in candidate.mix], list(candidate.mix.values()), target)
    policy = plan.loaded.settings.policy
    other = [f"policy.{name}=''" for name in ("model", "revision") if getattr(policy, name, "")]
    weights = f"policy.weights={json.dumps(str(target.resolve()))}"
    loaded = config.load(plan.base, [*of_base(plan.overrides), *other, weights], registry)
    parts = compose.build(loaded)
    parts.evaluator.sync(parts.policy.params(), parts.policy.version)
    with parts.workers, doing("evaluating"):
        metrics, _ = run.LOOPS["rl"][1](parts, loaded.settings, Phases(time.perf_counter))
    return _measured(plan, candidate, metrics.values_by_name(), target)


def _measured(plan: Plan, candidate: Candidate, metrics: Mapping[str, Any], weights: Path) -> Point:
    """Means over the held-out prompts to which a reward applies, and their standard errors s / sqrt(n), s with divisor
    n - 1; none where a reward applies to one prompt alone."""
    names = plan.settings.objectives
    values = _finite([metrics.get(f"eval/reward/{name}/mean") for name in names], names, candidate)
    spread = _finite([metrics.get(f"eval/reward/{name}/std") for name in names], names, candidate)
    n = [plan.prompts - metrics.get(f"eval/reward/{name}/excluded", 0) for name in names]
    errors = tuple(s / math.sqrt(k - 1) for s, k in zip(spread, n)) if min(n) > 1 else ()
    return Point(values, candidate.name, errors,
                 weights.relative_to(plan.directory).as_posix())


def _finite(found: Sequence[float | None], names: Sequence[str], candidate: Candidate) -> tuple[float, ...]:
    if missing := [name for name, x in zip(names, found) if x is None or not math.isfinite(x)]:
        raise PosttrainError(f"{candidate.name}: {', '.join(missing)} has no mean over the held-out prompts; a reward "
                             "that returns None for all of them cannot be an objective")
    return tuple(float(x) for x in found if x is not None)
