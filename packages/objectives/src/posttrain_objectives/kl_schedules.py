"""KL coefficients that are known beforehand: schedules over rollouts. Uses no measurement."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, final

from posttrain_objectives.choices import require_choice
from posttrain_objectives.kl import usable
from posttrain_objectives.kl_estimators import Asked, OffPolicy, Placed, Placement, chosen_estimator

Shape = Literal["linear", "cosine"]

SHAPES: Mapping[Shape, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x))}
"""Done part of the schedule -> what is left of the distance to its end."""


@final
@dataclass(frozen=True, slots=True)
class ScheduleState:
    """State of a schedule, saved as JSON."""

    coef: float
    """beta, the weight of the KL."""
    step: int = 0
    """Rollouts so far."""


@final
@dataclass(frozen=True, slots=True)
class ScheduledKL(Placed):
    """The coefficient goes from `coef` to `coef_end` in `steps` rollouts, and stays there.

    beta(k) = beta_end + (beta_0 - beta_end) f(k / steps) after k rollouts, f(x) = 1 - x or (1 + cos(pi x)) / 2. A
    rollout whose KL could not be measured does not count.

    >>> kl = ScheduledKL(coef=0.1, coef_end=0.02, steps=4)
    >>> state = kl.update(kl.init(), kl=0.3, n=64)
    >>> round(state.coef, 6), state.step
    (0.08, 1)
    """

    coef: float = 0.05
    """beta_0, the coefficient to begin with."""
    coef_end: float = 0.0
    """beta_end, the coefficient after `steps` rollouts."""
    steps: int = 1000
    """Rollouts of the schedule, usually `${steps}`."""
    shape: Shape = "linear"
    """A straight line, or half a cosine: flat at both ends."""
    placement: Placement = "reward"
    """Taken from each action's reward before advantages are made, from its advantage, or added to the loss."""
    estimator: Asked = "auto"
    """`auto` is k1 in reward and advantage, and k2 in the loss. k3 in the loss is GRPO's; `exact`, there alone, sums
    over the whole vocabulary."""
    off_policy: OffPolicy = "none"
    """`ratio` weighs a KL in the loss by pi / pi_old, which gives the reverse gradient after several steps, too."""

    def __post_init__(self) -> None:
        chosen_estimator(self.placement, self.estimator, self.off_policy)
        require_choice("shape", self.shape, SHAPES)
        for name in ("coef", "coef_end"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}; usually it is ${{steps}}")

    def init(self) -> ScheduleState:
        return ScheduleState(self.coef)

    def update(self, state: ScheduleState, *, kl: float, n: int, **measured: float) -> ScheduleState:
        if not usable(kl, n):
            return state
        step = state.step + 1
        left = SHAPES[self.shape](min(step / self.steps, 1.0))
        return ScheduleState(self.coef_end + (self.coef - self.coef_end) * left, step)
