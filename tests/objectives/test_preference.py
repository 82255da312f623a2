"""Losses of pairs against closed forms: derivatives in Delta, what they prefer, metrics, and fields without meaning."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from objectives import cases
from objectives.cases import FRAMEWORKS, Case, evaluate, random_case, weighted
from posttrain.data import MicroBatch
from posttrain.protocols import Need, Objective, Output
from posttrain_objectives.preference import DPO, BradleyTerry

pytestmark = pytest.mark.filterwarnings("error")
differentiable = pytest.mark.parametrize("framework", ("torch", "jax"))
BETA = 0.3
DERIVATIVES: dict[DPO, Callable[[float], float]] = {
    DPO(beta=BETA): lambda x: -BETA / (1 + math.exp(BETA * x)),
    DPO(beta=BETA, label_smoothing=0.1): lambda x: -BETA * (0.9 - 1 / (1 + math.exp(-BETA * x))),
    DPO(beta=BETA, loss="ipo"): lambda x: 2 * (x - 1 / (2 * BETA)),
    DPO(beta=BETA, loss="hinge"): lambda x: -BETA if x < 1 / BETA else 0.0,
}
"""dL/dDelta: Rafailov et al. 2023, section 4; for smoothing, 1 - eps of it and eps of the contrary."""


def pairs(lengths: tuple[int, ...] = (3, 2, 1, 4, 2, 2), seed: int = 0, spread: float = 1.5) -> Case:
    """Episodes 2 i and 2 i + 1 are a pair; in pairs of odd number the second answer is the better one."""
    case = random_case(seed, lengths, spread=spread)
    better = np.arange(len(lengths)) % 2 == np.arange(len(lengths)) // 2 % 2
    return case.with_columns(preferred=better[case.episode].astype(float))


@pytest.fixture(autouse=True)
def grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches of these tests have pairs for groups, and say which answer is preferred."""
    plain = cases.micro_batch

    def with_pairs(case: Case, asarray: Callable[[np.ndarray], object]) -> MicroBatch:
        group = asarray(np.arange(len(case.lengths)) // 2)
        return replace(plain(case, asarray), group=group, preferred=asarray(case.columns["preferred"]))
    monkeypatch.setattr(cases, "micro_batch", with_pairs)


def prepared(objective: Objective, case: Case) -> Case:
    return weighted(case, objective.weights(case.counts))


def deltas(case: Case, column: np.ndarray) -> list[float]:
    """Of each pair: the sum of the better answer's numbers less that of the other."""
    sums = [float(row.sum()) for row in case.rows(column)]
    sign = [1.0 if row[0] else -1.0 for row in case.rows(case.columns["preferred"])]
    return [sums[i] * sign[i] + sums[i + 1] * sign[i + 1] for i in range(0, len(sums), 2)]


@differentiable
@pytest.mark.parametrize("objective", DERIVATIVES, ids=str)
def test_derivative_in_delta_is_the_closed_form(objective: DPO, framework: str) -> None:
    """Delta moves by 1 with each log-prob of the better answer, and by -1 with each of the other."""
    case = prepared(objective, pairs())
    Delta = deltas(case, case.outputs["logprobs"] - case.columns["ref_logprobs"])
    found = evaluate(framework, objective, case).gradients["logprobs"]
    expected = [DERIVATIVES[objective](Delta[e // 2]) / len(Delta) * (1.0 if good else -1.0)
                for e, good in zip(case.episode, case.columns["preferred"])]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
    if objective.loss != "hinge":
        assert (found[case.columns["preferred"] == 1] != 0).all()


@differentiable
def test_length_normalised_delta_is_a_difference_of_means(framework: str) -> None:
    objective = DPO(length_normalised=True, beta=2.0)
    case = prepared(objective, pairs())
    plain = DPO(beta=2.0)
    lengths = np.repeat(case.lengths, case.lengths)
    d = (case.outputs["logprobs"] - case.columns["ref_logprobs"]) / lengths
    same = case.with_outputs(logprobs=d).with_columns(ref_logprobs=np.zeros(len(d)))
    expected = evaluate(framework, plain, same).value
    assert evaluate(framework, objective, case).value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_policy_equal_to_its_reference_has_the_loss_of_a_coin(framework: str) -> None:
    case = pairs()
    case = case.with_columns(ref_logprobs=case.outputs["logprobs"])
    values = {name: evaluate(framework, p, prepared(p, case)).value for name, p in {
        "sigmoid": DPO(), "smoothed": DPO(label_smoothing=0.2), "ipo": DPO(loss="ipo", beta=0.5),
        "hinge": DPO(loss="hinge")}.items()}
    assert values == {"sigmoid": pytest.approx(math.log(2)), "smoothed": pytest.approx(math.log(2)),
                      "ipo": pytest.approx(1.0), "hinge": pytest.approx(1.0)}


@differentiable
def test_a_reward_model_learns_from_last_values_alone(framework: str) -> None:
    """dL/ds = -sigma(-(s_chosen - s_rejected)) at the better answer's last action, the contrary at the other's."""
    objective = BradleyTerry()
    case = prepared(objective, pairs())
    last = np.cumsum(case.lengths) - 1
    s = case.outputs["values"][0][last]
    sign = np.where(case.columns["preferred"][last] == 1, 1.0, -1.0)
    Delta = (s * sign).reshape(-1, 2).sum(axis=1)
    found = evaluate(framework, objective, case)
    assert found.value == pytest.approx(np.log1p(np.exp(-Delta)).mean(), rel=1e-12)
    expected = np.zeros(len(case.episode))
    expected[last] = -np.repeat(1 / (1 + np.exp(Delta)), 2) * sign / len(Delta)
    np.testing.assert_allclose(found.gradients["values"][0], expected, rtol=1e-12, atol=1e-15)


def test_metrics_are_means_over_pairs() -> None:
    objective = DPO(beta=BETA)
    case = prepared(objective, pairs(seed=3))
    d, better = case.outputs["logprobs"] - case.columns["ref_logprobs"], case.columns["preferred"]
    Delta = deltas(case, d)
    expected = {"accuracy": float(np.mean(np.array(Delta) > 0)), "margin": BETA * float(np.mean(Delta)),
                "chosen": BETA * float((d * better).sum()) / 3, "rejected": BETA * float((d * (1 - better)).sum()) / 3,
                "chosen_logprob": float((case.outputs["logprobs"] * better).sum()) / 3,
                "rejected_logprob": float((case.outputs["logprobs"] * (1 - better)).sum()) / 3}
    found = evaluate("numpy", objective, case).metrics
    assert {name: t / n for name, (t, n) in found.items()} == {
        f"preference/{name}": pytest.approx(x) for name, x in expected.items()}
    assert {n for _, n in found.values()} == {3.0}


def test_needs_outputs_and_unit() -> None:
    assert DPO().needs == {Need.REF_LOGPROBS, Need.PREFERRED} and DPO().outputs == {Output.LOGPROBS}
    assert BradleyTerry().needs == {Need.PREFERRED} and BradleyTerry().outputs == {Output.VALUES}
    assert DPO().unit == BradleyTerry().unit == "group"


@pytest.mark.parametrize("fields, message", [
    ({"loss": "sigmod"}, "did you mean 'sigmoid'"), ({"beta": 0.0}, "beta must be positive"),
    ({"beta": math.inf}, "beta must be positive and finite"),
    ({"beta": math.nan}, "beta must be positive"), ({"label_smoothing": 0.5}, r"label_smoothing lies in \[0, 0.5\)"),
    ({"label_smoothing": -0.1}, "label_smoothing lies in"),
    ({"loss": "hinge", "label_smoothing": 0.1}, "belongs to loss: sigmoid"),
])
def test_fields_without_meaning_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPO(**fields)
