"""Deliberately wrong planners and searchers, one bug each, and the contract test that must catch it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import pytest
from contracts.test_planning import TestFirstFit as PlannerContract
from contracts.test_planning import TestRandomWalk as WalkContract
from contracts.toys_planning import RandomWalk, Walk
from posttrain.batching import FirstFit, first_fit
from posttrain.search import Goal, Result, Space
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


@dataclass
class Faulty:
    """A searcher whose search is another one; what is wrong with it is what `search` is."""

    search: Callable[..., Any]

    def problems(self, space: Space, goals: Sequence[Goal]) -> Iterable[str]:
        return []

    def start(self, space: Space, goals: Sequence[Goal], directory: Path) -> Any:
        return self.search(space, goals, directory)

    def __str__(self) -> str:
        return self.search.__name__


class Based(Walk):  # type: ignore[misc]  # final for authors, not for what is wrong here
    """The correct one, to be broken in one place."""

    def __init__(self, space: Space, goals: Sequence[Goal], directory: Path) -> None:
        super().__init__(0, space, goals[0])


class OutOfSpace(Based):
    """Draws numbers from a space that is wider."""

    def ask(self, trial: int) -> Any:
        return {**(super().ask(trial) or {}), "optimizer.lr": 1.0}


class LeavesOut(Based):
    """Says nothing of a parameter that exists with one option alone."""

    def ask(self, trial: int) -> Any:
        return {name: x for name, x in (super().ask(trial) or {}).items() if "=" not in name}


class ArraysOfNumPy(Based):
    """Values are NumPy's, which neither JSON nor YAML holds."""

    def ask(self, trial: int) -> Any:
        return {name: np.float32(x) if isinstance(x, float) else x for name, x in (super().ask(trial) or {}).items()}


class NotSeeded(Based):
    """Draws from the global generator."""

    def __init__(self, space: Space, goals: Sequence[Goal], directory: Path) -> None:
        super().__init__(space, goals, directory)
        self.seed = random.random()  # type: ignore[assignment]  # any text will do


class Stuck(Based):
    """The same trial for ever."""

    def ask(self, trial: int) -> Any:
        return super().ask(0)


class Forgets(Based):
    """Draws anew when it is asked again."""

    def ask(self, trial: int) -> Any:
        self.trials.pop(trial, None)
        self.seed = random.random()  # type: ignore[assignment]  # any text will do
        return super().ask(trial)


class CountsTwice(Based):
    """What it asks for next depends on how often it was told."""

    count = 0

    def tell(self, trial: int, result: Result) -> None:
        super().tell(trial, result)
        self.count += 1
        self.seed = self.count


class NeedsValues(Based):
    """A trial that failed has no values to look at."""

    def tell(self, trial: int, result: Result) -> None:
        self.told[trial] = result.values[0]


class OneAtATime(Based):
    """A result must be that of the trial asked for last."""

    def tell(self, trial: int, result: Result) -> None:
        if trial != max(self.trials):
            raise ValueError("not the trial that was asked for")
        super().tell(trial, result)


@dataclass(frozen=True)
class Refuses:
    """Takes no space at all."""

    def problems(self, space: Space, goals: Sequence[Goal]) -> Iterable[str]:
        return ["not this one"]

    def start(self, space: Space, goals: Sequence[Goal], directory: Path) -> Any:
        return Walk(0, space, goals[0])


BROKEN: Sequence[tuple[Any, type[ComponentContract], str]] = [
    (DropsOverlong(), PlannerContract, "test_every_unit_is_in_one_part"),
    (Overfull(), PlannerContract, "test_no_part_is_over_the_budget"),
    (OneEach(), PlannerContract, "test_parts_are_few"),
    (EmptyFails(), PlannerContract, "test_plans_awkward_batches"),
    (Shuffles(), PlannerContract, "test_is_pure"),
    (Sorts(), PlannerContract, "test_order_is_kept"),
    (EmptyParts(), PlannerContract, "test_every_unit_is_in_one_part"),
    (Refuses(), WalkContract, "test_takes_the_space"),
    (Faulty(OutOfSpace), WalkContract, "test_asks_for_plain_values_of_its_space"),
    (Faulty(LeavesOut), WalkContract, "test_asks_for_plain_values_of_its_space"),
    (Faulty(ArraysOfNumPy), WalkContract, "test_asks_for_plain_values_of_its_space"),
    (Faulty(NotSeeded), WalkContract, "test_equal_searchers_ask_alike"),
    (Faulty(Stuck), WalkContract, "test_looks_around"),
    (Faulty(Forgets), WalkContract, "test_answers_again_what_it_answered"),
    (Faulty(CountsTwice), WalkContract, "test_is_told_twice"),
    (Faulty(NeedsValues), WalkContract, "test_survives_trials_without_values"),
    (Faulty(OneAtATime), WalkContract, "test_takes_results_in_any_order"),
]


@pytest.mark.parametrize(("component", "contract", "test"), BROKEN, ids=str)
def test_a_broken_component_is_caught(
        component: Any, contract: type[ComponentContract], test: str, tmp_path: Path) -> None:
    assert dict(failures(contract, component, only=test, tmp_path=tmp_path)), f"{component} passes {test}"


@pytest.mark.parametrize(("component", "contract"), [
    (FirstFit(), PlannerContract), (RandomWalk(), WalkContract)], ids=str)
def test_a_correct_component_passes(component: Any, contract: type[ComponentContract], tmp_path: Path) -> None:
    assert not dict(failures(contract, component, tmp_path=tmp_path))
