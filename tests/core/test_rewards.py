"""Rewards: the rules, what a reward function receives, where its outcome is placed, and every fault it may have."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from posttrain.config import RewardEntry as Entry
from posttrain.data import Prompt, Rollouts
from posttrain.errors import RewardError
from posttrain.rewards import scoring
from posttrain.rewards.calls import Origin
from posttrain.rewards.pool import Pool
from posttrain.rewards.rules import ExactMatch, Length, Regex
from posttrain.rewards.scoring import summed


@pytest.fixture(params=[False, True], ids=["in process", "forked"])
def fork(request: pytest.FixtureRequest) -> bool:
    """Where functions from Python are called; what comes of it is the same."""
    return bool(request.param)


def rollouts(extras: tuple[dict[str, Any], ...] = ({"answer": "a"}, {"answer": "b", "level": 2}, {})) -> Rollouts:
    """Three episodes of 3, 5 (two sequences) and 2 tokens; the first of each sequence are prompt tokens."""
    return Rollouts(
        tokens=np.arange(10, dtype=np.int32), offsets=np.array([0, 3, 6, 8, 10]), episode=np.array([0, 1, 1, 2]),
        is_action=np.array([0, 1, 1, 0, 1, 0, 0, 1, 0, 0], bool), group=np.arange(3), finish=np.zeros(3, np.int8),
        terminated=np.ones(3, bool), completions=("a", "x", ""),
        prompts=(Prompt(text="p", extra=extras[0], where="d.jsonl:1"),
                 Prompt(messages=({"role": "user", "content": "q"},), extra=extras[1], where="d.jsonl:2"),
                 Prompt(tokens=(8, 9), extra=extras[2], where="d.jsonl:3")))


def score(given: Rollouts, entries: list[Entry], fork: bool = False) -> Rollouts:
    with Pool(entries, fork=fork) as pool:
        return scoring.score(given, entries, pool)[0]


def scored(call: Callable[..., Any], name: str = "mine", fork: bool = False) -> Rollouts:
    return score(rollouts(), [Entry(name, call)], fork)


def test_outcomes_stand_on_the_last_token_of_each_episode(fork: bool) -> None:
    found = scored(lambda **columns: [0.5, None, 2], fork=fork)
    assert found.rewards["mine"].tolist() == [0, 0, 0.5, 0, 0, 0, 0, 0, 0, 2]
    assert found.excluded["mine"].tolist() == [False, True, False]


def test_what_a_reward_receives() -> None:
    seen: dict[str, Any] = {}

    def reward(**columns: Any) -> list[float]:
        seen.update(columns)
        return [0.0] * 3

    scored(reward)
    assert seen == {
        "prompts": ["p", [{"role": "user", "content": "q"}], [8, 9]], "completions": ["a", "x", ""],
        "completion_ids": [[1, 2], [4, 7], []], "answer": ["a", "b", None], "level": [None, 2, None]}


def test_a_reward_receives_only_what_it_accepts() -> None:
    def by_position(completions: list[str], answer: list[str], bonus: float = 0.25) -> list[float]:
        return [float(c == a) + bonus for c, a in zip(completions, answer, strict=True)]

    assert scored(by_position).rewards["mine"][[2, 7, 9]].tolist() == [1.25, 0.25, 0.25]
    assert scored(lambda: [1, 2, 3]).rewards["mine"][[2, 7, 9]].tolist() == [1, 2, 3]


def test_each_reward_is_called_once_per_step() -> None:
    calls = list[str]()

    def called(name: str) -> Callable[..., list[float]]:
        def reward(completions: list[str]) -> list[float]:
            calls.append(name)
            return [0.0] * len(completions)
        return reward

    score(rollouts(), [Entry(name, called(name)) for name in "ab"])
    assert calls == ["a", "b"]


@pytest.mark.parametrize("values", [(1, 2.0, True), np.array([1, 2, 1], np.float32), [np.float64(1), np.int64(2), 1]])
def test_kinds_of_numbers(values: Any, fork: bool) -> None:
    found = scored(lambda **_: values, fork=fork).rewards["mine"]
    assert found.dtype == np.float64 and found[[2, 7, 9]].tolist() == [1, 2, 1]


async def slow(completions: list[str], **columns: Any) -> list[float]:
    await asyncio.sleep(0)
    return [float(len(c)) for c in completions]


def test_async_rewards_are_run(fork: bool) -> None:
    assert scored(slow, fork=fork).rewards["mine"][[2, 7, 9]].tolist() == [1, 1, 0]


def test_async_rewards_inside_a_running_loop(fork: bool) -> None:
    async def notebook() -> Rollouts:
        return scored(slow, fork=fork)

    assert asyncio.run(notebook()).rewards["mine"][[2, 7, 9]].tolist() == [1, 1, 0]


def test_no_episode_calls_no_reward() -> None:
    found = score(rollouts().select(np.array([], int)), [Entry("mine", lambda **_: 1 / 0)])
    assert found.rewards["mine"].shape == (0,) and found.excluded["mine"].shape == (0,)


def test_order_of_episodes_does_not_matter() -> None:
    order = np.array([2, 0, 1])
    def reward(completions: list[str], **_: Any) -> list[float | None]:
        return [ord(c) if c else None for c in completions]
    entries = [Entry("mine", reward, 2.0)]
    before = summed(scored(reward).select(order), entries)
    after = summed(score(rollouts().select(order), entries), entries)
    for name in ("mine", "reward"):
        assert np.array_equal(before.rewards[name], after.rewards[name])
        assert np.array_equal(before.excluded[name], after.excluded[name])


def divides(completions: list[str], **_: Any) -> list[float]:
    return [1 / len(c) for c in completions]


async def divides_later(completions: list[str], **_: Any) -> list[float]:
    return divides(completions)


@pytest.mark.parametrize("call", [divides, divides_later])
def test_an_exception_names_reward_row_and_line_and_keeps_its_cause(call: Callable[..., Any], fork: bool) -> None:
    with pytest.raises(RewardError, match=r"reward 'mine' raised ZeroDivisionError: .* on row d\.jsonl:3 at "
                                          r".*test_rewards\.py:\d+\n.*mend the function") as caught:
        scored(call, fork=fork)
    assert "return [1 / len(c) for c in completions]" in str(caught.value.__cause__), "its whole traceback"


def test_an_exception_that_no_single_row_causes(fork: bool) -> None:
    def together(completions: list[str], **_: Any) -> list[float]:
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(RewardError, match="too many on the rows of this step together"):
        scored(together, fork=fork)


@pytest.mark.parametrize(("result", "message"), [
    ([0.0, 1.0], "returned 2 numbers for 3 completions"),
    ([0.0] * 4, "returned 4 numbers for 3 completions"),
    ([], "returned 0 numbers for 3 completions"),
    (1.0, r"returned 1\.0 \(float\), expected a list of 3 numbers"),
    (None, r"returned None \(NoneType\), expected a list of 3"),
    ("abc", r"returned 'abc' \(str\), expected a list of 3"),
    ({"a": 1, "b": 2, "c": 3}, r"\(dict\), expected a list of 3"),
    ((x for x in [1, 2, 3]), r"\(generator\), expected a list of 3"),
    ([0.0, "1", 0.0], r"returned '1' \(str\), which is no number \(row d\.jsonl:2\)"),
    ([0.0, 0.0, [1]], r"returned \[1\] \(list\), which is no number \(row d\.jsonl:3\)"),
    ([1j, 0.0, 0.0], r"which is no number \(row d\.jsonl:1\)"),
    ([10**400, 0.0, 0.0], r"which is no number \(row d\.jsonl:1\)"),
    ([0.0, math.nan, 0.0], r"returned nan, which is not finite.*\(row d\.jsonl:2\)"),
    ([0.0, 0.0, -math.inf], r"returned -inf, which is not finite.*\(row d\.jsonl:3\)"),
    (np.array([0.0, np.inf, 0.0]), r"returned inf, which is not finite.*\(row d\.jsonl:2\)"),
    (np.zeros((3, 2)), r"which is no number \(row d\.jsonl:1\)"),
])
def test_a_wrong_result_names_reward_row_and_what_to_return(result: Any, message: str, fork: bool) -> None:
    with pytest.raises(RewardError, match=f"reward 'mine' {message}|reward 'mine' returned .*{message}") as caught:
        scored(lambda **_: result, fork=fork)
    assert "None" in str(caught.value)


def test_a_row_without_a_place_is_counted() -> None:
    nowhere = replace(rollouts(), prompts=tuple(replace(p, where="") for p in rollouts().prompts))
    with pytest.raises(RewardError, match=r"\(row number 1 of the step\)"):
        score(nowhere, [Entry("mine", lambda **_: [0.0, math.nan, 0.0])])


def test_an_argument_that_no_row_has() -> None:
    def reward(completions: list[str], anwser: list[str]) -> list[float]:
        raise AssertionError("is not reached")

    with pytest.raises(RewardError, match=r"asks for 'anwser', which is no column.*did you mean 'answer'.*level"):
        scored(reward)


def test_two_rewards_of_one_name() -> None:
    with pytest.raises(RewardError, match="two rewards are called 'a'"):
        score(rollouts(), [Entry("a", lambda **_: [0, 0, 0])] * 2)


def test_the_sum_runs_over_the_rewards_that_apply() -> None:
    entries = [Entry("a", lambda **_: [1, None, None], 2.0), Entry("b", lambda **_: [10, 20, None], -0.5),
               Entry("measured", lambda **_: [5, 5, 5], 0.0)]
    found = summed(score(rollouts(), entries), entries)
    assert found.rewards["reward"].tolist() == [0, 0, 2 * 1 - 0.5 * 10, 0, 0, 0, 0, -0.5 * 20, 0, 0]
    assert found.excluded["reward"].tolist() == [False, False, True]
    assert set(found.rewards) == {"a", "b", "measured", "reward"}


numbers = st.one_of(st.none(), st.floats(-10, 10))


@given(table=st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=4), data=st.data())
def test_the_sum_against_a_loop(table: list[tuple[float | None, ...]], data: st.DataObject) -> None:
    weights = data.draw(hnp.arrays(np.float64, len(table), elements=st.sampled_from([-2.0, 0.0, 0.5, 1.0])))
    entries = [Entry(f"r{i}", lambda row=row, **_: list(row), w)
               for i, (row, w) in enumerate(zip(table, weights, strict=True))]
    found = summed(score(rollouts(), entries), entries)
    for e, last in enumerate([2, 7, 9]):
        applicable = [w * row[e] for w, row in zip(weights, table, strict=True) if w != 0 and row[e] is not None]
        assert found.excluded["reward"][e] == (not applicable)
        assert found.rewards["reward"][last] == pytest.approx(sum(applicable), abs=1e-12)


def test_rewards_that_the_environment_placed_count_too() -> None:
    placed = replace(rollouts(), rewards={"env": np.arange(10.0)})
    found = summed(placed, [Entry("env", print, 2.0)])
    assert found.rewards["reward"].tolist() == (2 * np.arange(10.0)).tolist() and not found.excluded["reward"].any()


def test_a_reward_may_be_called_reward_only_where_it_is_the_sum() -> None:
    one = [Entry("reward", lambda **_: [1, 2, None])]
    found = summed(score(rollouts(), one), one)
    assert found.rewards["reward"][[2, 7]].tolist() == [1, 2] and found.excluded["reward"].tolist() == [0, 0, 1]
    with pytest.raises(RewardError, match="the sum of all rewards is called 'reward'"):
        summed(score(rollouts(), one), [replace(one[0], weight=2.0)])


def test_rules_through_scoring_in_a_worker() -> None:
    rules = {"right": ExactMatch(), "letter": Regex("[a-z]"), "short": Length(0, 2, "tokens")}
    entries = [Entry(name, rule, origin=Origin.of(f"posttrain.rewards.rules:{type(rule).__name__}", rule, {}))
               for name, rule in rules.items()]
    found = score(rollouts(), entries)
    assert found.rewards["right"][[2, 7, 9]].tolist() == [1, 0, 0]
    assert found.excluded["right"].tolist() == [False, False, True]
    assert found.rewards["letter"][[2, 7, 9]].tolist() == [1, 1, 0]
    assert found.rewards["short"][[2, 7, 9]].tolist() == [-1, -1, 0]


@pytest.mark.parametrize(("rule", "text", "answer", "expected"), [
    (ExactMatch(), " 12\n", "12", 1.0), (ExactMatch(), "12", 12, 1.0), (ExactMatch(), "12.0", 12, 0.0),
    (ExactMatch(), "12", ["11", 12], 1.0), (ExactMatch(), "12", [], 0.0), (ExactMatch(), "", "", 1.0),
    (ExactMatch(), "Yes", "yes", 0.0), (ExactMatch(ignore_case=True), "STRASSE", "straße", 1.0),
    (ExactMatch(strip=False), "12 ", "12", 0.0),
    (Regex(r"= ?(\d+)", "answer"), "1+1= 2", "2", 1.0), (Regex(r"= ?(\d+)", "answer"), "1+1= 2", "3", 0.0),
    (Regex(r"= ?(\d+)", "answer"), "two", "2", 0.0), (Regex(r"= ?(\d+)", "answer"), "=1 =2", "2", 0.0),
    (Regex(r"= ?(\d+)", "answer", which="last"), "=1 =2", "2", 1.0),
    (Regex(r"\d+", "answer", group=0), "a 7 b", 7, 1.0), (Regex(r"(a)|b", "answer"), "b", "a", 0.0),
    (Regex(r"<(.*?)>", "answer"), "< Yes >", "Yes", 1.0),
    (Regex(r"<(.*?)>", "answer", strip=False), "< Yes >", "Yes", 0.0),
    (Regex(r"<(.*?)>", "answer", ignore_case=True), "<YES>", "yes", 1.0),
])
def test_rules_on_text(rule: ExactMatch | Regex, text: str, answer: Any, expected: float) -> None:
    assert rule(prompts=[""], completions=[text], answer=[answer]) == [expected]
    assert rule(prompts=[""], completions=[text], answer=[None]) == [None]


@pytest.mark.parametrize("rule", [ExactMatch("anser"), Regex("(a)", "anser")])
def test_a_rule_names_the_column_it_misses(rule: ExactMatch | Regex) -> None:
    with pytest.raises(RewardError, match=r"no row has a column 'anser'; did you mean 'answer'.*on row d\.jsonl:1"):
        scored(rule)


@pytest.mark.parametrize(("fields", "message"), [
    ({}, "empty"), ({"pattern": "("}, "no regular expression"), ({"pattern": "a", "answer_key": "x"}, "group 1"),
    ({"pattern": "a", "which": "middle"}, "first, last")])
def test_regex_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Regex(**fields)


@given(soft=st.integers(0, 30), cache=st.integers(1, 30), n=st.integers(0, 80))
def test_length_against_the_three_cases_of_dapo(soft: int, cache: int, n: int) -> None:
    """Equation 13 of arXiv 2503.14476, with L_max = hard_limit and L_cache = hard_limit - soft_limit."""
    l_max = soft + cache
    expected = 0.0 if n <= l_max - cache else ((l_max - cache) - n) / cache if n <= l_max else -1.0
    penalty = Length(soft, l_max, "tokens")(prompts=[""], completions=["?"], completion_ids=[[7] * n])
    assert penalty == [pytest.approx(expected, abs=1e-15)]


def test_length_units() -> None:
    text = "two words"
    call: dict[str, Any] = {"prompts": [""], "completions": [text], "completion_ids": [[1, 2, 3]]}
    assert Length(0, 100)(**call) == [-len(text) / 100]
    assert Length(0, 100, "words")(**call) == [-2 / 100]
    assert Length(0, 100, "tokens")(**call) == [-3 / 100]


@pytest.mark.parametrize("fields", [{"soft_limit": 5, "hard_limit": 5}, {"soft_limit": -1}, {"unit": "lines"}])
def test_length_fields(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="limit|unit"):
        Length(**fields)
