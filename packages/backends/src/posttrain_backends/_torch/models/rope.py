"""Rotary positions (Su et al. 2021, 2104.09864): the angles of all positions, contexts that were stretched, the turn.

Knows heads and positions, and no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]
"""cos and sin of each token, [M, 1, D]; sin is negative in the first half, the sign of the rotation."""


@final
@dataclass(frozen=True, slots=True)
class Linear:
    """All frequencies divided by `factor`, as if positions were (2306.15595, eq. 4)."""

    factor: float
    rope_type: Literal["linear"] = "linear"

    def __call__(self, frequency: Tensor) -> Tensor:
        return frequency / self.factor


@final
@dataclass(frozen=True, slots=True)
class Llama3:
    """Frequencies that turn seldom in the original context divided by `factor`, those that turn often left alone, and
    those between interpolated, as Llama 3.1 does (2407.21783; the formula stands in its released code).

    >>> often, between, seldom = 2 * math.pi * torch.tensor([8.0, 2.5, 0.5]) / 8192
    >>> Llama3(8.0, 1.0, 4.0, 8192)(torch.stack([often, between, seldom])) * 8192 / (2 * math.pi)
    tensor([8.0000, 1.4062, 0.0625])
    """

    factor: float
    low_freq_factor: float
    """Turns in the original context up to which a frequency is divided."""
    high_freq_factor: float
    """Turns from which it is left alone."""
    original_max_position_embeddings: int
    rope_type: Literal["llama3"] = "llama3"

    def __call__(self, frequency: Tensor) -> Tensor:
        turns = self.original_max_position_embeddings / (2 * math.pi / frequency)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - kept) * frequency / self.factor + kept * frequency


Scaling = Linear | Llama3
SCALINGS: Mapping[str, type[Linear] | type[Llama3]] = {"linear": Linear, "llama3": Llama3}
"""By Hugging Face's `rope_type`; their fields have the names of the file's keys."""


def rope_table(positions: int, D: int, theta: float, scaling: Scaling | None, dtype: torch.dtype,
               device: torch.device) -> Rope:
    """cos and signed sin of position * theta^(-2i/D), each [positions, 1, D], repeated for both halves.

    `dtype` is float32 or better: in bfloat16 neighbouring positions would coincide. In float32 an angle at position
    4000 is off by 1e-4; transformers rounds the same way, so that logits stay equal at every length.
    """
    frequency = 1 / theta ** (torch.arange(0, D, 2, dtype=dtype) / D)
    frequency = scaling(frequency) if scaling is not None else frequency
    angle = torch.arange(positions, dtype=dtype)[:, None] * frequency
    cos, sin = angle.cos()[:, None, :], angle.sin()[:, None, :]
    return torch.cat([cos, cos], -1).to(device), torch.cat([-sin, sin], -1).to(device)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of [M, heads, D] by its position's angle (2104.09864, eq. 34), in float32."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([b, a], dim=-1), sin).to(x.dtype)
