"""Statistics that critic-free estimators share: groups, deviations within them, scales and whitening.

Knows episodes and which of them take part, not what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from posttrain.data import Array, Episodes, Metric, Metrics
from posttrain.ops import like, ops_of, segment_std, segment_sum, whiten

from posttrain_estimators.fields import check_choice

Statistics = Literal["token", "row"]
"""What counts alike in a mean and a deviation over the batch: every action, so that a long episode counts more, or
every episode, so that an action of one with l actions counts 1 / l."""
Scale = Literal["group", "batch", "none"]


def groups_of(episodes: Episodes, survives: np.ndarray) -> tuple[np.ndarray, int]:
    """[E] groups numbered 0 .. n-1, and n; n itself is the group of all that do not survive."""
    _, group = np.unique(episodes.group, return_inverse=True)
    n = int(group.max(initial=-1)) + 1
    return np.where(survives, group, n), n


def zero_variance_groups(deviation: Array, group: np.ndarray, n: int) -> Metrics:
    """How many of the n groups have nothing to compare: all deviations from their mean are 0."""
    differs = segment_sum(deviation != 0, group, n + 1)[:n]
    return Metrics(zero_variance_groups=Metric(float(ops_of(differs).xp.sum(differs == 0)), float(n)))


def check_scale(scale: str, ddof: int, eps: float) -> None:
    """Raise `ValueError` for fields that no standard deviation can be made with."""
    check_choice("scale", scale, SCALES)
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")


def deviation_from_others(deviation: Array, group: np.ndarray) -> Array:
    """s minus the mean of the others of its group is G / (G - 1) times s minus the mean."""
    size = np.bincount(group)
    xp, factor = ops_of(deviation).xp, size / np.maximum(size - 1, 1)
    return deviation * xp.astype(like(factor[group], deviation), deviation.dtype)


def _whiten_by_row(A: Array, episodes: Episodes, kept: np.ndarray) -> Array:
    """(A - mean) / sqrt(variance + 1e-8), an action of a kept episode of l actions counting 1 / l; 0 for the others.

    Where A is one number per episode, this is what whitening these numbers gives. Unchanged where fewer than two
    episodes are kept. Exactly 0 where all are equal, since the mean is taken of differences from one of them.
    """
    xp, n = ops_of(A).xp, int(kept.sum())
    keep = like(kept[episodes.episode], A)
    if n < 2:
        return xp.where(keep, A, 0.0)
    share = xp.astype(like((kept / (episodes.lengths * n))[episodes.episode], A), A.dtype)
    difference = A - A[int(episodes.offsets[:-1][kept][0])]
    difference = difference - xp.sum(share * difference)
    variance = xp.sum(share * difference ** 2) * (n / (n - 1))
    return xp.where(keep, difference / xp.sqrt(variance + 1e-8), 0.0)


WHITENING: Mapping[str, Callable[[Array, Episodes, np.ndarray], Array]] = {
    "token": lambda A, episodes, kept: whiten(A, kept[episodes.episode]), "row": _whiten_by_row}
"""[N] standardised advantages over the kept episodes [E]."""

MEMBERS: Mapping[str, Callable[[Episodes], np.ndarray]] = {
    "row": lambda episodes: np.arange(episodes.n_episodes), "token": lambda episodes: episodes.episode}
"""The episode of each member of a statistic over the batch."""


def _scale_by_group(x: Array, ids: np.ndarray, n: int, ddof: int, eps: float, members: np.ndarray) -> Array:
    return segment_std(x, ids, n + 1, ddof)[ids] + eps


def _scale_by_batch(x: Array, ids: np.ndarray, n: int, ddof: int, eps: float, members: np.ndarray) -> Array:
    return segment_std(x[members], (ids[members] == n).astype(np.int64), 2, ddof)[0] + eps


SCALES: Mapping[str, Callable[[Array, np.ndarray, int, int, float, np.ndarray], Array | float]] = {
    "group": _scale_by_group, "batch": _scale_by_batch, "none": lambda x, ids, n, ddof, eps, members: 1.0}
"""c from numbers x and their groups; group n holds what is left out. `members` are what a batch's statistic runs
over, as indices of x."""
