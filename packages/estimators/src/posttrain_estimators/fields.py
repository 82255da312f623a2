"""Fields that several estimators share: their values, what they mean for an episode, and their checks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import numpy as np
from posttrain.data import Episodes
from posttrain.errors import did_you_mean
from posttrain.ops import like, ops_of, widen

Truncation = Literal["bootstrap", "terminal", "mask", "soft"]
"""What a truncated episode (one that is not `terminated`) is taken for: it goes on with the value of its last state, it
ends there, or it is left out of statistics and update (Pardo et al. 2018, arXiv 1712.00378). `soft` ends there, too,
and takes from the reward of every episode what `overlong_penalty` says of its length."""
WITHOUT_VALUES = ("terminal", "mask", "soft")
"""The choices of an estimator that has no value of the last state."""


def survivors(episodes: Episodes, truncation: Truncation) -> np.ndarray:
    """[E] bool, episodes that take part."""
    return episodes.terminated if truncation == "mask" else np.ones(episodes.n_episodes, bool)


def overlong_penalty(lengths: np.ndarray, length: int, buffer: int) -> np.ndarray:
    """[E] 0 up to `length - buffer` actions, then linearly down to -1 at `length` and beyond.

    Soft overlong punishment (Yu et al. 2025, DAPO, arXiv 2503.14476, equation 13).

    >>> overlong_penalty(np.array([6, 8, 10, 12]), 10, 4).tolist()
    [0.0, -0.5, -1.0, -1.0]
    """
    return np.minimum(0.0, np.maximum(-1.0, (length - buffer - lengths) / buffer))


def softened(episodes: Episodes, truncation: Truncation, length: int, buffer: int) -> Episodes:
    """The episodes with the penalty of `truncation: soft` added to the reward of each last action; as they are under
    every other choice."""
    if truncation != "soft":
        return episodes
    r = widen(episodes.rewards)
    penalty = np.zeros(len(r))
    penalty[episodes.offsets[1:] - 1] = overlong_penalty(episodes.lengths, length, buffer)
    return replace(episodes, rewards=r + ops_of(r).xp.astype(like(penalty, r), r.dtype))


def check_truncation(truncation: str, length: int, buffer: int, known: Iterable[str] = Truncation.__args__) -> None:  # type: ignore[attr-defined]  # a Literal has them
    """Raise `ValueError` for a choice that is none of `known`, and for lengths that do not fit `truncation`."""
    known = tuple(known)
    if truncation == "bootstrap" and "bootstrap" not in known:
        raise ValueError("truncation 'bootstrap' continues with a critic's value, and this estimator uses no critic; "
                         "choose 'terminal', 'mask' or 'soft', or an estimator with a critic such as gae")
    check_choice("truncation", truncation, known)
    if truncation == "soft" and not 0 < buffer <= length:
        raise ValueError("truncation 'soft' needs overlong_length (usually ${rollout.max_new_tokens}) and "
                         f"overlong_buffer, 0 < overlong_buffer <= overlong_length; got {length} and {buffer}")
    if truncation != "soft" and (length, buffer) != (0, 0):
        raise ValueError(f"overlong_length and overlong_buffer belong to truncation 'soft'; leave them out, or set it "
                         f"in place of {truncation!r}")


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raise `ValueError` unless `value` is one of `known`."""
    known = tuple(known)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}{did_you_mean(str(value), known)}")


def check_fraction(name: str, value: float) -> None:
    """Raise `ValueError` unless 0 <= `value` <= 1; also for NaN."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
