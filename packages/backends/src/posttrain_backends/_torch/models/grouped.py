"""One decoding step of rows that continue the same prompts: keys and values of a prompt are read once for all of them.

With few rows a step is bound by what it reads, and the prompt's keys and values are most of it where prompts are long:
a copy for each of G answers costs G times the memory and the time. Here the queries of the rows that continue a prompt
stand side by side against one copy; only what the rows wrote themselves is their own. Both parts share one softmax, so
the result is that of attention to prompt and answer. Same idea: Juravsky et al. 2024 (2402.05099). Knows tensors only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor


@final
@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Which of B rows continue which of S prompts: a rectangle [S, R] of rows, R those of the largest group."""

    prompts: int
    size: int
    rows: Tensor | None
    """[S * R] the row in each cell, row 0 where none is; None where B = S * R and rows are in order."""
    cells: Tensor | None
    """[B] the cell of each row."""

    @classmethod
    def of(cls, prompt: np.ndarray, device: torch.device | str = "cpu") -> Groups:
        """The groups of rows that continue the prompts `prompt` [B], at least one row.

        >>> Groups.of(np.array([1, 0, 1])).rows
        tensor([1, 0, 0, 2])
        """
        counts = np.bincount(prompt)
        S, R, order = len(counts), int(counts.max()), np.argsort(prompt, kind="stable")
        if len(prompt) == S * R and (order == np.arange(len(prompt))).all():
            return cls(S, R, None, None)
        rank = np.arange(len(prompt)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows, cells = np.zeros(S * R, np.int64), np.zeros(len(prompt), np.int64)
        cells[order] = prompt[order] * R + rank
        rows[cells] = np.arange(len(prompt))
        return cls(S, R, *(torch.from_numpy(x).to(device) for x in (rows, cells)))

    def gather(self, x: Tensor, heads: int) -> Tensor:
        """[B * heads, q, W] -> [S * heads, R * q, W]."""
        q, W = x.shape[1:]
        x = x.view(-1, heads, q, W)
        x = x if self.rows is None else x.index_select(0, self.rows)
        return x.reshape(-1, self.size, heads, q, W).transpose(1, 2).reshape(-1, self.size * q, W)

    def scatter(self, x: Tensor, heads: int) -> Tensor:
        """[S * heads, R * q, W] -> [B * heads, q, W]."""
        q, W = x.shape[1] // self.size, x.shape[2]
        x = x.view(self.prompts, heads, self.size, q, W).transpose(1, 2).reshape(-1, heads, q, W)
        x = x if self.cells is None else x.index_select(0, self.cells)
        return x.reshape(-1, q, W)


@final
@dataclass(frozen=True, slots=True, eq=False)
class SharedPrompts:
    """The prompts that the rows of one step continue; the rows' own cache holds what comes behind them."""

    keys: list[Tensor]
    """Per layer [S, kv_heads, P, D]."""
    values: list[Tensor]
    """Per layer [S, kv_heads, P, D]."""
    mask: Tensor
    """[S * kv_heads, 1, P], -inf behind the end of a prompt."""
    lengths: Tensor
    """[B] tokens of the prompt of each row."""
    groups: Groups


def attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, prompts: SharedPrompts, layer: int) -> Tensor:
    """q [B * kv_heads, heads per kv head, D] to the own keys and values [B * kv_heads, T, D], under a `mask` that is
    added to their scores, and to those of the prompts -> as q."""
    of_prompts = prompts.keys[layer], prompts.values[layer]
    kv, P, groups, scale = *of_prompts[0].shape[1:3], prompts.groups, q.shape[-1]**-0.5
    prompt_keys, prompt_values = (x.flatten(0, 1) for x in of_prompts)
    own = torch.baddbmm(mask, q, keys.transpose(1, 2), alpha=scale)
    shared = torch.baddbmm(prompts.mask, groups.gather(q, kv), prompt_keys.transpose(1, 2), alpha=scale)
    weights = torch.softmax(torch.cat([shared, groups.gather(own, kv)], dim=-1), dim=-1)
    return groups.scatter(torch.bmm(weights[..., :P], prompt_values), kv) + \
        torch.bmm(groups.scatter(weights[..., P:], kv), values)
