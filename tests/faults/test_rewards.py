"""Whole runs whose rewards raise, hang or die: what is learned, what is counted, what stops, what is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import posttrain
import psutil
import pytest
from integration import small
from posttrain import checkpoint, cli
from posttrain.errors import RewardError
from posttrain.rundir import read_metrics

pytest.importorskip("torch")

FAULTY = """
import os, time

calls = []

def digits(completions, **columns):
    return [sum(map(str.isdigit, text)) / 4 for text in completions]

def hangs(completions, **columns):
    for text in completions:
        while "+" in text and "=" in text:
            time.sleep(1)
    return digits(completions)

def dies(completions, **columns):
    if any("+" in text and "=" in text for text in completions):
        os.kill(os.getpid(), 9)
    return digits(completions)

def raises(completions, **columns):
    if any("+" in text and "=" in text for text in completions):
        raise ValueError("a sum is not an answer")
    return digits(completions)

def short(completions, **columns):
    return digits(completions)[1:]

def not_applicable(completions, **columns):
    return [None if "+" in text and "=" in text else 1.0 * len(text) for text in completions]

async def later(completions, **columns):
    return digits(completions)
"""


@pytest.fixture
def rewards(tmp_path: Path) -> str:
    (tmp_path / "faulty.py").write_text(FAULTY)
    return str(tmp_path / "faulty.py")


@pytest.fixture(autouse=True)
def no_orphans() -> Iterator[None]:
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    yield
    assert {p.pid for p in psutil.Process().children(recursive=True)} == before


def trained(directory: Path, rewards: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    settings = small.config(directory, **{"steps": 2, "rewards": rewards, "evaluate": {"every": 0},
                                          "optimizer": {"lr": 1e-2},
                                          "reward_workers": {"max_error_rate": 1.0}, **changes})
    return read_metrics(posttrain.train(settings, output="quiet").directory)


def numbers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "timing" and not k.startswith("timing/")} for line in lines]


def weights(directory: Path) -> dict[str, np.ndarray]:
    return dict(checkpoint.load(directory / "checkpoints" / "step-000002").arrays["policy"])


@pytest.mark.parametrize("fault", ["hangs", "dies"])
def test_a_fault_concerns_its_own_rows(tmp_path: Path, rewards: str, fault: str) -> None:
    """The run equals, bit for bit, one whose reward says None for exactly these rows."""
    faulty = trained(tmp_path / "a", {"mine": {"file": f"{rewards}:{fault}", "timeout": 0.3}})
    (tmp_path / "none.py").write_text(FAULTY.replace("1.0 * len(text)", "digits([text])[0]"))
    sound = trained(tmp_path / "b", {"mine": {"file": f"{tmp_path / 'none.py'}:not_applicable"}})
    counted = ("reward/mine/timeouts", "reward/mine/respawned", "reward/dropped")
    assert sum(line["reward/mine/timeouts"] for line in faulty) > 0
    assert all(line["reward/dropped"] == line["reward/mine/timeouts"] == line["reward/mine/excluded"]
               for line in faulty)
    assert [{k: v for k, v in line.items() if k not in counted} for line in numbers(faulty)] == [
        {k: v for k, v in line.items() if k not in counted} for line in numbers(sound)]
    one, two = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_run_is_the_same_with_one_worker_and_with_three(tmp_path: Path, rewards: str) -> None:
    entries = {"digits": {"file": f"{rewards}:later"}, "length": {"use": "length", "soft_limit": 1, "hard_limit": 4},
               "mine": {"file": f"{rewards}:raises", "on_error": "drop_group", "weight": 0.5}}
    runs = [trained(tmp_path / str(count), entries, reward_workers={"count": count, "max_error_rate": 1.0})
            for count in (1, 3)]
    assert numbers(runs[0]) == numbers(runs[1]) and sum(line["reward/mine/errors"] for line in runs[0]) > 0
    one, two = weights(tmp_path / "1"), weights(tmp_path / "3")
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_function_from_python_and_its_file_give_the_same_run(tmp_path: Path) -> None:
    """Forked, in process, and in a fresh worker, as the kept configuration has it."""
    trained(tmp_path / "forked", {"correct": small.correct})
    trained(tmp_path / "within", {"correct": small.correct}, reward_workers={"fork": False})
    posttrain.train(tmp_path / "forked" / "config.yaml", [f"run={tmp_path / 'fresh'}"], output="quiet")
    runs = [numbers(read_metrics(tmp_path / name)) for name in ("forked", "within", "fresh")]
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize(("function", "message"), [
    ("raises", r"reward 'mine' raised ValueError: a sum is not an answer on row .*rows\.jsonl:\d+ at .*faulty\.py:\d+"),
    ("short", "reward 'mine' returned 15 numbers for 16 completions")])
def test_errors_stop_the_run_and_end_its_workers(tmp_path: Path, rewards: str, function: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        trained(tmp_path / "run", {"mine": {"file": f"{rewards}:{function}"}})


def test_more_failures_than_allowed_stop_the_run(tmp_path: Path, rewards: str) -> None:
    with pytest.raises(RewardError, match=r"a sum is not an answer on row .*\n.*\n\d+ of 16 rows failed, more than "
                                          r"reward_workers\.max_error_rate \(0\)"):
        trained(tmp_path / "run", {"mine": {"file": f"{rewards}:raises", "on_error": "zero"}},
                reward_workers={"max_error_rate": 0})


def test_rules_that_are_none_are_named_at_their_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.yaml").write_text(
        "rewards:\n  a:\n    use: length\n    on_error: drop\n    timeout: 0\n  b:\n    use: length\n    timeout: -1\n"
        "reward_workers:\n  max_error_rate: 2\n")
    assert cli.main(["check", str(tmp_path / "train.yaml")]) == 2
    told = capsys.readouterr().err
    assert "rewards.a.on_error must be one of 'fail', 'drop_sample', 'drop_group', 'zero', got 'drop'" in told
    assert "rewards.b.timeout must be positive and finite, got -1.0 " in told and "train.yaml:8" in told
    assert "max_error_rate lies in [0, 1], got 2" in told and "train.yaml:10" in told


def test_a_killed_run_leaves_no_process(tmp_path: Path) -> None:
    """SIGKILL in the rewards of a step."""
    run = subprocess.Popen([sys.executable, small.__file__, str(tmp_path / "run"), "train",
                            "posttrain.rewards.pool:Pool.run", "2"], env={**os.environ, "OMP_NUM_THREADS": "1"})
    workers: dict[int, psutil.Process] = {}
    until = time.monotonic() + 60
    while run.poll() is None and time.monotonic() < until:
        try:
            workers |= {p.pid: p for p in psutil.Process(run.pid).children()}
        except psutil.NoSuchProcess:
            break
        time.sleep(0.01)
    assert run.wait() == -9 and workers
    assert not psutil.wait_procs(list(workers.values()), timeout=5)[1]
