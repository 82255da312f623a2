"""rlax, written independently, as oracle of the recursions. It takes one sequence at a time, so each episode is one."""

from __future__ import annotations

import numpy as np
import pytest
from posttrain.data import Episodes
from posttrain_estimators.baselines import Reinforce
from posttrain_estimators.multistep import GAE

rlax = pytest.importorskip("rlax", reason="rlax, the independent oracle of returns and advantages, is not installed")
import jax  # which rlax brings
import jax.numpy as jnp

pytestmark = pytest.mark.oracle
LENGTHS = [1, 7, 4, 4, 7]
"""Few different ones: each is compiled once."""


def episodes(seed: int) -> Episodes:
    rng = np.random.default_rng(seed)
    def column() -> list[np.ndarray]:
        return [rng.normal(size=n) for n in LENGTHS]
    return Episodes.from_rows(column(), values=column(), bootstrap_values=rng.normal(size=5),
                              terminated=[True, False, True, False, True])


def sequences(e: Episodes, gamma: float) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each episode: rewards [T], discounts [T] with 0 where it terminated, values [T+1]."""
    found = []
    for i, (start, end) in enumerate(zip(e.offsets[:-1], e.offsets[1:])):
        discount = np.full(end - start, gamma)
        discount[-1] *= not e.terminated[i]
        found.append((e.rewards[start:end], discount, np.append(e.values[start:end], e.bootstrap_values[i])))
    return found


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.99, 1.0), (0.7, 0.5)])
def test_gae(gamma: float, lam: float) -> None:
    e = episodes(0)
    estimate = GAE(gamma, lam)(e)
    with jax.enable_x64(True):
        oracle = [rlax.truncated_generalized_advantage_estimation(*map(jnp.asarray, (r, d)), lam, jnp.asarray(v))
                  for r, d, v in sequences(e, gamma)]
        targets = [rlax.lambda_returns(*map(jnp.asarray, (r, d, v[1:])), lam) for r, d, v in sequences(e, gamma)]
        np.testing.assert_allclose(estimate.advantages, np.concatenate(oracle), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(estimate.targets, np.concatenate(targets), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_reward_to_go(gamma: float) -> None:
    e = episodes(1)
    with jax.enable_x64(True):
        oracle = [rlax.discounted_returns(jnp.asarray(r), jnp.full(len(r), gamma), 0.0)
                  for r, _, _ in sequences(e, gamma)]
        np.testing.assert_allclose(Reinforce(gamma)(e).advantages, np.concatenate(oracle), rtol=1e-12, atol=1e-12)
