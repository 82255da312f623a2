"""What the contracts say to an author who never read their source: what is wrong, and how it is mended."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final

import numpy as np
import pytest
from posttrain.data import Array, Counts, Episodes, Estimate, Loss, Metrics, MicroBatch, Term, TokenOutputs, Weights
from posttrain.hookspecs import Component, hookimpl
from posttrain.ops import Ops, segment_sum
from posttrain.protocols import Corrected, Need, Output
from posttrain.testing import (
    ComponentContract,
    CorrectionContract,
    EstimatorContract,
    Example,
    ObjectiveContract,
    RewardContract,
    failures,
)


def says(contract: type[ComponentContract], component: Any, test: str) -> str:
    """The message of the one test."""
    found = dict(failures(contract, component, only=test))
    assert test in found, f"{type(component).__name__} passes {test}"
    return found[test]


# ---- what is on the action axis


class Sums(EstimatorContract):
    """The reward of the episode."""

    def oracle(self, component: Any, episodes: Episodes) -> Sequence[float]:
        return [sum(episodes.rewards[a:b]) for a, b in zip(episodes.offsets, episodes.offsets[1:]) for _ in range(a, b)]


def estimator(needs: Iterable[Need], formula: Any) -> Any:
    """An estimator whose result is `formula(episodes)`."""
    members = {"needs": frozenset(needs), "__call__": lambda self, episodes, /: formula(episodes), "__doc__": "Any.",
               "__module__": __name__}
    cls: Any = final(dataclass(frozen=True)(type("Mine", (), members)))
    return cls()


def sums(episodes: Episodes) -> Array:
    return segment_sum(episodes.rewards, episodes.episode, episodes.n_episodes)


NEVER_MISSED = estimator({Need.VALUES}, lambda e: Estimate(sums(e)[e.episode], sums(e)[e.episode]))
UNTOLD = estimator({Need.VALUES}, lambda e: Estimate(e.rewards - e.values, e.values))
UNNAMED = estimator((), lambda e: Estimate(e.rewards - e.values))
UNCORRECTED = estimator({Need.LOGPROBS}, lambda e: Corrected(np.exp(e.logprobs - e.behavior_logprobs), e.logprobs < 1,
                                                             Metrics()))
BARE = estimator((), lambda e: sums(e)[e.episode])
PER_EPISODE = estimator((), lambda e: Estimate(sums(e)))
SHORT = estimator((), lambda e: Estimate(sums(e)[e.episode][1:]))
BROKEN = estimator((), lambda e: Estimate(e.rewards / e.nothing))


def test_a_need_that_is_never_missed() -> None:
    said = says(Sums, NEVER_MISSED, "test_needs_what_it_says_and_nothing_else")
    assert "Mine().needs names VALUES" in said and "raise ValueError where the column is None, or take it out" in said


def test_a_missing_column_that_is_not_told() -> None:
    said = says(Sums, UNTOLD, "test_needs_what_it_says_and_nothing_else")
    assert "without Episodes.values and Episodes.bootstrap_values it must raise a ValueError that names" in said
    assert "got TypeError: unsupported operand" in said


@pytest.mark.parametrize("test", ["test_equals_its_oracle", "test_is_pure", "test_survives_extreme_batches"])
def test_a_column_beside_needs_is_named_by_whatever_test_comes_first(test: str) -> None:
    assert "Mine() reads Episodes.values, which needs does not name: TypeError" in says(Sums, UNNAMED, test)


def test_a_correction_that_reads_beside_its_needs() -> None:
    said = says(CorrectionContract, UNCORRECTED, "test_has_one_number_per_action")
    assert "reads Episodes.behavior_logprobs, which needs does not name" in said


def test_an_error_of_another_sort_stays_what_it_is() -> None:
    assert "AttributeError: 'Episodes' object has no attribute 'nothing'" in says(Sums, BROKEN, "test_is_pure")


@pytest.mark.parametrize(("component", "expected"), [
    (BARE, "Mine() gives numpy.ndarray; return Estimate(advantages, ...)"),
    (PER_EPISODE, "x[episodes.episode] gives each action the number of its episode"),
    (SHORT, "one per action is needed, in the order of the episodes")])
def test_what_is_no_result(component: Any, expected: str) -> None:
    for test in ("test_equals_its_oracle", "test_has_one_number_per_action", "test_order_of_episodes_does_not_matter"):
        assert expected in says(Sums, component, test)


# ---- fields


@final
@dataclass(frozen=True, slots=True)
class Constant:
    """A limit that no configuration can set."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    SCALE: ClassVar[float] = 1.0
    _seen = 0
    limit = 5.0

    @property
    def sized(self) -> bool:
        return True

    def __call__(self, episodes: Episodes, /) -> Estimate:
        return Estimate(episodes.rewards)


@final
@dataclass(frozen=True)
class WideClip:
    """A list as a field."""

    slots: list[str] = field(default_factory=lambda: ["main"])
    """Names."""
    needs: ClassVar[frozenset[Need]] = frozenset()


@final
@dataclass(frozen=True)
class Tupled:
    """A tuple that is annotated as a list."""

    slots: list[str] = field(default_factory=lambda: ("main",))  # type: ignore[arg-type,return-value]  # the mistake
    """Names."""
    needs: ClassVar[frozenset[Need]] = frozenset()


def test_an_attribute_without_annotation_is_no_field() -> None:
    said = says(Sums, Constant(), "test_every_field_is_typed_defaulted_and_documented")
    assert "Constant.limit has no annotation, so it is no field" in said and "write limit: float = 5.0" in said


def test_a_list_is_not_hashable_and_does_not_come_back() -> None:
    said = says(ObjectiveContract, WideClip(), "test_is_a_final_frozen_dataclass")
    assert "WideClip.slots is ['main'], which is not hashable" in said and "tuple[...]" in said
    said = says(Sums, Tupled(), "test_survives_a_configuration_file")
    assert "slots was ('main',) and is ['main']" in said and "annotate it tuple[...]" in said


def test_what_no_plugin_declares() -> None:
    said = says(Sums, Constant(), "test_is_found_by_its_name")
    for part in (f"{__name__}:Constant as estimator", "components()", "'posttrain.v1'", "pip install --editable .",
                 "`plugins` of the contract"):
        assert part in said


# ---- objectives


@final
@dataclass(frozen=True)
class Plain:
    """-A log pi, mean over actions; keeps the contract."""

    slots: tuple[str, ...] = ("main",)
    """One per reward column."""
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ADVANTAGES})
    outputs: ClassVar[frozenset[Output]] = frozenset({Output.LOGPROBS})
    unit: ClassVar[Literal["action", "episode", "group"]] = "action"

    def weights(self, counts: Counts) -> Weights:
        w = np.full(int(counts.episode_actions.sum()), 1.0 / max(counts.actions, 1))
        return Weights(weight=w, kl_weight=w)

    def loss(self, ops: Ops, weight: Array, x: Array) -> Array:
        return ops.xp.sum(weight * x)

    def __call__(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Array]) -> Loss:
        if batch.advantages is None:
            raise ValueError("MicroBatch.advantages is missing")
        A = ops.stop_gradient(ops.xp.reshape(batch.advantages, (len(self.slots), -1)))
        return Loss({slot: Term(self.loss(ops, batch.weight, -A[i] * out.logprobs), slot=slot)
                     for i, slot in enumerate(self.slots)})


@hookimpl
def components() -> Iterable[Component]:
    """This module is a plugin that declares what is right in it."""
    return [Component("objective", "plain", f"{__name__}:Plain", "log-probs times advantages")]


class PlainContract(ObjectiveContract):
    plugins = (sys.modules[__name__],)

    def oracle(self, component: Any, out: TokenOutputs, held: TokenOutputs, batch: MicroBatch,
               coef: Mapping[str, float]) -> float:
        assert batch.advantages is not None
        return -math.fsum(w * A * x for w, A, x in zip(batch.weight, batch.advantages, out.logprobs))

    def average(self, component: Any, column: str, rows: list[list[float]]) -> float:
        return math.fsum(x for row in rows for x in row) / sum(map(len, rows))


class TestPlain(PlainContract):
    components = (Plain(),)


def altered(**members: Any) -> Any:
    """`Plain` with other members."""
    own = {name: member for name, member in vars(Plain).items() if not name.startswith("__") or name == "__call__"}
    members = {**own, "__doc__": "Any.", "__module__": __name__, "__annotations__": {"slots": "tuple[str, ...]"},
               **members}
    cls: Any = final(dataclass(frozen=True)(type("Mine", (), members)))
    return cls()


def per_episode(self: Any, counts: Counts) -> Weights:
    w = np.full(len(counts.episode_actions), 1.0 / max(counts.episodes, 1))
    return Weights(weight=w, kl_weight=w)


def one_number(self: Any, counts: Counts) -> Weights:
    return Weights(weight=np.ones(1), kl_weight=np.ones(1))


def mean(self: Any, ops: Ops, weight: Array, x: Array) -> Array:
    return ops.xp.mean(weight * x)


@pytest.mark.parametrize("weights", [per_episode, one_number])
def test_weights_on_another_axis(weights: Any) -> None:
    for test in ("test_weights_are_one_number_per_kept_action", "test_equals_its_oracle"):
        said = says(PlainContract, altered(weights=weights), test)
        assert "Mine.weights gave weight of shape" in said and "one number per kept action is needed" in said
    said = says(PlainContract, altered(weights=weights), "test_weights_are_one_number_per_kept_action")
    assert "for 3 episodes with 5 kept actions" in said
    assert ("np.repeat(x, counts.episode_actions)" in said) == (weights is per_episode)


def test_a_mean_is_told_first_and_by_its_name() -> None:
    component = altered(loss=mean)
    assert "nothing is a mean()" in says(PlainContract, component, "test_actions_without_weight_change_nothing")
    said = says(PlainContract, component, "test_equals_its_oracle")
    assert "where the loss calls mean(), test_actions_without_weight_change_nothing" in said
    order = [name for name in vars(ObjectiveContract) if name.startswith("test_")]
    for earlier in ("test_weights_are_one_number_per_kept_action", "test_does_not_average_by_itself",
                    "test_actions_without_weight_change_nothing"):
        assert order.index(earlier) < order.index("test_equals_its_oracle")


# ---- rewards


@final
@dataclass(frozen=True)
class Quotient:
    """The quotient of the answer's length and its last letter's code."""

    fault: Literal["raises", "returns"] = "raises"
    """How it fails."""

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[Any]:
        if self.fault == "raises":
            return [1.0 / len(text) for text in completions]
        return ["long" if not text else float(len(text)) for text in completions]


class Quotients(RewardContract):
    def examples(self, component: Any) -> Sequence[Example]:
        return [Example("ab", 0.5), Example("abcd", 0.25), Example("", 0.0)]


def test_a_reward_that_raises_is_told_as_a_run_tells_it() -> None:
    for test in ("test_gives_the_examples_rewards", "test_survives_hostile_answers"):
        said = says(Quotients, Quotient(), test)
        assert "reward 'Quotient()' raised ZeroDivisionError: " in said and f" at {__file__}:" in said
        assert "Raised(" not in said and "\\n" not in said and "\nTraceback (most recent call last):\n" in said
    said = says(Quotients, Quotient("returns"), "test_gives_the_examples_rewards")
    assert "reward 'Quotient(fault='returns')' returned 'long' (str), which is no number on the example ''" in said


def test_no_message_is_tried_on_what_is_right() -> None:
    """The right one of each table above passes: its fault alone is what the messages tell."""
    assert not list(failures(TestPlain))
    right = estimator((), lambda e: Estimate(sums(e)[e.episode]))
    for test in ("test_equals_its_oracle", "test_needs_what_it_says_and_nothing_else", "test_is_pure"):
        assert not list(failures(Sums, right, only=test))
    for test, component in (("test_every_field_is_typed_defaulted_and_documented", WideClip()),
                            ("test_is_a_final_frozen_dataclass", Plain()), ("test_is_found_by_its_name", Plain())):
        assert not list(failures(PlainContract, component, only=test))
