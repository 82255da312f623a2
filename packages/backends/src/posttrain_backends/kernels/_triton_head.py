"""What rows of logits say, and their gradient over them: the two Triton kernels behind `TritonHead`, and their launch.
Imported when one computes.

`_read_rows` goes through a row once, with the sums of `_torch/logits.py` kept relative to the largest logit so far:
s = sum(exp(z - m)) and t = sum(exp(z - m) (z - m)), so that H = log s - t / s; where m grows by d, s and t become
exp(-d) s and exp(-d) (t - d s). `_write_gradient` looks at each logit alone. Neither adds in an order that depends on
the card's, and no number is added to by two programs: the same numbers in every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# ruff: noqa: TID253  (this module and `_triton` alone import Triton, and are themselves imported when a kernel computes)
import torch
import triton
import triton.language as tl

from posttrain_backends._torch.logits import Reading, Slopes

_jit: Callable[[Callable[..., Any]], Any] = triton.jit


def read(logits: torch.Tensor, chosen: torch.Tensor, temperature: float, entropy: bool, block: int,
         warps: int) -> Reading:
    """Of logits [n, V] and chosen [n]; a logit of -inf is a probability of 0."""
    n, V = logits.shape
    exact = torch.promote_types(logits.dtype, torch.float32)
    logprobs, lse = (torch.empty(n, dtype=exact, device=logits.device) for _ in range(2))
    entropies = torch.empty_like(lse) if entropy else None
    if n:
        with torch.cuda.device(logits.get_device()):  # -1, on the host, chooses none
            _read_rows[n,](logits, chosen, _inverse(temperature, lse), logprobs, lse, lse if entropies is None
                           else entropies, logits.stride(0), V, ENTROPY=entropy, BLOCK=block, num_warps=warps)
    return Reading(logprobs, lse, entropies)


def write_gradient(logits: torch.Tensor, chosen: torch.Tensor, reading: Reading, by: Slopes, temperature: float,
                   kept: torch.Tensor | None, block: int, warps: int) -> torch.Tensor:
    """The gradient of logits [n, V], or of the rows `kept` [m], over the first of them; see `logits.write_gradient`."""
    m, V = len(logits) if kept is None else len(kept), logits.shape[1]
    lse, inverse = reading.lse, _inverse(temperature, reading.lse)
    by_logprobs = torch.zeros_like(lse) if by.logprobs is None else (by.logprobs * inverse).to(lse.dtype)
    with_entropy = by.entropy is not None and reading.entropy is not None
    entropies = reading.entropy if with_entropy else lse
    by_entropy = (by.entropy * inverse).to(lse.dtype) if by.entropy is not None and with_entropy else lse
    if m:
        tiles = triton.cdiv(V, block)
        with torch.cuda.device(logits.get_device()):
            _write_gradient[m * tiles,](
                logits, chosen, inverse, lse, entropies, by_logprobs, by_entropy, chosen if kept is None else kept,
                logits.stride(0), V, tiles, ENTROPY=with_entropy, MOVED=kept is not None, BLOCK=block, num_warps=warps)
    return logits[:m]


def _inverse(temperature: float, like: torch.Tensor) -> torch.Tensor:
    """[1] 1 / temperature in memory: Triton would take a number as float32."""
    return like.new_full((1,), 1.0 / temperature)


@_jit
def _read_rows(logits: tl.tensor, chosen: tl.tensor, inverse: tl.tensor, logprobs: tl.tensor, lse: tl.tensor,
               entropies: tl.tensor, stride: tl.tensor, V: tl.tensor, ENTROPY: tl.constexpr,
               BLOCK: tl.constexpr) -> None:
    """One row by each program: logits [n, V], chosen [n] -> logprobs, lse and, where asked, entropies [n]."""
    row = tl.program_id(0)
    z_row = logits + row.to(tl.int64) * stride
    scale = tl.load(inverse)
    i = tl.arange(0, BLOCK)
    s = scale * 0.0
    t = s
    top = s - float("inf")
    m = s
    for first in range(0, V, BLOCK):
        z = tl.load(z_row + first + i, mask=first + i < V, other=float("-inf")).to(scale.dtype) * scale
        top = tl.maximum(top, tl.max(z, 0))
        grown = tl.where(top == float("-inf"), 0.0, top)
        fall = tl.where(s > 0.0, m - grown, 0.0)
        below = z - grown
        q = tl.exp(below)
        if ENTROPY:
            t = tl.exp(fall) * (t + fall * s) + tl.sum(q * tl.where(q == 0.0, 0.0, below), 0)
        s = tl.exp(fall) * s + tl.sum(q, 0)
        m = grown
    # both are at most 0 as they stand, but for approximate logarithms and fused products; NaN stays NaN
    log_s = tl.log(s)
    log_s = tl.where(log_s < 0.0, 0.0, log_s)
    c = tl.load(chosen + row)
    z_c = tl.load(z_row + c, mask=(c >= 0) & (c < V), other=float("nan")).to(scale.dtype) * scale
    below_c = z_c - top
    tl.store(logprobs + row, tl.where(below_c > 0.0, 0.0, below_c) - log_s)
    tl.store(lse + row, top + log_s)
    if ENTROPY:
        tl.store(entropies + row, log_s - t / s)


@_jit
def _write_gradient(logits: tl.tensor, chosen: tl.tensor, inverse: tl.tensor, lse: tl.tensor, entropies: tl.tensor,
                    by_logprobs: tl.tensor, by_entropy: tl.tensor, kept: tl.tensor, stride: tl.tensor, V: tl.tensor,
                    tiles: tl.tensor, ENTROPY: tl.constexpr, MOVED: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """One tile of one row by each program. With MOVED the row kept[r] becomes row r; see `logits.write_gradient` for
    why no program writes what another one reads."""
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    source = tl.load(kept + row) if MOVED else row
    i = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(inverse)
    z = tl.load(logits + source * stride + i, mask=i < V, other=float("-inf")).to(scale.dtype) * scale
    log_p = z - tl.load(lse + source)
    slope = tl.load(by_logprobs + source)
    p = tl.exp(log_p)
    factor = -slope
    if ENTROPY:
        log_p = tl.where(p == 0.0, 0.0, log_p)
        factor = factor - tl.load(by_entropy + source) * (log_p + tl.load(entropies + source))
    gradient = p * factor + tl.where(i == tl.load(chosen + source), slope, 0.0)
    tl.store(logits + row * stride + i, gradient.to(logits.dtype.element_ty), mask=i < V)
