"""The state-space recurrence of Mamba-2 and the convolution before it, on flat ragged tokens: in chunks, and by steps.

Source: Dao & Gu 2024 (2405.21060): the recurrence with a scalar decay (section 3.1), its form in chunks (SSD, section
6), and sequences one behind the other without passing anything on (section 8.3). Letters are the paper's: x inputs,
a decays, B and C into and out of the state, h the state, y outputs. Knows tensors only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain_backends._torch.layout import Layout


@final
@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """What all layers of one pass share: M tokens cut into c chunks of Q, wherever in them sequences begin."""

    rows: int
    """c"""
    columns: int
    """Q"""
    sees: Tensor
    """[c, Q, Q] true where the token of the last axis is no later than that of the second, and of its sequence."""
    of_last: Tensor
    """[c, Q] true for tokens of the sequence that the chunk ends with."""
    of_former: Tensor
    """[c, Q] true for tokens of the sequence that the chunk before ends with."""
    ends: Tensor
    """[S] the last token of each sequence; [0] where nobody asks what it leaves behind."""
    places: Tensor
    """[M] where the tokens lie when each sequence has K-1 zeros before it."""
    gapped: int
    """Length of that line."""
    sequence: Tensor
    """[M] int32, of each token."""
    offsets: Tensor
    """[n+1] where the n sequences that hold a token begin, and the end."""

    @classmethod
    def of(cls, layout: Layout, chunk_size: int, kernel: int, *, final: bool) -> Packing:
        """Of a layout with at least one token, none of them shared; K is `kernel`. With `final`, what sequences leave
        behind is asked for."""
        M, device = len(layout.rows), layout.rows.device
        Q = min(chunk_size, M)
        c = -(-M // Q)
        sequence = F.pad(layout.rows, (0, c * Q - M), value=-1).view(c, Q)
        former = F.pad(sequence[:-1, -1], (1, 0), value=-2)
        same = sequence[:, :, None] == sequence[:, None, :]
        return cls(
            c, Q, same.tril(), sequence == sequence[:, -1:], sequence == former[:, None],
            layout.last if final else layout.last[:0],
            torch.arange(M, device=device) + (kernel - 1) * (layout.rows + 1), M + (kernel - 1) * len(layout.last),
            layout.rows.int(), torch.from_numpy(np.unique(layout.offsets)).to(device))

    def chunks(self, x: Tensor) -> Tensor:
        """[M, ...] -> [c, Q, ...], zeros behind the last token."""
        behind = self.rows * self.columns - len(x)
        return F.pad(x, (0, 0) * (x.ndim - 1) + (0, behind)).view(self.rows, self.columns, *x.shape[1:])


# ---- the convolution


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, packing: Packing) -> tuple[Tensor, Tensor]:
    """Each channel of x [M, E] with its own causal kernel, weight [E, 1, K] -> [M, E], and the K-1 inputs
    that each of `packing.ends` ends with, [S, K-1, E]. Before a sequence are zeros."""
    K = weight.shape[-1]
    line = x.new_zeros(packing.gapped, x.shape[1]).index_copy(0, packing.places, x)
    y = F.conv1d(line.t()[None], weight, bias, groups=len(weight))[0].t()
    window = packing.places[packing.ends][:, None] + torch.arange(2 - K, 1, device=x.device)
    return y.index_select(0, packing.places - (K - 1)), line[window]


def convolve_step(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor) -> Tensor:
    """`convolve` for one token [B, E] behind the inputs in `window` [B, K-1, E], which move on in place."""
    inputs = torch.cat([window.to(x.dtype), x[:, None]], 1)
    window.copy_(inputs[:, 1:])
    y: Tensor = torch.linalg.vecdot(inputs, weight[:, 0].t(), dim=1)
    return y if bias is None else y + bias


# ---- the recurrence


def ssd(x: Tensor, log_a: Tensor, B: Tensor, C: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + x_t B_t^T and y_t = h_t C_t in every sequence, h = 0 before it, by matrices in chunks.

    x [M, heads, P], log_a [M, heads] none above 0, B and C [M, groups, N], each group for heads / groups heads ->
    y [M, heads, P] and the states at `packing.ends`, [S, heads, P, N], which nobody differentiates.
    """
    M, heads, P = x.shape
    G, N = B.shape[1:]
    c, Q, R = packing.rows, packing.columns, heads // G
    decay = _Decays.of(packing.chunks(log_a), packing, x.dtype)
    Bc, Cc = (packing.chunks(z).transpose(1, 2) for z in (B, C))  # [c, G, Q, N]
    xc = packing.chunks(x).transpose(1, 2)  # [c, heads, Q, P]
    scores = (Cc @ Bc.mT)[:, :, None] * decay.within.view(c, G, R, Q, Q)
    inside = scores.view(c, heads, Q, Q) @ xc
    made = _into_state(xc * decay.to_end[..., None], Bc)
    before = _carried(made, decay.through)  # [c, heads, P, N]
    read = (Cc @ before.view(c, G, R * P, N).mT).view(c, G, Q, R, P).transpose(2, 3).reshape(c, heads, Q, P)
    y = inside + read * decay.from_start[..., None]
    return y.transpose(1, 2).reshape(c * Q, heads, P)[:M], _final_states(xc, Bc, before, decay, packing)


def ssd_step(x: Tensor, a: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """One step of the recurrence: x [B, heads, P], a [B, heads], B and C [B, groups, N] -> y [B, heads, P]; `state`
    [B, heads, P, N] moves on in place."""
    rows, heads, P, N = state.shape
    grouped = state.view(rows, B.shape[1], -1, P, N)
    grouped.mul_(a.view(*grouped.shape[:3], 1, 1))
    grouped.addcmul_(x.view(*grouped.shape[:4], 1), B[:, :, None, None])
    return (C[:, :, None] @ grouped.flatten(2, 3).mT).view(rows, heads, P)  # times a column it is much slower


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Decays:
    """Products of a over runs of tokens, 0 where a sequence begins in between."""

    within: Tensor
    """[c, heads, Q, Q] of what lies behind the token of the last axis, up to that of the third (the matrix L)."""
    to_end: Tensor
    """[c, heads, Q] of what lies behind a token, up to the end of its chunk."""
    from_start: Tensor
    """[c, heads, Q] from the start of the chunk up to a token."""
    through: Tensor
    """[c, heads] of the whole chunk."""

    @classmethod
    def of(cls, log_a: Tensor, packing: Packing, dtype: torch.dtype) -> _Decays:
        """Of log_a [c, Q, heads]. Its sums are float64: over a chunk they grow large, and their differences stay
        small."""
        total = log_a.mT.double().cumsum(-1)  # [c, heads, Q]
        between = (total[..., :, None] - total[..., None, :]).masked_fill_(~packing.sees[:, None], float("-inf"))
        last = total[..., -1:]
        of_last, of_former = packing.of_last[:, None], packing.of_former[:, None]
        return cls(between.to(dtype).exp(), (last - total).to(dtype).exp() * of_last, total.to(dtype).exp() * of_former,
                   (last.to(dtype).exp() * of_former[..., -1:])[..., 0])


def _into_state(x: Tensor, B: Tensor) -> Tensor:
    """sum_t x_t B_t^T: x [n, heads, Q, P], B [n, groups, Q, N] -> [n, heads, P, N]."""
    n, heads, Q, P = x.shape
    G, N = B.shape[1], B.shape[-1]
    R = heads // G
    columns = x.view(n, G, R, Q, P).transpose(-1, -2).reshape(n, G, R * P, Q)  # so that B is not repeated for its heads
    return (columns @ B).view(n, heads, P, N)


def _carried(made: Tensor, through: Tensor) -> Tensor:
    """The state before each chunk, from what each one adds [c, heads, P, N] and lets through [c, heads]."""
    before = [torch.zeros_like(made[0])]
    for added, passed in zip(made[:-1].unbind(), through[:-1, :, None, None].unbind()):
        before.append(torch.addcmul(added, passed, before[-1]))
    return torch.stack(before)


def _final_states(x: Tensor, B: Tensor, before: Tensor, decay: _Decays, packing: Packing) -> Tensor:
    """[S, heads, P, N] at `packing.ends`, which may lie inside a chunk."""
    with torch.no_grad():
        chunk, column = packing.ends // packing.columns, packing.ends % packing.columns
        made = _into_state(x[chunk] * decay.within[chunk, :, column][..., None], B[chunk])
        return made.addcmul_(decay.from_start[chunk, :, column][..., None, None], before[chunk])
