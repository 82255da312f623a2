"""The replay buffer is a value: it mixes whole groups, forgets by age and room, and survives the disk."""

from __future__ import annotations

import numpy as np
import pytest
from posttrain.data import Prompt, Rollouts
from posttrain.replay import Replay, from_files, to_files
from ragged import three_episodes


def iteration(step: int, groups: int = 2, size: int = 3) -> Rollouts:
    """Episodes of one action each whose tokens name the step."""
    E = groups * size
    return Rollouts(
        tokens=np.full(2 * E, step, np.int32), offsets=np.arange(0, 2 * E + 1, 2), episode=np.arange(E),
        is_action=np.tile([False, True], E), group=np.repeat(np.arange(groups) + 100 * step, size),
        finish=np.zeros(E, np.int8), terminated=np.ones(E, bool), prompts=tuple(Prompt(text="p") for _ in range(E)),
        completions=("c",) * E, rewards={"reward": np.zeros(2 * E)})


def run(steps: int, **settings: int) -> list[tuple[Rollouts, Replay]]:
    buffer, seen = Replay(), []
    for step in range(1, steps + 1):
        mixed, buffer = buffer.mixed(iteration(step), step, rng=np.random.default_rng(step), **settings)
        seen.append((mixed, buffer))
    return seen


def test_no_capacity_is_on_policy() -> None:
    for step, (mixed, buffer) in enumerate(run(3, capacity=0, reuse=0, max_age=9), 1):
        assert set(mixed.tokens) == {step} and buffer.rollouts is None


def test_older_groups_come_whole_and_within_reuse() -> None:
    mixed, _ = run(4, capacity=24, reuse=7, max_age=9)[-1]
    old = mixed.group[mixed.group < 400]
    assert len(old) == 6  # two groups of three fit into seven
    assert all((mixed.group == g).sum() == 3 for g in np.unique(mixed.group))


def test_age_and_room_are_limits() -> None:
    for step, (mixed, buffer) in enumerate(run(6, capacity=12, reuse=6, max_age=2), 1):
        assert mixed.tokens.min() >= step - 2
        assert buffer.iteration is not None and len(buffer.iteration) <= 12
        assert buffer.iteration.max() == step  # the newest are always kept


def test_equal_seeds_mix_equally() -> None:
    a, b = (run(4, capacity=24, reuse=6, max_age=9)[-1][0] for _ in range(2))
    assert np.array_equal(a.group, b.group)


def test_round_trip_through_files() -> None:
    r = three_episodes(prompts=(Prompt(text="a", extra={"answer": "1"}, group=4, where="d.jsonl:1"),
                          Prompt(messages=({"role": "user", "content": "b"},)), Prompt(tokens=(1, 2))))
    arrays, values = to_files(Replay(r, np.array([1, 1, 2])))
    import json
    back = from_files(arrays, json.loads(json.dumps(values)))
    assert back.rollouts is not None and back.rollouts.prompts == r.prompts
    assert back.rollouts.sampling == r.sampling
    for name, array in arrays.items():
        again = to_files(back)[0][name]
        assert again.dtype == array.dtype and np.array_equal(again, array)


def test_an_empty_buffer_round_trips() -> None:
    assert from_files(*to_files(Replay())).rollouts is None


@pytest.mark.parametrize("reuse", [0, 100])
def test_reuse_bounds(reuse: int) -> None:
    mixed, _ = run(3, capacity=100, reuse=reuse, max_age=9)[-1]
    assert mixed.n_episodes == (6 if reuse == 0 else 18)
