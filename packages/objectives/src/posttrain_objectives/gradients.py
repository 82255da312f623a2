"""Weights of the gradients of several aims from their Gramian, so that a step serves them all as far as it can.

With gradients g_i and G = g g^T [m, m], the step is along sum_i w_i g_i, and (G w)_i is its inner product with g_i.
What a rule solves is stated in unit gradients u_i = g_i / |g_i|: their Gramian has entries of one size however far
the gradients' lengths lie apart, and a factor L of it, U = L^T L, makes each problem one of least squares, which is
solved exactly also where gradients are dependent (`cones.py`). A gradient that is 0 (an aim that is reached, or a
reward that is the same for all answers) takes no part and has weight 0.

Rules assume gradients that are nearly exact: take large batches. Knows no models; any framework's Gramian will do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import final

import numpy as np

from posttrain_objectives.cones import (
    RANK,
    SMALL,
    bargained,
    factor,
    of_those_alive,
    projection,
    shortest,
    without_conflicts,
    worst_mixture,
)

MANY = 7
"""Most gradients for which `pcgrad` goes through all orders."""


@final
@dataclass(frozen=True, slots=True)
class Stateless:
    """State of all rules here: the answer depends on the Gramian alone."""


Weights = tuple[np.ndarray, Stateless]


@final
@dataclass(frozen=True, slots=True)
class UPGrad:
    """The mean of the gradients, each projected onto the dual cone of all: the step is against none (Quinton and Rey
    2024, arXiv 2406.16232, equation 5).

    >>> opposed = np.array([[1.0, -0.5], [-0.5, 1.0]])
    >>> w, _ = (rule := UPGrad()).weights(opposed, rule.init(("a", "b")))
    >>> w, opposed @ w
    (array([0.75, 0.75]), array([0.375, 0.375]))
    """

    def init(self, slots: Sequence[str]) -> Stateless:
        return Stateless()

    def weights(self, gramian: np.ndarray, state: Stateless) -> Weights:
        return of_those_alive(gramian, self._rule), state

    def _rule(self, lengths: np.ndarray, U: np.ndarray) -> np.ndarray:
        projected = [projection(U, e) for e in np.diag(lengths)]
        return np.asarray(np.mean(projected, axis=0) / lengths)


@final
@dataclass(frozen=True, slots=True)
class DualProjection:
    """The mean gradient, projected onto the dual cone of all (Lopez-Paz and Ranzato 2017, arXiv 1706.08840, equation
    11, for the mean)."""

    def init(self, slots: Sequence[str]) -> Stateless:
        return Stateless()

    def weights(self, gramian: np.ndarray, state: Stateless) -> Weights:
        return of_those_alive(gramian, self._rule), state

    def _rule(self, lengths: np.ndarray, U: np.ndarray) -> np.ndarray:
        return np.asarray(projection(U, lengths / len(lengths)) / lengths)


@final
@dataclass(frozen=True, slots=True)
class MGDA:
    """The shortest vector in the convex hull of the gradients (Désidéri 2012; Sener and Koltun 2018, arXiv 1810.04650).

    It is no longer than the shortest gradient, so an aim that is nearly reached would stop all others: `solved` leaves
    such aims out.
    """

    solved: float = 1e-3
    """A gradient shorter than this share of the longest counts as reached and takes no part; 0 leaves out none but
    those that are 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.solved < 1:
            raise ValueError(f"solved must lie in [0, 1), got {self.solved}")

    def init(self, slots: Sequence[str]) -> Stateless:
        return Stateless()

    def weights(self, gramian: np.ndarray, state: Stateless) -> Weights:
        return of_those_alive(gramian, self._rule, self.solved), state

    def _rule(self, lengths: np.ndarray, U: np.ndarray) -> np.ndarray:
        return shortest(factor(U) * (lengths / lengths.max()))


@final
@dataclass(frozen=True, slots=True)
class PCGrad:
    """Each gradient loses its component against every other that it conflicts with, one after the other; then they are
    added (Yu et al. 2020, arXiv 2001.06782, algorithm 1).

    The paper draws the order of the others at random; here the mean over all orders is taken, the expectation of its
    step, so runs repeat and nothing depends on the order of rewards.
    """

    def init(self, slots: Sequence[str]) -> Stateless:
        """Raises `ValueError` for more gradients than all orders can be gone through."""
        if len(slots) > MANY:
            raise ValueError(f"pcgrad takes up to {MANY} gradients, got {len(slots)}: use upgrad")
        return Stateless()

    def weights(self, gramian: np.ndarray, state: Stateless) -> Weights:
        return of_those_alive(gramian, self._rule), state

    def _rule(self, lengths: np.ndarray, U: np.ndarray) -> np.ndarray:
        total = np.zeros(len(U))
        for i, length in enumerate(lengths):
            orders = permutations(j for j in range(len(U)) if j != i)
            total += length * np.mean([without_conflicts(U, i, order) for order in orders], axis=0)
        return np.asarray(total / lengths)


@final
@dataclass(frozen=True, slots=True)
class CAGrad:
    """The direction d whose least inner product with a gradient is largest, within c |g_0| of the mean gradient g_0
    (Liu et al. 2021, arXiv 2110.14048, equation 4): d = g_0 + c |g_0| g_w / |g_w| with w of the simplex."""

    c: float = 0.5
    """How far from the mean: 0 is the mean, and 1 and above approach `mgda`."""

    def __post_init__(self) -> None:
        if not 0 <= self.c < math.inf:
            raise ValueError(f"c must be finite and not negative, got {self.c}")

    def init(self, slots: Sequence[str]) -> Stateless:
        return Stateless()

    def weights(self, gramian: np.ndarray, state: Stateless) -> Weights:
        return of_those_alive(gramian, self._rule), state

    def _rule(self, lengths: np.ndarray, U: np.ndarray) -> np.ndarray:
        m, sizes = len(U), lengths / lengths.max()
        vectors = factor(U) * sizes
        radius = self.c * float(np.linalg.norm(vectors.mean(axis=1)))
        if radius <= SMALL:
            return np.full(m, 1 / m)
        w = worst_mixture(vectors, radius)
        if w is None:  # d may keep every product at 0 or above, and the projection of g_0 is the nearest that does
            return np.asarray(projection(U, sizes / m) / sizes)
        return 1 / m + radius * w / float(np.linalg.norm(vectors @ w))


@final
@dataclass(frozen=True, slots=True)
class IMTLG:
    """The combination whose projections on all unit gradients are equal (Liu et al. 2021, ICLR, "Towards Impartial
    Multi-task Learning", equation 4), with weights of sum 1.

    Of three or more gradients a weight may be negative. Where the sum of all is not positive, weights of sum 1 would
    turn the step against every aim; they are then scaled by the sum of their sizes.
    """

    def init(self, slots: Sequence[str]) -> Stateless:
        return Stateless()

    def weights(self, gramian: np.ndarray, state: Stateless) -> Weights:
        return of_those_alive(gramian, self._rule), state

    def _rule(self, lengths: np.ndarray, U: np.ndarray) -> np.ndarray:
        w = np.linalg.pinv(U, rcond=RANK, hermitian=True).sum(axis=1)
        if float(np.abs(w).max()) < SMALL:
            return np.zeros(len(U))
        w = w / lengths * lengths.min()
        total, size = float(w.sum()), float(np.abs(w).sum())
        return np.asarray(w / (total if total > SMALL * size else size))


@final
@dataclass(frozen=True, slots=True)
class NashMTL:
    """Nash's bargaining solution: w > 0 with G w = 1 / w (Navon et al. 2022, arXiv 2202.01017, equation 5).

    It does not depend on the gradients' lengths, and its step has length sqrt(m) whatever they are: keep
    `clip_norm` on. Where no step improves all, there is no solution; that of G with `ridge` on the unit gradients'
    diagonal is taken.
    """

    ridge: float = 1e-6
    """What is added to the diagonal of the unit gradients' Gramian."""

    def __post_init__(self) -> None:
        if not 0 < self.ridge < 1:
            raise ValueError(f"ridge must lie in (0, 1), got {self.ridge}")

    def init(self, slots: Sequence[str]) -> Stateless:
        return Stateless()

    def weights(self, gramian: np.ndarray, state: Stateless) -> Weights:
        return of_those_alive(gramian, self._rule), state

    def _rule(self, lengths: np.ndarray, U: np.ndarray) -> np.ndarray:
        return np.asarray(bargained(U + self.ridge * np.eye(len(U))) / lengths)


@final
@dataclass(frozen=True, slots=True)
class MeanGradient:
    """Equal weights 1 / m: the mean of the gradients, for comparison."""

    def init(self, slots: Sequence[str]) -> Stateless:
        return Stateless()

    def weights(self, gramian: np.ndarray, state: Stateless) -> Weights:
        return np.full(len(gramian), 1 / len(gramian)), state
