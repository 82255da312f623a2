"""AdamW over named parameters, and the learning rate as a pure function of the step. Knows no model and no loss.

Moments exist from the start, so that a step cannot run out of memory, and cross to NumPy by parameter name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import final

import torch
from posttrain.errors import ConfigError
from posttrain.protocols import Optimization
from torch import Tensor, nn

DECAY: Mapping[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""Schedule -> factor of the peak rate by progress in [0, 1] after warm-up (cosine: 1608.03983, eq. 5)."""

MOMENTS = ("exp_avg", "exp_avg_sq")


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


@final
class NamedAdamW:
    """torch's AdamW (1711.05101) with decay on matrices only, its rate set at each step, its state by name."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: Optimization) -> None:
        if settings.schedule != "constant" and settings.total_steps <= settings.warmup_steps:
            raise ConfigError([f"optimizer.schedule {settings.schedule!r} needs total_steps above warmup_steps "
                               f"({settings.warmup_steps}), got {settings.total_steps}"])
        self.parameters, self.settings, self.steps = dict(parameters), settings, 0
        matrices = [p for p in parameters.values() if p.ndim >= 2]
        others = [p for p in parameters.values() if p.ndim < 2]
        self._adamw = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
        for p in parameters.values():
            self._adamw.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device),
                                    **{moment: torch.zeros_like(p) for moment in MOMENTS}}

    @property
    def lr(self) -> float:
        """The rate of the next step."""
        return lr_at(self.steps, self.settings)

    def step(self) -> None:
        """Move every parameter by its `.grad`."""
        for group in self._adamw.param_groups:
            group["lr"] = self.lr
        self._adamw.step()
        self.steps += 1

    def arrays(self) -> Iterator[tuple[str, Tensor]]:
        """`exp_avg.NAME` and `exp_avg_sq.NAME` of every parameter, live."""
        for moment in MOMENTS:
            for name, p in self.parameters.items():
                yield f"{moment}.{name}", self._adamw.state[p][moment]

    def resume(self, steps: int) -> None:
        """Count as if `steps` steps had been taken; moments are written through `arrays`."""
        self.steps = steps
        for p in self.parameters.values():
            self._adamw.state[p]["step"].fill_(steps)
