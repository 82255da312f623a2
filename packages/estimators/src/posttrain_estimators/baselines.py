"""Critic-free estimators: reward-to-go, and the outcome reward against the answers to the same prompt.

Without a critic there is no value to bootstrap from, so a truncated episode is either judged as it stands (`terminal`)
or left out (`mask`). Knows nothing about models, losses or how advantages are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from posttrain.data import Array, Episodes, Estimate, Metric, Metrics
from posttrain.ops import (
    like,
    ops_of,
    reverse_recurrence,
    segment_deviation,
    segment_mean,
    segment_std,
    segment_sum,
    whiten,
)
from posttrain.protocols import Need

from posttrain_estimators.fields import (
    Truncation,
    check_choice,
    check_fraction,
    check_truncation_without_values,
    survivors,
)


@final
@dataclass(frozen=True, slots=True)
class Reinforce:
    """A_t = G_t - b with G_t = r_t + gamma G_{t+1} (Williams 1992).

    Raises `ValueError` on construction where a field is out of its range.

    >>> Reinforce(gamma=0.5)(Episodes.from_rows(rewards=[[0.0, 1.0], [2.0]])).advantages
    array([0.5, 1. , 2. ])
    """

    gamma: float = 1.0
    """Discount per action, in [0, 1]."""
    baseline: Literal["none", "batch"] = "none"
    """b: nothing, or the mean over episodes of the return from their first action."""
    whiten: bool = False
    """Standardise over the actions of the batch; left out where fewer than two are kept."""
    truncation: Truncation = "terminal"
    """Truncated episodes: `terminal` takes their rewards as they are, `mask` leaves them out of statistics and
    update. `bootstrap` needs a critic and is refused."""

    def __post_init__(self) -> None:
        check_fraction("gamma", self.gamma)
        check_choice("baseline", self.baseline, _BATCH_BASELINES)
        check_truncation_without_values(self.truncation)

    @property
    def needs(self) -> frozenset[Need]:
        """No column beside the rewards."""
        return frozenset()

    def __call__(self, episodes: Episodes, /) -> Estimate:
        """[N] advantages; `keep` where `truncation` is `mask`."""
        survives = survivors(episodes, self.truncation)
        keep = survives[episodes.episode]
        G = reverse_recurrence(self.gamma, episodes.rewards, episodes.offsets)
        A = G - _BATCH_BASELINES[self.baseline](G[episodes.offsets[:-1]], survives)
        A = whiten(A, keep) if self.whiten else ops_of(A).xp.where(like(keep, A), A, 0.0)
        return Estimate(advantages=A, keep=like(keep, A) if self.truncation == "mask" else None)


@final
@dataclass(frozen=True, slots=True)
class GroupBaseline:
    """A = (s - b) / c for all actions of an episode, s the sum of its rewards, b and c from its group.

    GRPO (Shao et al. 2024): b the group's mean, c = std + eps. Dr. GRPO (Liu et al. 2025): c = 1. RLOO (Kool et al.
    2019): b the mean of the others, c = 1, which is G / (G - 1) times Dr. GRPO. The advantage is exactly 0 where all
    rewards of a group are equal, so also where an episode has no other to be compared with.

    Raises `ValueError` on construction where a field is out of its range.

    >>> GroupBaseline(scale="none")(Episodes.from_rows(rewards=[[0.0, 1.0], [3.0]])).advantages
    array([-1., -1.,  1.])
    """

    baseline: Literal["mean", "leave_one_out"] = "mean"
    """b: the mean of the group, or of the group's other episodes."""
    scale: Literal["group", "batch", "none"] = "group"
    """c: standard deviation of s over the group, over the whole batch, or 1."""
    ddof: int = 1
    """The standard deviation divides by count - ddof; 0 or 1."""
    eps: float = 1e-6
    """Added to the standard deviation."""
    truncation: Truncation = "terminal"
    """Truncated episodes: `terminal` takes their rewards as they are; `mask` leaves them out of statistics and update,
    and with them an episode that has no other left in its group. `bootstrap` needs a critic and is refused."""

    def __post_init__(self) -> None:
        check_choice("baseline", self.baseline, _FACTORS)
        check_choice("scale", self.scale, _SCALES)
        check_truncation_without_values(self.truncation)
        if self.ddof not in (0, 1):
            raise ValueError(f"ddof must be 0 or 1, got {self.ddof}")
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps}")

    @property
    def needs(self) -> frozenset[Need]:
        """No column beside the rewards."""
        return frozenset()

    def __call__(self, episodes: Episodes, /) -> Estimate:
        """[N] advantages; `keep` where `truncation` is `mask`."""
        survives = survivors(episodes, self.truncation)
        _, group = np.unique(episodes.group, return_inverse=True)
        n = int(group.max(initial=-1)) + 1
        group[~survives] = n  # a group of its own, for what is left out
        size = np.bincount(group, minlength=n + 1)
        ops = ops_of(episodes.rewards)
        s = ops.stop_gradient(segment_sum(episodes.rewards, episodes.episode, episodes.n_episodes))
        deviation = segment_deviation(s, group, n + 1)
        factor = ops.xp.astype(like(_FACTORS[self.baseline](size)[group], s), s.dtype)
        kept = survives & (size[group] > 1)
        A = ops.xp.where(like(kept, s), deviation * factor / _SCALES[self.scale](self, s, group, n), 0.0)
        differs = segment_sum(deviation != 0, group, n + 1)[:n]
        keep = like(kept[episodes.episode], s) if self.truncation == "mask" else None
        return Estimate(advantages=A[episodes.episode], keep=keep, metrics=Metrics(
            zero_variance_groups=Metric(float(ops.xp.sum(differs == 0)), float(n))))


def _scale_by_group(how: GroupBaseline, s: Array, group: np.ndarray, n: int) -> Array:
    return segment_std(s, group, n + 1, how.ddof)[group] + how.eps


def _scale_by_batch(how: GroupBaseline, s: Array, group: np.ndarray, n: int) -> Array:
    return segment_std(s, (group == n).astype(np.int64), 2, how.ddof)[0] + how.eps


_SCALES: Mapping[str, Callable[[GroupBaseline, Array, np.ndarray, int], Array | float]] = {
    "group": _scale_by_group, "batch": _scale_by_batch, "none": lambda how, s, group, n: 1.0}
"""c from outcomes s [E] and groups [E]; group n holds what is left out."""

_FACTORS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda size: np.ones(len(size)), "leave_one_out": lambda size: size / np.maximum(size - 1, 1)}
"""s - b as a multiple of s - mean, by size of the group."""

_BATCH_BASELINES: Mapping[str, Callable[[Array, np.ndarray], Array | float]] = {
    "none": lambda returns, survives: 0.0,
    "batch": lambda returns, survives: segment_mean(returns, (~survives).astype(np.int64), 2)[0]}
"""b from the returns [E] of first actions and the surviving episodes."""
