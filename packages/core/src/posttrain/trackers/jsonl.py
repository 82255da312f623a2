"""Mirrors the metrics to another file, line for line as `metrics.jsonl` of the run directory has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from posttrain.errors import InputError, Problem
from posttrain.protocols import ObservedRun, TrackerSession
from posttrain.rundir import METRICS, JsonLines, metric_record
from posttrain.trackers import Silent


@final
@dataclass(frozen=True, slots=True)
class Jsonl:
    """Writes metrics as one JSON object a line.

    >>> Jsonl(path="mirror.jsonl").path
    'mirror.jsonl'
    """

    path: str = ""
    """A second file for the metrics; empty writes none: the run directory's own file is always written."""

    def start(self, run: ObservedRun) -> TrackerSession:
        """Raises `InputError` where the file holds lines of another run."""
        original = run.directory / METRICS
        if not self.path or Path(self.path).resolve() == original.resolve():
            return Silent()
        return _Mirror(original, Path(self.path))


@final
class _Mirror:
    """Begins with a copy of the run's history, which resuming has cut back, so that both files stay equal."""

    def __init__(self, original: Path, mirror: Path) -> None:
        history = original.read_bytes()
        there = mirror.read_bytes() if mirror.exists() else b""
        if there and there.partition(b"\n")[0] != history.partition(b"\n")[0]:
            raise InputError([Problem("holds the metrics of another run", str(mirror))],
                             next_step="give another file: trackers.jsonl.path=FILE")
        mirror.parent.mkdir(parents=True, exist_ok=True)
        mirror.write_bytes(history)
        self._lines = JsonLines(mirror)

    def phase_started(self, phase: str) -> None:
        pass

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        self._lines.append([metric_record(step, metrics)])

    def finished(self, error: BaseException | None) -> None:
        self._lines.close()
