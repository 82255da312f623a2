"""Contracts of what plans: micro-batches under a budget of tokens, and trials of a search."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.protocols import Adapting, Batching, Pass, Searcher, Usage
from posttrain.testing.contract import EXAMPLES, ComponentContract, named


class BatchingContract(ComponentContract):
    """Contract of planners of micro-batches (`posttrain.protocols.Batching`)."""

    kind = "batching"
    protocol = Batching
    ascending: ClassVar[bool] = True
    """Units of a part are in the order in which they were offered."""
    waste: ClassVar[float] = 2.0
    """Parts at most, as a multiple of the least that the budget allows; 2 is what any planner keeps that opens a new
    part only where the last one has no room."""

    def test_tokens_are_a_budget(self, component: Any) -> None:
        """The run begins with it."""
        tokens = component.tokens
        assert isinstance(tokens, int) and tokens >= 1, f"tokens must be a positive int, got {tokens!r}"

    def test_every_unit_is_in_one_part(self, component: Any) -> None:
        """A unit that is left out is not learned from; one in two parts counts twice."""
        @EXAMPLES
        @given(*_problems())
        def holds(costs: list[int], budget: int) -> None:
            parts = self._plan(component, costs, budget)
            found = sorted(i for part in parts for i in part.tolist())
            assert found == list(range(len(costs))), f"{len(costs)} units of {costs}, but the parts hold {found}"
            assert all(len(part) for part in parts), f"a part is empty: {parts}; every part is a pass of the model"
        holds()

    def test_no_part_is_over_the_budget(self, component: Any) -> None:
        """Else memory runs out; a single unit over the budget is a part of its own."""
        @EXAMPLES
        @given(*_problems())
        def holds(costs: list[int], budget: int) -> None:
            for part in self._plan(component, costs, budget):
                total = sum(costs[i] for i in part)
                assert total <= budget or len(part) == 1, \
                    f"units {part.tolist()} cost {total}, over the budget of {budget}; costs are {costs}"
        holds()

    def test_parts_are_few(self, component: Any) -> None:
        """Each part costs a pass: not many more than the budget needs (`waste`), and one where all fits."""
        @EXAMPLES
        @given(*_problems())
        def holds(costs: list[int], budget: int) -> None:
            least = -(-sum(min(c, budget) for c in costs) // budget)
            parts = len(self._plan(component, costs, budget))
            assert parts <= max(len(costs) > 0, self.waste * least), \
                f"{parts} parts for {costs} under {budget}, where {least} would be the least"
            if costs:
                whole = len(self._plan(component, costs, sum(costs) + 1))
                assert whole == 1, f"{whole} parts where all units fit into one"
        holds()

    def test_plans_awkward_batches(self, component: Any) -> None:
        """Nothing at all, units that cost nothing, units over the budget, a budget of 1."""
        assert len(self._plan(component, [], 10)) == 0, "no unit gives no part"
        cases: Mapping[str, tuple[list[int], int]] = {
            "units that cost nothing": ([0, 0, 0], 5), "nothing beside a unit over the budget": ([9, 0], 5),
            "all over the budget": ([9, 8, 7], 5), "a budget of 1": ([1, 2, 1], 1), "one unit": ([3], 5)}
        for what, (costs, budget) in cases.items():
            parts = self._plan(component, costs, budget)
            assert sorted(i for part in parts for i in part.tolist()) == list(range(len(costs))), f"{what}: {parts}"
            assert all(len(part) == 1 or sum(costs[i] for i in part) <= budget for part in parts), f"{what}: {parts}"

    def test_order_is_kept(self, component: Any) -> None:
        """Neighbours (the answers to one prompt) stay neighbours, where `ascending`."""
        @EXAMPLES
        @given(*_problems())
        def holds(costs: list[int], budget: int) -> None:
            for part in self._plan(component, costs, budget):
                assert part.tolist() == sorted(part.tolist()), f"units {part.tolist()} are out of order"
        if self.ascending:
            holds()

    def test_is_pure(self, component: Any) -> None:
        """The same parts in every process, after every retry; the costs stay what they are."""
        costs = np.random.default_rng(0).integers(1, 50, size=40)
        before = costs.copy()
        first, second = component.plan(costs, 64), component.plan(costs, 64)
        assert np.array_equal(costs, before), f"{named(component)} changed the costs it was given"
        assert [p.tolist() for p in first] == [p.tolist() for p in second], "a second call gives another plan"

    def test_what_is_learned_is_plain_data(self, component: Any) -> None:
        """A checkpoint holds it as JSON, and a resumed run goes on with the same budgets."""
        if not isinstance(component, Adapting):
            return
        state = component.init()
        for use, seen in _PASSES:
            state = component.observed(component.prepared(state, use, seen.start), use, seen)
            stored = json.loads(json.dumps(asdict(state), allow_nan=False))
            again = type(state)(**stored)
            assert again == state, f"{state} came back from JSON as {again}"
            assert component.budget(again, use) == component.budget(state, use) >= 1

    def test_backs_off_after_a_failure(self, component: Any) -> None:
        """Else a step is done again and again, and never succeeds. Another use keeps its budget."""
        if not isinstance(component, Adapting):
            return
        state = component.init()
        for use, seen in _PASSES:
            state = component.observed(state, use, seen)
            others = {name: component.budget(state, name) for name, _ in _PASSES if name != use}
            while (tokens := component.budget(state, use)) > 1:
                state = component.observed(state, use, replace(seen, tokens=tokens, failed=True))
                assert 1 <= component.budget(state, use) < tokens, f"{tokens} tokens failed and are tried again"
            assert others == {name: component.budget(state, name) for name in others}

    def _plan(self, component: Any, costs: Sequence[int], budget: int) -> list[np.ndarray]:
        parts = component.plan(np.array(costs, np.int64), budget)
        assert isinstance(parts, list), f"a plan is a list of arrays, got {type(parts).__name__}"
        for part in parts:
            assert isinstance(part, np.ndarray) and np.issubdtype(part.dtype, np.integer) and part.ndim == 1, \
                f"a part is a flat array of unit numbers, got {part!r}"
        return parts


_PASSES = (
    ("update", Pass(1000, 0.5, Usage(used=10**6, limit=10**7, resident=10**6), peak=3 * 10**6)),
    ("score", Pass(300, 0.1, Usage())),
    ("update", Pass(2000, 1.0, Usage(used=10**6, limit=10**7, resident=10**6), peak=5 * 10**6)))
"""Some as a planner may be told of them: use, and what was seen."""


def _problems() -> tuple[st.SearchStrategy[list[int]], st.SearchStrategy[int]]:
    """Costs in tokens, some above the budget, and the budget."""
    return st.lists(st.integers(0, 60), max_size=30), st.integers(1, 100)


class SearcherContract(ComponentContract):
    """Contract of searchers (`posttrain.protocols.Searcher`).

    The fields of a searcher are its configuration; what it has learned is no field that `init` takes, so that a copy
    made of the fields begins anew.
    """

    kind = "searcher"
    protocol = Searcher
    measured: ClassVar[tuple[str, ...]] = ("reward",)
    """Names of the values that are told of a trial."""

    def contains(self, component: Any, trial: Mapping[str, Any]) -> bool:
        """Whether a trial lies in the space that the component was configured with."""
        pytest.fail(f"{type(self).__name__} does not say what the space is; write "
                    "def contains(self, component, trial) -> bool: ...", pytrace=False)

    def test_asks_for_plain_values_of_its_space(self, component: Any) -> None:
        """A trial becomes overrides of a configuration: text keys, values that YAML and JSON hold."""
        for trial in self._search(component, 8):
            assert all(isinstance(key, str) for key in trial), f"keys of a trial are text, got {trial!r}"
            try:
                again = json.loads(json.dumps(dict(trial), allow_nan=False))
            except (TypeError, ValueError) as error:
                pytest.fail(f"a trial is not plain data ({error}): {trial!r}; convert NumPy's numbers", pytrace=False)
            assert again == trial, f"the trial {trial!r} came back from JSON as {again!r}"
            assert self.contains(component, trial), f"the trial {trial!r} lies outside the declared space"

    def test_equal_searchers_ask_alike(self, component: Any) -> None:
        """A search is repeated by its seed, and the state of one does not leak into another."""
        first, second = self._search(component, 8), self._search(component, 8)
        assert first == second, f"two new searchers with the same fields asked for\n{first}\nand\n{second}"

    def test_looks_around(self, component: Any) -> None:
        """Asking again and again for one point is no search."""
        assert len({json.dumps(dict(t), sort_keys=True) for t in self._search(component, 8)}) > 1, \
            f"{named(component)} asked eight times for one and the same trial"

    def test_survives_failed_trials(self, component: Any) -> None:
        """A trial that diverged, failed or said nothing is no end of the search."""
        nothing: Mapping[str, float] = {}
        for values in (nothing, *(dict.fromkeys(self.measured, bad) for bad in
                                  (float("nan"), float("inf"), float("-inf")))):
            searcher = fresh(component)
            for _ in range(3):
                searcher.tell(searcher.ask(), values)
            trial = searcher.ask()
            assert self.contains(component, trial), f"after trials that gave {values} it asks for {trial!r}"

    def test_takes_results_in_any_order(self, component: Any) -> None:
        """Trials run side by side, in other processes: several are asked for before one is told, as read from JSON."""
        searcher = fresh(component)
        trials = [searcher.ask() for _ in range(4)]
        for number in (2, 0, 3, 1):
            searcher.tell(json.loads(json.dumps(dict(trials[number]))), self._values(number))
        assert self.contains(component, searcher.ask())

    def _search(self, component: Any, count: int) -> list[Mapping[str, Any]]:
        """Trials of a new searcher that is told of each."""
        searcher, trials = fresh(component), list[Mapping[str, Any]]()
        for number in range(count):
            trials.append(searcher.ask())
            searcher.tell(trials[-1], self._values(number))
        return trials

    def _values(self, number: int) -> dict[str, float]:
        return dict.fromkeys(self.measured, 0.1 * (number * 7 % 5))


def fresh(component: Any) -> Any:
    """A searcher of the same configuration that has learned nothing."""
    return replace(component)
