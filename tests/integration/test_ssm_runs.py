"""Whole runs of a state-space policy: trained, resumed bit for bit, its recorded log-probs those of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import posttrain
import pytest
from integration.small import config, metrics, rise
from posttrain.errors import ConfigError

pytest.importorskip("torch")

SSM = {"use": "ssm", "hidden_size": 16, "layers": 2, "state_size": 8, "head_dim": 8, "chunk_size": 16, "device": "cpu"}


def settings(run: Path, **changes: Any) -> dict[str, Any]:
    return config(run, policy=SSM, **changes)


def test_a_run_trains_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    changes = {"update": {"epochs": 2}, "optimizer": {"lr": 1e-2}, "evaluate": {"every": 2}}
    posttrain.train(settings(whole, **changes), output="quiet")
    posttrain.train(settings(cut, **changes, steps=2), output="quiet")
    posttrain.resume(cut, ["steps=6"], output="quiet")
    found = metrics(whole)
    assert len(found) == 6 and metrics(cut) == found
    assert (whole / "policy" / "model.safetensors").read_bytes() == (cut / "policy" / "model.safetensors").read_bytes()
    assert max(row["sampler/gap_max"] for row in found) < 1e-4


def test_a_transformer_can_be_the_critic_of_a_state_space_policy(tmp_path: Path) -> None:
    critic = {"use": "torch", "hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "max_positions": 32,
              "device": "cpu"}
    posttrain.train(settings(tmp_path / "run", recipe="ppo", critic=critic, kl="none"), output="quiet")
    assert len(metrics(tmp_path / "run")) == 6


def test_rewards_rise(tmp_path: Path) -> None:
    """From noise to answers that begin with the letter that was asked, in a run of seconds."""
    rows = [{"prompt": letter, "answer": letter} for letter in "abcd"]

    def begins(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [float(c.startswith(a)) for c, a in zip(completions, answer, strict=True)]
    posttrain.train({
        "recipe": "grpo", "steps": 40, "seed": 0, "threads": 1, "run": str(tmp_path / "run"),
        "policy": {**SSM, "layers": 1},
        "tokenizer": {"use": "characters", "alphabet": "abcd"},
        "task": {"use": "rows", "rows": rows},
        "rewards": {"begins": begins},
        "rollout": {"prompts_per_step": 4, "group_size": 16, "max_new_tokens": 2},
        "optimizer": {"lr": 1e-2},
        "trackers": {"console": None, "jsonl": None},
    }, output="quiet")
    means = [row["reward/mean"] for row in metrics(tmp_path / "run")]
    difference, error = rise(means)
    assert difference > max(0.15, 4 * error) and sum(means[-10:]) / 10 > 0.8


def written(folder: Path, **traits: Any) -> dict[str, Any]:
    """A policy of transformers: its Mamba-2, tiny, in this folder."""
    transformers = pytest.importorskip("transformers", minversion="5.23")
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8,
             "state_size": 8, "n_groups": 1, "chunk_size": 16, "bos_token_id": None, "eos_token_id": 1,
             "pad_token_id": 0}
    transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes, **traits)).save_pretrained(folder)
    return {"use": "hf", "weights": str(folder), "device": "cpu"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the library's own
def test_a_run_of_transformers_mamba2_draws_what_it_trains(tmp_path: Path) -> None:
    policy = written(tmp_path / "model")
    posttrain.train(config(tmp_path / "run", policy=policy, update={"epochs": 2}), output="quiet")
    found = metrics(tmp_path / "run")
    assert len(found) == 6 and max(row["sampler/gap_max"] for row in found) < 1e-4
    assert len({row["reward/mean"] for row in found}) > 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the library's own
def test_a_run_that_would_not_draw_what_it_trains_does_not_begin(tmp_path: Path) -> None:
    policy = written(tmp_path / "model", time_step_limit=(0.4, 1.5))
    with pytest.raises(ConfigError, match="Set policy.cache: never"):
        posttrain.train(config(tmp_path / "run", policy=policy), output="quiet")
    changes = {"policy": {**policy, "cache": "never"}, "steps": 3, "update": {"epochs": 2}}
    posttrain.train(config(tmp_path / "other", **changes), output="quiet")
    assert max(row["sampler/gap_max"] for row in metrics(tmp_path / "other")) < 1e-4
