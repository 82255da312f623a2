"""Where the tokens of ragged sequences lie, and the rectangles that attention needs. Knows nothing about models.

Everything per token runs on flat [M, ...] tensors. Only attention wants [rows, columns, ...]: a `Block` gathers some of
the sequences into such a rectangle, padded on the right, and takes the real cells back out. Under a causal mask padding
on the right changes nothing: no real token sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from posttrain.data import offsets_of
from torch import Tensor


@final
@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """`rows` sequences as a rectangle of `columns` cells each, padded on the right with copies of their own tokens."""

    rows: int
    columns: int
    gather: Tensor
    """[rows * columns] the flat token in each cell; a padding cell repeats the last token of its row."""
    scatter: Tensor
    """[m] the cell of each of the block's tokens, in flat order."""

    def pad(self, x: Tensor) -> Tensor:
        """[M, ...] -> [rows, columns, ...]."""
        return x.index_select(0, self.gather).view(self.rows, self.columns, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """[rows, columns, ...] -> [m, ...], the block's tokens in flat order."""
        return x.flatten(0, 1).index_select(0, self.scatter)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """S ragged sequences of M tokens in one forward pass."""

    offsets: np.ndarray
    """[S+1] on the host: where each sequence begins, and the end."""
    starts: Tensor
    """[S+1] the same on the device."""
    rows: Tensor
    """[M] the sequence of each token."""
    positions: Tensor
    """[M] the position of each token in its sequence."""
    longest: int
    """Tokens of the longest sequence."""
    blocks: tuple[Block, ...]
    """Rectangles that together hold every token once; sequences of one block differ in length by at most twofold."""
    inverse: Tensor | None
    """[M] places of the tokens in the concatenated blocks; None where one block holds them in order."""

    @classmethod
    def from_offsets(cls, offsets: Sequence[int] | np.ndarray, device: torch.device | str = "cpu") -> Layout:
        """The layout of sequences that begin at `offsets` [S+1]."""
        offsets = np.asarray(offsets, dtype=np.int64)
        lengths = np.diff(offsets)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        positions = np.arange(offsets[-1]) - offsets[rows]
        groups = _similar_lengths(lengths)
        order = [np.flatnonzero(np.isin(rows, group)) for group in groups] if len(groups) > 1 else []
        inverse = torch.from_numpy(np.argsort(np.concatenate(order))).to(device) if order else None
        return cls(
            offsets=offsets, starts=torch.from_numpy(offsets).to(device), rows=torch.from_numpy(rows).to(device),
            positions=torch.from_numpy(positions).to(device), longest=int(lengths.max(initial=0)),
            blocks=tuple(_block(offsets, group, device) for group in groups), inverse=inverse)

    @classmethod
    def from_tokens(cls, sequence: np.ndarray, positions: np.ndarray, device: torch.device | str = "cpu") -> Layout:
        """The layout of tokens that name their sequence and position, both [M].

        Raises `ValueError` where sequences are not contiguous and in order, or positions do not count from 0.
        """
        sequence, positions = np.asarray(sequence), np.asarray(positions)
        offsets = offsets_of(np.bincount(sequence))
        if len(sequence) and (np.diff(sequence) < 0).any():
            raise ValueError("the tokens of a sequence must be contiguous, and sequences in order")
        if (positions != np.arange(len(sequence)) - offsets[sequence]).any():
            raise ValueError("positions must count 0, 1, 2, ... in every sequence")
        return cls.from_offsets(offsets, device)

    @property
    def last(self) -> Tensor:
        """[S] the last token of each sequence."""
        return self.starts[1:] - 1

    def rectangle(self) -> Block:
        """All sequences that hold a token as one block, [rows, longest]."""
        return _block(self.offsets, np.flatnonzero(np.diff(self.offsets)), self.rows.device)


def _similar_lengths(lengths: np.ndarray) -> list[np.ndarray]:
    """Groups of sequences, none shorter than half of its group's longest; empty sequences are in none.

    >>> _similar_lengths(np.array([9, 3, 5, 0, 4]))
    [array([0, 2]), array([1, 4])]
    """
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    groups = []
    while len(order):
        size = int(np.searchsorted(-lengths[order], -lengths[order[0]] / 2, side="right"))
        groups.append(np.sort(order[:size]))
        order = order[size:]
    return groups


def _block(offsets: np.ndarray, group: np.ndarray, device: torch.device | str) -> Block:
    starts, lengths = offsets[:-1][group], np.diff(offsets)[group]
    columns = int(lengths.max(initial=0))
    cell = np.arange(columns)[None, :]
    gather = starts[:, None] + np.minimum(cell, lengths[:, None] - 1)
    scatter = np.flatnonzero(cell < lengths[:, None])
    return Block(rows=len(group), columns=columns, gather=torch.from_numpy(gather.ravel()).to(device),
                 scatter=torch.from_numpy(scatter).to(device))
