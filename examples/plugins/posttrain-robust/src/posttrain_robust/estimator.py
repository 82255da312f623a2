"""The estimator `robust`: modified z-scores of outcomes within the answers to a prompt.

One reward far from the others moves a group's mean and deviation, and so the advantages of all its answers; it moves
the median and the median absolute deviation hardly. Knows rewards and groups alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
from posttrain.data import Array, Episodes, Estimate
from posttrain.ops import ops_of, segment_mean, segment_sum
from posttrain.protocols import Need

TO_DEVIATION = 1.482602
"""Standard deviation of a normal distribution, as a multiple of its median absolute deviation."""
MEAN_TO_DEVIATION = 1.253314
"""The same, of its mean absolute deviation: sqrt(pi / 2)."""


@final
@dataclass(frozen=True, slots=True)
class Robust:
    """A = (s - median) / scale, within +-bound; s is the sum of an episode's rewards, the median is its group's.

    The scale is 1.4826 times the group's median absolute deviation (the modified z-score of Iglewicz and Hoaglin 1993);
    where that is 0, since more than half of the group is equal, 1.2533 times its mean absolute deviation (Geary 1935).
    A group of equal rewards has advantages of 0.

    Raises `ValueError` on construction where the bound is out of its range.

    >>> A = Robust()(Episodes.from_rows(rewards=[[0.0], [1.0], [2.0], [3.0], [1000.0]])).advantages
    >>> A.round(2)
    array([-1.35, -0.67,  0.  ,  0.67,  3.5 ])
    """

    bound: float = 3.5
    """Largest advantage, in standard deviations; 3.5 is where the authors begin to speak of outliers."""

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(f"bound must be positive, got {self.bound}; 3.5 is usual")

    @property
    def needs(self) -> frozenset[Need]:
        """No column beside the rewards."""
        return frozenset()

    def __call__(self, episodes: Episodes, /) -> Estimate:
        """[N] advantages, equal for all actions of an episode."""
        s = segment_sum(episodes.rewards, episodes.episode, episodes.n_episodes)
        xp = ops_of(s).xp
        _, group = np.unique(episodes.group, return_inverse=True)
        d = s - _medians(s, group)[group]
        mad, mean = _medians(xp.abs(d), group), segment_mean(xp.abs(d), group, int(group.max()) + 1)
        scale = xp.where(mad > 0, TO_DEVIATION * mad, MEAN_TO_DEVIATION * mean)[group]
        z = xp.where(scale > 0, d / xp.where(scale > 0, scale, 1.0), 0.0)
        return Estimate(xp.clip(z, -self.bound, self.bound)[episodes.episode])


def _medians(x: Array, group: np.ndarray) -> Array:
    """[groups] median of `x` [E] over each group; of an even number the mean of the middle two."""
    xp = ops_of(x).xp
    rows = [xp.sort(x[np.flatnonzero(group == g)]) for g in range(int(group.max()) + 1)]
    return xp.stack([0.5 * row[(len(row) - 1) // 2] + 0.5 * row[len(row) // 2] for row in rows])
