"""The decoding loop of the engine `batched` in JAX: one compiled loop draws until an episode can have a row.

Rows, prompts and their lengths are rounded up to powers of two, so rollouts of similar sizes share what was compiled.
Between two calls of the loop the host looks for stop strings, takes finished answers and gives their rows to the next
episodes. Knows no text: prompts come as ids (`engines.py`).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from posttrain.data import Array, Metric, Metrics, Prompt, Rollouts, Sampling
from posttrain.errors import ConfigError, MemoryExhausted
from posttrain.protocols import Tokenizer

from posttrain_backends._jax.buckets import power_of_two
from posttrain_backends._jax.decoder import multiplied
from posttrain_backends._jax.loading import fitted
from posttrain_backends._jax.memory import translating_memory_errors
from posttrain_backends._jax.model import Params, Structure
from posttrain_backends._jax.pasts import Keys, Past, Place, begun, empty, extended, kept, read
from posttrain_backends._jax.sampling import sample
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

_BETWEEN_LOOKS = 8
"""Steps after which the host looks for stop strings, where there are some; what was drawn behind one is cut."""
_SHRINK, _FEWEST = 4, 8
"""Where no episode waits, a rollout goes on in a quarter of its rows when the others have ended, and in no fewer than
these: below, a step costs what reading the weights does. Each number of rows is compiled once."""


@final
@dataclass(frozen=True, slots=True)
class Room:
    """Sizes of the arrays of a rollout."""

    rows: int
    group: int
    """Rows behind one prompt, which is held once for them."""
    longest: int
    """Tokens of a prompt, without its last."""
    new: int
    """Tokens of an answer."""

    @classmethod
    def most(cls, prompts: Sequence[tuple[int, ...]], new: int, rows: int, cells: int) -> Room:
        """Room for up to `rows` answers of up to `new` tokens to `prompts`, in no more than `cells` tokens where those
        are not 0. Prompts are held once where all have equally many answers, side by side and drawn at one time.

        >>> Room.most([(5,) * 10] * 4 + [(7,) * 9] * 4, new=6, rows=100, cells=0)
        Room(rows=8, group=4, longest=16, new=6)
        >>> Room.most([(5,) * 10] * 4 + [(7,) * 9] * 4, new=6, rows=5, cells=0)
        Room(rows=5, group=1, longest=16, new=6)
        """
        uses, longest = Counter(prompts), power_of_two(max(map(len, prompts)) - 1)
        group, places = next(iter(uses.values())), power_of_two(len(uses))
        grouped = list(prompts) == [ids for ids in uses for _ in range(group)]
        room = cls(places * group, group, longest, new)
        if group > 1 and grouped and room.rows <= rows and room.cells <= (cells or np.inf):
            return room
        held = max(1, cells // (longest + new)) if cells else rows
        return cls(min(rows, held, power_of_two(len(prompts))), 1, longest, new)

    @property
    def places(self) -> int:
        """Prompts that are held at one time."""
        return self.rows // self.group

    @property
    def cells(self) -> int:
        """Tokens that are remembered."""
        return self.places * self.longest + self.rows * self.new

    @property
    def smaller(self) -> Room | None:
        """The room to go on in when most rows have ended, each behind a copy of its prompt; None where it does not pay.

        >>> Room(rows=32, group=8, longest=16, new=64).smaller, Room(rows=16, group=8, longest=16, new=64).smaller
        (Room(rows=8, group=1, longest=16, new=64), None)
        """
        room = Room(self.rows // _SHRINK, 1, self.longest, self.new)
        return room if room.rows >= _FEWEST and room.cells < self.cells else None


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What is drawn in each of B rows; on the host and on the device."""

    newest: Array
    """[B] int32, the token that is read next."""
    lengths: Array
    """[B] int32 tokens of the prompt."""
    count: Array
    """[B] int32 tokens drawn."""
    running: Array
    """[B] whether its answer goes on."""
    uniforms: Array
    """[B, new] float64"""
    tokens: Array
    """[B, new] int32"""
    logprobs: Array
    """[B, new] float32"""

    @classmethod
    def free(cls, rows: int, new: int) -> Rows:
        """None of them drawing."""
        return cls(np.zeros(rows, np.int32), np.ones(rows, np.int32), np.zeros(rows, np.int32), np.zeros(rows, bool),
                   np.zeros((rows, new)), np.zeros((rows, new), np.int32), np.zeros((rows, new), np.float32))


# ---- what is compiled

@partial(jax.jit, static_argnames=("structure", "room"))
def _empty(structure: Structure, params: Params, room: Room) -> Past:
    return empty(structure.bound(params), room.places, room.longest, room.rows, room.new)


@partial(jax.jit, static_argnames="structure")
def _read(structure: Structure, params: Params, tokens: Array) -> Keys | jax.Array:
    return read(structure.bound(params), tokens)


@partial(jax.jit, donate_argnames="past")
def _begun(past: Past, prompts: Keys | jax.Array, which: Array) -> Past:
    return begun(past, prompts, which)


_kept = jax.jit(kept)


@partial(jax.jit, static_argnames=("structure", "sampling", "eos"), donate_argnames="past")
def _drawn(structure: Structure, params: Params, past: Past, rows: Rows, clock: Array, until: Array, most: Array,
           sampling: Sampling, eos: int) -> tuple[Past, Rows, jax.Array]:
    """Steps of all rows until no more than `until` go on, and at most `most` of them."""
    model = structure.bound(params)
    weight, new = model.output_weight, rows.tokens.shape[1]

    def goes_on(state: tuple[Past, Rows, jax.Array]) -> jax.Array:
        _, now, time = state
        going = now.running.sum() > until
        return jnp.logical_and(going, time < clock + most)

    def step(state: tuple[Past, Rows, jax.Array]) -> tuple[Past, Rows, jax.Array]:
        past, now, time = state
        hidden, past = extended(model, past, now.newest, Place(now.lengths, now.count, time))
        here = jnp.arange(new) == now.count[:, None]
        u = jnp.where(here, now.uniforms, 0.0).sum(axis=1)
        tokens, logprobs = sample(multiplied(hidden, weight, model.compute_dtype), sampling, u)
        here &= now.running[:, None]
        count = now.count + now.running.astype(jnp.int32)
        return past, replace(
            now, newest=tokens, count=count, running=now.running & (tokens != eos) & (count < new),
            tokens=jnp.where(here, tokens[:, None], now.tokens),
            logprobs=jnp.where(here, logprobs[:, None].astype(jnp.float32), now.logprobs)), time + 1
    end: tuple[Past, Rows, jax.Array] = jax.lax.while_loop(goes_on, step, (past, rows, clock))
    return end


# ---- the host's part


@final
class Prefixes:
    """Distinct prompts in the order of their use: each read once, some at a time, and forgotten when its last answer
    has begun."""

    def __init__(self, prompts: Sequence[tuple[int, ...]], uses: np.ndarray, longest: int, together: int,
                 reading: Callable[[np.ndarray], Keys | jax.Array]) -> None:
        self._prompts, self._uses, self._longest, self._together = prompts, uses.copy(), longest, together
        self._reading = reading
        self._read: dict[int, tuple[int, Keys | jax.Array]] = {}
        self.count = 0
        """Prompts read so far."""

    def take(self, prompt: int, uses: int) -> tuple[int, Keys | jax.Array]:
        """Where the prompt stands among those that were read with it, and those, for `uses` more answers."""
        while prompt >= self.count:
            self._read_next()
        self._uses[prompt] -= uses
        return self._read[prompt] if self._uses[prompt] else self._read.pop(prompt)

    def _read_next(self) -> None:
        tokens = np.zeros((self._together, self._longest), np.int32)
        following = self._prompts[self.count:self.count + self._together]
        for row, ids in zip(tokens, following):
            row[:len(ids) - 1] = ids[:-1]
        read = self._reading(tokens)
        self._read.update((self.count + i, (i, read)) for i in range(len(following)))
        self.count += len(following)


@final
class Drawing:
    """Draws the answers to a queue of prompts, a room full at a time; see the module."""

    def __init__(self, structure: Structure, params: Params, encoded: Sequence[tuple[int, ...]], room: Room,
                 together: int, sampling: Sampling, seed: Sequence[int], eos: int, stops: StopStrings) -> None:
        self._encoded, self._room, self._seed, self._eos, self._stops = encoded, room, seed, eos, stops
        number = {ids: i for i, ids in enumerate(dict.fromkeys(encoded))}
        self._prompt_of = np.array([number[ids] for ids in encoded])
        self._prefixes = Prefixes(list(number), np.bincount(self._prompt_of), room.longest, together,
                                  partial(_read, structure, params))
        plain = replace(sampling, stop=(), max_new_tokens=1)  # what the loop is compiled for
        self._draw = partial(_drawn, structure, params, sampling=plain, eos=eos)
        self.places = self._next = self._clock = 0
        """Rows that were computed so far, summed over steps."""
        self._past = _empty(structure, params, room)
        self._rows = Rows.free(room.rows, room.new)
        self._episode = np.full(room.rows, -1)
        self._answers: dict[int, Answer] = {}

    def run(self) -> list[Answer]:
        """The answers, in the order of the queue."""
        while self._refill():
            before, most = self._rows, _BETWEEN_LOOKS if self._stops.strings else self._room.new
            self._past, rows, clock = self._draw(
                self._past, before, np.int32(self._clock), until=np.int32(self._until()), most=np.int32(most))
            self.places += self._room.rows * (int(clock) - self._clock)
            self._rows, self._clock = jax.tree.map(np.array, rows), int(clock)
            self._collect(before.count)
            self._shrink()
        return [self._answers[e] for e in range(len(self._encoded))]

    def _until(self) -> int:
        """How many rows may go on when the host takes over."""
        if self._next < len(self._encoded):
            return int(self._rows.running.sum()) - 1
        return 0 if self._room.smaller is None else self._room.smaller.rows

    def _shrink(self) -> None:
        """Go on in fewer rows, where no episode waits and these are enough."""
        rows, smaller = np.flatnonzero(self._episode >= 0), self._room.smaller
        if self._next < len(self._encoded) or smaller is None or not 0 < len(rows) <= smaller.rows:
            return
        source = np.pad(rows, (0, smaller.rows - len(rows)))
        self._past = _kept(self._past, source, source // self._room.group)
        self._rows, self._episode = jax.tree.map(lambda x: x[source], self._rows), self._episode[source]
        self._rows.running[len(rows):], self._episode[len(rows):] = False, -1
        self._room = smaller

    def _refill(self) -> bool:
        """Begin waiting episodes behind the free prompts' places -> whether any row is drawing."""
        group, begin = self._room.group, dict[int, tuple[Keys | jax.Array, np.ndarray]]()
        for place in np.flatnonzero((self._episode.reshape(-1, group) < 0).all(axis=1)):
            if self._next >= len(self._encoded):
                break
            i, read = self._prefixes.take(int(self._prompt_of[self._next]), group)
            begin.setdefault(id(read), (read, np.full(self._room.places, -1, np.int32)))[1][place] = i
            for row in range(place * group, (place + 1) * group):
                self._begin(row, self._next)
                self._next += 1
        for read, which in begin.values():
            self._past = _begun(self._past, read, which)
        return bool(self._rows.running.any())

    def _begin(self, row: int, episode: int) -> None:
        ids, rows = self._encoded[episode], self._rows
        self._episode[row] = episode
        rows.newest[row], rows.lengths[row], rows.count[row], rows.running[row] = ids[-1], len(ids), 0, True
        rows.uniforms[row] = uniforms(self._seed, episode, self._room.new)

    def _collect(self, before: np.ndarray) -> None:
        """Take the answers that ended; `before` [B] tokens were known already."""
        rows = self._rows
        for row in np.flatnonzero(self._episode >= 0):
            n, stopped = int(rows.count[row]), False
            if self._stops.strings:
                found = (k for k in range(int(before[row]) + 1, n + 1) if rows.tokens[row, k - 1] != self._eos
                         and self._stops.reached(rows.tokens[row, :k]))
                stop = next(found, None)
                n, stopped = (n, False) if stop is None else (stop, True)
            if rows.running[row] and not stopped:
                continue
            finish = STOP if stopped else EOS if rows.tokens[row, n - 1] == self._eos else BUDGET
            self._answers[int(self._episode[row])] = Answer(
                rows.tokens[row, :n].copy(), rows.logprobs[row, :n].copy(), finish)
            rows.running[row], self._episode[row] = False, -1


@final
@dataclass(frozen=True, slots=True)
class Usage:
    """The work of one rollout."""

    room: Room
    prompts: int
    """Distinct prompts, each read once."""
    places: int
    """Rows that were computed, summed over steps."""
    drawn: int
    """Tokens of all answers."""


@final
class JaxSampler:
    """A started engine on a JAX model; a `Sampler`. `weights` gives the policy's parameters as they are; not shared, it
    keeps a copy of them until `sync`."""

    def __init__(self, structure: Structure, weights: Callable[[], Params], version: int, tokenizer: Tokenizer,
                 engine: Batched, *, shared: bool) -> None:
        if engine.quantize is not None:
            raise ConfigError(
                [f"rollout.engine.quantize: {engine.quantize} weights are drawn from in torch alone, and the policy "
                 "is a JAX model"],
                next_step="Leave rollout.engine.quantize out, or take policy: torch.")
        self._structure, self._tokenizer, self._engine = structure, tokenizer, engine
        self._version, self._most_rows = version, engine.slots or sys.maxsize
        self._own = None if shared else {name: jnp.copy(x) for name, x in weights().items()}
        self._weights = weights
        self._vocab_size = len(jax.eval_shape(lambda params: structure.bound(params).output_weight, structure.shapes))
        self._max_positions = structure.bound(structure.shapes).max_positions
        self.usage: Usage | None = None
        """The work of the last rollout."""

    def sync(self, params: Iterable[tuple[str, Array]], version: int) -> None:
        """Take the weights `params` (a shared model has them already) and number them `version`. Raises `ConfigError`
        where names or shapes are not the model's."""
        if self._own is not None:
            own = self._own
            self._own = fitted(params, own, lambda name, x: jax.device_put(x, own[name].sharding),
                               "the weights given to the sampler")
        self._version = version

    def rollout(self, prompts: Sequence[Prompt], sampling: Sampling, seed: Sequence[int]) -> Rollouts:
        """One episode per prompt, in order. Raises `DataError` for prompts that do not fit, `Diverged` where the model
        gives no numbers, and `MemoryExhausted` where even one row does not fit."""
        stops = StopStrings(sampling.stop, self._tokenizer.decode)
        encoded = self._encoded(prompts, sampling)
        answers = self._answers(encoded, sampling, seed, stops) if encoded else []
        return assemble(prompts, encoded, answers, sampling, stops, self._version)

    def metrics(self) -> Metrics:
        """`busy`, the share of rows x steps that drew a token which stays."""
        if self.usage is None:
            return Metrics()
        return Metrics(busy=Metric(self.usage.drawn, self.usage.places))

    def check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Raise one `DataError` that names all prompts which cannot be encoded or do not fit the model."""
        self._encoded(prompts, sampling)

    def _encoded(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[tuple[int, ...]]:
        return encode(prompts, self._tokenizer, sampling, self._vocab_size, self._max_positions)

    def _answers(self, encoded: Sequence[tuple[int, ...]], sampling: Sampling, seed: Sequence[int],
                 stops: StopStrings) -> list[Answer]:
        """Draw with as many rows as are allowed; where memory runs out, anew with half of them, and from then on."""
        while True:
            room = Room.most(encoded, sampling.max_new_tokens, self._most_rows, self._engine.cache_tokens)
            try:
                return translating_memory_errors(partial(self._decode, encoded, sampling, seed, stops, room))
            except MemoryExhausted as error:
                if room.rows == 1:
                    raise MemoryExhausted(
                        f"{error}; a single answer of up to {room.longest + room.new} tokens does not fit beside the "
                        "model: lower rollout.max_new_tokens, data.max_prompt_tokens or engine.prefill_tokens"
                    ) from None
            self._most_rows = room.rows // 2

    def _decode(self, encoded: Sequence[tuple[int, ...]], sampling: Sampling, seed: Sequence[int], stops: StopStrings,
                room: Room) -> list[Answer]:
        params = dict(self._weights() if self._own is None else self._own)
        budget = max(1, self._engine.prefill_tokens // room.longest)
        together = min(power_of_two(len(set(encoded))), power_of_two(room.rows), 1 << budget.bit_length() - 1)
        with jax.enable_x64(True):  # random numbers have 53 bits, and sums of probabilities are exact in 64
            drawing = Drawing(self._structure, params, encoded, room, together, sampling, seed, self._tokenizer.eos,
                              stops)
            answers = drawing.run()
        self.usage = Usage(room, len(set(encoded)), drawing.places, sum(len(a.tokens) for a in answers))
        return answers
