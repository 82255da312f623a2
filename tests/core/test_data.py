"""The types: what they refuse, how they select, join and add."""

from __future__ import annotations

import numpy as np
import pytest
from frameworks import FRAMEWORKS, HALVES, in_float64
from posttrain.data import Episodes, Metric, Metrics, Prompt, Rollouts, offsets_of, to_numpy
from ragged import three_episodes


def test_axes() -> None:
    r = three_episodes()
    assert r.source.tolist() == [1, 2, 4, 7, 8, 11]
    assert r.action_episode.tolist() == [0, 0, 1, 1, 1, 2]
    assert r.episode_tokens.tolist() == [3, 6, 3]
    assert r.episode_actions.tolist() == [2, 3, 1]


def test_select_takes_whole_episodes_in_the_given_order() -> None:
    r = three_episodes().select(np.array([2, 1]))
    assert r.tokens.tolist() == [9, 10, 11, 3, 4, 5, 6, 7, 8]
    assert r.episode.tolist() == [0, 1, 1]
    assert r.offsets.tolist() == [0, 3, 6, 9]
    assert r.behavior_logprobs is not None and r.behavior_logprobs.tolist() == [-5, -2, -3, -4]
    assert r.rewards["r"].tolist() == [9, 10, 11, 3, 4, 5, 6, 7, 8]
    assert r.excluded["r"].tolist() == [False, True]
    assert r.completions == ("z", "y")


def test_select_of_nothing() -> None:
    assert three_episodes().select(np.array([], int)).n_episodes == 0


def test_concat_inverts_select() -> None:
    r = three_episodes()
    joined = Rollouts.concat([r.select(np.array([0])), r.select(np.array([1, 2]))])
    for name in ("tokens", "offsets", "episode", "is_action", "group", "behavior_logprobs"):
        assert np.array_equal(getattr(joined, name), getattr(r, name)), name


@pytest.mark.parametrize("half", HALVES)
def test_half_precision_becomes_numpy_without_loss(half: str) -> None:
    given = np.array([1.5, -0.0078125, 3.0e4, 0.0])
    found = to_numpy(HALVES[half](given))
    assert type(found) is np.ndarray and found.dtype == (np.float32 if "bfloat16" in half else np.float16)
    tolerance = 2.0 ** (-8 if "bfloat16" in half else -11)
    np.testing.assert_allclose(found.astype(np.float64), given, rtol=tolerance)
    assert np.array_equal(to_numpy(HALVES[half](found.astype(np.float64))), found), "nothing is lost a second time"


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_whole_numbers_and_float64_become_numpy_as_they_are(framework: str) -> None:
    with in_float64(framework):
        for given in (np.array([1, -2]), np.array([0.1, 1e300]), np.array([True, False]), np.zeros((2, 0))):
            found = to_numpy(FRAMEWORKS[framework](given))
            assert type(found) is np.ndarray and found.dtype == given.dtype and np.array_equal(found, given)


@pytest.mark.parametrize(("changes", "message"), [
    (dict(is_action=np.arange(12) < 6), "first token"),
    (dict(group=np.array([1, 2])), "has length"),
    (dict(behavior_logprobs=np.zeros(3)), r"behavior_logprobs has length 3, expected 6"),
    (dict(episode=np.array([0, 1, 0, 2])), "contiguous"),
    (dict(offsets=np.array([0, 3, 6, 9, 11])), "rise from 0"),
    (dict(rewards={"r": np.zeros(2)}), r"rewards\['r'\] has length 2"),
])
def test_rollouts_refuse(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        three_episodes(**changes)


def test_episodes_refuse_empty_ones() -> None:
    with pytest.raises(ValueError, match="episode 1 has no action"):
        Episodes.from_rows(rewards=[[1.0], [], [2.0]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_episodes_name_the_episode_of_a_bad_number(bad: float) -> None:
    with pytest.raises(ValueError, match=r"rewards is (nan|inf) in episode 1"):
        Episodes.from_rows(rewards=[[1.0], [0.0, bad]])
    with pytest.raises(ValueError, match=r"bootstrap_values is (nan|inf) in episode 1"):
        Episodes.from_rows(rewards=[[1.0], [0.0]], bootstrap_values=[0.0, bad])


def test_episodes_refuse_unknown_columns_and_ragged_mismatch() -> None:
    with pytest.raises(TypeError, match="unknown column 'vaules'"):
        Episodes.from_rows(rewards=[[1.0]], vaules=[[1.0]])
    with pytest.raises(ValueError, match="values has rows of lengths"):
        Episodes.from_rows(rewards=[[1.0, 2.0]], values=[[1.0]])


def test_from_rows_of_the_readme() -> None:
    e = Episodes.from_rows(
        rewards=[[0.0, 1.0], [0.5]], values=[[0.1, 0.2], [0.3]], bootstrap_values=[0.0, 0.4], terminated=[True, False],
        logprobs=[[-1.0, -2.0], [-0.5]], behavior_logprobs=[[-1.1, -1.9], [-0.5]], group=[0, 0])
    assert e.lengths.tolist() == [2, 1] and e.episode.tolist() == [0, 0, 1]


def test_prompt_has_one_form() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        Prompt(text="a", tokens=(1,))
    with pytest.raises(ValueError, match="exactly one"):
        Prompt()


def test_metrics_add_without_bias() -> None:
    parts = [Metrics(a=Metric(1.0, 1), b=Metric(3, reduction="max")), Metrics(a=Metric(5.0, 3), c=Metric(1)),
             Metrics(b=Metric(2, reduction="max"), d=Metric(7, reduction="last"))]
    total = parts[0] + parts[1] + parts[2]
    assert total.values_by_name() == {"a": 1.5, "b": 3, "c": 1, "d": 7}
    assert np.isnan(Metric(0.0, 0.0).value)


def test_offsets_of_nothing() -> None:
    assert offsets_of(np.array([], int)).tolist() == [0]
