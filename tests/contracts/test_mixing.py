"""Constraints, combiners and gradient combiners under their contracts: components as an author would write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from contracts import toys_mixing
from contracts.toys_mixing import DualAscent, LaggardFirst, Mean, MinNorm, StandardisedSum, WeightedSum
from posttrain.testing import CombinerContract, ConstraintContract, GradientCombinerContract


class TestDualAscent(ConstraintContract):
    components = (DualAscent(), DualAscent(rate=0.5))
    plugins = (toys_mixing,)


class TestWeightedSum(CombinerContract):
    components = (WeightedSum(), WeightedSum({"brevity": 0.25, "style": 3.0}))
    plugins = (toys_mixing,)

    def oracle(self, component: WeightedSum, advantages: Mapping[str, Sequence[float]],
               keep: Mapping[str, Sequence[bool]]) -> Sequence[float]:
        n = len(next(iter(advantages.values())))
        return [sum(component.weights.get(c, 1.0) * A[i] for c, A in advantages.items() if keep[c][i])
                for i in range(n)]


class TestStandardisedSum(CombinerContract):
    components = (StandardisedSum(),)
    plugins = (toys_mixing,)
    scale_invariant = True

    def oracle(self, component: Any, advantages: Mapping[str, Sequence[float]],
               keep: Mapping[str, Sequence[bool]]) -> Sequence[float]:
        n = len(next(iter(advantages.values())))
        mixed = [0.0] * n
        for c, A in advantages.items():
            kept = [i for i in range(n) if keep[c][i]]
            square = sum(A[i] ** 2 for i in kept) / max(1, len(kept))
            for i in kept:
                mixed[i] += A[i] / square ** 0.5 if square > component.eps else 0.0
        return mixed

    def alone(self, component: Any, advantages: Any) -> Any:
        return advantages / (advantages ** 2).mean() ** 0.5


class TestLaggardFirst(CombinerContract):
    components = (LaggardFirst(),)
    plugins = (toys_mixing,)

    def oracle(self, component: Any, advantages: Mapping[str, Sequence[float]],
               keep: Mapping[str, Sequence[bool]]) -> Sequence[float]:
        """Before anything is measured all columns share the least mean."""
        n = len(next(iter(advantages.values())))
        return [sum(A[i] for c, A in advantages.items() if keep[c][i]) / len(advantages) for i in range(n)]


class TestMean(GradientCombinerContract):
    components = (Mean(),)
    plugins = (toys_mixing,)


class TestMinNorm(GradientCombinerContract):
    components = (MinNorm(),)
    plugins = (toys_mixing,)
    common_descent = True
