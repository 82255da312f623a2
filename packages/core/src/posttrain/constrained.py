"""Costs beside a reward: their limits and measured means as a constraint takes them, and the one column of advantages
that its multipliers make.

A `Constraint` knows limits from above alone; what is to be at least something is negated here, on the way in and in
the mixture. Pure functions; knows neither methods nor training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

import numpy as np

from posttrain.data import Array, Estimate, Metric, Metrics, to_numpy
from posttrain.ops import ops_of, whiten
from posttrain.protocols import ConstraintState, Switching


@final
@dataclass(frozen=True, slots=True)
class Bound:
    """What is asked of a reward column that is a cost: exactly one of the two."""

    at_most: float | None = None
    """The column's mean is not to be larger."""
    at_least: float | None = None
    """The column's mean is not to be smaller."""

    def __post_init__(self) -> None:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("a constraint has either at_most or at_least")

    @property
    def sign(self) -> float:
        """What the column is multiplied by to become a cost."""
        return 1.0 if self.at_least is None else -1.0

    @property
    def limit(self) -> float:
        """Of the cost, from above."""
        return -self.at_least if self.at_least is not None else float(self.at_most or 0.0)


def limits_of(bounds: Mapping[str, Bound]) -> dict[str, float]:
    """The limit of each cost from above, as `Constraint.init` takes them.

    >>> limits_of({"length": Bound(at_most=40.0), "politeness": Bound(at_least=0.5)})
    {'length': 40.0, 'politeness': -0.5}
    """
    return {name: bound.limit for name, bound in bounds.items()}


def costs_of(means: Mapping[str, float], bounds: Mapping[str, Bound]) -> dict[str, float]:
    """The mean costs of a rollout, as `Constraint.update` takes them, of columns that were measured."""
    return {name: b.sign * means[name] for name, b in bounds.items() if name in means}


def reward_weight(state: ConstraintState) -> float:
    """Weight of the reward's advantages beside the multipliers: 1 unless the state says otherwise."""
    return state.reward_weight if isinstance(state, Switching) else 1.0


FEASIBLE, CONVERGING, INFEASIBLE = "feasible", "converging", "infeasible"
"""What a constraint says of a cost: kept; broken with the multiplier at work; broken with it at its cap."""


def described(means: Mapping[str, float], bounds: Mapping[str, Bound], state: ConstraintState) -> Metrics:
    """Of each cost: its mean as it was scored, by how much it is over its bound (0 where it keeps it), its multiplier,
    and its status as 0, 1 or 2 in the order above."""
    found: dict[str, float] = {}
    for name, bound in bounds.items():
        if name in means:
            found |= {f"{name}/mean": means[name],
                      f"{name}/violation": max(0.0, bound.sign * means[name] - bound.limit)}
        found |= {f"{name}/multiplier": state.multipliers[name],
                  f"{name}/status": float((FEASIBLE, CONVERGING, INFEASIBLE).index(state.status[name]))}
    return Metrics({f"constraint/{name}": Metric(x, reduction="last") for name, x in found.items()})


@final
@dataclass(frozen=True, slots=True, eq=False)
class Constrained:
    """The costs of a run, and where their constraint stands."""

    bounds: Mapping[str, Bound]
    state: ConstraintState


def mixed(reward: Estimate, costs: Mapping[str, Estimate], bounds: Mapping[str, Bound],
          state: ConstraintState) -> Estimate:
    """(w A_R - sum_i lambda_i A_i) / (w + sum_i lambda_i): Stooke et al. 2020, arXiv 2007.03964, equation 9.

    `costs` are estimates of the columns as they were scored; all estimates stand on the same actions. Each is first
    standardised over the actions it keeps, so that multipliers have no unit; one without variance is 0 then. An action
    counts 0 in a column that is without it, and is kept where some column of positive weight keeps it. The division
    bounds the step however large the multipliers are.
    """
    w, multipliers = reward_weight(state), {name: state.multipliers[name] for name in sorted(costs)}
    total = w * _standardised(reward)
    for name, multiplier in multipliers.items():
        total = total - multiplier * bounds[name].sign * _standardised(costs[name])
    size = w + sum(multipliers.values())
    shares = {f"constraint/{name}/share": Metric(x / size, reduction="last") for name, x in multipliers.items()}
    weighing = [reward] * (w > 0) + [costs[name] for name, multiplier in multipliers.items() if multiplier > 0]
    return Estimate(total / size, keep=kept_by_any(weighing), metrics=Metrics(shares))


def _standardised(estimate: Estimate) -> Array:
    """[N] over kept actions mean 0 and variance 1, or all 0; 0 for the others."""
    A, keep = estimate.advantages, keeps(estimate)
    if keep.sum() < 2:
        return ops_of(A).xp.zeros_like(A)
    return whiten(A, keep)


def keeps(estimate: Estimate) -> np.ndarray:
    """[N] bool, the actions of a column."""
    return np.ones(len(estimate.advantages), bool) if estimate.keep is None else to_numpy(estimate.keep)


def kept_by_any(estimates: Iterable[Estimate]) -> np.ndarray:
    """[N] bool, the actions of at least one column."""
    return np.asarray(np.any([keeps(e) for e in estimates], axis=0))
