"""Fields that several estimators share: their values, what they mean for an episode, and their checks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
from posttrain.data import Episodes
from posttrain.errors import did_you_mean

Truncation = Literal["bootstrap", "terminal", "mask"]
"""What a truncated episode (one that is not `terminated`) is taken for: it goes on with the critic's value of its last
state, it ends there, or it is left out of statistics and update (Pardo et al. 2018, arXiv 1712.00378)."""


def survivors(episodes: Episodes, truncation: Truncation) -> np.ndarray:
    """[E] bool, episodes that take part."""
    return episodes.terminated if truncation == "mask" else np.ones(episodes.n_episodes, bool)


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raise `ValueError` unless `value` is one of `known`."""
    known = tuple(known)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}{did_you_mean(str(value), known)}")


def check_fraction(name: str, value: float) -> None:
    """Raise `ValueError` unless 0 <= `value` <= 1; also for NaN."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def check_truncation_without_values(truncation: str) -> None:
    """Raise `ValueError` for a choice that only an estimator with a critic can offer."""
    if truncation == "bootstrap":
        raise ValueError("truncation 'bootstrap' continues with a critic's value, and this estimator uses no critic; "
                         "choose 'terminal' or 'mask', or an estimator with a critic such as gae")
    check_choice("truncation", truncation, ("terminal", "mask"))
