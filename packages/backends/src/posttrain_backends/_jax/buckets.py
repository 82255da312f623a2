"""A part of ragged sequences in arrays whose sizes are powers of two, so that few shapes are ever compiled.

Made in NumPy. What fills a bucket up are rows of token 0, and actions without weight in episodes of their own, behind
all others: no loss and no metric sees them (`posttrain.testing.ObjectiveContract` holds every objective to that).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from posttrain.data import Array, MicroBatch
from posttrain.errors import ConfigError

_ROWS, _COLUMNS, _LEAST_ACTIONS, _LEAST_EPISODES, _LEAST_TOKENS = 8, 16, 64, 16, 128
"""Sizes of the smallest buckets: what they hold too much costs less than one more function to compile."""
_ACTIONS = ("weight", "kl_weight", "value_weight", "advantages", "targets", "old_logprobs", "behavior_logprobs",
            "ref_logprobs", "old_values", "preferred")
"""Columns of numbers on the axis of actions; 0 fills them up: as a log-prob it keeps ratios at most 1."""


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is neither below `n` nor below `least`.

    >>> [power_of_two(n) for n in (0, 1, 2, 3, 8, 9)]
    [1, 1, 2, 4, 8, 16]
    """
    return 1 << (max(n, least, 1) - 1).bit_length()


@final
@dataclass(frozen=True, slots=True, eq=False)
class Rectangle:
    """Tokens of one forward pass in rows, padded on the right, and where in them actions and episodes' ends lie."""

    tokens: np.ndarray
    """[S, T] int32"""
    before: np.ndarray
    """[N] flat index of the token before each action: it gives the action's log-prob, and the value of the state."""
    chosen: np.ndarray
    """[N] the id of each action."""
    last: np.ndarray
    """[E] flat index of the last token of each episode."""

    def arrays(self) -> dict[str, np.ndarray]:
        return {"tokens": self.tokens, "before": self.before, "chosen": self.chosen, "last": self.last}


def rectangle(tokens: Array, offsets: np.ndarray, source: Array, last: Array, *, max_positions: int | None,
              rows: int = 1) -> Rectangle:
    """Of sequences that begin at `offsets` [S+1] in `tokens` [M], whose actions are at `source` and whose episodes end
    at `last`; a number of rows that `rows` divides. Raises `ConfigError` where a sequence is longer than
    `max_positions`.

    >>> r = rectangle(np.array([5, 6, 7, 8, 9]), np.array([0, 3, 5]), np.array([2, 4]), np.array([2, 4]),
    ...               max_positions=4)
    >>> r.tokens.shape, r.tokens[:2].tolist(), r.before[:2].tolist(), r.last[:2].tolist()
    ((8, 4), [[5, 6, 7, 0], [8, 9, 0, 0]], [1, 4], [2, 5])
    """
    tokens, source, last = (np.asarray(x) for x in (tokens, source, last))
    lengths = np.diff(offsets)
    longest = int(lengths.max(initial=1))
    if max_positions is not None and longest > max_positions:
        raise ConfigError([f"a sequence of {longest} tokens does not fit the model's {max_positions} positions"],
                          next_step="Raise policy.max_positions, or lower rollout.max_new_tokens or the prompts.")
    T = power_of_two(longest, _COLUMNS)
    T = T if max_positions is None else min(T, max_positions)
    S = -(-power_of_two(len(lengths), _ROWS) // rows) * rows
    row = np.repeat(np.arange(len(lengths)), lengths)
    place = row * T + np.arange(len(tokens)) - np.repeat(np.asarray(offsets)[:-1], lengths)
    filled = np.zeros(S * T, np.int32)
    filled[place] = tokens
    return Rectangle(filled.reshape(S, T), _filled(place[source - 1], _LEAST_ACTIONS),
                     _filled(tokens[source], _LEAST_ACTIONS), _filled(place[last], _LEAST_EPISODES))


def _filled(x: np.ndarray, least: int) -> np.ndarray:
    """Indices with zeros behind them, up to a power of two."""
    return np.pad(x.astype(np.int32), (0, power_of_two(len(x), least) - len(x)))


def columns(batch: MicroBatch, dtype: Any) -> dict[str, Any]:
    """The fields of a micro-batch that are arrays, filled up; numbers in `dtype`, integers in 32 bits. There is at
    least one episode more than the batch has, which holds the actions that are none."""
    M, N, E = len(batch.tokens), len(batch.source), len(batch.count)
    Mp, Np, Ep = (power_of_two(n, least) for n, least in (
        (M + 1, _LEAST_TOKENS), (N, _LEAST_ACTIONS), (E + 1, _LEAST_EPISODES)))
    groups = int(np.max(batch.group, initial=-1)) + 1
    behind: Mapping[str, np.ndarray] = {
        "tokens": np.zeros(Mp - M), "sequence": np.full(Mp - M, np.max(batch.sequence, initial=-1) + 1),
        "positions": np.arange(Mp - M), "source": np.full(Np - N, Mp - 1), "episode": np.full(Np - N, E),
        "group": groups + np.arange(Ep - E), "count": np.maximum(np.eye(1, Ep - E)[0] * (Np - N), 1),
        "last": np.full(Ep - E, Mp - 1)}
    whole = {name: np.concatenate([np.asarray(getattr(batch, name)), x]).astype(np.int32) for name, x in behind.items()}
    numbers = {name: _with_zeros(x, Np, dtype) for name in _ACTIONS if (x := getattr(batch, name)) is not None}
    return {**whole, **numbers, "token_weight": _with_zeros(batch.token_weight, Mp, dtype),
            "temperature": np.asarray(batch.temperature, dtype),
            "constants": {name: np.asarray(x, dtype) for name, x in batch.constants.items()}}


def _with_zeros(x: Array, size: int, dtype: Any) -> np.ndarray:
    """[..., n] with zeros behind, [..., size]."""
    x = np.asarray(x, dtype)
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
