"""A killed run that is resumed equals the run that was never killed: weights, moments, metrics, to the last bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import posttrain
import pytest
import yaml
from integration import small
from posttrain import checkpoint
from posttrain.errors import CheckpointDamaged, RunInUse
from posttrain.rundir import read_metrics

pytest.importorskip("torch")
SMALL = Path(__file__).with_name("small.py")

OFF_POLICY = {"rollout": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 4, "staleness": 1},
              "replay": {"capacity": 32, "reuse": 8}, "critic": "policy", "estimator": "gae", "objective": "ppo",
              "update": {"steps_per_rollout": 2, "epochs": 2}}
SFT = {"recipe": "sft", "kl": "none", "batch_size": 8}
CASES: dict[str, dict[str, Any]] = {"grpo": {}, "off-policy ppo": OFF_POLICY, "sft": SFT}


def run(directory: Path, action: str, *when: str, changes: dict[str, Any]) -> int:
    environment = {**os.environ, "CHANGES": json.dumps(changes), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(SMALL), str(directory), action, *when], env=environment,
                          timeout=120).returncode


def history(directory: Path) -> list[dict[str, Any]]:
    """Metric lines without what may differ between equal runs."""
    return [{k: v for k, v in line.items() if k != "timing"} for line in read_metrics(directory)]


def assert_equal_runs(a: Path, b: Path) -> None:
    assert history(a) == history(b)
    assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()
    for step in ("step-000002", "step-000004", "step-000006"):
        one, two = (checkpoint.load(d / "checkpoints" / step) for d in (a, b))
        assert one.values == two.values
        assert set(one.arrays) == set(two.arrays)
        for group in one.arrays:
            assert set(one.arrays[group]) == set(two.arrays[group])
            for name, x in one.arrays[group].items():
                y = two.arrays[group][name]
                assert x.dtype == y.dtype and np.array_equal(x, y), (step, group, name)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = {}
    for name, changes in CASES.items():
        runs[name] = tmp_path_factory.mktemp("whole") / "run"
        assert run(runs[name], "train", changes=changes) == 0
    return runs


MOMENTS = [
    ("in a rollout", "posttrain_backends._torch.generate:TorchSampler.rollout", 4),
    ("in the rewards", "posttrain.trainer:score_rewards", 5),
    ("in the update", "posttrain.update:optimiser_step", 3),
    ("between record and checkpoint", "posttrain.checkpoint:save", 2),
    ("while a checkpoint is written", "posttrain.checkpoint:_flush", 9),
    ("before a checkpoint is published", "posttrain.checkpoint:_publish", 2),
    ("before the first checkpoint", "posttrain.trainer:annotate", 2),
]


@pytest.mark.parametrize(("function", "call"), [m[1:] for m in MOMENTS], ids=[m[0] for m in MOMENTS])
def test_killed_and_resumed_equals_uninterrupted(
        function: str, call: int, uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    killed = tmp_path / "run"
    assert run(killed, "train", function, str(call), changes={}) == -signal.SIGKILL
    assert len(read_metrics(killed)) < 7
    assert run(killed, "resume", changes={}) == 0
    assert_equal_runs(uninterrupted["grpo"], killed)


@pytest.mark.parametrize("case", ["off-policy ppo", "sft"])
def test_all_state_resumes(case: str, uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    """Replay, lagging weights, several optimiser steps, a critic; and the other loop."""
    killed = tmp_path / "run"
    assert run(killed, "train", "posttrain.checkpoint:save", "3", changes=CASES[case]) == -signal.SIGKILL
    assert run(killed, "resume", changes={}) == 0
    assert_equal_runs(uninterrupted[case], killed)


def test_one_seed_gives_one_result(uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    assert run(tmp_path / "run", "train", changes={}) == 0
    assert_equal_runs(uninterrupted["grpo"], tmp_path / "run")
    assert run(tmp_path / "other", "train", changes={"seed": 8}) == 0
    assert history(tmp_path / "other") != history(uninterrupted["grpo"])


def test_sigterm_finishes_the_step_saves_and_says_how_to_go_on(
        uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "posttrain.cli", "train", str(_as_file(tmp_path, directory))],
                               env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (directory / "metrics.jsonl").exists():
        time.sleep(0.05)
    while time.monotonic() < deadline and len(read_metrics(directory)) < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert f"posttrain resume {directory}" in said
    last = read_metrics(directory)[-1]["step"]
    assert checkpoint.newest(directory / "checkpoints", fallback=False) == directory / f"checkpoints/step-{last:06d}"


def _as_file(folder: Path, directory: Path) -> Path:
    changes = {"steps": 10**6, "checkpoint": {"every": 0}, "rewards": {"correct": {"file": f"{SMALL}:correct"}}}
    file = folder / "train.yaml"
    file.write_text(yaml.safe_dump(small.config(directory, **changes)))
    return file


def test_a_damaged_checkpoint_stops_the_resume_unless_the_one_before_is_allowed(
        uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    killed = tmp_path / "run"
    assert run(killed, "train", "posttrain.checkpoint:save", "3", changes={}) == -signal.SIGKILL
    file = killed / "checkpoints" / "step-000004" / "policy.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointDamaged, match=r"policy\.safetensors") as damaged:
        posttrain.resume(killed, output="quiet")
    assert damaged.value.exit_code == 3 and "resume.fallback=true" in str(damaged.value)
    posttrain.resume(killed, ["resume.fallback=true"], output="quiet")
    assert_equal_runs(uninterrupted["grpo"], killed)


def test_a_finished_run_has_nothing_left_to_do(uninterrupted: dict[str, Path]) -> None:
    before = history(uninterrupted["grpo"])
    assert posttrain.resume(uninterrupted["grpo"], output="quiet").state.step == 6
    assert history(uninterrupted["grpo"]) == before


def test_a_run_directory_in_use_is_refused(uninterrupted: dict[str, Path]) -> None:
    from posttrain.rundir import RunDirectory

    with RunDirectory.open(uninterrupted["grpo"]), pytest.raises(RunInUse, match=str(os.getpid())):
        posttrain.resume(uninterrupted["grpo"], output="quiet")
