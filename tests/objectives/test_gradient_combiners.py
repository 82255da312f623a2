"""Weights of gradients from their Gramian: each rule against the plainest form of its paper, on the gradients
themselves; what all of them owe is in the contract, and independent libraries are asked in `tests/oracles`."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from frameworks import in_float64
from hypothesis import given
from hypothesis import strategies as st
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
from scipy.optimize import minimize

RULES = (UPGrad(), DualProjection(), MGDA(), PCGrad(), CAGrad(), IMTLG(), NashMTL(), MeanGradient())
SEEDS = range(12)


def drawn(seed: int, spread: float = 1.0) -> np.ndarray:
    """[m, d] gradients, m from 2 to 4, of lengths up to e^spread apart from 1."""
    rng = np.random.default_rng(seed)
    m = 2 + seed % 3
    return rng.normal(size=(m, m + 1)) * np.exp(spread * rng.uniform(-1, 1, size=(m, 1)))


def weights(rule: Any, J: np.ndarray) -> np.ndarray:
    return np.asarray(rule.weights(J @ J.T, rule.init([str(i) for i in range(len(J))]))[0])


def direction(rule: Any, J: np.ndarray) -> np.ndarray:
    return weights(rule, J) @ J


# ---- each rule against its paper


def nearest_that_nobody_objects_to(J: np.ndarray, g: np.ndarray) -> np.ndarray:
    """min |d - g|^2 subject to J d >= 0, by sequential quadratic programming on d itself."""
    unit = J / np.linalg.norm(J, axis=1, keepdims=True)
    found = minimize(lambda d: (d - g) @ (d - g) / (g @ g), np.zeros_like(g), jac=lambda d: 2 * (d - g) / (g @ g),
                     constraints={"type": "ineq", "fun": lambda d: unit @ d, "jac": lambda d: unit}, method="SLSQP",
                     options={"ftol": 1e-16, "maxiter": 500})
    return np.asarray(found.x)


@pytest.mark.parametrize("seed", SEEDS)
def test_upgrad_is_the_mean_of_projections(seed: int) -> None:
    J = drawn(seed)
    expected = np.mean([nearest_that_nobody_objects_to(J, g) for g in J], axis=0)
    assert direction(UPGrad(), J) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_dual_projection_is_that_of_the_mean(seed: int) -> None:
    J = drawn(seed)
    assert direction(DualProjection(), J) == pytest.approx(nearest_that_nobody_objects_to(J, J.mean(axis=0)), abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_mgda_of_two_is_the_closed_form(seed: int) -> None:
    """Sener and Koltun 2018, algorithm 1."""
    a, b = np.random.default_rng(seed).normal(size=(2, 3)) * [[1.0], [2.0]]
    w = np.clip((b - a) @ b / ((a - b) @ (a - b)), 0.0, 1.0)
    assert weights(MGDA(), np.stack([a, b])) == pytest.approx([w, 1 - w], abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_mgda_keeps_the_conditions_of_its_optimum(seed: int) -> None:
    """Désidéri 2012: products with all gradients are at least |d|^2, and equal where the weight is positive."""
    J = drawn(seed, spread=3.0)
    w = weights(MGDA(solved=0.0), J)
    d = w @ J
    assert w.sum() == pytest.approx(1.0)
    assert (J @ d >= d @ d * (1 - 1e-9)).all()
    assert (J @ d)[w > 1e-9] == pytest.approx(d @ d, rel=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_pcgrad_is_the_mean_over_orders_of_the_algorithm(seed: int) -> None:
    """Yu et al. 2020, algorithm 1, on vectors."""
    J = drawn(seed)
    total = np.zeros(J.shape[1])
    for i in range(len(J)):
        orders = list(permutations(j for j in range(len(J)) if j != i))
        for order in orders:
            g = J[i].copy()
            for j in order:
                if g @ J[j] < 0:
                    g -= (g @ J[j]) / (J[j] @ J[j]) * J[j]
            total += g / len(orders)
    assert direction(PCGrad(), J) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("c", [0.2, 0.5, 1.5])
def test_cagrad_is_the_best_of_its_ball(seed: int, c: float) -> None:
    """No other d in the ball has a larger least product, and where c < 1 d lies on its surface."""
    J = drawn(seed)
    d, mean, rng = direction(CAGrad(c=c), J), J.mean(axis=0), np.random.default_rng(seed)
    radius = c * np.linalg.norm(mean)
    assert np.linalg.norm(d - mean) <= radius * (1 + 1e-9)
    other = rng.normal(size=(20_000, J.shape[1]))
    other *= radius / np.linalg.norm(other, axis=1, keepdims=True)
    near = d + 0.01 * rng.normal(size=(5_000, J.shape[1]))  # back into the ball
    near = (near - mean) / np.maximum(np.linalg.norm(near - mean, axis=1, keepdims=True) / radius, 1.0)
    best = ((mean + np.concatenate([other, near])) @ J.T).min(axis=1).max()
    assert (J @ d).min() >= best - 1e-9


@pytest.mark.parametrize("seed", SEEDS)
def test_imtl_has_equal_projections(seed: int) -> None:
    J = drawn(seed)
    projections = J @ direction(IMTLG(), J) / np.linalg.norm(J, axis=1)
    assert projections == pytest.approx(projections[0], rel=1e-9)
    assert projections[0] > 0
    w = weights(IMTLG(), J)
    assert w.sum() == pytest.approx(1.0) or np.abs(w).sum() == pytest.approx(1.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_nash_solves_its_equation(seed: int) -> None:
    J = drawn(seed)
    w = weights(NashMTL(ridge=1e-12), J)
    assert (w > 0).all()
    assert (J @ J.T) @ w * w == pytest.approx(1.0, rel=1e-8)
    assert np.linalg.norm(w @ J) == pytest.approx(np.sqrt(len(J)))


def test_mean_is_the_mean() -> None:
    J = drawn(1)
    assert direction(MeanGradient(), J) == pytest.approx(J.mean(axis=0))


# ---- what they promise


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_gradients_of_zero_take_no_part(rule: Any) -> None:
    """A reward that is the same for all answers leaves the step of the others as it is."""
    J = drawn(5)
    with_zero = np.insert(J, 1, 0.0, axis=0)
    w = weights(rule, with_zero)
    if not isinstance(rule, MeanGradient):
        assert w[1] == 0.0
        assert np.delete(w, 1) == pytest.approx(weights(rule, J), rel=1e-9)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_one_gradient_is_followed(rule: Any) -> None:
    J = np.array([[3.0, 4.0], [0.0, 0.0]])
    d = direction(rule, J)
    assert d / np.linalg.norm(d) == pytest.approx([0.6, 0.8])


@given(st.sampled_from(RULES), st.integers(0, 1000), st.sampled_from([1e-12, 1e-3, 1e6]))
def test_all_gradients_times_a_number(rule: Any, seed: int, number: float) -> None:
    """Weights stay what they are, or, of Nash's, fall as the gradients grow."""
    J = drawn(seed)
    expected = weights(rule, J) / (number if isinstance(rule, NashMTL) else 1.0)
    assert weights(rule, number * J) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rule", [IMTLG(), NashMTL()], ids=str)
def test_some_directions_do_not_depend_on_the_length_of_one_gradient(rule: Any) -> None:
    J = drawn(2)
    d, longer = direction(rule, J), direction(rule, J * np.array([100.0] + [1.0] * (len(J) - 1))[:, None])
    assert longer / np.linalg.norm(longer) == pytest.approx(d / np.linalg.norm(d), rel=1e-6)


@pytest.mark.parametrize("rule", [UPGrad(), DualProjection(), MGDA(), CAGrad(c=1.0), NashMTL()], ids=str)
def test_opposed_gradients_stand_still(rule: Any) -> None:
    """No step serves both; what remains is nothing, beside the gradients' lengths."""
    J = np.array([[1.0, 2.0], [-3.0, -6.0]])
    assert np.linalg.norm(direction(rule, J)) < 1e-2 * np.linalg.norm(weights(rule, J)[:, None] * J)


def test_an_aim_that_is_nearly_reached_does_not_stop_mgda() -> None:
    J = np.array([[1.0, 0.0], [0.0, 1e-4]])
    assert np.linalg.norm(direction(MGDA(solved=0.0), J)) < 1e-3
    assert direction(MGDA(), J) == pytest.approx([1.0, 0.0])


def test_a_gradient_that_would_stay_behind_is_served() -> None:
    """The mean goes against the shorter of two conflicting gradients, and UPGrad does not."""
    J = np.array([[10.0, 0.0], [-1.0, 0.5]])
    assert (J @ direction(MeanGradient(), J))[1] < 0
    assert (J @ direction(UPGrad(), J) > 0).all()


@pytest.mark.parametrize(("kind", "fields", "message"), [
    (MGDA, {"solved": 1.0}, "solved must lie in"), (CAGrad, {"c": -1.0}, "c must be finite and not negative"),
    (NashMTL, {"ridge": 0.0}, "ridge must lie in")])
def test_fields_out_of_range_are_refused(kind: Any, fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**fields)


@pytest.mark.parametrize("rule", RULES[:-1], ids=str)
@pytest.mark.parametrize("gramian", [[[1.0, math.nan], [math.nan, 1.0]], [[math.nan, 0.0], [0.0, 1.0]],
                                     [[math.inf, 0.0], [0.0, 1.0]], [[1.0, -math.inf], [-math.inf, 1.0]]], ids=str)
def test_a_gramian_that_is_not_finite_is_refused(rule: Any, gramian: list[list[float]]) -> None:
    """Weights of 0 or 1 / m would look like an answer."""
    with pytest.raises(ValueError, match="the Gramian of the gradients must be finite, got .*(nan|inf)"):
        rule.weights(np.array(gramian), rule.init(["a", "b"]))


def test_more_gradients_than_orders_can_be_gone_through_are_refused() -> None:
    with pytest.raises(ValueError, match="pcgrad takes up to 7 gradients, got 8: use upgrad"):
        PCGrad().init([str(i) for i in range(8)])


# ---- gradients of torch and JAX, whole or in parts


X = np.random.default_rng(0).normal(size=(8, 3))
PARAMETERS = np.random.default_rng(1).normal(size=3)


def columns(xp: Any, parameters: Any, x: Any) -> tuple[Any, Any, Any]:
    """Three sums over rows that pull at the same parameters in different directions."""
    h = xp.tanh(x @ parameters)
    return (h ** 3).sum(), (h * x[:, 0]).sum(), -(h ** 2).sum()


def torch_gradients(x: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch")
    parameters = torch.tensor(PARAMETERS, requires_grad=True)
    return np.array([torch.autograd.grad(loss, parameters, retain_graph=True)[0].numpy()
                     for loss in columns(torch, parameters, torch.from_numpy(x))])


def jax_gradients(x: np.ndarray) -> np.ndarray:
    jax = pytest.importorskip("jax")
    return np.stack(jax.jacrev(lambda parameters: columns(jax.numpy, parameters, x))(jax.numpy.asarray(PARAMETERS)))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_step_is_the_same_on_torch_and_jax_however_the_batch_is_split(rule: Any, parts: int) -> None:
    """Gradients of parts are added up before their Gramian is taken, as learners do."""
    with in_float64("jax"):
        steps = [direction(rule, np.sum([gradients(x) for x in np.split(X, parts)], axis=0))
                 for gradients in (torch_gradients, jax_gradients)]
    whole = direction(rule, torch_gradients(X))
    assert np.linalg.norm(whole) > 0
    for step in steps:
        assert step == pytest.approx(whole, rel=1e-7, abs=1e-9)
