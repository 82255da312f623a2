"""The attention of a module of transformers by name: the library's names, what we add to its registries, its masks.

Kernels that the library would fetch from its hub where a package is missing are never asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX

from posttrain_backends.attention import FLASH

FLEX = "flex_attention"
"""What the library calls it."""
_NAMES: Mapping[str, str] = {"flex": FLEX}
_NOT_TAKEN = ("sliding_window", "softcap", "s_aux", "position_bias")
"""What a module may ask of its attention and xFormers has no kernel for."""


def read_with(name: str) -> str | None:
    """What `from_pretrained` is given: attention that any module of the library takes, else None for its own choice.
    Another one is given to the module by `switch`, after it is read."""
    return name if name in ("sdpa", "eager") else None


@contextmanager
def attending(causal: PreTrainedModel, name: str) -> Iterator[None]:
    """Inside, the module computes its attention so. Raises `ValueError` where it cannot."""
    before = causal.config._attn_implementation
    try:
        switch(causal, name)
        yield
    finally:
        causal.config._attn_implementation = before


def switch(causal: PreTrainedModel, name: str) -> None:
    """Give the module this attention. Raises `ValueError` where it cannot be given it."""
    implementation, kind = _NAMES.get(name, name), type(causal).__name__
    if name in FLASH:
        _require_no_hub_kernel(causal, name)
    if name == "xformers":
        AttentionInterface.register(name, xformers_forward)
        AttentionMaskInterface.register(name, xformers_mask)
    if name == "eager":  # every module has it, also those that do not let theirs be chosen
        causal.config._attn_implementation = name
        return
    causal.set_attn_implementation(implementation)
    if causal.config._attn_implementation != implementation:
        raise ValueError(f"the attention of a {kind} cannot be chosen")


def _require_no_hub_kernel(causal: PreTrainedModel, name: str) -> None:
    """Raise `ValueError` where the library would take a kernel of its hub in place of the installed package."""
    made_for = getattr(causal, "_compatible_flash_implementations", None)
    if made_for and name not in made_for:
        raise ValueError(f"a {type(causal).__name__} is made for {' or '.join(made_for)}")
    if not FLASH_ATTENTION_COMPATIBILITY_MATRIX[int(name[-1])]["general_availability_check"]():
        raise ValueError("transformers cannot use the installed package: it is too old, or there is no CUDA device")


# ---- xFormers, which the library does not know


def xformers_mask(batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
                  mask_function: Callable[..., Any] | None = None, attention_mask: Tensor | None = None,
                  device: torch.device | str = "cpu", **named: Any) -> Any:
    """Rows of sequences one after the other, which begin where a token does not see the one before it."""
    from xformers.ops import fmha  # type: ignore[import-not-found]  # no dependency

    if attention_mask is not None or q_length != kv_length or mask_function is None:
        raise ValueError("xformers is given whole rows here, and no mask")
    token, row = torch.arange(1, q_length, device=device), torch.arange(batch_size, device=device)[:, None]
    begins = torch.ones(batch_size, q_length, dtype=torch.bool, device=device)
    begins[:, 1:] = ~torch.as_tensor(mask_function(row, torch.zeros_like(row), token, token - 1))
    starts = begins.flatten().nonzero()[:, 0].tolist()
    lengths = [b - a for a, b in zip(starts, [*starts[1:], batch_size * q_length])]
    return fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(lengths)


def xformers_forward(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
                     scaling: float | None = None, dropout: float = 0.0, **named: Any) -> tuple[Tensor, None]:
    """query [rows, heads, columns, D], key and value [rows, kv_heads, columns, D] -> [rows, columns, heads, D]."""
    from xformers.ops import memory_efficient_attention

    asked = [what for what in _NOT_TAKEN if named.get(what) is not None]
    if asked or not getattr(module, "is_causal", True):
        raise ValueError(f"xformers computes no {' and no '.join(asked) or 'attention to later tokens'} here")
    rows, heads, columns, _ = query.shape
    spread = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (query, key, value))
    q, k, v = (x.to(value.dtype).transpose(1, 2).flatten(0, 1)[None] for x in spread)
    out: Tensor = memory_efficient_attention(q, k, v, attn_bias=attention_mask, p=dropout, scale=scaling)
    return out[0].view(rows, columns, heads, -1), None


# ---- a mask of our own


def additive_mask(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, 1, columns, columns] bool -> 0 where a token is seen, the lowest number elsewhere."""
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)


def block_mask(sees: Tensor) -> Any:
    """The same as flex takes it: blocks in which no token is seen are not computed."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(row: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return sees[row, 0, i, j]

    return create_block_mask(seen, len(sees), None, sees.shape[2], sees.shape[3], device=str(sees.device))
