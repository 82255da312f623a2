"""Mixes the advantages of several reward columns into one: weighted sums, and scalarisations that move the weights
towards what lags behind.

Everything is linear in the advantages of an action: a scalarisation that is not linear in the objectives enters by
its derivative at the columns' measured means, as constants of the step. Columns are maximised. Knows neither rewards
nor estimators; an action counts 0 in a column that is without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, final

import numpy as np
from posttrain.constrained import keeps, kept_by_any
from posttrain.data import Array, Estimate, Metric, Metrics
from posttrain.errors import ConfigError, did_you_mean
from posttrain.ops import like, ops_of, whiten, widen

from posttrain_objectives.choices import require_choice


@final
@dataclass(frozen=True, slots=True)
class ColumnWeights:
    """State of a weighted sum: the weight of each column."""

    weights: Mapping[str, float]


@final
@dataclass(frozen=True, slots=True)
class WeightedSum:
    """A = sum_c w_c A_c over columns c.

    With the estimator `grpo`, which divides by the group's standard deviation, this is MO-GRPO (Ichihara et al. 2025,
    arXiv 2509.22047); with `whiten` as well it is GDPO (Liu et al. 2026, arXiv 2601.05242), whose last step is over
    the batch, each action counting once.

    >>> import numpy as np
    >>> state = (rule := WeightedSum({"brevity": 0.5})).init(("accuracy", "brevity"))
    >>> columns = {"accuracy": Estimate(np.array([1.0, -1.0])), "brevity": Estimate(np.array([2.0, 0.0]))}
    >>> rule.combine(columns, state).advantages
    array([ 2., -1.])
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    """w_c, of each reward column; 1 where none is given."""
    scale: Literal["none", "column"] = "none"
    """`column` divides each column by the root of its mean square over the actions that it keeps: no reward outweighs
    another by its size, whatever the estimator."""
    whiten: bool = False
    """Standardise the sum over the batch: (A - mean) / sqrt(variance + 1e-8), the variance with divisor n - 1."""

    def __post_init__(self) -> None:
        require_choice("scale", self.scale, SCALES)
        require_finite("weights", self.weights)

    def init(self, columns: Sequence[str]) -> ColumnWeights:
        return ColumnWeights(named_weights(self.weights, columns, 1.0))

    def combine(self, estimates: Mapping[str, Estimate], state: ColumnWeights) -> Estimate:
        mixed = weighted(estimates, state.weights, SCALES[self.scale])
        if not self.whiten:
            return mixed
        return replace(mixed, advantages=whiten(mixed.advantages, kept_by_any(estimates.values())))


@final
@dataclass(frozen=True, slots=True)
class Progress:
    """State of a scalarisation: weights, and what was measured, by column."""

    weights: Mapping[str, float]
    means: Mapping[str, float] = field(default_factory=dict)
    """Running mean of each column, of those measured."""
    best: Mapping[str, float] = field(default_factory=dict)
    """Largest running mean of each column."""


Form = Literal["tchebycheff", "smooth_tchebycheff", "achievement"]


@final
@dataclass(frozen=True, slots=True)
class Scalarization:
    """A = sum_c p_c A_c with p the derivative of a scalarisation at the columns' running means J_c, scaled to sum 1.

    With gaps f_c = z_c - J_c to an ideal point z:
    `tchebycheff`: max_c w_c f_c, so all weight is on the column that lags most (Bowman 1976);
    `smooth_tchebycheff`: mu log sum_c exp(w_c f_c / mu), softly so (Lin et al. 2024, arXiv 2402.19078, equation 6);
    `achievement`: max_c f_c / w_c + rho sum_c f_c / w_c (Wierzbicki 1980).
    These reach every point of a Pareto front, weighted sums only its convex parts. Gaps are in the units of the
    rewards, and so are weights: columns are balanced where all w_c f_c are equal.
    """

    form: Form = "smooth_tchebycheff"
    """Which scalarisation."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """w_c > 0, of each reward column; 1 where none is given."""
    ideal: Mapping[str, float] = field(default_factory=dict)
    """z_c; where none is given, the best running mean so far and `margin`."""
    margin: float = 0.1
    """How far beyond its best a column without `ideal` is aimed, in the units of the reward."""
    ema: float = 0.8
    """Decay of the running means, in [0, 1)."""
    mu: float = 0.1
    """Smoothing of `smooth_tchebycheff`: gaps that differ by much less are treated alike. It is within mu log m of the
    maximum."""
    rho: float = 0.05
    """Share of the sum in `achievement`; it leaves out weakly optimal points."""

    def __post_init__(self) -> None:
        require_choice("form", self.form, FORMS)
        require_finite("weights", self.weights)
        require_finite("ideal", self.ideal)
        for name, weight in self.weights.items():
            if weight <= 0:
                raise ValueError(f"weights.{name} must be positive, got {weight}; leave out a reward that has no say")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}")
        for name in ("margin", "rho"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if not (math.isfinite(self.mu) and self.mu > 0):
            raise ValueError(f"mu must be finite and positive, got {self.mu}; form: tchebycheff is its limit at 0")

    def init(self, columns: Sequence[str]) -> Progress:
        known_columns("ideal", self.ideal, columns)
        return Progress(named_weights(self.weights, columns, 1.0))

    def update(self, state: Progress, measured: Mapping[str, float]) -> Progress:
        """The state after a rollout whose mean of each column was `measured`; what is not finite is held."""
        found = {c: x for c, x in measured.items() if c in state.weights and math.isfinite(x)}
        means = {c: self.ema * state.means.get(c, x) + (1 - self.ema) * x for c, x in found.items()}
        best = {c: max(state.best.get(c, x), x) for c, x in means.items()}
        return replace(state, means={**state.means, **means}, best={**state.best, **best})

    def combine(self, estimates: Mapping[str, Estimate], state: Progress) -> Estimate:
        return weighted(estimates, self.derivative(state), as_it_is)

    def derivative(self, state: Progress) -> dict[str, float]:
        """p_c, not negative and of sum 1; a column without a measurement stands at its ideal."""
        columns = sorted(state.weights)
        w = np.array([state.weights[c] for c in columns])
        f = np.array([self._gap(c, state) for c in columns])
        p = FORMS[self.form](w, f, self)
        return dict(zip(columns, (p / p.sum()).tolist(), strict=True))

    def _gap(self, column: str, state: Progress) -> float:
        if column not in state.means:
            return 0.0
        return self.ideal.get(column, state.best[column] + self.margin) - state.means[column]


def tchebycheff(w: np.ndarray, f: np.ndarray, fields: Scalarization) -> np.ndarray:
    """[m] derivative of max_c w_c f_c; columns that share the maximum share the weight."""
    return np.asarray(w * (w * f == np.max(w * f)))


def smooth_tchebycheff(w: np.ndarray, f: np.ndarray, fields: Scalarization) -> np.ndarray:
    """[m] derivative of mu log sum_c exp(w_c f_c / mu)."""
    return np.asarray(w * np.exp((w * f - np.max(w * f)) / fields.mu))


def achievement(w: np.ndarray, f: np.ndarray, fields: Scalarization) -> np.ndarray:
    """[m] derivative of max_c f_c / w_c + rho sum_c f_c / w_c."""
    return np.asarray(((f / w == np.max(f / w)) + fields.rho) / w)


FORMS: Mapping[Form, Callable[[np.ndarray, np.ndarray, Scalarization], np.ndarray]] = {
    "tchebycheff": tchebycheff, "smooth_tchebycheff": smooth_tchebycheff, "achievement": achievement}


def as_it_is(A: Array, keep: np.ndarray) -> Array:
    """[N] the column unscaled."""
    return A


def by_own_size(A: Array, keep: np.ndarray) -> Array:
    """[N] the column over the root of its mean square where it is kept; 0 where it is nothing but 0."""
    xp = ops_of(A).xp
    size = xp.max(xp.abs(A)) if len(A) else 0.0
    if not size > 0:
        return A
    unit = A / size  # squares of what is very large or small would leave the range of numbers
    return unit / xp.sqrt(xp.sum(unit * unit) / max(int(keep.sum()), 1))


SCALES: Mapping[Literal["none", "column"], Callable[[Array, np.ndarray], Array]] = {
    "none": as_it_is, "column": by_own_size}


def weighted(estimates: Mapping[str, Estimate], weights: Mapping[str, float],
             scaled: Callable[[Array, np.ndarray], Array]) -> Estimate:
    """The sum of columns, each scaled and times its weight. In the order of names, so that rounding has one too.

    Metrics: `combiner/<column>`, the weight, and `combiner/<column>/share`, the column's part of all that is summed, by
    absolute values.
    """
    total, parts = 0.0, dict[str, float]()
    for column, estimate in sorted(estimates.items()):
        keep = keeps(estimate)
        A = widen(estimate.advantages)
        xp = ops_of(A).xp
        part = weights[column] * scaled(xp.where(like(keep, A), A, 0.0), keep)
        total, parts[column] = total + part, float(xp.sum(xp.abs(part)))
    everything = sum(parts.values()) or 1.0
    metrics = {f"combiner/{column}": weights[column] for column in parts} | {
        f"combiner/{column}/share": part / everything for column, part in parts.items()}
    return Estimate(total, metrics=Metrics({name: Metric(x, reduction="last") for name, x in metrics.items()}))


def known_columns(name: str, given: Mapping[str, float], columns: Sequence[str]) -> None:
    """Raise `ConfigError` for every key of a field that is no reward."""
    if unknown := [f"combiner.{name}.{key} is no reward{did_you_mean(key, columns)}; rewards are {', '.join(columns)}"
                   for key in given if key not in columns]:
        raise ConfigError(unknown)


def named_weights(given: Mapping[str, float], columns: Sequence[str], default: float) -> dict[str, float]:
    """The weight of every column. Raises `ConfigError` for one of no reward, and where all are 0."""
    known_columns("weights", given, columns)
    weights = {column: given.get(column, default) for column in columns}
    if weights and not any(weights.values()):
        raise ConfigError([f"combiner.weights are 0 for all rewards ({', '.join(columns)}), so nothing would be "
                           "trained; give one of them a weight"])
    return weights


def require_finite(name: str, numbers: Mapping[str, float]) -> None:
    """Raise `ValueError` for the first number of a field that is not finite."""
    for key, x in numbers.items():
        if not math.isfinite(x):
            raise ValueError(f"{name}.{key} must be finite, got {x}")
