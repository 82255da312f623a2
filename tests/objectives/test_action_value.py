"""The loss of action values: a literal oracle, finite differences, the loss of values, and what every loss owes."""

from __future__ import annotations

import numpy as np
import pytest
from objectives.cases import (
    COEF,
    FRAMEWORKS,
    Case,
    averaged,
    central_differences,
    evaluate,
    part_of,
    random_case,
    weighted,
    with_dummy,
)
from posttrain.data import Counts
from posttrain.protocols import Need, Output
from posttrain_objectives.value import ActionValue, Value

COMPONENTS = {"mean": ActionValue(), "sequence": ActionValue(denominator="sequence_mean")}
every_component = pytest.mark.parametrize("objective", COMPONENTS.values(), ids=COMPONENTS)


def prepared(objective: ActionValue, seed: int, heads: int = 2) -> Case:
    """Action values that are not the values."""
    case = random_case(seed, heads=heads)
    Q = case.outputs["values"] + np.random.default_rng(seed + 50).normal(size=case.outputs["values"].shape)
    return weighted(case.with_outputs(action_values=Q), objective.weights(case.counts))


def oracle(p: ActionValue, case: Case, Q: np.ndarray) -> float:
    total = 0.0
    for j in range(len(Q)):
        losses = np.array([0.5 * (Q[j, n] - case.columns["targets"][j, n]) ** 2 for n in range(Q.shape[1])])
        total += averaged(case.rows(losses), p.denominator)
    return COEF["value"] * total


@every_component
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_equals_the_literal_oracle_and_its_differences(objective: ActionValue, heads: int, framework: str) -> None:
    case = prepared(objective, 1, heads)
    Q = case.outputs["action_values"]
    found = evaluate(framework, objective, case)
    assert found.value == pytest.approx(oracle(objective, case, Q), rel=1e-12)
    assert found.terms == {"value": pytest.approx(found.value / COEF["value"])}
    if found.gradients:
        expected = central_differences(lambda at: oracle(objective, case, at), Q)
        np.testing.assert_allclose(found.gradients["action_values"], expected, rtol=1e-6, atol=1e-8)
        assert [name for name, g in found.gradients.items() if g.any()] == ["action_values"]


@pytest.mark.parametrize("heads", [1, 2])
def test_is_the_loss_of_values_where_they_are_the_action_values(heads: int) -> None:
    case = prepared(ActionValue(), 2, heads)
    same = case.with_outputs(values=case.outputs["action_values"])
    a, b = evaluate("torch", ActionValue(), case), evaluate("torch", Value(), same)
    assert (a.value, a.terms, a.metrics) == (b.value, b.terms, b.metrics)
    np.testing.assert_array_equal(a.gradients["action_values"], b.gradients["values"])


@every_component
def test_any_split_into_parts_and_dummy_actions_change_nothing(objective: ActionValue) -> None:
    case = part_of(prepared(objective, 6), (2, 4, 0, 3))
    whole = evaluate("torch", objective, case)
    first, *rest = (evaluate("torch", objective, part_of(case, [e])) for e in range(4))
    for found in (sum(rest, first), evaluate("torch", objective, with_dummy(case, 5))):
        assert found.value == pytest.approx(whole.value, rel=1e-12)
        assert found.metrics == {n: pytest.approx(pair, rel=1e-12, abs=1e-13) for n, pair in whole.metrics.items()}
        gradient, other = whole.gradients["action_values"], found.gradients["action_values"]
        np.testing.assert_allclose(other[..., :13], gradient, rtol=1e-12, atol=1e-15)
        assert not other[..., 13:].any()


@every_component
def test_weights_of_two_ranks_add_up(objective: ActionValue) -> None:
    whole = prepared(objective, 7)
    total = whole.counts
    def local(case: Case) -> Case:
        return weighted(case, objective.weights(Counts(total.actions, total.episodes, case.counts.episode_actions)))
    ranks = [evaluate("torch", objective, local(part_of(whole, part))) for part in ((0, 1, 2), (3, 4))]
    assert (ranks[0] + ranks[1]).value == pytest.approx(evaluate("torch", objective, local(whole)).value, rel=1e-12)


def test_needs_outputs_unit_and_slots() -> None:
    objective = ActionValue()
    assert (objective.needs, objective.outputs) == ({Need.TARGETS}, {Output.ACTION_VALUES})
    assert (objective.unit, objective.slots) == ("action", ("main",))
    assert hash(objective) == hash(ActionValue())


def test_what_is_missing_or_without_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="token_mean, sequence_mean"):
        ActionValue(denominator="constant")  # type: ignore[arg-type]  # what a config might say
    case = prepared(ActionValue(), 3)
    with pytest.raises(ValueError, match=r"MicroBatch\.targets is missing"):
        evaluate("numpy", ActionValue(), case.with_columns(targets=None))
    without = Case(case.lengths, {n: x for n, x in case.outputs.items() if n != "action_values"}, case.columns)
    with pytest.raises(ValueError, match=r"TokenOutputs\.action_values is missing"):
        evaluate("numpy", ActionValue(), without)
