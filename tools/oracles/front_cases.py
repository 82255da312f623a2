"""Random sets of points that oracles of Pareto fronts are asked about, all maximised. Knows no library, not even ours.

Coordinates are multiples of 1/64 between -1 and 2, so that some points are equal, some share a coordinate and some are
no better than the reference point.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

SEED, SETS = 29, 24
STEPS = 64


def reference(m: int) -> np.ndarray:
    """[m] the reference point of hypervolumes."""
    return np.linspace(-0.5, 0.25, m)


def sets() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Points [N, m] and a reference front [K, m], of two to five objectives in turn, scattered or near a sphere."""
    rng = np.random.default_rng(SEED)
    for i in range(SETS):
        m, N, K = 2 + i % 4, int(rng.integers(1, 40)), int(rng.integers(2, 12))
        points = rng.uniform(-1.0, 2.0, (N, m))
        if i % 3 == 0:
            points = 2.0 * np.abs(points) / np.linalg.norm(points, axis=1, keepdims=True)
        points = np.vstack([points, points[:N // 5]])
        yield on_grid(points), on_grid(rng.uniform(0.0, 2.0, (K, m)))


def on_grid(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.round(x * STEPS) / STEPS)
