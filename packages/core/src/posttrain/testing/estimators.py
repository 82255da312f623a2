"""Contracts of what runs on the action axis: advantage estimators and off-policy corrections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from hypothesis import given

from posttrain.data import Episodes, Estimate, Metric, to_numpy
from posttrain.ops import framework_of, like
from posttrain.protocols import Corrected, Correction, Estimator, Need
from posttrain.testing import random_data
from posttrain.testing.contract import EXAMPLES, ComponentContract, assert_close, named
from posttrain.testing.random_data import (
    COLUMNS,
    FLOATS,
    chosen,
    episodes_of,
    in_float64,
    in_framework,
    installed_frameworks,
    joined,
)

Scope = Literal["episode", "group", "batch"]


class _OnEpisodes(ComponentContract):
    """What estimators and corrections owe alike: a pure function of episodes, on whatever framework's arrays."""

    scope: ClassVar[Scope] = "episode"
    """How far the result of an episode reaches: it depends on the episode alone, on the answers to the same prompt, or
    on the whole batch (standardised over it). Tested both ways: what is claimed too wide fails, too."""
    result: ClassVar[type]
    """What a call gives."""
    outputs: ClassVar[tuple[str, ...]] = ()
    """Columns of the result, [N] each or None."""
    tolerance: ClassVar[float] = 1e-9
    """Relative and absolute, in float64."""

    def oracle(self, component: Any, episodes: Episodes) -> Sequence[float]:
        """[N] the first column of the result, written as plainly as possible: loops over episodes, no shared code."""
        pytest.fail(f"{type(self).__name__} has no oracle; write one as plain loops: "
                    "def oracle(self, component, episodes): ...", pytrace=False)

    def test_equals_its_oracle(self, component: Any) -> None:
        """The formula, against the slow form that the author supplies."""
        @EXAMPLES
        @given(random_data.shapes())
        def holds(shape: tuple[int, list[int], list[int]]) -> None:
            episodes = episodes_of(*shape, component.needs)
            got = column(self._result(component, episodes), self.outputs[0])
            expected = np.asarray(self.oracle(component, episodes))
            assert got.shape == expected.shape, f"the oracle gives {expected.shape}, {named(component)} {got.shape}"
            assert_close(got, expected, self.tolerance, f"{self.outputs[0]} differ from the oracle's")
        holds()

    def test_is_pure(self, component: Any) -> None:
        """It changes nothing it is given, and says the same when asked again."""
        episodes = episodes_of(3, [3, 1, 4], [0, 0, 1], component.needs)
        before = {name: np.copy(getattr(episodes, name)) for name in FLOATS
                  if getattr(episodes, name) is not None}
        first, second = self._result(component, episodes), self._result(component, episodes)
        for name, saved in before.items():
            assert np.array_equal(getattr(episodes, name), saved), f"{named(component)} changed Episodes.{name}"
        for name in self.outputs:
            a, b = column(first, name), column(second, name)
            assert np.array_equal(a, b), f"{name} of a second call with the same episodes differ"

    def test_has_one_number_per_action(self, component: Any) -> None:
        """Shapes, finite numbers, a boolean `keep`, metrics that can be added up over parts."""
        @EXAMPLES
        @given(random_data.shapes())
        def holds(shape: tuple[int, list[int], list[int]]) -> None:
            result = self._result(component, episodes_of(*shape, component.needs))
            for name in self.outputs:
                if (found := getattr(result, name)) is not None:
                    assert np.isfinite(to_numpy(found)).all(), f"{name} are not finite"
            if result.keep is not None:
                assert to_numpy(result.keep).dtype == bool, f"keep must be boolean, got {to_numpy(result.keep).dtype}"
            for name, metric in result.metrics.items():
                assert isinstance(metric, Metric), f"metric {name} must be a Metric with its weight, got {metric!r}"
        holds()

    def test_needs_what_it_says_and_nothing_else(self, component: Any) -> None:
        """A column it does not name changes nothing; one that it names and lacks is a `ValueError` that says so."""
        shape, every = (11, [2, 3, 1, 2], [0, 0, 1, 1]), frozenset(COLUMNS)
        lean = episodes_of(*shape, component.needs)
        rich = episodes_of(*shape, every)
        needed: dict[str, Any] = {
            name: getattr(lean, name) for need in component.needs for name in COLUMNS.get(need, ())}
        same = replace(rich, rewards=lean.rewards, terminated=lean.terminated, **needed)
        for name in self.outputs:
            assert np.array_equal(column(self._result(component, lean), name), column(component(same), name)), \
                f"{name} depend on a column that {named(component)}.needs does not name"
        for need in component.needs & every:
            nothing: dict[str, Any] = dict.fromkeys(COLUMNS[need])
            missing = replace(lean, **nothing)
            names = " and ".join(f"Episodes.{column}" for column in COLUMNS[need])
            try:
                component(missing)
            except Exception as error:
                told = isinstance(error, ValueError) and any(column in str(error) for column in COLUMNS[need])
                assert told, f"without {names} it must raise a ValueError that names the missing column, got " \
                             f"{type(error).__name__}: {error}"
            else:
                pytest.fail(f"{named(component)}.needs names {need.name}, and nothing is missed without {names}: raise "
                            "ValueError where the column is None, or take it out of needs", pytrace=False)

    def test_equal_in_every_framework(self, component: Any) -> None:
        """float64 in NumPy, torch and JAX; the result is an array of the framework that came in."""
        frameworks = installed_frameworks()
        if not frameworks:
            pytest.skip("not measured: neither torch nor JAX is installed")
        episodes = episodes_of(5, [3, 1, 4, 2, 5, 1, 3], [1, 1, 1, 5, 5, 5, 9], component.needs)
        expected = self._result(component, episodes)
        for framework, make in frameworks.items():
            with in_float64(framework):
                got = self._result(component, in_framework(episodes, make))
                for name in self.outputs:
                    ours, numpys = getattr(got, name), getattr(expected, name)
                    assert (ours is None) == (numpys is None), f"{name} is None in one of NumPy and {framework}"
                    if ours is not None:
                        assert framework_of(ours) == framework, f"{name} is an array of {framework_of(ours)}"
                        assert_close(to_numpy(ours), numpys, 1e-12, f"{name} in {framework} and NumPy differ")

    def test_float32_stays_float32(self, component: Any) -> None:
        """No silent widening to float64, which torch refuses on some devices and JAX turns off."""
        episodes = episodes_of(5, [3, 1, 4, 2, 5], [1, 1, 1, 5, 5], component.needs)
        expected = self._result(component, episodes)
        arrays: dict[str, Callable[[np.ndarray], Any]] = {"numpy": np.asarray, **installed_frameworks()}
        for framework, make in arrays.items():
            narrow = in_framework(episodes, lambda x, make=make: make(np.asarray(x, np.float32)))  # type: ignore[misc]  # mypy infers no type for a lambda with a default
            got = self._result(component, narrow)
            for name in self.outputs:
                if (found := getattr(got, name)) is not None and name != "keep":
                    assert to_numpy(found).dtype == np.float32, f"{name} in {framework} are {to_numpy(found).dtype}"
                    assert_close(to_numpy(found), getattr(expected, name), 1e-3, f"{name} in {framework}, float32")

    def test_order_of_episodes_does_not_matter(self, component: Any) -> None:
        """The same episodes in another order give the same numbers in that order."""
        @EXAMPLES
        @given(random_data.shapes())
        def holds(shape: tuple[int, list[int], list[int]]) -> None:
            episodes = episodes_of(*shape, component.needs)
            order = np.random.default_rng(shape[0]).permutation(len(shape[1])).tolist()
            self._assert_same(component, episodes, chosen(episodes, order), zip(order, range(len(order))),
                              "depend on the order of episodes")
        holds()

    def test_group_numbers_are_only_names(self, component: Any) -> None:
        """Groups numbered otherwise, not in a row and not from 0, are the same groups."""
        episodes = episodes_of(7, [2, 1, 3, 2], [0, 1, 0, 1], component.needs)
        renamed = replace(episodes, group=np.array([907, 12, 907, 12]))
        self._assert_same(component, episodes, renamed, zip(range(4), range(4)), "depend on how groups are numbered")

    def test_reaches_no_further_than_it_says(self, component: Any) -> None:
        """Episodes outside `scope`, before and behind, change nothing: no value leaks over an episode's border."""
        @EXAMPLES
        @given(random_data.shapes())
        def holds(shape: tuple[int, list[int], list[int]]) -> None:
            seed, lengths, group = shape
            episodes = episodes_of(*shape, component.needs)
            shift = 0 if self.scope == "episode" else 10
            others = episodes_of(seed + 1, lengths[::-1], [g + shift for g in group], component.needs)
            every = range(len(lengths))
            behind, before = joined(episodes, others), joined(others, episodes)
            self._assert_same(component, episodes, behind, zip(every, every), "depend on episodes behind")
            self._assert_same(component, episodes, before, ((e, len(every) + e) for e in every),
                              "depend on episodes before")
        if self.scope != "batch":
            holds()

    def test_reaches_as_far_as_it_says(self, component: Any) -> None:
        """A `scope` that is wider than the truth would leave the test above without force."""
        if self.scope == "episode":
            return
        for seed in range(20):
            episodes = episodes_of(seed, [2, 3, 1, 2], [0, 0, 0, 0], component.needs)
            others = episodes_of(seed + 100, [3, 2], [0, 0] if self.scope == "group" else [1, 1], component.needs)
            self._result(component, joined(episodes, others))
            try:
                self._assert_same(component, episodes, joined(episodes, others), zip(range(4), range(4)), "")
            except AssertionError:
                return
        pytest.fail(f"{named(component)} never depends on others of the {self.scope}: narrow the contract's scope")

    def test_survives_extreme_batches(self, component: Any) -> None:
        """One action, groups of one, equal rewards, rewards of 1e6, log-ratios of ±100: finite numbers."""
        needs = component.needs
        base = episodes_of(1, [1], [0], needs)
        many = episodes_of(2, [2] * 8, [0] * 8, needs)
        N = len(many.rewards)
        cases = {
            "an episode of one action": base,
            "groups of one": replace(many, group=np.arange(8)),
            "equal rewards in a group": replace(many, rewards=np.full(N, 0.1)),
            "rewards that are all 0": replace(many, rewards=np.zeros(N)),
            "rewards of 1e6": replace(many, rewards=many.rewards * 1e6),
            "nobody terminated": replace(many, terminated=np.zeros(8, bool)),
            "everybody terminated": replace(many, terminated=np.ones(8, bool)),
        }
        for size in (-100.0, 100.0):
            other = np.full(N, -max(0.0, size) - 0.5)
            ratio = {"logprobs": np.full(N, min(0.0, size) - 0.5), "behavior_logprobs": other, "ref_logprobs": other}
            there: dict[str, Any] = {name: x for name, x in ratio.items() if getattr(many, name) is not None}
            cases[f"a log-ratio of {size:g}"] = replace(many, **there)
        for case, episodes in cases.items():
            with np.errstate(over="ignore", under="ignore"):
                result = self._result(component, episodes)
            for name in self.outputs:
                found = getattr(result, name)
                assert found is None or np.isfinite(to_numpy(found)).all(), f"{case}: {name} are not finite: {found}"

    def _result(self, component: Any, episodes: Episodes) -> Any:
        """What a call gives; told where it is no result, or was not given since `needs` lacks a column."""
        try:
            result = component(episodes)
        except Exception as error:
            if unnamed := _read_unnamed(component, episodes):
                raise AssertionError(f"{named(component)} reads {unnamed}, which needs does not name: "
                                     f"{type(error).__name__}: {error}") from error
            raise
        assert isinstance(result, self.result), f"{named(component)} gives {type(result).__module__}." \
            f"{type(result).__name__}; return {self.result.__name__}({self.outputs[0]}, ...)"
        N, E = len(episodes.rewards), episodes.n_episodes
        for name in self.outputs:
            shape = None if getattr(result, name) is None else to_numpy(getattr(result, name)).shape
            hint = ("; x[episodes.episode] gives each action the number of its episode" if shape == (E,) else
                    "; one per action is needed, in the order of the episodes")
            assert shape is None or shape == (N,), \
                f"{name} has shape {shape} for {N} actions of {E} episodes{hint}"
        return result

    def _assert_same(self, component: Any, episodes: Episodes, other: Episodes, pairs: Iterable[tuple[int, int]],
                     what: str) -> None:
        """Results of two batches are equal for each pair of episodes, one of `episodes` and one of `other`."""
        one, two, pairs = self._result(component, episodes), self._result(component, other), list(pairs)
        for name in self.outputs:
            a, b = column(one, name), column(two, name)
            if not len(a) or not len(b):
                assert len(a) == len(b), f"{name} are there in one of two batches"
                continue
            for mine, theirs in pairs:
                rows = slice(episodes.offsets[mine], episodes.offsets[mine + 1])
                there = slice(other.offsets[theirs], other.offsets[theirs + 1])
                assert_close(b[there], a[rows], self.tolerance, f"{name} {what}")


class EstimatorContract(_OnEpisodes):
    """Contract of advantage estimators (`posttrain.protocols.Estimator`)."""

    kind = "estimator"
    protocol = Estimator
    result = Estimate
    outputs = ("advantages", "targets", "keep")

    def test_equal_answers_are_equally_good(self, component: Estimator) -> None:
        """Two answers of a group that agree in everything get the same advantages."""
        episodes = episodes_of(9, [2, 3, 1], [0, 0, 0], component.needs)
        twice = chosen(episodes, [0, 1, 0, 2])
        A = to_numpy(self._result(component, twice).advantages)
        assert_close(A[5:7], A[0:2], self.tolerance, "advantages of equal answers to one prompt differ")

    def test_targets_are_there_where_values_are(self, component: Estimator) -> None:
        """A critic is trained on `targets`: an estimator that reads values gives them."""
        estimate: Estimate = self._result(component, episodes_of(4, [2, 3], [0, 0], component.needs))
        if Need.VALUES in component.needs:
            assert estimate.targets is not None, f"{named(component)} reads values and gives no targets"


class CorrectionContract(_OnEpisodes):
    """Contract of off-policy corrections (`posttrain.protocols.Correction`)."""

    kind = "correction"
    protocol = Correction
    result = Corrected
    outputs = ("weight", "keep")

    def test_does_nothing_on_policy(self, component: Correction) -> None:
        """Where the sampler's log-probs are the policy's, all weights are 1 and every action stays."""
        episodes = episodes_of(6, [2, 3, 1], [0, 0, 1], component.needs)
        on_policy = replace(episodes, behavior_logprobs=episodes.logprobs)
        corrected: Corrected = self._result(component, on_policy)
        assert_close(to_numpy(corrected.weight), np.ones(6), 1e-12, "weights on policy are not 1")
        assert to_numpy(corrected.keep).all(), f"{named(component)} drops actions on policy"

    def test_weights_are_not_negative(self, component: Correction) -> None:
        """A weight is a ratio of probabilities, bounded or not."""
        @EXAMPLES
        @given(random_data.shapes())
        def holds(shape: tuple[int, list[int], list[int]]) -> None:
            weight = to_numpy(self._result(component, episodes_of(*shape, component.needs)).weight)
            assert (weight >= 0).all(), f"negative weights: {weight[weight < 0]}"
        holds()


def column(result: Any, name: str) -> np.ndarray:
    """A column of a result; empty where it is None."""
    found = getattr(result, name)
    return np.zeros(0) if found is None else to_numpy(found)


def _read_unnamed(component: Any, episodes: Episodes) -> str:
    """The first column beside those of `needs` without which the call fails and with which it does not; empty where it
    fails of something else."""
    every = episodes_of(0, episodes.lengths.tolist(), episodes.group.tolist(), frozenset(COLUMNS))
    own = {name for need in component.needs for name in COLUMNS.get(need, ())}
    unnamed = [name for name in dict.fromkeys(name for names in COLUMNS.values() for name in names) if name not in own]
    more: dict[str, Any] = {name: like(getattr(every, name), episodes.rewards) if name in FLOATS
                            else getattr(every, name) for name in unnamed}
    rich = replace(episodes, **more)
    if _fails(component, rich):
        return ""
    nothing: list[dict[str, Any]] = [{name: None} for name in unnamed]
    return next((f"Episodes.{name}" for name, absent in zip(unnamed, nothing)
                 if _fails(component, replace(rich, **absent))), "")


def _fails(component: Any, episodes: Episodes) -> bool:
    try:
        component(episodes)
    except Exception:
        return True
    return False
