"""Estimators that mix returns of several lengths otherwise than by a constant lambda: n-step returns and UPGO.

Knows weights and windows on the axis of actions; what an action is worth comes from `multistep.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from posttrain.data import Array, Episodes, Estimate
from posttrain.ops import like, ops_of, reverse_recurrence
from posttrain.protocols import Need

from posttrain_estimators.bootstrapping import Bootstrap
from posttrain_estimators.fields import Truncation, check_choice, check_fraction
from posttrain_estimators.multistep import check_critic, critic_needs, differences, estimate_of

Mixture = Literal["fixed", "uniform", "geometric", "given"]
"""How long a return is: n steps; 1 to n alike; l+1 or more with probability lam^l, at most n; or by given weights."""


@final
@dataclass(frozen=True, slots=True)
class NStep:
    """A_t = sum over l < n of gamma^l W_l delta_{t+l} with delta_t = r_t + gamma v_{t+1} - v_t, and targets A + v.

    W_l is the probability that a return is longer than l steps: 1 (`fixed`; Sutton and Barto 2018, section 7.1),
    1 - l / n (`uniform`), lam^l (`geometric`: the lambda-return truncated at n, section 12.3), or the sum of `weights`
    behind the l-th (`given`; compound returns, section 12.1). A return longer than what is left of its episode is the
    whole return with the final bootstrap: no n is too large. `fixed`, `uniform` and `geometric` take O(N log n),
    `given` O(N len(weights)).

    Raises `ValueError` on construction where a field is out of its range, and on a batch without the values it needs.

    >>> episodes = Episodes.from_rows(rewards=[[0.0, 0.0, 1.0]], values=[[0.25, 0.5, 0.75]])
    >>> NStep(n=2)(episodes).targets
    array([0.75, 1.  , 1.  ])
    >>> NStep(mixture="given", weights=(0.5, 0.0, 0.5))(episodes).targets
    array([0.75 , 0.875, 1.   ])
    """

    gamma: float = 1.0
    """Discount per action, in [0, 1]."""
    n: int = 5
    """Steps of the longest return, at least 1; `given` has as many as weights instead."""
    mixture: Mixture = "fixed"
    """Which returns are mixed: `fixed` takes n steps, `uniform` 1 to n alike, `geometric` falls off by `lam`, `given`
    has `weights`."""
    lam: float = 0.95
    """Of `geometric`, in [0, 1]."""
    weights: tuple[float, ...] = ()
    """Of `given`: shares p_1, p_2, ... of the returns of 1, 2, ... steps, not negative, with the sum 1."""
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
        check_choice("mixture", self.mixture, _SUMS)
        if self.n < 1:
            raise ValueError(f"n must be at least 1, the steps of the longest return; got {self.n}")
        if self.mixture != "given" and self.weights:
            raise ValueError(f"weights belong to mixture 'given'; leave them out, or set it in place of "
                             f"{self.mixture!r}")
        if self.mixture == "given":
            _check_weights(self.weights)

    @property
    def needs(self) -> frozenset[Need]:
        """Values and bootstrap values; final scores where they stand in for the latter."""
        return critic_needs(self)

    def __call__(self, episodes: Episodes, /) -> Estimate:
        """[N] advantages and targets; `keep` where `truncation` is `mask`."""
        delta, v = differences(self, episodes)
        A = _SUMS[self.mixture](self, delta, episodes)
        return estimate_of(self, A, A + v, v, episodes)


@final
@dataclass(frozen=True, slots=True)
class UPGO:
    """G_t = r_t + gamma G_{t+1} where r_{t+1} + gamma v_{t+2} >= v_{t+1}, else r_t + gamma v_{t+1}; advantages G - v.

    The return follows the actions taken as long as they do better than the critic expects (Vinyals et al. 2019,
    Nature 575, methods; the clipped ratio that AlphaStar multiplies by belongs to the objective). G is optimistic by
    construction, so the critic is not trained on it: targets are TD(`lam_critic`) returns. The value after the last
    action is 0 where the episode terminated, else what `truncation` and `bootstrap` say. Raises `ValueError` on
    construction where a field is out of its range, and on a batch without the values it needs.

    >>> estimate = UPGO()(Episodes.from_rows(rewards=[[0.0, 0.0, 1.0]], values=[[0.5, 0.75, 0.5]]))
    >>> estimate.advantages, estimate.targets
    (array([0.25, 0.25, 0.5 ]), array([1., 1., 1.]))
    """

    gamma: float = 1.0
    """Discount per action, in [0, 1]."""
    lam_critic: float = 1.0
    """Weight of longer returns in the targets, in [0, 1]: 1 is the whole return, which no value biases."""
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
        check_fraction("lam_critic", self.lam_critic)

    @property
    def needs(self) -> frozenset[Need]:
        """Values and bootstrap values; final scores where they stand in for the latter."""
        return critic_needs(self)

    def __call__(self, episodes: Episodes, /) -> Estimate:
        """[N] advantages and targets; `keep` where `truncation` is `mask`."""
        delta, v = differences(self, episodes)
        xp = ops_of(delta).xp
        lam = xp.astype(delta >= 0, delta.dtype)
        lam_next = xp.concatenate([lam[1:], lam[:1]])  # the recurrence does not read it at last actions
        A = reverse_recurrence(self.gamma * lam_next, delta, episodes.offsets)
        targets = v + reverse_recurrence(self.gamma * self.lam_critic, delta, episodes.offsets)
        return estimate_of(self, A, targets, v, episodes)


def window_sum(factor: float, x: Array, n: int, episodes: Episodes) -> Array:
    """[N] S^n_t = sum over l < n of factor^l x_{t+l}, within each episode.

    S^2m_t = S^m_t + factor^m S^m_{t+m}, along the binary digits of n: sums alone, where the difference of two whole
    sums, S_t - factor^n S_{t+n}, would lose the digits that they share.
    """
    if n >= episodes.lengths.max(initial=0):
        return reverse_recurrence(factor, x, episodes.offsets)
    later, S, m = _later(x, episodes), x, 1
    for digit in f"{n:b}"[1:]:
        S, m = S + factor ** m * later(S, m), 2 * m
        if digit == "1":
            S, m = x + factor * later(S, 1), m + 1
    return S


def window_mean(factor: float, x: Array, n: int, episodes: Episodes) -> Array:
    """[N] U^n_t, the mean of S^1_t to S^n_t of `window_sum`, along the binary digits of n.

    U^2m_t = (U^m_t + S^m_t + factor^m U^m_{t+m}) / 2 and U^{m+1}_t = x_t + factor m / (m + 1) U^m_{t+1}.
    """
    later, S, U, m = _later(x, episodes), x, x, 1
    for digit in f"{n:b}"[1:]:
        U, S, m = (U + S + factor ** m * later(U, m)) / 2, S + factor ** m * later(S, m), 2 * m
        if digit == "1":
            U, S, m = x + factor * m / (m + 1) * later(U, 1), x + factor * later(S, 1), m + 1
    return U


def weighted_sum(factor: float, x: Array, W: list[float], episodes: Episodes) -> Array:
    """[N] sum over l of factor^l W_l x_{t+l} within each episode, by Horner's rule: one pass for each W_l."""
    later, W = _later(x, episodes), W[:episodes.lengths.max(initial=1)]
    y = W[-1] * x
    for w in reversed(W[:-1]):
        y = w * x + factor * later(y, 1)
    return y


def _later(x: Array, episodes: Episodes) -> Callable[[Array, int], Array]:
    """A function that gives y_{t+m} [N], 0 where the episode has no action t + m, for arrays y like `x`."""
    xp = ops_of(x).xp
    left = np.repeat(episodes.offsets[1:], episodes.lengths) - np.arange(len(x))
    left = like(left.astype(np.int32), x)  # actions from this one to the end of its episode

    def later(y: Array, m: int) -> Array:
        m = min(m, len(y))
        return xp.where(left > m, xp.concatenate([y[m:], xp.zeros_like(y[:m])]), 0.0)
    return later


def _given(how: NStep, delta: Array, episodes: Episodes) -> Array:
    W = [math.fsum(how.weights[l:]) for l in range(min(len(how.weights), episodes.lengths.max(initial=1)))]
    return weighted_sum(how.gamma, delta, W, episodes)


_SUMS: Mapping[Mixture, Callable[[NStep, Array, Episodes], Array]] = {
    "fixed": lambda how, delta, episodes: window_sum(how.gamma, delta, how.n, episodes),
    "uniform": lambda how, delta, episodes: window_mean(how.gamma, delta, how.n, episodes),
    "geometric": lambda how, delta, episodes: window_sum(how.gamma * how.lam, delta, how.n, episodes),
    "given": _given}
"""[N] advantages from temporal differences [N]."""


def _check_weights(weights: tuple[float, ...]) -> None:
    if not weights:
        raise ValueError("mixture 'given' needs weights, the shares p_1, p_2, ... of the returns of 1, 2, ... steps")
    for l, p in enumerate(weights):
        if not 0.0 <= p < math.inf:
            raise ValueError(f"weights must be finite and not negative, got {p} for returns of {l + 1} steps")
    if abs(math.fsum(weights) - 1.0) > 1e-6:
        raise ValueError(f"weights must have the sum 1, got {math.fsum(weights)}; divide each by it")
