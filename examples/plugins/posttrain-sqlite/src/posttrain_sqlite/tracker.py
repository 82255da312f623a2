"""The tracker `sqlite`: runs and their metrics in a database that many runs share, to be asked with SQL."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import final

from posttrain.protocols import ObservedRun, TrackerSession
from posttrain.rundir import TIMING, read_metrics

SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (run TEXT PRIMARY KEY, loop TEXT, steps INTEGER, state TEXT);
CREATE TABLE IF NOT EXISTS metrics (run TEXT, step INTEGER, name TEXT, value REAL, PRIMARY KEY (run, step, name))
    WITHOUT ROWID;
"""
"""`run` is the run directory; `state` is running, finished, or the error that ended the run."""
INSERT = "INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?)"
PATIENCE = 30.0
"""Seconds to wait for another run that is writing."""


@final
@dataclass(frozen=True, slots=True)
class Sqlite:
    """Two tables, `runs (run, loop, steps, state)` and `metrics (run, step, name, value)`; NaN is stored as NULL.

    >>> Sqlite().path
    'metrics.sqlite'
    """

    path: str = "metrics.sqlite"
    """The database; made where it is missing. A relative path begins at the folder that posttrain is started in."""
    timing: bool = True
    """Also what differs from machine to machine: seconds, memory, tokens per second."""

    def start(self, run: ObservedRun) -> TrackerSession:
        """A run begins or goes on; raises `sqlite3.Error` where the file cannot be written or is no database."""
        return _Session(Path(self.path).absolute(), run, self.timing)


@final
class _Session:
    """What belongs to one run. Begins with the run's history, which resuming has cut back to the checkpoint."""

    def __init__(self, path: Path, run: ObservedRun, timing: bool) -> None:
        self._path, self._run, self._timing = path, str(run.directory.absolute()), timing
        with closing(sqlite3.connect(path, timeout=PATIENCE)) as database:
            database.executescript(SCHEMA)
            with database:
                database.execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, 'running')",
                                 (self._run, run.loop, run.steps))
                database.execute("DELETE FROM metrics WHERE run = ?", (self._run,))
                for record in read_metrics(run.directory):
                    step, timings = record.pop("step"), record.pop("timing")
                    record.pop("nonfinite", None)  # how many there were
                    database.executemany(INSERT, self._rows(
                        step, {**record, **{f"{TIMING}{name}": x for name, x in timings.items()}}))

    def phase_started(self, phase: str) -> None:
        """Part of a step begins; not of interest here."""

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of a step, in one transaction."""
        with closing(sqlite3.connect(self._path, timeout=PATIENCE)) as database, database:
            database.executemany(INSERT, self._rows(step, metrics))

    def finished(self, error: BaseException | None) -> None:
        """The run ended, by itself or by an error."""
        state = "finished" if error is None else f"{type(error).__name__}: {error}"
        with closing(sqlite3.connect(self._path, timeout=PATIENCE)) as database, database:
            database.execute("UPDATE runs SET state = ? WHERE run = ?", (state, self._run))

    def _rows(self, step: int, metrics: Mapping[str, float | None]) -> Iterator[tuple[str, int, str, float | None]]:
        for name, value in metrics.items():
            if self._timing or not name.startswith(TIMING):
                yield self._run, step, name, value
