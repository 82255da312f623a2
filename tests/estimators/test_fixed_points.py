"""Where off-policy estimators converge on a small Markov decision process, expectations enumerated and not sampled."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from posttrain.data import Array, Episodes, offsets_of
from posttrain_estimators.actionvalues import Retrace, TreeBackup
from posttrain_estimators.multistep import GAE
from posttrain_estimators.offpolicy import VTrace

GAMMA, STEPS = 0.8, 3
PI = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
"""[s, a] the policy whose values are wanted."""
MU = np.array([[0.2, 0.3, 0.5], [0.6, 0.2, 0.2], [0.5, 0.4, 0.1]])
"""[s, a] the sampler."""
REWARD = np.array([[1.0, -1.0, 0.5], [0.0, 2.0, -0.5], [-1.0, 0.3, 1.5]])
SUCCESSOR = np.array([[1, 2, 0], [2, 0, 1], [0, 1, 2]])
"""[s, a] the next state."""


def values_of(policy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """V [s] and Q [s, a] of a policy, from its linear equations."""
    transition = np.einsum("sa,sat->st", policy, np.eye(3)[SUCCESSOR])
    V = np.linalg.solve(np.eye(3) - GAMMA * transition, (policy * REWARD).sum(1))
    return V, REWARD + GAMMA * V[SUCCESSOR]


def enumerated() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every course of three actions from every state: states [E, T+1], actions [E, T], probabilities under mu [E]."""
    courses = list(itertools.product(range(3), *[range(3)] * STEPS))
    actions = np.array([course[1:] for course in courses])
    states = np.zeros((len(courses), STEPS + 1), np.int64)
    states[:, 0] = [course[0] for course in courses]
    for t in range(STEPS):
        states[:, t + 1] = SUCCESSOR[states[:, t], actions[:, t]]
    return states, actions, MU[states[:, :-1], actions].prod(1)


STATES, ACTIONS, PROBABILITY = enumerated()
BEFORE = STATES[:, :-1]


def episodes(V: np.ndarray, Q: np.ndarray) -> Episodes:
    """All courses as truncated episodes, with the values of a critic."""
    E = len(STATES)
    def column(of_pair: np.ndarray) -> Array:
        return of_pair[BEFORE, ACTIONS].reshape(-1)
    return Episodes(
        offsets=offsets_of(np.full(E, STEPS)), rewards=column(REWARD), terminated=np.zeros(E, bool),
        group=np.zeros(E, np.int64), values=V[BEFORE].reshape(-1), bootstrap_values=V[STATES[:, -1]],
        logprobs=np.log(column(PI)), behavior_logprobs=np.log(column(MU)), action_values=column(Q),
        expected_action_values=V[BEFORE].reshape(-1))


def fixed_point_of_values(estimator: GAE | VTrace | Retrace) -> np.ndarray:
    """V <- the mean target of each first state, until it stays."""
    V = np.zeros(3)
    for _ in range(300):
        targets = estimator(episodes(V, np.zeros((3, 3)))).targets[::STEPS]
        V = np.array([(PROBABILITY * targets)[BEFORE[:, 0] == s].sum() for s in range(3)])
    return V


def fixed_point_of_action_values(estimator: Retrace | TreeBackup) -> np.ndarray:
    """Q <- the mean target of each first state and action, until it stays."""
    Q = np.zeros((3, 3))
    for _ in range(300):
        targets = estimator(episodes((PI * Q).sum(1), Q)).targets[::STEPS]
        first = BEFORE[:, 0] * 3 + ACTIONS[:, 0]
        Q = (np.bincount(first, PROBABILITY * targets) / np.bincount(first, PROBABILITY)).reshape(3, 3)
    return Q


def clipped_policy(rho_max: float) -> np.ndarray:
    cut = np.minimum(rho_max * MU, PI)
    return cut / cut.sum(1, keepdims=True)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("rho_max", "c_max"), [(1.0, 1.0), (1.5, 1.0), (2.0, 0.5)])
def test_vtrace_finds_the_values_of_the_clipped_policy(rho_max: float, c_max: float, lam: float) -> None:
    found = fixed_point_of_values(VTrace(GAMMA, lam, rho_max, c_max))
    np.testing.assert_allclose(found, values_of(clipped_policy(rho_max))[0], atol=1e-9)
    assert abs(found - values_of(PI)[0]).max() > 0.1


def test_vtrace_that_cuts_nothing_finds_the_values_of_the_policy() -> None:
    found = fixed_point_of_values(VTrace(GAMMA, rho_max=float("inf")))
    np.testing.assert_allclose(found, values_of(PI)[0], atol=1e-9)


@pytest.mark.parametrize("lam", [0.6, 1.0])
def test_retrace_of_state_values_finds_those_of_the_clipped_policy(lam: float) -> None:
    found = fixed_point_of_values(Retrace(gamma=GAMMA, lam=lam))
    np.testing.assert_allclose(found, values_of(clipped_policy(1.0))[0], atol=1e-9)


@pytest.mark.parametrize("estimator", [Retrace("q_head", GAMMA), Retrace("q_head", GAMMA, 0.5),
                                       Retrace("q_head", GAMMA, c_max=0.5), TreeBackup(GAMMA), TreeBackup(GAMMA, 0.5)])
def test_action_values_are_those_of_the_policy(estimator: Retrace | TreeBackup) -> None:
    np.testing.assert_allclose(fixed_point_of_action_values(estimator), values_of(PI)[1], atol=1e-9)


@pytest.mark.parametrize("lam", [0.0, 0.9])
def test_uncorrected_differences_find_the_values_of_the_sampler(lam: float) -> None:
    found = fixed_point_of_values(GAE(GAMMA, lam))
    np.testing.assert_allclose(found, values_of(MU)[0], atol=1e-9)
    assert abs(found - values_of(PI)[0]).max() > 0.5
