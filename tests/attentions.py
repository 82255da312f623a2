"""Kernels that need CUDA, written out in torch as their interfaces say, so that what surrounds them runs anywhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor


def literal(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, scale: float | None = None) -> Tensor:
    """q [M, heads, D], k and v [C, heads, D], sees [M, C] -> [M, heads, D]."""
    scores = torch.einsum("mhd,chd->hmc", q, k) * (scale or 1 / math.sqrt(q.shape[-1]))
    return torch.einsum("hmc,chd->mhd", scores.masked_fill(~sees, -math.inf).softmax(-1), v)


def seen_from_the_end(queries: Sequence[int], keys: Sequence[int]) -> Tensor:
    """[M, C] bool of sequences whose last query sees their last key, the one before it all but the last, and so on."""
    sees, m, c = torch.zeros(sum(queries), sum(keys), dtype=torch.bool), 0, 0
    for n_q, n_k in zip(queries, keys, strict=True):
        for i in range(n_q):
            sees[m + i, c:c + n_k - n_q + i + 1] = True
        m, c = m + n_q, c + n_k
    return sees


def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
                           max_seqlen_q: int, max_seqlen_k: int, causal: bool) -> tuple[Tensor, None]:
    queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert causal and max_seqlen_q == max(queries) and max_seqlen_k == max(keys)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return literal(q, k, v, seen_from_the_end(queries, keys)), None


@dataclass
class Mask:
    """A mask of xFormers, by what it lets be seen."""

    sees: Tensor

    @classmethod
    def from_seqlens(cls, queries: Sequence[int], keys: Sequence[int] | None = None) -> Mask:
        return cls(seen_from_the_end(queries, keys or queries))


def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Mask, p: float = 0.0,
                               scale: float | None = None) -> Tensor:
    assert len(q) == len(k) == len(v) == 1 and q.shape[2:] == k.shape[2:] == v.shape[2:] and p == 0
    return literal(q[0], k[0], v[0], attn_bias.sees, scale)[None]


class HalfGradient(torch.autograd.Function):
    """The identity, and half of its gradient."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]  # as torch has them
        return x.clone()

    @staticmethod
    def backward(ctx, d):  # type: ignore[no-untyped-def]
        return d / 2


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all of them be found by their names."""
    biases = SimpleNamespace(BlockDiagonalCausalFromBottomRightMask=Mask, BlockDiagonalCausalMask=Mask)
    flash = {"flash_attn_varlen_func": flash_attn_varlen_func}
    ops = {"memory_efficient_attention": memory_efficient_attention, "fmha": SimpleNamespace(attn_bias=biases)}
    given: dict[str, dict[str, object]] = {
        "flash_attn": flash, "flash_attn.cute": flash, "flash_attn_interface": flash, "xformers": {},
        "xformers.ops": ops}
    for name, members in given.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("posttrain_backends.attention.installed", lambda name: True)
