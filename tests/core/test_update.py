"""Optimiser steps: disjoint minibatches, weights from global counts, the same step again after memory ran out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
from posttrain.batching import FirstFit
from posttrain.comm import SingleProcess
from posttrain.data import Array, Counts, Loss, Metric, Metrics, MicroBatch, Rollouts, Signal, Weights
from posttrain.errors import MemoryExhausted
from posttrain.loss import Sum
from posttrain.protocols import Need, Output
from posttrain.steps import Annotations
from posttrain.update import Schedule, Trained, minibatches, optimiser_step, update
from ragged import rollouts

ONE = SingleProcess()
Unit = Literal["action", "episode", "group"]


@dataclass(frozen=True)
class TokenMean:
    """An objective of which only the weights matter here."""

    unit: Unit = "action"
    slots: tuple[str, ...] = ("main",)
    needs: frozenset[Need] = frozenset()
    outputs: frozenset[Output] = frozenset()

    def weights(self, counts: Counts) -> Weights:
        return Weights(weight=np.full(int(counts.episode_actions.sum()), 1 / counts.actions))

    def __call__(self, *_: Any) -> Loss:
        return Loss({})


@dataclass
class Adder:
    """A learner whose gradient is `sum(weight * advantage)`; runs out of memory above a number of tokens."""

    limit: int = 10**9
    scale: float = 1.0
    gradient: float = 0.0
    applied: list[Any] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    discarded: int = 0
    version: int = 0

    def accumulate(self, batch: MicroBatch, objective: Sum, coef: Mapping[str, float]) -> Metrics:
        if len(batch.tokens) > self.limit:
            raise MemoryExhausted("too many tokens")
        self.parts.append(len(batch.tokens))
        advantages: Array = batch.advantages
        total = float((batch.weight * advantages).sum())
        self.gradient += total
        return Metrics({"loss/policy": Metric(total, reduction="sum")})

    def gramian(self, slots: Sequence[str], parameters: str = "") -> np.ndarray:
        return self.scale * np.eye(len(slots))

    def apply(self, weights: Mapping[str, float] | None = None) -> Metrics:
        self.applied.append((self.gradient, weights))
        self.gradient, self.version = 0.0, self.version + 1
        return Metrics({"grad_norm": Metric(abs(self.applied[-1][0]))})

    def discard(self) -> None:
        self.gradient, self.discarded = 0.0, self.discarded + 1


def step(learner: Adder, r: Rollouts, keep: np.ndarray, *, budget: int = 10**9, unit: Unit = "action",
         comm: Any = ONE, **extra: Any) -> tuple[Metrics, int, Any]:
    N = int(r.is_action.sum())
    columns = {"advantages": np.arange(1.0, N + 1)}
    trained = [Trained(learner, Sum((TokenMean(unit, **extra.pop("objective", {})),)))]
    return optimiser_step(trained, r, keep, np.ones(N), columns, {}, batching=FirstFit(), budget=budget, comm=comm,
                          **extra)


def test_gradient_is_the_weighted_sum_over_kept_actions_however_split() -> None:
    r = rollouts([(2, 3), (1, 2), (3, 1), (2, 2)], group=[0, 0, 1, 1])
    keep = np.array([1, 0, 1, 1, 1, 1, 0, 1], bool)
    expected = np.arange(1.0, 9)[keep].mean()
    for budget in (1000, 8, 4, 1):
        for unit in ("action", "group"):
            learner = Adder()
            metrics, _, _ = step(learner, r, keep, budget=budget, unit=unit)
            assert learner.applied[0][0] == pytest.approx(expected)
            assert metrics["loss/policy"].value == pytest.approx(expected)


def test_out_of_memory_discards_everything_and_repeats_the_same_step() -> None:
    r = rollouts([(2, 3), (1, 2), (3, 1), (2, 2)])
    keep = np.ones(8, bool)
    learner = Adder(limit=7)
    metrics, budget, _ = step(learner, r, keep)
    assert learner.applied == [(pytest.approx(4.5), None)]
    assert learner.discarded == metrics["batch/memory_retries"].value == 2  # 16 -> 8 -> 4
    assert budget == 4


def test_a_unit_that_does_not_fit_ends_with_advice_and_no_step() -> None:
    r = rollouts([(2, 3), (1, 2)])
    learner = Adder(limit=4)
    with pytest.raises(MemoryExhausted, match="gradient_checkpointing"):
        step(learner, r, np.ones(5, bool))
    assert learner.applied == []


@dataclass(frozen=True)
class OtherRank:
    """This rank's view of a second one that reports its own counts, parts and failures."""

    actions: int
    episodes: int
    parts: int
    rank: int = 0
    size: int = 2

    def sum(self, x: np.ndarray) -> np.ndarray:
        return x + np.array([self.actions, self.episodes])

    def max(self, n: int) -> int:
        return max(n, self.parts)

    def any(self, flag: bool) -> bool:
        return flag


def test_weights_carry_the_counts_of_all_ranks_and_empty_parts_fill_up() -> None:
    r = rollouts([(2, 3), (1, 2)])
    learner = Adder()
    step(learner, r, np.ones(5, bool), comm=OtherRank(actions=15, episodes=4, parts=3))
    assert learner.applied[0][0] == pytest.approx(sum(range(1, 6)) / 20)
    assert learner.parts == [8, 0, 0]


@dataclass(frozen=True)
class Fixed:
    """A gradient combiner that doubles and counts."""

    def init(self, slots: Sequence[str]) -> int:
        return 0

    def weights(self, gramian: np.ndarray, state: int) -> tuple[np.ndarray, int]:
        return 2 * gramian.diagonal(), state + 1


def test_gradients_of_several_slots_are_weighed_once_per_step() -> None:
    r = rollouts([(2, 3), (1, 2)])
    learner = Adder()
    _, _, state = step(learner, r, np.ones(5, bool), objective={"slots": ("a", "b")}, combiner=Fixed(),
                       combiner_state=0)
    assert learner.applied[0][1] == {"shared": 1.0, "a": 2.0, "b": 2.0} and state == 1


def test_a_gramian_that_is_not_finite_is_the_learners_to_skip() -> None:
    """A solver would raise on it, and its state would never be right again."""
    learner = Adder(scale=float("nan"))
    _, _, state = step(learner, rollouts([(2, 3), (1, 2)]), np.ones(5, bool), objective={"slots": ("a", "b")},
                       combiner=Fixed(), combiner_state=0)
    assert learner.applied[0][1] == {"shared": 1.0, "a": 1.0, "b": 1.0} and state == 0


def test_minibatches_are_disjoint_whole_groups_and_shuffled_by_epoch() -> None:
    r = rollouts([(1, 2)] * 12, group=[g for g in range(6) for _ in range(2)])
    keep = np.ones(24, bool)
    found = list(minibatches(r, keep, Schedule(3, 2, (0, 1))))
    assert len(found) == 6
    for epoch in (found[:3], found[3:]):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(12))
        assert all(len(set(r.group[m])) * 2 == len(m) for m in epoch)
    assert [m.tolist() for m in found[:3]] != [m.tolist() for m in found[3:]]
    again = list(minibatches(r, keep, Schedule(3, 2, (0, 1))))
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))


def test_sets_without_an_action_make_no_step() -> None:
    r = rollouts([(1, 2)] * 4, group=[0, 0, 1, 1])
    keep = np.repeat([True, False], 4)
    assert len(list(minibatches(r, keep, Schedule(2, 1, (0,))))) == 1
    assert len(list(minibatches(r, keep, Schedule(8, 1, (0,))))) == 1


def test_update_feeds_each_minibatch_its_own_columns() -> None:
    r = rollouts([(1, 2)] * 6, group=list(range(6)))
    learner = Adder()
    signal = Signal(advantages=np.repeat(np.arange(6.0), 2), keep=np.ones(12, bool), correction=np.full(12, 0.5))
    trained = [Trained(learner, Sum((TokenMean(),)))]
    metrics, _, _ = update(trained, r, signal, Annotations(), None, {}, Schedule(3, 1, (0,)), batching=FirstFit(),
                           budget=100, comm=SingleProcess())
    assert learner.version == 3
    assert sum(g for g, _ in learner.applied) == pytest.approx(0.5 * 15 / 2)
    assert metrics["loss/policy"].value == pytest.approx(0.5 * 2.5)  # the mean over optimiser steps
    assert metrics["batch/parts"].value == 3
