"""Runs with `memory.profile`: the peak of each phase, what takes it, and an alarm where memory grows."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import posttrain
import pytest
from integration import small
from posttrain.rundir import read_metrics

torch = pytest.importorskip("torch")
from posttrain_backends._torch.learner import TorchLearner
from posttrain_backends._torch.memory import SNAPSHOT, watermark_of

PROFILED = {"memory": {"profile": True}, "evaluate": {"every": 0}}
PHASES = {"rollout", "reward", "score", "update", "backward", "optimiser", "sync"}
WIDE = {"use": "torch", "hidden_size": 128, "layers": 2, "heads": 4, "kv_heads": 2, "max_positions": 32,
        "device": "cpu"}
leaked: list[np.ndarray] = []


def timing(run: Path) -> list[dict[str, float]]:
    return [line["timing"] for line in read_metrics(run) if line["step"]]


def measured(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "memory.json").read_text())["measured"]
    return found


def leaking(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """A reward that keeps 4 MiB of each call; in the run's own process."""
    leaked.append(np.ones(2**19))
    return small.correct(completions, answer)


def test_the_peak_of_each_phase_is_recorded(tmp_path: Path) -> None:
    run = tmp_path / "run"
    posttrain.train(small.config(run, policy=WIDE, **PROFILED), output="quiet")
    for step in timing(run):
        peaks = {name.split("/")[1]: value for name, value in step.items() if name.endswith("/host_mb")}
        assert set(peaks) >= PHASES
        assert peaks["update"] == max(peaks["update"], peaks["backward"], peaks["optimiser"]), "what is inside counts"
        assert peaks["rollout"] >= peaks["reward"] > 0
    phases = measured(run)["phases"]
    assert set(phases) == {*PHASES, "load", "checkpoint"}
    assert phases["load"]["host"] >= measured(run)["base"] > 0


def test_categories_are_the_model_s_own_sizes(tmp_path: Path) -> None:
    """Parameters and gradients in float32, two moments each; keys and values of 2 layers and 2 heads of 32."""
    run = tmp_path / "run"
    posttrain.train(small.config(run, policy=WIDE, kl="none", **PROFILED), output="quiet")
    found = measured(run)["categories"]
    weights = sum(p.nbytes for p in load_file(run / "policy").values())
    assert found["parameters"] == found["gradients"] == weights
    assert found["optimiser"] == 2 * weights
    assert found["kv_cache"] % (2 * 2 * 2 * 32 * 4) == 0 and found["kv_cache"] >= 16 * 4 * (2 * 2 * 2 * 32 * 4)
    assert timing(run)[-1]["memory/parameters_mb"] == pytest.approx(weights / 2**20)


def load_file(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file as load

    found: dict[str, Any] = load(folder / "model.safetensors")
    return found


def test_a_profile_changes_nothing_else(tmp_path: Path) -> None:
    for name, changes in (("plain", {}), ("profiled", {"memory": {"profile": True}})):
        posttrain.train(small.config(tmp_path / name, **changes), output="quiet")
    assert small.metrics(tmp_path / "plain") == small.metrics(tmp_path / "profiled")
    assert not (tmp_path / "plain" / "memory.json").exists()


@pytest.mark.parametrize("reward", [leaking, small.correct])
def test_memory_that_grows_is_told_once(reward: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    leaked.clear()
    with caplog.at_level(logging.WARNING):
        posttrain.train(small.config(
            tmp_path / "run", steps=40, rewards={"correct": reward}, reward_workers={"fork": False},
            checkpoint={"every": 0}, **PROFILED), output="quiet")
    leaked.clear()
    told = [record.message for record in caplog.records if "memory grows by" in record.message]
    assert len(told) == (reward is leaking), told
    if told:
        assert float(told[0].split()[3]) == pytest.approx(4, abs=1)


def test_the_report_shows_the_phases(tmp_path: Path) -> None:
    run = tmp_path / "run"
    posttrain.train(small.config(run, **PROFILED), output="quiet")
    page = (run / "report.html").read_text()
    assert "<h2>Memory</h2>" in page and 'aria-label="Peak of each phase"' in page
    assert "kv cache" in page and "timing/memory" not in page


def test_a_resumed_run_goes_on_watching(tmp_path: Path) -> None:
    run = tmp_path / "run"
    posttrain.train(small.config(run, steps=3, **PROFILED), output="quiet")
    posttrain.resume(run, ["steps=5"], output="quiet")
    assert all("memory/backward/host_mb" in step for step in timing(run)) and len(timing(run)) == 5


def test_a_host_keeps_no_marks_of_its_own() -> None:
    assert watermark_of(torch.device("cpu")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA's allocator is what is asked")
def test_cuda_is_watched_and_explained_where_it_fails(tmp_path: Path) -> None:
    run = tmp_path / "run"
    posttrain.train(small.config(run, policy={**WIDE, "device": "cuda"}, **PROFILED), output="quiet")
    phases = measured(run)["phases"]
    assert phases["update"]["reserved"] >= phases["update"]["allocated"] > 0
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**45, device="cuda")
    assert (run / SNAPSHOT).stat().st_size


def test_a_learner_holds_gradients_from_accumulate_to_apply(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[int] = []
    apply = TorchLearner.apply

    def applied(self: TorchLearner, *args: Any) -> Any:
        seen.append(self.held()["gradients"])
        result = apply(self, *args)
        seen.append(self.held()["gradients"])
        return result
    monkeypatch.setattr(TorchLearner, "apply", applied)
    posttrain.train(small.config(tmp_path / "run", steps=3), output="quiet")
    assert len(set(seen[::2])) == 1 and seen[0] > 0 and set(seen[1::2]) == {0}
