"""Identities of the off-policy estimators, rlax as their oracle, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from posttrain.data import Episodes
from posttrain.protocols import Need
from posttrain.testing.random_data import COLUMNS, episodes_of
from posttrain_estimators.actionvalues import Retrace, TreeBackup
from posttrain_estimators.importance import log_ratios
from posttrain_estimators.multistep import GAE
from posttrain_estimators.offpolicy import ClippedIS, VTrace

fraction = st.sampled_from([0.0, 0.5, 0.95, 1.0])
batches = st.builds(lambda lengths, seed: random_episodes(lengths, seed),
                    st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 99))


def random_episodes(lengths: list[int], seed: int = 0) -> Episodes:
    return episodes_of(seed, lengths, [0] * len(lengths), frozenset(COLUMNS))


def on_policy(e: Episodes) -> Episodes:
    return replace(e, behavior_logprobs=e.logprobs)


def close(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def parts(e: Episodes) -> list[tuple[slice, float]]:
    """The actions of each episode, and the value behind them."""
    return [(slice(a, b), 0.0 if t else float(x))
            for a, b, t, x in zip(e.offsets, e.offsets[1:], e.terminated, e.bootstrap_values)]


class TestIdentities:
    @given(e=batches, gamma=fraction, lam=fraction)
    def test_on_policy_all_are_td_lambda(self, e: Episodes, gamma: float, lam: float) -> None:
        e = on_policy(e)
        oracle = GAE(gamma, lam)(e)
        for estimator in (VTrace(gamma, lam), Retrace(gamma=gamma, lam=lam)):
            close(estimator(e).targets, oracle.targets)
            close(estimator(e).advantages, oracle.advantages)
        of_states = replace(e, action_values=e.values, expected_action_values=e.values)
        close(Retrace("q_head", gamma, lam)(of_states).targets, oracle.targets)

    @given(e=batches, gamma=fraction)
    def test_uncut_vtrace_is_per_decision_importance_sampling(self, e: Episodes, gamma: float) -> None:
        """x = rho (r + gamma x') + (1 - rho) v: with the value as control variate."""
        expected = np.zeros(len(e.rewards))
        for actions, x in parts(e):
            for t in reversed(range(actions.start, actions.stop)):
                rho = math.exp(e.logprobs[t] - e.behavior_logprobs[t])
                x = rho * (e.rewards[t] + gamma * x) + (1 - rho) * e.values[t]
                expected[t] = x
        close(VTrace(gamma, rho_max=math.inf, c_max=math.inf)(e).targets, expected)

    @given(e=batches, gamma=fraction, lam=fraction)
    def test_retrace_of_values_is_vtrace_seen_from_the_action(self, e: Episodes, gamma: float, lam: float) -> None:
        """Q^ret = r + gamma ((1 - lam) v' + lam vs') and vs - v = min(1, rho) (Q^ret - v)."""
        vtrace, retrace = VTrace(gamma, lam)(e), Retrace(gamma=gamma, lam=lam)(e)
        close(retrace.targets, vtrace.targets)
        close(retrace.advantages, VTrace(gamma, lam, weighted=False)(e).advantages)
        rho = np.minimum(1.0, np.exp(e.logprobs - e.behavior_logprobs))
        close(vtrace.targets - e.values, rho * retrace.advantages)

    @given(e=batches, scale=st.floats(1.0, 4.0))
    def test_ratios_beyond_the_ceiling_change_nothing(self, e: Episodes, scale: float) -> None:
        high = replace(e, behavior_logprobs=e.logprobs - 1.0)
        higher = replace(e, behavior_logprobs=e.logprobs - 1.0 - scale)
        for estimator in (VTrace(0.9, 0.8, rho_max=2.0), Retrace(lam=0.9), Retrace("q_head"), ClippedIS()):
            np.testing.assert_array_equal(estimator(high).advantages, estimator(higher).advantages)

    @given(e=batches)
    def test_whole_leak_cuts_nothing(self, e: Episodes) -> None:
        close(VTrace(0.9, leak=0.0)(e).targets, VTrace(0.9, rho_max=math.inf, c_max=math.inf)(e).targets)

    def test_a_dead_zone_over_all_ratios_is_on_policy(self) -> None:
        e = random_episodes([3, 5])
        close(VTrace(dead_zone=50.0)(e).targets, VTrace()(on_policy(e)).targets)


class TestRatios:
    e = Episodes.from_rows([[0.0] * 4, [0.0]], logprobs=[[-1.0, -2.0, -3.0, -40.0], [-1.0]],
                           behavior_logprobs=[[-2.0, -4.0, -2.5, -1.0], [-1.25]], turn=[[0, 0, 1, 2], [2]])

    def test_of_tokens_turns_and_sequences(self) -> None:
        assert log_ratios(self.e, "token", "sum").tolist() == [1.0, 2.0, -0.5, -20.0, 0.25]
        assert log_ratios(self.e, "turn", "sum").tolist() == [3.0, 3.0, -0.5, -20.0, 0.25]
        assert log_ratios(self.e, "turn", "mean").tolist() == [1.5, 1.5, -0.5, -20.0, 0.25]
        assert log_ratios(self.e, "sequence", "mean").tolist() == [-9.125] * 4 + [0.25]

    def test_dead_zone_is_of_actions(self) -> None:
        assert log_ratios(self.e, "turn", "sum", 1.5).tolist() == [2.0, 2.0, 0.0, -20.0, 0.0]


@pytest.mark.parametrize(("component", "wrong", "message"), [
    (VTrace, dict(rho_max=0.5), "rho_max must be at least c_max"), (VTrace, dict(c_max=0.0), "c_max must be positive"),
    (VTrace, dict(rho_max=math.nan), "rho_max must be positive"), (VTrace, dict(leak=2.0), "leak must lie"),
    (VTrace, dict(pg_bootstrap="v"), "pg_bootstrap must be one of"), (VTrace, dict(trace_unit="row"), "trace_unit"),
    (VTrace, dict(dead_zone=-1.0), "dead_zone must not"), (Retrace, dict(q="implicit_q"), "implicit_q.*not offered"),
    (Retrace, dict(q="separate_v"), "one of v_only, q_head"), (Retrace, dict(trace_ratio="max"), "trace_ratio"),
    (TreeBackup, dict(lam=1.5), "lam must lie"), (ClippedIS, dict(base="grpo"), "base must be one of"),
    (ClippedIS, dict(gamma=0.9), "gamma is no field of base 'group'"), (ClippedIS, dict(unit="row"), "unit must be"),
    (ClippedIS, dict(truncation="bootstrap"), "uses no critic"), (ClippedIS, dict(rho_max=-1.0), "rho_max must be")])
def test_refuses_what_it_cannot_do(component: type, wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        component(**wrong)


def test_needs_and_what_is_corrected() -> None:
    ratio = {Need.LOGPROBS, Need.BEHAVIOR_LOGPROBS}
    assert VTrace().needs == ratio | {Need.VALUES}
    assert VTrace(trace_unit="turn").needs == ratio | {Need.VALUES, Need.TURN}
    assert Retrace("q_head").needs == ratio | {Need.ACTION_VALUES}
    assert TreeBackup().needs == {Need.ACTION_VALUES, Need.LOGPROBS}
    assert ClippedIS().needs == ratio
    assert VTrace().corrects_for_sampler and ClippedIS().corrects_for_sampler
    assert not VTrace(weighted=False).corrects_for_sampler


@pytest.mark.oracle
class TestAgainstRlax:
    LENGTHS = (1, 5, 4, 4, 5)

    @pytest.mark.parametrize(("gamma", "lam", "rho_max", "leak"), [
        (1.0, 1.0, 1.0, 1.0), (0.9, 0.7, 1.5, 1.0), (0.95, 0.5, 1.0, 0.6)])
    def test_vtrace(self, gamma: float, lam: float, rho_max: float, leak: float) -> None:
        rlax, jax = pytest.importorskip("rlax"), pytest.importorskip("jax")
        e = random_episodes(list(self.LENGTHS), 3)
        ours = VTrace(gamma, lam, rho_max, leak=leak)(e)
        with jax.enable_x64(True):
            for i, (at, last) in enumerate(parts(e)):
                d = np.full(at.stop - at.start, gamma)
                d[-1] *= not e.terminated[i]
                v = np.append(e.values[at], last)
                rho = np.exp(e.logprobs - e.behavior_logprobs)[at]
                theirs = rlax.leaky_vtrace_td_error_and_advantage(
                    *map(jax.numpy.asarray, (v[:-1], v[1:], e.rewards[at], d, rho)), leak, lam, rho_max, rho_max)
                close(ours.advantages[at], theirs.pg_advantage)
                close(ours.targets[at] - e.values[at], theirs.errors)
                if leak == 1.0:
                    plain = rlax.vtrace_td_error_and_advantage(
                        *map(jax.numpy.asarray, (v[:-1], v[1:], e.rewards[at], d, rho)), lam, rho_max, rho_max)
                    close(ours.advantages[at], plain.pg_advantage)

    @pytest.mark.parametrize("estimator", [Retrace("q_head", 0.9, 0.8), Retrace("q_head"), TreeBackup(0.9, 0.7)])
    def test_returns_from_action_values(self, estimator: Retrace | TreeBackup) -> None:
        rlax, jax = pytest.importorskip("rlax"), pytest.importorskip("jax")
        e = random_episodes(list(self.LENGTHS), 4)
        pi = np.exp(e.logprobs)
        c = estimator.lam * (pi if isinstance(estimator, TreeBackup)
                             else np.minimum(1.0, np.exp(e.logprobs - e.behavior_logprobs)))
        ours = estimator(e).targets
        with jax.enable_x64(True):
            for i, (at, last) in enumerate(parts(e)):
                d = np.full(at.stop - at.start, estimator.gamma)
                d[-1] *= not e.terminated[i]
                EQ = np.append(e.expected_action_values[at], last)[1:]
                theirs = rlax.general_off_policy_returns_from_q_and_v(*map(
                    jax.numpy.asarray, (e.action_values[at][1:], EQ, e.rewards[at], d, c[at][1:])))
                close(ours[at], theirs)

    def test_retrace_and_tree_backup_over_a_vocabulary(self) -> None:
        """From every action's value, of which ours sees the one taken and the mean; rlax adds 1e-8 to mu."""
        rlax, jax = pytest.importorskip("rlax"), pytest.importorskip("jax")
        rng, T = np.random.default_rng(5), 6
        Q, pi, mu = rng.normal(size=(T + 1, 4)), *rng.dirichlet(np.ones(4) * 3, (2, T + 1))
        a, r, taken = rng.integers(0, 4, T + 1), rng.normal(size=T), np.arange(T + 1)
        e = Episodes.from_rows(
            [r], terminated=[False], bootstrap_values=[(pi * Q).sum(1)[-1]], action_values=[Q[taken, a][:-1]],
            expected_action_values=[(pi * Q).sum(1)[:-1]], logprobs=[np.log(pi[taken, a][:-1])],
            behavior_logprobs=[np.log(mu[taken, a][:-1])])
        with jax.enable_x64(True):
            as_jax, d = jax.numpy.asarray, np.full(T, 0.9)
            error = rlax.retrace(*map(as_jax, (Q[:-1], Q[1:], a[:-1], a[1:], r, d, pi[1:], mu[taken, a][1:])), 0.8)
            tree = rlax.general_off_policy_returns_from_action_values(
                *map(as_jax, (Q[1:], a[1:], r, d, 0.8 * pi[taken, a][1:], pi[1:])))
        np.testing.assert_allclose(Retrace("q_head", 0.9, 0.8)(e).targets - Q[taken, a][:-1], error, atol=1e-6)
        close(TreeBackup(0.9, 0.8)(e).targets, tree)


@pytest.mark.parametrize(("how", "ceilings"), [
    (VTrace(rho_max=2.0, c_max=1.0), {"rho_max": 2.0, "c_max": 1.0}), (ClippedIS(rho_max=1.5), {"rho_max": 1.5}),
    (Retrace(c_max=0.7), {"c_max": 0.7})], ids=lambda x: type(x).__name__)
def test_metrics_say_how_much_the_ceilings_cut(how: Any, ceilings: dict[str, float]) -> None:
    e = Episodes.from_rows([[0.0, 1.0], [1.0]], values=[[0.1, 0.2], [0.3]], bootstrap_values=[0.0, 0.0],
                           logprobs=[[-1.0, -2.0], [-0.5]], behavior_logprobs=[[-2.0, -2.5], [-0.1]], group=[0, 0])
    ratios = [math.exp(1.0), math.exp(0.5), math.exp(-0.4)]
    got = how(e).metrics.values_by_name()
    assert got["ratio/mean"] == pytest.approx(sum(ratios) / 3)
    assert got["ratio/max"] == pytest.approx(max(ratios))
    for name, ceiling in ceilings.items():
        assert got[f"ratio/over_{name}"] == pytest.approx(sum(x > ceiling for x in ratios) / 3)


def test_what_has_no_weight_gets_no_advantage_from_whitening() -> None:
    """The weight comes last: whitening takes a mean from all actions."""
    e = Episodes.from_rows([[0.0], [0.0], [1.0], [0.0]], values=[[0.25]] * 4,
                           logprobs=[[-40.0], [-40.0], [-1.0], [-1.0]], behavior_logprobs=[[-1.0]] * 4)
    A = VTrace(whiten=True)(e).advantages
    white = VTrace(whiten=True, weighted=False)(e).advantages
    assert abs(A[:2]).max() < 1e-8 and abs(white[:2]).min() > 0.1
    np.testing.assert_allclose(A[2:], white[2:])
    assert white.mean() == pytest.approx(0.0, abs=1e-12)
