"""Which tokens of a batch a model has to compute: a prompt once for all its answers, and none behind the last one read.

A causal model gives equal hidden states to tokens with equal tokens before them. So the beginning that sequences have
in common is computed in the first of them, and the others attend to it there; its gradient adds up over all that read
it. Knows no model and no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from posttrain.data import offsets_of, ragged_indices

from posttrain_backends._torch.layout import Layout


@final
@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """The part of M given tokens that is computed."""

    kept: np.ndarray
    """[U] given tokens, increasing."""
    place: np.ndarray
    """[M] where among them each given token is, or the equal one that stands for it; -1 where none is."""
    layout: Layout
    """Of the U tokens."""


def computed(tokens: np.ndarray, offsets: np.ndarray, read: np.ndarray, device: torch.device | str = "cpu", *,
             shared: bool = True, routes: np.ndarray | None = None) -> Computed:
    """What gives the hidden states of the tokens `read` [n], of sequences that begin at `offsets` [S+1] of tokens [M].

    With `shared`, sequences with equal tokens, and equal `routes` [M, ...], up to their first one read compute those
    once.

    >>> c = computed(np.array([7, 8, 1, 2,  7, 8, 3]), np.array([0, 4, 7]), read=np.array([1, 2, 5, 6]))
    >>> c.kept, c.place
    (array([0, 1, 2, 6]), array([ 0,  1,  2, -1,  0,  1,  3]))
    """
    starts, S = offsets[:-1], len(offsets) - 1
    sequence = np.searchsorted(offsets, read, side="right") - 1
    length, prompt = np.zeros(S, np.int64), np.diff(offsets)
    np.maximum.at(length, sequence, read - starts[sequence] + 1)
    np.minimum.at(prompt, sequence, read - starts[sequence] + 1)
    prompt = np.minimum(prompt, length)
    source = _first_equal((tokens, *(() if routes is None else (routes,))), starts, prompt) if shared else np.arange(S)
    follows = np.flatnonzero(source != np.arange(S))
    own = np.zeros(S, np.int64)
    own[follows] = prompt[follows]
    kept = ragged_indices(starts + own, length - own)
    place = np.full(len(tokens), -1)
    place[kept] = np.arange(len(kept))
    place[ragged_indices(starts[follows], prompt[follows])] = place[
        ragged_indices(starts[source[follows]], prompt[follows])]
    return Computed(kept, place, Layout.from_offsets(
        offsets_of(length), device, place[ragged_indices(starts, length)] if len(follows) else None))


def _first_equal(columns: Sequence[np.ndarray], starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[S] the first sequence whose first `lengths` tokens have the same columns [M, ...]."""
    first: dict[tuple[bytes, ...], int] = {}
    return np.array([first.setdefault(tuple(column[a:a + n].tobytes() for column in columns), s)
                     for s, (a, n) in enumerate(zip(starts.tolist(), lengths.tolist()))], np.int64)
