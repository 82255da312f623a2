"""What a layer does to each token by itself: an MLP, or a mixture of experts. Knows no attention and no losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain_backends._torch.models.lean import Norm
from posttrain_backends._torch.models.mixture import Experts, MixtureWeights, Routes
from posttrain_backends._torch.models.projections import Projection, gated, joined, normed
from posttrain_backends.families.shape import Shape


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden_size, size, bias) for _ in range(2))
        self.down_proj = nn.Linear(size, hidden_size, bias)

    def forward(self, x: Tensor, norm: Norm, routes: Routes) -> Tensor:
        """[M, H] -> [M, H]; reads `norm` of x."""
        gate, up = normed(x, norm, self.gate_proj, self.up_proj)
        return gated(gate, up, self.down_proj)

    def for_decoding(self, dtype: torch.dtype) -> DenseWeights:
        return DenseWeights(joined((self.gate_proj, self.up_proj), dtype), joined((self.down_proj,), dtype))


class Mixture(nn.Module):
    """Some of many experts for each token, and where there is one, a gated expert for all."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        H, shared = shape.hidden_size, shape.shared_expert_intermediate_size
        self.layer, self.per_token, self.normalised = layer, shape.num_experts_per_tok, shape.normalises_experts
        self.gate = nn.Linear(H, shape.num_experts, bias=False)
        self.experts = Experts(shape.num_experts, H, shape.expert_size)
        self.shared_expert = MLP(H, shared) if shared else None
        self.shared_expert_gate = nn.Linear(H, 1, bias=False) if shared else None

    def forward(self, x: Tensor, norm: Norm, routes: Routes) -> Tensor:
        """[M, H] -> [M, H]; reads `norm` of x."""
        read: Tensor = norm(x)
        made = self._routed(multiplied_in(x))(read, routes)
        if self.shared_expert is None or self.shared_expert_gate is None:
            return made
        shared: Tensor = torch.sigmoid(self.shared_expert_gate(read)) * self.shared_expert(x, norm, routes)
        return made + shared

    def _routed(self, dtype: torch.dtype) -> MixtureWeights:
        return MixtureWeights(self.layer, self.gate.weight, self.experts.gate_up_proj.to(dtype),
                              self.experts.down_proj.to(dtype), self.per_token, self.normalised)

    def for_decoding(self, dtype: torch.dtype) -> DecodedMixture:
        if self.shared_expert is None or self.shared_expert_gate is None:
            return DecodedMixture(self._routed(dtype))
        return DecodedMixture(self._routed(dtype), self.shared_expert.for_decoding(dtype),
                              self.shared_expert_gate.weight)


@final
@dataclass(frozen=True, slots=True, eq=False)
class DenseWeights:
    """An MLP as a function of what it reads."""

    gate_up: Projection
    """H -> 2 I"""
    down: Projection

    def __call__(self, x: Tensor, routes: Routes) -> Tensor:
        """[B, H] -> [B, H]"""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))


@final
@dataclass(frozen=True, slots=True, eq=False)
class DecodedMixture:
    """A mixture as a function of what it reads."""

    routed: MixtureWeights
    shared: DenseWeights | None = None
    shared_gate: Tensor | None = None
    """[1, H]"""

    def __call__(self, x: Tensor, routes: Routes) -> Tensor:
        """[B, H] -> [B, H]"""
        made = self.routed(x, routes)
        if self.shared is None or self.shared_gate is None:
            return made
        return made + torch.sigmoid(F.linear(x, self.shared_gate)) * self.shared(x, routes)


def multiplied_in(x: Tensor) -> torch.dtype:
    """The type in which x is multiplied here: that of autocast, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
