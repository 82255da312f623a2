"""The decoding loop: rows that are decoded together, and how a free row gets its next episode.

The first `active` rows always hold an unfinished episode: a row that ends is given to the next episode in the queue,
and where none waits, the last row moves into its place. So no row of a forward pass is idle. All bookkeeping is NumPy
on the host; the device sees tokens, positions and uniforms of a step and gives back tokens and log-probs. Knows no
text: prompts come as ids (`engines.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, final

import numpy as np
import torch
from posttrain.data import Array, Metric, Metrics, Prompt, Rollouts, Sampling, offsets_of
from posttrain.errors import MemoryExhausted
from posttrain.protocols import Kept, Memory, Tokenizer
from posttrain.watermark import Watermark
from torch import Tensor

from posttrain_backends._torch.drawn import Drawn
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.memory import (
    memory_of_device,
    snapshot_where_it_fails,
    translating_memory_errors,
    watermark_of,
)
from posttrain_backends._torch.rows import Prefix, Room, Rows
from posttrain_backends._torch.sampling import sample
from posttrain_backends.engines import (
    BUDGET,
    EOS,
    STOP,
    Answer,
    StopStrings,
    assemble,
    encode,
    uniforms,
)


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
        ends, pasts, routes = self._rows.read(flat, layout)
        for i, (end, past) in enumerate(zip(ends, pasts, strict=True)):
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


class Limits(Protocol):
    """What an engine says of how much is done at once; see `Batched`."""

    @property
    def slots(self) -> int: ...
    @property
    def cache_tokens(self) -> int: ...
    @property
    def prefill_tokens(self) -> int: ...


@final
class TorchSampler:
    """A started engine whose tokens are drawn in torch; a `Sampler`. The weights it begins with are of `version`."""

    def __init__(self, drawn: Drawn, tokenizer: Tokenizer, limits: Limits, version: int) -> None:
        self._drawn, self._tokenizer, self._limits, self._version = drawn, tokenizer, limits, version
        self._most_rows, self._most_tokens = limits.slots or sys.maxsize, limits.cache_tokens
        self._kept = Kept(0)
        self._bytes_of_token: int | None = None
        self.usage = Usage(0, 0, 0, 0, 0)
        """The work of the last rollout."""

    def sync(self, params: Iterable[tuple[str, Array]], version: int) -> None:
        """Take the weights `params` (a shared model has them already) and number them `version`."""
        self._drawn.load(params)
        self._version = version

    def rollout(self, prompts: Sequence[Prompt], sampling: Sampling, seed: Sequence[int]) -> Rollouts:
        """One episode per prompt, in order. Raises `DataError` for prompts that do not fit, `Diverged` where the model
        gives no numbers, and `MemoryExhausted` where even one row does not fit."""
        stops = StopStrings(sampling.stop, self._tokenizer.decode)
        encoded = self._encoded(prompts, sampling)
        answers = self._answers(encoded, sampling, seed, stops) if encoded else []
        return assemble(prompts, encoded, answers, sampling, stops, self._version)

    def metrics(self) -> Metrics:
        """`busy`, the share of slots x decoding passes that decoded a token; none where no pass was needed. And what
        the model says of itself."""
        places = self.usage.slots * self.usage.steps
        return (Metrics(busy=Metric(self.usage.decoded, places)) if places else Metrics()) + self._drawn.metrics()

    @property
    def token_bytes(self) -> int:
        """See `posttrain.protocols.Rationed`."""
        return self._drawn.token_bytes

    def ration(self, tokens: int) -> None:
        """Keep no more tokens; the engine's own limits hold, and what was learned by failures is forgotten."""
        own = self._limits.cache_tokens
        self._most_rows, self._most_tokens = self._limits.slots or sys.maxsize, min(own, tokens) if own else tokens

    def kept(self) -> Kept:
        """In the last rollout."""
        return self._kept

    def memory(self) -> Memory:
        return memory_of_device(self._drawn.device)

    def held(self) -> Mapping[str, int]:
        """See `posttrain.protocols.Accounted`."""
        if self._bytes_of_token is None:
            self._bytes_of_token = self.token_bytes
        return {"kv_cache": self._kept.tokens * self._bytes_of_token}

    def watermark(self) -> Watermark | None:
        """See `posttrain.protocols.Accounted`."""
        return watermark_of(self._drawn.device)

    def explain(self, folder: Path) -> None:
        """See `posttrain.protocols.Accounted`."""
        snapshot_where_it_fails(self._drawn.device, folder)

    def check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Raise one `DataError` that names all prompts which cannot be encoded or do not fit the model."""
        self._encoded(prompts, sampling)

    def _encoded(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[tuple[int, ...]]:
        return encode(prompts, self._tokenizer, sampling, self._drawn.vocab_size, self._drawn.max_positions)

    def _answers(self, encoded: Sequence[tuple[int, ...]], sampling: Sampling, seed: Sequence[int],
                 stops: StopStrings) -> list[Answer]:
        """Draw with as many rows as are allowed; where memory runs out, anew with half of them, and from then on."""
        ran_out = 0
        while True:
            room = self._drawn.room(encoded, sampling.max_new_tokens, self._most_rows, self._most_tokens)
            self._kept = Kept(room.tokens, ran_out)
            try:
                return translating_memory_errors(partial(self._decode, encoded, sampling, seed, stops, room))
            except MemoryExhausted as error:
                if room.rows == 1:
                    raise MemoryExhausted(
                        f"{error}; a single answer of up to {room.columns} tokens does not fit beside the model: lower "
                        "rollout.max_new_tokens, data.max_prompt_tokens or engine.prefill_tokens") from None
            self._most_rows, ran_out = room.rows // 2, room.tokens
            if self._drawn.device.type == "cuda":
                torch.cuda.empty_cache()  # the smaller attempt must not fail on fragments of the larger one

    @torch.inference_mode()
    def _decode(self, encoded: Sequence[tuple[int, ...]], sampling: Sampling, seed: Sequence[int], stops: StopStrings,
                room: Room) -> list[Answer]:
        drawn = self._drawn
        number = {ids: i for i, ids in enumerate(dict.fromkeys(encoded))}
        prompt_of = np.array([number[ids] for ids in encoded])
        with drawn.autocast():
            rows = drawn.rows(room)
            prefixes = Prefixes(list(number), np.bincount(prompt_of), self._limits.prefill_tokens, room.rows, rows,
                                drawn.device)
            decoding = Decoding(prompt_of, prefixes, rows, drawn.logits, room.rows, sampling, seed,
                                self._tokenizer.eos, stops)
            answers = decoding.run()
        self.usage = Usage(room.rows, prefixes.count, prefixes.tokens, decoding.steps, decoding.decoded)
        return answers
