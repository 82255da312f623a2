"""Off-policy corrections against literal loops, small cases computed by hand, and properties of every batch."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from frameworks import FRAMEWORKS, in_float64
from hypothesis import given
from hypothesis import strategies as st
from posttrain.batching import counts_of
from posttrain.data import Episodes, Prompt, Rollouts, offsets_of, to_numpy
from posttrain.protocols import Corrected, Need
from posttrain.testing.random_data import chosen, in_framework, joined
from posttrain_estimators.corrections import ImportanceCorrection

TIS = ImportanceCorrection()
ICEPOP = ImportanceCorrection(cap=math.inf, reject="token", low=0.5, high=5.0)
GEOMETRIC_MASK = ImportanceCorrection(weight="none", reject="sequence", low=0.99, high=1.01)
SCOPES = ("none", "token", "turn", "sequence")
CORRECTIONS = [
    ImportanceCorrection(weight, cap, normal, reject, low, high)
    for weight in SCOPES for cap in ((2.0, 1.0, math.inf) if weight != "none" else (2.0,))
    for normal in ((False, True) if weight != "none" else (False,))
    for reject in SCOPES for low, high in (((0.7, math.inf), (0.8, 1.3)) if reject != "none" else ((0.0, math.inf),))]
corrections = st.sampled_from(CORRECTIONS)


def random_episodes(lengths: list[int], gap: float, seed: int) -> Episodes:
    """Log-ratios of standard deviation `gap`."""
    rng, N = np.random.default_rng(seed), sum(lengths)
    mu = -rng.exponential(size=N)
    return Episodes(
        offsets=offsets_of(np.array(lengths)), rewards=np.zeros(N), terminated=np.ones(len(lengths), bool),
        group=np.zeros(len(lengths), np.int64), behavior_logprobs=mu, logprobs=mu + gap * rng.normal(size=N),
        turn=np.concatenate([np.sort(rng.integers(0, 3, n)) for n in lengths]))


batches = st.builds(random_episodes, st.lists(st.integers(1, 7), min_size=1, max_size=6),
                    st.sampled_from([1e-6, 0.05, 0.5, 3.0, 40.0]), st.integers(0, 999))


def of_log_ratios(*rows: list[float]) -> Episodes:
    """Episodes with the given log pi/mu, one list each; mu is 1/e everywhere."""
    return Episodes.from_rows([[0.0] * len(row) for row in rows], logprobs=[[x - 1.0 for x in row] for row in rows],
                              behavior_logprobs=[[-1.0] * len(row) for row in rows])


def said(corrected: Corrected) -> dict[str, float]:
    return {name.removeprefix("correction/"): value for name, value in corrected.metrics.values_by_name().items()}


def literal(c: ImportanceCorrection, e: Episodes) -> tuple[list[float], list[bool], dict[str, float]]:
    """The definition, action by action."""
    N, d = len(e.rewards), [float(p - m) for p, m in zip(e.logprobs, e.behavior_logprobs)]
    def clamped(x: float) -> float:
        return max(-20.0, min(20.0, x))
    def logs(i: int, scope: str) -> list[float]:
        if scope == "sequence":
            return [d[j] for j in range(N) if e.episode[j] == e.episode[i]]
        if scope == "turn":
            return [d[j] for j in range(N) if e.episode[j] == e.episode[i] and e.turn[j] == e.turn[i]]
        return [d[i]]
    rho = [math.exp(clamped(math.fsum(logs(i, c.weight)))) for i in range(N)]
    w, keep, cut = [], [], 0
    for i in range(N):
        members = logs(i, c.reject)
        bar = math.exp(clamped(math.fsum(members) / len(members)))
        keep.append(c.reject == "none" or c.low <= bar <= c.high)
        if not keep[i] or c.weight == "none":
            w.append(1.0)
            continue
        cut += rho[i] > c.cap
        w.append(min(rho[i], c.cap))
    kept = [x for x, stays in zip(w, keep) if stays]
    if c.self_normalise:
        mean = math.fsum(kept) / len(kept) if kept else 1.0
        w = [x / mean if stays else 1.0 for x, stays in zip(w, keep)]
    gone = sum(not any(keep[a:b]) for a, b in zip(e.offsets, e.offsets[1:]))
    metrics = {
        "rho_mean": math.fsum(rho) / N, "rho_max": max(rho), "clipped": cut / N, "rejected": 1 - len(kept) / N,
        "rejected_episodes": gone / e.n_episodes, "k1": -math.fsum(map(clamped, d)) / N,
        "k3": math.fsum(math.expm1(clamped(x)) - clamped(x) for x in d) / N}
    if kept:
        metrics["ess"] = math.fsum(kept) ** 2 / (len(kept) * math.fsum(x * x for x in kept))
    return w, keep, metrics


class TestEveryCorrection:
    @given(e=batches, seed=st.integers(0, 999))
    def test_equals_its_definition(self, e: Episodes, seed: int) -> None:
        for c in np.random.default_rng(seed).choice(np.array(CORRECTIONS, object), 8, replace=False):
            got, (w, keep, metrics) = c(e), literal(c, e)
            np.testing.assert_allclose(got.weight, w, rtol=1e-12)
            np.testing.assert_array_equal(got.keep, keep)
            assert said(got).keys() == metrics.keys()
            for name, value in said(got).items():
                assert value == pytest.approx(metrics[name], rel=1e-10, abs=1e-13), (c, name)

    @pytest.mark.parametrize("c", CORRECTIONS)
    def test_does_nothing_on_policy(self, c: ImportanceCorrection) -> None:
        e = random_episodes([3, 1, 5], 0.0, 4)
        got = c(e)
        assert (got.weight == 1.0).all() and got.keep.all()
        assert said(got) == {"rho_mean": 1.0, "rho_max": 1.0, "clipped": 0.0, "rejected": 0.0,
                             "rejected_episodes": 0.0, "ess": 1.0, "k1": 0.0, "k3": 0.0}

    @given(c=corrections, e=batches)
    def test_weights_keep_to_the_cap(self, c: ImportanceCorrection, e: Episodes) -> None:
        w = replace(c, self_normalise=False)(e).weight
        assert (w >= 0).all() and (w <= max(c.cap, 1.0)).all() and np.isfinite(w).all()

    @given(e=batches, weight=st.sampled_from(SCOPES[1:]))
    def test_a_cap_of_one_is_never_exceeded(self, e: Episodes, weight: str) -> None:
        assert (ImportanceCorrection(weight, 1.0)(e).weight <= 1.0).all()

    @given(c=corrections.filter(lambda c: c.self_normalise), e=batches)
    def test_self_normalised_weights_average_one(self, c: ImportanceCorrection, e: Episodes) -> None:
        got, plain = c(e), replace(c, self_normalise=False)(e)
        np.testing.assert_array_equal(got.keep, plain.keep)
        assert (got.weight[~got.keep] == 1.0).all()
        if got.keep.any():
            assert got.weight[got.keep].mean() == pytest.approx(1.0, rel=1e-12)
            factors = got.weight[got.keep] / plain.weight[got.keep]
            np.testing.assert_allclose(factors, factors[0], rtol=1e-12)
            assert said(got)["ess"] == pytest.approx(said(plain)["ess"], rel=1e-12)

    @given(c=corrections, e=batches, seed=st.integers(0, 99))
    def test_order_of_episodes_does_not_matter(self, c: ImportanceCorrection, e: Episodes, seed: int) -> None:
        order = np.random.default_rng(seed).permutation(e.n_episodes).tolist()
        got, other = c(e), c(chosen(e, order))
        for name in ("weight", "keep"):
            rows = np.split(getattr(got, name), e.offsets[1:-1])
            np.testing.assert_allclose(getattr(other, name), np.concatenate([rows[i] for i in order]), rtol=1e-12)
        assert said(other) == pytest.approx(said(got), rel=1e-12, abs=1e-15)

    @given(c=corrections.filter(lambda c: not c.self_normalise), e=batches, other=batches)
    def test_parts_add_up(self, c: ImportanceCorrection, e: Episodes, other: Episodes) -> None:
        """Split into parts, weights are the same, and metrics add up; the effective sample size is of one batch."""
        whole, parts = c(joined(e, other)), [c(e), c(other)]
        for name in ("weight", "keep"):
            np.testing.assert_allclose(getattr(whole, name), np.concatenate([getattr(p, name) for p in parts]),
                                       rtol=1e-12)
        added, expected = (parts[0].metrics + parts[1].metrics).values_by_name(), whole.metrics.values_by_name()
        added.pop("correction/ess", None), expected.pop("correction/ess", None)
        assert added == pytest.approx(expected, rel=1e-12, abs=1e-15)

    @given(e=batches)
    def test_an_effective_sample_is_a_fraction(self, e: Episodes) -> None:
        for c in (TIS, ImportanceCorrection(cap=math.inf), ImportanceCorrection("sequence")):
            assert 1 / len(e.rewards) - 1e-12 <= said(c(e))["ess"] <= 1 + 1e-12

    @given(e=batches)
    def test_one_turn_per_episode_is_the_sequence_and_one_per_action_the_token(self, e: Episodes) -> None:
        N = len(e.rewards)
        for turn, scope in ((np.zeros(N, int), "sequence"), (np.arange(N), "token")):
            same = replace(e, turn=turn)
            a = ImportanceCorrection("turn", 3.0, reject="turn", low=0.7, high=1.5)(same)
            b = ImportanceCorrection(scope, 3.0, reject=scope, low=0.7, high=1.5)(same)
            np.testing.assert_allclose(a.weight, b.weight, rtol=1e-12)
            np.testing.assert_array_equal(a.keep, b.keep)

    @given(c=corrections.filter(lambda c: c.self_normalise and c.reject == "token"), e=batches)
    def test_a_rejected_action_does_not_reach_the_mean(self, c: ImportanceCorrection, e: Episodes) -> None:
        """What is far out is out, however far: the others' weights stay what they are."""
        c = replace(c, weight="token")
        got = c(e)
        further = np.where(got.keep, e.logprobs, e.behavior_logprobs - 5.0)
        np.testing.assert_allclose(c(replace(e, logprobs=further)).weight, got.weight, rtol=1e-12)


class TestByHand:
    """Ratios 1, 4, 1/4 and 2, 2: powers of two, so that every number below can be checked in the head."""

    e = of_log_ratios([0.0, math.log(4), -math.log(4)], [math.log(2), math.log(2)])

    def test_truncated_importance_sampling(self) -> None:
        got = TIS(self.e)
        np.testing.assert_allclose(got.weight, [1, 2, 0.25, 2, 2], rtol=1e-14)
        assert got.keep.all()
        assert said(got) == pytest.approx({
            "rho_mean": 9.25 / 5, "rho_max": 4.0, "clipped": 1 / 5, "rejected": 0.0, "rejected_episodes": 0.0,
            "ess": 7.25**2 / (5 * (1 + 4 + 0.0625 + 4 + 4)), "k1": -2 * math.log(2) / 5,
            "k3": (0 + (3 - math.log(4)) + (-0.75 + math.log(4)) + 2 * (1 - math.log(2))) / 5})

    def test_of_sequences(self) -> None:
        """Products 1 and 4, geometric means 1 and 2."""
        got = ImportanceCorrection("sequence", 3.0)(self.e)
        np.testing.assert_allclose(got.weight, [1, 1, 1, 3, 3], rtol=1e-14)
        assert said(got)["clipped"] == pytest.approx(2 / 5)
        assert ImportanceCorrection(reject="sequence", high=2.5)(self.e).keep.all()
        assert ImportanceCorrection(reject="sequence", high=1.5)(self.e).keep.tolist() == [True] * 3 + [False] * 2

    def test_of_turns(self) -> None:
        e = replace(self.e, turn=np.array([0, 0, 1, 0, 1]))
        got = ImportanceCorrection("turn", math.inf, reject="turn", low=0.3)(e)
        np.testing.assert_allclose(got.weight, [4, 4, 1, 2, 2], rtol=1e-14)
        assert got.keep.tolist() == [True, True, False, True, True]

    def test_icepop(self) -> None:
        got = ICEPOP(of_log_ratios([math.log(0.49), math.log(0.51), math.log(4.9), math.log(5.1)], [3.0]))
        np.testing.assert_allclose(got.weight, [1, 0.51, 4.9, 1, 1], rtol=1e-14)
        assert got.keep.tolist() == [False, True, True, False, False]
        assert said(got)["rejected"] == pytest.approx(3 / 5)
        assert said(got)["rejected_episodes"] == pytest.approx(1 / 2)
        assert said(got)["clipped"] == 0.0
        assert said(got)["ess"] == pytest.approx(5.41**2 / (2 * (0.51**2 + 4.9**2)))

    def test_geometric_mask(self) -> None:
        """A long answer with small gaps stays, though its product is far from 1; large gaps that cancel stay, too."""
        got = GEOMETRIC_MASK(of_log_ratios([0.009] * 400, [1.0, -1.0], [0.011] * 3, [-0.02]))
        assert got.keep.tolist() == [True] * 402 + [False] * 4
        assert (got.weight == 1.0).all()
        assert said(got)["rejected_episodes"] == 0.5

    def test_bounds_are_of_pi_over_mu(self) -> None:
        """Not of its inverse: an action that the policy finds less likely than the sampler did is below 1."""
        assert ImportanceCorrection(reject="token", low=0.5)(of_log_ratios([-1.0, 1.0])).keep.tolist() == [False, True]

    def test_bounds_belong_to_what_stays(self) -> None:
        got = ImportanceCorrection(reject="token", low=1.0, high=1.0)(of_log_ratios([0.0, 1e-3, -1e-3]))
        assert got.keep.tolist() == [True, False, False]

    def test_self_normalised(self) -> None:
        got = ImportanceCorrection(self_normalise=True, reject="token", high=3.0)(self.e)
        np.testing.assert_allclose(got.weight, np.array([1, 0, 0.25, 2, 2]) / (5.25 / 4) + [0, 1, 0, 0, 0], rtol=1e-14)
        assert got.keep.tolist() == [True, False, True, True, True]

    def test_nothing_left(self) -> None:
        got = ImportanceCorrection(self_normalise=True, reject="token", high=1.5)(of_log_ratios([1.0], [2.0, 3.0]))
        assert got.weight.tolist() == [1.0] * 3 and not got.keep.any()
        assert said(got)["rejected"] == said(got)["rejected_episodes"] == 1.0 and "ess" not in said(got)

    def test_measures_without_doing_anything(self) -> None:
        got = ImportanceCorrection("none")(self.e)
        assert got.weight.tolist() == [1.0] * 5 and got.keep.all()
        assert said(got) == pytest.approx(
            {**said(TIS(self.e)), "ess": 1.0, "clipped": 0.0})

    def test_divergences_of_a_whole_distribution(self) -> None:
        """Actions as often as mu draws them: the means are KL(mu || pi) and the total of pi, exactly."""
        mu, pi, times = [0.5, 0.25, 0.25], [0.2, 0.7, 0.1], [2, 1, 1]
        d = [math.log(p / m) for p, m, n in zip(pi, mu, times) for _ in range(n)]
        kl = sum(m * math.log(m / p) for p, m in zip(pi, mu))
        got = said(TIS(of_log_ratios(d)))
        assert got["k1"] == pytest.approx(kl, rel=1e-12) and got["k3"] == pytest.approx(kl, rel=1e-12)
        assert got["rho_mean"] == pytest.approx(1.0, rel=1e-12)

    def test_small_gaps_keep_their_digits(self) -> None:
        """k3 of a gap of 1e-6 is half of its square; exp(d) - 1 - d would have three digits left."""
        gap = of_log_ratios([0.0])
        gap = replace(gap, logprobs=np.array([1e-6]), behavior_logprobs=np.array([0.0]))
        assert said(TIS(gap))["k3"] == pytest.approx(5e-13, rel=1e-6, abs=0.0)

    def test_a_rejected_action_leaves_the_counts(self) -> None:
        """What a loss divides by; an episode without any action left is not counted either."""
        got = ICEPOP(of_log_ratios([0.0, 3.0, 0.1], [-4.0]))
        counts = counts_of(rollouts([3, 1]), got.keep)
        assert (counts.actions, counts.episodes, counts.episode_actions.tolist()) == (2, 1, [2, 0])


def rollouts(lengths: list[int]) -> Rollouts:
    """One prompt token, then the actions of each episode."""
    E = len(lengths)
    return Rollouts(
        tokens=np.zeros(sum(lengths) + E, np.int32), offsets=offsets_of(np.array(lengths) + 1), episode=np.arange(E),
        is_action=np.concatenate([np.arange(n + 1) > 0 for n in lengths]), group=np.arange(E),
        finish=np.zeros(E, np.int8), terminated=np.ones(E, bool), prompts=(Prompt(text=""),) * E,
        completions=("",) * E)


class TestArrays:
    EXTREME = of_log_ratios([500.0, -500.0, 500.0], [-1e30, 3.0], [1e30])

    @pytest.mark.parametrize("c", [TIS, ICEPOP, GEOMETRIC_MASK, ImportanceCorrection("sequence", math.inf, True)])
    @pytest.mark.parametrize("framework", FRAMEWORKS)
    def test_ratios_without_bound_stay_finite_in_float32(self, c: ImportanceCorrection, framework: str) -> None:
        e = in_framework(self.EXTREME, lambda x: FRAMEWORKS[framework](np.asarray(x, np.float32)))
        got = c(e)
        assert to_numpy(got.weight).dtype == np.float32 and np.isfinite(to_numpy(got.weight)).all()
        assert all(math.isfinite(value) for value in said(got).values())

    @pytest.mark.parametrize("c", [TIS, ICEPOP, GEOMETRIC_MASK, ImportanceCorrection("turn", 1.5, True, "turn", 0.7)])
    @pytest.mark.parametrize("framework", FRAMEWORKS)
    def test_frameworks_say_the_same(self, c: ImportanceCorrection, framework: str) -> None:
        e = random_episodes([3, 1, 4, 2], 0.4, 7)
        with in_float64(framework):
            got = c(in_framework(e, FRAMEWORKS[framework]))
            np.testing.assert_array_equal(to_numpy(got.keep), c(e).keep)
            np.testing.assert_allclose(to_numpy(got.weight), c(e).weight, rtol=1e-13)
            assert said(got) == pytest.approx(said(c(e)), rel=1e-12)

    @pytest.mark.needs("torch")
    def test_no_gradient_flows_out(self) -> None:
        e = in_framework(random_episodes([3, 2], 0.4, 7), FRAMEWORKS["torch"])
        e.logprobs.requires_grad_()
        e.behavior_logprobs.requires_grad_()
        for c in (TIS, replace(TIS, self_normalise=True), ICEPOP):
            assert not c(e).weight.requires_grad and not c(e).keep.requires_grad


class TestErrors:
    @pytest.mark.parametrize(("fields", "message"), [
        ({"weight": "tokens"}, "weight must be one of none, token, turn, sequence"),
        ({"reject": "episode"}, "reject must be one of none, token, turn, sequence"),
        ({"cap": 0.9}, "cap must be at least 1"), ({"cap": math.nan}, "cap must be at least 1"),
        ({"weight": "none", "self_normalise": True}, "self_normalise divides weights"),
        ({"reject": "token", "low": 1.1}, "low and high must enclose 1"),
        ({"reject": "token", "low": -0.1}, "low and high must enclose 1"),
        ({"reject": "token", "high": 0.9}, "low and high must enclose 1"),
        ({"reject": "token", "high": math.nan}, "low and high must enclose 1"),
        ({"low": 0.5}, "reject is 'none'"), ({"high": 5.0}, "reject is 'none'"),
        ({"reject": "sequence"}, "rejects nothing between"),
    ])
    def test_fields_that_do_not_fit(self, fields: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ImportanceCorrection(**fields)

    @pytest.mark.parametrize("name", ["logprobs", "behavior_logprobs"])
    def test_missing_log_probs(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"Episodes.{name}"):
            TIS(replace(of_log_ratios([0.0]), **{name: None}))

    def test_turns_are_needed_where_they_are_read(self) -> None:
        both = {Need.LOGPROBS, Need.BEHAVIOR_LOGPROBS}
        for c in (TIS, ICEPOP, GEOMETRIC_MASK):
            assert c.needs == both
        for c in (ImportanceCorrection("turn"), ImportanceCorrection("none", reject="turn", low=0.5)):
            assert c.needs == both | {Need.TURN}
            with pytest.raises(ValueError, match="Episodes.turn"):
                c(of_log_ratios([0.0]))
