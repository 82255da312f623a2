"""The losses of policies and critics, and their gradients, are those of an independent library, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from posttrain.data import Counts, MicroBatch, TokenOutputs
from posttrain.ops import ops_of
from posttrain.protocols import Objective
from posttrain_objectives.plugin import components
from posttrain_objectives.policy_gradient import PolicyGradient
from posttrain_objectives.value import Value

from .answers import Case, answers

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.oracle, pytest.mark.needs("torch")]
AVERAGES: Mapping[str, Mapping[str, Any]] = {
    "token-mean": {"denominator": "token_mean"}, "seq-mean-token-mean": {"denominator": "sequence_mean"},
    "seq-mean-token-sum": {"denominator": "constant", "length": 1},
    "seq-mean-token-sum-norm": {"denominator": "constant", "length": 17}}
"""The library's names of averages -> our fields."""
NONE = 1e9
"""A bound of the library's that never binds."""
TOLERANCE = 1e-10
"""Relative to the largest number."""
GUARD = 1e-8
"""What the library adds to the length of a row before it divides by it; done here too, so that the rest is compared
exactly."""


def clips(case: Case) -> dict[str, Any]:
    names = {"clip_ratio_low": "clip_low", "clip_ratio_high": "clip_high"}
    return {ours: case.settings[theirs] for theirs, ours in names.items()}


def vanilla(case: Case) -> Objective:
    bound = case.settings["clip_ratio_c"]
    return PolicyGradient(**clips(case), **AVERAGES[case.settings["mode"]], dual_clip=0.0 if bound == NONE else bound)


def gspo(case: Case) -> Objective:
    return PolicyGradient(ratio="sequence", **clips(case), **AVERAGES[case.settings["mode"]])


def cispo(case: Case) -> Objective:
    """The library's upper bound is a distance from 1."""
    cap = 1.0 + case.settings["clip_ratio_high"]
    return PolicyGradient(surrogate="cispo", cap=cap, **AVERAGES[case.settings["mode"]])


def sapo(case: Case) -> Objective:
    return PolicyGradient(surrogate="sapo", tau_positive=case.settings["tau_pos"],
                          tau_negative=case.settings["tau_neg"], **AVERAGES[case.settings["mode"]])


def value(case: Case) -> Objective:
    bound = case.settings["clip"]
    return Value(clip=0.0 if bound == NONE else bound, denominator=AVERAGES[case.settings["mode"]]["denominator"])


OURS: Mapping[str, Callable[[Case], Objective]] = {
    "vanilla": vanilla, "gspo": gspo, "cispo": cispo, "sapo": sapo, "value": value}


def said(case: Case) -> tuple[float, np.ndarray]:
    """Our loss of the case, and its gradient [N]."""
    objective, columns, E = OURS[case.function](case), case.columns, len(case.lengths)
    N = int(case.lengths.sum())
    weights = objective.weights(Counts(N, E, case.lengths))
    corrected = 0.5 + np.exp(columns["behavior_logprobs"]) if case.settings.get("weighed") else np.ones(N)
    length = np.repeat(case.lengths, case.lengths)
    guarded = length / (length + GUARD) if case.settings["mode"] == "seq-mean-token-mean" else np.ones(N)
    def column(x: np.ndarray | None) -> Any:
        return torch.tensor(np.zeros(N) if x is None else x)
    index = np.arange(N)
    batch = MicroBatch(
        tokens=torch.zeros(N, dtype=torch.int64), sequence=torch.tensor(index), positions=torch.tensor(index),
        token_weight=column(None), source=torch.tensor(index),
        episode=torch.tensor(np.repeat(np.arange(E), case.lengths)), group=torch.arange(E),
        count=torch.tensor(case.lengths), last=torch.tensor(np.cumsum(case.lengths) - 1),
        weight=column(None if weights.weight is None else weights.weight * corrected * guarded),
        kl_weight=column(weights.kl_weight),
        value_weight=column(None if weights.value_weight is None else weights.value_weight * guarded),
        advantages=column(columns["rewards"]), old_logprobs=column(columns["behavior_logprobs"]),
        targets=column(columns["action_values"])[None], old_values=column(columns["expected_action_values"])[None])
    logprobs = torch.tensor(columns["logprobs"], requires_grad=True)
    values = torch.tensor(columns["values"], requires_grad=True)
    loss = objective(ops_of(logprobs), TokenOutputs(logprobs, values=values[None]), batch, {"value": 1.0})
    (total,) = (term.coef * term.total for term in loss.terms.values())
    total.backward()
    return total.item(), (values if case.function == "value" else logprobs).grad.numpy()


@pytest.mark.parametrize("function", OURS)
def test_loss_and_gradient_are_the_library_s(function: str) -> None:
    cases = [case for case in answers("verl_losses") if case.function == function]
    assert len(cases) >= 12
    for case in cases:
        loss, gradient = said(case)
        expected = case.results["gradient"]
        assert loss == pytest.approx(float(case.results["loss"][0]), rel=TOLERANCE, abs=1e-12), str(case)
        np.testing.assert_allclose(gradient, expected, rtol=0.0, atol=TOLERANCE * np.abs(expected).max(),
                                   err_msg=f"gradient of {case}")


def test_every_bound_binds_somewhere_in_the_fixture() -> None:
    """A comparison in which nothing is clipped would compare little."""
    cases = [case for case in answers("verl_losses") if case.function == "vanilla"]
    r = np.concatenate([np.exp(c.columns["logprobs"] - c.columns["behavior_logprobs"]) for c in cases])
    A = np.concatenate([c.columns["rewards"] for c in cases])
    for share in ((r > 1.4) & (A > 0), (r < 0.6) & (A < 0), (r > 3) & (A < 0), r > 5, np.abs(r - 1) < 3e-4):
        assert 0 < share.mean() < 1


def test_every_surrogate_has_been_compared() -> None:
    fields = {component.defaults.get("surrogate", "clip") for component in components()
              if component.target.endswith(":PolicyGradient")}
    assert fields - {"reinforce"} == {"clip", "cispo", "sapo"}
