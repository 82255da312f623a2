"""What posttrain-tuning offers to the registry. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from posttrain.hookspecs import Component, hookimpl


@hookimpl
def components() -> Iterable[Component]:
    """A planner that learns its budget, and searchers."""
    yield Component("batching", "adaptive", "posttrain_tuning.batching:Adaptive",
                    "first fit, as large as memory and speed allow")
    yield Component("searcher", "optuna", "posttrain_tuning.optuna:Optuna",
                    "TPE, GP, CMA-ES, NSGA-II, NSGA-III, random, grid",
                    source="Akiba et al. 2019, arXiv 1907.10902", extra="optuna")


@hookimpl
def commands(app: Any) -> None:
    """`posttrain tune`, `posttrain memory plan` and `posttrain memory profile`."""
    from posttrain_tuning.command import tune
    from posttrain_tuning.memory.command import app as memory

    app.command("tune")(tune)
    app.add_typer(memory, name="memory")
