"""Deliberately wrong planners and searchers, one bug each, and the contract test that must catch it."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import pytest
from contracts.test_planning import TestFirstFit as PlannerContract
from contracts.test_planning import TestRandomWalk as WalkContract
from contracts.toys_planning import Learned, RandomWalk
from posttrain.batching import FirstFit, first_fit
from posttrain.testing import ComponentContract, failures


@final
@dataclass(frozen=True)
class DropsOverlong:
    """A unit over the budget is left out in silence."""

    tokens: int = 64
    """Budget to begin with."""

    def plan(self, costs: np.ndarray, budget: int) -> list[np.ndarray]:
        return [p for p in first_fit(costs, budget) if costs[p].sum() <= budget]


@final
@dataclass(frozen=True)
class Overfull:
    """A part is closed only after it went over the budget."""

    tokens: int = 64
    """Budget to begin with."""

    def plan(self, costs: np.ndarray, budget: int) -> list[np.ndarray]:
        return [np.flatnonzero(np.cumsum(costs) // (budget + 1) == k)
                for k in np.unique(np.cumsum(costs) // (budget + 1))]


@final
@dataclass(frozen=True)
class OneEach:
    """Every unit is a part: many times the passes that are needed."""

    tokens: int = 64
    """Budget to begin with."""

    def plan(self, costs: np.ndarray, budget: int) -> list[np.ndarray]:
        return [np.array([i]) for i in range(len(costs))]


@final
@dataclass(frozen=True)
class EmptyFails:
    """No unit at all is an error (RL2: every group filtered is an IndexError)."""

    tokens: int = 64
    """Budget to begin with."""

    def plan(self, costs: np.ndarray, budget: int) -> list[np.ndarray]:
        return first_fit(costs, min(budget, budget + int(costs.max())))


@final
@dataclass(frozen=True)
class Shuffles:
    """Units are shuffled by the global generator: no run can be repeated (RL2, weakness 13, the other way round)."""

    tokens: int = 64
    """Budget to begin with."""

    def plan(self, costs: np.ndarray, budget: int) -> list[np.ndarray]:
        order = np.random.permutation(len(costs))
        return [np.sort(order[p]) for p in first_fit(costs[order], budget)]


@final
@dataclass(frozen=True)
class Sorts:
    """The costliest units first, although neighbours were to stay neighbours."""

    tokens: int = 64
    """Budget to begin with."""

    def plan(self, costs: np.ndarray, budget: int) -> list[np.ndarray]:
        order = np.argsort(-costs, kind="stable")
        return [order[p] for p in first_fit(costs[order], budget)]


@final
@dataclass(frozen=True)
class EmptyParts:
    """Parts are made up to a power of 2 with empty ones."""

    tokens: int = 64
    """Budget to begin with."""

    def plan(self, costs: np.ndarray, budget: int) -> list[np.ndarray]:
        parts = first_fit(costs, budget)
        return parts + [np.array([], int)] * (len(parts) % 2)


def drawn(learned: Learned, seed: object, low: float = 1e-6, high: float = 1e-2) -> dict[str, Any]:
    """A learning rate, log-uniformly."""
    learned.asked += 1
    return {"optimizer.lr": math.exp(random.Random(f"{seed} {learned.asked}").uniform(math.log(low), math.log(high)))}


@final
@dataclass(frozen=True)
class OutOfSpace:
    """Draws from a space that is wider than the configured one."""

    low: float = 1e-6
    """Smallest learning rate."""
    high: float = 1e-2
    """Largest learning rate."""
    learned: Learned = field(default_factory=Learned, init=False, repr=False, compare=False)

    def ask(self) -> Mapping[str, Any]:
        return drawn(self.learned, 0, self.low / 100, self.high * 100)

    def tell(self, trial: Mapping[str, Any], values: Mapping[str, float]) -> None: ...


@final
@dataclass(frozen=True)
class ArraysOfNumPy:
    """Values are NumPy's, which neither JSON nor YAML holds."""

    low: float = 1e-6
    """Smallest learning rate."""
    high: float = 1e-2
    """Largest learning rate."""
    learned: Learned = field(default_factory=Learned, init=False, repr=False, compare=False)

    def ask(self) -> Mapping[str, Any]:
        return {name: np.float32(value) for name, value in drawn(self.learned, 0).items()}

    def tell(self, trial: Mapping[str, Any], values: Mapping[str, float]) -> None: ...


@final
@dataclass(frozen=True)
class NotSeeded:
    """Draws from the global generator."""

    low: float = 1e-6
    """Smallest learning rate."""
    high: float = 1e-2
    """Largest learning rate."""

    def ask(self) -> Mapping[str, Any]:
        return drawn(Learned(), random.random())

    def tell(self, trial: Mapping[str, Any], values: Mapping[str, float]) -> None: ...


@final
@dataclass(frozen=True)
class FailedWins:
    """A trial that gave NaN is taken for the best, and the next one is a multiple of it."""

    low: float = 1e-6
    """Smallest learning rate."""
    high: float = 1e-2
    """Largest learning rate."""
    learned: Learned = field(default_factory=Learned, init=False, repr=False, compare=False)

    def ask(self) -> Mapping[str, Any]:
        return {"optimizer.lr": self.learned.lr} if self.learned.lr else drawn(self.learned, 0)

    def tell(self, trial: Mapping[str, Any], values: Mapping[str, float]) -> None:
        if not values["reward"] <= self.learned.best:
            self.learned.best, self.learned.lr = values["reward"], trial["optimizer.lr"] + values["reward"] * 0


@final
@dataclass(frozen=True)
class Stuck:
    """The same trial for ever."""

    low: float = 1e-6
    """Smallest learning rate."""
    high: float = 1e-2
    """Largest learning rate."""

    def ask(self) -> Mapping[str, Any]:
        return drawn(Learned(), 0)

    def tell(self, trial: Mapping[str, Any], values: Mapping[str, float]) -> None: ...


@final
@dataclass(frozen=True)
class OneAtATime:
    """A result must be that of the trial asked for last, the very object."""

    low: float = 1e-6
    """Smallest learning rate."""
    high: float = 1e-2
    """Largest learning rate."""
    learned: Learned = field(default_factory=Learned, init=False, repr=False, compare=False)

    def ask(self) -> Mapping[str, Any]:
        trial = drawn(self.learned, 0)
        self.learned.lr = trial["optimizer.lr"]
        return trial

    def tell(self, trial: Mapping[str, Any], values: Mapping[str, float]) -> None:
        if trial["optimizer.lr"] != self.learned.lr:
            raise ValueError("not the trial that was asked for")


BROKEN: Sequence[tuple[Any, type[ComponentContract], str]] = [
    (DropsOverlong(), PlannerContract, "test_every_unit_is_in_one_part"),
    (Overfull(), PlannerContract, "test_no_part_is_over_the_budget"),
    (OneEach(), PlannerContract, "test_parts_are_few"),
    (EmptyFails(), PlannerContract, "test_plans_awkward_batches"),
    (Shuffles(), PlannerContract, "test_is_pure"),
    (Sorts(), PlannerContract, "test_order_is_kept"),
    (EmptyParts(), PlannerContract, "test_every_unit_is_in_one_part"),
    (OutOfSpace(), WalkContract, "test_asks_for_plain_values_of_its_space"),
    (ArraysOfNumPy(), WalkContract, "test_asks_for_plain_values_of_its_space"),
    (NotSeeded(), WalkContract, "test_equal_searchers_ask_alike"),
    (FailedWins(), WalkContract, "test_survives_failed_trials"),
    (Stuck(), WalkContract, "test_looks_around"),
    (OneAtATime(), WalkContract, "test_takes_results_in_any_order"),
]


@pytest.mark.parametrize(("component", "contract", "test"), BROKEN, ids=str)
def test_a_broken_component_is_caught(component: Any, contract: type[ComponentContract], test: str) -> None:
    assert dict(failures(contract, component, only=test)), f"{component} passes {test}"


@pytest.mark.parametrize(("component", "contract"), [
    (FirstFit(), PlannerContract), (RandomWalk(), WalkContract)], ids=str)
def test_a_correct_component_passes(component: Any, contract: type[ComponentContract]) -> None:
    assert not dict(failures(contract, component))
