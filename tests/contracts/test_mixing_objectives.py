"""Constraints, combiners and gradient combiners of posttrain-objectives under their contracts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from posttrain.errors import ConfigError
from posttrain.testing import CombinerContract, ConstraintContract, GradientCombinerContract
from posttrain_objectives.combiners import Progress, Scalarization, WeightedSum
from posttrain_objectives.constraints import (
    CRPO,
    P3O,
    AugmentedLagrangian,
    Lagrangian,
    LogLagrangian,
    PIDLagrangian,
)
from posttrain_objectives.gradients import (
    IMTLG,
    MGDA,
    CAGrad,
    DualProjection,
    MeanGradient,
    NashMTL,
    PCGrad,
    UPGrad,
)


class TestConstraints(ConstraintContract):
    components = (
        Lagrangian(), LogLagrangian(), LogLagrangian(eta=1.0, lambda_init=1.0), PIDLagrangian(),
        PIDLagrangian(kp=0.1, ki=0.01, kd=1.0, ema=0.9, scale={"toxicity": 0.05}), AugmentedLagrangian(),
        AugmentedLagrangian(every=1, growth=1.5), CRPO(), P3O(kappa=2.0))


class TestSums(CombinerContract):
    components = (WeightedSum(), WeightedSum(weights={"brevity": 0.25, "style": 3.0}))

    def oracle(self, component: WeightedSum, advantages: Mapping[str, Sequence[float]],
               keep: Mapping[str, Sequence[bool]]) -> Sequence[float]:
        return plain_sum(component.weights, advantages, keep)


def plain_sum(weights: Mapping[str, float], advantages: Mapping[str, Sequence[float]],
              keep: Mapping[str, Sequence[bool]]) -> list[float]:
    n = len(next(iter(advantages.values())))
    return [sum(weights.get(c, 1.0) * A[i] for c, A in advantages.items() if keep[c][i]) for i in range(n)]


@pytest.mark.parametrize("fields", [{}, {"whiten": True}, {"scale": "column"}], ids=str)
def test_weights_that_are_all_0_are_refused(fields: Mapping[str, Any]) -> None:
    """They would train nothing, and say nothing of it; one reward may have weight 0."""
    rule = WeightedSum(weights={"accuracy": 0.0, "brevity": 0.0}, **fields)
    with pytest.raises(ConfigError, match=r"combiner.weights are 0 for all rewards \(accuracy, brevity\)"):
        rule.init(("accuracy", "brevity"))
    assert rule.init(("accuracy", "brevity", "style")).weights == {"accuracy": 0.0, "brevity": 0.0, "style": 1.0}


class TestGDPO(CombinerContract):
    """The last step of GDPO: the sum is standardised over the actions that some column keeps."""

    components = (WeightedSum(whiten=True), WeightedSum(weights={"brevity": 0.25}, whiten=True))

    def alone(self, component: WeightedSum, advantages: np.ndarray) -> np.ndarray:
        return (advantages - advantages.mean()) / np.sqrt(advantages.var(ddof=1) + 1e-8)

    def oracle(self, component: WeightedSum, advantages: Mapping[str, Sequence[float]],
               keep: Mapping[str, Sequence[bool]]) -> Sequence[float]:
        mixed = plain_sum(component.weights, advantages, keep)
        kept = [i for i in range(len(mixed)) if any(k[i] for k in keep.values())]
        if len(kept) < 2:
            return mixed
        mean = sum(mixed[i] for i in kept) / len(kept)
        variance = sum((mixed[i] - mean) ** 2 for i in kept) / (len(kept) - 1)
        return [(x - mean) / (variance + 1e-8) ** 0.5 for x in mixed]


class TestNormalisedSum(CombinerContract):
    components = (WeightedSum(scale="column"), WeightedSum(weights={"accuracy": 2.0}, scale="column"))
    scale_invariant = True

    def alone(self, component: WeightedSum, advantages: np.ndarray) -> np.ndarray:
        weight = component.weights.get("accuracy", 1.0)
        return np.asarray(weight * advantages / np.sqrt((advantages ** 2).mean()))

    def oracle(self, component: WeightedSum, advantages: Mapping[str, Sequence[float]],
               keep: Mapping[str, Sequence[bool]]) -> Sequence[float]:
        mixed = [0.0] * len(next(iter(advantages.values())))
        for c, A in advantages.items():
            kept = [i for i in range(len(A)) if keep[c][i]]
            square = sum(A[i] ** 2 for i in kept) / max(len(kept), 1)
            for i in kept:
                mixed[i] += component.weights.get(c, 1.0) * A[i] / square ** 0.5 if square else 0.0
        return mixed


class TestScalarizations(CombinerContract):
    """Before anything is measured; `tests/objectives/test_combiners.py` has the rest."""

    components = (Scalarization(), Scalarization(form="tchebycheff", weights={"style": 2.0}),
                  Scalarization(form="achievement", weights={"style": 2.0}, rho=0.5))

    def oracle(self, component: Scalarization, advantages: Mapping[str, Sequence[float]],
               keep: Mapping[str, Sequence[bool]]) -> Sequence[float]:
        w = {c: component.weights.get(c, 1.0) for c in advantages}
        p = {c: 1 / x for c, x in w.items()} if component.form == "achievement" else w
        return plain_sum({c: x / sum(p.values()) for c, x in p.items()}, advantages, keep)


class TestScalarizationsUnderWay(CombinerContract):
    components = (Scalarization(), Scalarization(form="tchebycheff"), Scalarization(form="achievement"))

    def started(self, component: Scalarization, columns: Sequence[str] = ()) -> Progress:
        state = component.init(columns or self.columns)
        for means in ({"accuracy": 0.9, "brevity": 0.5, "style": 0.1}, {"accuracy": 0.2, "brevity": 0.45}):
            state = component.update(state, means)
        return state

    def oracle(self, component: Scalarization, advantages: Mapping[str, Sequence[float]],
               keep: Mapping[str, Sequence[bool]]) -> Sequence[float]:
        J = {"accuracy": 0.8 * 0.9 + 0.2 * 0.2, "brevity": 0.8 * 0.5 + 0.2 * 0.45, "style": 0.1}
        gaps = {"accuracy": 1.0 - J["accuracy"], "brevity": 0.6 - J["brevity"], "style": 0.2 - J["style"]}
        return plain_sum(derivative(component, gaps), advantages, keep)


def derivative(component: Scalarization, gaps: Mapping[str, float], h: float = 1e-6) -> dict[str, float]:
    """Of the scalarisation by each gap, from its values alone; sum 1."""
    def value(f: Mapping[str, float]) -> float:
        match component.form:
            case "tchebycheff":
                return max(f.values())
            case "smooth_tchebycheff":
                return component.mu * float(np.log(sum(np.exp(x / component.mu) for x in f.values())))
            case "achievement":
                return max(f.values()) + component.rho * sum(f.values())
    slope = {c: (value({**gaps, c: x + h}) - value({**gaps, c: x - h})) / (2 * h) for c, x in gaps.items()}
    return {c: x / sum(slope.values()) for c, x in slope.items()}


class TestNonConflictingGradients(GradientCombinerContract):
    components = (UPGrad(), DualProjection(), MGDA(solved=0.0), CAGrad(c=1.0), NashMTL())
    common_descent = True


class TestOtherGradients(GradientCombinerContract):
    components = (MGDA(), PCGrad(), CAGrad(), IMTLG(), MeanGradient())
