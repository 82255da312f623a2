"""Runs with `batching: adaptive`: the same training whatever memory there is, and a checkpoint that holds what was
learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import posttrain
import pytest
from integration import small
from posttrain import checkpoint
from posttrain.rundir import read_metrics

torch = pytest.importorskip("torch")
from posttrain_backends._torch.learner import TorchLearner
from posttrain_backends._torch.models.decoder import Decoder

ADAPTIVE = {"use": "adaptive", "tokens": 16}


def column(run: Path, name: str) -> list[float]:
    """A metric of every step."""
    return [line[name] for line in read_metrics(run) if line["step"]]


def assert_equal_training(a: Path, b: Path, *names: str) -> None:
    """Up to rounding, which the split changes."""
    for name in ("grad_norm", *names):
        np.testing.assert_allclose(column(a, name), column(b, name), rtol=1e-4, atol=1e-6, err_msg=name)


def out_of_memory_above(tokens: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make torch fail as a full GPU does, in training and in scoring; returns the sizes that failed, as they do."""
    failed: list[int] = []
    train, score = TorchLearner._count, TorchLearner._outputs

    def require(n: int) -> None:
        if n > tokens:
            failed.append(n)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def outputs(self: TorchLearner, actions: Any, *rest: Any) -> Any:
        require(len(actions.place))
        return score(self, actions, *rest)

    def count(self: TorchLearner, actions: Any) -> None:
        """The last thing that a part does: its gradients are added already."""
        require(len(actions.place))
        train(self, actions)

    monkeypatch.setattr(TorchLearner, "_outputs", outputs)
    monkeypatch.setattr(TorchLearner, "_count", count)
    return failed


@pytest.mark.parametrize("changes", [
    {}, {"critic": "policy", "estimator": "gae", "objective": "ppo", "update": {"steps_per_rollout": 2}}],
    ids=["grpo", "ppo"])
def test_a_run_short_of_memory_is_the_run_with_enough(
        changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posttrain.train(small.config(tmp_path / "enough", **changes), output="quiet")
    failed = out_of_memory_above(60, monkeypatch)
    posttrain.train(small.config(tmp_path / "short", batching=ADAPTIVE, **changes), output="quiet")
    assert failed
    assert_equal_training(tmp_path / "short", tmp_path / "enough", "loss/policy", "loss/kl", "reward/mean")
    retries = column(tmp_path / "short", "batch/memory_retries")
    assert sum(retries[2:]) == 0, "what was learned is kept from step to step"


def test_rollouts_short_of_memory_draw_the_same_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen answers of nine tokens at most: not half of them fit. The first rollout finds out, the others know."""
    new_cache, failed = Decoder.new_cache, list[int]()

    def scarce(self: Decoder, rows: int, columns: int) -> Any:
        if rows * columns > 60:
            failed.append(rows * columns)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return new_cache(self, rows, columns)

    changes = {"evaluate": {"every": 0}}
    posttrain.train(small.config(tmp_path / "enough", **changes), output="quiet")
    monkeypatch.setattr(Decoder, "new_cache", scarce)
    run = posttrain.train(small.config(tmp_path / "short", batching=ADAPTIVE, **changes), output="quiet")
    assert_equal_training(tmp_path / "short", tmp_path / "enough", "loss/kl", "reward/mean")
    assert 1 <= len(failed) <= 2 and run.state.budget.of["rollout"].failures == 1


def test_a_resumed_run_knows_what_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = out_of_memory_above(60, monkeypatch)
    run = tmp_path / "run"
    posttrain.train(small.config(run, steps=4, batching=ADAPTIVE), output="quiet")
    saved = checkpoint.load(run / "checkpoints" / "step-000004").values["state"]["budget"]["of"]
    assert {"update", "score/reference"} <= set(saved)
    before = len(failed)
    assert before > 0
    finished = posttrain.resume(run, ["steps=6"], output="quiet")
    assert len(failed) == before
    assert finished.state.budget.of["update"].failures == saved["update"]["failures"]


def test_a_resumed_run_may_change_its_planner(tmp_path: Path) -> None:
    run = tmp_path / "run"
    posttrain.train(small.config(run, steps=2, optimizer={"lr": 1e-2}), output="quiet")
    posttrain.resume(run, ["steps=4", "batching=adaptive"], output="quiet")
    finished = posttrain.resume(run, ["steps=6", "batching=first_fit"], output="quiet")
    assert finished.state.budget == 16384
    assert len(column(run, "grad_norm")) == 6


def test_supervised_runs_adapt_too(tmp_path: Path) -> None:
    changes = {"recipe": "sft", "kl": "none", "batch_size": 8}
    for name, more in (("fixed", {}), ("adaptive", {"batching": ADAPTIVE})):
        posttrain.train(small.config(tmp_path / name, **changes, **more), output="quiet")
    assert_equal_training(tmp_path / "fixed", tmp_path / "adaptive", "loss/sft")
    assert column(tmp_path / "adaptive", "batch/parts")[0] > 1
