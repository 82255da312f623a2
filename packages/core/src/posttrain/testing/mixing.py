"""Contracts of what mixes several aims: multipliers of constraints, columns of advantages, gradients of slots."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data import Estimate, Metric, to_numpy
from posttrain.errors import ConfigError
from posttrain.ops import framework_of
from posttrain.protocols import Combiner, Constraint, GradientCombiner, Measuring, Switching
from posttrain.testing.contract import EXAMPLES, ComponentContract, assert_close, named
from posttrain.testing.random_data import in_float64, installed_frameworks


class _WithState(ComponentContract, ABC):
    """What controllers owe alike: their state is a value that a checkpoint holds."""

    @abstractmethod
    def started(self, component: Any) -> Any:
        """A state as `init` makes it."""

    @abstractmethod
    def advanced(self, component: Any, state: Any) -> Any:
        """The state after one more step of a run."""

    def test_state_survives_a_checkpoint(self, component: Any) -> None:
        """A resumed run goes on as the uninterrupted one: checkpoints hold the state's fields as JSON."""
        state = self.started(component)
        assert is_dataclass(state) and not isinstance(state, type), \
            f"{named(component)}.init gives {type(state).__name__}; the state must be a dataclass of plain values"
        for _ in range(3):
            again = restored(component, state)
            assert again == state, f"{state!r} came back from a checkpoint as {again!r}; hold maps, lists and numbers"
            onward, other = self.advanced(component, state), self.advanced(component, again)
            assert onward == other, f"a resumed run goes on otherwise: {other!r} instead of {onward!r}"
            state = onward

    def test_changes_nothing_it_is_given(self, component: Any) -> None:
        """A step that is redone after running out of memory starts from the same state."""
        state = self.advanced(component, self.started(component))
        before = json.dumps(asdict(state))
        first, second = self.advanced(component, state), self.advanced(component, state)
        assert json.dumps(asdict(state)) == before, f"{named(component)} changed the state it was given; make a new one"
        assert first == second, f"a second call with the same state gives {second!r} instead of {first!r}"


def restored(component: Any, state: Any) -> Any:
    """A state as core writes it into a checkpoint and makes it again."""
    try:
        stored = json.dumps(asdict(state), allow_nan=False)
    except (TypeError, ValueError) as error:
        pytest.fail(f"the state of {named(component)} is not JSON ({error}): {state!r}; hold maps with text keys, "
                    "lists and finite numbers", pytrace=False)
    return type(state)(**json.loads(stored))


class ConstraintContract(_WithState):
    """Contract of constraints (`posttrain.protocols.Constraint`): `state.multipliers` and `state.status`, by cost.

    A cost is to be at most its limit.
    """

    kind = "constraint"
    protocol = Constraint
    independent: ClassVar[bool] = True
    """The multiplier of a cost depends on that cost alone."""
    steps: ClassVar[int] = 50
    """Updates after which a cost that stays over its limit must have moved its multiplier."""
    limits: ClassVar[Mapping[str, float]] = {"length": 40.0, "toxicity": 0.1}
    """Cost names and limits that the tests use."""

    def started(self, component: Any) -> Any:
        return component.init(self.limits)

    def advanced(self, component: Any, state: Any) -> Any:
        return component.update(state, self._costs(1.5))

    def _costs(self, factor: float) -> dict[str, float]:
        return {name: factor * limit for name, limit in self.limits.items()}

    def _after(self, component: Any, factor: float, state: Any = None) -> Any:
        state = component.init(self.limits) if state is None else state
        for _ in range(self.steps):
            state = component.update(state, self._costs(factor))
        return state

    def test_has_a_multiplier_for_each_limit(self, component: Any) -> None:
        """A constraint that is configured is there (SafeVLA's multiplier was made and never used)."""
        for state in (self.started(component), self.advanced(component, self.started(component))):
            for name in ("multipliers", "status"):
                found = getattr(state, name, None)
                assert isinstance(found, Mapping) and set(found) == set(self.limits), (
                    f"state.{name} must be a map with one entry per limit ({', '.join(self.limits)}), got {found!r}")

    def test_multipliers_stay_finite_and_not_negative(self, component: Any) -> None:
        """A negative multiplier would reward breaking the constraint; one that is not finite ends the run."""
        extreme = st.sampled_from([-1e6, -1.0, 0.0, 0.04, 0.1, 39.0, 40.0, 41.0, 1e6])

        @EXAMPLES
        @given(st.lists(st.tuples(extreme, extreme), max_size=12))
        def holds(history: list[tuple[float, float]]) -> None:
            state = self.started(component)
            for costs in [None, *history]:
                state = state if costs is None else component.update(state, dict(zip(self.limits, costs)))
                for name, x in state.multipliers.items():
                    assert np.isfinite(x) and x >= 0, f"the multiplier of '{name}' is {x} after the costs {history}"
        holds()

    def test_multipliers_rise_while_a_cost_is_over_its_limit(self, component: Any) -> None:
        """The constraint has an effect: its multiplier is updated, and the worse the faster (SafeVLA, issue 24)."""
        start, over, far = self.started(component), self._after(component, 1.5), self._after(component, 3.0)
        for name in self.limits:
            assert over.multipliers[name] > start.multipliers[name], (
                f"the multiplier of '{name}' stays at {over.multipliers[name]} while the cost is 1.5 times its limit "
                f"for {self.steps} updates; it must rise")
            assert far.multipliers[name] >= over.multipliers[name], \
                f"the multiplier of '{name}' is smaller after three times the limit than after 1.5 times"

    def test_multipliers_fall_while_a_cost_is_below_its_limit(self, component: Any) -> None:
        """A constraint that is kept lets the reward through again."""
        over = self._after(component, 1.5)
        below = self._after(component, 0.5, over)
        for name in self.limits:
            assert below.multipliers[name] < over.multipliers[name], (
                f"the multiplier of '{name}' stays at {below.multipliers[name]} while the cost is half its limit for "
                f"{self.steps} updates; it must fall")

    def test_each_cost_has_its_own_multiplier(self, component: Any) -> None:
        """One broken constraint does not punish what keeps another (where `independent`)."""
        if not self.independent:
            return
        first, *others = self.limits
        state, other = self.started(component), self.started(component)
        for factor in (1.5, 0.5, 2.0):
            costs = self._costs(factor)
            state = component.update(state, costs)
            other = component.update(other, {**costs, **{name: 10 * costs[name] for name in others}})
        assert state.multipliers[first] == other.multipliers[first], (
            f"the multiplier of '{first}' depends on the cost of {', '.join(others)}; if that is meant, set "
            "independent = False in the contract")

    def test_order_of_costs_does_not_matter(self, component: Any) -> None:
        """Costs go by name."""
        limits = dict(reversed(list(self.limits.items())))
        states = [self.started(component), self.started(component), component.init(limits)]
        for factor in (1.5, 0.5):
            costs = {name: (factor + i) * limit for i, (name, limit) in enumerate(self.limits.items())}
            turned = dict(reversed(costs.items()))
            states = [component.update(state, c) for state, c in zip(states, (costs, turned, costs))]
        first, *others = [dict(state.multipliers) for state in states]
        assert all(other == first for other in others), "multipliers depend on the order of the costs; go by name"

    def test_a_weight_of_the_reward_goes_with_a_multiplier(self, component: Any) -> None:
        """Where the state has a `reward_weight`: from 0 to 1, and never 0 while all multipliers are 0, which would
        leave nothing to mix."""
        state = self.started(component)
        for factor in (0.5, 1.5, 3.0, 0.5):
            state = component.update(state, self._costs(factor))
            total = sum(state.multipliers.values())
            weight = state.reward_weight if isinstance(state, Switching) else 1.0
            assert 0 <= weight <= 1 and weight + total > 0, \
                f"after costs of {factor} times their limits reward_weight is {weight} and the multipliers' sum {total}"

    def test_a_cost_without_signal_holds_its_multiplier(self, component: Any) -> None:
        """A rollout in which a cost was not measured says nothing of it."""
        state = self._after(component, 1.5)
        after = component.update(state, {})
        assert dict(after.multipliers) == dict(state.multipliers), (
            f"a rollout without costs moves the multipliers {dict(state.multipliers)} to {dict(after.multipliers)}; a "
            "cost that is absent was not measured")

    def test_unknown_cost_is_refused_by_name(self, component: Any) -> None:
        """A misspelled cost is an error that names it, not a constraint without effect."""
        costs = {**self._costs(1.0), "lenght": 1.0}
        with refused(f"update with a cost 'lenght' that has no limit must raise an error that says 'lenght', and "
                     f"{named(component)}", "lenght"):
            component.update(self.started(component), costs)

    def test_a_cost_that_is_no_number_does_no_lasting_harm(self, component: Any) -> None:
        """A NaN is refused by name or leaves every multiplier finite."""
        first = next(iter(self.limits))
        for bad in (float("nan"), float("inf")):
            try:
                state = component.update(self.started(component), {**self._costs(1.0), first: bad})
            except Exception as error:
                assert first in str(error), f"the error for a cost of {bad} does not name '{first}': {error}"
            else:
                assert all(np.isfinite(x) for x in state.multipliers.values()), \
                    f"one cost of {bad} made the multipliers {dict(state.multipliers)}, and they will never recover"


@contextmanager
def refused(what: str, word: str) -> Iterator[None]:
    """The block must raise a refusal that holds `word`."""
    try:
        yield
    except Exception as error:
        assert word in str(error), f"{what} raised {type(error).__name__} without it: {error}"
        return
    pytest.fail(f"{what} raised nothing", pytrace=False)


class CombinerContract(ComponentContract):
    """Contract of combiners of advantages (`posttrain.protocols.Combiner`)."""

    kind = "combiner"
    protocol = Combiner
    scale_invariant: ClassVar[bool] = False
    """Multiplying one column by a positive number changes nothing. Tested both ways."""
    ranked: ClassVar[bool] = False
    """The order of the columns given to `init` says which comes first."""
    columns: ClassVar[tuple[str, ...]] = ("accuracy", "brevity", "style")
    """Column names that the tests use; take those that the component's fields name."""
    tolerance: ClassVar[float] = 1e-9
    """Relative and absolute, in float64."""

    def oracle(self, component: Any, advantages: Mapping[str, Sequence[float]],
               keep: Mapping[str, Sequence[bool]]) -> Sequence[float]:
        """[N] the mixed advantages, written as plainly as possible. Numbers of actions that no column keeps are not
        compared."""
        pytest.fail(f"{type(self).__name__} has no oracle; write one as plain loops: "
                    "def oracle(self, component, advantages, keep): ...", pytrace=False)

    def alone(self, component: Any, advantages: np.ndarray) -> np.ndarray:
        """[N] what the component makes of a single column, all actions kept: the column, up to a documented scale."""
        return advantages

    def started(self, component: Any, columns: Sequence[str] = ()) -> Any:
        """A state as `init` makes it."""
        return component.init(columns or self.columns)

    def test_equals_its_oracle(self, component: Any) -> None:
        """The formula, against the slow form that the author supplies."""
        @EXAMPLES
        @given(st.integers(0, 2**16), st.integers(1, 12))
        def holds(seed: int, n: int) -> None:
            estimates = drawn_estimates(seed, n, self.columns)
            expected = np.asarray(self.oracle(component, {c: e.advantages.tolist() for c, e in estimates.items()},
                                              {c: e.keep.tolist() for c, e in estimates.items()}), np.float64)
            got = to_numpy(component.combine(estimates, self.started(component)).advantages)
            kept = _kept(estimates)
            assert got.shape == expected.shape, f"the oracle gives {expected.shape}, {named(component)} {got.shape}"
            assert_close(got[kept], expected[kept], self.tolerance, "the mixed advantages differ from the oracle's")
        holds()

    def test_a_single_column_stays_what_it_is(self, component: Any) -> None:
        """With one reward there is nothing to mix; a documented scale is stated by `alone`."""
        column = self.columns[0]
        A = np.array([1.0, -2.0, 0.5, 0.25, 3.0])
        estimate = Estimate(A, targets=A + 1, keep=np.ones(5, bool))
        try:
            state = component.init((column,))
        except (ValueError, ConfigError) as error:
            assert any(other in str(error) for other in self.columns[1:]), \
                f"init refuses a single column and names none that it misses: {error}"
            return  # its fields name several columns
        mixed = component.combine({column: estimate}, state)
        assert_close(to_numpy(mixed.advantages), np.asarray(self.alone(component, A)), self.tolerance,
                      f"a single column does not stay what it is; if {named(component)} rescales it, say so by "
                      "def alone(self, component, advantages) of the contract")

    def test_order_of_columns_does_not_matter(self, component: Any) -> None:
        """Columns go by name, in the call and (unless `ranked`) in `init`."""
        estimates = drawn_estimates(3, 9, self.columns)
        turned = dict(reversed(estimates.items()))
        expected = to_numpy(component.combine(estimates, self.started(component)).advantages)
        states = [self.started(component)] + (
            [] if self.ranked else [self.started(component, tuple(reversed(self.columns)))])
        for state in states:
            assert_close(to_numpy(component.combine(turned, state).advantages), expected, self.tolerance,
                          "the mixed advantages depend on the order of the columns; look columns up by name")

    def test_order_of_actions_does_not_matter(self, component: Any) -> None:
        """The same actions in another order give the same numbers in that order."""
        estimates = drawn_estimates(4, 9, self.columns)
        order = np.random.default_rng(0).permutation(9)
        expected = to_numpy(component.combine(estimates, self.started(component)).advantages)[order]
        turned = {c: replace(e, advantages=e.advantages[order], keep=e.keep[order], targets=e.targets[order])
                  for c, e in estimates.items()}
        assert_close(to_numpy(component.combine(turned, self.started(component)).advantages), expected,
                      self.tolerance, "the mixed advantages depend on the order of the actions")

    def test_actions_that_are_out_reach_nobody(self, component: Any) -> None:
        """What stands where a column's `keep` is false is not a number of that column (a leak through a mean or a
        standard deviation taken over all actions: ROLL, pull 447)."""
        estimates = drawn_estimates(5, 10, self.columns)
        rubbish = {c: replace(e, advantages=np.where(e.keep, e.advantages, 1e3)) for c, e in estimates.items()}
        kept = _kept(estimates)
        expected = to_numpy(component.combine(estimates, self.started(component)).advantages)[kept]
        got = to_numpy(component.combine(rubbish, self.started(component)).advantages)[kept]
        assert_close(got, expected, self.tolerance, "an advantage where keep is false changes the advantages of "
                      "others; take means and deviations over kept actions alone, and count the others as 0")

    def test_keeps_what_columns_keep(self, component: Any) -> None:
        """An action is out where every column is without it; `keep` None leaves that to core."""
        estimates = drawn_estimates(6, 12, self.columns)
        some, every = _kept(estimates), np.all([e.keep for e in estimates.values()], axis=0)
        mixed = component.combine(estimates, self.started(component))
        assert to_numpy(mixed.advantages).shape == (12,), f"advantages have shape {to_numpy(mixed.advantages).shape}"
        if mixed.keep is not None:
            keep = to_numpy(mixed.keep)
            assert keep.dtype == bool and keep.shape == (12,), f"keep must be boolean [N], got {keep!r}"
            assert not (keep & ~some).any(), "an action is kept although no column keeps it"
            assert keep[every].all(), "an action is dropped although every column keeps it"
        for name, metric in mixed.metrics.items():
            assert isinstance(metric, Metric), f"metric {name} must be a Metric with its weight, got {metric!r}"

    def test_survives_columns_without_variance(self, component: Any) -> None:
        """Columns that are constant, 0, huge, or kept nowhere: finite numbers."""
        shapes = {"constant": np.full(6, 0.1), "zero": np.zeros(6), "huge": np.linspace(-1e6, 1e6, 6),
                  "of one action": np.eye(6)[0]}
        for what, column in shapes.items():
            for keep in (np.ones(6, bool), np.eye(6, dtype=bool)[2], np.zeros(6, bool)):
                estimates = {c: Estimate(column * keep if i == 0 else np.arange(6.0), keep=keep if i == 0 else
                                         np.ones(6, bool)) for i, c in enumerate(self.columns)}
                with np.errstate(all="ignore"):
                    A = to_numpy(component.combine(estimates, self.started(component)).advantages)
                assert np.isfinite(A).all(), f"a column that is {what}, {keep.sum()} actions kept, gives {A}"

    def test_scale_of_a_column_is_as_claimed(self, component: Any) -> None:
        """Whether a reward of 0 to 100 outweighs one of 0 to 1."""
        estimates = drawn_estimates(7, 12, self.columns)
        first = self.columns[0]
        scaled = {**estimates, first: replace(estimates[first], advantages=1e3 * estimates[first].advantages)}
        kept = _kept(estimates)
        one, two = (to_numpy(component.combine(e, self.started(component)).advantages)[kept]
                    for e in (estimates, scaled))
        same = np.allclose(one, two, rtol=1e-3, atol=1e-3)  # an epsilon beside a deviation is no scale
        assert same == self.scale_invariant, (
            f"a column times 1000 changes {'nothing' if same else 'the mix'}, but the contract's scale_invariant is "
            f"{self.scale_invariant}")

    def test_is_pure(self, component: Any) -> None:
        """It changes nothing it is given, and says the same when asked again."""
        estimates, state = drawn_estimates(8, 9, self.columns), self.started(component)
        before = {c: (e.advantages.copy(), e.keep.copy(), e.targets.copy()) for c, e in estimates.items()}
        first, second = (to_numpy(component.combine(estimates, state).advantages).copy() for _ in range(2))
        for c, e in estimates.items():
            for name, saved in zip(("advantages", "keep", "targets"), before[c]):
                assert np.array_equal(getattr(e, name), saved), f"{named(component)} changed {name} of '{c}'"
        assert np.array_equal(first, second), "a second call with the same estimates gives other advantages"

    def test_state_survives_a_checkpoint(self, component: Any) -> None:
        """Checkpoints hold the state's fields as JSON."""
        state = self.started(component)
        if state is not None:
            assert is_dataclass(state) and not isinstance(state, type), \
                f"{named(component)}.init gives {type(state).__name__}; give a dataclass of plain values, or None"
            assert restored(component, state) == state, "the state came back from a checkpoint as another one"

    def test_follows_what_is_measured(self, component: Any) -> None:
        """Where it has an `update`: a new state that a checkpoint holds, the old one unchanged, and nothing moved by a
        rollout without a measurement."""
        if not isinstance(component, Measuring):
            return
        state = self.started(component)
        for scale in (1.0, 0.5, -2.0):
            measured = {c: scale * (i + 1.0) for i, c in enumerate(self.columns)}
            before = json.dumps(asdict(state))
            after = component.update(state, measured)
            assert json.dumps(asdict(state)) == before, f"{named(component)} changed the state it was given"
            assert component.update(state, dict(reversed(measured.items()))) == after, \
                "the state depends on the order of the columns; go by name"
            assert restored(component, after) == after, "the state came back from a checkpoint as another one"
            assert component.update(after, {}) == after, "a rollout in which nothing was measured changes the state"
            assert component.update(after, dict.fromkeys(self.columns, float("nan"))) == after, \
                "a mean of NaN, which is one over no episode, changes the state"
            state = after

    def test_equal_in_every_framework(self, component: Any) -> None:
        """float64 in NumPy, torch and JAX; the result is an array of the framework that came in."""
        frameworks = installed_frameworks()
        if not frameworks:
            pytest.skip("not measured: neither torch nor JAX is installed")
        estimates = drawn_estimates(9, 9, self.columns)
        expected, kept = component.combine(estimates, self.started(component)), _kept(estimates)
        for framework, make in frameworks.items():
            with in_float64(framework):
                there = {c: replace(e, advantages=make(e.advantages), targets=make(e.targets))
                         for c, e in estimates.items()}
                got = component.combine(there, self.started(component)).advantages
                assert framework_of(got) == framework, f"advantages of {framework} gave an array of {framework_of(got)}"
                assert_close(to_numpy(got)[kept], to_numpy(expected.advantages)[kept], self.tolerance,
                              f"advantages in {framework} and NumPy differ")


def drawn_estimates(seed: int, n: int, columns: Sequence[str]) -> dict[str, Any]:
    """Random `Estimate`s as the loop gives them: on all actions, 0 where a column is without the action. Of several
    actions the first is in no column."""
    rng = np.random.default_rng(seed)
    keep = {c: (rng.random(n) < 0.8) & ((np.arange(n) > 0) | (n == 1)) for c in columns}
    return {c: Estimate(np.where(keep[c], (i + 1) * rng.normal(size=n), 0.0), targets=rng.normal(size=n), keep=keep[c])
            for i, c in enumerate(columns)}


def _kept(estimates: Mapping[str, Any]) -> np.ndarray:
    """[N] bool, actions that some column keeps."""
    return np.asarray(np.any([e.keep for e in estimates.values()], axis=0))


class GradientCombinerContract(_WithState):
    """Contract of combiners of gradients (`posttrain.protocols.GradientCombiner`), on Gramians of every rank and size.

    With gradients `g_i` and G = g g^T, the combined direction is `sum_i w_i g_i`; its inner product with `g_i` is
    `(G w)_i`.
    """

    kind = "gradient_combiner"
    protocol = GradientCombiner
    common_descent: ClassVar[bool] = False
    """The combined direction is against no slot's: `(G w)_i >= 0` for every i."""
    tolerance: ClassVar[float] = 1e-6
    """Of inner products, relative to the lengths of the two vectors."""

    def slots(self, m: int) -> tuple[str, ...]:
        """Names of m slots."""
        return tuple(f"reward{i}" for i in range(m))

    def started(self, component: Any) -> Any:
        return component.init(self.slots(3))

    def advanced(self, component: Any, state: Any) -> Any:
        return component.weights(gramian_of(np.array([[1.0, 0.5], [-1.0, 0.2], [0.3, -2.0]])), state)[1]

    def test_weights_are_one_finite_number_per_slot(self, component: Any) -> None:
        """Also for gradients that are 0, equal, opposed, or of sizes from 1e-12 to 1e12."""
        @EXAMPLES
        @given(gramians())
        def holds(G: np.ndarray) -> None:
            w = self._weights(component, G)
            assert np.isfinite(w).all(), f"the weights are {w} for the Gramian\n{G}"
        holds()

    def test_a_single_slot_goes_forward(self, component: Any) -> None:
        """m = 1: a positive weight."""
        for size in (1e-12, 1.0, 1e12):
            w = self._weights(component, np.array([[size]]))
            assert w[0] > 0, f"the weight of a single slot with a squared gradient of {size:g} is {w[0]}"

    def test_moves_where_nobody_objects(self, component: Any) -> None:
        """Gradients at right angles: every slot's inner product is not negative, and the direction is not 0."""
        for m in (2, 3):
            w = self._weights(component, np.eye(m))
            assert (w >= -self.tolerance).all() and w.sum() > 0, f"orthogonal gradients of length 1 give weights {w}"

    def test_goes_against_no_slot(self, component: Any) -> None:
        """What is claimed by `common_descent`: no step that makes one aim worse, to first order."""
        if not self.common_descent:
            return

        @EXAMPLES
        @given(gramians())
        def holds(G: np.ndarray) -> None:
            w = self._weights(component, G)
            products, length = G @ w, np.sqrt(max(float(w @ G @ w), 0.0))
            # where gradients all but cancel, what is left of the direction is rounding of the terms of its sum
            slack = self.tolerance * np.sqrt(np.diag(G)) * (length + float(np.abs(w) @ np.sqrt(np.diag(G))))
            assert (products >= -slack - np.finfo(float).tiny).all(), (
                f"the direction of weights {w} has inner products {products} with the slots' gradients for the Gramian"
                f"\n{G}\nwhere the contract's common_descent is claimed")
        holds()

    def test_order_of_slots_does_not_matter(self, component: Any) -> None:
        """The same slots in another order give the same direction."""
        @EXAMPLES
        @given(gramians(), st.integers(0, 2**16))
        def holds(G: np.ndarray, seed: int) -> None:
            m = len(G)
            order = np.random.default_rng(seed).permutation(m)
            one = self._weights(component, G)
            two = self._weights(component, G[np.ix_(order, order)], tuple(self.slots(m)[i] for i in order))
            # weights of dependent gradients are not unique; the direction is: compare its inner products
            lengths = np.sqrt(np.diag(G))
            size = max(float(np.abs(one) @ lengths), float(np.abs(two) @ lengths[order]))
            difference = np.abs((G @ one)[order] - G[np.ix_(order, order)] @ two)
            assert (difference <= 1e-5 * lengths[order] * size + np.finfo(float).tiny).all(), \
                f"weights {one} become {two} for the order {order} of the slots of\n{G}"
        holds()

    def test_leaves_the_gramian_alone(self, component: Any) -> None:
        """Another learner of the same step may use it, and equal calls have equal answers: what is drawn is drawn
        from the state."""
        G = gramian_of(np.array([[1.0, 0.5], [-1.0, 0.2], [0.3, -2.0]]))
        before, state = G.copy(), self.started(component)
        first = np.array(component.weights(G, state)[0])
        assert np.array_equal(G, before), f"{named(component)} changed the Gramian it was given; work on a copy"
        second = np.array(component.weights(G, state)[0])
        assert np.array_equal(first, second), f"a second call with the same state gives {second} instead of {first}"

    def _weights(self, component: Any, G: np.ndarray, slots: tuple[str, ...] = ()) -> np.ndarray:
        m = len(G)
        with np.errstate(all="ignore"):
            answer = component.weights(G.copy(), component.init(slots or self.slots(m)))
        assert isinstance(answer, tuple) and len(answer) == 2, f"weights must return (weights, state), got {answer!r}"
        w = answer[0]
        assert isinstance(w, np.ndarray) and w.shape == (m,) and w.dtype == np.float64, (
            f"weights must be a float64 array of shape ({m},), got {w!r}")
        return w


def gramian_of(J: np.ndarray) -> np.ndarray:
    """[m, m] inner products of the rows of J [m, d]."""
    return np.asarray(J @ J.T, np.float64)


def gramians() -> st.SearchStrategy[np.ndarray]:
    """Gramians of 1 to 4 gradients: independent, of any lower rank, with equal, opposed and zero rows, of any size."""
    def of(drawn: tuple[int, int, int, str, int]) -> np.ndarray:
        seed, m, rank, special, exponent = drawn
        J = np.random.default_rng(seed).normal(size=(m, rank))
        return gramian_of(_SPECIAL[special](J)) * 10.0 ** exponent
    return st.tuples(st.integers(0, 2**16), st.integers(1, 4), st.integers(1, 5), st.sampled_from(sorted(_SPECIAL)),
                     st.sampled_from([-12, -6, 0, 6, 12])).map(of)


def _with_first_row(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda J: np.concatenate([change(J[-1:]), J[1:]])


_SPECIAL: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "as drawn": lambda J: J,
    "equal": _with_first_row(lambda last: last),
    "opposed": _with_first_row(lambda last: -2 * last),
    "one zero": _with_first_row(lambda last: 0 * last),
    "all zero": lambda J: 0 * J,
    "sizes apart": lambda J: J * 10.0 ** np.arange(0, -3 * len(J), -3)[:, None],
}
