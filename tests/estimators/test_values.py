"""Value-based estimators: targets against literal loops, the identities between them, windows without cancellation."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from posttrain.data import Episodes
from posttrain.ops import reverse_recurrence
from posttrain.protocols import Estimator, Need
from posttrain_estimators.mixtures import UPGO, NStep, weighted_sum, window_mean, window_sum
from posttrain_estimators.multistep import GAE, TDLambda, explained_variance, next_values

fraction = st.sampled_from([0.0, 0.5, 0.95, 1.0])
ALL = (GAE, TDLambda, NStep, UPGO)
every = pytest.mark.parametrize("estimator", ALL)


def td0(gamma: float) -> TDLambda:
    return TDLambda(gamma, lam=0.0)


def monte_carlo(gamma: float) -> TDLambda:
    return TDLambda(gamma, lam=1.0)


def random_episodes(lengths: list[int], seed: int = 0) -> Episodes:
    rng = np.random.default_rng(seed)
    def column() -> list[np.ndarray]:
        return [rng.normal(size=n) for n in lengths]
    E = len(lengths)
    e = Episodes.from_rows(column(), values=column(), bootstrap_values=rng.normal(size=E),
                           terminated=rng.random(E) < 0.5, group=np.arange(E) // 2)
    return replace(e, final_scores=rng.normal(size=E))


batches = st.builds(random_episodes, st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 99))


def per_episode(e: Episodes) -> list[tuple[list[float], list[float]]]:
    """Rewards, and values with that of the state behind the last action."""
    return [(e.rewards[a:b].tolist(), [*e.values[a:b].tolist(),
                                       0.0 if e.terminated[i] else float(e.bootstrap_values[i])])
            for i, (a, b) in enumerate(zip(e.offsets, e.offsets[1:]))]


def lambda_returns(e: Episodes, gamma: float, lam: float | list[float]) -> list[float]:
    """G_t = r_t + gamma ((1 - lam) v_{t+1} + lam G_{t+1}), backwards; a lambda for all or one per episode."""
    returns: list[float] = []
    for i, (r, v) in enumerate(per_episode(e)):
        own, G, backwards = lam[i] if isinstance(lam, list) else lam, v[-1], []
        for t in reversed(range(len(r))):
            G = r[t] + gamma * ((1 - own) * v[t + 1] + own * G)
            backwards.append(G)
        returns += backwards[::-1]
    return returns


def close(got: Any, expected: Any, tolerance: float = 1e-11) -> None:
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


class TestTargets:
    """The contract kit compares advantages with oracles; these are the targets."""

    @given(e=batches, gamma=fraction, lam=fraction)
    def test_of_td_lambda_are_its_recurrence(self, e: Episodes, gamma: float, lam: float) -> None:
        estimate = TDLambda(gamma, lam)(e)
        close(estimate.targets, lambda_returns(e, gamma, lam))
        close(estimate.advantages, estimate.targets - e.values)

    @given(e=batches, gamma=fraction, lam=fraction, lam_critic=fraction)
    def test_of_gae_have_a_lambda_of_their_own(self, e: Episodes, gamma: float, lam: float, lam_critic: float) -> None:
        estimate = GAE(gamma, lam, lam_critic=lam_critic)(e)
        close(estimate.targets, lambda_returns(e, gamma, lam_critic))
        np.testing.assert_array_equal(estimate.advantages, GAE(gamma, lam)(e).advantages)

    @given(e=batches, gamma=fraction, lam=fraction)
    def test_of_gae_follow_the_advantages_where_nothing_is_said(self, e: Episodes, gamma: float, lam: float) -> None:
        close(GAE(gamma, lam)(e).targets, lambda_returns(e, gamma, lam))

    @given(e=batches, alpha=st.sampled_from([0.05, 0.3, 1.0]), lam_min=st.sampled_from([0.0, 0.4]))
    def test_of_gae_by_length(self, e: Episodes, alpha: float, lam_min: float) -> None:
        lam = [max(lam_min, 1 - 1 / (alpha * length)) for length in e.lengths.tolist()]
        both = GAE(0.9, length_adaptive=alpha, lam_min=lam_min)(e)
        close(both.targets, lambda_returns(e, 0.9, lam))
        close(both.advantages, both.targets - e.values)
        apart = GAE(0.9, length_adaptive=alpha, lam_min=lam_min, lam_critic=1.0)(e)
        close(apart.targets, lambda_returns(e, 0.9, 1.0))
        np.testing.assert_array_equal(apart.advantages, both.advantages)

    def test_by_length_does_not_read_lam(self) -> None:
        e = random_episodes([30, 50])
        a, b = (GAE(0.9, lam, length_adaptive=0.05)(e).advantages for lam in (0.1, 0.9))
        np.testing.assert_array_equal(a, b)

    @given(e=batches, gamma=fraction, lam_critic=fraction)
    def test_of_upgo_are_not_optimistic(self, e: Episodes, gamma: float, lam_critic: float) -> None:
        close(UPGO(gamma, lam_critic)(e).targets, lambda_returns(e, gamma, lam_critic))

    @given(e=batches, gamma=fraction, how=st.sampled_from([dict(n=3), dict(n=3, mixture="uniform")]))
    def test_of_n_step_are_advantages_and_values(self, e: Episodes, gamma: float, how: dict[str, Any]) -> None:
        estimate = NStep(gamma, **how)(e)
        close(estimate.targets, estimate.advantages + e.values)

    @every
    @pytest.mark.parametrize("truncation", ["bootstrap", "mask"])
    def test_are_never_whitened(self, estimator: type, truncation: str) -> None:
        e = random_episodes([3, 4, 2, 5], seed=1)
        plain, white = (estimator(whiten=w, truncation=truncation)(e) for w in (False, True))
        kept = np.ones(14, bool) if plain.keep is None else plain.keep
        assert kept.any() and kept.all() == (truncation == "bootstrap")
        own = plain.advantages[kept]
        close(white.advantages[kept], (own - own.mean()) / np.sqrt(own.var(ddof=1) + 1e-8))
        assert not white.advantages[~kept].any()
        np.testing.assert_array_equal(white.targets, plain.targets)


class TestIdentities:
    """All are one formula with other weights of the temporal differences."""

    @given(e=batches, gamma=fraction, lam=fraction)
    def test_td_lambda_is_gae(self, e: Episodes, gamma: float, lam: float) -> None:
        for name in ("advantages", "targets"):
            close(getattr(TDLambda(gamma, lam)(e), name), getattr(GAE(gamma, lam)(e), name))

    @given(e=batches, gamma=fraction)
    def test_limits_of_lambda(self, e: Episodes, gamma: float) -> None:
        for limit, lam in ((td0(gamma), 0.0), (monte_carlo(gamma), 1.0)):
            for name in ("advantages", "targets"):
                close(getattr(limit(e), name), getattr(GAE(gamma, lam)(e), name))

    @given(e=batches, gamma=fraction)
    def test_limits_of_n(self, e: Episodes, gamma: float) -> None:
        for mixture in ("fixed", "uniform", "geometric"):
            close(NStep(gamma, 1, mixture)(e).advantages, td0(gamma)(e).advantages)
        for n in (9, 10, 10**9):
            close(NStep(gamma, n)(e).advantages, monte_carlo(gamma)(e).advantages)

    @given(e=batches, gamma=fraction, lam=fraction)
    def test_gae_is_a_geometric_mixture(self, e: Episodes, gamma: float, lam: float) -> None:
        close(NStep(gamma, 9, "geometric", lam)(e).advantages, GAE(gamma, lam)(e).advantages)

    @given(e=batches, gamma=fraction, lam=fraction, n=st.integers(1, 11))
    def test_mixtures_are_weights(self, e: Episodes, gamma: float, lam: float, n: int) -> None:
        for how, weights in (
            (NStep(gamma, n), [0.0] * (n - 1) + [1.0]),
            (NStep(gamma, n, "uniform"), [1 / n] * n),
            (NStep(gamma, n, "geometric", lam), [(1 - lam) * lam ** l for l in range(n - 1)] + [lam ** (n - 1)]),
        ):
            by_weights = NStep(gamma, mixture="given", weights=tuple(weights))
            close(how(e).advantages, by_weights(e).advantages)

    @given(e=batches, gamma=fraction, n=st.integers(1, 11))
    def test_uniform_is_the_mean_of_fixed(self, e: Episodes, gamma: float, n: int) -> None:
        each = [NStep(gamma, m)(e).advantages for m in range(1, n + 1)]
        close(NStep(gamma, n, "uniform")(e).advantages, np.mean(each, axis=0))

    @given(e=batches, gamma=fraction)
    def test_upgo_is_no_less_than_one_step(self, e: Episodes, gamma: float) -> None:
        """What it goes on with is at least the value that it goes on instead of."""
        assert (UPGO(gamma)(e).advantages >= td0(gamma)(e).advantages - 1e-12).all()

    @given(e=batches, gamma=fraction)
    def test_upgo_of_values_nobody_reaches_or_everybody_beats(self, e: Episodes, gamma: float) -> None:
        """Where every action costs more than the values fall by, none does as well as expected."""
        position = np.arange(len(e.rewards)) - np.repeat(e.offsets[:-1], e.lengths)
        terminal = replace(e, rewards=np.abs(e.rewards), terminated=np.ones(e.n_episodes, bool))
        worse = replace(terminal, rewards=-terminal.rewards - 1, values=50.0 - position)
        better = replace(terminal, values=np.zeros(len(position)))
        close(UPGO(gamma)(better).advantages, monte_carlo(gamma)(better).advantages)
        close(UPGO(gamma)(worse).advantages, td0(gamma)(worse).advantages)

    @given(e=batches)
    @pytest.mark.parametrize("how", [
        GAE(0.9, 0.7), GAE(0.9, length_adaptive=0.3, lam_critic=1.0), TDLambda(0.9, 0.7), td0(0.9), monte_carlo(0.9),
        NStep(0.9, 3), NStep(0.9, 3, "uniform"), NStep(0.9, 4, "geometric", 0.5), UPGO(0.9),
        NStep(0.9, mixture="given", weights=(0.25, 0.75))], ids=repr)
    def test_a_perfect_critic_leaves_no_advantage(self, how: Estimator, e: Episodes) -> None:
        v = monte_carlo(0.9)(e).targets
        estimate = how(replace(e, values=v))
        np.testing.assert_allclose(estimate.advantages, 0.0, atol=1e-12)
        close(estimate.targets, v)


class TestWindows:
    def test_no_cancellation_in_float32(self) -> None:
        """Behind a window lies a sum a million times its own: the difference of whole sums would be noise."""
        x = np.full(64, 1e-3, np.float32)
        x[-1] = 1e4
        e = Episodes.from_rows([[0.0] * 64])
        exact = [float(sum(Fraction(float(a)) for a in x[t:t + 5])) for t in range(64)]
        np.testing.assert_allclose(window_sum(1.0, x, 5, e), exact, rtol=1e-6)
        S = reverse_recurrence(1.0, x, e.offsets)
        by_difference = S - np.concatenate([S[5:], np.zeros(5, np.float32)])
        assert np.abs(by_difference[:50] / exact[:50] - 1).max() > 0.02

    @given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4), n=st.integers(1, 45), factor=fraction)
    def test_equal_their_definitions(self, lengths: list[int], n: int, factor: float) -> None:
        e = random_episodes(lengths, seed=n)
        x, ends = e.rewards.tolist(), np.repeat(e.offsets[1:], e.lengths).tolist()
        def literal(W: list[float]) -> list[float]:
            return [sum(factor ** l * W[l] * x[t + l] for l in range(min(len(W), end - t)))
                    for t, end in enumerate(ends)]
        uniform = [1 - l / n for l in range(n)]
        close(window_sum(factor, e.rewards, n, e), literal([1.0] * n))
        close(window_mean(factor, e.rewards, n, e), literal(uniform))
        close(weighted_sum(factor, e.rewards, uniform, e), literal(uniform))

    def test_no_window_is_too_long(self) -> None:
        e = random_episodes([5, 3])
        close(NStep(0.99, 10**12, "uniform")(e).advantages, monte_carlo(0.99)(e).advantages)


class TestEnds:
    @every
    def test_bootstraps_with_what_is_said(self, estimator: type) -> None:
        e = replace(random_episodes([3, 4, 2]), terminated=np.array([True, False, False]))
        by_score = estimator(0.9, bootstrap="score")
        close(by_score(e).targets, estimator(0.9)(replace(e, bootstrap_values=e.final_scores)).targets)
        close(estimator(0.9, bootstrap="zero")(e).advantages, estimator(0.9, truncation="terminal")(e).advantages)
        assert by_score.needs == {Need.VALUES, Need.FINAL_SCORES}
        assert estimator().needs == estimator(bootstrap="score", truncation="mask").needs == {Need.VALUES}

    @every
    def test_softened_rewards(self, estimator: type) -> None:
        e = random_episodes([1, 2, 3, 4, 5, 6])
        rewards = e.rewards.copy()
        rewards[e.offsets[1:] - 1] += [0.0, 0.0, -0.5, -1.0, -1.0, -1.0]
        soft = estimator(0.9, truncation="soft", overlong_length=4, overlong_buffer=2)(e)
        hard = estimator(0.9, truncation="terminal")(replace(e, rewards=rewards))
        assert soft.keep is None
        for name in ("advantages", "targets"):
            close(getattr(soft, name), getattr(hard, name))

    @given(e=batches)
    def test_next_values(self, e: Episodes) -> None:
        expected = [x for i, v in enumerate(np.split(e.values, e.offsets[1:-1]))
                    for x in [*v[1:].tolist(), e.bootstrap_values[i]]]
        before = e.values.copy()
        np.testing.assert_array_equal(next_values(e.values, e.bootstrap_values, e), expected)
        np.testing.assert_array_equal(e.values, before)

    def test_explained_variance_of_what_is_kept(self) -> None:
        G, v = np.array([1.0, 2.0, 4.0, 99.0]), np.array([1.0, 2.5, 3.0, -7.0])
        keep = np.array([True, True, True, False])
        expected = 1 - np.var(G[:3] - v[:3]) / np.var(G[:3])
        assert explained_variance(G, v, keep)["explained_variance"].value == pytest.approx(expected, rel=1e-14)
        assert explained_variance(G[:3], v[:3])["explained_variance"].value == pytest.approx(expected, rel=1e-14)
        assert not explained_variance(G, v, np.zeros(4, bool))

    def test_mixed_precision_is_the_wider_one(self) -> None:
        e = random_episodes([3, 4])
        mixed = replace(e, values=e.values.astype(np.float32))
        estimate = GAE(0.9)(mixed)
        assert estimate.advantages.dtype == estimate.targets.dtype == np.float64
        close(estimate.advantages, GAE(0.9)(replace(e, values=mixed.values.astype(np.float64))).advantages)


@every
def test_no_gradient_flows_out(estimator: type) -> None:
    torch = pytest.importorskip("torch")
    e = random_episodes([3, 4])
    columns = {name: torch.tensor(getattr(e, name), requires_grad=True)
               for name in ("rewards", "values", "bootstrap_values")}
    estimate = estimator(0.9)(replace(e, **columns))
    assert not estimate.advantages.requires_grad
    assert not estimate.targets.requires_grad
    for name, column in columns.items():
        np.testing.assert_array_equal(column.detach().numpy(), getattr(e, name))


@every
def test_refuses_a_batch_without_values(estimator: type) -> None:
    with pytest.raises(ValueError, match=f"{estimator.__name__} needs Episodes.values"):
        estimator()(Episodes.from_rows([[1.0]]))
    e = Episodes.from_rows([[1.0]], values=[[1.0]], terminated=[False])
    with pytest.raises(ValueError, match="no bootstrap_values"):
        estimator()(e)
    with pytest.raises(ValueError, match="no final_scores"):
        estimator(bootstrap="score")(e)


@every
@pytest.mark.parametrize(("wrong", "message"), [
    (dict(gamma=1.5), "gamma must lie"), (dict(gamma=math.nan), "gamma must lie"),
    (dict(truncation="boot"), "truncation must be one of bootstrap"),
    (dict(bootstrap="values"), "bootstrap must be one of value, score, zero"),
    (dict(truncation="soft"), "needs overlong_length"), (dict(overlong_length=5), "belong to truncation 'soft'")])
def test_refuses_shared_fields_out_of_range(estimator: type, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimator(**wrong)


@pytest.mark.parametrize(("estimator", "wrong", "message"), [
    (GAE, dict(lam_critic=1.1), "lam_critic must lie"), (GAE, dict(lam_min=-0.1, length_adaptive=1.0), "lam_min must"),
    (GAE, dict(length_adaptive=-0.05), "length_adaptive must be"),
    (GAE, dict(length_adaptive=math.inf), "length_adaptive must be"),
    (GAE, dict(length_adaptive=math.nan), "length_adaptive must be"),
    (GAE, dict(lam_min=0.5), "set length_adaptive"), (TDLambda, dict(lam=-1.0), "lam must lie"),
    (UPGO, dict(lam_critic=2.0), "lam_critic must lie"), (NStep, dict(n=0), "n must be at least 1"),
    (NStep, dict(lam=2.0), "lam must lie"), (NStep, dict(mixture="unifrom"), "did you mean 'uniform'"),
    (NStep, dict(mixture="given"), "needs weights"), (NStep, dict(weights=(1.0,)), "belong to mixture 'given'"),
    (NStep, dict(mixture="given", weights=(0.5, 0.4)), "the sum 1, got 0.9"),
    (NStep, dict(mixture="given", weights=(1.5, -0.5)), "got -0.5 for returns of 2 steps"),
    (NStep, dict(mixture="given", weights=(math.nan,)), "not negative, got nan")])
def test_refuses_own_fields_out_of_range(estimator: type, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimator(**wrong)
