"""The load of a step's experts equals a count by hand, over ranks too, and parts of a step carry what is theirs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from posttrain.batching import StepData, cut
from posttrain.comm import SingleProcess
from posttrain.data import Rollouts, Weights
from posttrain.errors import ConfigError
from posttrain.experts import expert_load, tokens_read
from posttrain.testing.tiny_models import TwoAlike, random_rollouts

L, K, E, FREE = 3, 2, 5, 255


def routed(seed: int = 0) -> tuple[Rollouts, np.ndarray]:
    """Episodes with routes, of which a few are unknown, and which of their actions are kept."""
    rng = np.random.default_rng(seed)
    rollouts = random_rollouts(6, seed)
    M = len(rollouts.tokens)
    routes = np.stack([rng.permuted(np.tile(np.arange(E), (M, 1)), axis=1)[:, :K] for _ in range(L)], axis=1)
    routes[rng.random(M) < 0.1] = FREE
    keep = rng.random(int(rollouts.is_action.sum())) < 0.5
    return replace(rollouts, routes=routes.astype(np.uint8)), keep


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(5))
def test_the_load_is_a_count_of_the_tokens_that_are_read(seed: int) -> None:
    rollouts, keep = routed(seed)
    kept = set(rollouts.source[keep].tolist())
    read, sent = [], np.zeros((L, E))
    for a, b in zip(rollouts.offsets[:-1], rollouts.offsets[1:], strict=True):
        for m in range(a, b):
            if any(later in kept for later in range(m + 1, b)):
                read.append(m)
                for layer in range(L):
                    for e in rollouts.routes[m, layer]:
                        if e != FREE:
                            sent[layer, e] += 1
    assert np.flatnonzero(tokens_read(rollouts, keep)).tolist() == read
    weight, load = expert_load(rollouts, keep, SingleProcess())
    np.testing.assert_allclose(load, sent / sent.sum(axis=1, keepdims=True))
    assert np.flatnonzero(weight).tolist() == read and np.allclose(weight[read], 1 / len(read))


def test_two_ranks_share_one_load() -> None:
    rollouts, keep = routed()
    weight, load = expert_load(rollouts, keep, SingleProcess())
    half, same = expert_load(rollouts, keep, TwoAlike())
    np.testing.assert_allclose(half, weight / 2)
    np.testing.assert_allclose(same, load)


def test_nothing_that_is_read_has_no_load() -> None:
    rollouts, keep = routed()
    weight, load = expert_load(rollouts, np.zeros_like(keep), SingleProcess())
    assert not weight.any() and load.shape == (L, 1) and not load.any()


def test_without_routes_the_coefficient_is_named() -> None:
    rollouts, keep = routed()
    with pytest.raises(ConfigError, match=r"update.expert_balance_coef: the engine records no experts(.|\n)*batched"):
        expert_load(replace(rollouts, routes=None), keep, SingleProcess())


def test_parts_of_a_step_hold_their_own_tokens_routes_and_weights() -> None:
    rollouts, keep = routed()
    weight, load = expert_load(rollouts, keep, SingleProcess())
    step = StepData(rollouts, keep, Weights(), token_weight=weight, constants={"expert_load": load})
    parts = [cut(step, np.array(episodes)) for episodes in ([5, 0], [3, 1, 2], [7, 6, 4])]
    assert sum(part.token_weight.sum() for part in parts) == pytest.approx(1.0)
    first = parts[0]
    starts, tokens = np.cumsum(rollouts.episode_tokens) - rollouts.episode_tokens, rollouts.episode_tokens
    own = np.concatenate([np.arange(starts[e], starts[e] + tokens[e]) for e in (5, 0)])
    assert np.array_equal(first.routes, rollouts.routes[own]) and np.array_equal(first.token_weight, weight[own])
    assert all(np.array_equal(part.constants["expert_load"], load) for part in parts)


def test_routes_have_a_row_for_each_token() -> None:
    rollouts, _ = routed()
    with pytest.raises(ValueError, match=r"Rollouts.routes has length 1, expected"):
        replace(rollouts, routes=rollouts.routes[:1])
