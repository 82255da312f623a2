"""What a layer does to each token by itself: an MLP, or a mixture of experts. Knows no attention and no losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain_backends._torch.models.lean import Norm, swiglu
from posttrain_backends._torch.models.mixture import Experts, MixtureWeights, Routes
from posttrain_backends._torch.models.shape import Shape


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden_size, size, bias) for _ in range(2))
        self.down_proj = nn.Linear(size, hidden_size, bias)

    def forward(self, x: Tensor, norm: Norm, routes: Routes) -> Tensor:
        """[M, H] -> [M, H]; reads `norm` of x."""
        gate, up = norm.linears(x, self.gate_proj.weight, self.up_proj.weight)
        gate, up = biased(gate, self.gate_proj.bias), biased(up, self.up_proj.bias)
        return biased(swiglu(gate, up, self.down_proj.weight), self.down_proj.bias)

    def for_decoding(self, dtype: torch.dtype) -> DenseWeights:
        gate_up = (self.gate_proj, self.up_proj)
        return DenseWeights(side_by_side(*(linear.weight for linear in gate_up)).to(dtype), joined_bias(gate_up, dtype),
                            self.down_proj.weight, self.down_proj.bias)


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
        normed: Tensor = norm(x)
        made = self._routed(multiplied_in(x))(normed, routes)
        if self.shared_expert is None or self.shared_expert_gate is None:
            return made
        shared: Tensor = torch.sigmoid(self.shared_expert_gate(normed)) * self.shared_expert(x, norm, routes)
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

    gate_up: Tensor
    """[2 I, H]"""
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    def __call__(self, x: Tensor, routes: Routes) -> Tensor:
        """[B, H] -> [B, H]"""
        gate, up = F.linear(x, self.gate_up, self.gate_up_bias).chunk(2, dim=-1)
        return biased(swiglu(gate, up, self.down), self.down_bias)


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


@torch.inference_mode(False)  # samplers run in inference mode, and what is made there could not be trained
@torch.no_grad()
def side_by_side(*parameters: Tensor) -> Tensor:
    """Matrices or biases one below the other, without a second copy: where they do not lie so already, they are moved.

    The parameters stay the same objects and become views of the whole, so what updates them in place updates it.
    """
    first, lengths = parameters[0], [len(p) for p in parameters]
    row = first.element_size() * first[0].numel()
    starts = [first.data_ptr() + row * sum(lengths[:i]) for i in range(len(lengths))]
    same = {p.untyped_storage().data_ptr() for p in parameters} == {first.untyped_storage().data_ptr()}
    if same and [p.data_ptr() for p in parameters] == starts:
        return first.detach().as_strided((sum(lengths), *first.shape[1:]), first.stride())
    whole = torch.cat([p.detach() for p in parameters])
    for p, part in zip(parameters, torch.split(whole, lengths)):
        p.data = part
    return whole


def joined_bias(linears: Sequence[nn.Linear], dtype: torch.dtype) -> Tensor | None:
    """Their biases one after the other, if they have any; see `side_by_side`."""
    biases = [p for linear in linears for name, p in linear.named_parameters() if name == "bias"]
    return side_by_side(*biases).to(dtype) if biases else None


def biased(y: Tensor, bias: Tensor | None) -> Tensor:
    """y + bias in the type of y, as a linear layer adds it."""
    return y if bias is None else y + bias.to(y.dtype)
