"""The learning rate as a pure function of the step. Imports no framework."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from posttrain.errors import ConfigError
from posttrain.protocols import Optimization

DECAY: Mapping[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""Schedule -> factor of the peak rate by progress in [0, 1] after warm-up (cosine: 1608.03983, eq. 5)."""


def lr_at(step: int, settings: Optimization) -> float:
    """The rate of the optimiser step after `step` others: linear from 0 over the warm-up, then the schedule.

    >>> lr_at(5, Optimization(lr=1.0, schedule="linear", total_steps=10, min_lr_ratio=0.5))
    0.75
    """
    if step < settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    span = max(1, settings.total_steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / span)
    floor = settings.min_lr_ratio if settings.schedule != "constant" else 0.0
    return settings.lr * (floor + (1.0 - floor) * DECAY[settings.schedule](progress))


def require_room_for_schedule(settings: Optimization) -> None:
    """Raise `ConfigError` where the schedule has no steps after the warm-up."""
    if settings.schedule != "constant" and settings.total_steps <= settings.warmup_steps:
        raise ConfigError([f"optimizer.schedule {settings.schedule!r} needs total_steps above warmup_steps "
                           f"({settings.warmup_steps}), got {settings.total_steps}"])
