"""The KL components here, core's `kl: none` among them, keep the contract of their kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from posttrain.loss import NoKL
from posttrain.testing import KLContract
from posttrain_objectives.kl import PIDKL, AdaptiveKL, BandKL, ConstrainedKL, DualKL, EntropyKL, FixedKL
from posttrain_objectives.kl_schedules import ScheduledKL

HELD = (AdaptiveKL, PIDKL, BandKL, DualKL)
"""Controllers that hold a KL."""


class TestNoKL(KLContract):
    components = (NoKL(),)

    def oracle(self, component: NoKL, logprob: float, ref_logprob: float) -> float:
        return 0.0


class OfControllers(KLContract):
    """What moves the coefficient of each."""

    def target(self, component: Any) -> float | None:
        return component.target if isinstance(component, HELD) else None

    def schedule(self, component: Any, k: int) -> float | None:
        if not isinstance(component, ScheduledKL):
            return None
        x = min(k, component.steps) / component.steps
        if component.shape == "linear":
            return (1 - x) * component.coef + x * component.coef_end
        return component.coef_end + (component.coef - component.coef_end) * math.cos(math.pi * x / 2) ** 2

    def driven(self, component: Any) -> tuple[Mapping[str, float], Mapping[str, float]] | None:
        if not isinstance(component, EntropyKL):
            return None
        return {"entropy": 0.5 * component.target_entropy}, {"entropy": 2 * component.target_entropy}


class TestK1InTheReward(OfControllers):
    components = (
        FixedKL(), FixedKL(coef=0.0, estimator="k1"), ScheduledKL(steps=50), ScheduledKL(
            shape="cosine", coef=0.01, coef_end=0.2, steps=100),
        AdaptiveKL(), AdaptiveKL(target=0.2, horizon=50.0), PIDKL(), PIDKL(kd=0.0), PIDKL(target=0.2, kp=0.0, ki=0.3),
        BandKL(), BandKL(factor=2.0, band=1.2), DualKL(), DualKL(target=0.3, ki=0.01),
        EntropyKL(), EntropyKL(target_entropy=1.0, coef=0.02, coef_min=0.01, coef_max=0.05))

    def oracle(self, component: Any, logprob: float, ref_logprob: float) -> float:
        return logprob - ref_logprob


class TestK1InTheAdvantage(OfControllers):
    components = (FixedKL(placement="advantage"), PIDKL(placement="advantage", estimator="k1"))

    def oracle(self, component: Any, logprob: float, ref_logprob: float) -> float:
        return logprob - ref_logprob


class TestK1AmongTheCosts(OfControllers):
    components = (ConstrainedKL(), ConstrainedKL(at_most=0.3))

    def oracle(self, component: Any, logprob: float, ref_logprob: float) -> float:
        return logprob - ref_logprob


class TestK1WeighedInTheLoss(OfControllers):
    components = (FixedKL(placement="loss", estimator="k1", off_policy="ratio"),)

    def oracle(self, component: FixedKL, logprob: float, ref_logprob: float) -> float:
        return logprob - ref_logprob


class TestK2InTheLoss(OfControllers):
    unbiased = False
    non_negative = True
    components = (
        FixedKL(placement="loss"), AdaptiveKL(placement="loss", estimator="k2"), DualKL(placement="loss"),
        FixedKL(placement="loss", estimator="seq_k2"), FixedKL(placement="loss", off_policy="ratio"),
        FixedKL(placement="loss", estimator="seq_k2", off_policy="ratio"))

    def oracle(self, component: Any, logprob: float, ref_logprob: float) -> float:
        return (ref_logprob - logprob) ** 2 / 2


class OfK3(OfControllers):
    non_negative = True

    def oracle(self, component: Any, logprob: float, ref_logprob: float) -> float:
        return math.expm1(ref_logprob - logprob) - (ref_logprob - logprob)


class TestK3InTheLoss(OfK3):
    gradient = "forward"
    components = (FixedKL(placement="loss", estimator="k3"), AdaptiveKL(placement="loss", estimator="k3"))


class TestK3WithTheReverseGradientInTheLoss(OfK3):
    components = (
        FixedKL(placement="loss", estimator="k3+"), FixedKL(placement="loss", estimator="k3", off_policy="ratio"),
        FixedKL(placement="loss", estimator="k3+", off_policy="ratio"))
