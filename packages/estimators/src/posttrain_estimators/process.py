"""The critic-free estimator of process rewards: steps of answers, compared with all steps of their group.

Knows where steps end and what they earned, not who judged them; knows no model and no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from posttrain.data import Array, Episodes, Estimate, to_numpy
from posttrain.ops import like, ops_of, reverse_recurrence, segment_deviation, segment_sum, widen
from posttrain.protocols import Need

from posttrain_estimators.fields import WITHOUT_VALUES, Truncation, check_choice, check_truncation, softened, survivors
from posttrain_estimators.normalising import SCALES, Scale, check_scale, groups_of, zero_variance_groups


@final
@dataclass(frozen=True, slots=True)
class ProcessReward:
    """A_t = sum of z_j over the steps j that end at or after action t, z = (r - mean) / c over the steps of a group.

    Process supervision of GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.3): r are the rewards of all steps of
    all episodes of a group, c = std + eps. The advantage is exactly 0 where all steps of a group earned the same, so
    also where there is one alone, and behind the last step of an episode. Raises `ValueError` on construction where a
    field is out of its range, and on a batch without turns where a step is a turn.

    >>> ProcessReward(scale="none")(Episodes.from_rows(rewards=[[0.0, 1.0, 3.0], [5.0, 0.0]])).advantages
    array([-2., -2.,  0.,  2.,  0.])
    """

    step: Literal["reward", "turn"] = "reward"
    """A step ends at each action with a reward that is not 0, or it is a turn, whose reward is the sum over its
    actions. Take `turn` where a step may earn 0."""
    scale: Scale = "group"
    """c: standard deviation of r over the steps of the group, over those of the whole batch, or 1."""
    ddof: int = 1
    """The standard deviation divides by count - ddof; 0 or 1."""
    eps: float = 1e-6
    """Added to the standard deviation."""
    truncation: Truncation = "terminal"
    """Truncated episodes: `terminal` takes their rewards as they are; `mask` leaves them out of statistics and update,
    and with them a group that has fewer than two steps left; `soft` penalises length, at the last action. `bootstrap`
    needs a critic and is refused."""
    overlong_length: int = 0
    """`truncation: soft`: actions from which on the penalty is 1, usually ${rollout.max_new_tokens}."""
    overlong_buffer: int = 0
    """`truncation: soft`: the penalty rises linearly over this many actions before `overlong_length`."""

    def __post_init__(self) -> None:
        check_choice("step", self.step, _STEPS)
        check_scale(self.scale, self.ddof, self.eps)
        check_truncation(self.truncation, self.overlong_length, self.overlong_buffer, WITHOUT_VALUES)

    @property
    def needs(self) -> frozenset[Need]:
        """The turn of each action, where a step is a turn."""
        return frozenset({Need.TURN} if self.step == "turn" else ())

    def __call__(self, episodes: Episodes, /) -> Estimate:
        """[N] advantages; `keep` where `truncation` is `mask`."""
        episodes = softened(episodes, self.truncation, self.overlong_length, self.overlong_buffer)
        earned, ends = _STEPS[self.step](episodes)
        survives = survivors(episodes, self.truncation)
        group, n = groups_of(episodes, survives)
        ids = np.where(ends, group[episodes.episode], n)
        deviation = segment_deviation(earned, ids, n + 1)
        c = SCALES[self.scale](earned, ids, n, self.ddof, self.eps, np.arange(len(ids)))
        z = ops_of(earned).xp.where(like(ids < n, earned), deviation / c, 0.0)
        kept = survives & (np.bincount(ids, minlength=n + 1)[group] > 1)
        return Estimate(
            advantages=reverse_recurrence(1.0, z, episodes.offsets),
            keep=like(kept[episodes.episode], z) if self.truncation == "mask" else None,
            metrics=zero_variance_groups(deviation, ids, n))


def _by_reward(episodes: Episodes) -> tuple[Array, np.ndarray]:
    r = ops_of(episodes.rewards).stop_gradient(widen(episodes.rewards))
    return r, to_numpy(r) != 0


def _by_turn(episodes: Episodes) -> tuple[Array, np.ndarray]:
    if episodes.turn is None:
        raise ValueError("process with step 'turn' needs Episodes.turn, the turn of each action; "
                         "choose step 'reward' where answers have one turn")
    ends = np.ones(len(episodes.turn), bool)
    ends[:-1] = (np.diff(episodes.turn) != 0) | (np.diff(episodes.episode) != 0)
    number = np.cumsum(ends) - ends
    r = ops_of(episodes.rewards).stop_gradient(episodes.rewards)
    return segment_sum(r, number, int(ends.sum()))[number], ends


_STEPS: Mapping[str, Callable[[Episodes], tuple[Array, np.ndarray]]] = {"reward": _by_reward, "turn": _by_turn}
"""[N] reward of the step of an action, where one ends there, and [N] whether one ends there."""
