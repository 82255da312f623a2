"""What this package offers, as data; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable

from posttrain.hookspecs import Component, hookimpl


@hookimpl
def components() -> Iterable[Component]:
    """One tracker."""
    yield Component("tracker", "sqlite", "posttrain_sqlite.tracker:Sqlite",
                    "the metrics of all runs in one SQLite file")
