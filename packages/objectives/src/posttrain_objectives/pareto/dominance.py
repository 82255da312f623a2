"""Who dominates whom among points of several objectives, all maximised. NumPy alone; knows neither archives nor runs.

Here y [m] is a point, F [N, m] a set of them. x dominates y weakly where x_i >= y_i in every objective i, and dominates
it where one of these is strict as well.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def checked(points: ArrayLike, what: str = "points") -> Floats:
    """[N, m] float64. Raises `ValueError` unless it is a list of points of equal length with finite numbers.

    >>> checked([(1, 2)])
    array([[1., 2.]])
    """
    F = np.asarray(points, np.float64)
    if F.ndim != 2 or F.shape[1] == 0:
        raise ValueError(f"{what} must be [N, m], one row for each point and m >= 1 objectives, got {F.shape}")
    if not np.isfinite(F).all():
        raise ValueError(f"{what} must be finite; point {int(np.flatnonzero(~np.isfinite(F).all(axis=1))[0])} is not")
    return F


def weakly_dominates(F: Floats, y: Floats) -> NDArray[np.bool_]:
    """[N] whether each point of F [N, m] is at least y [m] in every objective."""
    return np.asarray((y <= F).all(axis=1))


def nondominated(points: ArrayLike) -> NDArray[np.bool_]:
    """[N] the points that no other dominates; of equal points the first alone.

    >>> nondominated([(1.0, 3.0), (2.0, 2.0), (1.0, 2.0), (2.0, 2.0)])
    array([ True,  True, False, False])
    """
    F = checked(points)
    kept = np.zeros(len(F), bool)
    for i in np.lexsort((np.arange(len(F)), *-F.T[::-1])):  # whoever dominates a point comes before it
        kept[i] = not weakly_dominates(F[kept], F[i]).any()
    return kept


def boxes(F: Floats, epsilon: Floats) -> Floats:
    """[N, m] the corner of each point's box in a grid of steps epsilon [m] > 0 through the origin: floor(F / epsilon)
    (Laumanns et al. 2002, Evolutionary Computation 10, algorithm 2, with steps in place of factors)."""
    return np.asarray(np.floor(F / epsilon))


def crowding(points: ArrayLike) -> Floats:
    """[N] how far apart each point's neighbours are: sum over objectives of the gap between them / the range, infinite
    for the ends of an objective (Deb et al. 2002, IEEE TEC 6, section III-B). An objective without range is left out.

    >>> crowding([(0.0, 3.0), (1.0, 2.0), (3.0, 0.0)])
    array([inf,  2., inf])
    """
    F = checked(points)
    distance = np.zeros(len(F))
    for column in F.T:
        order = np.argsort(column, kind="stable")
        gaps, span = np.diff(column[order]), np.ptp(column) if len(F) else 0.0
        if span > 0:
            distance[order[1:-1]] += (gaps[1:] + gaps[:-1]) / span
            distance[order[[0, -1]]] = np.inf
    return distance


def knee(points: ArrayLike) -> int:
    """Index of the point farthest beyond the hyperplane through the ends of the front, objectives scaled to [0, 1] over
    it (Das 1999, Structural Optimization 18); where the ends lie in no such plane, through the unit points.

    Raises `ValueError` where there is no point.

    >>> knee([(0.0, 1.0), (0.8, 0.7), (1.0, 0.0)])
    1
    """
    F = checked(points)
    if not len(F):
        raise ValueError("no point, so no knee")
    span = np.ptp(F, axis=0)
    scaled = (F - F.min(axis=0))[:, span > 0] / span[span > 0]
    return int(np.argmax(scaled @ _normal(scaled))) if scaled.size else 0


def _normal(scaled: Floats) -> Floats:
    """[k] normal of the plane through the point that is best in each objective; of equally good ones the best sum."""
    k = scaled.shape[1]
    ends = scaled[[np.lexsort((scaled.sum(axis=1), column))[-1] for column in scaled.T]]
    if np.linalg.matrix_rank(ends) == k:
        normal = np.linalg.solve(ends, np.ones(k))
        if (normal > 0).all():
            return np.asarray(normal / np.linalg.norm(normal))
    return np.full(k, k ** -0.5)
