"""Asks torchjd, cvxpy and scipy for weights of gradients: `pip install -r torchjd.txt`, then `python from_torchjd.py`.

torchjd regularises: its projections add `reg_eps` to the normalised Gramian, and its MGDA stops early by default; both
are asked for as little of that as they take. cvxpy solves the same problems as the papers state them, without either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

import cvxpy as cp
import mixing_cases
import numpy as np
import torch
from scipy.optimize import fsolve
from torchjd import aggregation, linalg

SEED, MATRICES = 41, 24
PRECISE = {"tol_gap_abs": 1e-9, "tol_gap_rel": 1e-9, "tol_feas": 1e-9}
"""Of Clarabel."""


def projector() -> Any:
    return linalg.QuadprogProjector(norm_eps=1e-12, reg_eps=1e-9)


def torchjd(weighting: Callable[[], Any]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda J: weighting()(torch.from_numpy(J @ J.T)).numpy()


def projected(J: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Weights of the vector nearest to x J that no row objects to."""
    w = cp.Variable(len(J))
    cp.Problem(cp.Minimize(cp.sum_squares(J.T @ w)), [w >= x]).solve(cp.CLARABEL, **PRECISE)
    return np.asarray(w.value)


def upgrad(J: np.ndarray) -> np.ndarray:
    return np.mean([projected(J, e) for e in np.eye(len(J))], axis=0)


def dual_projection(J: np.ndarray) -> np.ndarray:
    return projected(J, np.full(len(J), 1 / len(J)))


def mgda(J: np.ndarray) -> np.ndarray:
    w = cp.Variable(len(J))
    cp.Problem(cp.Minimize(cp.sum_squares(J.T @ w)), [w >= 0, cp.sum(w) == 1]).solve(cp.CLARABEL, **PRECISE)
    return np.asarray(w.value)


def cagrad(J: np.ndarray, c: float) -> np.ndarray:
    """The primal problem itself: d, as its coordinates in the row space; the answer is J d."""
    d, least, mean = cp.Variable(J.shape[1]), cp.Variable(), J.mean(axis=0)
    problem = cp.Problem(cp.Maximize(least), [J @ d >= least, cp.norm(d - mean) <= c * np.linalg.norm(mean)])
    problem.solve(cp.CLARABEL, **PRECISE)
    return J @ np.asarray(d.value)


def nash_mtl(J: np.ndarray) -> np.ndarray:
    """G w = 1 / w by fsolve, from where the convex problem with that condition ends in cvxpy."""
    G, w = J @ J.T, cp.Variable(len(J))
    cp.Problem(cp.Minimize(cp.sum_squares(J.T @ w) / 2 - cp.sum(cp.log(w)))).solve(cp.CLARABEL)
    def residual(w: np.ndarray) -> np.ndarray:
        return np.asarray(G @ w * w - 1)
    found = np.asarray(fsolve(residual, w.value, xtol=1e-12))
    assert np.abs(residual(found)).max() < 1e-10
    return found


WEIGHTS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "torchjd.UPGradWeighting": torchjd(lambda: aggregation.UPGradWeighting(projector=projector())),
    "torchjd.DualProjWeighting": torchjd(lambda: aggregation.DualProjWeighting(projector=projector())),
    "torchjd.MGDAWeighting": torchjd(lambda: aggregation.MGDAWeighting(epsilon=1e-12, max_iters=20_000)),
    "torchjd.IMTLGWeighting": torchjd(aggregation.IMTLGWeighting),
    "cvxpy.upgrad": upgrad, "cvxpy.dual_projection": dual_projection, "cvxpy.mgda": mgda, "scipy.nash_mtl": nash_mtl}


def main() -> None:
    torch.set_default_dtype(torch.float64)
    rng, fixture = np.random.default_rng(SEED), mixing_cases.Fixture()
    for i in range(MATRICES):
        m = 2 + i % 4
        J = rng.normal(size=(m, m + 2)) * rng.uniform(0.3, 3.0, size=(m, 1)) + 0.2 * rng.normal(size=m + 2)
        for name, weights in WEIGHTS.items():
            fixture.add(name, {}, J, weights(J))
        if m == 2:  # of more, torchjd draws the order
            fixture.add("torchjd.PCGradWeighting", {}, J, torchjd(aggregation.PCGradWeighting)(J))
        for c in (0.2, 0.5, 1.5):
            weighting = partial(aggregation.CAGradWeighting, c=c)
            fixture.add("torchjd.CAGradWeighting", {"c": c}, J, torchjd(weighting)(J))
            fixture.add("cvxpy.cagrad", {"c": c}, J, cagrad(J, c))
    fixture.save("torchjd", seed=SEED, **{name: version(name) for name in ("torchjd", "quadprog", "cvxpy", "scipy")})


if __name__ == "__main__":
    main()
