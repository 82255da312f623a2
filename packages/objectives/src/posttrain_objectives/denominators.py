"""How a loss is averaged: counts of an optimiser step to a weight per action. Knows NumPy alone, and no loss.

A loss is `sum(weight * x)`. Counts of actions and episodes are global over ranks, so the sums of ranks and of parts
add up to the average over the whole step, whatever the split. An episode without a kept action does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from posttrain.data import Counts

Denominator = Literal["token_mean", "sequence_mean", "constant"]
Mean = Literal["token_mean", "sequence_mean"]
"""The denominators that need no further number."""


def token_mean(counts: Counts, length: int) -> np.ndarray:
    """[E] 1 / actions: every action weighs the same (DAPO, Yu et al. 2025, arXiv 2503.14476)."""
    return np.full(len(counts.episode_actions), 1.0 / max(counts.actions, 1))


def sequence_mean(counts: Counts, length: int) -> np.ndarray:
    """[E] 1 / (episodes * own actions): the mean over episodes of each one's mean (GRPO, Shao et al. 2024,
    arXiv 2402.03300). An action weighs less in a longer episode."""
    weight: np.ndarray = 1.0 / (max(counts.episodes, 1) * np.maximum(counts.episode_actions, 1))
    return weight


def constant(counts: Counts, length: int) -> np.ndarray:
    """[E] 1 / (episodes * length): sums over episodes, divided by a constant (Dr. GRPO, Liu et al. 2025,
    arXiv 2503.20783). Length 1 is the mean over episodes of sums over actions."""
    return np.full(len(counts.episode_actions), 1.0 / (max(counts.episodes, 1) * length))


DENOMINATORS: Mapping[Denominator, Callable[[Counts, int], np.ndarray]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant": constant,
}


def action_weights(denominator: Denominator, counts: Counts, length: int = 0) -> np.ndarray:
    """[N] float64, one weight per kept action of this rank, episode after episode.

    >>> counts = Counts(actions=4, episodes=2, episode_actions=np.array([1, 0, 3]))
    >>> action_weights("token_mean", counts)
    array([0.25, 0.25, 0.25, 0.25])
    >>> action_weights("sequence_mean", counts).round(3)
    array([0.5  , 0.167, 0.167, 0.167])
    >>> action_weights("constant", counts, length=10)
    array([0.05, 0.05, 0.05, 0.05])
    """
    return np.repeat(DENOMINATORS[denominator](counts, length), counts.episode_actions)
