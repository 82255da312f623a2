"""Runs whose rewards are costs: limits reach the advantages, state is resumed, what does not fit is told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import posttrain
import pytest
from integration.small import config, correct
from posttrain.errors import ConfigError

pytest.importorskip("torch")
pytest.importorskip("posttrain_estimators")
pytest.importorskip("posttrain_objectives")

LONG = {"rollout": {"prompts_per_step": 8, "group_size": 8, "max_new_tokens": 6}, "kl": "none"}


def lengths(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(c)) for c in completions]


def wordy(completions: list[str], **columns: Any) -> list[float]:
    """More for longer answers: what a limit of the length stands against."""
    return [0.2 * len(c) for c in completions]


def records(run: Any) -> list[Mapping[str, Any]]:
    """One per step; the first is the evaluation before them."""
    return [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()][1:]


def column(run: Any, name: str) -> list[float]:
    return [row[name] for row in records(run)]


@pytest.mark.parametrize("bound", [{"at_most": 2.0}, {"at_least": 4.0}], ids=["at_most", "at_least"])
def test_a_limit_holds_against_the_reward(tmp_path: Path, bound: dict[str, float]) -> None:
    """The free run goes where its reward is, beyond the limit; the constrained one stays."""
    pull = wordy if "at_most" in bound else lambda completions, **columns: [-0.2 * len(c) for c in completions]
    free = posttrain.train(config(tmp_path / "free", rewards={"pull": pull}, steps=40, **LONG))
    held = posttrain.train(config(tmp_path / "held", rewards={"pull": pull, "length": {"use": lengths, **bound}},
                                  constraint={"use": "pid_lagrangian"}, steps=60, **LONG))
    free_length = np.mean(column(free, "episode/length")[-8:])
    ends, limit = np.mean(column(held, "constraint/length/mean")[-8:]), next(iter(bound.values()))
    sign = 1 if "at_most" in bound else -1
    assert sign * (free_length - limit) > 1.0
    assert sign * (ends - limit) < 0.35 * sign * (free_length - limit)
    assert column(held, "constraint/length/mean") == column(held, "reward/length/mean")
    assert max(column(held, "constraint/length/multiplier")) > 0
    assert all(status in (0, 1, 2) for status in column(held, "constraint/length/status"))
    assert column(held, "reward/mean") == column(held, "reward/pull/mean"), "a cost is no part of the sum"


@pytest.mark.parametrize("changes", [
    {"estimator": {"use": "gae", "lam": 0.95}, "critic": "policy"}, {"kl": {"use": "adaptive", "placement": "reward"}},
    {"combiner": "sum", "rewards": {"correct": correct, "digits": wordy, "length": {"use": lengths, "at_most": 3.0}}},
    {"combiner": "tchebycheff", "rewards": {"correct": correct, "digits": wordy,
                                            "length": {"use": lengths, "at_most": 3.0}}},
    *({"constraint": name} for name in ("pid_lagrangian", "log_lagrangian", "augmented_lagrangian", "crpo", "p3o")),
], ids=["critic", "kl", "combiner", "moving weights", "pid", "log", "augmented", "crpo", "p3o"])
def test_a_resumed_run_goes_on_as_the_whole_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    base = {"rewards": {"correct": correct, "length": {"use": lengths, "at_most": 3.0}}, "constraint": "lagrangian",
            **changes}
    optimizer = {"lr": 1e-2, "warmup_steps": 2, "schedule": "cosine", "total_steps": 6}
    whole = posttrain.train(config(tmp_path / "whole", optimizer=optimizer, **base))
    half = posttrain.train(config(tmp_path / "half", optimizer=optimizer, steps=3, **base))
    resumed = posttrain.resume(half.directory, ["steps=6"])
    assert resumed.state.constraint == whole.state.constraint and resumed.state.combiner == whole.state.combiner
    for name in ("constraint/length/multiplier", "constraint/length/mean", "grad_norm"):
        assert column(whole, name)[3:] == column(half, name)[-3:]


def test_the_kl_is_a_cost_among_others(tmp_path: Path) -> None:
    """Its multiplier rises while it is over its limit, and it stays nearer to it than where nothing holds it."""
    kl = {"use": "constrained", "at_most": 0.01}
    free = posttrain.train(config(tmp_path / "free", rewards={"pull": wordy}, steps=30,
                                  **{**LONG, "kl": {"use": "fixed", "coef": 0.0}}))
    held = posttrain.train(config(
        tmp_path / "held", rewards={"pull": wordy, "length": {"use": lengths, "at_most": 20.0}}, steps=30,
        constraint="pid_lagrangian", **{**LONG, "kl": kl}))
    ends, unheld = (np.mean(column(run, "kl/reference")[-6:]) for run in (held, free))
    assert ends < 0.5 * unheld and unheld > 0.02
    assert column(held, "constraint/kl/mean") == column(held, "kl/reference")
    assert max(column(held, "constraint/kl/multiplier")) > 0 == max(column(held, "constraint/length/multiplier"))


def constant(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


def test_costs_are_measured_and_kept_where_no_reward_differs(tmp_path: Path) -> None:
    """`filter_zero_variance` drops groups from which nothing is learned: neither the reward's nor a cost's."""
    rollout = {**LONG["rollout"], "filter_zero_variance": True, "max_refills": 1}
    run = posttrain.train(config(
        tmp_path / "run", rewards={"same": constant, "length": {"use": lengths, "at_most": 1.0}}, steps=12,
        constraint="lagrangian", rollout=rollout, kl="none"))
    multiplier = column(run, "constraint/length/multiplier")
    assert multiplier[:6] == sorted(multiplier[:6]) and multiplier[5] > multiplier[0] > 0
    assert column(run, "constraint/length/mean")[-1] < 1.5 < column(run, "constraint/length/mean")[0]
    assert column(run, "constraint/length/mean") == column(run, "reward/length/mean")
    assert all("grad_norm" in row for row in records(run))


def test_the_kl_of_a_constraint_is_that_of_own_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain import trainer

    seen = []
    def noted(kl: Any, state: Any, notes: Any, own: int) -> Any:
        seen.append((len(notes.logprobs), own))
        return real(kl, state, notes, own)
    real = trainer.kl_metrics
    monkeypatch.setattr(trainer, "kl_metrics", noted)
    run = posttrain.train(config(
        tmp_path / "run", kl={"use": "constrained", "at_most": 0.01}, constraint="lagrangian",
        replay={"capacity": 32, "reuse": 16}))
    assert all(own <= n for n, own in seen) and any(own < n for n, own in seen[1:])
    assert column(run, "constraint/kl/mean") == column(run, "kl/reference")


def test_limits_that_changed_are_told_before_a_run_goes_on(tmp_path: Path) -> None:
    rewards = {"correct": "exact_match", "length": {"use": "size", "at_most": 3.0}}
    run = posttrain.train(config(tmp_path / "run", rewards=rewards, constraint="lagrangian", steps=2,
                                 optimizer={"lr": 1e-2}))
    with pytest.raises(ConfigError, match="changed: the run has length: 3, the configuration length: 1"):
        posttrain.resume(run.directory, ["rewards.length.at_most=1.0", "steps=3"])
    free = posttrain.train(config(tmp_path / "free", rewards={"correct": "exact_match"}, steps=2,
                                  optimizer={"lr": 1e-2}))
    with pytest.raises(ConfigError, match="the run has none, the configuration length: 3"):
        posttrain.resume(free.directory, ["rewards.length={use: size, at_most: 3.0}", "constraint=crpo", "steps=3"])


COST = {"correct": correct, "length": {"use": lengths, "at_most": 3.0}}


@pytest.mark.parametrize(("changes", "says"), [
    ({"kl": {"use": "constrained"}}, "^kl has a limit, and nothing keeps it; set constraint: pid_lagrangian"),
    ({"kl": {"use": "constrained"}, "constraint": "crpo", "rewards": {"kl": correct}},
     "rewards.kl: the KL is a cost of that name; choose another"),
    ({"kl": {"use": "constrained"}, "constraint": "crpo", "estimator": "remax"}, "greedy answers, which have no KL"),
    ({"rewards": {**COST, "end": {"use": lengths, "bootstrap": True}}, "constraint": "crpo", "critic": "policy",
      "estimator": {"use": "gae", "bootstrap": "score"}}, "one score cannot continue the returns of several"),
    ({"rewards": COST}, "rewards.length has a limit, and nothing keeps it; set constraint: pid_lagrangian"),
    ({"constraint": "crpo"}, "constraint 'crpo' has nothing to keep; give a reward at_most or at_least"),
    ({"rewards": {"length": COST["length"]}, "constraint": "crpo"}, "every reward is a cost, and none is left"),
    ({"rewards": {"correct": correct, "length": {"use": lengths, "at_most": 3.0, "at_least": 1.0}},
      "constraint": "crpo"}, "rewards.length.at_most and at_least stand in one entry; a band is two"),
    ({"rewards": {"correct": correct, "length": {"use": lengths, "at_most": 3.0, "weight": 2.0}},
      "constraint": "crpo"}, "make it a cost, which has no weight"),
    ({"rewards": {"correct": correct, "length": {"use": lengths, "at_most": 0.0}}, "constraint": "crpo"},
     "constraint: .*scale"),
    ({"rewards": {"correct": correct, "other": wordy, "length": COST["length"]}, "constraint": "crpo",
      "gradient_combiner": "upgrad"}, "constraint mixes advantages and gradient_combiner mixes gradients"),
])
def test_what_does_not_fit_is_told(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        posttrain.train(config(tmp_path / "run", **changes))
