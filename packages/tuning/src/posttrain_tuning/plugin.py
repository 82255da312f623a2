"""What posttrain-tuning offers to the registry: no component in this version. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable

from posttrain.hookspecs import Component, hookimpl


@hookimpl
def components() -> Iterable[Component]:
    """No searcher and no batching planner yet: naming one in a configuration is refused by the registry."""
    return ()
