"""Process rewards against a literal loop over steps, and what steps are."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean, pstdev, stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from posttrain.data import Episodes, offsets_of
from posttrain.protocols import Need
from posttrain_estimators.baselines import GroupBaseline
from posttrain_estimators.process import ProcessReward

few = settings(max_examples=40)  # of every combination of fields
reward = st.sampled_from([0.0, 0.0, 0.5, 1.0, -2.0])


@st.composite
def batches(draw: st.DrawFn) -> Episodes:
    """One to eight episodes in up to three groups, with turns, many actions without a reward, some truncated."""
    rewards = draw(st.lists(st.lists(reward, min_size=1, max_size=6), min_size=1, max_size=8))
    def each(element: st.SearchStrategy) -> list:
        return draw(st.lists(element, min_size=len(rewards), max_size=len(rewards)))
    turns = [sorted(draw(st.lists(st.integers(0, 3), min_size=len(r), max_size=len(r)))) for r in rewards]
    episodes = Episodes.from_rows(rewards, group=each(st.sampled_from([7, -2, 30])), terminated=each(st.booleans()))
    return replace(episodes, turn=np.array([u for row in turns for u in row], np.int64))


def steps_of(how: ProcessReward, rewards: list[float], turns: list[int]) -> list[tuple[int, float]]:
    """Where each step ends, and what it earned."""
    if how.step == "reward":
        return [(t, r) for t, r in enumerate(rewards) if r]
    return [(max(t for t, u in enumerate(turns) if u == k), sum(r for r, u in zip(rewards, turns) if u == k))
            for k in sorted(set(turns))]


def literal(how: ProcessReward, episodes: Episodes) -> tuple[list[float], list[bool]]:
    """Advantages and `keep`, action by action."""
    cuts = episodes.offsets[1:-1]
    steps = [steps_of(how, r.tolist(), u.tolist())
             for r, u in zip(np.split(episodes.rewards, cuts), np.split(episodes.turn, cuts))]
    alive = [e for e in range(len(steps)) if how.truncation != "mask" or episodes.terminated[e]]
    deviation = {0: pstdev, 1: stdev}[how.ddof]
    advantages, keep = [], []
    for e, length in enumerate(episodes.lengths.tolist()):
        own = [r for i in alive if episodes.group[i] == episodes.group[e] for _, r in steps[i]]
        kept = e in alive and len(own) > 1
        keep += [kept] * length
        if not kept or len(set(own)) == 1:
            advantages += [0.0] * length
            continue
        c = {"none": 1.0, "group": deviation(own) + how.eps,
             "batch": deviation([r for i in alive for _, r in steps[i]]) + how.eps}[how.scale]
        advantages += [sum((r - fmean(own)) / c for end, r in steps[e] if end >= t) for t in range(length)]
    return advantages, keep


class TestProcessReward:
    @pytest.mark.parametrize("truncation", ["terminal", "mask"])
    @pytest.mark.parametrize("scale", ["group", "batch", "none"])
    @pytest.mark.parametrize("step", ["reward", "turn"])
    @few
    @given(episodes=batches(), ddof=st.sampled_from([0, 1]))
    def test_equals_the_literal_form(self, step: str, scale: str, truncation: str, episodes: Episodes,
                                     ddof: int) -> None:
        how = ProcessReward(step, scale, ddof, truncation=truncation)  # type: ignore[arg-type]  # names as text
        estimate = how(episodes)
        advantages, keep = literal(how, episodes)
        np.testing.assert_allclose(estimate.advantages, advantages, rtol=1e-9, atol=1e-9)
        if truncation == "mask":
            np.testing.assert_array_equal(estimate.keep, keep)
        else:
            assert estimate.keep is None

    @pytest.mark.parametrize("scale", ["group", "none"])
    @few
    @given(outcomes=st.lists(st.floats(0.5, 9.0, width=32), min_size=2, max_size=6), length=st.integers(1, 4))
    def test_one_step_at_the_end_is_the_outcome_form(self, scale: str, outcomes: list[float], length: int) -> None:
        s = [[*[0.0] * (length - 1), round(x, 1)] for x in outcomes]
        episodes = Episodes.from_rows(s)
        np.testing.assert_allclose(ProcessReward(scale=scale)(episodes).advantages,  # type: ignore[arg-type]
                                   GroupBaseline(scale=scale)(episodes).advantages,  # type: ignore[arg-type]
                                   rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("scale", ["group", "batch", "none"])
    @few
    @given(episodes=batches(), shift=st.integers(-8, 8))
    def test_a_shift_of_all_steps_changes_nothing(self, scale: str, episodes: Episodes, shift: int) -> None:
        ends = np.ones(len(episodes.turn), bool)
        ends[:-1] = (np.diff(episodes.turn) != 0) | (np.diff(episodes.episode) != 0)
        moved = replace(episodes, rewards=episodes.rewards + shift * ends)
        how = ProcessReward("turn", scale)  # type: ignore[arg-type]  # a name as text
        np.testing.assert_allclose(how(moved).advantages, how(episodes).advantages, rtol=1e-9, atol=1e-9)

    @few
    @given(episodes=batches())
    def test_normalised_steps_of_a_group_add_up_to_nothing(self, episodes: Episodes) -> None:
        first = ProcessReward("turn")(episodes).advantages[episodes.offsets[:-1]]  # each the sum over its episode
        for g in set(episodes.group):
            assert abs(first[episodes.group == g].sum()) < 1e-9

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_equal_steps_give_exactly_nothing(self, dtype: type) -> None:
        for G in range(1, 12):
            episodes = Episodes.from_rows([[0.1, 0.0, 0.1]] * G)
            episodes = replace(episodes, rewards=episodes.rewards.astype(dtype))
            estimate = ProcessReward()(episodes)
            assert not estimate.advantages.any() and estimate.advantages.dtype == dtype
            assert estimate.metrics["zero_variance_groups"].value == 1.0

    def test_behind_the_last_step_there_is_nothing_to_come(self) -> None:
        A = ProcessReward(scale="none")(Episodes.from_rows([[1.0, 0.0], [0.0, 3.0]])).advantages
        assert A.tolist() == [-1.0, 0.0, 1.0, 1.0]

    def test_a_turn_may_earn_nothing(self) -> None:
        episodes = replace(Episodes.from_rows([[0.0, 0.0, 2.0], [4.0]]), turn=np.array([0, 0, 1, 0]))
        assert ProcessReward("turn", "none")(episodes).advantages.tolist() == [-2.0, -2.0, 0.0, 2.0]

    def test_turns_do_not_reach_over_the_border_of_an_episode(self) -> None:
        episodes = replace(Episodes.from_rows([[1.0], [2.0], [6.0]]), turn=np.array([0, 0, 0]))
        assert ProcessReward("turn", "none")(episodes).advantages.tolist() == [-2.0, -1.0, 3.0]

    def test_masked_episodes_leave_statistics_and_update(self) -> None:
        episodes = Episodes.from_rows([[1.0], [3.0], [100.0, 0.0], [4.0], [7.0]], group=[0, 0, 0, 1, 1],
                                      terminated=[True, True, False, True, False])
        estimate = ProcessReward(scale="none", truncation="mask")(episodes)
        assert estimate.advantages.tolist() == [-1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
        assert estimate.keep.tolist() == [True, True, False, False, False, False]

    def test_no_episodes(self) -> None:
        none = Episodes(offsets=offsets_of(np.zeros(0, int)), rewards=np.zeros(0), terminated=np.zeros(0, bool),
                        group=np.zeros(0, int), turn=np.zeros(0, int))
        for step in ("reward", "turn"):
            assert ProcessReward(step)(none).advantages.shape == (0,)  # type: ignore[arg-type]  # a name as text

    def test_needs_turns_where_they_are_steps(self) -> None:
        assert ProcessReward().needs == frozenset() and ProcessReward("turn").needs == {Need.TURN}
        with pytest.raises(ValueError, match=r"Episodes\.turn"):
            ProcessReward("turn")(Episodes.from_rows([[1.0]]))

    @pytest.mark.parametrize(("wrong", "message"), [
        (dict(step="turns"), "did you mean 'turn'"), (dict(scale="grup"), "did you mean 'group'"),
        (dict(ddof=3), "ddof must be 0 or 1"), (dict(eps=-1.0), "eps must be positive"),
        (dict(truncation="bootstrap"), "uses no critic"), (dict(truncation="soft"), "overlong_length")])
    def test_refuses_what_it_cannot_do(self, wrong: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ProcessReward(**wrong)
