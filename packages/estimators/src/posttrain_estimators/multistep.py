"""Estimators that look ahead through a critic, one or many steps: temporal differences around one reverse recurrence.

All of them are one sum, A_t = sum over l of gamma^l W_l delta_(t+l) with delta_t = r_t + gamma v_(t+1) - v_t, where W_l
is the share of returns that are longer than l steps; `mixtures.py` has those whose W is no plain power. Knows values as
numbers, not where they come from; knows no model and no loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, final

import numpy as np
from posttrain.data import Array, Episodes, Estimate, Metric, Metrics, to_numpy
from posttrain.ops import Framework, framework_of, like, ops_of, reverse_recurrence, whiten, widen
from posttrain.protocols import Need

from posttrain_estimators.bootstrapping import FINAL_VALUES, Bootstrap, bootstrap_needs, final_values
from posttrain_estimators.fields import (
    Truncation,
    check_choice,
    check_fraction,
    check_truncation,
    softened,
    survivors,
)


@final
@dataclass(frozen=True, slots=True)
class GAE:
    """A_t = delta_t + gamma lam A_{t+1} with delta_t = r_t + gamma v_{t+1} - v_t, and targets A + v.

    Schulman et al. 2016, arXiv 1506.02438, equation 16. Targets with a lambda of their own: VC-PPO (Yuan et al. 2025,
    arXiv 2503.01491). A lambda by length: VAPO (Yue et al. 2025, arXiv 2504.05118). The value after the last action is
    0 where the episode terminated, else what `truncation` and `bootstrap` say. Raises `ValueError` on construction
    where a field is out of its range, and on a batch without the values it needs.

    >>> episodes = Episodes.from_rows(rewards=[[0.0, 1.0]], values=[[0.5, 0.5]])
    >>> GAE(gamma=1.0, lam=0.5)(episodes).advantages
    array([0.25, 0.5 ])
    >>> GAE(gamma=1.0, lam=0.5, lam_critic=1.0)(episodes).targets
    array([1., 1.])
    """

    gamma: float = 1.0
    """Discount per action, in [0, 1]."""
    lam: float = 0.95
    """Weight of longer returns, in [0, 1]: 0 is one step, 1 the whole return."""
    lam_critic: float | None = None
    """The same for the targets of the critic; VC-PPO takes 1. None: that of the advantages, so targets are A + v."""
    length_adaptive: float = 0.0
    """alpha: where positive, an episode of l actions takes lam = 1 - 1 / (alpha l), at least `lam_min`, in place of
    `lam`; VAPO takes 0.05. 0: off."""
    lam_min: float = 0.0
    """Smallest lambda by length, in [0, 1]: a short episode, l < 1 / alpha, would get a negative one."""
    whiten: bool = False
    """Standardise the advantages over the actions of the batch; never the targets. Off, so that an advantage is what
    the equation says and does not depend on the rest of the batch; PPO recipes turn it on."""
    truncation: Truncation = "bootstrap"
    """Truncated episodes: `bootstrap` continues with the value of the state after the last action, `terminal` ends
    there, `mask` leaves the episode out of policy update, value update and whitening, `soft` ends there and takes the
    overlong penalty from the last reward of every episode."""
    bootstrap: Bootstrap = "value"
    """Where `truncation` is `bootstrap`, what the state after the last action is worth: the critic's `value`, the
    `score` of a reward with `bootstrap: true`, or `zero`."""
    overlong_length: int = 0
    """Number of actions from which the penalty of `truncation: soft` is 1."""
    overlong_buffer: int = 0
    """The penalty of `truncation: soft` rises from 0 over this many actions before `overlong_length`."""

    def __post_init__(self) -> None:
        check_critic(self)
        check_fraction("lam", self.lam)
        check_fraction("lam_min", self.lam_min)
        if self.lam_critic is not None:
            check_fraction("lam_critic", self.lam_critic)
        if not 0.0 <= self.length_adaptive < math.inf:
            raise ValueError("length_adaptive must be 0 (off) or the positive alpha of lam = 1 - 1 / (alpha length), "
                             f"such as 0.05; got {self.length_adaptive}")
        if self.lam_min and not self.length_adaptive:
            raise ValueError("lam_min is the smallest lambda by length; set length_adaptive, or leave lam_min out")

    @property
    def needs(self) -> frozenset[Need]:
        """Values and bootstrap values; final scores where they stand in for the latter."""
        return critic_needs(self)

    def __call__(self, episodes: Episodes, /) -> Estimate:
        """[N] advantages and targets; `keep` where `truncation` is `mask`."""
        delta, v = differences(self, episodes)
        decay = self.gamma * self.lam if self.length_adaptive == 0 else self._decay_by_length(episodes, delta)
        A = reverse_recurrence(decay, delta, episodes.offsets)
        critic = A if self.lam_critic is None else reverse_recurrence(
            self.gamma * self.lam_critic, delta, episodes.offsets)
        del delta  # its memory is enough for the targets
        return estimate_of(self, A, critic + v, v, episodes)

    def _decay_by_length(self, episodes: Episodes, delta: Array) -> Array:
        """[N] gamma times the lambda of each action's episode."""
        lam = np.maximum(self.lam_min, 1.0 - 1.0 / (self.length_adaptive * episodes.lengths))
        return ops_of(delta).xp.astype(like(np.repeat(self.gamma * lam, episodes.lengths), delta), delta.dtype)


@final
@dataclass(frozen=True, slots=True)
class TDLambda:
    """G_t = r_t + gamma ((1 - lam) v_{t+1} + lam G_{t+1}), targets G and advantages G - v.

    The lambda-return (Sutton and Barto 2018, section 12.1) in its recursive form; behind the last action, v and G are
    0 where the episode terminated, else what `truncation` and `bootstrap` say. In exact arithmetic the same as `GAE`;
    `td0` and `monte_carlo` are its ends, lam 0 and 1.
    Raises `ValueError` on construction where a field is out of its range, and on a batch without the values it needs.

    >>> episodes = Episodes.from_rows(rewards=[[0.0, 1.0]], values=[[0.5, 0.5]])
    >>> TDLambda(lam=0.5)(episodes).targets
    array([0.75, 1.  ])
    """

    gamma: float = 1.0
    """Discount per action, in [0, 1]."""
    lam: float = 0.95
    """Weight of longer returns, in [0, 1]: 0 is one step, 1 the whole return."""
    whiten: bool = False
    """Standardise the advantages over the actions of the batch; never the targets."""
    truncation: Truncation = "bootstrap"
    """Truncated episodes: as in `GAE`."""
    bootstrap: Bootstrap = "value"
    """What the state after the last action of a truncated episode is worth: as in `GAE`."""
    overlong_length: int = 0
    """Number of actions from which the penalty of `truncation: soft` is 1."""
    overlong_buffer: int = 0
    """The penalty of `truncation: soft` rises from 0 over this many actions before `overlong_length`."""

    def __post_init__(self) -> None:
        check_critic(self)
        check_fraction("lam", self.lam)

    @property
    def needs(self) -> frozenset[Need]:
        """Values and bootstrap values; final scores where they stand in for the latter."""
        return critic_needs(self)

    def __call__(self, episodes: Episodes, /) -> Estimate:
        """[N] advantages and targets; `keep` where `truncation` is `mask`."""
        r, v, last = columns_of(self, episodes)
        # G behind the last action is v there: both shares of it go into its step, as the recurrence has no next action
        steps = one_step(self.gamma, r, (1.0 - self.lam) * v, last, episodes)
        G = reverse_recurrence(self.gamma * self.lam, steps, episodes.offsets)
        return estimate_of(self, G - v, G, v, episodes)


class WithCritic(Protocol):
    """The fields that all estimators with a critic share."""

    @property
    def gamma(self) -> float: ...
    @property
    def whiten(self) -> bool: ...
    @property
    def truncation(self) -> Truncation: ...
    @property
    def bootstrap(self) -> Bootstrap: ...
    @property
    def overlong_length(self) -> int: ...
    @property
    def overlong_buffer(self) -> int: ...


def check_critic(how: WithCritic) -> None:
    """Raise `ValueError` where a shared field is out of its range."""
    check_fraction("gamma", how.gamma)
    check_truncation(how.truncation, how.overlong_length, how.overlong_buffer)
    check_choice("bootstrap", how.bootstrap, FINAL_VALUES)


def critic_needs(how: WithCritic) -> frozenset[Need]:
    """Values and bootstrap values; final scores where they stand in for the latter."""
    return frozenset({Need.VALUES}) | bootstrap_needs(how.truncation, how.bootstrap)


def columns_of(how: WithCritic, episodes: Episodes) -> tuple[Array, Array, Array]:
    """Rewards [N], values [N] and the values after each last action [E], of one dtype and without a gradient.

    Raises `ValueError` naming the column that is missing.
    """
    if episodes.values is None:
        raise ValueError(f"{type(how).__name__} needs Episodes.values, the critic's value of the state before each "
                         "action; use grpo, rloo or reinforce where there is no critic")
    episodes = softened(episodes, how.truncation, how.overlong_length, how.overlong_buffer)
    ops = ops_of(episodes.rewards)
    columns = (episodes.rewards, episodes.values, final_values(episodes, how.truncation, how.bootstrap))
    dtype = ops.xp.promote_types(widen(columns[0]).dtype, widen(columns[1]).dtype)
    r, v, last = (ops.stop_gradient(ops.xp.astype(column, dtype, copy=False)) for column in columns)
    return r, v, last


def one_step(gamma: float, r: Array, v: Array, last: Array, episodes: Episodes) -> Array:
    """[N] r_t + gamma v_{t+1}, a new array."""
    steps = next_values(v, last, episodes)
    steps *= gamma  # in place, or a new array where the framework has no such thing
    steps += r
    return steps


def differences(how: WithCritic, episodes: Episodes) -> tuple[Array, Array]:
    """Temporal differences delta_t = r_t + gamma v_{t+1} - v_t, and v, both [N]."""
    r, v, last = columns_of(how, episodes)
    delta = one_step(how.gamma, r, v, last, episodes)
    delta -= v
    return delta, v


def estimate_of(how: WithCritic, A: Array, targets: Array, v: Array, episodes: Episodes) -> Estimate:
    """Advantages whitened where wanted and 0 where masked, targets, `keep` where `truncation` is `mask`."""
    kept = np.repeat(survivors(episodes, how.truncation), episodes.lengths) if how.truncation == "mask" else None
    metrics = explained_variance(targets, v, kept)
    if how.whiten:
        A = whiten(A, kept)
    elif kept is not None:
        A = ops_of(A).xp.where(like(kept, A), A, 0.0)
    return Estimate(advantages=A, targets=targets, keep=None if kept is None else like(kept, A), metrics=metrics)


def next_values(v: Array, final: Array, episodes: Episodes) -> Array:
    """[N] value of the state after each action, a new array, from those before it [N] and after each last one [E]."""
    xp = ops_of(v).xp
    following = xp.concatenate([v[1:], v[:1]])  # wrong for last actions alone
    return _REPLACED[framework_of(v)](following, like(episodes.offsets[1:] - 1, v),
                                      xp.astype(final, v.dtype, copy=False))


def explained_variance(targets: Array, v: Array, keep: np.ndarray | None = None) -> Metrics:
    """1 - Var(G - v) / Var(G) over the kept actions, None all; nothing where the targets do not vary."""
    kept = slice(None) if keep is None else keep
    G, v = to_numpy(targets)[kept], to_numpy(v)[kept]
    varies = len(G) and _variance_of_difference(G, np.broadcast_to(G[0], G.shape))
    if not varies:
        return Metrics()
    return Metrics(explained_variance=Metric(1.0 - _variance_of_difference(G, v) / varies, reduction="last"))


def _variance_of_difference(x: np.ndarray, y: np.ndarray) -> float:
    """Var(x - y) = the mean variance within windows of the cache's size + the variance of their means; exactly 0 where
    x and y are equal."""
    windows = range(0, len(x), _WINDOW)
    means, squares = np.zeros(len(windows)), np.zeros(len(windows))
    for k, start in enumerate(windows):
        d = x[start:start + _WINDOW] - y[start:start + _WINDOW]
        means[k] = d.mean()
        d -= d.dtype.type(means[k])
        squares[k] = d @ d
    n = np.minimum(_WINDOW, len(x) - np.asarray(windows))
    return float(squares.sum() + n @ (means - means @ n / len(x)) ** 2) / len(x)


_WINDOW = 1 << 16
"""Actions whose float32 numbers fit into the cache."""


def _assigned(x: Array, at: Array, numbers: Array) -> Array:
    x[at] = numbers
    return x


_REPLACED: Mapping[Framework, Callable[[Array, Array, Array], Array]] = {
    "numpy": _assigned, "torch": _assigned, "jax": lambda x, at, numbers: x.at[at].set(numbers)}
"""An array with the numbers at some indices replaced; NumPy and torch do it in place."""
