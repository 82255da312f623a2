"""What the rows that are decoded together remember of their texts: keys and values, states, both, or all tokens.

A row begins with the past of a prompt that was read once, is extended token by token, and is given to another text when
its own has ended. Knows no sampling and no queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, final

import numpy as np
import torch
from posttrain.data import offsets_of
from torch import Tensor

from posttrain_backends._torch.held_prompts import HeldPrompts
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models.interface import (
    CachedLanguageModel,
    GroupedLanguageModel,
    HybridLanguageModel,
    LanguageModel,
    RecurrentLanguageModel,
    Routed,
)
from posttrain_backends._torch.models.mixture import Routes, recorded

SPARED = 128
"""Tokens of prompt, in the mean over answers, from which on it pays to hold prompts once."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """A prompt of P tokens that the model has read."""

    tokens: np.ndarray
    """[P] int64."""
    hidden: Tensor
    """[H] at the last token."""
    past: Past
    """What the model remembers of it."""
    routes: Tensor | None
    """[P, L, k] int16, the experts of its tokens where the model has some."""


Past = Sequence[Tensor]
"""Of one prompt: the keys of all layers and then their values, [P, kv_heads, D] each; of a recurrent model all windows
and then all states, without their axis of rows; of a hybrid model both; nothing where a model remembers nothing."""


class Rows(Protocol):
    """The pasts of the rows that are decoded together."""

    def read(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, list[Past], Tensor | None]:
        """[M] ragged tokens of prompts -> hidden [S, H] at the end of each prompt, its past, and the experts of each
        token, [M, L, k] int16, where the model has some."""
        ...

    def start(self, rows: np.ndarray, prefix: Prefix) -> None:
        """Let `rows` continue from `prefix`."""
        ...

    def extend(self, tokens: np.ndarray, positions: np.ndarray) -> Tensor:
        """Add a token [n] at `positions` [n] to each of the first n rows -> hidden [n, H], to be read before the next
        call."""
        ...

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        """Overwrite the rows `target` with the rows `source`."""
        ...

    def routes(self, row: int, length: int) -> np.ndarray | None:
        """[length, L, k] the experts of the row's first tokens, where the model has some; see `Rollouts.routes`."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Room:
    """What the rows of a rollout have to hold."""

    rows: int
    columns: int
    """Tokens of the longest prompt and answer."""
    new: int
    """Tokens of the longest answer."""
    prompts: int
    """Prompts that rows continue at one time; 0 where each row has a copy of its own."""

    @property
    def tokens(self) -> int:
        """Those that keys and values are kept of.

        >>> Room(rows=5, columns=510, new=10, prompts=1).tokens
        550
        """
        if not self.prompts:
            return self.rows * self.columns
        return self.rows * self.new + self.prompts * (self.columns - self.new)

    @classmethod
    def most(cls, prompts: Sequence[tuple[int, ...]], new: int, rows: int, tokens: int, *, shares: bool) -> Room:
        """Room for up to `rows` answers of up to `new` tokens to `prompts`, in no more than `tokens` cells where those
        are not 0. With `shares`, prompts may be held once for all answers.

        >>> Room.most([(5,) * 500] * 8, new=10, rows=100, tokens=550, shares=True)
        Room(rows=5, columns=510, new=10, prompts=1)
        """
        longest, distinct = max(map(len, prompts)), set(prompts)
        spared = sum(map(len, prompts)) - sum(map(len, distinct))
        held = len(distinct) if shares and spared >= SPARED * len(prompts) else 0
        if tokens:
            rows = min(rows, max(1, tokens // (longest + new), (tokens - held * longest) // new if held else 0))
        rows = min(rows, len(prompts))
        return cls(rows, longest + new, new, min(rows, held))


@final
class CachedRows:
    """Pasts as keys and values, and where the model has experts, those that each token went to.

    A prompt's are held once for all rows that continue it where there is room for prompts, else copied for each.
    """

    def __init__(self, model: CachedLanguageModel, room: Room) -> None:
        self._model, self._device = model, model.output_weight.device
        self._grouped = model if isinstance(model, GroupedLanguageModel) and room.prompts else None
        self._cache = model.new_cache(room.rows, room.new if self._grouped else room.columns)
        self._prompts = HeldPrompts(self._cache.room(room.prompts, room.columns - room.new), room.rows, self._device)
        self._routed = model if isinstance(model, Routed) and model.mixtures else None
        layers, k = (len(self._routed.mixtures), self._routed.experts_per_token) if self._routed else (0, 0)
        self._routes = torch.zeros(room.rows, room.columns, layers, k, dtype=torch.int16, device=self._device)

    def read(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, list[Past], Tensor | None]:
        told = Routes()
        hidden, keys, values = self._model.prefill(tokens, layout) if self._routed is None else \
            self._routed.prefill(tokens, layout, told)
        parts = [slice(int(a), int(b)) for a, b in pairwise(layout.offsets)]
        pasts: list[Past] = [[x[part] for x in (*keys, *values)] for part in parts]
        return hidden[layout.last], pasts, None if self._routed is None else told.joined()

    def start(self, rows: np.ndarray, prefix: Prefix) -> None:
        where = torch.from_numpy(rows).to(self._device)
        if self._grouped is not None:
            self._prompts.start(rows, prefix.tokens, prefix.past)
        else:
            copy_tokens((*self._cache.keys, *self._cache.values), where, prefix.past)
        if prefix.routes is not None:
            self._routes[where, :len(prefix.routes)] = prefix.routes

    def extend(self, tokens: np.ndarray, positions: np.ndarray) -> Tensor:
        newest, places = (torch.from_numpy(x).to(self._device) for x in (tokens, positions))
        n, told = len(tokens), Routes()
        rows = None if n == self._cache.rows else slice(0, n)
        if self._grouped is not None:
            hidden = self._grouped.decode_grouped(newest, places, self._cache, self._prompts.of(n), rows, told)
        elif self._routed is not None:
            hidden = self._routed.decode(newest, places, self._cache, rows, told)
        else:
            hidden = self._model.decode(newest, places, self._cache, rows)
        if self._routed is not None:
            self._routes[torch.arange(n, device=self._device), places] = told.joined()
        return hidden

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        s, t = (torch.from_numpy(x).to(self._device) for x in (source, target))
        move_rows((*self._cache.keys, *self._cache.values), s, t)
        self._prompts.move(source, target)
        self._routes[t] = self._routes[s]

    def routes(self, row: int, length: int) -> np.ndarray | None:
        if self._routed is None:
            return None
        told = self._routes[row, :length].clone()
        told[-1] = -1  # the last token was drawn, and not read
        return recorded(told, self._routed.experts)


@final
class RecurrentRows:
    """Pasts as states, of one size however long they are."""

    def __init__(self, model: RecurrentLanguageModel, room: Room) -> None:
        self._model, self._cache, self._rows = model, model.new_states(room.rows), room.rows
        self._device = model.output_weight.device

    def read(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, list[Past], None]:
        hidden, cache = self._model.read(tokens, layout)
        return hidden[layout.last], [[x[i] for x in cache.tensors] for i in range(len(layout.last))], None

    def start(self, rows: np.ndarray, prefix: Prefix) -> None:
        _copy_states(self._cache.tensors, torch.from_numpy(rows).to(self._device), prefix.past)

    def extend(self, tokens: np.ndarray, positions: np.ndarray) -> Tensor:
        rows = None if len(tokens) == self._rows else slice(0, len(tokens))
        return self._model.step(torch.from_numpy(tokens).to(self._device), self._cache, rows)

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        move_rows(self._cache.tensors, *(torch.from_numpy(x).to(self._device) for x in (source, target)))

    def routes(self, row: int, length: int) -> None:
        return None


@final
class HybridRows:
    """Pasts as keys and values of some layers and states of others."""

    def __init__(self, model: HybridLanguageModel, room: Room) -> None:
        self._model, self._cache, self._rows = model, model.new_pasts(room.rows, room.columns), room.rows
        self._device = model.output_weight.device
        self._tokens = (*self._cache.attention.keys, *self._cache.attention.values)
        self._states = self._cache.recurrent.tensors

    def read(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, list[Past], None]:
        hidden, keys, values, states = self._model.read_pasts(tokens, layout)
        parts = [slice(int(a), int(b)) for a, b in pairwise(layout.offsets)]
        return hidden[layout.last], [[*(x[part] for x in (*keys, *values)), *(x[i] for x in states.tensors)]
                                     for i, part in enumerate(parts)], None

    def start(self, rows: np.ndarray, prefix: Prefix) -> None:
        where = torch.from_numpy(rows).to(self._device)
        copy_tokens(self._tokens, where, prefix.past[:len(self._tokens)])
        _copy_states(self._states, where, prefix.past[len(self._tokens):])

    def extend(self, tokens: np.ndarray, positions: np.ndarray) -> Tensor:
        newest, places = (torch.from_numpy(x).to(self._device) for x in (tokens, positions))
        rows = None if len(tokens) == self._rows else slice(0, len(tokens))
        return self._model.step_at(newest, places, self._cache, rows)

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        move_rows((*self._tokens, *self._states), *(torch.from_numpy(x).to(self._device) for x in (source, target)))

    def routes(self, row: int, length: int) -> None:
        return None


def copy_tokens(cells: Sequence[Tensor], where: Tensor, past: Past) -> None:
    """Let the rows `where` of keys or values [B, kv_heads, T, D] begin with those of a prompt [P, kv_heads, D]."""
    for cached, read in zip(cells, past, strict=True):
        same = read.transpose(0, 1).to(cached.dtype).expand(len(where), -1, -1, -1)
        cached[:, :, :len(read)].index_copy_(0, where, same)


def _copy_states(cells: Sequence[Tensor], where: Tensor, past: Past) -> None:
    """Let the rows `where` of states [B, ...] be that of a prompt [...]."""
    for cached, read in zip(cells, past, strict=True):
        cached.index_copy_(0, where, read.to(cached.dtype).expand(len(where), *read.shape))


def move_rows(cells: Sequence[Tensor], source: Tensor, target: Tensor) -> None:
    for layer in cells:
        layer.index_copy_(0, target, layer.index_select(0, source))


@final
class RecomputedRows:
    """Pasts as tokens, for models without a cache: every step reads all of them anew."""

    def __init__(self, model: LanguageModel, room: Room) -> None:
        self._model, self._tokens = model, np.zeros((room.rows, room.columns), np.int64)
        self._device = model.output_weight.device

    def read(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, list[Past], None]:
        return self._model.hidden(tokens, layout)[layout.last], [()] * len(layout.last), None

    def start(self, rows: np.ndarray, prefix: Prefix) -> None:
        self._tokens[rows, :len(prefix.tokens)] = prefix.tokens

    def extend(self, tokens: np.ndarray, positions: np.ndarray) -> Tensor:
        n, lengths = len(tokens), positions + 1
        self._tokens[np.arange(n), positions] = tokens
        past = self._tokens[:n][np.arange(self._tokens.shape[1]) < lengths[:, None]]
        layout = Layout.from_offsets(offsets_of(lengths), self._device)
        return self._model.hidden(torch.from_numpy(past).to(self._device), layout)[layout.last]

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        self._tokens[target] = self._tokens[source]

    def routes(self, row: int, length: int) -> None:
        return None


def rows_for(model: LanguageModel, room: Room) -> Rows:
    """Rows with the past that the model has."""
    if isinstance(model, CachedLanguageModel):
        return CachedRows(model, room)
    if isinstance(model, HybridLanguageModel):
        return HybridRows(model, room)
    return RecurrentRows(model, room) if isinstance(model, RecurrentLanguageModel) else RecomputedRows(model, room)
