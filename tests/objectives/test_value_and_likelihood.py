"""Value, action-value, entropy and likelihood objectives against literal oracles, finite differences, and the seam's
promises."""

from __future__ import annotations

import math
from dataclasses import replace

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
from posttrain.protocols import Need, Objective, Output
from posttrain_objectives.entropy import Entropy
from posttrain_objectives.likelihood import SFT
from posttrain_objectives.value import ActionValue, Value

VALUES = {"mse": Value(), "clipped": Value(clip=0.3), "sequence": Value(clip=0.3, denominator="sequence_mean")}
ACTION_VALUES = {"action": ActionValue(), "action_sequence": ActionValue(denominator="sequence_mean")}
CRITICS = {**VALUES, **ACTION_VALUES}
OTHERS = {"entropy": Entropy(), "sft": SFT(), "sft_sequence": SFT(denominator="sequence_mean")}
ALL: dict[str, Objective] = {**CRITICS, **OTHERS}
every_objective = pytest.mark.parametrize("objective", ALL.values(), ids=ALL)
differentiable = pytest.mark.parametrize("framework", ("torch", "jax"))


def prepared(objective: Objective, seed: int, heads: int = 2) -> Case:
    """With action values that are not the values."""
    case = random_case(seed, heads=heads)
    Q = case.outputs["values"] + np.random.default_rng(seed + 50).normal(size=case.outputs["values"].shape)
    return weighted(case.with_outputs(action_values=Q), objective.weights(case.counts))


def oracle_of_critics(p: Value | ActionValue, case: Case, v: np.ndarray) -> float:
    total = 0.0
    for j in range(len(v)):
        losses = np.zeros(v.shape[1])
        for n in range(v.shape[1]):
            G, old = case.columns["targets"][j, n], case.columns["old_values"][j, n]
            losses[n] = 0.5 * (v[j, n] - G) ** 2
            if isinstance(p, Value) and p.clip:
                bounded = min(max(v[j, n], old - p.clip), old + p.clip)
                losses[n] = max(losses[n], 0.5 * (bounded - G) ** 2)
        total += averaged(case.rows(losses), p.denominator)
    return COEF["value"] * total


@pytest.mark.parametrize("objective", CRITICS.values(), ids=CRITICS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_loss_of_critics_equals_literal_oracle_and_its_differences(objective: Value | ActionValue,
                                                                   framework: str) -> None:
    (name,) = objective.outputs
    for seed, heads in ((0, 2), (1, 2), (1, 1)):
        case = prepared(objective, seed, heads)
        v = case.outputs[name]
        found = evaluate(framework, objective, case)
        assert found.value == pytest.approx(oracle_of_critics(objective, case, v), rel=1e-12)
        assert found.terms == {"value": pytest.approx(found.value / COEF["value"])}
        if found.gradients:
            expected = central_differences(lambda at, case=case: oracle_of_critics(objective, case, at), v)
            np.testing.assert_allclose(found.gradients[name], expected, rtol=1e-6, atol=1e-8)
            assert [n for n, g in found.gradients.items() if g.any()] == [name]


@pytest.mark.parametrize("heads", [1, 2])
def test_is_the_loss_of_values_where_they_are_the_action_values(heads: int) -> None:
    case = prepared(ActionValue(), 2, heads)
    same = case.with_outputs(values=case.outputs["action_values"])
    a, b = evaluate("torch", ActionValue(), case), evaluate("torch", Value(), same)
    assert (a.value, a.terms, a.metrics) == (b.value, b.terms, b.metrics)
    np.testing.assert_array_equal(a.gradients["action_values"], b.gradients["values"])


def test_what_is_missing_for_action_values_is_refused() -> None:
    case = prepared(ActionValue(), 3)
    with pytest.raises(ValueError, match=r"MicroBatch\.targets is missing"):
        evaluate("numpy", ActionValue(), case.with_columns(targets=None))
    without = Case(case.lengths, {n: x for n, x in case.outputs.items() if n != "action_values"}, case.columns)
    with pytest.raises(ValueError, match=r"TokenOutputs\.action_values is missing"):
        evaluate("numpy", ActionValue(), without)


@differentiable
def test_value_clip_holds_only_where_it_makes_the_loss_larger(framework: str) -> None:
    v, old, G = np.array([[2.0, 2.0, 0.1, -2.0]]), np.zeros((1, 4)), np.array([[3.0, 0.5, 5.0, -0.5]])
    case = random_case(0, lengths=(4,)).with_outputs(values=v).with_columns(old_values=old, targets=G)
    objective = Value(clip=0.3)
    found = evaluate(framework, objective, weighted(case, objective.weights(case.counts)))
    np.testing.assert_array_equal(found.gradients["values"] != 0, [[False, True, True, True]])
    assert found.metrics["value/clipped"] == (1.0, 4.0)


@differentiable
def test_value_clip_without_old_values_is_no_clip_yet(framework: str) -> None:
    case = prepared(Value(), 3).with_columns(old_values=None)
    plain, clipped = evaluate(framework, Value(), case), evaluate(framework, Value(clip=0.3), case)
    assert clipped.value == plain.value and clipped.metrics["value/clipped"][0] == 0.0
    np.testing.assert_allclose(clipped.gradients["values"], plain.gradients["values"], rtol=1e-15)


@pytest.mark.parametrize("heads", [1, 2])
def test_value_metrics_give_the_explained_variance(heads: int) -> None:
    case = prepared(Value(denominator="sequence_mean"), 4, heads)
    parts = [evaluate("numpy", Value(denominator="sequence_mean"), part_of(case, part)) for part in ([0, 2], [3, 4])]
    metrics = {name: total / weight for name, (total, weight) in (parts[0] + parts[1]).metrics.items()}
    for j in range(heads):
        prefix = "value" if heads == 1 else f"value/{j}"
        def moment(name: str, prefix: str = prefix) -> float:
            return metrics[f"{prefix}/{name}"]
        G, v = case.columns["targets"][j], case.outputs["values"][j]
        found = 1 - (moment("error_squared") - moment("error") ** 2) / (moment("target_squared") -
                                                                         moment("target") ** 2)
        assert found == pytest.approx(1 - np.var(G - v) / np.var(G), rel=1e-10)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_entropy_and_likelihood_equal_literal_oracles(framework: str) -> None:
    case = random_case(5)
    for objective, name, how, coef in [(Entropy(), "entropy", "token_mean", COEF["entropy"]),
                                       (SFT(), "logprobs", "token_mean", 1.0),
                                       (SFT(denominator="sequence_mean"), "logprobs", "sequence_mean", 1.0)]:
        def oracle(x: np.ndarray, how: str = how, coef: float = coef) -> float:
            return -coef * averaged(case.rows(x), how)
        x = case.outputs[name]
        found = evaluate(framework, objective, weighted(case, objective.weights(case.counts)))
        assert found.value == pytest.approx(oracle(x), rel=1e-12)
        if found.gradients:
            np.testing.assert_allclose(found.gradients[name], central_differences(oracle, x), rtol=1e-6, atol=1e-9)
            assert [n for n, g in found.gradients.items() if g.any()] == [name]
        if isinstance(objective, SFT):
            assert found.metrics == {"sft/nll": (pytest.approx(-x.sum()), 13.0)}


@every_objective
def test_any_split_into_parts_and_dummy_actions_change_nothing(objective: Objective) -> None:
    case = part_of(prepared(objective, 6), (2, 4, 0, 3))
    whole = evaluate("torch", objective, case)
    first, *rest = (evaluate("torch", objective, part_of(case, [e])) for e in range(4))
    for found in (sum(rest, first), evaluate("torch", objective, with_dummy(case, 5))):
        assert found.value == pytest.approx(whole.value, rel=1e-12)
        assert found.metrics == {n: pytest.approx(pair, rel=1e-12, abs=1e-13) for n, pair in whole.metrics.items()}
        for name, gradient in whole.gradients.items():
            np.testing.assert_allclose(found.gradients[name][..., :13], gradient, rtol=1e-12, atol=1e-15)
            assert not found.gradients[name][..., 13:].any()


@every_objective
def test_weights_of_two_ranks_add_up(objective: Objective) -> None:
    whole = prepared(objective, 7)
    total = whole.counts
    def local(case: Case) -> Case:
        return weighted(case, objective.weights(Counts(total.actions, total.episodes, case.counts.episode_actions)))
    ranks = [evaluate("torch", objective, local(part_of(whole, part))) for part in ((0, 1, 2), (3, 4))]
    assert (ranks[0] + ranks[1]).value == pytest.approx(evaluate("torch", objective, local(whole)).value, rel=1e-12)


def test_needs_outputs_unit_and_slots() -> None:
    expected = {
        Value(): ({Need.TARGETS}, {Output.VALUES}), Value(clip=0.2): ({Need.TARGETS, Need.VALUES}, {Output.VALUES}),
        ActionValue(): ({Need.TARGETS}, {Output.ACTION_VALUES}),
        Entropy(): (set(), {Output.ENTROPY}), SFT(): (set(), {Output.LOGPROBS})}
    for objective, (needs, outputs) in expected.items():
        assert (objective.needs, objective.outputs) == (needs, outputs)
        assert (objective.unit, objective.slots) == ("action", ("main",))
        assert hash(objective) == hash(replace(objective))


@pytest.mark.parametrize("component, fields, message", [
    (Value, {"clip": -0.1}, "clip"), (Value, {"clip": math.nan}, "clip"),
    (Value, {"denominator": "constant"}, "token_mean, sequence_mean"),
    (ActionValue, {"denominator": "constant"}, "token_mean, sequence_mean"),
    (SFT, {"denominator": "token_men"}, "did you mean 'token_mean'"),
])
def test_fields_without_meaning_are_refused(component: type, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        component(**fields)
