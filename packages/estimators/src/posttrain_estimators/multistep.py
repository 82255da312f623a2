"""Estimators that look several steps ahead through a critic: temporal differences around one reverse recurrence.

Knows values as numbers, not where they come from; knows no model and no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
from posttrain.data import Array, Episodes, Estimate, Metric, Metrics, to_numpy
from posttrain.ops import like, ops_of, reverse_recurrence, whiten, widen
from posttrain.protocols import Need

from posttrain_estimators.fields import Truncation, check_choice, check_fraction, survivors


@final
@dataclass(frozen=True, slots=True)
class GAE:
    """A_t = delta_t + gamma lam A_{t+1} with delta_t = r_t + gamma v_{t+1} - v_t, and targets A + v.

    Schulman et al. 2016, equation 16. The value after the last action is 0 where the episode terminated, else what
    `truncation` says. Raises `ValueError` on construction where a field is out of its range, and on a batch without
    the values it needs.

    >>> episodes = Episodes.from_rows(rewards=[[0.0, 1.0]], values=[[0.5, 0.5]])
    >>> GAE(gamma=1.0, lam=0.5)(episodes).advantages
    array([0.25, 0.5 ])
    """

    gamma: float = 1.0
    """Discount per action, in [0, 1]."""
    lam: float = 0.95
    """Weight of longer returns, in [0, 1]: 0 is one step, 1 the whole return."""
    whiten: bool = False
    """Standardise the advantages over the actions of the batch; never the targets. Off, so that an advantage is what
    the equation says and does not depend on the rest of the batch; PPO recipes turn it on."""
    truncation: Truncation = "bootstrap"
    """Truncated episodes: `bootstrap` continues with the value of the state after the last action, `terminal` ends
    there, `mask` leaves the episode out of policy update, value update and whitening."""

    def __post_init__(self) -> None:
        check_fraction("gamma", self.gamma)
        check_fraction("lam", self.lam)
        check_choice("truncation", self.truncation, _FINAL_VALUES)

    @property
    def needs(self) -> frozenset[Need]:
        """Values and bootstrap values."""
        return frozenset({Need.VALUES})

    def __call__(self, episodes: Episodes, /) -> Estimate:
        """[N] advantages and targets; `keep` where `truncation` is `mask`."""
        if episodes.values is None:
            raise ValueError("gae needs Episodes.values, the critic's value of the state before each action; "
                             "use grpo, rloo or reinforce where there is no critic")
        ops = ops_of(episodes.values)
        r, v = (ops.stop_gradient(widen(column)) for column in (episodes.rewards, episodes.values))
        delta = r + self.gamma * next_values(v, _FINAL_VALUES[self.truncation](episodes), episodes) - v
        A = reverse_recurrence(self.gamma * self.lam, delta, episodes.offsets)
        targets = A + v
        keep = survivors(episodes, self.truncation)[episodes.episode]
        return Estimate(
            advantages=whiten(A, keep) if self.whiten else ops.xp.where(like(keep, A), A, 0.0),
            targets=targets, keep=like(keep, A) if self.truncation == "mask" else None,
            metrics=explained_variance(targets, v, keep))


def next_values(v: Array, final: Array, episodes: Episodes) -> Array:
    """[N] value of the state after each action, from those before it [N] and those after each last one [E]."""
    following = np.arange(1, len(v) + 1)
    following[-1:] = 0  # behind the end of the batch; like every last action it takes `final`
    is_last = np.zeros(len(v), bool)
    is_last[episodes.offsets[1:] - 1] = True
    return ops_of(v).xp.where(like(is_last, v), final[episodes.episode], v[following])


def explained_variance(targets: Array, v: Array, keep: np.ndarray) -> Metrics:
    """1 - Var(G - v) / Var(G) over the kept actions; nothing where the targets do not vary."""
    G, residual = (to_numpy(column).astype(np.float64)[keep] for column in (targets, targets - v))
    if len(G) == 0 or G.max() == G.min():
        return Metrics()
    return Metrics(explained_variance=Metric(1.0 - float(residual.var() / G.var()), reduction="last"))


def _bootstrap(episodes: Episodes) -> Array:
    b = episodes.bootstrap_values
    if b is None and not episodes.terminated.all():
        raise ValueError(f"episode {np.flatnonzero(~episodes.terminated)[0]} is truncated and there are no "
                         "bootstrap_values; give them, or choose truncation 'terminal' or 'mask'")
    return _zero(episodes) if b is None else ops_of(b).xp.where(like(episodes.terminated, b), 0.0, widen(b))


def _zero(episodes: Episodes) -> Array:
    return ops_of(episodes.rewards).xp.zeros_like(widen(episodes.rewards[:episodes.n_episodes]))


_FINAL_VALUES: Mapping[str, Callable[[Episodes], Array]] = {"bootstrap": _bootstrap, "terminal": _zero, "mask": _zero}
"""[E] value of the state after the last action of each episode."""
