"""Runs whose estimator or correction asks the loop for more: action values, greedy answers, final scores, ratios."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import posttrain
import pytest
from integration.small import config, correct
from posttrain.data import Rollouts
from posttrain.errors import ConfigError, RewardError
from posttrain.replay import from_files, to_files

pytest.importorskip("torch")
pytest.importorskip("posttrain_estimators")
pytest.importorskip("posttrain_objectives")

CRITIC = {"critic": "policy", "kl": "none", "recipe": "reinforce"}
"""A policy gradient with a critic on the policy's trunk, no ratio of its own."""
ON_ACTIONS = {**CRITIC, "value_objective": "action_value"}


def metrics(run: Any) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]


def measured(rows: list[Mapping[str, Any]], name: str) -> list[Any]:
    """The values of one metric over the steps that have it."""
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize(("estimator", "changes"), [
    ({"use": "vtrace"}, CRITIC), ({"use": "vtrace", "trace_unit": "sequence", "weighted": False}, CRITIC),
    ({"use": "retrace"}, CRITIC), ({"use": "retrace", "q": "q_head"}, ON_ACTIONS), ({"use": "tree_backup"}, ON_ACTIONS),
    ({"use": "clipped_is"}, {}), ({"use": "clipped_is", "base": "gae", "truncation": "bootstrap"}, CRITIC),
    ({"use": "n_step", "n": 2}, CRITIC), ({"use": "upgo"}, CRITIC), ({"use": "remax"}, {}), ({"use": "process"}, {}),
    ({"use": "vtrace", "trace_unit": "turn"}, CRITIC)])
def test_trains_on_stale_rollouts(tmp_path: Path, estimator: dict[str, Any], changes: dict[str, Any]) -> None:
    rollout = {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 4, "staleness": 2}
    run = posttrain.train(config(tmp_path / "run", estimator=estimator, rollout=rollout, **changes))
    rows = metrics(run)
    assert run.state.step == 6
    assert all(np.isfinite(x) for x in measured(rows, "grad_norm"))
    assert measured(rows, "sampler/lag")[-1] == 2.0


@pytest.mark.parametrize("correction", ["tis", "icepop", "geometric_mask", {"use": "tis", "self_normalise": True}])
def test_corrections_are_measured(tmp_path: Path, correction: Any) -> None:
    rollout = {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 4, "staleness": 2}
    rows = metrics(posttrain.train(config(tmp_path / "run", correction=correction, rollout=rollout)))
    for name in ("rho_mean", "rho_max", "clipped", "rejected", "rejected_episodes", "k1", "k3"):
        assert measured(rows, f"correction/{name}"), name
    assert all(0 < x <= 1 + 1e-9 for x in measured(rows, "correction/ess"))
    assert measured(rows, "sampler/non_finite")[-1] == 0


def test_greedy_answers_are_one_per_prompt_and_survive_a_checkpoint(tmp_path: Path) -> None:
    run = posttrain.train(config(tmp_path / "run", estimator="remax", replay={"capacity": 64, "reuse": 16}))
    kept = run.state.replay.rollouts
    assert measured(metrics(run), "greedy/correct/errors")[-1] == 0
    assert set(kept.greedy_rewards) == {"reward"}
    for group in np.unique(kept.group):
        assert len(set(kept.greedy_rewards["reward"][kept.group == group])) == 1
    again = from_files(*to_files(run.state.replay)).rollouts
    assert np.array_equal(again.greedy_rewards["reward"], kept.greedy_rewards["reward"])


def full(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(c)) for c in completions]


def test_a_reward_scores_the_ends_of_truncated_episodes_and_is_no_part_of_the_sum(tmp_path: Path) -> None:
    rewards = {"correct": correct, "state": {"use": full, "bootstrap": True, "weight": 0.1}}
    run = posttrain.train(config(
        tmp_path / "run", rewards=rewards, estimator={"use": "gae", "bootstrap": "score"}, **CRITIC))
    rows = metrics(run)
    assert measured(rows, "reward/mean") == measured(rows, "reward/correct/mean")
    assert measured(rows, "reward/state/mean")[0] > 0


def nothing(completions: list[str], **columns: Any) -> list[None]:
    return [None for _ in completions]


def test_a_final_score_has_to_apply(tmp_path: Path) -> None:
    rewards = {"correct": correct, "state": {"use": nothing, "bootstrap": True}}
    with pytest.raises(RewardError, match="'state' gives no score to a truncated episode"):
        posttrain.train(config(
            tmp_path / "run", rewards=rewards, estimator={"use": "gae", "bootstrap": "score"}, **CRITIC))


def some(completions: list[str], **columns: Any) -> list[float]:
    """Fails where an answer holds a zero: for those episodes that the rule then drops."""
    if any("0" in c for c in completions):
        raise ArithmeticError("no state")
    return [float(len(c)) for c in completions]


def test_a_final_score_may_fail_where_its_rule_drops_the_episode(tmp_path: Path) -> None:
    rewards = {"correct": correct, "state": {"use": some, "bootstrap": True, "on_error": "drop_sample"}}
    run = posttrain.train(config(tmp_path / "run", rewards=rewards, estimator={"use": "gae", "bootstrap": "score"},
                                 reward_workers={"max_error_rate": 1.0}, **CRITIC))
    rows = metrics(run)
    assert sum(measured(rows, "reward/state/errors")) > 0
    assert measured(rows, "reward/correct/excluded") == measured(rows, "reward/state/excluded")


STATE = {"correct": correct, "state": {"use": full, "bootstrap": True}}


@pytest.mark.parametrize(("changes", "says"), [
    ({"estimator": {"use": "retrace", "q": "q_head"}}, "set critic: policy and value_objective: action_value"),
    ({"estimator": {"use": "retrace", "q": "q_head"}, "critic": "policy"}, "set value_objective: action_value"),
    ({"estimator": "tree_backup", "critic": "torch", "value_objective": "action_value"}, "set critic: policy"),
    ({"estimator": "vtrace"}, r"use one of: clipped_is, .*, reinforce_pp_baseline, remax, rloo$"),
    ({"estimator": "grpo", "critic": "policy"},
     "use one of: gae, monte_carlo, n_step, retrace, td0, td_lambda, tree_backup"),
    ({"estimator": "gae", "critic": "policy", "value_objective": "action_value"},
     "trains no critic of states; use value"),
    ({"estimator": "clipped_is", "update": {"old_logprobs": "behavior"}}, "leave old_logprobs out"),
    ({"estimator": "clipped_is", "correction": "tis"}, "would do it twice: leave one of them out"),
    ({"estimator": {"use": "gae", "bootstrap": "score"}, "critic": "policy"},
     "none of the rewards have bootstrap: true"),
    ({"rewards": STATE}, "rewards.state.bootstrap: estimator 'grpo' continues with no reward's score"),
    ({"estimator": {"use": "retrace", "q": "implicit_q"}, "critic": "policy"}, "q must be one of"),
    ({"estimator": {"use": "grpo", "truncation": "bootstrap"}}, "needs|uses no critic"),
])
def test_what_does_not_fit_is_told(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        posttrain.train(config(tmp_path / "run", **changes))


def test_rejection_fits_beside_an_estimator_that_weighs(tmp_path: Path) -> None:
    posttrain.train(config(tmp_path / "run", estimator="clipped_is", correction="geometric_mask", steps=3))


@pytest.mark.parametrize(("rule", "taken"), [("reject", 0), ("one", 1)])
def test_log_probs_of_the_sampler_that_are_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str,
                                                      taken: int) -> None:
    """They are counted, and their actions left out, or taken with ratio 1."""
    from posttrain import trainer

    seen = []
    def broken(rollouts: Rollouts, *rest: Any) -> Any:
        rollouts.behavior_logprobs[::3] = (np.nan, -np.inf)[len(seen) % 2]
        return real(rollouts, *rest)
    def noted(trained: Any, rollouts: Any, signal: Any, *rest: Any, **more: Any) -> Any:
        seen.append(signal)
        return update(trained, rollouts, signal, *rest, **more)
    real, update = trainer.trusted, trainer.update
    monkeypatch.setattr(trainer, "trusted", broken)
    monkeypatch.setattr(trainer, "update", noted)
    run = posttrain.train(config(tmp_path / "run", correction="tis", steps=3,
                                 update={"non_finite_logprobs": rule}))
    assert all(count > 0 for count in measured(metrics(run), "sampler/non_finite"))
    for signal in seen:
        assert signal.keep[::3].all() == bool(taken) and signal.keep[1::3].all()
        assert (signal.correction[::3] == 1).all()


def test_ratios_to_a_sampler_without_log_probs_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's log-probs are computed only where some of the sampler's are no numbers."""
    from posttrain import trainer

    olds, asked = [], []
    def broken(*args: Any) -> Any:
        fresh, *rest = real(*args)
        if len(olds) % 2:
            fresh.behavior_logprobs[:] = np.nan
        return fresh, *rest
    def noted(trained: Any, rollouts: Any, signal: Any, notes: Any, old: Any, *rest: Any, **more: Any) -> Any:
        olds.append(old)
        asked.append(notes.logprobs)
        return update(trained, rollouts, signal, notes, old, *rest, **more)
    real, update = trainer.gather, trainer.update
    monkeypatch.setattr(trainer, "gather", broken)
    monkeypatch.setattr(trainer, "update", noted)
    rollout = {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 4, "staleness": 1}
    posttrain.train(config(tmp_path / "run", rollout=rollout, update={"non_finite_logprobs": "one"}, kl="none"))
    assert [pi is None for pi in asked] == [True, False] * 3
    for mu, pi in zip(olds[1::2], asked[1::2], strict=True):
        np.testing.assert_array_equal(mu, pi)


OF_VALUES = '''"""A correction that weighs by the critic's values."""
from dataclasses import dataclass
from typing import final

from posttrain.data import Episodes, Metrics
from posttrain.hookspecs import Component, hookimpl
from posttrain.protocols import Corrected, Need


@final
@dataclass(frozen=True, slots=True)
class OfValues:
    """Weight 1 where the value is positive."""

    needs = frozenset({Need.VALUES})

    def __call__(self, episodes: Episodes, /) -> Corrected:
        return Corrected(episodes.values > 0, episodes.values > 0, Metrics())


@hookimpl
def components():
    return [Component("correction", "of_values", f"{__name__}:OfValues", "by values")]
'''


def test_a_correction_finds_values_only_beside_an_estimator_that_reads_them(tmp_path: Path) -> None:
    (tmp_path / "of_values.py").write_text(OF_VALUES)
    with pytest.raises(ConfigError, match="correction 'of_values' needs values, which are there only for an estimator "
                                          "that reads them, and 'grpo' does not"):
        posttrain.train(config(tmp_path / "run", correction="of_values", plugins=[str(tmp_path / "of_values.py")]))


@pytest.mark.parametrize(("changes", "warned"), [
    ({"update": {"old_logprobs": "recompute"}}, True), ({}, False),
    ({"update": {"old_logprobs": "recompute"}, "correction": "tis"}, False),
    ({"update": {"old_logprobs": "recompute"}, "estimator": "clipped_is"}, False),
    ({"update": {"old_logprobs": "recompute"}, "rollout": {"prompts_per_step": 4, "max_new_tokens": 4}}, False)])
def test_old_answers_without_a_correction_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                                        changes: dict[str, Any], warned: bool) -> None:
    rollout = {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 4, "staleness": 1}
    posttrain.train(config(tmp_path / "run", **{"rollout": rollout, "steps": 3, **changes}))
    assert ("leaves that uncorrected; leave it out, or add correction: tis" in caplog.text) == warned
