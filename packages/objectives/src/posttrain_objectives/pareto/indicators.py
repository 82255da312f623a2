"""How good a front is, as one number: hypervolume, contributions to it, IGD+ and additive epsilon. All objectives are
maximised; a minimised one enters with its sign changed.

Numbers compare only under one reference point (or front) and one scale of the objectives. Hypervolume is exact: a sweep
in two dimensions, slices of that above. Beyond four objectives moocore computes it where it is installed.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import numpy as np
from numpy.typing import ArrayLike

from posttrain_objectives.pareto.dominance import Floats, checked, nondominated

SLICED = 4
"""Objectives up to which slices are fast: four take 0.2 s at 200 points, and each further one up to as many times
longer as there are points."""


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Volume that points [N, m] dominate above the reference point [m] (Zitzler and Thiele 1998, PPSN V).

    A point that is not better than the reference in every objective adds nothing. Raises `ValueError` for shapes that
    do not fit and numbers that are not finite.

    >>> hypervolume([(2.0, 1.0), (1.0, 3.0)], (0.0, 0.0))
    4.0
    """
    F, r = checked_beside(points, reference)
    F = F[(r < F).all(axis=1)] - r
    if not len(F):
        return 0.0
    if F.shape[1] > SLICED and find_spec("moocore"):
        return float(import_module("moocore").hypervolume(F, ref=np.zeros(F.shape[1]), maximise=True))
    return _volume(F)


def contributions(points: ArrayLike, reference: ArrayLike) -> Floats:
    """[N] the hypervolume that would be lost without each point; 0 for one that is dominated or there twice.

    >>> contributions([(2.0, 1.0), (1.0, 3.0), (1.0, 1.0)], (0.0, 0.0))
    array([1., 2., 0.])
    """
    F, r = checked_beside(points, reference)
    whole = hypervolume(F, r)
    return np.array([max(whole - hypervolume(np.delete(F, i, axis=0), r), 0.0) for i in range(len(F))])


def igd_plus(points: ArrayLike, reference_front: ArrayLike) -> float:
    """How far points [N, m] stay behind a reference front [K, m]: the mean over its z of min_y |max(z - y, 0)|
    (Ishibuchi et al. 2015, EMO, equation 18). 0 where every z is weakly dominated.

    >>> igd_plus([(1.0, 1.0)], [(1.0, 1.0), (4.0, 0.0)])
    1.5
    """
    lacking = np.maximum(_lacking(points, reference_front), 0.0)
    return float(np.linalg.norm(lacking, axis=2).min(axis=1).mean())


def additive_epsilon(points: ArrayLike, reference_front: ArrayLike) -> float:
    """The least number that, added to every objective of points [N, m], lets them weakly dominate a reference front
    [K, m] (Zitzler et al. 2003, IEEE TEC 7, section III): max_z min_y max_i (z_i - y_i).

    >>> additive_epsilon([(1.0, 1.0)], [(1.0, 1.0), (4.0, 0.0)])
    3.0
    """
    return float(_lacking(points, reference_front).max(axis=2).min(axis=1).max())


def checked_beside(points: ArrayLike, reference: ArrayLike) -> tuple[Floats, Floats]:
    """Points [N, m] and a point [m] of as many objectives. Raises `ValueError`; an empty list has any m."""
    r = checked(np.asarray(reference, np.float64)[None], "reference")[0]
    F = np.asarray(points, np.float64)
    F = checked(F.reshape(0, len(r)) if F.size == 0 else F)
    if F.shape[1] != len(r):
        raise ValueError(f"points have {F.shape[1]} objectives and the reference has {len(r)}")
    return F, r


def _volume(F: Floats) -> float:
    """Dominated by F [N, m] > 0 above the origin: slices between one point's last objective and the next one's, each of
    the volume that the points reaching so far have in the others."""
    if F.shape[1] == 1:
        return float(F.max())
    order = F[np.argsort(-F[:, -1], kind="stable")]
    heights = order[:, -1] - np.append(order[1:, -1], 0.0)
    if F.shape[1] == 2:
        return float(heights @ np.maximum.accumulate(order[:, 0]))
    rest, total = order[:0, :-1], 0.0
    for height, point in zip(heights, order[:, :-1]):
        if not (rest >= point).all(axis=1).any():
            rest = np.vstack([rest[~(point >= rest).all(axis=1)], point])
        total += height * _volume(rest) if height else 0.0
    return float(total)


def _lacking(points: ArrayLike, reference_front: ArrayLike) -> Floats:
    """[K, N, m] z - y of every z of the reference front and every y of the front of the points."""
    F, Z = checked(points), checked(reference_front, "reference_front")
    if not len(F) or not len(Z) or F.shape[1] != Z.shape[1]:
        raise ValueError(f"points {F.shape} and reference_front {Z.shape} must hold points of as many objectives")
    return np.asarray(Z[:, None] - F[nondominated(F)][None])
