"""Ragged sequences on the host: where they begin, which are alike in length, and their rectangle. Imports no
framework."""

from __future__ import annotations

import numpy as np
from posttrain.data import offsets_of


def offsets_of_tokens(sequence: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[S+1] where the sequences begin of tokens that name their sequence and position, both [M].

    Raises `ValueError` where sequences are not contiguous and in order, or positions do not count from 0.

    >>> offsets_of_tokens(np.array([0, 0, 2]), np.array([0, 1, 0]))
    array([0, 2, 2, 3])
    """
    sequence, positions = np.asarray(sequence), np.asarray(positions)
    offsets = offsets_of(np.bincount(sequence))
    if len(sequence) and (np.diff(sequence) < 0).any():
        raise ValueError("the tokens of a sequence must be contiguous, and sequences in order")
    if (positions != np.arange(len(sequence)) - offsets[sequence]).any():
        raise ValueError("positions must count 0, 1, 2, ... in every sequence")
    return offsets


def similar_lengths(lengths: np.ndarray) -> list[np.ndarray]:
    """Groups of sequences, none shorter than half of its group's longest; empty sequences are in none.

    >>> similar_lengths(np.array([9, 3, 5, 0, 4]))
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


def padded(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs `starts[i] .. starts[i] + lengths[i]` as rows of a rectangle, the last of each repeated behind it, and where
    the runs themselves are.

    >>> padded(np.array([0, 3]), np.array([3, 2]))[0]
    array([[0, 1, 2],
           [3, 4, 4]])
    """
    column = np.arange(lengths.max(initial=0))[None, :]
    return starts[:, None] + np.minimum(column, lengths[:, None] - 1), column < lengths[:, None]
