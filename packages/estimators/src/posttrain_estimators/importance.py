"""Importance ratios between the policy before the update and the sampler, pi/mu, of a token, a turn or a sequence.

Knows two columns of log-probs and how actions form turns and episodes; not what is weighted by the ratios.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
from posttrain.data import Array, Episodes, Estimate, Metric, to_numpy
from posttrain.ops import like, ops_of, segment_mean, segment_sum, widen
from posttrain.protocols import Need

from posttrain_estimators.fields import check_choice

Unit = Literal["token", "turn", "sequence"]
"""What has one ratio: each action, all actions of a turn, or all of an episode."""
Reduction = Literal["mean", "sum"]
"""The log-ratio of a unit: `sum` is that of its whole probability, `mean` that of the geometric mean over its actions,
which does not grow with its length."""

LARGEST_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20, so that a ratio is a finite number in every dtype of 32 bits and more."""


def unit_needs(unit: Unit) -> frozenset[Need]:
    """The columns that `log_ratios` reads."""
    return frozenset({Need.LOGPROBS, Need.BEHAVIOR_LOGPROBS}) | ({Need.TURN} if unit == "turn" else frozenset())


def log_ratios(episodes: Episodes, unit: Unit, reduce: Reduction, dead_zone: float = 0.0) -> Array:
    """[N] log rho of the unit that each action belongs to, log rho = log pi_old - log mu; carries no gradient.

    A log-ratio of an action that is smaller than `dead_zone` counts as 0, before the actions of a unit are put
    together: what two programs round differently must not add up over a long answer. Clamped to +-20 after it.
    Raises `ValueError` naming the column that is missing.

    >>> episodes = Episodes.from_rows([[0.0, 0.0], [0.0]], logprobs=[[-1.0, -2.0], [-1.0]],
    ...                               behavior_logprobs=[[-2.0, -4.0], [-1.0]])
    >>> log_ratios(episodes, "sequence", "sum")
    array([3., 3., 0.])
    """
    pi, mu = (_column(episodes, name) for name in ("logprobs", "behavior_logprobs"))
    xp = ops_of(pi).xp
    per_action = pi - mu
    if dead_zone > 0:
        per_action = xp.where(xp.abs(per_action) < dead_zone, 0.0, per_action)
    if unit != "token":
        ids = UNITS[unit](episodes)
        per_action = _REDUCTIONS[reduce](per_action, ids, int(ids.max(initial=-1)) + 1)[ids]
    return xp.clip(per_action, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def _column(episodes: Episodes, name: str) -> Array:
    column = getattr(episodes, name)
    if column is None:
        raise ValueError(f"importance ratios need Episodes.{name}; they are log pi_old (logprobs) minus log mu of the "
                         "sampler (behavior_logprobs)")
    return ops_of(column).stop_gradient(widen(column))


def _turns(episodes: Episodes) -> np.ndarray:
    if episodes.turn is None:
        raise ValueError("ratios of turns need Episodes.turn; choose unit 'token' or 'sequence' where an episode is "
                         "one turn")
    begins = np.diff(episodes.turn, prepend=episodes.turn[:1]) != 0
    begins[episodes.offsets[1:-1]] = True
    return np.cumsum(begins)


UNITS: Mapping[Unit, Callable[[Episodes], np.ndarray]] = {
    "token": lambda episodes: np.arange(len(episodes.rewards)), "turn": _turns,
    "sequence": lambda episodes: episodes.episode}
"""[N] number of the unit that each action belongs to, rising from 0 along the batch."""

_REDUCTIONS: Mapping[Reduction, Callable[[Array, np.ndarray, int], Array]] = {"mean": segment_mean, "sum": segment_sum}


def capped(ratio: Array, ceiling: float) -> Array:
    """min(ratio, ceiling)."""
    return ops_of(ratio).xp.where(ratio < ceiling, ratio, ceiling)


def with_ratios(estimate: Estimate, ratio: Array, **ceilings: float) -> Estimate:
    """The estimate with metrics of ratios [N] before they are cut: `ratio/mean`, `ratio/max`, and for each ceiling
    `ratio/over_<name>`, the fraction of actions whose ratio is above it.

    >>> nothing = Estimate(advantages=np.zeros(2))
    >>> {name: x.value for name, x in with_ratios(nothing, np.array([1.0, 3.0]), c_max=2.0).metrics.items()}
    {'ratio/mean': 2.0, 'ratio/max': 3.0, 'ratio/over_c_max': 0.5}
    """
    rho = to_numpy(ratio)
    over = {f"ratio/over_{name}": Metric(float(np.count_nonzero(rho > x)), len(rho)) for name, x in ceilings.items()}
    found = {"ratio/mean": Metric(float(rho.sum(dtype=np.float64)), len(rho)),
             "ratio/max": Metric(float(rho.max(initial=0.0)), reduction="max"), **over}
    return replace(estimate, metrics=estimate.metrics + found)


def at_unit_ends(c: Array, unit: Unit, episodes: Episodes) -> Array:
    """[N] `c` at the last action of each unit and 1 before it: a trace that leaves a unit is cut once."""
    ids = UNITS[unit](episodes)
    return ops_of(c).xp.where(like(np.diff(ids, append=-1) != 0, c), c, 1.0)


def at_unit_starts(c: Array, unit: Unit, episodes: Episodes) -> Array:
    """[N] `c` at the first action of each unit and 1 behind it: a trace that comes into a unit is cut once."""
    ids = UNITS[unit](episodes)
    return ops_of(c).xp.where(like(np.diff(ids, prepend=-1) != 0, c), c, 1.0)


def check_ceiling(name: str, value: float) -> None:
    """Raise `ValueError` unless `value` is positive; infinity is, NaN is not."""
    if not value > 0:
        raise ValueError(f"{name} must be positive (.inf cuts nothing), got {value}")


def check_ratio(unit_name: str, unit: str, reduce_name: str, reduce: str, dead_zone: float) -> None:
    """Raise `ValueError` where a field about ratios is out of its range, naming it."""
    check_choice(unit_name, unit, UNITS)
    check_choice(reduce_name, reduce, _REDUCTIONS)
    if not 0.0 <= dead_zone < math.inf:
        raise ValueError(f"dead_zone must not be negative, and finite, got {dead_zone}; 0 keeps every log-ratio")
