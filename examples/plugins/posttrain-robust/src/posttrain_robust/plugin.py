"""What this package offers, as data; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable

from posttrain.hookspecs import Component, hookimpl


@hookimpl
def components() -> Iterable[Component]:
    """One estimator."""
    yield Component("estimator", "robust", "posttrain_robust.estimator:Robust",
                    "distance from the group's median in robust standard deviations, bounded",
                    source="Iglewicz and Hoaglin 1993, How to detect and handle outliers")
