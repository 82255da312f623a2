"""Sequences that share their beginning as one row with a mask in the form of a tree, for models that take such a mask.

A row holds a shared beginning once and every continuation behind it; a token sees its own sequence up to itself. It is
cheaper than a row per sequence where beginnings are long and continuations short, else dearer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from posttrain.data import ragged_indices
from torch import Tensor

from posttrain_backends._torch.layout import Block, Layout
from posttrain_backends.ragged import padded, similar_lengths

_MASK_CELLS = 2**24
"""Most cells of one mask: 64 MiB in float32."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Forest:
    """Rows of trees that together hold every token of a layout once."""

    blocks: tuple[Block, ...]
    """Rectangles of rows of similar length."""
    masks: tuple[Tensor, ...]
    """Per block [rows, 1, columns, columns] bool, true where the token of the third axis sees that of the fourth."""
    inverse: Tensor
    """[M] places of the tokens in the concatenated blocks."""


def forest(layout: Layout, hidden_size: int) -> Forest | None:
    """The trees of a layout, or None where a row per sequence costs less.

    Costs count operations: a token of a row of L tokens costs 1 + L / (6 H), the matrices and what it attends to. What
    a sequence shares belongs to one other sequence, its trunk, as `sharing.computed` has it.
    """
    lengths, owner = np.diff(layout.offsets), layout.rows.cpu().numpy()
    if len(layout.cells) == len(owner):
        return None
    trunk = np.arange(len(lengths))
    trunk[lengths > 0] = owner[layout.cells[layout.offsets[:-1][lengths > 0]]]
    tree = np.unique(trunk[owner], return_inverse=True)[1]
    sizes = np.bincount(tree)
    groups = similar_lengths(sizes)
    largest = max(len(group) * int(sizes[group].max()) ** 2 for group in groups)
    if _cost(sizes, hidden_size) >= _cost(lengths, hidden_size) or largest > _MASK_CELLS:
        return None
    members, begin = np.argsort(tree, kind="stable"), np.cumsum(sizes) - sizes  # the tokens of one tree after the other
    shared = lengths - np.bincount(owner, minlength=len(lengths))  # tokens a sequence has of its trunk
    device, positions = layout.positions.device, layout.positions.cpu().numpy()
    blocks, masks = [], []
    for group in groups:
        cell, real = padded(begin[group], sizes[group])
        gather = members[cell]
        own, at = owner[gather], positions[gather]
        same = own[:, :, None] == own[:, None, :]
        before = (own[:, None, :] == trunk[own][:, :, None]) & (at[:, None, :] < shared[own][:, :, None])
        sees = (same | before) & (at[:, None, :] <= at[:, :, None]) & real[:, None, :]
        blocks.append(Block(gather.shape[0], gather.shape[1], torch.from_numpy(gather.ravel()).to(device),
                            torch.from_numpy(np.flatnonzero(real)).to(device)))
        masks.append(torch.from_numpy(sees[:, None]).to(device))
    order = np.concatenate([members[ragged_indices(begin[group], sizes[group])] for group in groups])
    return Forest(tuple(blocks), tuple(masks), torch.from_numpy(np.argsort(order)).to(device))


def _cost(lengths: np.ndarray, hidden_size: int) -> float:
    return float(np.sum(lengths * (1 + lengths / (6 * hidden_size))))

