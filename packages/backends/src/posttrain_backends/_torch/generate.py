"""The decoding loop of the engine `batched`: rows that are decoded together, and how a free row gets its next episode.

The first `active` rows always hold an unfinished episode: a row that ends is given to the next episode in the queue,
and where none waits, the last row moves into its place. So no row of a forward pass is idle. All bookkeeping is NumPy
on the host; the device sees tokens, positions and uniforms of a step and gives back tokens and log-probs. Knows no
text: prompts come as ids (`engines.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Protocol, final

import numpy as np
import torch
import torch.nn.functional as F
from posttrain.data import Array, Metric, Metrics, Prompt, Rollouts, Sampling, offsets_of
from posttrain.errors import ConfigError, MemoryExhausted
from posttrain.protocols import Tokenizer
from torch import Tensor

from posttrain_backends._torch.held_prompts import HeldPrompts
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.learner import TorchLearner
from posttrain_backends._torch.memory import translating_memory_errors
from posttrain_backends._torch.models.files import copy_named
from posttrain_backends._torch.models.interface import (
    CachedLanguageModel,
    GroupedLanguageModel,
    HybridLanguageModel,
    LanguageModel,
    RecurrentLanguageModel,
    Refusing,
    Routed,
)
from posttrain_backends._torch.models.mixture import Routes, recorded
from posttrain_backends._torch.quantised_copy import QuantisedCopy
from posttrain_backends._torch.sampling import sample
from posttrain_backends.engines import (
    BUDGET,
    EOS,
    STOP,
    Answer,
    Batched,
    StopStrings,
    assemble,
    encode,
    uniforms,
)

SPARED = 128
"""Tokens of prompt, in the mean over answers, from which on it pays to hold prompts once."""


@final
@dataclass(frozen=True, slots=True)
class Usage:
    """The work of one rollout."""

    slots: int
    """Rows decoded at once."""
    prompts: int
    """Distinct prompts, each computed once."""
    prompt_tokens: int
    """Their tokens."""
    steps: int
    """Decoding passes."""
    decoded: int
    """Tokens fed to them: rows summed over steps. An answer of n tokens needs n - 1."""


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
        """[M] ragged tokens of prompts -> hidden [M, H], the past of each prompt, and the experts of each token,
        [M, L, k] int16, where the model has some."""
        ...

    def start(self, rows: np.ndarray, prefix: Prefix) -> None:
        """Let `rows` continue from `prefix`."""
        ...

    def extend(self, tokens: np.ndarray, positions: np.ndarray) -> Tensor:
        """Add a token [n] at `positions` [n] to each of the first n rows -> hidden [n, H]."""
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
        return hidden, pasts, None if self._routed is None else told.joined()

    def start(self, rows: np.ndarray, prefix: Prefix) -> None:
        where = torch.from_numpy(rows).to(self._device)
        if self._grouped is not None:
            self._prompts.start(rows, prefix.tokens, prefix.past)
        else:
            _copy_tokens((*self._cache.keys, *self._cache.values), where, prefix.past)
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
        _move((*self._cache.keys, *self._cache.values), s, t)
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
        return hidden, [[x[i] for x in cache.tensors] for i in range(len(layout.last))], None

    def start(self, rows: np.ndarray, prefix: Prefix) -> None:
        _copy_states(self._cache.tensors, torch.from_numpy(rows).to(self._device), prefix.past)

    def extend(self, tokens: np.ndarray, positions: np.ndarray) -> Tensor:
        rows = None if len(tokens) == self._rows else slice(0, len(tokens))
        return self._model.step(torch.from_numpy(tokens).to(self._device), self._cache, rows)

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        _move(self._cache.tensors, *(torch.from_numpy(x).to(self._device) for x in (source, target)))

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

    @property
    def prompts_at_once(self) -> int:
        return self._rows  # as for states alone

    def read(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, list[Past], None]:
        hidden, keys, values, states = self._model.read_pasts(tokens, layout)
        parts = [slice(int(a), int(b)) for a, b in pairwise(layout.offsets)]
        return hidden, [[*(x[part] for x in (*keys, *values)), *(x[i] for x in states.tensors)]
                        for i, part in enumerate(parts)], None

    def start(self, rows: np.ndarray, prefix: Prefix) -> None:
        where = torch.from_numpy(rows).to(self._device)
        _copy_tokens(self._tokens, where, prefix.past[:len(self._tokens)])
        _copy_states(self._states, where, prefix.past[len(self._tokens):])

    def extend(self, tokens: np.ndarray, positions: np.ndarray) -> Tensor:
        newest, places = (torch.from_numpy(x).to(self._device) for x in (tokens, positions))
        rows = None if len(tokens) == self._rows else slice(0, len(tokens))
        return self._model.step_at(newest, places, self._cache, rows)

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        _move((*self._tokens, *self._states), *(torch.from_numpy(x).to(self._device) for x in (source, target)))

    def routes(self, row: int, length: int) -> None:
        return None


def _copy_tokens(cells: Sequence[Tensor], where: Tensor, past: Past) -> None:
    """Let the rows `where` of keys or values [B, kv_heads, T, D] begin with those of a prompt [P, kv_heads, D]."""
    for cached, read in zip(cells, past, strict=True):
        same = read.transpose(0, 1).to(cached.dtype).expand(len(where), -1, -1, -1)
        cached[:, :, :len(read)].index_copy_(0, where, same)


def _copy_states(cells: Sequence[Tensor], where: Tensor, past: Past) -> None:
    """Let the rows `where` of states [B, ...] be that of a prompt [...]."""
    for cached, read in zip(cells, past, strict=True):
        cached.index_copy_(0, where, read.to(cached.dtype).expand(len(where), *read.shape))


def _move(cells: Sequence[Tensor], source: Tensor, target: Tensor) -> None:
    for layer in cells:
        layer.index_copy_(0, target, layer.index_select(0, source))


@final
class RecomputedRows:
    """Pasts as tokens, for models without a cache: every step reads all of them anew."""

    def __init__(self, model: LanguageModel, room: Room) -> None:
        self._model, self._tokens = model, np.zeros((room.rows, room.columns), np.int64)
        self._device = model.output_weight.device

    def read(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, list[Past], None]:
        return self._model.hidden(tokens, layout), [()] * len(layout.last), None

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


@final
class Prefixes:
    """Distinct prompts in the order of their use: each read once, together with those that follow it up to a budget of
    tokens and `most` of them, as their pasts wait beside the rows, and forgotten when its last answer has begun."""

    def __init__(self, prompts: Sequence[tuple[int, ...]], uses: np.ndarray, budget: int, most: int, rows: Rows,
                 device: torch.device) -> None:
        self._prompts = [np.array(ids, np.int64) for ids in prompts]
        self._offsets = offsets_of(np.array([len(ids) for ids in prompts]))
        self._uses, self._budget, self._most, self._rows, self._device = uses.copy(), budget, most, rows, device
        self._read: dict[int, Prefix] = {}
        self.count = 0
        """Prompts read so far."""
        self.tokens = 0
        """Their tokens."""

    def take(self, prompt: int, uses: int) -> Prefix:
        """The prompt for `uses` more answers."""
        while prompt >= self.count:
            self._read_next()
        self._uses[prompt] -= uses
        return self._read[prompt] if self._uses[prompt] else self._read.pop(prompt)

    def _read_next(self) -> None:
        first = self.count
        fitting = int(np.searchsorted(self._offsets, self._offsets[first] + self._budget, side="right")) - 1
        last = max(first + 1, min(fitting, first + self._most))
        offsets = self._offsets[first:last + 1] - self._offsets[first]
        layout = Layout.from_offsets(offsets, self._device)
        flat = torch.from_numpy(np.concatenate(self._prompts[first:last])).to(self._device)
        hidden, pasts, routes = self._rows.read(flat, layout)
        for i, (end, past) in enumerate(zip(hidden[layout.last], pasts, strict=True)):
            part = slice(int(offsets[i]), int(offsets[i + 1]))
            self._read[first + i] = Prefix(
                self._prompts[first + i], end, past, None if routes is None else routes[part])
        self.count, self.tokens = last, self.tokens + len(flat)


@final
class Decoding:
    """Draws the answers to a queue of prompts, `size` at a time; see the module."""

    def __init__(self, prompt_of: np.ndarray, prefixes: Prefixes, rows: Rows, head: Callable[[Tensor], Tensor],
                 size: int, sampling: Sampling, seed: Sequence[int], eos: int, stops: StopStrings) -> None:
        self._prompt_of, self._prefixes, self._rows, self._head = prompt_of, prefixes, rows, head
        self._sampling, self._seed, self._eos, self._stops = sampling, seed, eos, stops
        self._next = 0
        self._answers: dict[int, Answer] = {}
        self._active = size
        self._episode, self._length, self._count = (np.zeros(size, np.int64) for _ in range(3))
        self._tokens = np.zeros((size, sampling.max_new_tokens), np.int64)
        self._logprobs = np.zeros((size, sampling.max_new_tokens), np.float32)
        self._uniforms = np.zeros((size, sampling.max_new_tokens))
        self.steps = self.decoded = 0

    def run(self) -> list[Answer]:
        """The answers, in the order of the queue."""
        self._refill(np.arange(self._active))
        while self._active:
            rows = np.arange(self._active)
            last = self._count[:self._active] - 1
            hidden = self._rows.extend(self._tokens[rows, last], self._length[:self._active] + last)
            self.steps, self.decoded = self.steps + 1, self.decoded + self._active
            ended = self._draw(rows, hidden)
            if len(ended):
                self._refill(ended)
        return [self._answers[e] for e in range(len(self._prompt_of))]

    def _refill(self, free: np.ndarray) -> None:
        """Begin waiting episodes in the free rows. One may end with its first token, and so free its row again."""
        while len(free) and self._next < len(self._prompt_of):
            n = min(len(free), len(self._prompt_of) - self._next)
            ended = self._draw(free[:n], self._begin(free[:n]))
            free = np.concatenate([ended, free[n:]])
        if len(free):
            self._close(free)

    def _begin(self, rows: np.ndarray) -> Tensor:
        """Put the next episodes of the queue into `rows` -> hidden [n, H] that predicts their first tokens."""
        episodes = np.arange(self._next, self._next + len(rows))
        self._next += len(rows)
        self._episode[rows], self._count[rows] = episodes, 0
        self._uniforms[rows] = [uniforms(self._seed, int(e), self._uniforms.shape[1]) for e in episodes]
        hidden: list[Tensor] = [torch.empty(0)] * len(rows)
        for prompt in np.unique(self._prompt_of[episodes]):
            same = np.flatnonzero(self._prompt_of[episodes] == prompt)
            prefix = self._prefixes.take(int(prompt), len(same))
            self._rows.start(rows[same], prefix)
            self._length[rows[same]] = len(prefix.tokens)
            for i in same:
                hidden[i] = prefix.hidden
        return torch.stack(hidden)

    def _draw(self, rows: np.ndarray, hidden: Tensor) -> np.ndarray:
        """Draw the next token of each row from hidden [n, H] -> the rows that ended with it."""
        count = self._count[rows]
        u = torch.from_numpy(self._uniforms[rows, count]).to(hidden.device)
        tokens, logprobs = (x.cpu().numpy() for x in sample(self._head(hidden), self._sampling, u))
        self._tokens[rows, count], self._logprobs[rows, count] = tokens, logprobs
        self._count[rows] = count + 1
        finish = np.where(tokens == self._eos, EOS, np.where(count + 1 == self._sampling.max_new_tokens, BUDGET, -1))
        if self._stops.strings:
            for i in np.flatnonzero(tokens != self._eos):
                if self._stops.reached(self._tokens[rows[i], :count[i] + 1]):
                    finish[i] = STOP
        ended = np.flatnonzero(finish >= 0)
        for i in ended:
            answer = (rows[i], slice(0, int(count[i]) + 1))
            self._answers[int(self._episode[rows[i]])] = Answer(
                self._tokens[answer].astype(np.int32), self._logprobs[answer].copy(), int(finish[i]),
                self._rows.routes(int(rows[i]), int(self._length[rows[i]] + count[i]) + 1))
        return rows[ended]

    def _close(self, free: np.ndarray) -> None:
        """Rows for which no episode waits leave: the last rows in use move into their places."""
        kept = np.setdiff1d(np.arange(self._active), free)
        source, target = kept[kept >= len(kept)], free[free < len(kept)]
        self._active = len(kept)
        if len(source):
            self._rows.move(source, target)
            for column in (self._episode, self._length, self._count, self._tokens, self._logprobs, self._uniforms):
                column[target] = column[source]


@final
class TorchSampler:
    """A started engine on a torch model; a `Sampler`. Not shared, it keeps a copy of the model until `sync`."""

    def __init__(self, learner: TorchLearner, tokenizer: Tokenizer, engine: Batched, *, shared: bool) -> None:
        if isinstance(learner.model, Refusing) and learner.model.refusal:
            raise ConfigError(
                [f"engine 'batched' does not draw from this policy: {learner.model.refusal}"],
                next_step="Set policy.cache: never, which reads an answer anew for each of its tokens: slow, and what "
                          "is trained is what was drawn.")
        self._shared, self._tokenizer, self._engine = shared, tokenizer, engine
        self._quantised = None if shared or engine.quantize is None else QuantisedCopy(learner.model, engine.quantize)
        self._model = learner.model if shared else self._quantised.model if self._quantised else deepcopy(learner.model)
        self._version = learner.version
        self._most_rows = engine.slots or sys.maxsize
        self.usage = Usage(0, 0, 0, 0, 0)
        """The work of the last rollout."""

    def sync(self, params: Iterable[tuple[str, Array]], version: int) -> None:
        """Take the weights `params` (a shared model has them already) and number them `version`."""
        if self._quantised is not None:
            self._quantised.load(params)
        elif not self._shared:
            given = ((name, torch.as_tensor(x)) for name, x in params)
            copy_named(given, self._model.state_dict(), "the weights given to the sampler")
        self._version = version

    def rollout(self, prompts: Sequence[Prompt], sampling: Sampling, seed: Sequence[int]) -> Rollouts:
        """One episode per prompt, in order. Raises `DataError` for prompts that do not fit, `Diverged` where the model
        gives no numbers, and `MemoryExhausted` where even one row does not fit."""
        stops = StopStrings(sampling.stop, self._tokenizer.decode)
        encoded = self._encoded(prompts, sampling)
        answers = self._answers(encoded, sampling, seed, stops) if encoded else []
        return assemble(prompts, encoded, answers, sampling, stops, self._version)

    def metrics(self) -> Metrics:
        """`busy`, the share of slots x decoding passes that decoded a token; none where no pass was needed."""
        places = self.usage.slots * self.usage.steps
        return Metrics(busy=Metric(self.usage.decoded, places)) if places else Metrics()

    def check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Raise one `DataError` that names all prompts which cannot be encoded or do not fit the model."""
        self._encoded(prompts, sampling)

    def _encoded(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[tuple[int, ...]]:
        return encode(prompts, self._tokenizer, sampling, len(self._model.output_weight), self._model.max_positions)

    def _answers(self, encoded: Sequence[tuple[int, ...]], sampling: Sampling, seed: Sequence[int],
                 stops: StopStrings) -> list[Answer]:
        """Draw with as many rows as are allowed; where memory runs out, anew with half of them, and from then on."""
        while True:
            room = self._room(encoded, sampling.max_new_tokens)
            try:
                return translating_memory_errors(partial(self._decode, encoded, sampling, seed, stops, room))
            except MemoryExhausted as error:
                if room.rows == 1:
                    raise MemoryExhausted(
                        f"{error}; a single answer of up to {room.columns} tokens does not fit beside the model: lower "
                        "rollout.max_new_tokens, data.max_prompt_tokens or engine.prefill_tokens") from None
            self._most_rows = room.rows // 2
            if self._model.output_weight.is_cuda:
                torch.cuda.empty_cache()  # the smaller attempt must not fail on fragments of the larger one

    def _room(self, encoded: Sequence[tuple[int, ...]], new: int) -> Room:
        limit = 0 if isinstance(self._model, RecurrentLanguageModel) else self._engine.cache_tokens
        shares = isinstance(self._model, GroupedLanguageModel)
        return Room.most(encoded, new, self._most_rows, limit, shares=shares)

    @torch.inference_mode()
    def _decode(self, encoded: Sequence[tuple[int, ...]], sampling: Sampling, seed: Sequence[int], stops: StopStrings,
                room: Room) -> list[Answer]:
        model, weight = self._model, self._model.output_weight
        number = {ids: i for i, ids in enumerate(dict.fromkeys(encoded))}
        prompt_of = np.array([number[ids] for ids in encoded])
        with model.autocast():
            rows = rows_for(model, room)
            prefixes = Prefixes(list(number), np.bincount(prompt_of), self._engine.prefill_tokens, room.rows, rows,
                                weight.device)
            decoding = Decoding(prompt_of, prefixes, rows, partial(F.linear, weight=weight), room.rows, sampling, seed,
                                self._tokenizer.eos, stops)
            answers = decoding.run()
        self.usage = Usage(room.rows, prefixes.count, prefixes.tokens, decoding.steps, decoding.decoded)
        return answers
