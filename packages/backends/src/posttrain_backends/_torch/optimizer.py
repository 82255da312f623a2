"""AdamW over named parameters, and the learning rate as a pure function of the step. Knows no model and no loss.

Moments, in float32 or in 8 bits, exist from the start, so that a step cannot run out of memory, and cross to NumPy by
parameter name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast, final

import torch
from posttrain.errors import ConfigError
from posttrain.protocols import Optimization
from torch import Tensor, nn

from posttrain_backends._torch.quiet import import_quietly
from posttrain_backends.on_torch import require

DECAY: Mapping[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""Schedule -> factor of the peak rate by progress in [0, 1] after warm-up (cosine: 1608.03983, eq. 5)."""

KEPT: Mapping[str, tuple[str, ...]] = {
    "float32": ("exp_avg", "exp_avg_sq"), "int8": ("state1", "state2", "absmax1", "absmax2")}
"""Form of the moments -> what an optimiser keeps of a parameter; small ones have no scales (absmax) in `int8`."""
Groups = list[dict[str, Any]]


def _adamw(groups: Groups, settings: Optimization) -> torch.optim.Optimizer:
    made = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
    for p in (p for group in groups for p in group["params"]):
        made.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device),
                         **{moment: torch.zeros_like(p) for moment in KEPT["float32"]}}
    return made


def _adamw_8bit(groups: Groups, settings: Optimization) -> torch.optim.Optimizer:
    require("optimizer.moments: int8", "bitsandbytes")
    if any(p.dtype != torch.float32 for group in groups for p in group["params"]):
        raise ConfigError(["optimizer.moments: int8 is for parameters in float32, and these are not; use float32"])
    import_quietly("bitsandbytes")
    from bitsandbytes.optim import AdamW8bit

    made: Any = AdamW8bit(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
    for g, group in enumerate(made.param_groups):
        for i, p in enumerate(group["params"]):
            made.init_state(group, p, g, i)
    return cast(torch.optim.Optimizer, made)


_MADE: Mapping[str, Callable[[Groups, Optimization], torch.optim.Optimizer]] = {
    "float32": _adamw, "int8": _adamw_8bit}
"""Form of the moments -> AdamW on these groups, its state made."""


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
    """AdamW (1711.05101) of torch, or of bitsandbytes with moments in 8 bits, with decay on matrices only, its rate set
    at each step, its state by name."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: Optimization) -> None:
        if settings.schedule != "constant" and settings.total_steps <= settings.warmup_steps:
            raise ConfigError([f"optimizer.schedule {settings.schedule!r} needs total_steps above warmup_steps "
                               f"({settings.warmup_steps}), got {settings.total_steps}"])
        self.parameters, self.settings, self.steps = dict(parameters), settings, 0
        matrices = [p for p in parameters.values() if p.ndim >= 2]
        others = [p for p in parameters.values() if p.ndim < 2]
        self._adamw = _MADE[settings.moments]([
            {"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            settings)

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
        """`exp_avg.NAME` and `exp_avg_sq.NAME` of every parameter, or what stands for them in 8 bits, live."""
        for kept in KEPT[self.settings.moments]:
            for name, p in self.parameters.items():
                if kept in self._adamw.state[p]:
                    yield f"{kept}.{name}", self._adamw.state[p][kept]

    def resume(self, steps: int) -> None:
        """Count as if `steps` steps had been taken; moments are written through `arrays`."""
        self.steps = steps
        for p in self.parameters.values():
            state = self._adamw.state[p]
            state["step"] = torch.full_like(state["step"], steps) if isinstance(state["step"], Tensor) else steps
