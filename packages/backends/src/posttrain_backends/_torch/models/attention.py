"""Causal attention of the native models by name, over ragged tokens of which sequences may share their beginnings.

Each takes a layout, prepares what all layers have in common (a mask, boundaries), and gives the function that they
call. `eager` is the literal one that the others are held against. Knows no model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from posttrain.data import offsets_of
from torch import Tensor

from posttrain_backends._torch.layout import Layout
from posttrain_backends.attention import differs, raised

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [M, heads, D], k and v [M, kv_heads, D] -> [M, heads, D]"""

# ---- in rectangles, padded on the right


def eager(layout: Layout) -> Attend:
    """softmax(q k^T / sqrt(D) + mask) v, with all of the scores in memory."""
    return partial(_in_blocks, layout, _literal)


def sdpa(layout: Layout) -> Attend:
    """torch's scaled dot-product attention, whose kernels keep no scores."""
    return partial(_in_blocks, layout, _fused)


def _in_blocks(layout: Layout, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` takes q [rows, heads, columns, D] and k, v [rows, kv_heads, columns, D]."""
    parts = []
    for block in layout.blocks:
        attended = attend(*(block.pad(x).transpose(1, 2) for x in (q, k, v)))
        parts.append(block.unpad(attended.transpose(1, 2)))
    return parts[0] if layout.inverse is None else torch.cat(parts).index_select(0, layout.inverse)


def _literal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1]**-0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return torch.softmax(scores.masked_fill(later, float("-inf")), dim=-1) @ v


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


# ---- in one row, without padding


@final
@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Sequences one after the other: the queries of each are its last tokens, the keys and values all of them."""

    queries: list[int]
    """How many each has, above 0: sequences whose tokens all stand in others have none, and are left out."""
    keys: list[int]
    cells: Tensor | None
    """[C] the token that each key and value is of; None where it is 0, 1, ..., M-1."""

    @classmethod
    def of(cls, layout: Layout) -> Runs:
        own, lengths = layout.own(), np.diff(layout.offsets)
        asked = own > 0
        cells = layout.cells[np.repeat(asked, lengths)]
        plain = len(cells) == own.sum()
        return cls(own[asked].tolist(), lengths[asked].tolist(),
                   None if plain else torch.from_numpy(cells).to(layout.rows.device))

    def spread(self, x: Tensor) -> Tensor:
        """[M, ...] -> [C, ...]."""
        return x if self.cells is None else x.index_select(0, self.cells)


def flex(layout: Layout) -> Attend:
    """torch's flex attention (Dong et al. 2024, 2412.05496), one kernel for a mask written as a function: a token sees
    its own sequence, and of the one that holds its sequence's beginning that beginning."""
    from torch.nn.attention.flex_attention import create_block_mask

    device, place = layout.rows.device, layout.positions
    sequence, trunk, shared = (torch.from_numpy(x).to(device) for x in _beginnings(layout))

    def sees(row: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        before = (sequence[j] == trunk[i]) & (place[j] < shared[i])
        return ((sequence[j] == sequence[i]) | before) & (place[j] <= place[i])

    mask = create_block_mask(sees, None, None, len(place), len(place), device=str(device))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x.transpose(0, 1)[None] for x in (q, k, v))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")  # on a CPU
            attended: Tensor = _flex_function(device.type)(
                *rows, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return attended[0].transpose(0, 1)
    return attend


def _beginnings(layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each token [M] the sequence that holds it first, the one that holds that one's first token, and how many
    tokens the two share."""
    own, lengths = layout.own(), np.diff(layout.offsets)
    sequence, trunk = np.repeat(np.arange(len(own)), own), np.arange(len(own))
    trunk[lengths > 0] = sequence[layout.cells[layout.offsets[:-1][lengths > 0]]]
    return sequence, trunk[sequence], (lengths - own)[sequence]


@cache
def _flex_function(device: str) -> Callable[..., Any]:
    """Compiled on CUDA, once for all shapes; on a CPU, where it only scores, compiling costs more than it saves."""
    from torch.nn.attention.flex_attention import flex_attention

    if device == "cuda":
        return torch.compile(flex_attention)
    return flex_attention


FLASH_MODULES: Mapping[str, str] = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface",
                                    "flash_attention_4": "flash_attn.cute"}
"""Version -> the module that has its `flash_attn_varlen_func`."""


def flash(version: str, layout: Layout) -> Attend:
    """FlashAttention (Dao 2023, 2307.08691) over runs; its causal mask ends at the last query and the last key."""
    function, runs, device = import_module(FLASH_MODULES[version]).flash_attn_varlen_func, Runs.of(layout), \
        layout.rows.device
    ends_q, ends_k = (torch.from_numpy(offsets_of(np.array(n))).to(device, torch.int32)
                      for n in (runs.queries, runs.keys))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended = function(q, runs.spread(k), runs.spread(v), cu_seqlens_q=ends_q, cu_seqlens_k=ends_k,
                            max_seqlen_q=max(runs.queries), max_seqlen_k=max(runs.keys), causal=True)
        out: Tensor = attended[0] if isinstance(attended, tuple) else attended  # versions 3 and 4 may add the lse
        return out
    return attend


def xformers(layout: Layout) -> Attend:
    """xFormers' memory-efficient attention over runs."""
    from xformers.ops import fmha, memory_efficient_attention  # type: ignore[import-not-found]  # no dependency

    runs = Runs.of(layout)
    mask = fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(runs.queries, runs.keys)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shared_by = q.shape[1] // k.shape[1]  # its own grouped form has no backward pass
        k, v = (runs.spread(x).repeat_interleave(shared_by, dim=1) for x in (k, v))
        attended: Tensor = memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)
        return attended[0]
    return attend


ATTENTION: Mapping[str, Callable[[Layout], Attend]] = {
    "eager": eager, "sdpa": sdpa, "flex": flex, **{version: partial(flash, version) for version in FLASH_MODULES},
    "xformers": xformers}
"""Of a layout with tokens; each of them sees those of its sequence up to itself."""


# ---- what is proved before one is used

BOUND: Mapping[torch.dtype, float] = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Of the largest difference to eager, relative to the largest value: what is not exact is far above it."""


def fault_of(name: str, *, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str,
             trained: bool) -> str:
    """What is wrong with an attention on heads of these sizes, of this type and on this device, with sequences of
    several lengths and a shared beginning; where `trained`, in its gradients, too. Empty where nothing is."""
    if name == "eager":
        return ""
    layout = Layout.from_offsets([0, 9, 16, 19], device, np.array([*range(9), 0, 1, 2, 3, *range(9, 15)]))
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(15, n, head_dim, generator=generator).to(device, dtype)
             for n in (heads, kv_heads, kv_heads, heads)]
    try:
        found = _values(ATTENTION[name], layout, given, trained)
    except Exception as error:  # whatever a kernel that is not ours raises, of whatever library
        return raised(error)
    exact = dtype if dtype == torch.float64 else torch.float32
    expected = _values(eager, layout, [x.to(exact) for x in given], trained)
    faults = (differs(relative(found[what], expected[what]), what, BOUND[dtype]) for what in expected)
    return next(filter(None, faults), "")


def _values(attention: Callable[[Layout], Attend], layout: Layout, given: list[Tensor],
            trained: bool) -> dict[str, Tensor]:
    """What the attention gives of q, k, v, and where `trained` its gradients by what stands behind them in `given`."""
    *qkv, weight = given
    qkv = [x.detach().requires_grad_(trained) for x in qkv]
    with torch.set_grad_enabled(trained):
        out = attention(layout)(*qkv)
    gradients = torch.autograd.grad(out, qkv, weight) if trained else ()
    return {"values": out.detach(), **dict(zip(("gradients of queries", "gradients of keys", "gradients of values"),
                                               gradients))}


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value; infinite where something is no number."""
    error = float((found.to(expected.dtype) - expected).abs().max() / expected.abs().max())
    return error if error == error else float("inf")
