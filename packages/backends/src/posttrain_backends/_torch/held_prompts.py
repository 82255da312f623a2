"""The prompts whose keys and values the rows of a rollout share: which are held, where, and by which rows.

Knows no model beyond the shape of its cache, and no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from posttrain_backends._torch.models.grouped import Groups, SharedPrompts
from posttrain_backends._torch.models.interface import KVCache


@final
class HeldPrompts:
    """Room for the prompts that rows continue at one time. A prompt stays while a row continues it, and longer where
    its place is not needed."""

    def __init__(self, cache: KVCache, rows: int, device: torch.device) -> None:
        self._cache, self._device = cache, device
        self._held: list[np.ndarray | None] = [None] * cache.rows
        self._lengths = np.zeros(cache.rows, np.int64)
        self._place = np.full(rows, -1)
        self._shared: SharedPrompts | None = None

    def start(self, rows: np.ndarray, tokens: np.ndarray, past: Sequence[Tensor]) -> None:
        """Let `rows` continue the prompt `tokens` [P], an array that is told from others by its identity, with the keys
        and then the values `past` of its layers, [P, kv_heads, D] each."""
        self._place[rows], self._shared = -1, None
        place = next((i for i, held in enumerate(self._held) if held is tokens), None)
        if place is None:
            place = min(set(range(len(self._held))) - set(self._place.tolist()))
            self._held[place], self._lengths[place] = tokens, len(tokens)
            for held, read in zip((*self._cache.keys, *self._cache.values), past, strict=True):
                held[place, :, :len(tokens)] = read.transpose(0, 1)
        self._place[rows] = place

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        """The rows `target` continue what the rows `source` do."""
        self._place[target], self._shared = self._place[source], None

    def of(self, rows: int) -> SharedPrompts:
        """The prompts of the first `rows` rows."""
        if self._shared is None or len(self._shared.lengths) != rows:
            self._shared = self._arranged(self._place[:rows])
        return self._shared

    def _arranged(self, place: np.ndarray) -> SharedPrompts:
        S = int(place.max()) + 1
        lengths = self._lengths[:S].copy()
        lengths[np.bincount(place) == 0] = 0  # no row continues these
        P = int(lengths.max())
        keys, values = ([x[:S, :, :P] for x in layers] for layers in (self._cache.keys, self._cache.values))
        held = torch.from_numpy(lengths).to(self._device)
        beyond = torch.arange(P, device=self._device) >= held.clamp(min=1)[:, None]  # a row of -inf alone gives NaN
        mask = keys[0].new_zeros(S, 1, P).masked_fill_(beyond[:, None], float("-inf"))
        return SharedPrompts(keys, values, mask.repeat_interleave(keys[0].shape[1], 0),
                             held[torch.from_numpy(place).to(self._device)], Groups.of(place, self._device))
