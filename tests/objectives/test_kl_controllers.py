"""KL components: settings, values in every framework; the coefficient's controllers: the published rule, bounds, hold
rules, and closed loops on known plants."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest
from frameworks import FRAMEWORKS, in_float64
from posttrain.loss import NoKL
from posttrain.ops import ops_of
from posttrain_objectives.kl import AdaptiveKL, FixedKL, KLState, divergence
from scipy.optimize import brentq


def closed_loop(kl: AdaptiveKL, plant: Callable[[float], float], start: float, n: int, updates: int) -> list[KLState]:
    states = [KLState(start)]
    for _ in range(updates):
        states.append(kl.update(states[-1], kl=plant(states[-1].coef), n=n))
    return states


def test_rule_is_the_published_one() -> None:
    """Ziegler et al. 2019, section 2.2, written out."""
    rng = np.random.default_rng(0)
    controller = AdaptiveKL(target=0.05, horizon=10_000.0)
    beta = controller.init().coef
    state = controller.init()
    for kl in rng.exponential(0.05, size=200):
        n = int(rng.integers(1, 2000))
        error = kl / 0.05 - 1
        error = -0.2 if error < -0.2 else 0.2 if error > 0.2 else error
        beta = beta * (1 + error * n / 10_000)
        state = controller.update(state, kl=float(kl), n=n)
        assert state.coef == pytest.approx(beta, rel=1e-12)


@pytest.mark.parametrize("slope", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("start", [1e-6, 1e-3, 5.0, 100.0])
@pytest.mark.parametrize("n", [8, 64, 512, 100_000])
def test_default_gains_reach_the_target_of_a_log_log_plant(slope: float, start: float, n: int) -> None:
    kl, root = AdaptiveKL(), 0.2
    plant = lambda coef: kl.target * (coef / root) ** -slope
    states = closed_loop(kl, plant, start, n, 6000 if n >= 64 else 40_000)
    assert all(abs(plant(s.coef) / kl.target - 1) < 0.05 for s in states[-100:])


def test_small_runs_are_controlled_within_a_few_hundred_steps() -> None:
    kl = AdaptiveKL()
    plant = lambda coef: 0.02 / coef
    states = closed_loop(kl, plant, kl.coef, 64, 300)
    assert plant(states[-1].coef) == pytest.approx(kl.target, rel=0.05)


def test_finds_the_dual_optimum_of_the_closed_form_bandit() -> None:
    """argmax E[r] - beta KL(p || q) is p ~ q exp(r / beta): the held KL must be that of the root in beta."""
    rng = np.random.default_rng(1)
    q, r = rng.dirichlet(np.ones(6)), rng.normal(size=6)
    def plant(beta: float) -> float:
        logits = np.log(q) + r / beta
        logp = logits - logits.max()
        logp -= np.log(np.exp(logp).sum())
        return float(np.exp(logp) @ (logp - np.log(q)))
    root = brentq(lambda beta: plant(beta) - 0.1, 1e-2, 1e2)
    for start in (0.1, 20.0):
        assert closed_loop(AdaptiveKL(target=0.1), plant, start, 64, 6000)[-1].coef == pytest.approx(root, rel=1e-6)


def test_coefficient_stays_within_its_bounds_and_leaves_them_again() -> None:
    kl = AdaptiveKL(target=0.1, coef=0.1, coef_min=0.05, coef_max=0.2)
    state = kl.init()
    for high, bound in ((0.0, 0.05), (9.0, 0.2), (0.0, 0.05)):
        for _ in range(100):
            state = kl.update(state, kl=high, n=500)
        assert state.coef == bound


@pytest.mark.parametrize("kl, n", [(math.nan, 64), (math.inf, 64), (-math.inf, 64), (0.3, 0), (math.nan, 0)])
def test_holds_without_a_usable_measurement(kl: float, n: int) -> None:
    state = KLState(0.123)
    assert AdaptiveKL().update(state, kl=kl, n=n) is state


def test_negative_kl_counts_as_zero() -> None:
    kl = AdaptiveKL()
    assert kl.update(kl.init(), kl=-5.0, n=64) == kl.update(kl.init(), kl=0.0, n=64)
    assert kl.update(kl.init(), kl=-5.0, n=64).coef < kl.coef


def test_one_update_changes_the_coefficient_by_at_most_a_tenth_whatever_the_number_of_episodes() -> None:
    kl = AdaptiveKL(coef=1.0)
    assert kl.update(kl.init(), kl=1e9, n=10**9).coef == pytest.approx(1.1)
    assert kl.update(kl.init(), kl=0.0, n=10**9).coef == pytest.approx(0.9)


def test_further_measurements_are_accepted_and_fixed_stays() -> None:
    fixed = FixedKL(coef=0.04)
    assert fixed.update(fixed.init(), kl=9.0, n=64, entropy=1.0) == KLState(0.04)
    adaptive = AdaptiveKL()
    assert adaptive.update(adaptive.init(), kl=0.1, n=64, entropy=1.0) == adaptive.update(adaptive.init(), kl=0.1, n=64)


def test_state_survives_json_bit_for_bit() -> None:
    kl = AdaptiveKL()
    state = kl.update(kl.init(), kl=0.0731, n=37)
    assert KLState(**json.loads(json.dumps(asdict(state)))) == state


@pytest.mark.parametrize("component, fields, message", [
    (AdaptiveKL, {"target": 0.0}, "target"), (AdaptiveKL, {"target": math.nan}, "target"),
    (AdaptiveKL, {"horizon": 0.0}, "horizon"), (AdaptiveKL, {"coef_min": 0.0}, "coef_min positive"),
    (AdaptiveKL, {"coef": 0.01, "coef_min": 0.02}, "coef must lie"),
    (AdaptiveKL, {"coef": 200.0}, "coef must lie"), (AdaptiveKL, {"coef_max": math.inf}, "coef_max finite"),
    (FixedKL, {"coef": -0.1}, "kl: none"), (FixedKL, {"coef": math.nan}, "coef"),
])
def test_fields_without_meaning_are_refused(component: type, fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        component(**fields)


@pytest.mark.parametrize("component", [FixedKL, AdaptiveKL])
@pytest.mark.parametrize("placement, estimator, message", [
    ("loss", "k1", "zero.*k2.*placement: reward"),
    ("reward", "k2", "away from the reference.*k1.*placement: loss"),
    ("reward", "k3", "away from the reference.*k1.*placement: loss"),
    ("los", "auto", "did you mean 'loss'"),
    ("loss", "k4", "auto, k1, k2, k3"),
])
def test_misleading_combinations_are_refused_with_a_way_out(component: type, placement: str, estimator: str,
                                                            message: str) -> None:
    with pytest.raises(ValueError, match=message):
        component(placement=placement, estimator=estimator)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_estimators_are_equal_in_all_frameworks_and_finite_at_extremes(framework: str) -> None:
    d = np.array([0.0, 1e-9, -0.3, 2.0, 100.0, -100.0])
    clamped = np.minimum(d, 20)
    expected = {"k1": -d, "k2": d**2 / 2, "k3": np.expm1(clamped) - clamped}
    asarray = FRAMEWORKS[framework]
    for dtype, rtol in ((np.float64, 1e-13), (np.float32, 1e-5)):
        with in_float64(framework):
            logp, logq = asarray(np.zeros(6, dtype)), asarray(d.astype(dtype))
            for name, value in expected.items():
                found = np.asarray(divergence(ops_of(logp), name, logp, logq))
                assert found.dtype == dtype
                np.testing.assert_allclose(found, value, rtol=rtol, atol=1e-16)


def test_no_kl_adds_nothing() -> None:
    none = NoKL()
    assert none.placement == "none" and none.update(none.init(), kl=3.0, n=5).coef == 0.0
    assert not none.divergence(ops_of(np.ones(3)), np.ones(3), np.zeros(3)).any()
