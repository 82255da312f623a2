"""AdamW over named parameters. Knows no model and no loss.

Moments, in float32 or in 8 bits, exist from the start, so that a step cannot run out of memory, and cross to NumPy by
parameter name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast, final

import torch
from posttrain.errors import ConfigError
from posttrain.protocols import Optimization
from torch import Tensor, nn

from posttrain_backends._torch.quiet import import_quietly
from posttrain_backends.installed import require
from posttrain_backends.schedule import lr_at, require_room_for_schedule

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


@final
class NamedAdamW:
    """AdamW (1711.05101) of torch, or of bitsandbytes with moments in 8 bits, with decay on matrices only, its rate set
    at each step, its state by name."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: Optimization) -> None:
        require_room_for_schedule(settings)
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
