"""The value-based estimators of posttrain-estimators keep the contract of their kind, against oracles written as loops.

Every oracle mixes returns of all lengths by their shares, which is not how the estimators compute them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from posttrain.data import Episodes
from posttrain.testing import EstimatorContract
from posttrain_estimators.mixtures import UPGO, NStep
from posttrain_estimators.multistep import GAE, TDLambda

SOFT: dict[str, Any] = dict(truncation="soft", overlong_length=4, overlong_buffer=3)
"""Random episodes have up to 6 actions: some before the buffer, some in it, some beyond the length."""


def rows(column: np.ndarray, episodes: Episodes) -> list[list[float]]:
    """A column of actions as one list per episode."""
    return [column[a:b].tolist() for a, b in zip(episodes.offsets, episodes.offsets[1:])]


def penalised(how: Any, r: list[float]) -> list[float]:
    """Equation 13 of DAPO (arXiv 2503.14476) added to the last reward, where `truncation` is `soft`."""
    if how.truncation != "soft":
        return r
    over = len(r) - (how.overlong_length - how.overlong_buffer)
    penalty = 0.0 if over <= 0 else -over / how.overlong_buffer if over <= how.overlong_buffer else -1.0
    return [*r[:-1], r[-1] + penalty]


def last_value(how: Any, episodes: Episodes, e: int) -> float:
    """Of the state after the last action."""
    if episodes.terminated[e] or how.truncation != "bootstrap" or how.bootstrap == "zero":
        return 0.0
    return float((episodes.final_scores if how.bootstrap == "score" else episodes.bootstrap_values)[e])


def n_step_return(gamma: float, r: list[float], v: list[float], t: int, n: int) -> float:
    """Of n actions from t, or of all that are left, and of the value behind them; `v` has one more than `r`."""
    end = min(t + n, len(r))
    return sum(gamma ** (k - t) * r[k] for k in range(t, end)) + gamma ** (end - t) * v[end]


class _OfReturns(EstimatorContract, ABC):
    """Advantages as the mean of n-step returns, by their shares, minus the value."""

    def oracle(self, component: Any, episodes: Episodes) -> Sequence[float]:
        advantages: list[float] = []
        values = rows(episodes.values, episodes)
        for e, r in enumerate(rows(episodes.rewards, episodes)):
            if component.truncation == "mask" and not episodes.terminated[e]:
                advantages += [0.0] * len(r)
                continue
            r, v = penalised(component, r), [*values[e], last_value(component, episodes, e)]
            for t in range(len(r)):
                shares = self.shares(component, r, v, t)
                assert math.isclose(sum(shares), 1.0)
                advantages.append(sum(p * n_step_return(component.gamma, r, v, t, n)
                                      for n, p in enumerate(shares, start=1)) - v[t])
        return advantages

    @abstractmethod
    def shares(self, component: Any, r: list[float], v: list[float], t: int) -> list[float]:
        """p_1, p_2, ... of the returns of 1, 2, ... actions from t."""


def geometric(lam: float, n: int) -> list[float]:
    """Of a return that goes on after each action with probability lam, up to n."""
    return [(1 - lam) * lam ** l for l in range(n - 1)] + [lam ** (n - 1)]


class TestGAE(_OfReturns):
    components = (GAE(0.9, 0.7, lam_critic=1.0), GAE(0.9, length_adaptive=0.6, lam_min=0.2),
                  GAE(0.9, 0.7, bootstrap="score"), GAE(0.9, 0.7, bootstrap="zero"), GAE(0.9, 0.7, **SOFT))

    def shares(self, component: GAE, r: list[float], v: list[float], t: int) -> list[float]:
        lam = component.lam
        if component.length_adaptive:
            lam = max(component.lam_min, 1 - 1 / (component.length_adaptive * len(r)))
        return geometric(lam, len(r) - t)


class TestTDLambda(_OfReturns):
    components = (TDLambda(), TDLambda(0.9, 0.7), TDLambda(0.9, 0.0, truncation="terminal"),
                  TDLambda(0.9, 0.7, truncation="mask"), TDLambda(0.9, 0.5, bootstrap="score"), TDLambda(**SOFT))

    def shares(self, component: TDLambda, r: list[float], v: list[float], t: int) -> list[float]:
        return geometric(component.lam, len(r) - t)


class TestTD0(_OfReturns):
    components = tuple(TDLambda(lam=0.0, **more) for more in (
        {}, dict(gamma=0.9), dict(gamma=0.9, truncation="mask"), dict(gamma=0.9, bootstrap="score"),
        dict(gamma=0.9, **SOFT)))

    def shares(self, component: TDLambda, r: list[float], v: list[float], t: int) -> list[float]:
        return [1.0]


class TestMonteCarlo(_OfReturns):
    components = tuple(TDLambda(lam=1.0, **more) for more in (
        {}, dict(gamma=0.9), dict(gamma=0.9, truncation="mask"), dict(gamma=0.9, bootstrap="score"),
        dict(gamma=0.9, truncation="terminal"), dict(gamma=0.9, **SOFT)))

    def shares(self, component: TDLambda, r: list[float], v: list[float], t: int) -> list[float]:
        return [0.0] * (len(r) - t - 1) + [1.0]


class TestNStep(_OfReturns):
    components = (
        NStep(), NStep(0.9, 2), NStep(0.9, 3), NStep(0.9, 4, truncation="mask"), NStep(0.9, 100),
        NStep(0.9, 4, "uniform", truncation="terminal"), NStep(0.9, 13, "uniform"), NStep(0.9, 3, "geometric", 0.7),
        NStep(0.9, mixture="given", weights=(0.5, 0.0, 0.2, 0.3)), NStep(0.9, mixture="given", weights=(0.1,) * 10),
        NStep(0.9, 3, bootstrap="score"), NStep(0.9, 3, **SOFT))

    def shares(self, component: NStep, r: list[float], v: list[float], t: int) -> list[float]:
        n = component.n
        return {"fixed": [0.0] * (n - 1) + [1.0], "uniform": [1 / n] * n, "geometric": geometric(component.lam, n),
                "given": list(component.weights)}[component.mixture]


class TestUPGO(_OfReturns):
    components = (UPGO(), UPGO(0.9), UPGO(0.9, lam_critic=0.5, truncation="mask"), UPGO(0.9, truncation="terminal"),
                  UPGO(0.9, bootstrap="score"), UPGO(0.9, **SOFT))

    def shares(self, component: UPGO, r: list[float], v: list[float], t: int) -> list[float]:
        """All in the return up to the first action that does worse than its value."""
        n = 1
        while t + n < len(r) and r[t + n] + component.gamma * v[t + n + 1] >= v[t + n]:
            n += 1
        return [0.0] * (n - 1) + [1.0]


class _Whitened(EstimatorContract):
    scope = "batch"
    plain: EstimatorContract

    def oracle(self, component: Any, episodes: Episodes) -> Sequence[float]:
        x = list(self.plain.oracle(component, episodes))
        if len(x) < 2:
            return x
        mean = sum(x) / len(x)
        variance = sum((a - mean) ** 2 for a in x) / (len(x) - 1)
        return [(a - mean) / math.sqrt(variance + 1e-8) for a in x]


class TestWhitenedNStep(_Whitened):
    components = (NStep(0.9, 2, whiten=True),)
    plain = TestNStep()


class TestWhitenedUPGO(_Whitened):
    components = (UPGO(0.9, whiten=True),)
    plain = TestUPGO()
