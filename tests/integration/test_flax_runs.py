"""Whole runs of a policy in JAX: trained, resumed bit for bit, its recorded log-probs those of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import posttrain
import pytest
from integration.small import config, metrics

pytest.importorskip("flax")
pytest.importorskip("optax")

FLAX = {"use": "flax", "hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "max_positions": 32, "device": "cpu"}


def settings(run: Path, **changes: Any) -> dict[str, Any]:
    return config(run, policy=FLAX, **{"steps": 4, "optimizer": {"lr": 1e-2}, **changes})


def weights(run: Path) -> bytes:
    return (run / "policy" / "model.safetensors").read_bytes()


def test_a_run_trains_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    changes = {"update": {"epochs": 2}, "evaluate": {"every": 2}}
    posttrain.train(settings(whole, **changes), output="quiet")
    posttrain.train(settings(cut, **changes, steps=2), output="quiet")
    posttrain.resume(cut, ["steps=4"], output="quiet")
    found = metrics(whole)
    assert len(found) == 4 and metrics(cut) == found and weights(whole) == weights(cut)
    assert max(row["sampler/gap_max"] for row in found) < 1e-4
    assert len({row["reward/mean"] for row in found}) > 1


def test_a_supervised_run_learns(tmp_path: Path) -> None:
    posttrain.train(settings(tmp_path / "run", recipe="sft", kl="none", rewards={}, steps=30), output="quiet")
    found = [row["sft/nll"] for row in metrics(tmp_path / "run")]
    assert sum(found[-5:]) < 0.8 * sum(found[:5])


def test_torch_goes_on_from_what_was_saved(tmp_path: Path) -> None:
    """And the other way round: a folder of weights is nobody's own."""
    posttrain.train(settings(tmp_path / "first", steps=2), output="quiet")
    saved = {"weights": str(tmp_path / "first" / "policy"), "device": "cpu"}
    posttrain.train(settings(tmp_path / "torch", steps=2) | {"policy": {"use": "torch", **saved}}, output="quiet")
    saved = {"weights": str(tmp_path / "torch" / "policy"), "device": "cpu"}
    posttrain.train(settings(tmp_path / "last", steps=2) | {"policy": {"use": "flax", **saved}}, output="quiet")
    assert len(metrics(tmp_path / "last")) == 2
