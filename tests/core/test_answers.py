"""What estimators, corrections, combiners and objectives answer wrongly is told with their name and the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from posttrain import cli
from posttrain.data import Episodes, Estimate, Loss, Metrics, Rollouts, Signal, Term, TokenOutputs
from posttrain.errors import PluginError
from posttrain.loss import Sum
from posttrain.ops import ops_of
from posttrain.protocols import Corrected, Need
from posttrain.steps import Annotations, advantages
from ragged import three_episodes


def rollouts() -> Rollouts:
    """Three episodes of 2, 3 and 1 actions; the second episode has no reward."""
    r = three_episodes()
    prompts = tuple(replace(p, where=f"data.jsonl:{7 + e}") for e, p in enumerate(r.prompts))
    return replace(r, rewards={"r": np.zeros(12)}, prompts=prompts,
                   excluded={"r": np.array([False, True, False])})


@dataclass(frozen=True)
class Part:
    """Answers what `answer` makes of the batch."""

    answer: Callable[[Any], Any]
    needs: frozenset[Need] = frozenset()

    def __call__(self, episodes: Episodes) -> Any:
        return self.answer(episodes)

    def combine(self, estimates: Any, state: Any) -> Any:
        return self.answer(estimates)


def zeros(e: Episodes) -> np.ndarray:
    return np.zeros(len(e.rewards))


def fine(e: Episodes) -> Estimate:
    return Estimate(zeros(e))


def signal(estimator: Callable[[Any], Any], **others: Any) -> Signal:
    return advantages(rollouts(), Annotations(), Part(estimator), ["r"], names={"estimator": "part"}, **others)


def said(estimator: Callable[[Any], Any], **others: Any) -> str:
    with pytest.raises(PluginError) as error:
        signal(estimator, **others)
    assert error.value.exit_code == 2
    return str(error.value)


def test_numbers_per_episode_are_told_from_numbers_per_action() -> None:
    for answer, noun in ((lambda e: Estimate(zeros(e), targets=np.ones(2)), "targets"),
                         (lambda e: Estimate(zeros(e), keep=np.ones(2, bool)), "values of keep")):
        assert said(answer) == (f"estimator 'part' gave 2 {noun} for 3 actions (2 episodes); index what belongs to "
                                "episodes with [episodes.episode]")
    assert said(lambda e: Estimate(np.zeros(2), targets=np.zeros((3, 1)))).splitlines() == [
        "estimator 'part' gave 2 advantages for 3 actions (2 episodes); index what belongs to episodes with "
        "[episodes.episode]",
        "estimator 'part' gave targets of shape (3, 1) for 3 actions (2 episodes); the shape must be (3,)"]
    assert "gave advantages of shape () for" in said(lambda e: Estimate(None))
    assert "gave 5 advantages for 3 actions (2 episodes); one for each action is needed" in said(
        lambda e: Estimate(np.zeros(5)))
    assert "values of keep of type int64; they must be true or false" in said(
        lambda e: Estimate(zeros(e), keep=np.ones(3, np.int64)))


def test_where_every_episode_has_one_action_one_number_each_is_right() -> None:
    episodes = three_episodes(is_action=np.array([0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], bool), behavior_logprobs=None,
                              rewards={"r": np.zeros(12)}, excluded={})
    got = advantages(episodes, Annotations(), Part(lambda e: Estimate(np.ones(e.n_episodes))), ["r"])
    assert got.advantages.tolist() == [1, 1]


def test_a_correction_and_a_combiner_are_held_to_the_same() -> None:
    assert said(fine, correction=Part(lambda e: Corrected(np.ones(2), np.ones(3), Metrics()))).splitlines() == [
        "correction Part gave 2 weights for 3 actions (2 episodes); index what belongs to episodes with "
        "[episodes.episode]",
        "correction Part gave values of keep of type float64; they must be true or false"]
    infinite = Part(lambda e: Corrected(np.array([1, 1, np.inf]), np.ones(3, bool), Metrics()))
    assert said(fine, correction=infinite) == (
        "correction Part gave 1 weights that are not finite (first: episode 2, row data.jsonl:9)")
    assert said(fine, combiner=Part(lambda e: Estimate(np.zeros(3)))) == (
        "combiner Part gave 3 advantages for 6 actions (3 episodes); one for each action is needed")


@pytest.mark.parametrize(("given", "named"), [
    (np.zeros(3), "ndarray"), (None, r"None \(is a return missing\?\)"), ((1, 2), "tuple")])
def test_an_answer_of_another_type(given: Any, named: str) -> None:
    for kind, others in (("estimator 'part'", {}), ("combiner Part", {"combiner": Part(lambda e: given)})):
        with pytest.raises(PluginError, match=f"{kind} must return an Estimate, got {named}; return Estimate"):
            signal(fine if others else lambda e: given, **others)
    with pytest.raises(PluginError, match=f"correction Part must return a Corrected, got {named}; return Corrected"):
        signal(fine, correction=Part(lambda e: given))


def test_numbers_that_are_not_finite_stop_with_the_first_row() -> None:
    assert said(lambda e: Estimate(np.array([0, np.nan, np.inf]))) == (
        "estimator 'part' gave 2 advantages that are not finite (first: episode 0, row data.jsonl:7)")
    assert said(lambda e: Estimate(zeros(e), np.array([0, 0, -np.inf]))) == (
        "estimator 'part' gave 1 targets that are not finite (first: episode 2, row data.jsonl:9)")


def test_numbers_of_rejected_actions_may_be_anything() -> None:
    got = signal(lambda e: Estimate(np.array([1, 2, np.nan]), keep=np.array([True, True, False])))
    assert got.keep.tolist() == [True, True, False, False, False, False]


def test_a_column_that_no_need_names_is_told() -> None:
    answer = said(lambda e: Estimate(e.rewards - 0.5 * e.values))
    assert answer.startswith("estimator 'part' raised TypeError: unsupported operand type(s) for *: 'float' and "
                             "'NoneType' (test_answers.py:")
    assert "columns that are None: values, bootstrap_values, final_scores, greedy_rewards, action_values" in answer
    assert answer.endswith("; needs must name what is read")
    assert "raised TypeError" in said(lambda e: Estimate(np.exp(e.values)))
    assert "raised AttributeError: 'NoneType' object has no attribute 'sum'" in said(lambda e: e.values.sum())
    with pytest.raises(PluginError) as error:
        signal(lambda e: Estimate(-e.values))
    assert isinstance(error.value.__cause__, TypeError)


def test_other_mistakes_of_a_component_keep_their_traceback() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        signal(lambda e: 1 + str(e))  # type: ignore[operator]  # wrong on purpose
    with pytest.raises(ZeroDivisionError):
        signal(lambda e: 1 / 0)


@dataclass(frozen=True)
class Objective:
    """A loss that is whatever `answer` makes of the batch."""

    answer: Callable[[Any], Any]
    needs: frozenset[Need] = frozenset()
    outputs: frozenset[Any] = frozenset()
    unit: Any = "action"
    slots: tuple[str, ...] = ("main",)

    def weights(self, counts: Any) -> Any:
        raise AssertionError("not asked here")

    def __call__(self, ops: Any, out: Any, batch: Any, coef: Any) -> Any:
        return self.answer(batch)


def loss(answer: Callable[[Any], Any]) -> Loss:
    logprobs = np.zeros(3)
    batch: Any = Batch()
    return Sum((Objective(answer),))(ops_of(logprobs), TokenOutputs(logprobs), batch, {})


@dataclass(frozen=True)
class Batch:
    """As many columns of a `MicroBatch` as matter here."""

    advantages: Any = None
    old_logprobs: Any = None


@pytest.mark.parametrize(("given", "named"), [
    (np.float64(0), "must return a Loss, got float64; return Loss"), (None, "must return a Loss, got None"),
    (Loss(np.zeros(3)), "gave a Loss whose terms are ndarray; terms must map names to Term"),  # type: ignore[arg-type]  # wrong on purpose
    (Loss({"a": np.float64(0)}), "gave a Loss whose term 'a' is float64; wrap it: Term")])  # type: ignore[dict-item]  # wrong on purpose
def test_an_objective_must_return_a_loss_of_terms(given: Any, named: str) -> None:
    with pytest.raises(PluginError, match=f"objective Objective {named}"):
        loss(lambda batch: given)


def test_an_objective_that_reads_what_it_does_not_declare() -> None:
    with pytest.raises(PluginError, match=(
            r"objective Objective raised TypeError: .*columns that are None: entropy, reference_kl, values, "
            r"bootstrap_values, action_values, expected_action_values, expected_bootstrap_values, advantages, "
            r"old_logprobs; needs and outputs must name what is read; old_logprobs is also None where")):
        loss(lambda batch: -batch.advantages)
    assert loss(lambda batch: Loss({"a": Term(1.0)})).terms["a"].total == 1.0


PLUGIN = """from dataclasses import dataclass
import numpy as np
from posttrain.data import Estimate
from posttrain.hookspecs import Component, hookimpl

@dataclass(frozen=True)
class Part:
    needs: frozenset = frozenset()
    def __call__(self, episodes):
        return Estimate(np.full(len(episodes.rewards), np.nan))

@hookimpl
def components():
    return [Component("estimator", "part", "part:Part", "x")]
"""


def test_a_run_stops_at_once_with_the_name_of_the_configuration(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("part.py").write_text(PLUGIN)
    Path("data.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    Path("train.yaml").write_text(
        "plugins: [./part.py, posttrain.toy]\ntask: {use: rows, path: data.jsonl}\nestimator: part\nobjective: toy\n"
        "policy: toy\nkl: none\ntokenizer: bytes\nrollout: {engine: toy, prompts_per_step: 1, group_size: 2}\n"
        "rewards: {right: exact_match}\ntrackers: {}\nsteps: 9\n")
    assert cli.main(["train", "train.yaml"]) == 2
    err = capsys.readouterr().err
    assert re.search(r"^estimator 'part' gave \d+ advantages that are not finite \(first: episode 0, row "
                     r".*data\.jsonl:1\)$", err, re.MULTILINE), err
    assert "Traceback" not in err
