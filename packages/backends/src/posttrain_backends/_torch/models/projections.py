"""Linear layers of the native models: torch's own, or in their place a library's, whose weights are quantised.

Torch's own are read by their weights: backward passes are joined with what stands before them, and layers that read the
same input are one while answers are drawn. What a library made is called, as it alone knows its weights; it is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast, final

import torch
import torch.nn.functional as F
from posttrain.errors import ConfigError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from posttrain_backends._torch.models.lean import Norm, swiglu


class Projection(Protocol):
    """[M, I] -> [M, O]"""

    def __call__(self, x: Tensor, /) -> Tensor: ...


def is_plain(linear: nn.Linear) -> bool:
    """Whether the weight is what the layer multiplies by, and not a library's form of it; also one that is imagined."""
    return type(linear.weight) in (Tensor, nn.Parameter) or isinstance(linear.weight, FakeTensor)


def has_plain_layers(module: nn.Module) -> bool:
    """Whether all linear layers in it are torch's own."""
    return all(is_plain(layer) for layer in module.modules() if isinstance(layer, nn.Linear))


def normed(x: Tensor, norm: Norm, *linears: nn.Linear) -> tuple[Tensor, ...]:
    """The norm of x [M, H] through each of the layers, all torch's own or none."""
    if all(map(is_plain, linears)):
        made = norm.linears(x, *(linear.weight for linear in linears))
        return tuple(biased(y, linear.bias) for y, linear in zip(made, linears))
    read = norm(x)
    return tuple(linear(read) for linear in linears)


def gated(gate: Tensor, up: Tensor, down: nn.Linear) -> Tensor:
    """SwiGLU: gate and up [M, I], which are no longer read, through `down` -> [M, H]."""
    if is_plain(down):
        return biased(swiglu(gate, up, down.weight), down.bias)
    return cast(Tensor, down(F.silu(gate).mul_(up)))


def biased(y: Tensor, bias: Tensor | None) -> Tensor:
    """y + bias in the type of y, as a linear layer adds it."""
    return y if bias is None else y + bias.to(y.dtype)


# ---- while answers are drawn


@final
@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """Layers that read the same input as one, as few rows are bound by calls and not by arithmetic."""

    weight: Tensor
    """[sum of O, I]"""
    bias: Tensor | None

    def __call__(self, x: Tensor, /) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Beside:
    """Layers of a library that read the same input, whose outputs are put side by side."""

    linears: Sequence[nn.Linear]
    dtype: torch.dtype

    def __call__(self, x: Tensor, /) -> Tensor:
        return torch.cat([linear(x) for linear in self.linears], dim=-1).to(self.dtype)


def joined(linears: Sequence[nn.Linear], dtype: torch.dtype) -> Projection:
    """Layers that read the same input, as one that gives `dtype`."""
    if not all(map(is_plain, linears)):
        return Beside(linears, dtype)
    biases = [p for linear in linears for name, p in linear.named_parameters() if name == "bias"]
    return Joined(side_by_side(*(linear.weight for linear in linears)).to(dtype),
                  side_by_side(*biases).to(dtype) if biases else None)


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


# ---- in files


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's tensors by name. Raises `ConfigError` where some are quantised: a native model's files have none."""
    if not has_plain_layers(module):
        raise ConfigError(["a native model with quantised weights is not saved: the folder that it was read from holds "
                           "all of it"],
                          next_step="For a quantised folder, load that folder with policy: quantized and save this.")
    return module.state_dict()
