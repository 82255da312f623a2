"""How much of the differences between trials each parameter explains by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from posttrain.search import Choice, Domain, Space

from posttrain_tuning.search.study import Trial

BINS = 4
"""Groups of about equal size into which the numbers of a range are cut."""


def importances(space: Space, trials: Sequence[Trial], goal: int) -> Mapping[str, float]:
    """Parameter -> epsilon squared (Kelley 1935, PNAS 21) of the ranks of a goal's values, largest first: the share of
    their variance that lies between the parameter's options, or between `BINS` stretches of its range, less what chance
    puts there. 0 is nothing, 1 is all; interactions are not seen. Of trials in which the parameter exists; those with
    too few are left out."""
    measured = [t for t in trials if t.result]
    found = {}
    for name, domain, _ in space.parameters():
        own = [t for t in measured if name in t.values]
        groups = _groups(domain, [t.values[name] for t in own])
        share = epsilon_squared(_ranks([t.result[goal] for t in own]), groups)
        if share is not None:
            found[name] = share
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def epsilon_squared(y: Sequence[float], groups: Sequence[int]) -> float | None:
    """1 - (SS_within / (n - k)) / (SS / (n - 1)), at least 0; None where n < 2 k, where there is one group or where
    nothing differs.

    >>> epsilon_squared([1.0, 1.0, 5.0, 5.0], [0, 0, 1, 1])
    1.0
    """
    values, labels = np.asarray(y, np.float64), np.asarray(groups)
    kinds = np.unique(labels)
    n, k = len(values), len(kinds)
    total = float(((values - values.mean()) ** 2).sum()) if n else 0.0
    if k < 2 or n < 2 * k or total == 0.0:
        return None
    within = sum(float(((part - part.mean()) ** 2).sum()) for part in (values[labels == kind] for kind in kinds))
    return max(0.0, 1.0 - within / (n - k) / (total / (n - 1)))


def _groups(domain: Domain, values: Sequence[Any]) -> list[int]:
    if isinstance(domain, Choice):
        labels = [option.label for option in domain.options]
        return [labels.index(value) for value in values]
    return [int(rank * BINS / max(len(values), 1)) for rank in _ranks(values)]


def _ranks(values: Sequence[float]) -> list[float]:
    """From 0; equal values share the mean of their ranks."""
    x = np.asarray(values, np.float64)
    return [float((x < v).sum() + ((x == v).sum() - 1) / 2) for v in x]
