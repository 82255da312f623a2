"""Critic-free estimators: reward-to-go, and the outcome reward against the answers to the same prompt.

Without a critic there is no value to bootstrap from, so a truncated episode is either judged as it stands (`terminal`,
`soft`) or left out (`mask`). Knows nothing about models, losses or how advantages are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from posttrain.data import Array, Episodes, Estimate, Metrics
from posttrain.ops import (
    like,
    ops_of,
    reverse_recurrence,
    segment_deviation,
    segment_mean,
    segment_sum,
    widen,
)
from posttrain.protocols import Need

from posttrain_estimators.fields import (
    WITHOUT_VALUES,
    Truncation,
    check_choice,
    check_fraction,
    check_truncation,
    softened,
    survivors,
)
from posttrain_estimators.normalising import (
    MEMBERS,
    SCALES,
    WHITENING,
    Scale,
    Statistics,
    check_scale,
    deviation_from_others,
    groups_of,
    zero_variance_groups,
)


@final
@dataclass(frozen=True, slots=True)
class Reinforce:
    """A_t = G_t - b with G_t = r_t + gamma G_{t+1} (Williams 1992, Machine Learning 8).

    With `whiten` over tokens it is REINFORCE++ (Hu et al. 2025, arXiv 2501.03262); its KL term is one of the reward.
    The baselines of a group are means of G_0: an episode that has no other in its group gets advantage 0. Raises
    `ValueError` on construction where a field is out of its range.

    >>> Reinforce(gamma=0.5)(Episodes.from_rows(rewards=[[0.0, 1.0], [2.0]])).advantages
    array([0.5, 1. , 2. ])
    >>> Reinforce(baseline="leave_one_out")(Episodes.from_rows(rewards=[[0.0, 1.0], [2.0]])).advantages
    array([-1., -1.,  1.])
    """

    gamma: float = 1.0
    """Discount per action, in [0, 1]."""
    baseline: Literal["none", "batch", "leave_one_out", "group"] = "none"
    """b: nothing, or a mean of the return from the first action: over the episodes of the batch, over the others of
    the group, or over the whole group."""
    whiten: bool = False
    """Standardise over the batch: (A - mean) / sqrt(variance + 1e-8), the variance with divisor n - 1. Left out where
    fewer than two are kept."""
    truncation: Truncation = "terminal"
    """Truncated episodes: `terminal` takes their rewards as they are, `mask` leaves them out of statistics and
    update, `soft` penalises length. `bootstrap` needs a critic and is refused."""
    overlong_length: int = 0
    """`truncation: soft`: actions from which on the penalty is 1, usually ${rollout.max_new_tokens}."""
    overlong_buffer: int = 0
    """`truncation: soft`: the penalty rises linearly over this many actions before `overlong_length`."""
    statistics: Statistics = "token"
    """Of `whiten`: n actions, each counting alike (`token`), or n episodes, each counting alike (`row`): an action of
    an episode of l actions then counts 1 / l in the mean and in the sum of squares."""

    def __post_init__(self) -> None:
        check_fraction("gamma", self.gamma)
        check_choice("baseline", self.baseline, _RETURN_BASELINES)
        check_choice("statistics", self.statistics, WHITENING)
        check_truncation(self.truncation, self.overlong_length, self.overlong_buffer, WITHOUT_VALUES)

    @property
    def needs(self) -> frozenset[Need]:
        """No column beside the rewards."""
        return frozenset()

    def __call__(self, episodes: Episodes, /) -> Estimate:
        """[N] advantages; `keep` where `truncation` is `mask`."""
        episodes = softened(episodes, self.truncation, self.overlong_length, self.overlong_buffer)
        G = reverse_recurrence(self.gamma, episodes.rewards, episodes.offsets)
        b, survives = _RETURN_BASELINES[self.baseline](
            G[episodes.offsets[:-1]], episodes, survivors(episodes, self.truncation))
        return _estimate(G - b, episodes, survives, self)


@final
@dataclass(frozen=True, slots=True)
class ReMax:
    """A_t = G_t - b with b the reward of the greedy answer to the same prompt, G_t = r_t + gamma G_{t+1}.

    Li et al. 2023, arXiv 2310.10505, algorithm 1. Reads `Episodes.greedy_rewards` [E]; an over-long penalty is one of
    the sampled answers alone. Raises `ValueError` on construction where a field is out of its range, and on a batch
    without greedy rewards.

    >>> ReMax()(Episodes(offsets=np.array([0, 2]), rewards=np.array([0.0, 1.0]), terminated=np.array([True]),
    ...                  group=np.array([0]), greedy_rewards=np.array([0.75]))).advantages
    array([0.25, 0.25])
    """

    gamma: float = 1.0
    """Discount per action, in [0, 1]."""
    whiten: bool = False
    """Standardise over the batch: (A - mean) / sqrt(variance + 1e-8), the variance with divisor n - 1. Left out where
    fewer than two are kept."""
    statistics: Statistics = "token"
    """Of `whiten`: n actions, each counting alike (`token`), or n episodes, each counting alike (`row`): an action of
    an episode of l actions then counts 1 / l in the mean and in the sum of squares."""
    truncation: Truncation = "terminal"
    """Truncated episodes: `terminal` takes their rewards as they are, `mask` leaves them out of statistics and
    update, `soft` penalises length. `bootstrap` needs a critic and is refused."""
    overlong_length: int = 0
    """`truncation: soft`: actions from which on the penalty is 1, usually ${rollout.max_new_tokens}."""
    overlong_buffer: int = 0
    """`truncation: soft`: the penalty rises linearly over this many actions before `overlong_length`."""

    def __post_init__(self) -> None:
        check_fraction("gamma", self.gamma)
        check_choice("statistics", self.statistics, WHITENING)
        check_truncation(self.truncation, self.overlong_length, self.overlong_buffer, WITHOUT_VALUES)

    @property
    def needs(self) -> frozenset[Need]:
        """The reward of a greedy answer to each prompt."""
        return frozenset({Need.GREEDY_REWARDS})

    def __call__(self, episodes: Episodes, /) -> Estimate:
        """[N] advantages; `keep` where `truncation` is `mask`."""
        if episodes.greedy_rewards is None:
            raise ValueError("remax needs Episodes.greedy_rewards, the reward of the greedy answer to each prompt; "
                             "use rloo or grpo where only sampled answers are rewarded")
        episodes = softened(episodes, self.truncation, self.overlong_length, self.overlong_buffer)
        G = reverse_recurrence(self.gamma, episodes.rewards, episodes.offsets)
        b = ops_of(G).stop_gradient(widen(episodes.greedy_rewards))
        return _estimate(G - b[episodes.episode], episodes, survivors(episodes, self.truncation), self)


@final
@dataclass(frozen=True, slots=True)
class GroupBaseline:
    """A = (s - b) / c for all actions of an episode, s the sum of its rewards, b and c from its group.

    GRPO (Shao et al. 2024, arXiv 2402.03300): b the group's mean, c = std + eps. Dr. GRPO (Liu et al. 2025, arXiv
    2503.20783): c = 1. RLOO (Kool et al. 2019): b the mean of the others, c = 1, which is G / (G - 1) times Dr. GRPO.
    OPO (Hao et al. 2025, arXiv 2505.23585): b = sum(l s) / sum(l) with l the actions of an episode, c = 1.
    REINFORCE++ with a baseline (Hu et al. 2025, arXiv 2501.03262): b the group's mean, c = 1, then whitened.

    The advantage is exactly 0 where all rewards of a group are equal, so also where an episode has no other to be
    compared with; whitening then takes the batch's mean from every group of two or more. Raises `ValueError` on
    construction where a field is out of its range.

    >>> GroupBaseline(scale="none")(Episodes.from_rows(rewards=[[0.0, 1.0], [3.0]])).advantages
    array([-1., -1.,  1.])
    """

    baseline: Literal["mean", "leave_one_out", "length_weighted"] = "mean"
    """b: the mean of the group, of the group's other episodes, or of the group with each episode weighted by its
    number of actions."""
    scale: Scale = "group"
    """c: standard deviation of s over the group, over the whole batch, or 1."""
    ddof: int = 1
    """The standard deviation divides by count - ddof; 0 or 1."""
    eps: float = 1e-6
    """Added to the standard deviation."""
    truncation: Truncation = "terminal"
    """Truncated episodes: `terminal` takes their rewards as they are; `mask` leaves them out of statistics and update,
    and with them an episode that has no other left in its group; `soft` penalises length. `bootstrap` needs a critic
    and is refused."""
    overlong_length: int = 0
    """`truncation: soft`: actions from which on the penalty is 1, usually ${rollout.max_new_tokens}."""
    overlong_buffer: int = 0
    """`truncation: soft`: the penalty rises linearly over this many actions before `overlong_length`."""
    whiten: bool = False
    """Standardise A over the batch: (A - mean) / sqrt(variance + 1e-8), the variance with divisor n - 1. Left out where
    fewer than two are kept."""
    statistics: Statistics = "row"
    """Of `scale: batch` and of `whiten`: every episode counts alike (`row`), or every action (`token`)."""
    incomplete: Literal["survivors", "drop"] = "survivors"
    """A group of which `truncation: mask` leaves an episode out: compare those that are left, or leave all out."""

    def __post_init__(self) -> None:
        check_choice("baseline", self.baseline, _DEVIATIONS)
        check_scale(self.scale, self.ddof, self.eps)
        check_choice("statistics", self.statistics, WHITENING)
        check_choice("incomplete", self.incomplete, _INCOMPLETE)
        check_truncation(self.truncation, self.overlong_length, self.overlong_buffer, WITHOUT_VALUES)

    @property
    def needs(self) -> frozenset[Need]:
        """No column beside the rewards."""
        return frozenset()

    def __call__(self, episodes: Episodes, /) -> Estimate:
        """[N] advantages; `keep` where `truncation` is `mask`."""
        episodes = softened(episodes, self.truncation, self.overlong_length, self.overlong_buffer)
        survives = _INCOMPLETE[self.incomplete](survivors(episodes, self.truncation), episodes)
        group, n = groups_of(episodes, survives)
        kept = survives & (np.bincount(group, minlength=n + 1)[group] > 1)
        ops = ops_of(episodes.rewards)
        s = ops.stop_gradient(segment_sum(episodes.rewards, episodes.episode, episodes.n_episodes))
        deviation = segment_deviation(s, group, n + 1)
        c = SCALES[self.scale](s, group, n, self.ddof, self.eps, MEMBERS[self.statistics](episodes))
        A = ops.xp.where(like(kept, s), _DEVIATIONS[self.baseline](deviation, episodes, group, n) / c, 0.0)
        return _estimate(A[episodes.episode], episodes, kept, self, zero_variance_groups(deviation, group, n))


def _estimate(A: Array, episodes: Episodes, kept: np.ndarray, how: Reinforce | ReMax | GroupBaseline,
              metrics: Metrics | None = None) -> Estimate:
    """`A` [N] over the kept episodes [E], whitened where asked; `keep` where `truncation` is `mask`."""
    keep = kept[episodes.episode]
    white = WHITENING[how.statistics](A, episodes, kept) if how.whiten else ops_of(A).xp.where(like(keep, A), A, 0.0)
    return Estimate(advantages=white, keep=like(keep, A) if how.truncation == "mask" else None,
                    metrics=metrics or Metrics())


def _length_weighted(deviation: Array, episodes: Episodes, group: np.ndarray, n: int) -> Array:
    lengths = ops_of(deviation).xp.astype(like(episodes.lengths, deviation), deviation.dtype)
    total = segment_sum(lengths, group, n + 1)[group]
    return deviation - segment_sum(lengths * deviation, group, n + 1)[group] / total


_DEVIATIONS: Mapping[str, Callable[[Array, Episodes, np.ndarray, int], Array]] = {
    "mean": lambda deviation, episodes, group, n: deviation,
    "leave_one_out": lambda deviation, episodes, group, n: deviation_from_others(deviation, group),
    "length_weighted": _length_weighted}
"""s - b [E] from s minus the mean of its group; 0 where that is 0 in the whole group."""

_INCOMPLETE: Mapping[str, Callable[[np.ndarray, Episodes], np.ndarray]] = {
    "survivors": lambda survives, episodes: survives,
    "drop": lambda survives, episodes: survives & ~np.isin(episodes.group, episodes.group[~survives])}
"""[E] bool, episodes that take part, from those that are not left out by themselves."""


def _batch_mean(first: Array, episodes: Episodes, survives: np.ndarray) -> tuple[Array, np.ndarray]:
    return segment_mean(first, (~survives).astype(np.int64), 2)[0], survives


def _group_mean(first: Array, episodes: Episodes, survives: np.ndarray,
                others: bool = False) -> tuple[Array, np.ndarray]:
    """As first - (first - b), which gives back the common number, not the rounded mean, where all are equal."""
    group, n = groups_of(episodes, survives)
    deviation = segment_deviation(first, group, n + 1)
    b = first - (deviation_from_others(deviation, group) if others else deviation)
    return b[episodes.episode], survives & (np.bincount(group, minlength=n + 1)[group] > 1)


_RETURN_BASELINES: Mapping[str, Callable[[Array, Episodes, np.ndarray], tuple[Array | float, np.ndarray]]] = {
    "none": lambda first, episodes, survives: (0.0, survives), "batch": _batch_mean, "group": _group_mean,
    "leave_one_out": lambda first, episodes, survives: _group_mean(first, episodes, survives, others=True)}
"""b, one number or [N], and the episodes [E] that have one, from the returns [E] of first actions and survivors."""
