"""V-trace, Retrace, tree backup and clipped importance sampling keep the contract, against oracles written as loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from posttrain.data import Episodes
from posttrain.testing import EstimatorContract
from posttrain_estimators.actionvalues import Retrace, TreeBackup
from posttrain_estimators.offpolicy import ClippedIS, VTrace


def rows(column: np.ndarray, episodes: Episodes) -> list[list[float]]:
    """A column of actions as one list per episode."""
    return [column[a:b].tolist() for a, b in zip(episodes.offsets, episodes.offsets[1:])]


def units(episodes: Episodes, e: int, unit: str) -> list[list[int]]:
    """The actions of an episode that share a ratio, unit by unit."""
    length = int(episodes.lengths[e])
    if unit == "turn":
        turn = rows(episodes.turn, episodes)[e]
        return [[t for t in range(length) if turn[t] == name] for name in sorted(set(turn))]
    return [[t] for t in range(length)] if unit == "token" else [list(range(length))]


def ratios(episodes: Episodes, e: int, unit: str, reduce: str, dead_zone: float) -> list[float]:
    pi, mu = rows(episodes.logprobs, episodes)[e], rows(episodes.behavior_logprobs, episodes)[e]
    found = [0.0] * len(pi)
    for members in units(episodes, e, unit):
        logs = [pi[t] - mu[t] if abs(pi[t] - mu[t]) >= dead_zone else 0.0 for t in members]
        log = sum(logs) / (len(logs) if reduce == "mean" else 1)
        for t in members:
            found[t] = math.exp(max(-20.0, min(20.0, log)))
    return found


def penalised(component: Any, r: list[float]) -> list[float]:
    """Rewards after the overlong penalty of `soft`."""
    if component.truncation != "soft":
        return r
    start = component.overlong_length - component.overlong_buffer
    return [*r[:-1], r[-1] - min(1.0, max(0.0, (len(r) - start) / component.overlong_buffer))]


def behind(component: Any, episodes: Episodes, e: int) -> float:
    """Value of the state after the last action."""
    if episodes.terminated[e] or component.truncation != "bootstrap":
        return 0.0
    column = {"value": episodes.bootstrap_values, "score": episodes.final_scores,
              "zero": np.zeros(episodes.n_episodes)}[component.bootstrap]
    return float(column[e])


def masked(component: Any, episodes: Episodes, e: int) -> bool:
    return component.truncation == "mask" and not episodes.terminated[e]


def vtrace(component: VTrace, episodes: Episodes) -> tuple[list[float], list[float]]:
    """Equation 1 of Espeholt et al. 2018 as the double sum that it is: advantages and targets."""
    advantages: list[float] = []
    targets: list[float] = []
    how, leak = component, component.leak
    for e, r in enumerate(rows(episodes.rewards, episodes)):
        r = penalised(how, r)
        rho = ratios(episodes, e, how.trace_unit, how.trace_ratio, how.dead_zone)
        rho_bar = [leak * min(how.rho_max, x) + (1 - leak) * x for x in rho]
        c = [how.lam * (leak * min(how.c_max, x) + (1 - leak) * x) for x in rho]
        if how.trace_ratio == "sum":
            for members in units(episodes, e, how.trace_unit):
                for t in members[:-1]:
                    c[t] = how.lam
        v = [*rows(episodes.values, episodes)[e], behind(how, episodes, e)]
        T = len(r)
        vs = [v[s] + sum(how.gamma ** (t - s) * math.prod(c[s:t]) * rho_bar[t] * (r[t] + how.gamma * v[t + 1] - v[t])
                         for t in range(s, T)) for s in range(T)] + [v[T]]
        mix = 1.0 if how.pg_bootstrap == "vs" else how.lam
        for t in range(T):
            q = r[t] + how.gamma * (mix * vs[t + 1] + (1 - mix) * v[t + 1])
            A = (rho_bar[t] if how.weighted else 1.0) * (q - v[t])
            advantages.append(0.0 if masked(how, episodes, e) else A)
        targets += vs[:T]
    return advantages, targets


def action_values(component: Retrace | TreeBackup, episodes: Episodes) -> tuple[list[float], list[float]]:
    """Equation 3 of Munos et al. 2016 as the double sum that it is: advantages and targets."""
    advantages: list[float] = []
    targets: list[float] = []
    v_only = isinstance(component, Retrace) and component.q == "v_only"
    for e, r in enumerate(rows(episodes.rewards, episodes)):
        r = penalised(component, r)
        own, c = traces(component, episodes, e)
        EQ = [*rows(episodes.values if v_only else episodes.expected_action_values, episodes)[e],
              behind(component, episodes, e)]
        q = EQ if v_only else rows(episodes.action_values, episodes)[e]
        for s in range(len(r)):
            Q_ret = q[s] + sum(component.gamma ** (t - s) * math.prod(c[s + 1:t + 1])
                               * (r[t] + component.gamma * EQ[t + 1] - q[t]) for t in range(s, len(r)))
            advantages.append(0.0 if masked(component, episodes, e) else Q_ret - EQ[s])
            targets.append(q[s] + own[s] * (Q_ret - q[s]) if v_only else Q_ret)
    return advantages, targets


def traces(component: Retrace | TreeBackup, episodes: Episodes, e: int) -> tuple[list[float], list[float]]:
    """Ratios cut at c_max, and c, of the actions of an episode."""
    if isinstance(component, TreeBackup):
        return [], [component.lam * math.exp(x) for x in rows(episodes.logprobs, episodes)[e]]
    own = [min(component.c_max, x) for x in
           ratios(episodes, e, component.trace_unit, component.trace_ratio, component.dead_zone)]
    c = [component.lam * x for x in own]
    if component.trace_ratio == "sum":
        for members in units(episodes, e, component.trace_unit):
            for t in members[1:]:
                c[t] = component.lam
    return own, c


def clipped(component: ClippedIS, episodes: Episodes) -> list[float]:
    advantages: list[float] = []
    for e in range(episodes.n_episodes):
        rho = ratios(episodes, e, component.unit, component.unit_ratio, component.dead_zone)
        base = BASES[component.base](component, episodes, e)
        advantages += [0.0 if masked(component, episodes, e) else min(x, component.rho_max) * A
                       for x, A in zip(rho, base)]
    return advantages


def _gae(component: ClippedIS, episodes: Episodes, e: int) -> list[float]:
    r = penalised(component, rows(episodes.rewards, episodes)[e])
    v = [*rows(episodes.values, episodes)[e], behind(component, episodes, e)]
    delta = [r[t] + component.gamma * v[t + 1] - v[t] for t in range(len(r))]
    return [sum((component.gamma * component.lam) ** (t - s) * delta[t] for t in range(s, len(r)))
            for s in range(len(r))]


def _reward_to_go(component: ClippedIS, episodes: Episodes, e: int) -> list[float]:
    r = penalised(component, rows(episodes.rewards, episodes)[e])
    return [sum(component.gamma ** (t - s) * r[t] for t in range(s, len(r))) for s in range(len(r))]


def _group(component: ClippedIS, episodes: Episodes, e: int) -> list[float]:
    sums = [sum(penalised(component, r)) for r in rows(episodes.rewards, episodes)]
    group = [i for i in range(len(sums))
             if episodes.group[i] == episodes.group[e] and not masked(component, episodes, i)]
    mean = sum(sums[i] for i in group) / max(1, len(group))
    return [sums[e] - mean] * int(episodes.lengths[e])


BASES = {"gae": _gae, "reward_to_go": _reward_to_go, "group": _group}


class TestVTrace(EstimatorContract):
    components = (VTrace(), VTrace(gamma=0.9, lam=0.8, rho_max=2.0, c_max=1.5, pg_bootstrap="vs", weighted=False),
                  VTrace(gamma=0.9, lam=0.7, leak=0.6, truncation="mask"),
                  VTrace(rho_max=math.inf, c_max=math.inf, trace_unit="turn", dead_zone=0.1, bootstrap="score"),
                  VTrace(lam=0.9, trace_unit="turn", trace_ratio="sum", truncation="terminal"),
                  VTrace(gamma=0.95, trace_unit="sequence", bootstrap="zero"),
                  VTrace(lam=0.9, trace_unit="sequence", trace_ratio="sum", truncation="soft", overlong_length=5,
                         overlong_buffer=3))

    def oracle(self, component: VTrace, episodes: Episodes) -> Sequence[float]:
        return vtrace(component, episodes)[0]


class TestRetrace(EstimatorContract):
    components = (Retrace(), Retrace(gamma=0.9, lam=0.7, c_max=2.0, truncation="mask"),
                  Retrace(trace_unit="turn", trace_ratio="sum", lam=0.9, bootstrap="score"),
                  Retrace("q_head"), Retrace("q_head", gamma=0.9, lam=0.6, truncation="mask"),
                  Retrace("q_head", c_max=math.inf, trace_unit="sequence", trace_ratio="sum", bootstrap="zero"),
                  Retrace("q_head", trace_unit="turn", dead_zone=0.1, truncation="soft", overlong_length=5,
                          overlong_buffer=3))

    def oracle(self, component: Retrace, episodes: Episodes) -> Sequence[float]:
        return action_values(component, episodes)[0]


class TestTreeBackup(EstimatorContract):
    components = (TreeBackup(), TreeBackup(gamma=0.9, lam=0.7, truncation="mask"),
                  TreeBackup(lam=0.5, bootstrap="score"),
                  TreeBackup(truncation="soft", overlong_length=5, overlong_buffer=3))

    def oracle(self, component: TreeBackup, episodes: Episodes) -> Sequence[float]:
        return action_values(component, episodes)[0]


class TestClippedIS(EstimatorContract):
    components = (ClippedIS("gae", gamma=0.9, lam=0.8, truncation="bootstrap"),
                  ClippedIS("gae", unit="turn", rho_max=1.1, truncation="bootstrap", bootstrap="score"),
                  ClippedIS("reward_to_go", gamma=0.9, unit="sequence", rho_max=math.inf),
                  ClippedIS("reward_to_go", unit="turn", unit_ratio="mean", dead_zone=0.2, truncation="mask"))

    def oracle(self, component: ClippedIS, episodes: Episodes) -> Sequence[float]:
        return clipped(component, episodes)


class TestClippedISOfGroups(EstimatorContract):
    scope = "group"
    components = (ClippedIS(), ClippedIS(unit="sequence", truncation="mask"),
                  ClippedIS(unit="turn", truncation="soft", overlong_length=5, overlong_buffer=3))

    def oracle(self, component: ClippedIS, episodes: Episodes) -> Sequence[float]:
        return clipped(component, episodes)
