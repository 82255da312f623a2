"""A soup of LoRA runs mixes what their adapters add, not the factors of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers")
pytest.importorskip("posttrain_objectives")

import posttrain  # after the checks that the libraries are there
from integration.test_pareto_runs import BASE
from posttrain import checkpoint
from posttrain_objectives.pareto.soups import soup
from safetensors.numpy import load_file

pytestmark = [pytest.mark.needs("posttrain_backends", "posttrain_estimators"),
              pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]  # the libraries' own
RANK, ALPHA = 2, 6.0


def digits(completions: list[str], **columns: Any) -> list[float]:
    return [float(sum(x.isdigit() for x in text)) for text in completions]


def short(completions: list[str], **columns: Any) -> list[float]:
    return [-float(len(text)) for text in completions]


def test_products_of_adapters_are_mixed(tmp_path: Path) -> None:
    transformers.set_seed(1)
    tokenizer = posttrain.discover().create("tokenizer", "characters", alphabet=BASE["tokenizer"]["alphabet"]).load()
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32)).save_pretrained(tmp_path / "base")
    start = load_file(tmp_path / "base" / "model.safetensors")
    policy = {"use": "hf", "weights": str(tmp_path / "base"), "device": "cpu",
              "adapter": {"use": "lora", "rank": RANK, "alpha": ALPHA, "targets": ["q_proj"]}}
    runs = [posttrain.train({**BASE, "policy": policy, "rewards": {"r": reward}, "run": str(tmp_path / f"run{seed}"),
                             "seed": seed}, output="quiet").directory for seed, reward in enumerate((digits, short))]
    mixed = load_file(soup([run / "policy" for run in runs], [0.25, 0.75], tmp_path / "soup") / "model.safetensors")
    states = [checkpoint.load(checkpoint.require_newest(run, fallback=False)).arrays["policy"] for run in runs]
    (layer,) = [name for name in start if "q_proj" in name]
    a, b = (f"weights.{layer.removesuffix('.weight')}.lora_{x}.default.weight" for x in "AB")
    products = [ALPHA / RANK * state[b] @ state[a] for state in states]
    assert min(np.abs(product).max() for product in products) > 1e-4
    np.testing.assert_allclose(mixed[layer], start[layer] + 0.25 * products[0] + 0.75 * products[1], atol=1e-7)
    A, B = (0.25 * states[0][name] + 0.75 * states[1][name] for name in (a, b))
    assert np.abs(mixed[layer] - (start[layer] + ALPHA / RANK * B @ A)).max() > 1e-4
    assert all(np.array_equal(mixed[name], start[name]) for name in start if name != layer)
