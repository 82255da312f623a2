"""KL estimators: values in every framework, precision, clamps, episodes; and combinations that are refused, by text.

What their gradients are is `test_kl_gradients.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from frameworks import FRAMEWORKS, in_float64
from objectives.cases import micro_batch, random_case
from posttrain.data import TokenOutputs
from posttrain.loss import KLTerm, NoKL, over_vocabulary
from posttrain.ops import ops_of
from posttrain.protocols import Compared, Output
from posttrain_objectives.kl import PIDKL, AdaptiveKL, BandKL, DualKL, EntropyKL, FixedKL
from posttrain_objectives.kl_estimators import ESTIMATORS, divergence
from posttrain_objectives.kl_schedules import ScheduledKL

COMPONENTS = (FixedKL, ScheduledKL, AdaptiveKL, PIDKL, BandKL, DualKL, EntropyKL)
LENGTHS = np.array([3, 1, 2])
EPISODE = np.repeat(np.arange(3), LENGTHS)


def compared(logq: np.ndarray, old: np.ndarray | None = None, asarray: Any = np.asarray) -> Compared:
    """Six actions of three episodes."""
    return Compared(asarray(logq), asarray(EPISODE), asarray(LENGTHS), None if old is None else asarray(old))


def literal(name: str, off_policy: str, logp: np.ndarray, logq: np.ndarray, old: np.ndarray) -> list[float]:
    """One action after the other."""
    found = []
    for n, e in enumerate(EPISODE):
        members = [i for i in range(len(EPISODE)) if EPISODE[i] == e] if name == "seq_k2" else [n]
        d = sum(logq[i] - logp[i] for i in members)
        k = {"k1": -d, "k2": d * d / 2, "seq_k2": d * d / 2 / len(members)}.get(name, math.exp(min(d, 20)) - 1 - d)
        log_rho = sum(min(max(logp[i] - old[i], -20), 20) for i in members)
        found.append(k if off_policy == "none" else math.exp(min(max(log_rho, -20), 20)) * k)
    return found


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_values_are_the_literal_ones_in_all_frameworks(framework: str) -> None:
    rng = np.random.default_rng(3)
    logp, logq, old = -rng.exponential(size=(3, 6))
    asarray = FRAMEWORKS[framework]
    for dtype, rtol in ((np.float64, 1e-13), (np.float32, 2e-5)):
        with in_float64(framework):
            x, q, mu = (asarray(c.astype(dtype)) for c in (logp, logq, old))
            at = Compared(q, asarray(EPISODE), asarray(LENGTHS), mu)
            for name in ESTIMATORS:
                for off_policy in ("none", "ratio"):
                    found = np.asarray(divergence(ops_of(x), name, x, at, off_policy))
                    assert found.dtype == dtype, (name, off_policy)
                    np.testing.assert_allclose(found, literal(name, off_policy, logp, logq, old), rtol=rtol,
                                               atol=1e-6 if dtype is np.float32 else 1e-15, err_msg=name)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_small_log_ratios_keep_their_digits_and_large_ones_stay_finite(framework: str) -> None:
    d = np.array([0.0, 1e-9, -0.3, 2.0, 100.0, -100.0])
    clamped = np.minimum(d, 20)
    expected = {"k1": -d, "k2": d**2 / 2, "k3": np.expm1(clamped) - clamped}
    asarray = FRAMEWORKS[framework]
    for dtype, rtol in ((np.float64, 1e-13), (np.float32, 1e-5)):
        with in_float64(framework):
            logp = asarray(np.zeros(6, dtype))
            for name, value in expected.items():
                found = np.asarray(divergence(ops_of(logp), name, logp, compared(d.astype(dtype), None, asarray)))
                np.testing.assert_allclose(found, value, rtol=rtol, atol=1e-16)


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    rng = np.random.default_rng(0)
    logp, logq = (z - np.log(np.exp(z).sum()) for z in rng.normal(size=(2, 6)))
    exact = np.exp(logp) @ (logp - logq)
    mean = {name: np.exp(logp) @ divergence(ops_of(logp), name, logp, compared(logq)) for name in ("k1", "k2", "k3")}
    assert mean["k1"] == pytest.approx(exact, rel=1e-13) and mean["k3"] == pytest.approx(exact, rel=1e-13)
    assert abs(mean["k2"] - exact) > 0.02


def test_an_estimate_of_episodes_sums_to_that_of_each() -> None:
    """Whatever lies beside it; an action of a dummy episode, as a backend pads, changes no other."""
    rng = np.random.default_rng(1)
    logp, logq = -rng.exponential(size=(2, 6))
    k = divergence(ops_of(logp), "seq_k2", logp, compared(logq))
    per_episode = np.add.reduceat(logp - logq, [0, 3, 4])
    np.testing.assert_allclose(np.add.reduceat(k, [0, 3, 4]), per_episode**2 / 2, rtol=1e-13)
    padded = Compared(np.append(logq, -9.0), np.append(EPISODE, 3), np.append(LENGTHS, 1))
    longer = np.append(logp, -0.5)
    assert np.array_equal(divergence(ops_of(logp), "seq_k2", longer, padded)[:6], k)


def test_the_unit_is_the_episode_where_the_estimate_is() -> None:
    assert {name: FixedKL(placement="loss", estimator=name, off_policy="ratio").unit for name in ESTIMATORS} == {
        "k1": "action", "k2": "action", "k3": "action", "k3+": "action", "seq_k2": "episode"}


@pytest.mark.needs("torch")
def test_half_precision_is_computed_in_float32() -> None:
    torch = pytest.importorskip("torch")
    logp = torch.tensor([-1.0, -2.0], dtype=torch.bfloat16)
    at = Compared(torch.tensor([-1.001, -2.5]), torch.tensor([0, 0]), torch.tensor([2]))
    found = divergence(ops_of(logp), "k3", logp, at)
    assert found.dtype == torch.float32
    d = np.array([-0.001, -0.5])
    np.testing.assert_allclose(found.numpy(), np.expm1(d) - d, rtol=1e-3)


@pytest.mark.needs("torch")
def test_gradients_at_the_clamp() -> None:
    """k3's vanishes above it alone; the others go on, and the ratio form of k3 still points the right way."""
    torch = pytest.importorskip("torch")
    expected = {("k3", "none"): [0.0, 1 - math.exp(-0.5), 1.0], ("k2", "none"): [-49.0, 0.5, 90.0],
                ("k3+", "none"): [-49.0, 0.5, 90.0], ("k3", "ratio"): [-49.0, 0.5, 90.0]}
    for (name, off_policy), slopes in expected.items():
        logp = torch.tensor([-50.0, -1.0, 0.0], dtype=torch.float64, requires_grad=True)
        logq = torch.tensor([-1.0, -1.5, -90.0], dtype=torch.float64)
        at = Compared(logq, torch.tensor([0, 0, 0]), torch.tensor([3]))
        divergence(ops_of(logp), name, logp, at, off_policy).sum().backward()
        np.testing.assert_allclose(logp.grad, slopes, rtol=1e-12)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("placement, estimator, off_policy, message", [
    ("loss", "k1", "none", "zero.*estimator: k2.*off_policy: ratio.*placement: reward"),
    ("reward", "k2", "none", "k2 as a reward.*away from the reference.*k1.*placement: loss"),
    ("reward", "k3", "none", "k3 as a reward.*away from the reference.*k1.*placement: loss"),
    ("reward", "k3+", "none", "away from the reference.*k1.*placement: loss"),
    ("reward", "seq_k2", "none", "seq_k2 as a reward.*not on which side.*k1.*placement: loss"),
    ("advantage", "k2", "none", "k2 as an advantage.*away from the reference"),
    ("advantage", "k3", "none", "away from the reference.*k1.*placement: loss"),
    ("advantage", "k3+", "none", "away from the reference.*k1.*placement: loss"),
    ("advantage", "seq_k2", "none", "not on which side.*k1.*placement: loss"),
    ("reward", "auto", "ratio", "off_policy ratio belongs to placement loss.*off_policy: none"),
    ("advantage", "k1", "ratio", "off_policy ratio belongs to placement loss.*off_policy: none"),
    ("reward", "exact", "none", "exact as a reward is one number for all actions.*k1.*placement: loss"),
    ("advantage", "exact", "none", "exact as an advantage is one number for all actions.*k1.*placement: loss"),
    ("loss", "exact", "ratio", "exact sums over all actions.*only add noise.*off_policy: none"),
    ("los", "auto", "none", "did you mean 'loss'"),
    ("loss", "k4", "none", r"auto, k1, k2, k3, k3\+, seq_k2, exact"),
    ("loss", "k2", "ration", "did you mean 'ratio'"),
])
def test_misleading_combinations_are_refused_with_a_way_out(component: Any, placement: str, estimator: str,
                                                            off_policy: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        component(placement=placement, estimator=estimator, off_policy=off_policy)


@pytest.mark.parametrize("estimator", ["k2", "seq_k2"])
def test_the_term_in_the_loss_is_the_weighted_sum_and_reports_how_much_is_clamped(estimator: Any) -> None:
    """Actions without weight, as a backend pads, are not counted."""
    case = random_case(4, lengths=(2, 3))
    logp, logq = case.outputs["logprobs"], case.columns["ref_logprobs"].copy()
    logq[0], logq[3], logq[4] = logp[0] - 21.0, logp[3] + 30.0, logp[4] - 50.0
    weight = np.array([0.2, 0.3, 0.1, 0.4, 0.0])
    part = micro_batch(case.with_columns(ref_logprobs=logq, weight=weight, kl_weight=weight, value_weight=weight),
                       np.asarray)
    kl = FixedKL(placement="loss", estimator=estimator)
    loss = KLTerm(kl)(ops_of(logp), TokenOutputs(logp), part, {"kl": np.float64(0.3)})
    d = logp - logq
    k = d**2 / 2 if estimator == "k2" else np.repeat([d[:2].sum()**2 / 4, d[2:].sum()**2 / 6], [2, 3])
    assert KLTerm(kl).unit == kl.unit and float(loss.terms["kl"].total) == pytest.approx(weight @ k, rel=1e-13)
    assert loss.terms["kl"].coef == 0.3 and loss.metrics["kl/clamped"] == (2.0, 4.0)


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_kl_over_the_vocabulary_is_the_learners_and_is_measured(component: Any) -> None:
    """No log-prob of the reference is read. Actions without weight, as a backend pads, are not counted."""
    kl = component(placement="loss", estimator="exact")
    case = random_case(4, lengths=(2, 3))
    weight, k = np.array([0.2, 0.3, 0.1, 0.4, 0.0]), np.array([0.5, 0.1, 0.0, 2.0, 7.0])
    part = micro_batch(case.with_columns(weight=weight, kl_weight=weight, value_weight=weight), np.asarray)
    logp, term = case.outputs["logprobs"], KLTerm(kl)
    loss = term(ops_of(logp), TokenOutputs(logp, reference_kl=k), replace(part, ref_logprobs=None),
                {"kl": np.float64(0.3)})
    assert term.unit == "action" and not term.needs and term.outputs == {Output.REFERENCE_KL}
    assert float(loss.terms["kl"].total) == pytest.approx(weight @ k, rel=1e-14)
    total, n = loss.metrics["kl/reference"]
    assert (float(total), float(n)) == (pytest.approx(2.6), 4.0) and len(loss.metrics) == 1
    with pytest.raises(ValueError, match="a learner that was told its reference"):
        kl.divergence(ops_of(logp), logp, compared(np.zeros(6)))


def test_only_exact_looks_at_the_whole_vocabulary() -> None:
    for name in ESTIMATORS:
        assert not FixedKL(placement="loss", estimator=name, off_policy="ratio").over_vocabulary
    assert not over_vocabulary(NoKL()) and not FixedKL().over_vocabulary
    assert over_vocabulary(FixedKL(placement="loss", estimator="exact"))


def test_no_kl_adds_nothing() -> None:
    none = NoKL()
    assert none.placement == "none" and none.update(none.init(), kl=3.0, n=5).coef == 0.0
    assert not none.divergence(ops_of(np.ones(6)), np.ones(6), compared(np.zeros(6))).any()
