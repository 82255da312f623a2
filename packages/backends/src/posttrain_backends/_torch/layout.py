"""Where the tokens of ragged sequences lie, and the rectangles that attention needs. Knows nothing about models.

Everything per token runs on flat [M, ...] tensors. Only attention wants [rows, columns, ...]: a `Block` gathers some of
the sequences into such a rectangle, padded on the right, and takes the real cells back out. Under a causal mask padding
on the right changes nothing: no real token sees it. A token that several sequences begin with stands once in the flat
tensors and in a cell of each of their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from posttrain_backends.ragged import padded, similar_lengths


@final
@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """`rows` sequences as a rectangle of `columns` cells each, padded on the right with copies of their own tokens."""

    rows: int
    columns: int
    gather: Tensor
    """[rows * columns] the flat token in each cell; a padding cell repeats the last token of its row."""
    scatter: Tensor
    """[m] the first cell of each token that no earlier block gives, in flat order."""

    def pad(self, x: Tensor) -> Tensor:
        """[M, ...] -> [rows, columns, ...]."""
        return x.index_select(0, self.gather).view(self.rows, self.columns, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """[rows, columns, ...] -> [m, ...], the block's tokens in flat order."""
        return x.flatten(0, 1).index_select(0, self.scatter)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """S ragged sequences over M tokens in one forward pass."""

    offsets: np.ndarray
    """[S+1] on the host: where each sequence begins in `cells`, and the end."""
    cells: np.ndarray
    """[C] on the host: the tokens of one sequence after the other; 0, 1, ..., M-1 where none is shared."""
    rows: Tensor
    """[M] the first sequence that holds each token."""
    positions: Tensor
    """[M] the position of each token in its sequence."""
    last: Tensor
    """[S] the last token of each sequence."""
    longest: int
    """Tokens of the longest sequence."""
    blocks: tuple[Block, ...]
    """Rectangles that together give every token once; sequences of one block differ in length by at most twofold."""
    inverse: Tensor | None
    """[M] places of the tokens in the concatenated blocks; None where one block holds them in order."""

    @classmethod
    def from_offsets(cls, offsets: Sequence[int] | np.ndarray, device: torch.device | str = "cpu",
                     cells: np.ndarray | None = None) -> Layout:
        """The layout of sequences that begin at `offsets` [S+1] of `cells` [C], by default one token after the other.

        Tokens are numbered in the order of their first cells, and a shared one has the same position everywhere.
        """
        offsets = np.asarray(offsets, dtype=np.int64)
        cells = np.arange(offsets[-1]) if cells is None else cells
        first, lengths = _first_cells(cells), np.diff(offsets)
        rows = np.repeat(np.arange(len(lengths)), lengths)[first]
        groups = similar_lengths(lengths)
        order = [np.flatnonzero(np.isin(rows, group)) for group in groups] if len(groups) > 1 else []
        inverse = torch.from_numpy(np.argsort(np.concatenate(order))).to(device) if order else None
        return cls(
            offsets=offsets, cells=cells, rows=torch.from_numpy(rows).to(device),
            positions=torch.from_numpy(first - offsets[rows]).to(device),
            last=torch.from_numpy(np.append(cells, -1)[offsets[1:] - 1]).to(device),
            longest=int(lengths.max(initial=0)),
            blocks=tuple(_block(offsets, cells, first, group, device) for group in groups), inverse=inverse)

    def own(self) -> np.ndarray:
        """[S] on the host: how many tokens no earlier sequence holds; they are the last ones of each."""
        sequence = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        return np.bincount(sequence[_first_cells(self.cells)], minlength=len(self.offsets) - 1)

    def rectangle(self) -> Block:
        """All sequences that hold a token as one block, [rows, longest]."""
        holding = np.flatnonzero(np.diff(self.offsets))
        return _block(self.offsets, self.cells, _first_cells(self.cells), holding, self.rows.device)


def _first_cells(cells: np.ndarray) -> np.ndarray:
    """[M] the first cell of each token: there the number of the token is larger than all before it."""
    largest_before = np.maximum.accumulate(np.append(-1, cells))[:-1]
    return np.flatnonzero(cells > largest_before)


def _block(offsets: np.ndarray, cells: np.ndarray, first: np.ndarray, group: np.ndarray,
           device: torch.device | str) -> Block:
    cell, real = padded(offsets[:-1][group], np.diff(offsets)[group])
    gives = real & (first[cells[cell]] == cell)
    return Block(rows=cell.shape[0], columns=cell.shape[1], gather=torch.from_numpy(cells[cell].ravel()).to(device),
                 scatter=torch.from_numpy(np.flatnonzero(gives)).to(device))
