"""What stands behind the last action of an episode: nothing where it terminated, else what the estimator's fields say.

Knows the columns of episodes alone, not which return is built on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from posttrain.data import Array, Episodes
from posttrain.ops import like, ops_of, widen
from posttrain.protocols import Need

Bootstrap = Literal["value", "score", "zero"]
"""Value of the state after the last action of a truncated episode: the critic's, the score that a reward with
`bootstrap: true` gives to the unfinished episode, or 0."""


def bootstrap_needs(truncation: str, bootstrap: Bootstrap) -> frozenset[Need]:
    """The column that the final values are read from, where that is not the critic's."""
    return frozenset({Need.FINAL_SCORES} if (truncation, bootstrap) == ("bootstrap", "score") else ())


def final_values(episodes: Episodes, truncation: str, bootstrap: Bootstrap = "value") -> Array:
    """[E] value of the state after each last action: 0 where the episode terminated, and everywhere but under
    `truncation: bootstrap`. Raises `ValueError` naming the column that is missing."""
    return FINAL_VALUES[bootstrap](episodes) if truncation == "bootstrap" else _zero(episodes)


def _of_critic(episodes: Episodes) -> Array:
    return _unless_terminated(episodes, episodes.bootstrap_values, "bootstrap_values")


def _of_reward(episodes: Episodes) -> Array:
    return _unless_terminated(episodes, episodes.final_scores, "final_scores")


def _unless_terminated(episodes: Episodes, column: Array | None, name: str) -> Array:
    if column is None:
        if episodes.terminated.all():
            return _zero(episodes)
        raise ValueError(f"episode {np.flatnonzero(~episodes.terminated)[0]} is truncated and there are no {name}; "
                         "give them, or choose truncation 'terminal' or 'mask'")
    ops = ops_of(column)
    return ops.xp.where(like(episodes.terminated, column), 0.0, ops.stop_gradient(widen(column)))


def _zero(episodes: Episodes) -> Array:
    return ops_of(episodes.rewards).xp.zeros_like(widen(episodes.rewards[:episodes.n_episodes]))


FINAL_VALUES: Mapping[Bootstrap, Callable[[Episodes], Array]] = {
    "value": _of_critic, "score": _of_reward, "zero": _zero}
"""[E] value of the state after the last action of each episode that goes on behind it."""
