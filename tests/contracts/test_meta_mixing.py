"""Deliberately wrong constraints and combiners, one bug each, and the contract test that must catch it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import pytest
from contracts.test_mixing import TestDualAscent as DualAscentContract
from contracts.test_mixing import TestLaggardFirst as LaggardContract
from contracts.test_mixing import TestMean as MeanContract
from contracts.test_mixing import TestMinNorm as MinNormContract
from contracts.test_mixing import TestStandardisedSum as StandardisedContract
from contracts.test_mixing import TestWeightedSum as WeightedContract
from contracts.toys_mixing import (
    DualAscent,
    LaggardFirst,
    Mean,
    Means,
    MinNorm,
    Multipliers,
    Slots,
    StandardisedSum,
    WeightedSum,
    Weights,
    kept_part,
    moved,
    started,
    violations,
)
from posttrain.data import Estimate, to_numpy
from posttrain.testing import ComponentContract, failures

# ---- constraints


@final
@dataclass(frozen=True)
class NeverUpdated:
    """The multiplier is made and never updated (PKU-Alignment/SafeVLA, issue 24)."""

    def init(self, limits: Mapping[str, float]) -> Multipliers:
        return started(limits)

    def update(self, state: Multipliers, costs: Mapping[str, float]) -> Multipliers:
        return moved(state, {}, violations(state, costs))


@final
@dataclass(frozen=True)
class OnlyRises:
    """A multiplier that never falls: the constraint is never forgiven."""

    def init(self, limits: Mapping[str, float]) -> Multipliers:
        return started(limits)

    def update(self, state: Multipliers, costs: Mapping[str, float]) -> Multipliers:
        over = violations(state, costs)
        return moved(state, {n: state.multipliers[n] + max(0.0, 0.1 * by) for n, by in over.items()}, over)


@final
@dataclass(frozen=True)
class NotProjected:
    """Dual ascent without the projection: a kept constraint is rewarded for being broken."""

    def init(self, limits: Mapping[str, float]) -> Multipliers:
        return started(limits)

    def update(self, state: Multipliers, costs: Mapping[str, float]) -> Multipliers:
        over = violations(state, costs)
        return moved(state, {n: state.multipliers[n] + 0.1 * by for n, by in over.items()}, over)


@final
@dataclass(frozen=True)
class ByPosition:
    """Costs are taken in the order in which they come, not by name."""

    def init(self, limits: Mapping[str, float]) -> Multipliers:
        return started(limits)

    def update(self, state: Multipliers, costs: Mapping[str, float]) -> Multipliers:
        violations(state, costs)
        over = {n: (cost - state.limits[n]) / state.limits[n] for n, cost in zip(state.limits, costs.values())}
        return moved(state, {n: max(0.0, state.multipliers[n] + 0.1 * by) for n, by in over.items()}, over)


@final
@dataclass(frozen=True)
class UnknownIgnored:
    """A misspelled cost is passed over in silence."""

    def init(self, limits: Mapping[str, float]) -> Multipliers:
        return started(limits)

    def update(self, state: Multipliers, costs: Mapping[str, float]) -> Multipliers:
        over = violations(state, {n: cost for n, cost in costs.items() if n in state.limits})
        return moved(state, {n: max(0.0, state.multipliers[n] + 0.1 * by) for n, by in over.items()}, over)


@final
@dataclass(frozen=True)
class Poisoned:
    """One NaN makes the multiplier NaN for the rest of the run."""

    def init(self, limits: Mapping[str, float]) -> Multipliers:
        return started(limits)

    def update(self, state: Multipliers, costs: Mapping[str, float]) -> Multipliers:
        violations(state, dict.fromkeys(costs, 1.0))
        over = {n: (cost - state.limits[n]) / state.limits[n] for n, cost in costs.items()}
        rates = {n: state.multipliers[n] + 0.1 * by for n, by in over.items()}
        return moved(state, {n: 0.0 if x < 0 else x for n, x in rates.items()}, over)


@final
@dataclass
class Momentum:
    """State of `SpeedLost`."""

    limits: Mapping[str, float]
    multipliers: Mapping[str, float]
    status: Mapping[str, str]

    def __post_init__(self) -> None:
        self.speed = dict.fromkeys(self.limits, 0.0)


@final
@dataclass(frozen=True)
class SpeedLost:
    """Part of the state is no field of it, so a checkpoint loses it (verl, issue 2653)."""

    def init(self, limits: Mapping[str, float]) -> Momentum:
        plain = started(limits)
        return Momentum(plain.limits, plain.multipliers, plain.status)

    def update(self, state: Momentum, costs: Mapping[str, float]) -> Momentum:
        over = violations(Multipliers(state.limits, state.multipliers, state.status), costs)
        speed = {n: 0.5 * state.speed[n] + 0.1 * by for n, by in over.items()}
        after = replace(state, multipliers={n: max(0.0, state.multipliers[n] + speed[n]) for n in over})
        after.speed = speed
        return after


@final
@dataclass(frozen=True)
class InPlace:
    """The state it is given is changed: a step that is redone is counted twice."""

    def init(self, limits: Mapping[str, float]) -> Multipliers:
        return started(limits)

    def update(self, state: Multipliers, costs: Mapping[str, float]) -> Multipliers:
        for n, by in violations(state, costs).items():
            state.multipliers[n] = max(0.0, state.multipliers[n] + 0.1 * by)  # type: ignore[index]  # the bug
        return replace(state, multipliers=dict(state.multipliers))


@final
@dataclass(frozen=True)
class ForgetsUnmeasured:
    """A cost without a measurement counts as kept: its multiplier falls to 0."""

    def init(self, limits: Mapping[str, float]) -> Multipliers:
        return started(limits)

    def update(self, state: Multipliers, costs: Mapping[str, float]) -> Multipliers:
        over = violations(state, costs)
        return moved(state, {n: max(0.0, state.multipliers[n] + 0.1 * over[n]) if n in over else 0.0
                             for n in state.limits}, over)


@final
@dataclass(frozen=True)
class Switch:
    """State of `NothingLeft`."""

    limits: Mapping[str, float]
    multipliers: Mapping[str, float]
    status: Mapping[str, str]
    reward_weight: float = 1.0


@final
@dataclass(frozen=True)
class NothingLeft:
    """The reward is left out while a limit is broken, although no multiplier is raised yet."""

    def init(self, limits: Mapping[str, float]) -> Switch:
        plain = started(limits)
        return Switch(plain.limits, plain.multipliers, plain.status)

    def update(self, state: Switch, costs: Mapping[str, float]) -> Switch:
        over = violations(Multipliers(state.limits, state.multipliers, state.status), costs)
        return replace(state, reward_weight=float(all(by <= 0 for by in over.values())))


# ---- combiners of advantages


class _Columns:
    """What the wrong sums have in common with the right one."""

    __slots__ = ()

    def init(self, columns: Sequence[str]) -> Weights:
        return Weights(dict.fromkeys(columns, 1.0))


@final
@dataclass(frozen=True)
class WeightsByPosition(_Columns):
    """Weights go by the place of a column in the call."""

    weights: tuple[float, ...] = (1.0, 2.0, 3.0)
    """One per column."""

    def combine(self, estimates: Mapping[str, Estimate], state: Weights) -> Estimate:
        return Estimate(sum(w * kept_part(e) for w, e in zip(self.weights, estimates.values())))


@final
@dataclass(frozen=True)
class LeaksDropped(_Columns):
    """What stands at dropped actions is added up with the rest (ROLL, pull 447)."""

    def combine(self, estimates: Mapping[str, Estimate], state: Weights) -> Estimate:
        return Estimate(sum(e.advantages for _, e in sorted(estimates.items())))


@final
@dataclass(frozen=True)
class DividesByDeviation(_Columns):
    """A column in which all agree is divided by its deviation of 0 (RL2, weakness 16)."""

    def combine(self, estimates: Mapping[str, Estimate], state: Weights) -> Estimate:
        total = 0.0
        for _, e in sorted(estimates.items()):
            A, n = kept_part(e), len(e.advantages) if e.keep is None else int(to_numpy(e.keep).sum())
            total = total + A / ((A * A).sum() / n) ** 0.5
        return Estimate(total)


@final
@dataclass(frozen=True)
class BringsBack(_Columns):
    """Every action is kept, also those that no column keeps."""

    def combine(self, estimates: Mapping[str, Estimate], state: Weights) -> Estimate:
        total = sum(kept_part(e) for _, e in sorted(estimates.items()))
        return Estimate(total, keep=np.ones(len(total), bool))


@final
@dataclass(frozen=True)
class Accumulates(_Columns):
    """The first column's array is the sum's: it is changed."""

    def combine(self, estimates: Mapping[str, Estimate], state: Weights) -> Estimate:
        first, *others = [e for _, e in sorted(estimates.items())]
        total = first.advantages
        for e in others:
            total += kept_part(e)
        return Estimate(total)


@final
@dataclass(frozen=True)
class MeanOfColumns(_Columns):
    """Halves a single column, by dividing by one more than there are columns."""

    def combine(self, estimates: Mapping[str, Estimate], state: Weights) -> Estimate:
        return Estimate(sum(kept_part(e) for _, e in sorted(estimates.items())) / (len(estimates) + 1))


@final
@dataclass(frozen=True)
class NumpyOnly(_Columns):
    """Every framework's arrays become NumPy's."""

    def combine(self, estimates: Mapping[str, Estimate], state: Weights) -> Estimate:
        return Estimate(np.asarray(sum(to_numpy(kept_part(e)) for _, e in sorted(estimates.items()))))


@final
@dataclass(frozen=True)
class MeansPoisoned:
    """One mean of NaN stays in the state for the rest of the run."""

    def init(self, columns: Sequence[str]) -> Means:
        return LaggardFirst().init(columns)

    def update(self, state: Means, measured: Mapping[str, float]) -> Means:
        return Means({**state.means, **measured})

    def combine(self, estimates: Mapping[str, Estimate], state: Means) -> Estimate:
        return LaggardFirst().combine(estimates, state)


@final
@dataclass(frozen=True)
class MeansInPlace:
    """The state it is given is changed."""

    def init(self, columns: Sequence[str]) -> Means:
        return LaggardFirst().init(columns)

    def update(self, state: Means, measured: Mapping[str, float]) -> Means:
        state.means.update(measured)  # type: ignore[attr-defined]  # the bug
        return Means(dict(state.means))

    def combine(self, estimates: Mapping[str, Estimate], state: Means) -> Estimate:
        return LaggardFirst().combine(estimates, state)


# ---- combiners of gradients


class _Slots:
    """What the wrong mixes have in common with the right ones."""

    __slots__ = ()

    def init(self, slots: Sequence[str]) -> Slots:
        return Slots(slots)


@final
@dataclass(frozen=True)
class ClaimsTooMuch(_Slots):
    """The mean, under the claim that it is against no slot."""

    def weights(self, gramian: np.ndarray, state: Slots) -> tuple[np.ndarray, Slots]:
        return np.full(len(gramian), 1 / len(gramian)), state


@final
@dataclass(frozen=True)
class Inverts(_Slots):
    """Solves with the Gramian, which is singular where gradients are dependent or 0."""

    def weights(self, gramian: np.ndarray, state: Slots) -> tuple[np.ndarray, Slots]:
        return np.linalg.solve(gramian, np.ones(len(gramian))), state


@final
@dataclass(frozen=True)
class DividesByTrace(_Slots):
    """Scales by the size of the gradients, which may be 0."""

    def weights(self, gramian: np.ndarray, state: Slots) -> tuple[np.ndarray, Slots]:
        return np.ones(len(gramian)) / np.trace(gramian), state


@final
@dataclass(frozen=True)
class FirstWins(_Slots):
    """Only the first slot moves."""

    def weights(self, gramian: np.ndarray, state: Slots) -> tuple[np.ndarray, Slots]:
        return np.eye(len(gramian))[0], state


@final
@dataclass(frozen=True)
class NormalisesInPlace(_Slots):
    """Scales the Gramian that it is given."""

    def weights(self, gramian: np.ndarray, state: Slots) -> tuple[np.ndarray, Slots]:
        gramian /= max(float(np.trace(gramian)), 1e-30)
        return np.ones(len(gramian)), state


@final
@dataclass(frozen=True)
class DrawsFromNowhere(_Slots):
    """Random weights from NumPy's global state: no run can be repeated."""

    def weights(self, gramian: np.ndarray, state: Slots) -> tuple[np.ndarray, Slots]:
        return np.asarray(np.random.dirichlet(np.ones(len(gramian)))), state


class Claiming(MeanContract):
    common_descent = True


BROKEN: Sequence[tuple[Any, type[ComponentContract], str]] = [
    (NeverUpdated(), DualAscentContract, "test_multipliers_rise_while_a_cost_is_over_its_limit"),
    (OnlyRises(), DualAscentContract, "test_multipliers_fall_while_a_cost_is_below_its_limit"),
    (NotProjected(), DualAscentContract, "test_multipliers_stay_finite_and_not_negative"),
    (ByPosition(), DualAscentContract, "test_order_of_costs_does_not_matter"),
    (UnknownIgnored(), DualAscentContract, "test_unknown_cost_is_refused_by_name"),
    (Poisoned(), DualAscentContract, "test_a_cost_that_is_no_number_does_no_lasting_harm"),
    (SpeedLost(), DualAscentContract, "test_state_survives_a_checkpoint"),
    (InPlace(), DualAscentContract, "test_changes_nothing_it_is_given"),
    (ForgetsUnmeasured(), DualAscentContract, "test_a_cost_without_signal_holds_its_multiplier"),
    (NothingLeft(), DualAscentContract, "test_a_weight_of_the_reward_goes_with_a_multiplier"),
    (MeansPoisoned(), LaggardContract, "test_follows_what_is_measured"),
    (MeansInPlace(), LaggardContract, "test_follows_what_is_measured"),
    (WeightsByPosition(), WeightedContract, "test_order_of_columns_does_not_matter"),
    (LeaksDropped(), WeightedContract, "test_actions_that_are_out_reach_nobody"),
    (DividesByDeviation(), StandardisedContract, "test_survives_columns_without_variance"),
    (BringsBack(), WeightedContract, "test_keeps_what_columns_keep"),
    (Accumulates(), WeightedContract, "test_is_pure"),
    (MeanOfColumns(), WeightedContract, "test_a_single_column_stays_what_it_is"),
    (NumpyOnly(), WeightedContract, "test_equal_in_every_framework"),
    (StandardisedSum(), WeightedContract, "test_scale_of_a_column_is_as_claimed"),
    (ClaimsTooMuch(), Claiming, "test_goes_against_no_slot"),
    (Inverts(), MeanContract, "test_weights_are_one_finite_number_per_slot"),
    (DividesByTrace(), MeanContract, "test_weights_are_one_finite_number_per_slot"),
    (FirstWins(), MeanContract, "test_order_of_slots_does_not_matter"),
    (NormalisesInPlace(), MeanContract, "test_leaves_the_gramian_alone"),
    (DrawsFromNowhere(), MeanContract, "test_leaves_the_gramian_alone"),
]


@pytest.mark.parametrize(("component", "contract", "test"), BROKEN, ids=str)
def test_a_broken_component_is_caught(component: Any, contract: type[ComponentContract], test: str) -> None:
    assert dict(failures(contract, component, only=test)), f"{component} passes {test}"


@pytest.mark.parametrize(("component", "contract"), [
    (DualAscent(), DualAscentContract), (WeightedSum(), WeightedContract), (StandardisedSum(), StandardisedContract),
    (LaggardFirst(), LaggardContract),
    (Mean(), MeanContract), (MinNorm(), MinNormContract)], ids=str)
def test_a_correct_component_passes(component: Any, contract: type[ComponentContract]) -> None:
    assert not dict(failures(contract, component))
