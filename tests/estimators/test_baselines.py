"""Reward-to-go and group baselines against literal loops, and the properties that hold for every batch."""

from __future__ import annotations

from dataclasses import fields, replace
from statistics import fmean, pstdev, stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from posttrain.data import Episodes, offsets_of
from posttrain_estimators.baselines import GroupBaseline, Reinforce
from posttrain_estimators.multistep import GAE

GRPO = GroupBaseline()
DR_GRPO = GroupBaseline(scale="none")
RLOO = GroupBaseline(baseline="leave_one_out", scale="none")
PRESETS = {"grpo": GRPO, "dr_grpo": DR_GRPO, "rloo": RLOO, "grpo_ddof0": GroupBaseline(ddof=0),
           "batch": GroupBaseline(scale="batch")}
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
    s = [sum(map(float, r)) for r in rows(episodes, episodes.rewards)]
    alive = [i for i in range(len(s)) if how.truncation == "terminal" or episodes.terminated[i]]
    deviation = {0: pstdev, 1: stdev}[how.ddof]
    advantages, keep = [0.0] * len(s), [False] * len(s)
    for i in alive:
        own = [s[j] for j in alive if episodes.group[j] == episodes.group[i]]
        others = [s[j] for j in alive if episodes.group[j] == episodes.group[i] and j != i]
        if not others:
            continue
        keep[i] = True
        if len(set(own)) == 1:
            continue
        b = fmean(own) if how.baseline == "mean" else fmean(others)
        c = {"none": 1.0, "group": deviation(own) + how.eps, "batch": deviation([s[j] for j in alive]) + how.eps}
        advantages[i] = (s[i] - b) / c[how.scale]
    return advantages, keep


class TestGroupBaseline:
    @pytest.mark.parametrize("truncation", ["terminal", "mask"])
    @pytest.mark.parametrize("preset", PRESETS)
    @few
    @given(episodes=batches())
    def test_equals_the_literal_form(self, preset: str, truncation: str, episodes: Episodes) -> None:
        how = replace(PRESETS[preset], truncation=truncation)
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

    @pytest.mark.parametrize("preset", ["grpo", "dr_grpo", "rloo"])
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

    @pytest.mark.parametrize("preset", PRESETS)
    def test_a_group_of_one_gets_nothing_not_its_reward(self, preset: str) -> None:
        estimate = PRESETS[preset](Episodes.from_rows([[5.0, 1.0], [1.0], [2.0]], group=[0, 1, 1]))
        assert estimate.advantages[:2].tolist() == [0.0, 0.0]
        assert estimate.advantages[2] == -estimate.advantages[3] != 0.0
        assert estimate.keep is None

    def test_masked_episodes_leave_statistics_and_update(self) -> None:
        episodes = Episodes.from_rows([[1.0], [3.0], [100.0, 0.0], [4.0], [7.0]], group=[0, 0, 0, 1, 1],
                                      terminated=[True, True, False, True, False])
        estimate = replace(DR_GRPO, truncation="mask")(episodes)
        assert estimate.advantages.tolist() == [-1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
        assert estimate.keep.tolist() == [True, True, False, False, False, False]  # the fifth: nothing to compare with

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
        (dict(ddof=2), "ddof must be 0 or 1"), (dict(eps=0.0), "eps must be positive"),
        (dict(eps=float("nan")), "eps must be positive")])
    def test_refuses_what_it_cannot_do(self, wrong: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            GroupBaseline(**wrong)


def literal_reward_to_go(rewards: list[float], gamma: float) -> list[float]:
    """Sum of gamma^(j-k) r_j over j >= k, term by term."""
    return [sum(gamma ** (j - k) * rewards[j] for j in range(k, len(rewards))) for k in range(len(rewards))]


class TestReinforce:
    @pytest.mark.parametrize("truncation", ["terminal", "mask"])
    @pytest.mark.parametrize("baseline", ["none", "batch"])
    @pytest.mark.parametrize("white", [False, True])
    @few
    @given(episodes=batches(), gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]))
    def test_equals_the_literal_form(self, truncation: str, baseline: str, white: bool, episodes: Episodes,
                                     gamma: float) -> None:
        estimate = Reinforce(gamma, baseline, white, truncation)(episodes)  # type: ignore[arg-type]  # names as text
        G = [literal_reward_to_go(list(map(float, r)), gamma) for r in rows(episodes, episodes.rewards)]
        alive = [i for i in range(len(G)) if truncation == "terminal" or episodes.terminated[i]]
        b = fmean([G[i][0] for i in alive]) if alive and baseline == "batch" else 0.0
        kept = [g - b for i in alive for g in G[i]]
        mean, scale = 0.0, 1.0
        if white and len(kept) > 1:
            if max(kept) - min(kept) < 1e-3:
                return  # the size of rounding against 1e-8 decides
            mean, scale = fmean(kept), (stdev(kept) ** 2 + 1e-8) ** 0.5
        expected = [(g - b - mean) / scale if i in alive else 0.0 for i in range(len(G)) for g in G[i]]
        np.testing.assert_allclose(estimate.advantages, expected, rtol=1e-9, atol=1e-9)
        assert estimate.targets is None
        if truncation == "mask":
            np.testing.assert_array_equal(estimate.keep, episodes.terminated[episodes.episode])
        else:
            assert estimate.keep is None

    def test_a_single_action_is_not_whitened(self) -> None:
        assert Reinforce(whiten=True)(Episodes.from_rows([[3.0]])).advantages.tolist() == [3.0]

    def test_equal_returns_are_whitened_to_nothing(self) -> None:
        assert not Reinforce(whiten=True)(Episodes.from_rows([[0.1]] * 8)).advantages.any()

    @pytest.mark.parametrize(("wrong", "message"), [
        (dict(truncation="bootstrap"), "uses no critic"), (dict(gamma=1.5), r"gamma must lie in \[0, 1\]"),
        (dict(gamma=float("nan")), "gamma must lie"), (dict(baseline="group"), "baseline must be one of none, batch")])
    def test_refuses_what_it_cannot_do(self, wrong: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Reinforce(**wrong)


class TestComponents:
    @pytest.mark.parametrize("component", [Reinforce, GroupBaseline, GAE])
    def test_is_a_value(self, component: type) -> None:
        one = component()
        assert one == component() and hash(one) == hash(component())
        with pytest.raises(AttributeError):
            setattr(one, fields(one)[0].name, 0)

    @pytest.mark.parametrize("how", [Reinforce(), *PRESETS.values()])
    def test_needs_nothing_but_rewards(self, how: Reinforce | GroupBaseline) -> None:
        assert how.needs == frozenset()

    @pytest.mark.parametrize("how", [Reinforce(whiten=True, baseline="batch"), *PRESETS.values()])
    def test_of_no_episodes(self, how: Reinforce | GroupBaseline) -> None:
        none = Episodes(offsets=offsets_of(np.zeros(0, int)), rewards=np.zeros(0), terminated=np.zeros(0, bool),
                        group=np.zeros(0, int))
        assert how(none).advantages.shape == (0,)
