"""GAE against its definition as a sum, its limits, and how episodes end."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from posttrain.data import Episodes
from posttrain.protocols import Need
from posttrain_estimators.multistep import GAE

fraction = st.sampled_from([0.0, 0.5, 0.95, 1.0])


def random_episodes(lengths: list[int], seed: int = 0) -> Episodes:
    rng = np.random.default_rng(seed)
    def column() -> list[np.ndarray]:
        return [rng.normal(size=n) for n in lengths]
    E = len(lengths)
    return Episodes.from_rows(column(), values=column(), bootstrap_values=rng.normal(size=E),
                              terminated=rng.random(E) < 0.5, group=np.arange(E) // 2)


batches = st.builds(random_episodes, st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 99))


def select(e: Episodes, order: list[int]) -> Episodes:
    def parts(column: np.ndarray) -> list[np.ndarray]:
        split = np.split(column, e.offsets[1:-1])
        return [split[i] for i in order]
    return Episodes.from_rows(parts(e.rewards), values=parts(e.values), bootstrap_values=e.bootstrap_values[order],
                              terminated=e.terminated[order], group=e.group[order])


def literal(e: Episodes, gamma: float, lam: float, bootstrap: bool = True) -> tuple[list[float], list[float]]:
    """Advantages as explicit sums over l of (gamma lam)^l delta_(t+l), and the deltas."""
    advantages, deltas = [], []
    for i, (start, end) in enumerate(zip(e.offsets[:-1], e.offsets[1:])):
        r, v = e.rewards[start:end].tolist(), e.values[start:end].tolist()
        v.append(0.0 if e.terminated[i] or not bootstrap else float(e.bootstrap_values[i]))
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        deltas += delta
        advantages += [sum((gamma * lam) ** l * delta[t + l] for l in range(len(r) - t)) for t in range(len(r))]
    return advantages, deltas


class TestGAE:
    @given(e=batches, gamma=fraction, lam=fraction)
    def test_equals_its_definition(self, e: Episodes, gamma: float, lam: float) -> None:
        estimate = GAE(gamma, lam)(e)
        advantages, _ = literal(e, gamma, lam)
        np.testing.assert_allclose(estimate.advantages, advantages, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(estimate.targets, np.array(advantages) + e.values, rtol=1e-12, atol=1e-12)
        assert estimate.keep is None

    @given(e=batches, gamma=fraction)
    def test_without_lambda_it_is_the_temporal_difference(self, e: Episodes, gamma: float) -> None:
        np.testing.assert_allclose(GAE(gamma, 0.0)(e).advantages, literal(e, gamma, 0.0)[1], rtol=1e-14, atol=1e-14)

    @given(e=batches, gamma=fraction)
    def test_with_lambda_one_it_is_the_return_minus_the_value(self, e: Episodes, gamma: float) -> None:
        estimate = GAE(gamma, 1.0)(e)
        returns = []
        for i, r in enumerate(np.split(e.rewards, e.offsets[1:-1])):
            last = 0.0 if e.terminated[i] else e.bootstrap_values[i]
            returns += [sum(gamma ** (j - k) * r[j] for j in range(k, len(r))) + gamma ** (len(r) - k) * last
                        for k in range(len(r))]
        np.testing.assert_allclose(estimate.targets, returns, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(estimate.advantages, returns - e.values, rtol=1e-12, atol=1e-12)

    @given(e=batches, seed=st.integers(0, 99))
    def test_permuting_episodes_permutes_the_result(self, e: Episodes, seed: int) -> None:
        order = list(np.random.default_rng(seed).permutation(e.n_episodes))
        before = np.split(GAE()(e).advantages, e.offsets[1:-1])
        np.testing.assert_array_equal(GAE()(select(e, order)).advantages, np.concatenate([before[i] for i in order]))

    @given(e=batches, other=batches)
    def test_further_episodes_change_nothing(self, e: Episodes, other: Episodes) -> None:
        def both(name: str) -> np.ndarray:
            return np.concatenate([getattr(e, name), getattr(other, name)])
        joined = Episodes(offsets=np.concatenate([e.offsets, e.offsets[-1] + other.offsets[1:]]), **{
            name: both(name) for name in ("rewards", "values", "bootstrap_values", "terminated", "group")})
        for name in ("advantages", "targets"):
            np.testing.assert_array_equal(getattr(GAE()(joined), name)[:len(e.rewards)], getattr(GAE()(e), name))

    @given(e=batches)
    def test_a_perfect_critic_leaves_no_advantage(self, e: Episodes) -> None:
        """Values that are the discounted sum of what follows explain everything, whatever lambda is."""
        v = GAE(0.9, 1.0)(e).targets
        estimate = GAE(0.9, 0.7)(replace(e, values=v))
        np.testing.assert_allclose(estimate.advantages, 0.0, atol=1e-12)
        np.testing.assert_allclose(estimate.targets, v, atol=1e-12)

    def test_the_value_behind_a_terminated_episode_is_ignored(self) -> None:
        e = Episodes.from_rows([[1.0], [1.0]], values=[[0.0], [0.0]], bootstrap_values=[50.0, 50.0],
                               terminated=[True, False])
        assert GAE()(e).advantages.tolist() == [1.0, 51.0]

    @pytest.mark.parametrize("truncation", ["terminal", "mask"])
    def test_truncated_episodes_may_end_where_they_end(self, truncation: str) -> None:
        e = random_episodes([3, 4, 2, 5])
        e = replace(e, terminated=np.array([True, False, True, False]))
        estimate = GAE(0.9, 0.8, truncation=truncation)(replace(e, bootstrap_values=None))
        expected = np.array(literal(e, 0.9, 0.8, bootstrap=False)[0])
        kept = e.terminated[e.episode] | (truncation == "terminal")
        np.testing.assert_allclose(estimate.advantages, np.where(kept, expected, 0.0), rtol=1e-12)
        assert (estimate.keep is None) == (truncation == "terminal")
        if estimate.keep is not None:
            np.testing.assert_array_equal(estimate.keep, kept)

    @pytest.mark.parametrize("truncation", ["bootstrap", "mask"])
    def test_whitens_advantages_and_never_targets(self, truncation: str) -> None:
        e = random_episodes([3, 4, 2, 5], seed=1)
        plain, white = (GAE(whiten=w, truncation=truncation)(e) for w in (False, True))
        kept = np.ones(14, bool) if plain.keep is None else plain.keep
        own = plain.advantages[kept]
        np.testing.assert_allclose(white.advantages[kept], (own - own.mean()) / np.sqrt(own.var(ddof=1) + 1e-8))
        assert not white.advantages[~kept].any()
        np.testing.assert_array_equal(white.targets, plain.targets)

    def test_a_single_action_is_not_whitened(self) -> None:
        e = Episodes.from_rows([[3.0]], values=[[1.0]])
        assert GAE(whiten=True)(e).advantages.tolist() == [2.0]

    def test_explained_variance(self) -> None:
        e = random_episodes([6, 7], seed=3)
        estimate = GAE(0.9, 0.9)(e)
        expected = 1 - np.var(estimate.targets - e.values) / np.var(estimate.targets)
        assert estimate.metrics["explained_variance"].value == pytest.approx(expected, rel=1e-12)
        constant = Episodes.from_rows([[1.0], [1.0]], values=[[0.2], [0.4]])
        assert "explained_variance" not in GAE()(constant).metrics  # targets that do not vary: undefined

    def test_huge_values(self) -> None:
        e = Episodes.from_rows([[1e100, -1e100]], values=[[1e99, 0.0]])
        np.testing.assert_allclose(GAE(1.0, 1.0)(e).advantages, [-1e99, -1e100])

    def test_refuses_a_batch_without_the_values_it_needs(self) -> None:
        with pytest.raises(ValueError, match=r"GAE needs Episodes\.values"):
            GAE()(Episodes.from_rows([[1.0]]))
        truncated = Episodes.from_rows([[1.0], [1.0]], values=[[1.0], [1.0]], terminated=[True, False])
        with pytest.raises(ValueError, match="episode 1 is truncated and there are no bootstrap_values"):
            GAE()(truncated)
        assert GAE()(replace(truncated, terminated=np.array([True, True]))).advantages.tolist() == [0.0, 0.0]

    @pytest.mark.parametrize(("wrong", "message"), [
        (dict(gamma=-0.1), "gamma must lie"), (dict(lam=1.1), "lam must lie"),
        (dict(lam=float("nan")), "lam must lie"), (dict(truncation="boot"), "truncation must be one of bootstrap")])
    def test_refuses_what_it_cannot_do(self, wrong: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            GAE(**wrong)

    def test_needs_values(self) -> None:
        assert GAE().needs == frozenset({Need.VALUES})
