"""Runs with each controller and placement of the KL: what they do is what they say, and they resume bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import posttrain
import pytest
import yaml
from integration import small
from integration.small import config
from posttrain.config import load
from posttrain.errors import ConfigError
from posttrain.fitting import check

pytest.importorskip("torch")
pytest.importorskip("posttrain_objectives")

GUIDE = Path(__file__).parents[2] / "docs" / "kl.md"
TINY = {"rollout": {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 3}, "evaluate": {"every": 0}}
CONTROLLERS: Mapping[str, Mapping[str, Any]] = {
    "fixed": {"coef": 0.1}, "linear": {"coef": 0.2, "coef_end": 0.05, "steps": 6},
    "cosine": {"coef": 0.2, "coef_end": 0.05, "steps": 6}, "adaptive": {"target": 0.01, "horizon": 50},
    "pi": {"target": 0.01}, "pid": {"target": 0.01}, "band": {"target": 0.01}, "dual": {"target": 0.01},
    "entropy": {"target_entropy": 5.0, "delta": 0.02}}


def records(run: Any) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]


def column(run: Any, name: str) -> list[float]:
    return [row[name] for row in records(run) if name in row]


def weights(run: Any) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(run.directory / "policy" / "model.safetensors")


def furthest(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_resumed_run_goes_on_as_the_whole_one(tmp_path: Path, name: str) -> None:
    def settings(directory: str, steps: int) -> dict[str, Any]:
        return config(tmp_path / directory, steps=steps, kl={"use": name, "placement": "loss", **CONTROLLERS[name]},
                      optimizer={"lr": 1e-2, "total_steps": 5}, checkpoint={"every": 3}, **TINY)
    whole = posttrain.train(settings("whole", 5), output="quiet")
    half = posttrain.train(settings("half", 3), output="quiet")
    again = posttrain.resume(half.directory, ["steps=5"], output="quiet")
    assert asdict(again.state.kl) == asdict(whole.state.kl)
    assert column(again, "kl/coef") == column(whole, "kl/coef")
    assert column(again, "kl/reference") == column(whole, "kl/reference")
    assert furthest(weights(whole), weights(again)) == 0.0
    moves = len(set(column(whole, "kl/coef")[-3:])) > 1
    assert moves == (name != "fixed"), "a coefficient that stands still would resume whatever was saved"


def test_k1_in_the_advantage_is_k2_in_the_loss(tmp_path: Path) -> None:
    """On policy and with one optimiser step, the two have one gradient for each sampled action; in the reward, where
    the baseline of the group takes part of it away, it is another."""
    def run(placement: str) -> dict[str, np.ndarray]:
        return weights(posttrain.train(
            config(tmp_path / placement, steps=3, objective="reinforce", optimizer={"lr": 1e-2},
                   kl={"use": "fixed", "coef": 5.0, "placement": placement}, **TINY), output="quiet"))
    advantage, loss, reward = run("advantage"), run("loss"), run("reward")
    assert furthest(advantage, loss) < 1e-4 < furthest(advantage, reward)


def test_an_estimate_of_whole_episodes_does_not_depend_on_micro_batches(tmp_path: Path) -> None:
    def run(tokens: int) -> Any:
        return posttrain.train(
            config(tmp_path / str(tokens), steps=3, batching={"tokens": tokens}, optimizer={"lr": 1e-2},
                   kl={"use": "fixed", "coef": 5.0, "placement": "loss", "estimator": "seq_k2"}, **TINY),
            output="quiet")
    one, several = run(10_000), run(12)
    assert column(several, "batch/parts")[-1] > column(one, "batch/parts")[-1] == 1
    assert furthest(weights(one), weights(several)) < 1e-5
    assert column(several, "loss/kl")[1:] == pytest.approx(column(one, "loss/kl")[1:], rel=1e-4)


def drift(directory: Path, **kl: Any) -> float:
    """The KL after five rollouts of two optimiser steps each."""
    settings = config(directory, steps=5, update={"epochs": 2}, optimizer={"lr": 1e-2},
                      kl={"use": "fixed", "placement": "loss", **kl}, **TINY)
    return column(posttrain.train(settings, output="quiet"), "kl/reference")[-1]


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> float:
    return drift(tmp_path_factory.mktemp("free") / "run", coef=0.0)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3+", "seq_k2"])
def test_the_ratio_forms_hold_the_policy_over_several_optimiser_steps(tmp_path: Path, free: float,
                                                                      estimator: str) -> None:
    assert drift(tmp_path / "run", coef=20.0, estimator=estimator, off_policy="ratio") < 0.5 * free


@pytest.mark.parametrize("setting", sorted(set(re.findall(r"`(kl: \{.*?\})`", GUIDE.read_text()))))
def test_every_setting_of_the_guide_is_one(tmp_path: Path, setting: str) -> None:
    beside = {"constraint": "pid_lagrangian"} if "constrained" in setting else {}
    check(load(config(tmp_path / "run", **yaml.safe_load(setting), **beside), (), posttrain.discover()))


class Even:
    """A toy combiner of gradients."""

    def init(self, slots: Sequence[str]) -> None: ...

    def weights(self, gramian: np.ndarray, state: None) -> tuple[np.ndarray, None]:
        return np.ones(len(gramian)), None


def digits(completions: list[str], **columns: Any) -> list[float]:
    return [float(any(x.isdigit() for x in c)) for c in completions]


@pytest.mark.parametrize(("placement", "says"), [
    ("advantage", "kl.placement: advantage would be taken from the advantages of every reward; use placement: loss"),
    ("reward", "kl.placement: reward would be taken from every reward column; use placement: loss")])
def test_several_rewards_take_their_kl_in_the_loss(tmp_path: Path, placement: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        posttrain.train(config(tmp_path / "run", kl={"use": "fixed", "placement": placement}, gradient_combiner=Even(),
                               rewards={"correct": small.correct, "digits": digits}))


@pytest.mark.parametrize(("kl", "says"), [
    ({"use": "fixed", "placement": "loss", "estimator": "k1"}, "expected gradient of k1 as a loss is zero"),
    ({"use": "pid", "placement": "reward", "estimator": "k3"}, "k3 as a reward also punishes actions"),
    ({"use": "dual", "placement": "advantage", "estimator": "seq_k2"}, "seq_k2 as an advantage says how far"),
    ({"use": "band", "placement": "reward", "estimator": "exact"}, "exact as a reward is one number for all actions"),
    ({"use": "band", "placement": "loss", "estimator": "exact", "off_policy": "ratio"}, "leave off_policy: none"),
    ({"use": "linear", "placement": "reward", "off_policy": "ratio"}, "off_policy ratio belongs to placement loss"),
])
def test_a_combination_that_is_wrong_is_told_before_anything_is_loaded(tmp_path: Path, kl: dict[str, Any],
                                                                       says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        posttrain.train(config(tmp_path / "run", kl=kl))
    assert not (tmp_path / "run").exists()
