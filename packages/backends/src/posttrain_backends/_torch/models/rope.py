"""Rotary positions (Su et al. 2021, 2104.09864) in torch: the angles of all positions, and the turn.

Knows heads and positions, and no model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain_backends.families.rope import Scaling

Rope = tuple[Tensor, Tensor]
"""cos and sin of each token, [M, 1, D]; sin is negative in the first half, the sign of the rotation."""


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
