"""Whole runs of policies with experts: their rewards rise, their load stays even, and they resume bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import posttrain
import pytest
from integration.small import config, metrics, rise

pytest.importorskip("torch")

EXAMPLE = Path(__file__).parents[2] / "examples" / "experts" / "rl.yaml"
MOE = {"use": "moe", "experts": 4, "hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "max_positions": 32,
       "device": "cpu"}
ADDED = {"update": {"epochs": 2, "expert_balance_coef": 0.1}, "optimizer": {"lr": 1e-2}, "evaluate": {"every": 2}}
"""Two steps of each rollout, so that the second replays experts that its routers may have left."""


def require_resumed(whole: Path, cut: Path, **changes: Any) -> None:
    """A run that was cut short and went on is, number by number, the one that was not."""
    posttrain.train(config(whole, **changes), output="quiet")
    posttrain.train(config(cut, **changes, steps=2), output="quiet")
    posttrain.resume(cut, ["steps=6"], output="quiet")
    found = metrics(whole)
    assert len(found) == 6 and metrics(cut) == found
    assert (whole / "policy" / "model.safetensors").read_bytes() == (cut / "policy" / "model.safetensors").read_bytes()
    assert max(row["sampler/gap_max"] for row in found) < 1e-4
    assert all(0.25 <= row["experts/largest_share"] <= 0.5 and row["loss/expert_balance"] > 0.9 for row in found)


def test_a_run_of_a_native_mixture_resumes_bit_for_bit(tmp_path: Path) -> None:
    require_resumed(tmp_path / "whole", tmp_path / "cut", policy=MOE, **ADDED)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the library's own
def test_a_run_of_a_mixture_of_transformers_resumes_with_its_bias_bit_for_bit(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TRANSFORMERS_VERBOSITY", "error")
    transformers = pytest.importorskip("transformers")
    from safetensors.numpy import load_file

    sizes = {"vocab_size": 14, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
             "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "n_routed_experts": 4,
             "num_experts_per_tok": 2, "n_group": 2, "topk_group": 2, "moe_intermediate_size": 16, "pad_token_id": None,
             "first_k_dense_replace": 1, "bos_token_id": None, "eos_token_id": 1}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("glm4_moe", **sizes))
    model.save_pretrained(tmp_path / "model")
    policy = {"use": "hf", "weights": str(tmp_path / "model"), "device": "cpu", "expert_bias_rate": 0.001}
    require_resumed(tmp_path / "whole", tmp_path / "cut", policy=policy, **ADDED)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    moved = load_file(tmp_path / "whole" / "policy" / "model.safetensors")[bias]
    steps = moved / np.float32(0.001)
    assert np.abs(moved).max() > 0 and np.abs(steps - steps.round()).max() < 1e-3 and np.abs(steps).max() < 12.5


def test_rewards_of_the_example_rise_with_an_even_load(tmp_path: Path) -> None:
    posttrain.train(EXAMPLE, [f"run={tmp_path / 'run'}", "threads=1", "policy.device=cpu"], output="quiet")
    found = metrics(tmp_path / "run")
    difference, error = rise([row["reward/mean"] for row in found])
    assert difference > max(0.15, 4 * error) and found[-1]["reward/mean"] > 0.8
    assert max(row["sampler/gap_max"] for row in found) < 1e-4
    assert all(row["loss/expert_balance"] < 1.2 for row in found)  # 1 is even, 8 / 2 all tokens to the same two
    assert len([line for line in EXAMPLE.read_text().splitlines() if line]) < 30
