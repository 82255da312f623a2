"""The geometry behind `gradients.py`: factors of Gramians, projections onto dual cones, shortest vectors of hulls.

U [m, m] is the Gramian of unit gradients u_i, L [k, m] a factor of it whose columns stand for them (U = L^T L), and
`lengths` [m] those of the gradients themselves. m is small, so everything is done in full, in float64. Knows no rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

RANK = 1e-12
"""Eigenvalues of the unit gradients' Gramian below this share of the largest are rounding, and count as 0."""
SMALL = 1e-6
"""Vectors shorter than this share of those they are combined of count as 0."""

UnitRule = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(lengths [m], U [m, m]) -> weights [m] of the gradients."""


def of_those_alive(gramian: np.ndarray, rule: UnitRule, solved: float = 0.0) -> np.ndarray:
    """[m] weights by a rule of the gradients longer than `solved` times the longest, and of length above 0; 0 for the
    others. Raises `ValueError` for a Gramian that is not finite."""
    if not np.isfinite(gramian).all():
        raise ValueError(f"the Gramian of the gradients must be finite, got {np.asarray(gramian).tolist()}")
    lengths = np.sqrt(np.maximum(np.diag(gramian), 0.0))
    alive = np.flatnonzero((lengths > 0) & (lengths >= solved * lengths.max()))
    w = np.zeros(len(gramian))
    if len(alive):
        U = gramian[np.ix_(alive, alive)] / lengths[alive, None] / lengths[None, alive]
        np.fill_diagonal(U, 1.0)
        w[alive] = rule(lengths[alive], np.clip((U + U.T) / 2, -1.0, 1.0))
    return w


def factor(U: np.ndarray) -> np.ndarray:
    """[k, m] L with L^T L = U and k its numerical rank."""
    values, vectors = np.linalg.eigh(U)
    real = values > RANK * values[-1]
    return np.asarray(np.sqrt(values[real])[:, None] * vectors[:, real].T)


def projection(U: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[m] y with sum_i y_i u_i the vector nearest to sum_i x_i u_i whose inner product with no u_i is negative.

    y = x + v with v >= 0 the least |L (x + v)|, the dual of that problem: Quinton and Rey 2024, proposition 1.
    """
    from scipy.optimize import nnls

    L, size = factor(U), np.abs(x).max()
    v, _ = nnls(L, -L @ (x / size), maxiter=100 * len(x))
    return np.asarray(x + size * v)


def shortest(vectors: np.ndarray) -> np.ndarray:
    """[m] the convex weights w with the least |vectors w|, of columns `vectors` [k, m].

    They are the least |vectors y|^2 + (1 - sum y)^2 over y >= 0, scaled to sum 1: along y = t w the best t makes that
    a growing function of |vectors w|. Columns enter as unit vectors, so that lengths may lie far apart.
    """
    from scipy.optimize import nnls

    lengths = np.linalg.norm(vectors, axis=0)
    if not lengths.max() > 0:
        return np.full(len(lengths), 1 / len(lengths))
    lengths = np.maximum(lengths, np.finfo(float).eps * lengths.max())
    share = lengths.min() / lengths
    y, _ = nnls(np.vstack([vectors / lengths, share]), np.append(np.zeros(len(vectors)), 1.0), maxiter=100 * len(share))
    w = y * share
    return np.asarray(w / w.sum())


def worst_mixture(vectors: np.ndarray, radius: float) -> np.ndarray | None:
    """[m] the convex weights w with the least g_w . g_0 + radius |g_w|, where g_w = vectors w and g_0 is the mean
    column; None where that is reached at g_w = 0.

    |g_w| is the least (|g_w|^2 / t + t) / 2 over t > 0. For a given t the best w makes g_w + (t / radius) g_0 shortest,
    and what remains is convex in t: its derivative is 0 where |g_w| = t.
    """
    from scipy.optimize import brentq

    mean, longest = vectors.mean(axis=1), float(np.linalg.norm(vectors, axis=0).max())

    def mixture(t: float) -> np.ndarray:
        return shortest(vectors + (t / radius) * mean[:, None])

    def excess(t: float) -> float:
        return float(np.linalg.norm(vectors @ mixture(t))) - t

    if excess(SMALL * longest) <= 0:
        return None
    return mixture(float(brentq(excess, SMALL * longest, 2 * longest, xtol=1e-14 * longest, rtol=1e-14)))


def without_conflicts(U: np.ndarray, i: int, order: Sequence[int]) -> np.ndarray:
    """[m] what is left of u_i, in terms of all u, when its component against each u_j of `order` is taken off."""
    y: np.ndarray = np.eye(len(U))[i]
    for j in order:
        y[j] -= np.minimum(U[j] @ y, 0.0)
    return y


def bargained(U: np.ndarray) -> np.ndarray:
    """[m] y > 0 with U y = 1 / y, for positive definite U: the minimum of y^T U y / 2 - sum log y, by Newton's method
    with the damping of self-concordant functions (Nesterov and Nemirovskii 1994), which keeps y positive."""
    y: np.ndarray = np.ones(len(U))
    for _ in range(200):
        slope = U @ y - 1 / y
        step = np.linalg.solve(U + np.diag(1 / y ** 2), -slope)
        decrement = float(np.sqrt(max(-slope @ step, 0.0)))
        y = y + step / (1.0 if decrement < 0.25 else 1.0 + decrement)
        if decrement < 1e-12:
            break
    return y
