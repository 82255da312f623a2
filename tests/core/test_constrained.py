"""Costs beside a reward: limits, measured means, and the mixture of normalised advantages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
from frameworks import FRAMEWORKS, in_float64
from posttrain.constrained import Bound, costs_of, limits_of, mixed, reward_weight
from posttrain.data import Array, Estimate, to_numpy


@dataclass(frozen=True)
class Plain:
    """A state without a say on the reward."""

    multipliers: Mapping[str, float]
    status: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Switched:
    """A state that leaves the reward out."""

    multipliers: Mapping[str, float]
    status: Mapping[str, str] = field(default_factory=dict)
    reward_weight: float = 0.0


LENGTH = {"length": Bound(at_most=40.0)}
A_R = np.array([1.0, -1.0, 2.0, -2.0, 0.5])
A_C = np.array([30.0, 10.0, -20.0, -20.0, 0.0])


def standardised(A: np.ndarray) -> np.ndarray:
    return np.asarray((A - A.mean()) / A.std(ddof=1))


def test_what_is_at_least_is_negated() -> None:
    bounds = {**LENGTH, "politeness": Bound(at_least=0.5)}
    assert limits_of(bounds) == {"length": 40.0, "politeness": -0.5}
    measured = {"length": 50.0, "politeness": 0.3, "accuracy": 1.0}
    assert costs_of(measured, bounds) == {"length": 50.0, "politeness": -0.3}
    assert costs_of({"length": 50.0}, bounds) == {"length": 50.0}
    assert limits_of({"a": Bound(at_most=0.0), "b": Bound(at_least=-2.0)}) == {"a": 0.0, "b": 2.0}


@pytest.mark.parametrize("bound", [{}, {"at_most": 1.0, "at_least": 0.0}])
def test_a_bound_has_one_side(bound: Mapping[str, float]) -> None:
    with pytest.raises(ValueError, match="either at_most or at_least"):
        Bound(**bound)


@pytest.mark.parametrize(("sign", "bounds"), [(1.0, LENGTH), (-1.0, {"length": Bound(at_least=40.0)})])
def test_mixes_columns_of_unit_variance(sign: float, bounds: Mapping[str, Bound]) -> None:
    found = mixed(Estimate(A_R), {"length": Estimate(A_C)}, bounds, Plain({"length": 0.5}))
    expected = (standardised(A_R) - 0.5 * sign * standardised(A_C)) / 1.5
    assert found.advantages == pytest.approx(expected, rel=1e-6)
    assert found.metrics.values_by_name() == {"constraint/length/share": pytest.approx(1 / 3)}


def test_units_of_columns_do_not_matter() -> None:
    one = mixed(Estimate(A_R), {"length": Estimate(A_C)}, LENGTH, Plain({"length": 2.0}))
    two = mixed(Estimate(A_R * 100), {"length": Estimate(A_C * 0.01)}, LENGTH, Plain({"length": 2.0}))
    assert two.advantages == pytest.approx(one.advantages, rel=1e-5)


def test_the_step_stays_bounded_as_multipliers_grow() -> None:
    huge = mixed(Estimate(A_R), {"length": Estimate(A_C)}, LENGTH, Plain({"length": 1e9}))
    assert huge.advantages == pytest.approx(-standardised(A_C), abs=1e-6)


def test_a_state_may_leave_the_reward_out() -> None:
    state = Switched({"length": 1.0})
    assert (reward_weight(state), reward_weight(Plain({}))) == (0.0, 1.0)
    found = mixed(Estimate(A_R), {"length": Estimate(A_C)}, LENGTH, state)
    assert found.advantages == pytest.approx(-standardised(A_C), rel=1e-6)


@pytest.mark.parametrize("still", [np.zeros(5), np.full(5, 0.1), np.full(5, 1e6)], ids=["0", "0.1", "1e6"])
def test_a_cost_without_variance_adds_nothing(still: np.ndarray) -> None:
    found = mixed(Estimate(A_R), {"length": Estimate(still)}, LENGTH, Plain({"length": 1.0}))
    assert found.advantages == pytest.approx(standardised(A_R) / 2, rel=1e-6)


def test_columns_are_normalised_over_what_they_keep() -> None:
    keep = np.array([True, True, True, False, False])
    rubbish = np.where(keep, A_C, 1e6)
    found = mixed(Estimate(A_R), {"length": Estimate(rubbish, keep=keep)}, LENGTH, Plain({"length": 1.0}))
    expected = standardised(A_R)
    expected[:3] -= standardised(A_C[:3])
    assert found.advantages == pytest.approx(expected / 2, rel=1e-6)
    assert to_numpy(found.keep).all()


def test_an_action_is_out_where_every_column_is_without_it() -> None:
    keep = np.array([True, True, True, True, False])
    found = mixed(Estimate(A_R, keep=keep), {"length": Estimate(A_C, keep=keep)}, LENGTH, Plain({"length": 1.0}))
    assert to_numpy(found.keep).tolist() == keep.tolist()
    assert found.advantages[4] == 0.0


def test_a_column_without_weight_keeps_nothing() -> None:
    """An idle cost must not count the actions that only it knows."""
    keep = np.array([True, True, True, True, False])
    reward, cost = Estimate(A_R, keep=keep), Estimate(A_C)
    assert to_numpy(mixed(reward, {"length": cost}, LENGTH, Plain({"length": 0.0})).keep).tolist() == keep.tolist()
    assert to_numpy(mixed(reward, {"length": cost}, LENGTH, Plain({"length": 0.1})).keep).all()


def test_several_costs_in_any_order() -> None:
    bounds = {**LENGTH, "rate": Bound(at_most=0.02)}
    costs = {"length": Estimate(A_C), "rate": Estimate(np.array([0.0, 1.0, 0.0, 0.0, 1.0]))}
    state = Plain({"length": 0.5, "rate": 1.5})
    found = mixed(Estimate(A_R), costs, bounds, state)
    expected = (standardised(A_R) - 0.5 * standardised(A_C) - 1.5 * standardised(costs["rate"].advantages)) / 3.0
    assert found.advantages == pytest.approx(expected, rel=1e-6)
    assert mixed(Estimate(A_R), dict(reversed(costs.items())), bounds, state).advantages.tolist() == \
        found.advantages.tolist()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_equal_in_every_framework(framework: str) -> None:
    with in_float64(framework):
        make = FRAMEWORKS[framework]
        def estimates(array: Array) -> tuple[Estimate, dict[str, Estimate]]:
            return Estimate(array(A_R)), {"length": Estimate(array(A_C))}
        expected = mixed(*estimates(np.asarray), LENGTH, Plain({"length": 0.5}))
        found = mixed(*estimates(make), LENGTH, Plain({"length": 0.5}))
        assert to_numpy(found.advantages) == pytest.approx(expected.advantages, rel=1e-12)
