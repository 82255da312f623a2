"""KL components: a constant coefficient, and controllers that move it by what was measured after each rollout.

Which estimator stands where is `kl_estimators.py`; schedules are `kl_schedules.py`. Knows neither models nor losses.

All controllers keep the coefficient within [coef_min, coef_max], count a negative KL as 0, and hold where a rollout has
no episode or its KL is not finite. Only the state remembers, and it is saved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

from posttrain.data import Array
from posttrain.ops import Ops
from posttrain.protocols import Compared

from posttrain_objectives.choices import require_positive
from posttrain_objectives.kl_estimators import Asked, OffPolicy, Placed, Placement, chosen_estimator, divergence


def usable(kl: float, n: int) -> bool:
    """Whether a rollout of `n` episodes says what its KL is."""
    return math.isfinite(kl) and n > 0


def clamped(x: float, low: float, high: float) -> float:
    """`x` within [low, high]."""
    return min(max(x, low), high)


def require_positive_bounds(coef: float, coef_min: float, coef_max: float) -> None:
    """Raise `ValueError` unless 0 < coef_min <= coef <= coef_max < infinity."""
    if not 0 < coef_min <= coef <= coef_max < math.inf:
        raise ValueError("coef must lie in [coef_min, coef_max], with coef_min positive and coef_max finite, got "
                         f"{coef} in [{coef_min}, {coef_max}]")


@final
@dataclass(frozen=True, slots=True)
class KLState:
    """State of the controllers that need to know nothing but the coefficient, saved as JSON."""

    coef: float
    """beta, the weight of the KL."""


@final
@dataclass(frozen=True, slots=True)
class FixedKL(Placed):
    """A constant coefficient.

    >>> FixedKL(coef=0.04, placement="loss", estimator="k3").init().coef
    0.04
    """

    coef: float = 0.05
    """beta, the weight of the KL."""
    placement: Placement = "reward"
    """Taken from each action's reward before advantages are made, from its advantage, or added to the loss."""
    estimator: Asked = "auto"
    """`auto` is k1 in reward and advantage, and k2 in the loss. k3 in the loss is GRPO's; `exact`, there alone, sums
    over the whole vocabulary."""
    off_policy: OffPolicy = "none"
    """`ratio` weighs a KL in the loss by pi / pi_old, which gives the reverse gradient after several steps, too."""

    def __post_init__(self) -> None:
        chosen_estimator(self.placement, self.estimator, self.off_policy)
        if not (math.isfinite(self.coef) and self.coef >= 0):
            raise ValueError(f"coef must be finite and not negative, got {self.coef}; kl: none switches the KL off")

    def init(self) -> KLState:
        return KLState(self.coef)

    def update(self, state: KLState, *, kl: float, n: int, **measured: float) -> KLState:
        return state


@final
@dataclass(frozen=True, slots=True)
class ConstrainedKL:
    """A cost beside the reward, kept below a limit by the component under `constraint`.

    Each action costs its k1, the costs have advantages of their own, and those are mixed with the reward's by the
    constraint's multiplier, which is that of the rewards with `at_most`, too: several limits stand beside one another.

    >>> ConstrainedKL(at_most=0.02).placement
    'constraint'
    """

    at_most: float = 0.05
    """Largest mean KL per action."""

    def __post_init__(self) -> None:
        require_positive(at_most=self.at_most)

    @property
    def placement(self) -> Literal["constraint"]:
        """Among the costs."""
        return "constraint"

    @property
    def unit(self) -> Literal["action"]:
        """Each action has a cost."""
        return "action"

    def divergence(self, ops: Ops, logprobs: Array, compared: Compared) -> Array:
        """[N] k1 of each action."""
        return divergence(ops, "k1", logprobs, compared)

    def init(self) -> KLState:
        """The weight is the constraint's."""
        return KLState(0.0)

    def update(self, state: KLState, *, kl: float, n: int, **measured: float) -> KLState:
        return state


MAX_ERROR = 0.2
"""Ziegler et al. clip the relative error of one update at +-0.2."""
MAX_GAIN = 0.5
"""Bound of n / horizon. A larger gain overshoots where the KL falls with the third power of the coefficient, and one
beyond 5 could make the coefficient negative: a run with very many episodes per step must not need another horizon."""


@final
@dataclass(frozen=True, slots=True)
class AdaptiveKL(Placed):
    """Keeps the KL near `target` by a proportional controller (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    e = clip(KL / target - 1, -0.2, 0.2), coef <- coef * (1 + e * n / horizon) after n episodes, with n / horizon at
    most 0.5 and coef within [coef_min, coef_max].

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
    """Taken from each action's reward before advantages are made, from its advantage, or added to the loss."""
    estimator: Asked = "auto"
    """`auto` is k1 in reward and advantage, and k2 in the loss. k3 in the loss is GRPO's; `exact`, there alone, sums
    over the whole vocabulary."""
    off_policy: OffPolicy = "none"
    """`ratio` weighs a KL in the loss by pi / pi_old, which gives the reverse gradient after several steps, too."""

    def __post_init__(self) -> None:
        chosen_estimator(self.placement, self.estimator, self.off_policy)
        require_positive(target=self.target, horizon=self.horizon)
        require_positive_bounds(self.coef, self.coef_min, self.coef_max)

    def init(self) -> KLState:
        return KLState(self.coef)

    def update(self, state: KLState, *, kl: float, n: int, **measured: float) -> KLState:
        if not usable(kl, n):
            return state
        e = clamped(kl / self.target - 1.0, -MAX_ERROR, MAX_ERROR)  # a negative KL is clipped as 0 is
        coef = state.coef * (1.0 + e * min(n / self.horizon, MAX_GAIN))
        return KLState(clamped(coef, self.coef_min, self.coef_max))


MAX_LOG_ERROR = 1.0
"""The log-error of one update counts at most this much: a KL of 0, as at the start of a run, has an infinite one."""


@final
@dataclass(frozen=True, slots=True)
class PIDState:
    """State of the PID controller, saved as JSON."""

    coef: float
    """beta, the weight of the KL."""
    e1: float = 0.0
    """The log-error of the rollout before."""
    e2: float = 0.0
    """The log-error of the rollout before that."""


@final
@dataclass(frozen=True, slots=True)
class PIDKL(Placed):
    """Keeps the KL at `target` by a PID controller of log beta, in velocity form.

    e = clip(log(KL / target), -1, 1); log beta += kp (e - e1) + ki e + kd (e - 2 e1 + e2), with e1 and e2 the errors of
    the two rollouts before, and beta within [coef_min, coef_max]. In logarithms a KL that falls with a power of beta is
    a straight line, so one set of gains serves all scales. The velocity form holds its integral in beta itself: where
    that is clamped nothing is summed up that would have to be undone (anti-windup). `kd: 0` is a PI controller.

    >>> kl = PIDKL(target=0.05, coef=0.1, kp=0.1, ki=0.05, kd=0.0)
    >>> round(math.log(kl.update(kl.init(), kl=0.1, n=64).coef / 0.1) / math.log(2), 6)
    0.15
    """

    target: float = 0.05
    """KL per action to be held."""
    coef: float = 0.05
    """The coefficient to begin with."""
    coef_min: float = 1e-6
    """Least coefficient; it must be positive, since a multiplicative rule cannot leave 0."""
    coef_max: float = 100.0
    """Largest coefficient."""
    kp: float = 0.1
    """Gain of the error's change."""
    ki: float = 0.1
    """Gain of the error: log beta moves by at most this much per rollout for a lasting one."""
    kd: float = 0.02
    """Gain of the change of the error's change; it answers to noise, too."""
    placement: Placement = "reward"
    """Taken from each action's reward before advantages are made, from its advantage, or added to the loss."""
    estimator: Asked = "auto"
    """`auto` is k1 in reward and advantage, and k2 in the loss. k3 in the loss is GRPO's; `exact`, there alone, sums
    over the whole vocabulary."""
    off_policy: OffPolicy = "none"
    """`ratio` weighs a KL in the loss by pi / pi_old, which gives the reverse gradient after several steps, too."""

    def __post_init__(self) -> None:
        chosen_estimator(self.placement, self.estimator, self.off_policy)
        require_positive(target=self.target, ki=self.ki)
        for name, gain in (("kp", self.kp), ("kd", self.kd)):
            if not (math.isfinite(gain) and gain >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {gain}")
        require_positive_bounds(self.coef, self.coef_min, self.coef_max)

    def init(self) -> PIDState:
        return PIDState(self.coef)

    def restarted(self, state: PIDState) -> PIDState:
        """Errors to another reference say nothing of this one."""
        return PIDState(state.coef)

    def update(self, state: PIDState, *, kl: float, n: int, **measured: float) -> PIDState:
        if not usable(kl, n):
            return state
        low, high = math.exp(-MAX_LOG_ERROR), math.exp(MAX_LOG_ERROR)
        e, e1, e2 = math.log(clamped(kl / self.target, low, high)), state.e1, state.e2
        du = self.kp * (e - e1) + self.ki * e + self.kd * (e - 2.0 * e1 + e2)
        return PIDState(clamped(state.coef * math.exp(du), self.coef_min, self.coef_max), e, e1)


@final
@dataclass(frozen=True, slots=True)
class BandKL(Placed):
    """Keeps the KL within [target / band, target * band] (Schulman et al. 2017, arXiv 1707.06347, section 4).

    Above the band coef <- coef * factor, below it coef <- coef / factor, within it nothing. The paper doubles; a factor
    settles where factor^s <= band^2 for a KL that falls with the s-th power of the coefficient, and jumps over the band
    for ever where it is larger. The defaults settle up to s = 3.6.

    >>> kl = BandKL(target=0.05, coef=0.1)
    >>> [kl.update(kl.init(), kl=x, n=64).coef for x in (0.03, 0.05, 0.08)]
    [0.08, 0.1, 0.125]
    """

    target: float = 0.05
    """KL per action in the middle of the band."""
    band: float = 1.5
    """The band is [target / band, target * band]."""
    factor: float = 1.25
    """What the coefficient is multiplied or divided by outside of it."""
    coef: float = 0.05
    """The coefficient to begin with."""
    coef_min: float = 1e-6
    """Least coefficient; it must be positive, since a multiplicative rule cannot leave 0."""
    coef_max: float = 100.0
    """Largest coefficient."""
    placement: Placement = "reward"
    """Taken from each action's reward before advantages are made, from its advantage, or added to the loss."""
    estimator: Asked = "auto"
    """`auto` is k1 in reward and advantage, and k2 in the loss. k3 in the loss is GRPO's; `exact`, there alone, sums
    over the whole vocabulary."""
    off_policy: OffPolicy = "none"
    """`ratio` weighs a KL in the loss by pi / pi_old, which gives the reverse gradient after several steps, too."""

    def __post_init__(self) -> None:
        chosen_estimator(self.placement, self.estimator, self.off_policy)
        require_positive(target=self.target)
        for name, x in (("band", self.band), ("factor", self.factor)):
            if not 1 < x < math.inf:
                raise ValueError(f"{name} must be finite and above 1, got {x}")
        require_positive_bounds(self.coef, self.coef_min, self.coef_max)

    def init(self) -> KLState:
        return KLState(self.coef)

    def update(self, state: KLState, *, kl: float, n: int, **measured: float) -> KLState:
        if not usable(kl, n):
            return state
        above, below = kl > self.target * self.band, kl < self.target / self.band
        coef = state.coef * self.factor if above else state.coef / self.factor if below else state.coef
        return KLState(clamped(coef, self.coef_min, self.coef_max))


MAX_EXCESS = 1.0
"""A KL counts at most as twice the limit: one wild rollout must not send the coefficient to its bound."""


@final
@dataclass(frozen=True, slots=True)
class DualKL(Placed):
    """Holds KL <= target as a constraint: dual ascent on log beta, its Lagrange multiplier.

    log beta <- clip(log beta + ki * clip(KL / target - 1, -1, 1)). At the optimum of E[r] - beta KL either the KL is at
    its limit or beta is at `coef_min`, where the constraint does not bind. Its fixed point is that of the mean KL, also
    where measurements scatter.

    >>> kl = DualKL(target=0.05, coef=0.1)
    >>> round(kl.update(kl.init(), kl=0.075, n=64).coef, 6)
    0.105127
    """

    target: float = 0.05
    """epsilon, the largest KL per action."""
    coef: float = 0.05
    """The multiplier to begin with."""
    coef_min: float = 1e-6
    """Least multiplier; it must be positive, since a multiplicative rule cannot leave 0."""
    coef_max: float = 100.0
    """Largest multiplier."""
    ki: float = 0.1
    """Step of the ascent, per relative excess of the KL."""
    placement: Placement = "reward"
    """Taken from each action's reward before advantages are made, from its advantage, or added to the loss."""
    estimator: Asked = "auto"
    """`auto` is k1 in reward and advantage, and k2 in the loss. k3 in the loss is GRPO's; `exact`, there alone, sums
    over the whole vocabulary."""
    off_policy: OffPolicy = "none"
    """`ratio` weighs a KL in the loss by pi / pi_old, which gives the reverse gradient after several steps, too."""

    def __post_init__(self) -> None:
        chosen_estimator(self.placement, self.estimator, self.off_policy)
        require_positive(target=self.target, ki=self.ki)
        require_positive_bounds(self.coef, self.coef_min, self.coef_max)

    def init(self) -> KLState:
        return KLState(self.coef)

    def update(self, state: KLState, *, kl: float, n: int, **measured: float) -> KLState:
        if not usable(kl, n):
            return state
        excess = clamped(kl / self.target - 1.0, -1.0, MAX_EXCESS)  # a negative KL is clipped as 0 is
        return KLState(clamped(state.coef * math.exp(self.ki * excess), self.coef_min, self.coef_max))


@final
@dataclass(frozen=True, slots=True)
class EntropyState:
    """State of the entropy-triggered coefficient, saved as JSON."""

    coef: float
    """beta, the weight of the KL: the level, or 0 while it is not triggered."""
    level: float
    """What the coefficient is while it is triggered."""


@final
@dataclass(frozen=True, slots=True)
class EntropyKL(Placed):
    """Pulls towards the reference while the policy's entropy is at most `target_entropy`, and not above it.

    The adaptive rule of Skywork-OR1 (He et al. 2025, arXiv 2505.22312), applied to the coefficient of the KL. With H
    the entropy per action, level += delta where H < target_entropy and -= delta where H > target_entropy, within
    [coef_min, coef_max]; the coefficient is the level where H <= target_entropy, else 0. It does not look at the KL.

    >>> kl = EntropyKL(target_entropy=0.3, delta=0.25)
    >>> state = kl.update(kl.init(), kl=0.1, n=64, entropy=0.2)
    >>> state.coef, kl.update(state, kl=0.1, n=64, entropy=0.4)
    (0.25, EntropyState(coef=0.0, level=0.0))
    """

    target_entropy: float = 0.3
    """Entropy per action, in nats, at or below which the KL counts."""
    delta: float = 0.005
    """What the level moves by after each rollout."""
    coef: float = 0.0
    """The level to begin with."""
    coef_min: float = 0.0
    """Least level; the rule adds, so it may be 0."""
    coef_max: float = 1.0
    """Largest level."""
    placement: Placement = "reward"
    """Taken from each action's reward before advantages are made, from its advantage, or added to the loss."""
    estimator: Asked = "auto"
    """`auto` is k1 in reward and advantage, and k2 in the loss. k3 in the loss is GRPO's; `exact`, there alone, sums
    over the whole vocabulary."""
    off_policy: OffPolicy = "none"
    """`ratio` weighs a KL in the loss by pi / pi_old, which gives the reverse gradient after several steps, too."""

    def __post_init__(self) -> None:
        chosen_estimator(self.placement, self.estimator, self.off_policy)
        require_positive(target_entropy=self.target_entropy, delta=self.delta)
        if not 0 <= self.coef_min <= self.coef <= self.coef_max < math.inf:
            raise ValueError("coef must lie in [coef_min, coef_max], with coef_min not negative and coef_max finite, "
                             f"got {self.coef} in [{self.coef_min}, {self.coef_max}]")

    def init(self) -> EntropyState:
        return EntropyState(self.coef, self.coef)

    def update(self, state: EntropyState, *, kl: float, n: int, entropy: float = math.nan,
               **measured: float) -> EntropyState:
        if not usable(kl, n) or not math.isfinite(entropy):
            return state
        step = math.copysign(self.delta, self.target_entropy - entropy) if entropy != self.target_entropy else 0.0
        level = clamped(state.level + step, self.coef_min, self.coef_max)
        return EntropyState(level if entropy <= self.target_entropy else 0.0, level)
