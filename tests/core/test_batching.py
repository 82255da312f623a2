"""Plans under a budget, and micro-batches cut out of ragged rollouts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from posttrain.batching import FirstFit, StepData, counts_of, cut, plan_by_group, smaller_budget, units_of
from posttrain.data import MicroBatch, Weights
from posttrain.errors import MemoryExhausted
from ragged import rollouts


def literal_first_fit(costs: list[int], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for item in range(len(costs)):
        for b in bins:
            if sum(costs[i] for i in b) + costs[item] <= budget:
                b.append(item)
                break
        else:
            bins.append([item])
    return bins


@given(st.lists(st.integers(1, 60), max_size=60), st.integers(1, 100))
def test_plan_is_first_fit(costs: list[int], budget: int) -> None:
    plan = [b.tolist() for b in FirstFit().plan(np.array(costs, int), budget)]
    assert plan == literal_first_fit(costs, budget)
    assert sorted(i for b in plan for i in b) == list(range(len(costs)))


UNITS = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 4)), max_size=60)


@given(UNITS, st.integers(1, 100))
def test_a_plan_by_group_is_first_fit_of_the_costliest_group_s_costliest_unit(
        units: list[tuple[int, int]], budget: int) -> None:
    total = {g: sum(c for c, other in units if other == g) for _, g in units}
    order = sorted(range(len(units)), key=lambda i: (-total[units[i][1]], units[i][1], -units[i][0], i))
    costs, groups = (np.array([unit[i] for unit in units], int) for i in (0, 1))
    plan = [b.tolist() for b in plan_by_group(FirstFit(), costs, groups, budget)]
    assert plan == [[order[i] for i in b] for b in literal_first_fit(costs[order].tolist(), budget)]
    assert sorted(i for b in plan for i in b) == list(range(len(units)))
    assert all(len(b) == 1 or sum(costs[b]) <= budget for b in plan)


@given(st.lists(st.integers(1, 60), max_size=60), st.integers(1, 100))
def test_units_of_different_groups_are_planned_by_first_fit_decreasing(costs: list[int], budget: int) -> None:
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    plan = plan_by_group(FirstFit(), np.array(costs, int), np.arange(len(costs)), budget)
    assert [b.tolist() for b in plan] == [
        [order[i] for i in b] for b in literal_first_fit([costs[i] for i in order], budget)]


def test_answers_of_one_prompt_are_in_one_part_where_they_fit() -> None:
    groups, lengths = np.repeat(np.arange(4), 4), np.tile([9, 4, 2, 1], 4)
    plan = plan_by_group(FirstFit(), 10 + lengths, groups, int((10 + lengths[:4]).sum()))
    assert [sorted(set(groups[b])) for b in plan] == [[0], [1], [2], [3]]


def test_budget_must_be_positive() -> None:
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        FirstFit(tokens=0)


def test_budget_halves_until_single_units() -> None:
    costs = np.array([5, 3, 2])
    error = MemoryExhausted("out")
    assert smaller_budget(costs, [np.array([0, 1]), np.array([2])], error) == 4
    with pytest.raises(MemoryExhausted, match=r"single unit.*5 tokens"):
        smaller_budget(costs, [np.array([0]), np.array([1]), np.array([2])], error)


def test_counts_leave_rejected_actions_out() -> None:
    r = rollouts([(1, 2), (2, 3), (1, 1)])
    keep = np.array([True, False, True, True, True, False])
    counts = counts_of(r, keep)
    assert (counts.actions, counts.episodes, counts.episode_actions.tolist()) == (4, 2, [1, 3, 0])


def test_units_keep_groups_together_and_skip_dead_episodes() -> None:
    r = rollouts([(1, 1)] * 5, group=[7, 7, 3, 3, 9])
    keep = np.array([True, True, True, True, False])
    assert [u.tolist() for u in units_of(r, keep, "group")] == [[2, 3], [0, 1]]
    assert [u.tolist() for u in units_of(r, keep, "episode")] == [[0], [1], [2], [3]]


def test_cut_is_the_literal_selection() -> None:
    r = rollouts([(2, 3), (1, 2), (3, 1), (2, 2)])
    keep = np.array([1, 0, 1, 1, 1, 1, 0, 1], bool)
    column = np.arange(8.0)
    step = StepData(r, keep, Weights(weight=column + 1), {"advantages": column, "targets": np.stack([column, -column])})
    part = cut(step, np.array([3, 0]))
    assert part.tokens.tolist() == [*r.tokens[12:16], *r.tokens[0:5]]
    assert part.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert part.sequence.tolist() == [0] * 4 + [1] * 5
    assert part.source.tolist() == [3, 6, 8]
    assert part.episode.tolist() == [0, 1, 1]
    assert part.count.tolist() == [1, 2]
    assert part.last.tolist() == [3, 8]
    assert part.advantages.tolist() == [7, 0, 2]
    assert part.targets.tolist() == [[7, 0, 2], [-7, 0, -2]]
    assert part.weight.tolist() == [8, 1, 3]
    assert part.kl_weight.tolist() == [0, 0, 0]


def test_parts_hold_every_kept_action_once() -> None:
    r = rollouts([(1, i % 4 + 1) for i in range(20)])
    N = int(r.is_action.sum())
    step = StepData(r, np.ones(N, bool), Weights(), {"advantages": np.arange(float(N))})
    parts = FirstFit().plan(r.episode_tokens, 9)
    seen = np.concatenate([cut(step, p).advantages for p in parts])
    assert sorted(seen.tolist()) == list(range(N))


def test_an_empty_part_is_legal() -> None:
    r = rollouts([(1, 2)])
    part: MicroBatch = cut(StepData(r, np.ones(2, bool), Weights(weight=np.ones(2))), np.array([], int))
    assert len(part.tokens) == len(part.source) == len(part.count) == 0


