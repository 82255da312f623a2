"""Whole runs whose answers ONNX Runtime draws: equal to torch's, rounded and corrected for, cut and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import posttrain
import pytest
import yaml
from integration import small
from posttrain import config
from posttrain.errors import ConfigError, InputError
from posttrain.fitting import check
from posttrain.registry import discover
from posttrain.rundir import read_metrics

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
torch.set_num_threads(1)


def rollout(engine: Any, **more: Any) -> dict[str, Any]:
    return {"rollout": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 4, "engine": engine, **more},
            "optimizer": {"lr": 1e-2}, "update": {"epochs": 2}, "evaluate": {"every": 2}}


def run(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    posttrain.train(small.config(folder, **changes), output="quiet")
    return small.metrics(folder)


@pytest.mark.parametrize("engine", ["onnx", {"use": "onnx", "weights": "inputs", "slots": 5}], ids=str)
def test_one_key_apart_a_run_is_that_of_torch(engine: Any, tmp_path: Path) -> None:
    """Losses, rewards and the distance between sampler and trainer, over all steps."""
    ours, theirs = run(tmp_path / "onnx", **rollout(engine)), run(tmp_path / "torch", **rollout("batched"))
    assert len(ours) == len(theirs) == 6
    for a, b in zip(ours, theirs):
        assert "kl/reference" in a
        for name in ("loss/policy", "reward/mean", "kl/reference", "policy/entropy"):
            assert a[name] == pytest.approx(b[name], abs=1e-4), (a["step"], name)
        assert a["sampler/gap_max"] < 1e-4
    timing = [line["timing"] for line in read_metrics(tmp_path / "onnx") if line["step"]]
    assert all(row["sync"] > 0 for row in timing)


@pytest.mark.parametrize("changes", [
    rollout("onnx"), rollout({"use": "onnx", "quantize": "int4"}), rollout("onnx", staleness=1)],
    ids=["exact", "int4", "stale"])
def test_a_run_is_repeated_and_resumed_bit_for_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", **changes)
    run(tmp_path / "cut", **changes, steps=2)
    posttrain.resume(tmp_path / "cut", ["steps=6"], output="quiet")
    assert small.metrics(tmp_path / "cut") == whole and len(whole) == 6


@pytest.mark.parametrize("quantize, gap", [("int8", 1e-5), ("int4", 1e-3)])
def test_a_rounded_sampler_is_corrected_for_unasked(quantize: str, gap: float, tmp_path: Path) -> None:
    found = run(tmp_path / "run", **rollout({"use": "onnx", "quantize": quantize}), correction=None)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["correction"] == "tis"
    assert all(gap < row["sampler/gap_max"] < 0.5 and "correction/rho_mean" in row for row in found)


def test_rewards_rise(tmp_path: Path) -> None:
    """By 4-bit answers: from noise to digits."""
    changes = rollout({"use": "onnx", "quantize": "int4"}, prompts_per_step=8, group_size=8)
    found = [row["reward/mean"] for row in run(tmp_path / "run", **changes, steps=30, kl=None)]
    assert np.mean(found[:3]) < 0.3 and np.mean(found[-5:]) > 0.36


@pytest.mark.parametrize("changes, why", [
    ({"policy": {"use": "ssm", "hidden_size": 16, "layers": 1, "state_size": 4, "head_dim": 8, "device": "cpu"}},
     r"Mamba2(.|\n)*rollout\.engine: batched"),
    ({"policy": {"use": "moe", "hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "experts": 2,
                 "device": "cpu"}}, r"qwen3_moe with experts(.|\n)*batched")], ids=["ssm", "moe"])
def test_a_policy_without_a_graph_is_refused_before_the_first_step(changes: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why):
        posttrain.train(small.config(tmp_path / "run", **rollout("onnx"), **changes), output="quiet")
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_wrong_field_is_told_by_its_key(tmp_path: Path) -> None:
    wrong = small.config(tmp_path / "run", **rollout({"use": "onnx", "quantize": "int3"}))
    with pytest.raises(InputError, match=r"rollout\.engine\.quantize"):
        check(config.load(wrong, (), discover()))
