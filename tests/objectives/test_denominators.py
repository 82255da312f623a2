"""Averages as weights, against literal loops over ragged rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from objectives.cases import averaged
from posttrain.data import Counts
from posttrain_objectives.denominators import DENOMINATORS, Denominator, action_weights

LENGTH = 11


def counts_of(lengths: list[int]) -> Counts:
    n = np.array(lengths, int)
    return Counts(int(n.sum()), int((n > 0).sum()), n)


def rows_of(lengths: list[int]) -> list[np.ndarray]:
    flat = np.random.default_rng(len(lengths)).normal(size=sum(lengths))
    return np.split(flat, np.cumsum(lengths)[:-1])


lengths_with_empty = st.lists(st.integers(0, 6), min_size=1, max_size=12).filter(lambda n: sum(n) > 0)


@pytest.mark.parametrize("how", DENOMINATORS)
@settings(deadline=None, derandomize=True)
@given(lengths=lengths_with_empty)
def test_weighted_sum_is_the_literal_average(how: Denominator, lengths: list[int]) -> None:
    rows = rows_of(lengths)
    weight = action_weights(how, counts_of(lengths), LENGTH)
    assert weight.dtype == np.float64 and (weight > 0).all()
    assert weight @ np.concatenate(rows) == pytest.approx(averaged(rows, how, LENGTH), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("how", DENOMINATORS)
@settings(deadline=None, derandomize=True)
@given(lengths=lengths_with_empty, cut=st.integers(0, 12))
def test_weights_of_two_ranks_add_up(how: Denominator, lengths: list[int], cut: int) -> None:
    total = counts_of(lengths)
    ranks = [replace(total, episode_actions=total.episode_actions[part]) for part in (slice(cut), slice(cut, None))]
    found = np.concatenate([action_weights(how, rank, LENGTH) for rank in ranks])
    np.testing.assert_array_equal(found, action_weights(how, total, LENGTH))


@pytest.mark.parametrize("how", DENOMINATORS)
def test_appended_empty_episodes_change_nothing(how: Denominator) -> None:
    np.testing.assert_array_equal(action_weights(how, counts_of([2, 3]), LENGTH),
                                  action_weights(how, counts_of([0, 2, 0, 3, 0]), LENGTH))


@pytest.mark.parametrize("how", DENOMINATORS)
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_kept_gives_no_weights(how: Denominator, lengths: list[int]) -> None:
    assert action_weights(how, counts_of(lengths), LENGTH).shape == (0,)


def test_means_sum_to_one_and_a_longer_episode_weighs_less_per_action() -> None:
    counts = counts_of([1, 4])
    for how in ("token_mean", "sequence_mean"):
        assert action_weights(how, counts).sum() == pytest.approx(1.0)
    np.testing.assert_allclose(action_weights("sequence_mean", counts), [0.5, *[0.125] * 4])
