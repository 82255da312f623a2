"""Whole runs of a policy in JAX: trained, resumed bit for bit, its recorded log-probs those of the trainer."""

from __future__ import annotations

import os
import subprocess
import sys
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


WITHOUT_TORCH = """
import sys
from importlib.machinery import PathFinder
from pathlib import Path

class Without(PathFinder):
    @staticmethod
    def find_spec(name, path=None, target=None):
        absent = name.partition(".")[0] in ("torch", "transformers")
        return None if absent else PathFinder.find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import posttrain
from integration.test_flax_runs import settings
posttrain.train(settings(Path(sys.argv[1]), steps=1), output="quiet")
assert "torch" not in sys.modules
"""


def test_a_run_needs_no_torch(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(tmp_path / "run")], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(metrics(tmp_path / "run")) == 1
