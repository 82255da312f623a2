"""Whole runs on quantised weights: adapters on them, a sampler of them that is corrected for, a folder that reloads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

import posttrain  # after the check that the libraries are there
from posttrain import config
from posttrain.errors import ConfigError
from posttrain.export import export
from posttrain.fitting import check
from posttrain.registry import discover
from posttrain.rundir import read_metrics
from safetensors.torch import load_file

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the libraries' own

ROWS = [{"prompt": letter, "answer": letter} for letter in "abcd"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama, large enough that its weights have several blocks of scales."""
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=6, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.1)).save_pretrained(folder)
    return folder


def begins(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """Whether the answer begins with the letter that was asked."""
    return [float(c.startswith(a)) for c, a in zip(completions, answer, strict=True)]


def settings(base: Path, run: Path, **changes: Any) -> dict[str, Any]:
    return {
        "recipe": "grpo", "steps": 4, "run": str(run), "threads": 1, "seed": 3,
        "policy": {"use": "quantized", "weights": str(base), "device": "cpu", "adapter": {"use": "lora", "rank": 4}},
        "tokenizer": {"use": "characters", "alphabet": "abcd"}, "task": {"use": "rows", "rows": ROWS},
        "rewards": {"begins": begins}, "rollout": {"prompts_per_step": 4, "group_size": 8, "max_new_tokens": 2},
        "optimizer": {"lr": 2e-2}, "checkpoint": {"every": 2, "keep": 5}, "trackers": {"console": None, "jsonl": None},
        **changes}


def metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of its steps."""
    return [{k: v for k, v in line.items() if k != "timing"} for line in read_metrics(run) if line["step"]]


def policy(base: Path, quantize: str) -> dict[str, Any]:
    return {"use": "hf", "weights": str(base), "device": "cpu", "quantize": quantize,
            "adapter": {"use": "lora", "rank": 4}}


SLOW = pytest.mark.slow


@pytest.mark.parametrize("quantize", ["nf4", pytest.param("int8", marks=SLOW), pytest.param("int8_weight_only",
                                                                                          marks=SLOW)])
def test_a_run_on_quantised_weights_resumes_bit_for_bit_and_exports_what_reloads(
        quantize: str, base: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    changes = {"policy": policy(base, quantize), "update": {"epochs": 2}, "evaluate": {"every": 2},
               "task": {"use": "rows", "rows": ROWS, "held_out_rows": ROWS}}
    posttrain.train(settings(base, whole, **changes), output="quiet")
    posttrain.train(settings(base, cut, **changes, steps=2), output="quiet")
    posttrain.resume(cut, ["steps=4"], output="quiet")
    assert metrics(cut) == metrics(whole) and len(metrics(whole)) == 4
    for name in ("model.safetensors", "adapter_model.safetensors"):
        ours, theirs = (load_file(run / "policy" / name) for run in (whole, cut))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    folder = export(whole)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]
    ids = torch.tensor([[2, 3, 4, 5]])
    with torch.no_grad():
        logits = [transformers.AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (folder, whole / "policy")]
        plain = transformers.AutoModelForCausalLM.from_pretrained(base)(ids).logits
    assert torch.equal(*logits) and (logits[0] - plain).abs().max() > 1e-3


def test_checkpoints_hold_the_adapter_alone(base: Path, tmp_path: Path) -> None:
    posttrain.train(settings(base, tmp_path / "run", steps=2), output="quiet")
    saved = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").rglob("*.safetensors"))
    assert saved < 1.5 * 3 * 4 * 4 * 2 * (4 * (64 + 64) + 3 * (64 + 128))  # a weight and two moments of float32


@pytest.mark.parametrize("draws", ["nf4", pytest.param("int8_dynamic", marks=SLOW)])
def test_a_quantised_sampler_is_corrected_for_unasked(draws: str, base: Path, tmp_path: Path) -> None:
    """And what it recorded is not the policy's; evaluation is."""
    plain = {"use": "hf", "weights": str(base), "device": "cpu"}
    rollout = {"prompts_per_step": 4, "group_size": 8, "max_new_tokens": 2,
               "engine": {"use": "batched", "quantize": draws}}
    whole, cut = (settings(base, tmp_path / name, policy=plain, rollout=rollout) for name in ("whole", "cut"))
    posttrain.train(whole, output="quiet")
    found = metrics(tmp_path / "whole")
    assert yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())["correction"] == "tis"
    assert all(row["sampler/gap_max"] > (1e-2 if draws == "nf4" else 1e-4) for row in found)
    assert all("correction/rho_mean" in row for row in found)
    posttrain.train({**cut, "steps": 2}, output="quiet")
    posttrain.resume(tmp_path / "cut", ["steps=4"], output="quiet")
    assert metrics(tmp_path / "cut") == found


def test_a_policy_whose_layers_round_their_inputs_is_corrected_for_and_one_in_4_bits_is_not(
        base: Path, tmp_path: Path) -> None:
    """It is the policy itself that draws: its numbers are exact unless what a layer reads is rounded, too."""
    for quantize, gap in (("int8", 0.1), ("nf4", 1e-4)):
        run = tmp_path / quantize
        posttrain.train(settings(base, run, policy=policy(base, quantize), update={"epochs": 2}), output="quiet")
        assert all(row["sampler/gap_max"] < gap for row in metrics(run))
        assert ("correction/rho_mean" in metrics(run)[0]) == (quantize == "int8")


@pytest.mark.parametrize("changes, weighed", [
    ({"correction": "icepop"}, "icepop"), ({"objective": "decoupled_ppo"}, None),
    ({"update": {"old_logprobs": "behavior"}}, None), ({"update": {"old_logprobs": "recompute"}}, "tis"),
    ({"rollout": {"staleness": 1, "engine": {"use": "batched", "quantize": "nf4"}}}, "tis")], ids=str)
def test_a_correction_is_added_where_no_other_part_is_one(changes: dict[str, Any], weighed: str | None, base: Path,
                                                          tmp_path: Path) -> None:
    given = settings(base, tmp_path / "run", **{
        "rollout": {"engine": {"use": "batched", "quantize": "nf4"}}, **changes,
        "policy": {"use": "hf", "weights": str(base)}})
    loaded = config.load(given, (), discover())
    check(loaded)
    assert (loaded.components["correction"].name if loaded.settings.correction is not None else None) == weighed


def test_a_frozen_quantised_reference(base: Path, tmp_path: Path) -> None:
    plain = {"use": "hf", "weights": str(base), "device": "cpu"}
    posttrain.train(settings(base, tmp_path / "run", policy=plain, reference={**plain, "quantize": "nf4"},
                             kl={"use": "fixed", "placement": "loss", "coef": 0.05}), output="quiet")
    assert all(row["kl/reference"] > 1e-4 for row in metrics(tmp_path / "run"))


def test_a_native_policy_with_a_rounded_sampler_and_reference(base: Path, tmp_path: Path) -> None:
    """Both read the same folder; what was drawn is corrected for, and a resumed run goes on bit for bit."""
    plain = {"use": "torch", "weights": str(base), "device": "cpu"}
    changes = {"policy": plain, "reference": {**plain, "quantize": "int8_weight_only"},
               "kl": {"use": "fixed", "placement": "loss", "coef": 0.05},
               "rollout": {"prompts_per_step": 4, "group_size": 8, "max_new_tokens": 2,
                           "engine": {"use": "batched", "quantize": "nf4"}}}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    posttrain.train(settings(base, whole, **changes), output="quiet")
    posttrain.train(settings(base, cut, **changes, steps=2), output="quiet")
    posttrain.resume(cut, ["steps=4"], output="quiet")
    found = metrics(whole)
    assert metrics(cut) == found and len(found) == 4
    assert yaml.safe_load((whole / "config.yaml").read_text())["correction"] == "tis"
    assert all(row["sampler/gap_max"] > 1e-2 and row["kl/reference"] > 1e-6 for row in found)
    assert found[0]["kl/reference"] < 1e-2  # before the first step it is the rounding alone


@pytest.mark.parametrize("changes, why", [
    ({"policy": {"use": "torch", "quantize": "nf4"}}, r"policy\.quantize: weights in nf4 .*nothing would be trained; "
                                                      r"adapters.*\{use: quantized, weights"),
    ({"policy": {"use": "ssm", "quantize": "int8"}}, r"policy\.quantize: weights in int8 .*backend hf"),
    ({"policy": {"use": "hf", "quantize": "nf4"}}, r"policy\.quantize: .*add adapter: \{use: lora"),
    ({"policy": {"use": "torch"}, "estimator": "gae", "critic": {"use": "torch", "quantize": "nf4"}},
     r"critic\.quantize: weights in nf4")], ids=str)
def test_what_cannot_be_trained_is_refused_before_it_is_loaded(changes: dict[str, Any], why: str, base: Path,
                                                               tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why):
        check(config.load(settings(base, tmp_path / "run", **changes), (f"policy.weights={base}",), discover()))


CONFIG = """
recipe: grpo
steps: 40
seed: 0
threads: 1
policy: {use: quantized, weights: base, device: cpu}
tokenizer: {use: characters, alphabet: "abcd"}
task: {use: rows, path: rows.jsonl}
rewards: {begins: {file: "begins.py:begins"}}
rollout: {prompts_per_step: 4, group_size: 16, max_new_tokens: 2}
optimizer: {lr: 2.0e-3}
trackers: {console: null, jsonl: jsonl}
"""
REWARD = "def begins(completions, answer, **columns):\n" \
    "    return [float(c.startswith(a)) for c, a in zip(completions, answer)]\n"


def test_rewards_rise(base: Path, tmp_path: Path) -> None:
    """From noise to answers that begin with the letter that was asked, by adapters on 4-bit weights."""
    (tmp_path / "base").symlink_to(base)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "begins.py").write_text(REWARD)
    (tmp_path / "qlora.yaml").write_text(CONFIG)
    posttrain.train(tmp_path / "qlora.yaml", [f"run={tmp_path / 'run'}"], output="quiet")
    means = np.array([row["reward/mean"] for row in metrics(tmp_path / "run")])
    first, last = means[:10], means[-10:]
    error = np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / 10)
    assert last.mean() - first.mean() > max(0.15, 4 * error) and last.mean() > 0.8
