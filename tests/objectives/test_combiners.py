"""Combiners of advantages: GDPO and MO-GRPO from rewards, scalarisations that follow what was measured, and the front
that each of them reaches; what all owe is in the contract."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from posttrain.data import Estimate
from posttrain.errors import ConfigError
from posttrain.protocols import Measuring
from posttrain_objectives.combiners import Progress, Scalarization, WeightedSum

# ---- sums


def test_gdpo_of_rewards_that_were_normalised_by_group() -> None:
    """Liu et al. 2026: each reward by its group's mean and deviation, the sum of both by those of the batch."""
    rng, group = np.random.default_rng(0), np.repeat(np.arange(4), 5)
    rewards = {"accuracy": rng.integers(0, 2, 20).astype(float), "brevity": rng.normal(size=20)}
    z = {name: np.concatenate([(r[group == g] - r[group == g].mean()) / (r[group == g].std(ddof=1) + 1e-6)
                               for g in range(4)]) for name, r in rewards.items()}
    total = z["accuracy"] + 0.5 * z["brevity"]
    rule = WeightedSum(weights={"brevity": 0.5}, whiten=True)
    estimates = {name: Estimate(A) for name, A in z.items()}
    mixed = rule.combine(estimates, rule.init(tuple(rewards)))
    assert mixed.advantages == pytest.approx((total - total.mean()) / np.sqrt(total.var(ddof=1) + 1e-8))
    plain = WeightedSum(weights={"brevity": 0.5})
    assert plain.combine(estimates, plain.init(tuple(rewards))).advantages == pytest.approx(total)


def test_weights_are_logged_by_column() -> None:
    rule = WeightedSum(weights={"b": 0.5})
    columns = {"a": Estimate(np.array([2.0, -2.0, 0.0])), "b": Estimate(np.array([1.0, 1.0, -4.0]))}
    assert rule.combine(columns, rule.init(("a", "b"))).metrics.values_by_name() == pytest.approx({
        "combiner/a": 1.0, "combiner/b": 0.5, "combiner/a/share": 4 / 7, "combiner/b/share": 3 / 7})
    nothing = {column: Estimate(np.zeros(3)) for column in "ab"}
    shares = rule.combine(nothing, rule.init(("a", "b"))).metrics.values_by_name()
    assert shares["combiner/a/share"] == shares["combiner/b/share"] == 0


@pytest.mark.parametrize(("rule", "message"), [
    (WeightedSum(weights={"brevty": 1.0}), "combiner.weights.brevty is no reward; did you mean 'brevity'"),
    (Scalarization(weights={"brevty": 1.0}), "combiner.weights.brevty is no reward"),
    (Scalarization(ideal={"brevty": 1.0}), "combiner.ideal.brevty is no reward")])
def test_names_of_no_reward_are_refused(rule: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rule.init(("accuracy", "brevity"))


@pytest.mark.parametrize(("kind", "fields", "message"), [
    (WeightedSum, {"scale": "colum"}, "scale 'colum' is not one of none, column; did you mean 'column'"),
    (WeightedSum, {"weights": {"a": math.nan}}, "weights.a must be finite"),
    (Scalarization, {"form": "chebyshev"}, "form 'chebyshev' is not one of"),
    (Scalarization, {"weights": {"a": 0.0}}, "weights.a must be positive"),
    (Scalarization, {"ideal": {"a": math.inf}}, "ideal.a must be finite"),
    (Scalarization, {"ema": 1.0}, "ema must lie in"), (Scalarization, {"mu": 0.0}, "mu must be finite and positive"),
    (Scalarization, {"margin": -1.0}, "margin must be finite and not negative")])
def test_fields_out_of_range_are_refused(kind: Any, fields: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**fields)


# ---- scalarisations


def at(rule: Scalarization, means: Mapping[str, float]) -> Progress:
    return rule.update(rule.init(tuple(means)), means)


def test_only_what_follows_rewards_is_measured() -> None:
    assert isinstance(Scalarization(), Measuring)
    assert not isinstance(WeightedSum(), Measuring)


def test_tchebycheff_weighs_what_lags() -> None:
    rule = Scalarization(form="tchebycheff", ideal={"a": 1.0, "b": 1.0})
    assert rule.derivative(at(rule, {"a": 0.9, "b": 0.2})) == {"a": 0.0, "b": 1.0}
    assert rule.derivative(at(rule, {"a": 0.5, "b": 0.5})) == {"a": 0.5, "b": 0.5}


def test_smooth_tchebycheff_lies_between_the_mean_and_the_maximum() -> None:
    state = {"a": 0.9, "b": 0.2}
    soft, sharp, flat = (Scalarization(ideal={"a": 1.0, "b": 1.0}, mu=mu) for mu in (0.1, 1e-3, 1e3))
    assert soft.derivative(at(soft, state))["b"] == pytest.approx(1 / (1 + math.exp(-7)))
    assert sharp.derivative(at(sharp, state)) == pytest.approx({"a": 0.0, "b": 1.0})
    assert flat.derivative(at(flat, state)) == pytest.approx({"a": 0.5, "b": 0.5}, abs=1e-3)


def test_achievement_divides_by_weights() -> None:
    """A small weight makes a gap large: it is the tolerance of the column's aim."""
    rule = Scalarization(form="achievement", weights={"a": 1.0, "b": 0.1}, ideal={"a": 1.0, "b": 1.0}, rho=0.0)
    assert rule.derivative(at(rule, {"a": 0.2, "b": 0.9})) == {"a": 0.0, "b": 1.0}


def test_the_ideal_is_the_best_so_far_and_a_margin() -> None:
    rule = Scalarization(form="tchebycheff", margin=0.1, ema=0.0)
    state = at(rule, {"a": 0.5, "b": 0.5})
    state = rule.update(state, {"a": 0.8, "b": 0.5})
    state = rule.update(state, {"a": 0.6, "b": 0.5})
    assert state.best == {"a": 0.8, "b": 0.5}
    assert rule.derivative(state) == {"a": 1.0, "b": 0.0}  # gaps 0.3 and 0.1


def test_running_means_begin_at_the_first_measurement_and_hold_without_one() -> None:
    rule = Scalarization(ema=0.8)
    state = at(rule, {"a": 0.5, "b": 0.1})
    state = rule.update(state, {"a": 1.0, "b": math.nan})
    assert state.means == {"a": pytest.approx(0.6), "b": 0.1}
    assert rule.update(state, {}) == state


SLOPE = np.array([0.0, 0.3, 0.6, 1.0])
CONCAVE = {"a": SLOPE, "b": (1 - SLOPE) ** 2}
"""Two objectives of four actions; the middle ones lie below the line between the ends: no weighted sum prefers them."""


def mean_after(rule: Any, steps: int = 4000, lr: float = 0.2) -> dict[str, float]:
    """Objectives of a softmax policy after exact policy gradients, averaged over the second half."""
    theta, state, found = 0.1 * np.arange(4.0), rule.init(("a", "b")), []
    for _ in range(steps):
        p = np.exp(theta - theta.max())
        p /= p.sum()
        J = {c: float(p @ r) for c, r in CONCAVE.items()}
        found.append(tuple(J.values()))
        state = rule.update(state, J) if isinstance(rule, Measuring) else state
        A = rule.combine({c: Estimate(r - J[c]) for c, r in CONCAVE.items()}, state).advantages
        theta = theta + lr * p * (A - p @ A)
    return dict(zip(("a", "b"), np.mean(found[steps // 2:], axis=0).tolist(), strict=True))


@pytest.mark.parametrize("form", ["tchebycheff", "smooth_tchebycheff", "achievement"])
def test_scalarisations_balance_what_weighted_sums_do_not(form: Any) -> None:
    """Weights 1 and an ideal of 1 for both ask for equal objectives."""
    balanced = mean_after(Scalarization(form=form, ideal={"a": 1.0, "b": 1.0}, mu=0.02))
    assert abs(balanced["a"] - balanced["b"]) < 0.1
    summed = mean_after(WeightedSum())
    assert abs(summed["a"] - summed["b"]) > 0.8, "a weighted sum goes to an end of the front"
