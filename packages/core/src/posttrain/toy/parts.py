"""The simplest estimator and the simplest objective: REINFORCE against the mean of a group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import numpy as np

from posttrain.data import Array, Counts, Episodes, Estimate, Loss, MicroBatch, Term, TokenOutputs, Weights
from posttrain.ops import Ops, segment_deviation, segment_sum
from posttrain.protocols import Need, Output


@final
@dataclass(frozen=True, slots=True)
class GroupMean:
    """A = s - mean of s over the answers to the same prompt, s the sum of an episode's rewards.

    >>> GroupMean()(Episodes.from_rows(rewards=[[0.0, 1.0], [3.0]])).advantages
    array([-1., -1.,  1.])
    """

    @property
    def needs(self) -> frozenset[Need]:
        """No column beside the rewards."""
        return frozenset()

    def __call__(self, episodes: Episodes, /) -> Estimate:
        s = segment_sum(episodes.rewards, episodes.episode, episodes.n_episodes)
        _, group = np.unique(episodes.group, return_inverse=True)
        return Estimate(segment_deviation(s, group, int(group.max()) + 1)[episodes.episode])


@final
@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """-sum(weight A log pi), weights 1 / number of actions: REINFORCE (Williams 1992)."""

    slots: tuple[str, ...] = ("main",)
    """One, or one per reward column where gradients are combined."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.ADVANTAGES})

    @property
    def outputs(self) -> frozenset[Output]:
        return frozenset({Output.LOGPROBS})

    @property
    def unit(self) -> Literal["action"]:
        return "action"

    def weights(self, counts: Counts) -> Weights:
        """[N] 1 / actions of all ranks."""
        w = np.full(int(counts.episode_actions.sum()), 1.0 / max(1, counts.actions))
        return Weights(weight=w, kl_weight=w)

    def __call__(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Array]) -> Loss:
        if batch.advantages is None:
            raise ValueError("objective 'toy' needs MicroBatch.advantages")
        rows = ops.xp.reshape(batch.advantages, (len(self.slots), -1))
        return Loss({slot: Term(-ops.xp.sum(batch.weight * rows[i] * out.logprobs), slot=slot)
                     for i, slot in enumerate(self.slots)})
