"""KL to the reference: estimators per action, where they may be applied, and the first controllers of the coefficient.

Knows neither models nor losses: core multiplies, adds and places. Notation of Schulman (2020, "Approximating KL
divergence"): actions are drawn from pi, and d = log pi_ref - log pi.

Placement decides which estimator has a useful gradient (Tang and Munos 2025, arXiv 2506.09477; Liu et al. 2025,
arXiv 2510.01555). In the reward, k1 with rewards-to-go gives the exact gradient of the KL of whole episodes. In the
loss, k2 gives the gradient of each action's own KL, without its effect on later ones; k3 gives that of the forward KL,
as GRPO has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, final

from posttrain import loss
from posttrain.data import Array
from posttrain.ops import Ops

from posttrain_objectives.choices import require_choice

Estimator = Literal["k1", "k2", "k3"]
Placement = Literal["loss", "reward"]


def k1(ops: Ops, d: Array) -> Array:
    """-d: unbiased, may be negative."""
    return -d


def k2(ops: Ops, d: Array) -> Array:
    """d^2 / 2: biased, never negative; on-policy its gradient is that of each action's KL."""
    return 0.5 * d * d


def k3(ops: Ops, d: Array) -> Array:
    """e^d - 1 - d: unbiased, never negative; the same that core measures with."""
    return loss.k3(ops.xp, d)


ESTIMATORS: Mapping[Estimator, Callable[[Ops, Array], Array]] = {"k1": k1, "k2": k2, "k3": k3}

DEFAULT_ESTIMATOR: Mapping[Placement, Estimator] = {"reward": "k1", "loss": "k2"}
"""What `auto` stands for."""

FORBIDDEN: Mapping[tuple[Placement, str], str] = {
    ("loss", "k1"): "the expected gradient of k1 as a loss is zero, so it would do nothing; use estimator: k2 (or k3, "
                    "as GRPO has it), or placement: reward",
    ("reward", "k2"): "k2 as a reward also punishes actions that the policy takes too seldom, which drives it away "
                      "from the reference; use estimator: k1, or placement: loss",
    ("reward", "k3"): "k3 as a reward also punishes actions that the policy takes too seldom, which drives it away "
                      "from the reference; use estimator: k1, or placement: loss",
}
"""Combinations whose gradient is not one of the KL, and why."""


def divergence(ops: Ops, name: Estimator, logprobs: Array, ref_logprobs: Array) -> Array:
    """[N] the estimator `name` of KL(pi || pi_ref) at each action, in float32 or better."""
    return ESTIMATORS[name](ops, _at_least_float32(ops, ref_logprobs) - _at_least_float32(ops, logprobs))


def _at_least_float32(ops: Ops, x: Array) -> Array:
    return x if ops.xp.finfo(x.dtype).bits >= 32 else ops.xp.astype(x, ops.xp.float32)


def chosen_estimator(placement: Placement, estimator: Estimator | Literal["auto"]) -> Estimator:
    """The estimator that is used; raises `ValueError` where its gradient would be none of the KL.

    >>> chosen_estimator("reward", "auto"), chosen_estimator("loss", "auto")
    ('k1', 'k2')
    """
    require_choice("placement", placement, DEFAULT_ESTIMATOR)
    require_choice("estimator", estimator, ("auto", *ESTIMATORS))
    if why := FORBIDDEN.get((placement, estimator)):
        raise ValueError(f"KL estimator {estimator} cannot be used with placement {placement}: {why}")
    return DEFAULT_ESTIMATOR[placement] if estimator == "auto" else estimator


@final
@dataclass(frozen=True, slots=True)
class KLState:
    """State of the controllers below, saved as JSON."""

    coef: float
    """beta, the weight of the KL."""


@final
@dataclass(frozen=True, slots=True)
class FixedKL:
    """A constant coefficient.

    >>> FixedKL(coef=0.04, placement="loss", estimator="k3").init().coef
    0.04
    """

    coef: float = 0.05
    """beta, the weight of the KL."""
    placement: Placement = "reward"
    """Taken from each action's reward before advantages are made, or added to the loss."""
    estimator: Literal["auto", "k1", "k2", "k3"] = "auto"
    """`auto` is k1 in the reward and k2 in the loss. k3 in the loss is GRPO's."""

    def __post_init__(self) -> None:
        chosen_estimator(self.placement, self.estimator)
        if not (math.isfinite(self.coef) and self.coef >= 0):
            raise ValueError(f"coef must be finite and not negative, got {self.coef}; kl: none switches the KL off")

    def divergence(self, ops: Ops, logprobs: Array, ref_logprobs: Array) -> Array:
        return divergence(ops, chosen_estimator(self.placement, self.estimator), logprobs, ref_logprobs)

    def init(self) -> KLState:
        return KLState(self.coef)

    def update(self, state: KLState, *, kl: float, n: int, **measured: float) -> KLState:
        return state


MAX_ERROR = 0.2
"""Ziegler et al. clip the relative error of one update at +-0.2."""
MAX_GAIN = 0.5
"""Bound of n / horizon. A larger gain overshoots where the KL falls with the third power of the coefficient, and one
beyond 5 could make the coefficient negative: a run with very many episodes per step must not need another horizon."""


@final
@dataclass(frozen=True, slots=True)
class AdaptiveKL:
    """Keeps the KL near `target` by a proportional controller (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    e = clip(KL / target - 1, -0.2, 0.2), coef <- coef * (1 + e * n / horizon) after n episodes, with n / horizon at
    most 0.5 and coef within [coef_min, coef_max]. A negative KL, which k1 can measure, counts as 0; a KL that is not
    finite and a rollout without episodes leave the state as it is.

    >>> kl = AdaptiveKL(target=0.05, coef=0.1)
    >>> round(kl.update(kl.init(), kl=0.08, n=100).coef, 6)
    0.102
    """

    target: float = 0.05
    """KL per action to be held."""
    coef: float = 0.05
    """The coefficient to begin with."""
    coef_min: float = 1e-6
    """Least coefficient; it must be positive, since a multiplicative rule cannot leave 0."""
    coef_max: float = 100.0
    """Largest coefficient."""
    horizon: float = 1000.0
    """Episodes over which the coefficient follows the KL. At 128 episodes per rollout 1000 gives a gain of 0.13, about
    the paper's 0.1; its code's 10000 belongs to runs of a million episodes and barely moves in one of a few hundred
    steps."""
    placement: Placement = "reward"
    """Taken from each action's reward before advantages are made, or added to the loss."""
    estimator: Literal["auto", "k1", "k2", "k3"] = "auto"
    """`auto` is k1 in the reward and k2 in the loss. k3 in the loss is GRPO's."""

    def __post_init__(self) -> None:
        chosen_estimator(self.placement, self.estimator)
        for name in ("target", "horizon"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be finite and positive, got {getattr(self, name)}")
        if not 0 < self.coef_min <= self.coef <= self.coef_max < math.inf:
            raise ValueError("coef must lie in [coef_min, coef_max], with coef_min positive and coef_max finite, got "
                             f"{self.coef} in [{self.coef_min}, {self.coef_max}]")

    def divergence(self, ops: Ops, logprobs: Array, ref_logprobs: Array) -> Array:
        return divergence(ops, chosen_estimator(self.placement, self.estimator), logprobs, ref_logprobs)

    def init(self) -> KLState:
        return KLState(self.coef)

    def update(self, state: KLState, *, kl: float, n: int, **measured: float) -> KLState:
        if not math.isfinite(kl) or n <= 0:
            return state
        e = min(max(kl / self.target - 1.0, -MAX_ERROR), MAX_ERROR)  # a negative KL is clipped as 0 is
        coef = state.coef * (1.0 + e * min(n / self.horizon, MAX_GAIN))
        return KLState(min(max(coef, self.coef_min), self.coef_max))
