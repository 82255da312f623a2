"""What posttrain-tuning offers to the registry. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable

from posttrain.hookspecs import Component, hookimpl


@hookimpl
def components() -> Iterable[Component]:
    """A planner that learns its budget."""
    yield Component("batching", "adaptive", "posttrain_tuning.batching:Adaptive",
                    "first fit, as large as memory and speed allow")
