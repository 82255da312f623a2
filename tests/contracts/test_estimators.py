"""The estimators of posttrain-estimators keep the contract of their kind, against oracles written as loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from posttrain.data import Episodes
from posttrain.testing import EstimatorContract
from posttrain_estimators.baselines import GroupBaseline, Reinforce
from posttrain_estimators.multistep import GAE


def rows(column: np.ndarray, episodes: Episodes) -> list[list[float]]:
    """A column of actions as one list per episode."""
    return [column[a:b].tolist() for a, b in zip(episodes.offsets, episodes.offsets[1:])]


class TestGAE(EstimatorContract):
    components = (GAE(), GAE(gamma=0.9, lam=0.7), GAE(gamma=0.99, lam=0.0, truncation="terminal"),
                  GAE(gamma=0.9, truncation="mask"))

    def oracle(self, component: GAE, episodes: Episodes) -> Sequence[float]:
        """Equation 16 of Schulman et al. 2016, as the sum that it is."""
        advantages: list[float] = []
        values = rows(episodes.values, episodes)
        for e, r in enumerate(rows(episodes.rewards, episodes)):
            truncated = not episodes.terminated[e]
            if truncated and component.truncation == "mask":
                advantages += [0.0] * len(r)
                continue
            bootstraps = truncated and component.truncation == "bootstrap"
            v = [*values[e], episodes.bootstrap_values[e] if bootstraps else 0.0]
            delta = [r[t] + component.gamma * v[t + 1] - v[t] for t in range(len(r))]
            advantages += [sum((component.gamma * component.lam) ** (k - t) * delta[k] for k in range(t, len(r)))
                           for t in range(len(r))]
        return advantages


def standardised(x: list[float]) -> list[float]:
    """A number alone stays as it is."""
    if len(x) < 2:
        return x
    mean = sum(x) / len(x)
    variance = sum((a - mean) ** 2 for a in x) / (len(x) - 1)
    return [(a - mean) / math.sqrt(variance + 1e-8) for a in x]


class TestWhitenedGAE(EstimatorContract):
    scope = "batch"
    components = (GAE(gamma=0.9, whiten=True),)

    def oracle(self, component: GAE, episodes: Episodes) -> Sequence[float]:
        return standardised(list(TestGAE().oracle(component, episodes)))


class TestReinforce(EstimatorContract):
    components = (Reinforce(), Reinforce(gamma=0.5), Reinforce(gamma=0.9, truncation="mask"))

    def oracle(self, component: Reinforce, episodes: Episodes) -> Sequence[float]:
        returns: list[float] = []
        for e, r in enumerate(rows(episodes.rewards, episodes)):
            left_out = component.truncation == "mask" and not episodes.terminated[e]
            returns += [0.0 if left_out else sum(component.gamma ** (k - t) * r[k] for k in range(t, len(r)))
                        for t in range(len(r))]
        return returns


class TestReinforceWithBatchBaseline(EstimatorContract):
    scope = "batch"
    components = (Reinforce(baseline="batch"), Reinforce(gamma=0.8, baseline="batch"))

    def oracle(self, component: Reinforce, episodes: Episodes) -> Sequence[float]:
        returns = TestReinforce().oracle(component, episodes)
        b = sum(returns[start] for start in episodes.offsets[:-1]) / episodes.n_episodes
        return [G - b for G in returns]


class TestGroupBaseline(EstimatorContract):
    scope = "group"
    components = (GroupBaseline(), GroupBaseline(ddof=0, eps=1e-4), GroupBaseline(scale="none"),
                  GroupBaseline("leave_one_out", "none"), GroupBaseline(truncation="mask"))

    def oracle(self, component: GroupBaseline, episodes: Episodes) -> Sequence[float]:
        advantages: list[float] = []
        s = [sum(r) for r in rows(episodes.rewards, episodes)]
        for e, length in enumerate(episodes.lengths):
            group = [i for i in range(len(s)) if episodes.group[i] == episodes.group[e]
                     and (component.truncation != "mask" or episodes.terminated[i])]
            advantages += [self.advantage(component, s, group, e)] * int(length)
        return advantages

    def advantage(self, component: GroupBaseline, s: list[float], group: list[int], e: int) -> float:
        """Of one episode; 0 where it has nobody to be compared with."""
        if e not in group or len(group) < 2:
            return 0.0
        others = [s[i] for i in group if i != e or component.baseline == "mean"]
        mean = sum(s[i] for i in group) / len(group)
        std = math.sqrt(sum((s[i] - mean) ** 2 for i in group) / (len(group) - component.ddof))
        return (s[e] - sum(others) / len(others)) / (std + component.eps if component.scale == "group" else 1.0)


class TestGroupBaselineOverTheBatch(EstimatorContract):
    scope = "batch"
    components = (GroupBaseline(scale="batch"),)

    def oracle(self, component: GroupBaseline, episodes: Episodes) -> Sequence[float]:
        s = [sum(r) for r in rows(episodes.rewards, episodes)]
        plain = TestGroupBaseline().oracle(GroupBaseline(scale="none"), episodes)
        mean = sum(s) / len(s)
        std = math.sqrt(sum((x - mean) ** 2 for x in s) / max(1, len(s) - component.ddof))
        return [a / (std + component.eps) for a in plain]
