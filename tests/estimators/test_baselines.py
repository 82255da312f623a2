"""Reward-to-go and group baselines against literal loops, and the properties that hold for every batch."""

from __future__ import annotations

from dataclasses import fields, replace
from statistics import fmean, pstdev, stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from posttrain.data import Episodes, offsets_of
from posttrain.protocols import Need
from posttrain_estimators.baselines import GroupBaseline, Reinforce, ReMax
from posttrain_estimators.process import ProcessReward

GRPO = GroupBaseline()
DR_GRPO = GroupBaseline(scale="none")
RLOO = GroupBaseline(baseline="leave_one_out", scale="none")
OPO = GroupBaseline(baseline="length_weighted", scale="none")
REINFORCE_PP_BASELINE = GroupBaseline(scale="none", whiten=True, statistics="token")
PRESETS = {"grpo": GRPO, "dr_grpo": DR_GRPO, "rloo": RLOO, "grpo_ddof0": GroupBaseline(ddof=0),
           "opo": OPO, "batch": GroupBaseline(scale="batch"),
           "batch_tokens": GroupBaseline(scale="batch", statistics="token")}
few = settings(max_examples=25)  # of every preset or combination of fields
number = st.floats(-10, 10, width=32)
row = st.lists(number, min_size=1, max_size=5)


@st.composite
def batches(draw: st.DrawFn) -> Episodes:
    """One to eight episodes in up to three groups, some truncated."""
    rewards = draw(st.lists(row, min_size=1, max_size=8))
    E = len(rewards)
    def each(element: st.SearchStrategy) -> list:
        return draw(st.lists(element, min_size=E, max_size=E))
    return Episodes.from_rows(rewards, group=each(st.sampled_from([7, -2, 30])), terminated=each(st.booleans()))


def rows(episodes: Episodes, flat: np.ndarray) -> list[np.ndarray]:
    return np.split(flat, episodes.offsets[1:-1])


def select(episodes: Episodes, order: list[int]) -> Episodes:
    parts = rows(episodes, episodes.rewards)
    return Episodes.from_rows([parts[i] for i in order], group=episodes.group[order],
                              terminated=episodes.terminated[order])


def literal_group_advantages(how: GroupBaseline, episodes: Episodes) -> tuple[list[float], list[bool]]:
    """One number per episode and whether it is kept, by the papers' formulas, one episode after the other."""
    s, lengths = [sum(map(float, r)) for r in rows(episodes, episodes.rewards)], episodes.lengths.tolist()
    alive = [i for i in range(len(s)) if how.truncation == "terminal" or episodes.terminated[i]]
    if how.incomplete == "drop":
        alive = [i for i in alive if all(j in alive for j in range(len(s)) if episodes.group[j] == episodes.group[i])]
    deviation = {0: pstdev, 1: stdev}[how.ddof]
    batch = [s[j] for j in alive for _ in range(lengths[j] if how.statistics == "token" else 1)]
    advantages, keep = [0.0] * len(s), [False] * len(s)
    for i in alive:
        members = [j for j in alive if episodes.group[j] == episodes.group[i]]
        own, others = [s[j] for j in members], [s[j] for j in members if j != i]
        if not others:
            continue
        keep[i] = True
        if len(set(own)) == 1:
            continue
        b = {"mean": fmean(own), "leave_one_out": fmean(others),
             "length_weighted": fmean(own, weights=[lengths[j] for j in members])}
        c = {"none": 1.0, "group": deviation(own) + how.eps, "batch": deviation(batch) + how.eps}
        advantages[i] = (s[i] - b[how.baseline]) / c[how.scale]
    return advantages, keep


class TestGroupBaseline:
    @pytest.mark.parametrize(("truncation", "incomplete"), [
        ("terminal", "survivors"), ("mask", "survivors"), ("mask", "drop")])
    @pytest.mark.parametrize("preset", PRESETS)
    @few
    @given(episodes=batches())
    def test_equals_the_literal_form(self, preset: str, truncation: str, incomplete: str, episodes: Episodes) -> None:
        how = replace(PRESETS[preset], truncation=truncation, incomplete=incomplete)
        estimate = how(episodes)
        advantages, keep = literal_group_advantages(how, episodes)
        per_action = np.repeat(advantages, episodes.lengths)
        if how.scale != "none":  # groups that differ by rounding alone: their size is eps's, not the formula's
            s = np.array([r.sum() for r in rows(episodes, episodes.rewards)])
            alive = episodes.terminated | (truncation == "terminal")
            for g in set(episodes.group):
                own = s[(episodes.group == g) & alive]
                if len(own) and 0 < np.ptp(own) < 1e-6:
                    return
        np.testing.assert_allclose(estimate.advantages, per_action, rtol=1e-7, atol=1e-7)
        assert (estimate.keep is None) == (truncation == "terminal")
        if estimate.keep is not None:
            np.testing.assert_array_equal(estimate.keep, np.repeat(keep, episodes.lengths))

    @pytest.mark.parametrize("preset", PRESETS)
    @few
    @given(episodes=batches(), seed=st.integers(0, 99))
    def test_permuting_episodes_permutes_the_result(self, preset: str, episodes: Episodes, seed: int) -> None:
        order = list(np.random.default_rng(seed).permutation(episodes.n_episodes))
        before, shuffled = PRESETS[preset](episodes).advantages, select(episodes, order)
        after = rows(shuffled, PRESETS[preset](shuffled).advantages)
        for position, i in enumerate(order):
            np.testing.assert_allclose(after[position], rows(episodes, before)[i], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("preset", ["grpo", "dr_grpo", "rloo", "opo"])
    @few
    @given(episodes=batches(), extra=st.lists(row, min_size=1, max_size=3))
    def test_other_groups_change_nothing(self, preset: str, episodes: Episodes, extra: list[list[float]]) -> None:
        more = Episodes.from_rows([*rows(episodes, episodes.rewards), *extra],
                                  group=[*episodes.group, *[11] * len(extra)],
                                  terminated=[*episodes.terminated, *[False] * len(extra)])
        how = PRESETS[preset]
        np.testing.assert_array_equal(how(more).advantages[:len(episodes.rewards)], how(episodes).advantages)

    @pytest.mark.parametrize("preset", PRESETS)
    @few
    @given(episodes=batches(), shift=st.integers(-64, 64))
    def test_a_shift_of_a_groups_outcomes_changes_nothing(self, preset: str, episodes: Episodes, shift: int) -> None:
        s = np.round(episodes.rewards)  # whole numbers, so that the shift is exact
        first = np.zeros(len(s))
        first[episodes.offsets[:-1]] = shift
        how = PRESETS[preset]
        np.testing.assert_allclose(how(replace(episodes, rewards=s + first)).advantages,
                                   how(replace(episodes, rewards=s)).advantages, rtol=1e-9, atol=1e-9)

    @given(episodes=batches())
    def test_rloo_is_a_multiple_of_dr_grpo(self, episodes: Episodes) -> None:
        size = np.array([np.sum(episodes.group == g) for g in episodes.group])
        factor = np.where(size > 1, size / np.maximum(size - 1, 1), 0.0)
        np.testing.assert_allclose(RLOO(episodes).advantages,
                                   factor[episodes.episode] * DR_GRPO(episodes).advantages, rtol=1e-12)

    @given(outcomes=st.lists(number, min_size=1, max_size=8), length=st.integers(1, 5))
    def test_opo_with_equal_lengths_is_dr_grpo(self, outcomes: list[float], length: int) -> None:
        episodes = Episodes.from_rows([[*[0.0] * (length - 1), s] for s in outcomes])
        np.testing.assert_allclose(OPO(episodes).advantages, DR_GRPO(episodes).advantages, rtol=1e-12, atol=1e-12)

    @given(episodes=batches())
    def test_opo_adds_up_to_nothing_over_the_actions_of_a_group(self, episodes: Episodes) -> None:
        A = OPO(episodes).advantages
        for g in set(episodes.group):
            size = np.sum(episodes.group == g)
            assert size == 1 or abs(A[episodes.group[episodes.episode] == g].sum()) < 1e-9

    @pytest.mark.parametrize("preset", ["grpo", "grpo_ddof0", "batch", "batch_tokens"])
    @few
    @given(episodes=batches(), factor=st.floats(0.25, 8.0))
    def test_a_positive_factor_of_rewards_changes_nothing(self, preset: str, episodes: Episodes, factor: float) -> None:
        s = np.round(episodes.rewards)  # far from eps, which is what keeps this from being exact
        how = PRESETS[preset]
        np.testing.assert_allclose(how(replace(episodes, rewards=factor * s)).advantages,
                                   how(replace(episodes, rewards=s)).advantages, rtol=5e-5, atol=2e-6)

    @pytest.mark.parametrize("how", [DR_GRPO, RLOO, GRPO])
    @few
    @given(episodes=batches())
    def test_advantages_of_a_group_add_up_to_nothing(self, how: GroupBaseline, episodes: Episodes) -> None:
        first = how(episodes).advantages[episodes.offsets[:-1]]
        for g in set(episodes.group):
            assert abs(first[episodes.group == g].sum()) < 1e-7

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("preset", PRESETS)
    def test_equal_outcomes_give_exactly_nothing(self, preset: str, dtype: type) -> None:
        for G in range(1, 12):
            episodes = replace(Episodes.from_rows([[0.1]] * G), rewards=np.full(G, 0.1, dtype))
            estimate = PRESETS[preset](episodes)
            assert not estimate.advantages.any()
            assert estimate.metrics["zero_variance_groups"].value == 1.0
            for statistics in ("row", "token"):
                assert not replace(PRESETS[preset], whiten=True, statistics=statistics)(episodes).advantages.any()

    @pytest.mark.parametrize("preset", PRESETS)
    def test_a_group_of_one_gets_nothing_not_its_reward(self, preset: str) -> None:
        estimate = PRESETS[preset](Episodes.from_rows([[5.0, 1.0], [1.0], [2.0]], group=[0, 1, 1]))
        assert estimate.advantages[:2].tolist() == [0.0, 0.0]
        assert estimate.advantages[2] == pytest.approx(-estimate.advantages[3], rel=1e-12) and estimate.advantages[3]
        assert estimate.keep is None

    def test_masked_episodes_leave_statistics_and_update(self) -> None:
        episodes = Episodes.from_rows([[1.0], [3.0], [100.0, 0.0], [4.0], [7.0]], group=[0, 0, 0, 1, 1],
                                      terminated=[True, True, False, True, False])
        estimate = replace(DR_GRPO, truncation="mask")(episodes)
        assert estimate.advantages.tolist() == [-1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
        assert estimate.keep.tolist() == [True, True, False, False, False, False]  # the fifth: nothing to compare with

    def test_an_incomplete_group_is_left_out_where_asked(self) -> None:
        episodes = Episodes.from_rows([[1.0], [3.0], [9.0], [4.0], [7.0]], group=[0, 0, 0, 1, 1],
                                      terminated=[True, True, False, True, True])
        estimate = replace(DR_GRPO, truncation="mask", incomplete="drop")(episodes)
        assert estimate.advantages.tolist() == [0.0, 0.0, 0.0, -1.5, 1.5]
        assert estimate.keep.tolist() == [False, False, False, True, True]

    def test_a_long_answer_is_penalised(self) -> None:
        episodes = Episodes.from_rows([[1.0], [0.0, 1.0], [0.0, 0.0, 1.0]])
        how = replace(DR_GRPO, truncation="soft", overlong_length=3, overlong_buffer=2)  # outcomes 1, 0.5 and 0
        assert how(episodes).advantages.tolist() == [0.5, 0.0, 0.0, -0.5, -0.5, -0.5]

    def test_whitening_over_tokens_counts_long_episodes_more(self) -> None:
        episodes = Episodes.from_rows([[0.0, 0.0, 0.0], [2.0]])  # minus the group's mean: -1, -1, -1, 1
        np.testing.assert_allclose(REINFORCE_PP_BASELINE(episodes).advantages,
                                   np.array([-0.5, -0.5, -0.5, 1.5]) / (1.0 + 1e-8) ** 0.5, rtol=1e-14)
        by_row = replace(REINFORCE_PP_BASELINE, statistics="row")(episodes).advantages
        np.testing.assert_allclose(by_row, np.array([-1, -1, -1, 1]) / (2.0 + 1e-8) ** 0.5, rtol=1e-14)

    @pytest.mark.parametrize("preset", PRESETS)
    @few
    @given(episodes=batches())
    def test_whitened_by_row_is_whitening_of_one_number_per_episode(self, preset: str, episodes: Episodes) -> None:
        s = np.round(episodes.rewards)
        how = replace(PRESETS[preset], scale="none")
        A = how(replace(episodes, rewards=s)).advantages[episodes.offsets[:-1]].tolist()
        kept = [e for e in range(len(A)) if np.sum(episodes.group == episodes.group[e]) > 1]
        own = [A[e] for e in kept]
        expected = [(a - fmean(own)) / (stdev(own) ** 2 + 1e-8) ** 0.5 if e in kept and max(own) - min(own) > 1e-9
                    else 0.0 for e, a in enumerate(A)]
        got = replace(how, whiten=True, statistics="row")(replace(episodes, rewards=s)).advantages
        np.testing.assert_allclose(got, np.repeat(expected, episodes.lengths), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("preset", PRESETS)
    def test_all_masked(self, preset: str) -> None:
        episodes = Episodes.from_rows([[1.0], [3.0]], terminated=[False, False])
        estimate = replace(PRESETS[preset], truncation="mask")(episodes)
        assert estimate.advantages.tolist() == [0.0, 0.0] and not estimate.keep.any()

    def test_huge_outcomes(self) -> None:
        A = GRPO(Episodes.from_rows([[1e100], [-1e100], [0.0]])).advantages
        np.testing.assert_allclose(A, [1.0, -1.0, 0.0], atol=1e-12)

    def test_scale_by_batch_is_the_spread_of_all_outcomes(self) -> None:
        episodes = Episodes.from_rows([[0.0], [2.0], [10.0], [14.0]], group=[0, 0, 1, 1])
        c = stdev([0, 2, 10, 14]) + 1e-6
        np.testing.assert_allclose(GroupBaseline(scale="batch")(episodes).advantages, np.array([-1, 1, -2, 2]) / c)

    @pytest.mark.parametrize(("wrong", "message"), [
        (dict(truncation="bootstrap"), "uses no critic"), (dict(truncation="masked"), "did you mean 'mask'"),
        (dict(scale="grup"), "did you mean 'group'"), (dict(baseline="median"), "must be one of mean"),
        (dict(statistics="tokens"), "did you mean 'token'"), (dict(incomplete="dorp"), "did you mean 'drop'"),
        (dict(truncation="soft"), "needs overlong_length"), (dict(overlong_length=9), "belong to truncation 'soft'"),
        (dict(ddof=2), "ddof must be 0 or 1"), (dict(eps=0.0), "eps must be positive"),
        (dict(eps=float("nan")), "eps must be positive")])
    def test_refuses_what_it_cannot_do(self, wrong: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            GroupBaseline(**wrong)


def literal_reward_to_go(rewards: list[float], gamma: float) -> list[float]:
    """Sum of gamma^(j-k) r_j over j >= k, term by term."""
    return [sum(gamma ** (j - k) * rewards[j] for j in range(k, len(rewards))) for k in range(len(rewards))]


def literal_whitening(A: list[list[float]], alive: list[int], statistics: str) -> list[list[float]] | None:
    """Mean and variance one number after the other; None where the numbers differ by so little that 1e-8 decides."""
    members = [(a, 1 / len(A[e]) if statistics == "row" else 1.0) for e in alive for a in A[e]]
    count = len(alive) if statistics == "row" else len(members)
    if count < 2:
        return A
    kept = [a for a, _ in members]
    if max(kept) - min(kept) < 1e-3:
        return None
    mean = sum(w * a for a, w in members) / count
    variance = sum(w * (a - mean) ** 2 for a, w in members) / (count - 1)
    return [[(a - mean) / (variance + 1e-8) ** 0.5 if e in alive else 0.0 for a in row] for e, row in enumerate(A)]


class TestReinforce:
    @pytest.mark.parametrize("truncation", ["terminal", "mask"])
    @pytest.mark.parametrize("baseline", ["none", "batch", "group", "leave_one_out"])
    @pytest.mark.parametrize("white", ["", "token", "row"])
    @few
    @given(episodes=batches(), gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]))
    def test_equals_the_literal_form(self, truncation: str, baseline: str, white: str, episodes: Episodes,
                                     gamma: float) -> None:
        estimate = Reinforce(gamma, baseline, bool(white), truncation,  # type: ignore[arg-type]  # names as text
                             statistics=white or "token")(episodes)  # type: ignore[arg-type]
        G = [literal_reward_to_go(list(map(float, r)), gamma) for r in rows(episodes, episodes.rewards)]
        alive = [i for i in range(len(G)) if truncation == "terminal" or episodes.terminated[i]]
        group = {i: [j for j in alive if episodes.group[j] == episodes.group[i]] for i in alive}
        against = {i: {"none": [], "batch": alive, "group": group[i],
                       "leave_one_out": [j for j in group[i] if j != i]}[baseline] for i in alive}
        if baseline in ("group", "leave_one_out"):
            alive = [i for i in alive if len(group[i]) > 1]
        A = [[g - (fmean([G[j][0] for j in against[i]]) if against[i] else 0.0) if i in alive else 0.0 for g in G[i]]
             for i in range(len(G))]
        expected = literal_whitening(A, alive, white) if white else A
        if expected is None:
            return
        np.testing.assert_allclose(estimate.advantages, [a for row in expected for a in row], rtol=1e-9, atol=1e-9)
        assert estimate.targets is None
        if truncation == "mask":
            np.testing.assert_array_equal(estimate.keep, np.isin(episodes.episode, alive))
        else:
            assert estimate.keep is None

    @pytest.mark.parametrize(("baseline", "preset"), [("group", DR_GRPO), ("leave_one_out", RLOO)])
    @few
    @given(outcomes=st.lists(number, min_size=2, max_size=6))
    def test_without_discount_an_outcome_has_its_group_advantage(self, baseline: str, preset: GroupBaseline,
                                                                 outcomes: list[float]) -> None:
        episodes = Episodes.from_rows([[0.0, s] for s in outcomes])
        np.testing.assert_allclose(Reinforce(baseline=baseline)(episodes).advantages,  # type: ignore[arg-type]
                                   preset(episodes).advantages, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
    def test_equal_outcomes_of_a_group_give_exactly_nothing(self, baseline: str, dtype: type) -> None:
        for G in range(1, 12):
            episodes = replace(Episodes.from_rows([[0.0, 0.1]] * G), rewards=np.tile([0.0, 0.1], G).astype(dtype))
            assert not Reinforce(baseline=baseline)(episodes).advantages.any()  # type: ignore[arg-type]

    @pytest.mark.parametrize("statistics", ["token", "row"])
    def test_a_single_action_is_not_whitened(self, statistics: str) -> None:
        how = Reinforce(whiten=True, statistics=statistics)  # type: ignore[arg-type]
        assert how(Episodes.from_rows([[3.0]])).advantages.tolist() == [3.0]

    @pytest.mark.parametrize("statistics", ["token", "row"])
    def test_equal_returns_are_whitened_to_nothing(self, statistics: str) -> None:
        how = Reinforce(whiten=True, statistics=statistics)  # type: ignore[arg-type]
        assert not how(Episodes.from_rows([[0.1]] * 8)).advantages.any()

    def test_a_long_episode_counts_as_much_as_a_short_one_by_row(self) -> None:
        short = Episodes.from_rows([[0.0, 1.0], [3.0]])
        long = Episodes.from_rows([[*[0.0] * 40, 1.0], [3.0]])
        by_row = Reinforce(whiten=True, statistics="row")
        np.testing.assert_allclose(by_row(long).advantages[[0, -1]], by_row(short).advantages[[0, -1]], rtol=1e-12)
        assert Reinforce(whiten=True)(long).advantages[-1] > 2 * Reinforce(whiten=True)(short).advantages[-1]

    @pytest.mark.parametrize(("wrong", "message"), [
        (dict(truncation="bootstrap"), "uses no critic"), (dict(gamma=1.5), r"gamma must lie in \[0, 1\]"),
        (dict(gamma=float("nan")), "gamma must lie"), (dict(baseline="grup"), "baseline must be one of none, batch"),
        (dict(statistics="rows"), "did you mean 'row'"), (dict(overlong_buffer=4), "belong to truncation 'soft'")])
    def test_refuses_what_it_cannot_do(self, wrong: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Reinforce(**wrong)


class TestReMax:
    @pytest.mark.parametrize("truncation", ["terminal", "mask"])
    @pytest.mark.parametrize("white", ["", "token", "row"])
    @few
    @given(episodes=batches(), gamma=st.sampled_from([0.0, 0.9, 1.0]), seed=st.integers(0, 99))
    def test_equals_the_literal_form(self, truncation: str, white: str, episodes: Episodes, gamma: float,
                                     seed: int) -> None:
        greedy = np.random.default_rng(seed).normal(size=episodes.n_episodes)
        how = ReMax(gamma, bool(white), white or "token", truncation)  # type: ignore[arg-type]  # names as text
        estimate = how(replace(episodes, greedy_rewards=greedy))
        G = [literal_reward_to_go(list(map(float, r)), gamma) for r in rows(episodes, episodes.rewards)]
        alive = [e for e in range(len(G)) if truncation == "terminal" or episodes.terminated[e]]
        A = [[g - float(greedy[e]) if e in alive else 0.0 for g in G[e]] for e in range(len(G))]
        expected = literal_whitening(A, alive, white) if white else A
        if expected is not None:
            np.testing.assert_allclose(estimate.advantages, [a for row in expected for a in row], rtol=1e-9, atol=1e-9)

    def test_the_greedy_answer_itself_gets_nothing(self) -> None:
        episodes = replace(Episodes.from_rows([[0.0, 0.7], [0.2]]), greedy_rewards=np.array([0.7, 0.7]))
        np.testing.assert_allclose(ReMax()(episodes).advantages, [0.0, 0.0, -0.5], rtol=1e-15)

    def test_says_which_column_is_missing(self) -> None:
        with pytest.raises(ValueError, match=r"Episodes\.greedy_rewards"):
            ReMax()(Episodes.from_rows([[1.0]]))

    @pytest.mark.parametrize(("wrong", "message"), [
        (dict(truncation="bootstrap"), "uses no critic"), (dict(gamma=-0.1), "gamma must lie"),
        (dict(statistics="batch"), "statistics must be one of token, row"),
        (dict(truncation="soft"), "overlong_length")])
    def test_refuses_what_it_cannot_do(self, wrong: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ReMax(**wrong)


class TestComponents:
    @pytest.mark.needs("torch")
    @pytest.mark.parametrize("how", [
        Reinforce(baseline="leave_one_out"), Reinforce(whiten=True, statistics="row"), ReMax(), ReMax(whiten=True), OPO,
        REINFORCE_PP_BASELINE, ProcessReward(), ProcessReward("turn", truncation="soft", overlong_length=2,
                                                             overlong_buffer=1)])
    def test_a_gradient_does_not_pass(self, how: Reinforce | ReMax | GroupBaseline | ProcessReward) -> None:
        import torch

        episodes = replace(Episodes.from_rows([[0.5, 1.0], [2.0], [4.0]]), turn=np.array([0, 1, 0, 0]),
                           rewards=torch.tensor([0.5, 1.0, 2.0, 4.0], requires_grad=True),
                           greedy_rewards=torch.tensor([0.5, 1.0, 2.0], requires_grad=True))
        A = how(episodes).advantages
        assert not A.requires_grad and A.dtype == torch.float32 and A.any()

    @pytest.mark.parametrize("component", [Reinforce, ReMax, GroupBaseline])
    def test_is_a_value(self, component: type) -> None:
        one = component()
        assert one == component() and hash(one) == hash(component())
        with pytest.raises(AttributeError):
            setattr(one, fields(one)[0].name, 0)

    @pytest.mark.parametrize("how", [Reinforce(), *PRESETS.values()])
    def test_needs_nothing_but_rewards(self, how: Reinforce | GroupBaseline) -> None:
        assert how.needs == frozenset()

    def test_remax_needs_greedy_answers(self) -> None:
        assert ReMax().needs == {Need.GREEDY_REWARDS}

    @pytest.mark.parametrize("how", [
        Reinforce(whiten=True, baseline="batch"), Reinforce(1.0, "leave_one_out", True, statistics="row"),
        REINFORCE_PP_BASELINE, *PRESETS.values()])
    def test_of_no_episodes(self, how: Reinforce | GroupBaseline) -> None:
        none = Episodes(offsets=offsets_of(np.zeros(0, int)), rewards=np.zeros(0), terminated=np.zeros(0, bool),
                        group=np.zeros(0, int))
        assert how(none).advantages.shape == (0,)
