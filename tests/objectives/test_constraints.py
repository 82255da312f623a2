"""Constraint methods: published rules step by step, what is held, what each cost's status says, and closed loops with
default gains on linear programmes whose optimum is known."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from posttrain.errors import ConfigError
from posttrain_objectives.constraints import (
    CRPO,
    P3O,
    AugmentedLagrangian,
    Lagrangian,
    LogLagrangian,
    PIDLagrangian,
)
from posttrain_objectives.multipliers import PATIENCE, TOLERANCE
from scipy.optimize import linprog

METHODS = (Lagrangian(), LogLagrangian(), PIDLagrangian(), AugmentedLagrangian(), CRPO(), P3O())
SETTLING = (PIDLagrangian(), AugmentedLagrangian())
CIRCLING = (Lagrangian(), LogLagrangian(), CRPO(), P3O())
REMEMBERING = (Lagrangian(), LogLagrangian(), PIDLagrangian(), AugmentedLagrangian())
NAMES = {"lagrangian": Lagrangian(), "log_lagrangian": LogLagrangian(), "pid_lagrangian": PIDLagrangian(),
         "augmented_lagrangian": AugmentedLagrangian(), "crpo": CRPO(), "p3o": P3O()}
PAGE = Path(__file__).parents[2] / "docs" / "constraints.md"


# ---- closed loops


@dataclass(frozen=True)
class Bandit:
    """max E[r] subject to E[c] <= d over distributions of one action: a linear programme."""

    reward: tuple[float, ...]
    costs: Mapping[str, tuple[float, ...]]
    limits: Mapping[str, float]

    def optimum(self) -> tuple[float, np.ndarray]:
        """J* and the multipliers of limits."""
        n = len(self.reward)
        solved = linprog(-np.array(self.reward), A_ub=np.array(list(self.costs.values())),
                         b_ub=list(self.limits.values()), A_eq=np.ones((1, n)), b_eq=[1.0])
        return -solved.fun, -solved.ineqlin.marginals


ONE = Bandit((1.0, 0.8, 0.5, 0.2), {"cost": (1.0, 0.6, 0.2, 0.0)}, {"cost": 0.4})
TWO = Bandit((1.0, 0.9, 0.6, 0.5, 0.1), {"length": (100.0, 60.0, 40.0, 15.0, 5.0),
                                         "rate": (0.01, 0.05, 0.03, 0.01, 0.0)}, {"length": 40.0, "rate": 0.02})
SMALL = Bandit((1.0, 0.9, 0.2), {"rate": (1.0, 0.0, 0.0)}, {"rate": 0.02})
"""Begins at v = 16."""


@dataclass(frozen=True)
class Trace:
    """What was measured at each step: J [T], v [T, costs] relative to the limits, lambda [T, costs], and the end."""

    J: np.ndarray
    v: np.ndarray
    multipliers: np.ndarray
    state: Any

    def tail(self, column: np.ndarray) -> np.ndarray:
        return np.asarray(column[len(column) // 2:].mean(axis=0))


def trained(method: Any, bandit: Bandit, steps: int, lr: float, normalised: bool = True) -> Trace:
    """Exact policy gradient of a softmax policy on (w A_R - sum lambda_i A_i) / (w + sum lambda_i), from uniform.

    `normalised` as the loop does it, each advantage with variance 1 under the policy; otherwise lambda is that of the
    programme itself. In plain Python: arrays of five numbers cost more than they save.
    """
    columns, names = [bandit.reward, *bandit.costs.values()], list(bandit.costs)
    limits, state, theta = list(bandit.limits.values()), method.init(bandit.limits), [0.0] * len(bandit.reward)
    J, v, lambdas = [], [], []
    for _ in range(steps):
        p = softmax(theta)
        means = [sum(x * q for x, q in zip(column, p)) for column in columns]
        state = method.update(state, dict(zip(names, means[1:])))
        lam = list(state.multipliers.values())
        total = state.reward_weight + sum(lam)
        weights = [state.reward_weight / total, *(-x / total for x in lam)]
        if normalised:
            weights = [w / math.sqrt(sum(q * (x - mean) ** 2 for x, q in zip(column, p)) + 1e-8)
                       for w, column, mean in zip(weights, columns, means)]
        advantage = [sum(w * (column[a] - mean) for w, column, mean in zip(weights, columns, means))
                     for a in range(len(p))]
        theta = [t + lr * q * A for t, q, A in zip(theta, p, advantage)]
        J.append(means[0])
        v.append([(mean - d) / d for mean, d in zip(means[1:], limits)])
        lambdas.append(lam)
    return Trace(np.array(J), np.array(v), np.array(lambdas), state)


def softmax(theta: Sequence[float]) -> list[float]:
    top = max(theta)
    e = [math.exp(t - top) for t in theta]
    return [x / sum(e) for x in e]


def test_both_programmes_are_what_they_are_said_to_be() -> None:
    J, multipliers = ONE.optimum()
    assert (J, multipliers[0]) == (pytest.approx(0.65), pytest.approx(0.75))
    best, multipliers = TWO.optimum()
    assert best == pytest.approx(0.680882, abs=1e-6)
    assert (multipliers > 0).all(), "both limits are active"


@pytest.mark.parametrize("method", SETTLING, ids=str)
def test_last_iterate_reaches_the_optimum_and_its_multiplier(method: Any) -> None:
    trace = trained(method, ONE, 8000, lr=0.5, normalised=False)
    assert abs(trace.J[-1] - 0.65) < 2e-3
    assert abs(trace.v[-1, 0]) * 0.4 < 2e-3
    assert abs(trace.multipliers[-1, 0] - 0.75) < 5e-3
    assert trace.state.status == {"cost": "feasible"}


@pytest.mark.parametrize("method", SETTLING, ids=str)
@pytest.mark.parametrize("bandit", [ONE, TWO], ids=["one", "two"])
def test_last_iterate_reaches_the_optimum_in_the_units_of_the_loop(method: Any, bandit: Bandit) -> None:
    trace = trained(method, bandit, 4000, lr=0.5)
    assert abs(trace.J[-1] - bandit.optimum()[0]) < 0.02
    assert (trace.v[-1] < 0.01).all()
    assert set(trace.state.status.values()) == {"feasible"}


@pytest.mark.parametrize("method", SETTLING, ids=str)
def test_a_small_limit_is_reached_without_windup(method: Any) -> None:
    """Soon, and with a reward near the best on the way; wound up, the rate stays at 0 for more than 1500 rollouts."""
    trace = trained(method, SMALL, 500, lr=0.5)
    assert abs(trace.v[-1, 0]) < 0.01
    assert abs(trace.J[-1] - SMALL.optimum()[0]) < 1e-3
    assert trace.multipliers.max() < 5


@pytest.mark.parametrize("method", CIRCLING, ids=str)
@pytest.mark.parametrize(("bandit", "lr", "steps"), [(ONE, 0.5, 8000), (TWO, 0.1, 20_000)], ids=["one", "two"])
def test_averages_reach_the_optimum(method: Any, bandit: Bandit, lr: float, steps: int) -> None:
    trace = trained(method, bandit, steps, lr, normalised=bandit is TWO)
    assert abs(trace.tail(trace.J) - bandit.optimum()[0]) < 0.02
    assert (trace.tail(trace.v) < 0.01).all()


@pytest.mark.parametrize(("lr", "updates"), [(0.5, 100), (0.1, 600), (0.02, 1200)])
def test_pid_settles_whether_the_policy_answers_quickly_or_slowly(lr: float, updates: int) -> None:
    """Within 2 % of both limits from then on, with the default gains."""
    assert (np.abs(trained(PIDLagrangian(), TWO, 2 * updates, lr).v[updates:]) < 0.02).all()


def test_dual_ascent_circles_and_pid_does_not() -> None:
    """The reason for the proportional term (Stooke et al. 2020, section 4)."""
    spread = {type(method): np.ptp(trained(method, ONE, 4000, lr=0.5).v[-1000:]) for method in
              (Lagrangian(), PIDLagrangian())}
    assert spread[Lagrangian] > 0.5
    assert spread[PIDLagrangian] < 1e-3


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_impossible_limits_are_reported_at_the_cap(method: Any) -> None:
    cap = {CRPO: 1.0, P3O: 5.0}.get(type(method), 10.0)
    impossible = Bandit(ONE.reward, {"cost": (1.0, 0.6, 0.2, 0.1)}, {"cost": 0.05})
    trace = trained(method, impossible, 1500, lr=0.5)
    assert trace.state.status == {"cost": "infeasible"}
    assert trace.multipliers[-1, 0] == pytest.approx(cap)
    assert trace.v[-1, 0] * 0.05 + 0.05 == pytest.approx(0.1, abs=0.03), "the cost is as low as it can be"


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_inactive_limits_change_nothing(method: Any) -> None:
    trace = trained(method, Bandit(ONE.reward, ONE.costs, {"cost": 1.2}), 1500, lr=0.5)
    assert trace.J[-1] > 0.98
    assert trace.multipliers[-1, 0] == (pytest.approx(0.01) if isinstance(method, LogLagrangian) else 0.0)
    assert trace.state.status == {"cost": "feasible"}


def test_an_exact_penalty_below_the_multiplier_leaves_the_limit_broken() -> None:
    strong = trained(P3O(kappa=2.0), ONE, 4000, lr=0.5, normalised=False)
    assert strong.tail(strong.v) < 0.02
    weak = trained(P3O(kappa=0.5), ONE, 4000, lr=0.5, normalised=False)
    assert (weak.J[-1], weak.v[-1, 0] * 0.4 + 0.4) == (pytest.approx(0.9, abs=0.11), pytest.approx(0.8, abs=0.21))
    assert weak.state.status == {"cost": "infeasible"}


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_the_numbers_of_its_table(name: str) -> None:
    """One set-up for all methods, the one that the page states; each number is right to its last digit."""
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{name}` |") and " % |" in line]
    assert len(rows) == 1
    said = re.findall(r"-?\d+(?:\.\d+)?", rows[0].removeprefix(f"| `{name}` |"))
    found = []
    for bandit in (ONE, TWO):
        trace = trained(NAMES[name], bandit, 10_000, lr=0.1)
        v = 100 * trace.v[5_000:]
        found += [v.mean(axis=0).max(), v.min(), v.max(), trace.tail(trace.J) - bandit.optimum()[0]]
    for text, number in zip(said, found, strict=True):
        assert float(text) == pytest.approx(number, abs=0.51 * 10.0 ** -len(text.partition(".")[2])), (said, found)


def test_noise_of_measurement_averages_out() -> None:
    """20 % noise of both costs; averages as without it."""
    class Noisy:
        rng = np.random.default_rng(0)
        init = PIDLagrangian().init

        def update(self, state: Any, costs: Mapping[str, float]) -> Any:
            return PIDLagrangian().update(state, {c: x * (1 + 0.2 * self.rng.normal()) for c, x in costs.items()})

    trace = trained(Noisy(), TWO, 6000, lr=0.1)
    assert abs(trace.tail(trace.J) - TWO.optimum()[0]) < 0.02
    assert (trace.tail(trace.v) < 0.01).all()


# ---- the rules, step by step


def after(method: Any, costs: Sequence[float], limit: float = 40.0) -> list[Any]:
    states = [method.init({"length": limit})]
    for cost in costs:
        states.append(method.update(states[-1], {"length": cost}))
    return states[1:]


COSTS = np.random.default_rng(0).uniform(10.0, 90.0, size=60)
V = COSTS / 40.0 - 1.0
WITHIN = np.clip(V, -1.0, 1.0)
"""What rules that remember v count; some of V is more."""


def multipliers(method: Any) -> list[float]:
    return [state.multipliers["length"] for state in after(method, COSTS)]


def test_dual_ascent_is_the_rule() -> None:
    lam, expected = 0.0, []
    for v in WITHIN:
        lam = max(0.0, lam + 0.05 * v)
        expected.append(lam)
    assert multipliers(Lagrangian()) == pytest.approx(expected, rel=1e-12)
    assert multipliers(PIDLagrangian(kp=0.0, ki=0.05, kd=0.0)) == pytest.approx(expected, rel=1e-12)


def test_log_space_is_the_rule() -> None:
    lam, expected = 0.1, []
    for v in WITHIN:
        lam = min(max(lam * math.exp(0.1 * v), 0.01), 10.0)
        expected.append(lam)
    assert multipliers(LogLagrangian()) == pytest.approx(expected, rel=1e-12)


def test_pid_is_the_rule() -> None:
    """Stooke et al. 2020, algorithm 2, with the running mean of P and D."""
    mean, integral, expected = WITHIN[0], 0.0, []
    for v in WITHIN:
        before, mean = mean, 0.5 * mean + 0.5 * v
        integral = max(0.0, integral + 0.1 * v)
        expected.append(max(0.0, 2.0 * mean + integral + 0.5 * max(0.0, mean - before)))
    assert multipliers(PIDLagrangian()) == pytest.approx(expected, rel=1e-12)


def test_augmented_lagrangian_is_the_rule() -> None:
    lam, rho, expected = 0.0, 2.0, []
    for i, v in enumerate(WITHIN, 1):
        expected.append(max(0.0, lam + rho * v))
        if i % 10 == 0:
            mean = sum(WITHIN[i - 10:i]) / 10
            lam, rho = max(0.0, lam + rho * mean), min(4.0, rho * 1.5) if mean > 0 else rho
    assert multipliers(AugmentedLagrangian(growth=1.5, rho_max=4.0)) == pytest.approx(expected, rel=1e-12)


def test_crpo_leaves_the_reward_out_while_a_limit_is_broken() -> None:
    method = CRPO(tol=0.1)
    state = method.init({"length": 40.0, "rate": 0.02})
    for costs, weight, chosen in (({"length": 43.0, "rate": 0.02}, 1.0, (0.0, 0.0)),
                                  ({"length": 45.0, "rate": 0.02}, 0.0, (1.0, 0.0)),
                                  ({"length": 45.0, "rate": 0.03}, 0.0, (1.0, 1.0)),
                                  ({"length": 39.0, "rate": 0.01}, 1.0, (0.0, 0.0))):
        state = method.update(state, costs)
        assert (state.reward_weight, tuple(state.multipliers.values())) == (weight, chosen)


def test_exact_penalty_is_all_or_nothing() -> None:
    assert multipliers(P3O(kappa=3.0)) == [3.0 if v > 0 else 0.0 for v in V]


@pytest.mark.parametrize("method", REMEMBERING, ids=str)
def test_a_small_limit_that_was_broken_many_times_over_is_let_go_of_soon(method: Any) -> None:
    """A rate of 0.5 under a limit of 0.02 has v = 24, and a rate of 0 no less than -1: nothing may wind up."""
    states = after(method, [0.5] * 5 + [0.0] * 5, limit=0.02)
    assert states[4].violations["length"] == pytest.approx(24.0), "what is reported is v as it was measured"
    assert states[4].multipliers["length"] == after(method, [0.04] * 5, limit=0.02)[-1].multipliers["length"]
    assert states[-1].multipliers["length"] < 0.101


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(("limit", "cost"), [(1e-300, 1e10), (-1e-300, 1e10), (-8e307, 1.7e308)])
def test_a_violation_beyond_all_numbers_leaves_no_trace_for_ever(method: Any, limit: float, cost: float) -> None:
    states = after(method, [cost] + [limit - abs(limit)] * 200, limit=limit)
    assert all(math.isfinite(x) for s in states for x in (s.multipliers["length"], s.violations["length"]))
    assert states[-1].multipliers["length"] < 0.101
    assert states[-1].status == {"length": "feasible"}


# ---- what is held, and units


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("missing", [{}, {"length": math.nan}, {"length": math.inf}], ids=str)
def test_a_rollout_without_cost_signal_holds_the_state(method: Any, missing: Mapping[str, float]) -> None:
    state = after(method, [60.0, 70.0])[-1]
    assert method.update(state, missing) == state


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_one_missing_cost_does_not_hold_the_others(method: Any) -> None:
    state = method.update(method.init({"a": 1.0, "b": 1.0}), {"a": 2.0, "b": 2.0})
    onward = method.update(state, {"a": 0.1})
    assert onward.multipliers["b"] == state.multipliers["b"]
    assert onward.multipliers["a"] < state.multipliers["a"]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_units_of_a_cost_do_not_matter(method: Any) -> None:
    small = after(method, COSTS * 5e-4, limit=0.02)
    assert [s.multipliers["length"] for s in small] == pytest.approx(multipliers(method), rel=1e-9)


def test_a_limit_from_below_is_one_of_the_negated_cost() -> None:
    """Limits are negative then: |d| is their size."""
    state = (method := Lagrangian()).init({"politeness": -0.5})
    assert method.update(state, {"politeness": -0.25}).multipliers["politeness"] == pytest.approx(0.025)
    assert method.update(state, {"politeness": -0.75}).multipliers["politeness"] == 0.0


def test_a_scale_is_the_unit_of_a_violation() -> None:
    state = (method := Lagrangian(scale={"toxicity": 0.1})).init({"toxicity": 0.0})
    assert method.update(state, {"toxicity": 0.08}).multipliers["toxicity"] == pytest.approx(0.04)


@pytest.mark.parametrize(("method", "limits", "message"), [
    (Lagrangian(), {"toxicity": 0.0}, "limit of 'toxicity' is 0.*constraint.scale.toxicity: 1.0"),
    (Lagrangian(scale={"lenght": 1.0}), {"length": 40.0}, "constraint.scale.lenght is no cost.*did you mean 'length'"),
    (P3O(scale={"length": -1.0}), {"length": 40.0}, "constraint.scale.length must be finite and positive"),
    (CRPO(), {"length": math.nan}, "limit of 'length' must be finite"),
])
def test_limits_that_cannot_be_kept_track_of_are_refused(method: Any, limits: Mapping[str, float],
                                                         message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method.init(limits)


def test_an_unknown_cost_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="cost 'lenght' has no limit; did you mean 'length'"):
        Lagrangian().update(Lagrangian().init({"length": 40.0}), {"lenght": 1.0})


@pytest.mark.parametrize(("kind", "fields", "message"), [
    (Lagrangian, {"eta": 0.0}, "eta must be finite and positive"),
    (LogLagrangian, {"lambda_init": 20.0}, "lambda_init must lie in"),
    (PIDLagrangian, {"kp": -1.0}, "kp must be finite and not negative"),
    (PIDLagrangian, {"ema": 1.0}, "ema must lie in"),
    (AugmentedLagrangian, {"every": 0}, "every must be at least 1"),
    (AugmentedLagrangian, {"growth": 0.5}, "growth must be finite and at least 1"),
    (AugmentedLagrangian, {"rho": 20.0}, "rho must be at most rho_max"),
    (CRPO, {"tol": math.nan}, "tol must be finite and not negative"),
    (P3O, {"kappa": 0.0}, "kappa must be finite and positive"),
])
def test_fields_out_of_range_are_refused(kind: Any, fields: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**fields)


# ---- status


def test_one_rollout_at_the_cap_is_no_infeasible_constraint() -> None:
    states = after(P3O(), [400.0] * (PATIENCE + 1))
    said = [state.status["length"] for state in states]
    assert said == ["converging"] * (PATIENCE - 1) + ["infeasible"] * 2


def test_status_follows_the_running_mean() -> None:
    """A noisy cost whose mean is within its limit is kept, although single rollouts are over it."""
    rng = np.random.default_rng(0)
    assert {s.status["length"] for s in after(PIDLagrangian(), 38.0 * (1 + 0.1 * rng.normal(size=200)))[50:]} == \
        {"feasible"}
    assert {s.status["length"] for s in after(PIDLagrangian(), 44.0 * (1 + 0.1 * rng.normal(size=40)))[20:]} == \
        {"converging"}


@pytest.mark.parametrize("method", [CRPO(), P3O(), PIDLagrangian(lambda_max=1.0)], ids=str)
def test_a_cost_that_falls_is_not_infeasible(method: Any) -> None:
    """Some methods are at their cap whenever the limit is broken: from 120 to 40 by 1 a rollout, then held at 60."""
    falling = [state.status["length"] for state in after(method, np.arange(120.0, 39.0, -1.0))]
    assert "infeasible" not in falling
    assert after(method, [*np.arange(120.0, 60.0, -1.0), *[60.0] * 80])[-1].status == {"length": "infeasible"}


def test_a_cost_that_is_noise_about_too_much_is_infeasible() -> None:
    """Lows of noise are no lasting fall: they come seldom, and say `converging` for `PATIENCE` updates at most."""
    rng = np.random.default_rng(0)
    said = [s.status["length"] for s in after(P3O(), 100.0 * (1 + 0.1 * rng.normal(size=600)))]
    assert np.mean([status == "infeasible" for status in said[60:]]) > 0.9


def test_status_counts_within_the_tolerance_as_kept() -> None:
    """Also one that is larger than the status has anyway."""
    assert after(CRPO(tol=0.15), [44.0])[-1].status == {"length": "feasible"}
    assert after(CRPO(tol=0.05), [44.0])[-1].status == {"length": "converging"}
    assert after(CRPO(tol=0.0), [40.0 * (1 + TOLERANCE / 2)])[-1].status == {"length": "feasible"}
