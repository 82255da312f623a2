"""What posttrain-tuning offers to the registry. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from posttrain.hookspecs import Component, hookimpl


@hookimpl
def components() -> Iterable[Component]:
    """A planner that learns its budget."""
    yield Component("batching", "adaptive", "posttrain_tuning.batching:Adaptive",
                    "first fit, as large as memory and speed allow")


@hookimpl
def commands(app: Any) -> None:
    """`posttrain memory plan` and `posttrain memory profile`."""
    from posttrain_tuning.memory.command import app as memory

    app.add_typer(memory, name="memory")
