"""Critic-free estimators keep the contract of their kind, against oracles written as loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from posttrain.data import Episodes
from posttrain.testing import EstimatorContract
from posttrain_estimators.baselines import GroupBaseline, Reinforce, ReMax
from posttrain_estimators.process import ProcessReward

SOFT = dict(truncation="soft", overlong_length=5, overlong_buffer=3)


def rewards_of(component: Any, episodes: Episodes) -> list[list[float]]:
    """Rewards as one list per episode, the over-long penalty in the last one."""
    found = [episodes.rewards[a:b].tolist() for a, b in zip(episodes.offsets, episodes.offsets[1:])]
    if component.truncation == "soft":
        for r in found:
            over = len(r) - (component.overlong_length - component.overlong_buffer)
            r[-1] -= min(1.0, max(0.0, over / component.overlong_buffer))
    return found


def left(component: Any, episodes: Episodes) -> list[int]:
    """Episodes that take part."""
    return [e for e in range(episodes.n_episodes) if component.truncation != "mask" or episodes.terminated[e]]


def fellows(e: int, alive: list[int], episodes: Episodes) -> list[int]:
    """Those of the group of an episode, itself included."""
    return [i for i in alive if episodes.group[i] == episodes.group[e]]


def std(x: list[float], ddof: int, weight: list[float] | None = None) -> float:
    """With weights they are counts: their sum is the number of members."""
    w = weight or [1.0] * len(x)
    mean = sum(a * b for a, b in zip(w, x)) / sum(w)
    return math.sqrt(sum(b * (a - mean) ** 2 for a, b in zip(x, w)) / max(1.0, sum(w) - ddof))


def whitened(A: list[list[float]], kept: list[int], statistics: str) -> list[list[float]]:
    """Over the actions of kept episodes; with `row` each episode has weight 1 in all."""
    x = [a for e in kept for a in A[e]]
    w = [1.0 / len(A[e]) if statistics == "row" else 1.0 for e in kept for _ in A[e]]
    if (len(kept) if statistics == "row" else len(x)) < 2:
        return A
    mean, c = sum(a * b for a, b in zip(w, x)) / sum(w), math.sqrt(std(x, 1, w) ** 2 + 1e-8)
    return [[(a - mean) / c if e in kept else 0.0 for a in row] for e, row in enumerate(A)]


def flat(A: list[list[float]]) -> list[float]:
    return [a for row in A for a in row]


def returns(r: list[float], gamma: float) -> list[float]:
    return [sum(gamma ** (k - t) * r[k] for k in range(t, len(r))) for t in range(len(r))]


def reinforce(component: Reinforce, episodes: Episodes) -> Sequence[float]:
    G = [returns(r, component.gamma) for r in rewards_of(component, episodes)]
    alive, A, kept = left(component, episodes), [[0.0] * len(g) for g in G], []
    for e in alive:
        own = fellows(e, alive, episodes)
        against = {"none": [], "batch": alive, "group": own, "leave_one_out": [i for i in own if i != e]}
        if component.baseline in ("group", "leave_one_out") and len(own) < 2:
            continue
        kept.append(e)
        first = [G[i][0] for i in against[component.baseline]]
        A[e] = [g - (sum(first) / len(first) if first else 0.0) for g in G[e]]
    return flat(whitened(A, kept, component.statistics) if component.whiten else A)


class TestReinforceSoft(EstimatorContract):
    components = (Reinforce(**SOFT), Reinforce(gamma=0.5, **SOFT))

    def oracle(self, component: Reinforce, episodes: Episodes) -> Sequence[float]:
        return reinforce(component, episodes)


class TestReinforceInItsGroup(EstimatorContract):
    scope = "group"
    components = (Reinforce(baseline="group"), Reinforce(0.7, "leave_one_out"), Reinforce(0.9, "leave_one_out", **SOFT),
                  Reinforce(baseline="leave_one_out", truncation="mask"), Reinforce(0.9, "group", truncation="mask"))

    def oracle(self, component: Reinforce, episodes: Episodes) -> Sequence[float]:
        return reinforce(component, episodes)


class TestReinforceWhitened(EstimatorContract):
    scope = "batch"
    components = (Reinforce(whiten=True), Reinforce(0.9, whiten=True, statistics="row"),
                  Reinforce(0.9, "leave_one_out", True, "mask", statistics="row"),
                  Reinforce(1.0, "group", True, **SOFT), Reinforce(1.0, "batch", True, "mask"))

    def oracle(self, component: Reinforce, episodes: Episodes) -> Sequence[float]:
        return reinforce(component, episodes)


def remax(component: ReMax, episodes: Episodes) -> Sequence[float]:
    alive = left(component, episodes)
    A = [[g - episodes.greedy_rewards[e] if e in alive else 0.0 for g in returns(r, component.gamma)]
         for e, r in enumerate(rewards_of(component, episodes))]
    return flat(whitened(A, alive, component.statistics) if component.whiten else A)


class TestReMax(EstimatorContract):
    components = (ReMax(), ReMax(gamma=0.8), ReMax(0.9, truncation="mask"), ReMax(**SOFT))

    def oracle(self, component: ReMax, episodes: Episodes) -> Sequence[float]:
        return remax(component, episodes)


class TestReMaxWhitened(EstimatorContract):
    scope = "batch"
    components = (ReMax(whiten=True), ReMax(0.9, True, "row"), ReMax(whiten=True, truncation="mask"))

    def oracle(self, component: ReMax, episodes: Episodes) -> Sequence[float]:
        return remax(component, episodes)


def group_baseline(component: GroupBaseline, episodes: Episodes) -> Sequence[float]:
    s, alive = [sum(r) for r in rewards_of(component, episodes)], left(component, episodes)
    lengths = [int(n) for n in episodes.lengths]
    if component.incomplete == "drop":
        gone = {int(episodes.group[e]) for e in range(len(s)) if e not in alive}
        alive = [e for e in alive if int(episodes.group[e]) not in gone]
    A, kept = [[0.0] * n for n in lengths], []
    for e in alive:
        own = fellows(e, alive, episodes)
        if len(own) < 2:
            continue
        kept.append(e)
        others = [i for i in own if i != e]
        b = {"mean": sum(s[i] for i in own) / len(own), "leave_one_out": sum(s[i] for i in others) / len(others),
             "length_weighted": sum(lengths[i] * s[i] for i in own) / sum(lengths[i] for i in own)}
        counts = [float(lengths[i]) for i in alive] if component.statistics == "token" else None
        c = {"none": 1.0, "group": std([s[i] for i in own], component.ddof) + component.eps,
             "batch": std([s[i] for i in alive], component.ddof, counts) + component.eps}
        A[e] = [(s[e] - b[component.baseline]) / c[component.scale]] * lengths[e]
    return flat(whitened(A, kept, component.statistics) if component.whiten else A)


class TestGroupBaseline(EstimatorContract):
    scope = "group"
    components = (GroupBaseline("length_weighted", "none"), GroupBaseline("length_weighted", ddof=0, eps=1e-3),
                  GroupBaseline("length_weighted", "none", truncation="mask"), GroupBaseline("leave_one_out"),
                  GroupBaseline(**SOFT), GroupBaseline("leave_one_out", "none", **SOFT))

    def oracle(self, component: GroupBaseline, episodes: Episodes) -> Sequence[float]:
        return group_baseline(component, episodes)


class TestGroupBaselineOverTheBatch(EstimatorContract):
    scope = "batch"
    components = (GroupBaseline(scale="none", whiten=True, statistics="token"),
                  GroupBaseline(scale="none", whiten=True), GroupBaseline(scale="batch", statistics="token"),
                  GroupBaseline(scale="batch", ddof=0, statistics="token", truncation="mask"),
                  GroupBaseline("length_weighted", "none", whiten=True, truncation="mask"))

    def oracle(self, component: GroupBaseline, episodes: Episodes) -> Sequence[float]:
        return group_baseline(component, episodes)


NOT_COMPLETE = {"test_reaches_as_far_as_it_says": "in each of its batches an episode of the group is truncated, so the "
                                                  "group is left out; tests/estimators has one that is not"}


class TestCompleteGroups(EstimatorContract):
    scope = "group"
    waived = NOT_COMPLETE
    components = (GroupBaseline(truncation="mask", incomplete="drop"),
                  GroupBaseline("length_weighted", "none", truncation="mask", incomplete="drop"))

    def oracle(self, component: GroupBaseline, episodes: Episodes) -> Sequence[float]:
        return group_baseline(component, episodes)


class TestCompleteGroupsOverTheBatch(EstimatorContract):
    scope = "batch"
    waived = NOT_COMPLETE
    components = (GroupBaseline(scale="batch", truncation="mask", incomplete="drop"),
                  GroupBaseline("leave_one_out", "none", whiten=True, truncation="mask", incomplete="drop"))

    def oracle(self, component: GroupBaseline, episodes: Episodes) -> Sequence[float]:
        return group_baseline(component, episodes)


def process(component: ProcessReward, episodes: Episodes) -> Sequence[float]:
    rewards, alive = rewards_of(component, episodes), left(component, episodes)
    steps: list[list[tuple[int, float]]] = []  # of each episode: the action a step ends at, and what it earned
    for e, r in enumerate(rewards):
        if component.step == "reward":
            steps.append([(t, x) for t, x in enumerate(r) if x != 0])
            continue
        turn = episodes.turn[episodes.offsets[e]:episodes.offsets[e + 1]].tolist()
        steps.append([(max(t for t in range(len(r)) if turn[t] == k), sum(x for t, x in enumerate(r) if turn[t] == k))
                      for k in sorted(set(turn))])
    advantages: list[float] = []
    for e, r in enumerate(rewards):
        own = [x for i in fellows(e, alive, episodes) for _, x in steps[i]] if e in alive else []
        if len(own) < 2:
            advantages += [0.0] * len(r)
            continue
        c = {"none": 1.0, "group": std(own, component.ddof) + component.eps,
             "batch": std([x for i in alive for _, x in steps[i]], component.ddof) + component.eps}
        z = [(t, (x - sum(own) / len(own)) / c[component.scale]) for t, x in steps[e]]
        advantages += [sum(x for end, x in z if end >= t) for t in range(len(r))]
    return advantages


class TestProcessReward(EstimatorContract):
    scope = "group"
    components = (ProcessReward(), ProcessReward("turn"), ProcessReward("turn", "none"),
                  ProcessReward("turn", ddof=0, eps=1e-3, truncation="mask"), ProcessReward(truncation="mask"),
                  ProcessReward("turn", **SOFT))

    def oracle(self, component: ProcessReward, episodes: Episodes) -> Sequence[float]:
        return process(component, episodes)


class TestProcessRewardOverTheBatch(EstimatorContract):
    scope = "batch"
    components = (ProcessReward(scale="batch"), ProcessReward("turn", "batch", truncation="mask"))

    def oracle(self, component: ProcessReward, episodes: Episodes) -> Sequence[float]:
        return process(component, episodes)


def test_the_contracts_batches_are_kept_and_left_out() -> None:
    """`keep` says which episodes these oracles leave out: masked ones, and those with nothing to be compared with."""
    episodes = Episodes.from_rows([[1.0], [2.0, 0.0], [4.0], [3.0], [5.0]], group=[0, 0, 0, 1, 1],
                                  terminated=[True, True, False, True, True])
    survivors = GroupBaseline(truncation="mask")(episodes).keep
    dropped = GroupBaseline(truncation="mask", incomplete="drop")(episodes).keep
    assert survivors.tolist() == [True] * 3 + [False] + [True] * 2
    assert dropped.tolist() == [False] * 4 + [True] * 2
    np.testing.assert_array_equal(Reinforce(truncation="mask")(episodes).keep, survivors)
