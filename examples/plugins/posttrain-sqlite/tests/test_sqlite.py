"""The tracker keeps the contract of trackers; runs share a database, and it says how they ended."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from posttrain.rundir import RunDirectory
from posttrain.testing import TrackerContract
from posttrain.testing.observing import Observed
from posttrain_sqlite.tracker import Sqlite


def asked(database: str, question: str, *values: Any) -> list[tuple[Any, ...]]:
    """What the database answers."""
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(question, values).fetchall()


class TestSqlite(TrackerContract):
    """The contract observes runs, and asks what was recorded of them."""

    components = (Sqlite(), Sqlite(path="other.db", timing=False))

    def recorded(self, component: Sqlite, directory: Path) -> list[tuple[int, float]]:
        """Steps and values of `reward/mean`."""
        found = asked(component.path, "SELECT step, value FROM metrics WHERE run = ? AND name = 'reward/mean' "
                                      "ORDER BY step", str(directory.absolute()))
        return [(step, value) for step, value in found]


def test_runs_share_a_database_which_says_how_they_ended(tmp_path: Path) -> None:
    path = str(tmp_path / "all.sqlite")
    for name, best, error in (("a", 0.5, None), ("b", 0.75, ValueError("no memory"))):
        with RunDirectory.create(tmp_path / name, config="", manifest={}) as files:
            session = Sqlite(path).start(Observed(files.path, steps=2))
            for step, value in enumerate((0.25, best), start=1):
                files.append_metrics(step, {"reward/mean": value})
                session.step_finished(step, {"reward/mean": value})
            session.finished(error)
    best_first = asked(path, "SELECT run, max(value) FROM metrics WHERE name = 'reward/mean' GROUP BY run "
                             "ORDER BY 2 DESC")
    assert best_first == [(str(tmp_path / "b"), 0.75), (str(tmp_path / "a"), 0.5)]
    assert asked(path, "SELECT run, steps, state FROM runs ORDER BY run") == [
        (str(tmp_path / "a"), 2, "finished"), (str(tmp_path / "b"), 2, "ValueError: no memory")]
