"""Runs whose reference is in ONNX Runtime: the numbers of one in torch, also where it moves after the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import posttrain
import pytest
from integration.small import config, metrics
from posttrain.errors import ConfigError

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("posttrain_objectives")

KL = {"use": "fixed", "placement": "loss", "coef": 0.05}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a run in torch wrote."""
    run = tmp_path_factory.mktemp("first") / "run"
    posttrain.train(config(run, kl="none", steps=3), output="quiet")
    return str(run / "policy")


def with_reference(run: Path, folder: str, reference: str | None, **changes: Any) -> list[dict[str, Any]]:
    """The steps of a run whose policy begins at the folder, as its reference does."""
    given = {} if reference is None else {"reference": {"use": reference, "weights": folder}}
    policy = {"use": "torch", "weights": folder, "device": "cpu"}
    posttrain.train(config(run, policy=policy, kl=KL, **given, **changes), output="quiet")
    return metrics(run)


def require_equal(found: list[dict[str, Any]], expected: list[dict[str, Any]], *names: str) -> None:
    assert len(found) == len(expected) == 6
    for name in names:
        assert max(abs(row[name]) for row in expected) > 1e-3
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], rel=1e-3, abs=1e-4), name


def test_a_frozen_reference_says_what_one_in_torch_says(folder: str, tmp_path: Path) -> None:
    ours, theirs = (with_reference(tmp_path / name, folder, name) for name in ("onnx", "torch"))
    require_equal(ours, theirs, "grad_norm", "loss/kl", "kl/reference")


@pytest.mark.parametrize("how", [{"every": 2}, {"every": 1, "rate": 0.3}], ids=["reset", "soft"])
def test_a_moving_reference_follows_as_one_in_torch_does(how: dict[str, Any], folder: str, tmp_path: Path) -> None:
    ours, theirs = (with_reference(tmp_path / str(name), folder, name, reference_update=how)
                    for name in ("onnx", None))
    require_equal(ours, theirs, "grad_norm", "loss/kl", "kl/reference", "kl/initial")


def test_a_run_with_a_moving_reference_resumes(folder: str, tmp_path: Path) -> None:
    optimizer = {"lr": 1e-2, "warmup_steps": 2, "schedule": "cosine", "total_steps": 6}
    whole = with_reference(tmp_path / "whole", folder, "onnx", reference_update={"every": 2}, optimizer=optimizer)
    with_reference(tmp_path / "half", folder, "onnx", reference_update={"every": 2}, optimizer=optimizer, steps=3)
    posttrain.resume(tmp_path / "half", ["steps=6"], output="quiet")
    assert metrics(tmp_path / "half") == whole


@pytest.mark.parametrize("key", ["policy", "critic"])
def test_nothing_is_trained_in_it(key: str, folder: str, tmp_path: Path) -> None:
    changes = {"estimator": "gae"} if key == "critic" else {}
    with pytest.raises(ConfigError, match=rf"{key}\.use: onnx .*train.*torch.*reference.*rollout\.engine: onnx"):
        posttrain.train(config(tmp_path / "run", **changes, **{key: {"use": "onnx", "weights": folder}}))


def test_a_moving_reference_of_another_shape_is_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not fit the model"):
        posttrain.train(config(tmp_path / "run", kl=KL, reference={"use": "onnx", "weights": folder},
                               reference_update={"every": 2}, policy={
                                   "use": "torch", "hidden_size": 16, "layers": 1, "heads": 2, "device": "cpu"}))
