"""The segmented scan behind `TritonRecurrence`: three Triton kernels and their launch. Imported when one computes.

Positions r count actions from the column's last one, so that the recurrence is a forward scan: Triton's own reversed
scans of pairs have been reported wrong on GPUs (triton-lang/triton issue 4362). Pairs (a, y) compose as the functions
v -> y + a v do; a is 0 at the last action of an episode, and no finite number passes a 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# ruff: noqa: TID253  (this module alone imports Triton, and is itself imported when a kernel computes)
import numpy as np
import torch
import triton
import triton.language as tl

_jit: Callable[[Callable[..., Any]], Any] = triton.jit


def segmented_scan(decay: torch.Tensor, x: torch.Tensor, offsets: np.ndarray, block: int, warps: int) -> torch.Tensor:
    """y[N] of `decay` [N], `x` [N] and the host's `offsets` [E+1]."""
    N = len(x)
    if N == 0:
        return torch.empty_like(x)
    x, decay = x.contiguous(), decay.contiguous()
    is_last = torch.zeros(N, dtype=torch.int8, device=x.device)
    is_last[torch.as_tensor(offsets[1:] - 1, device=x.device)] = 1
    blocks = triton.cdiv(N, block)
    y, product, carry = torch.empty_like(x), x.new_empty(blocks), x.new_zeros(blocks + 1)
    open_ = is_last.new_empty(blocks, dtype=torch.int32)
    with torch.cuda.device(x.get_device()):  # -1, on the host, chooses none
        _scan_blocks[blocks,](decay, x, is_last, y, product, carry, open_, N, BLOCK=block, num_warps=warps)
        if blocks > 1:
            _scan_carries[1,](product, carry, blocks, BLOCK=block, num_warps=warps)
            _add_carries[blocks,](decay, y, carry, open_, N, BLOCK=block, num_warps=warps)
    return y


@_jit
def _compose(a_before: tl.tensor, y_before: tl.tensor, a: tl.tensor, y: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The pair of a stretch of positions and the one that follows it."""
    return a * a_before, y + a * y_before


@_jit
def _scan_blocks(decay: tl.tensor, x: tl.tensor, is_last: tl.tensor, y: tl.tensor, product: tl.tensor,
                 carry: tl.tensor, open_: tl.tensor, N: tl.tensor, BLOCK: tl.constexpr) -> None:
    """y [N] as if nothing came into a block; per block its pair (product, carry of the next one), and how many of its
    positions are open: in front of its first end of an episode."""
    block = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    r = block * BLOCK + i
    t = N - 1 - r
    last = tl.load(is_last + t, mask=r < N, other=1)
    a = tl.load(decay + t, mask=r < N, other=0.0)
    a, b = tl.associative_scan((tl.where(last != 0, 0.0, a), tl.load(x + t, mask=r < N, other=0.0)), 0, _compose)
    tl.store(y + t, b, mask=r < N)
    to = block + 0 * i
    tl.store(product + to, a, mask=i == BLOCK - 1)
    tl.store(carry + 1 + to, b, mask=i == BLOCK - 1)
    tl.store(open_ + block, tl.min(tl.where(last != 0, i, BLOCK), 0))


@_jit
def _scan_carries(product: tl.tensor, carry: tl.tensor, blocks: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Carries [blocks + 1] of blocks alone -> what really comes into each, in place; by one program."""
    i = tl.arange(0, BLOCK)
    before = tl.load(carry)
    for first in range(0, blocks, BLOCK):
        at = first + i
        a = tl.load(product + at, mask=at < blocks, other=0.0)
        b = tl.load(carry + 1 + at, mask=at < blocks, other=0.0)
        a, b = tl.associative_scan((a, b), 0, _compose)
        b += a * before
        tl.store(carry + 1 + at, b, mask=at < blocks)
        before = tl.sum(tl.where(i == BLOCK - 1, b, 0.0), 0)


@_jit
def _add_carries(decay: tl.tensor, y: tl.tensor, carry: tl.tensor, open_: tl.tensor, N: tl.tensor,
                 BLOCK: tl.constexpr) -> None:
    """What comes into a block, times the decays up to each of its open positions, is added there."""
    block = tl.program_id(0)
    n = tl.load(open_ + block)
    if n > 0:
        i = tl.arange(0, BLOCK)
        t = N - 1 - (block * BLOCK + i)
        a = tl.cumprod(tl.load(decay + t, mask=i < n, other=1.0), 0)
        b = tl.load(y + t, mask=i < n, other=0.0)
        tl.store(y + t, b + a * tl.load(carry + block), mask=i < n)
