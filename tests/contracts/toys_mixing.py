"""Correct components of the kinds that mix, as an author would write them: dual ascent, weighted sums, minimum norm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import isfinite
from typing import final

import numpy as np
from posttrain.data import Array, Estimate, to_numpy
from posttrain.hookspecs import Component, hookimpl
from posttrain.ops import like, ops_of


@hookimpl
def components() -> Iterable[Component]:
    """All of this file."""
    yield Component("constraint", "dual_ascent", f"{__name__}:DualAscent", "projected dual ascent")
    yield Component("combiner", "weighted_sum", f"{__name__}:WeightedSum", "sum of columns")
    yield Component("combiner", "standardised_sum", f"{__name__}:StandardisedSum", "sum of standardised columns")
    yield Component("combiner", "laggard_first", f"{__name__}:LaggardFirst", "the column whose mean is least")
    yield Component("gradient_combiner", "equal_weights", f"{__name__}:Mean", "mean of the gradients")
    yield Component("gradient_combiner", "min_norm", f"{__name__}:MinNorm", "minimum norm point of unit gradients")


@final
@dataclass(frozen=True, slots=True)
class Multipliers:
    """State of a constraint, by cost."""

    limits: Mapping[str, float]
    multipliers: Mapping[str, float]
    status: Mapping[str, str]


def violations(state: Multipliers, costs: Mapping[str, float]) -> dict[str, float]:
    """How far each cost is over its limit, relative to it. Raises `ValueError` for an unknown cost and a NaN."""
    if unknown := sorted(costs.keys() - state.limits.keys()):
        raise ValueError(f"cost '{unknown[0]}' has no limit; limits are {', '.join(state.limits)}")
    if wrong := [f"{name}={cost}" for name, cost in costs.items() if not isfinite(cost)]:
        raise ValueError(f"costs must be finite, got {wrong[0]}")
    return {name: (cost - state.limits[name]) / abs(state.limits[name]) for name, cost in costs.items()}


def moved(state: Multipliers, multipliers: Mapping[str, float], over: Mapping[str, float]) -> Multipliers:
    """The state with new multipliers."""
    status = {name: "over" if by > 0 else "kept" for name, by in over.items()}
    return replace(state, multipliers={**state.multipliers, **multipliers}, status={**state.status, **status})


def started(limits: Mapping[str, float]) -> Multipliers:
    """All multipliers 0."""
    return Multipliers(dict(limits), dict.fromkeys(limits, 0.0), dict.fromkeys(limits, "unknown"))


@final
@dataclass(frozen=True, slots=True)
class DualAscent:
    """lambda <- max(0, lambda + rate (cost - limit) / |limit|): Arrow, Hurwicz and Uzawa 1958."""

    rate: float = 0.1
    """Step of the multipliers."""

    def init(self, limits: Mapping[str, float]) -> Multipliers:
        return started(limits)

    def update(self, state: Multipliers, costs: Mapping[str, float]) -> Multipliers:
        over = violations(state, costs)
        return moved(state, {n: max(0.0, state.multipliers[n] + self.rate * by) for n, by in over.items()}, over)


@final
@dataclass(frozen=True, slots=True)
class Weights:
    """State of a combiner: the weight of each column."""

    weights: Mapping[str, float]


def kept_part(estimate: Estimate) -> Array:
    """[N] the advantages, 0 where the column is without the action."""
    A = estimate.advantages
    return A if estimate.keep is None else ops_of(A).xp.where(like(to_numpy(estimate.keep), A), A, 0.0)


@final
@dataclass(frozen=True, slots=True)
class WeightedSum:
    """The sum of the columns' advantages, each with its weight."""

    weights: Mapping[str, float] = field(default_factory=dict)
    """Weight by column; 1 where none is given."""

    def init(self, columns: Sequence[str]) -> Weights:
        return Weights({column: self.weights.get(column, 1.0) for column in columns})

    def combine(self, estimates: Mapping[str, Estimate], state: Weights) -> Estimate:
        return Estimate(sum(state.weights[c] * kept_part(e) for c, e in sorted(estimates.items())))


@final
@dataclass(frozen=True, slots=True)
class StandardisedSum:
    """The sum of the columns' advantages, each divided by the root of its mean square over kept actions."""

    eps: float = 1e-8
    """Mean square below which a column counts as 0."""

    def init(self, columns: Sequence[str]) -> None:
        return None

    def combine(self, estimates: Mapping[str, Estimate], state: None) -> Estimate:
        total = 0.0
        for _, estimate in sorted(estimates.items()):
            A = kept_part(estimate)
            n = len(A) if estimate.keep is None else max(1, int(to_numpy(estimate.keep).sum()))
            square = ops_of(A).xp.sum(A * A) / n
            total = total + A * ((square > self.eps) / (square + (square <= self.eps)) ** 0.5)
        return Estimate(total)


@final
@dataclass(frozen=True, slots=True)
class Means:
    """State of a combiner that follows the rewards: the last measured mean of each column."""

    means: Mapping[str, float]


@final
@dataclass(frozen=True, slots=True)
class LaggardFirst:
    """The advantages of the column whose mean is least; the mean of those where several share it."""

    def init(self, columns: Sequence[str]) -> Means:
        return Means(dict.fromkeys(columns, 0.0))

    def update(self, state: Means, measured: Mapping[str, float]) -> Means:
        return Means({**state.means, **{column: x for column, x in measured.items() if isfinite(x)}})

    def combine(self, estimates: Mapping[str, Estimate], state: Means) -> Estimate:
        least = [c for c in sorted(state.means) if state.means[c] == min(state.means.values())]
        return Estimate(sum(kept_part(estimates[c]) for c in least) / len(least))


@final
@dataclass(frozen=True, slots=True)
class Slots:
    """State of a gradient combiner: nothing but the names."""

    names: Sequence[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", list(self.names))  # JSON knows no tuples


@final
@dataclass(frozen=True, slots=True)
class Mean:
    """Equal weights."""

    def init(self, slots: Sequence[str]) -> Slots:
        return Slots(slots)

    def weights(self, gramian: np.ndarray, state: Slots) -> tuple[np.ndarray, Slots]:
        return np.full(len(gramian), 1 / len(gramian)), state


@final
@dataclass(frozen=True, slots=True)
class MinNorm:
    """The shortest vector in the convex hull of the gradients, each scaled to length 1 (Désidéri 2012); gradients that
    are 0 take no part."""

    def init(self, slots: Sequence[str]) -> Slots:
        return Slots(slots)

    def weights(self, gramian: np.ndarray, state: Slots) -> tuple[np.ndarray, Slots]:
        lengths = np.sqrt(np.diag(gramian))
        alive = np.flatnonzero(lengths > 0)
        w = np.zeros(len(gramian))
        if len(alive) == 0:
            return np.full(len(gramian), 1 / len(gramian)), state
        unit = gramian[np.ix_(alive, alive)] / np.outer(lengths[alive], lengths[alive])
        w[alive] = shortest(unit) / lengths[alive] * lengths[alive].mean()
        return w, state


def shortest(G: np.ndarray) -> np.ndarray:
    """[m] the convex weights of least w'Gw: the best of the stationary points on all faces, m being small."""
    best, least = np.eye(len(G))[0], G[0, 0]
    for size in range(2, len(G) + 1):
        for face in combinations(range(len(G)), size):
            border = np.ones((size + 1, size + 1))
            border[:size, :size], border[size, size] = G[np.ix_(face, face)], 0.0
            solved = np.linalg.lstsq(border, np.eye(size + 1)[size], rcond=None)[0][:size]
            if (solved >= 0).all() and abs(solved.sum() - 1) < 1e-6:
                w = np.zeros(len(G))
                w[list(face)] = solved
                best, least = (w, w @ G @ w) if w @ G @ w < least else (best, least)
    return best
