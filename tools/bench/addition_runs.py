"""Training runs of `examples/addition` for the scripts beside this one: side by side, a process and a thread each, and
what they measured. Run by itself it does nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import posttrain
from posttrain.rundir import read_metrics

ROOT = Path(__file__).resolve().parents[2]
ADDITION = ROOT / "examples" / "addition"

ACCURACY = "eval/reward/mean"
"""On the 2,000 held-out problems, where the reward is 1 for a right answer."""


class Task(NamedTuple):
    """One run: the config of the example, where it goes and what is set."""

    config: str
    folder: Path
    settings: Sequence[str]


def write_data() -> None:
    """The problems of the demo, beside its configurations."""
    runpy.run_path(str(ADDITION / "demo.py"))["write_data"](ADDITION / "data")


def finished(folder: Path) -> bool:
    """Whether the run came to its end."""
    return (folder / "policy").is_dir()


def train(task: Task) -> None:
    """One run, in this process, from its beginning."""
    shutil.rmtree(task.folder, ignore_errors=True)
    posttrain.train(ADDITION / task.config, [f"run={task.folder}", "threads=1", *task.settings], output="quiet")


def train_all(jobs: int, tasks: Sequence[Task]) -> None:
    """Train what is not finished, several side by side, each in a process of its own; raises what the first failing one
    did."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before the new processes load a framework
    left = [task for task in tasks if not finished(task.folder)]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for number, done in enumerate(as_completed([pool.submit(train, task) for task in left]), 1):
            done.result()
            print(f"{number} of {len(left)} runs", file=sys.stderr, flush=True)


def history(folder: Path, metric: str) -> list[tuple[int, float]]:
    """Iterations and what was measured in them."""
    return [(record["step"], record[metric]) for record in read_metrics(folder) if metric in record]


def last_quarter(folder: Path, metric: str) -> float:
    """Mean over the last quarter of the iterations."""
    found = [x for _, x in history(folder, metric)]
    return statistics.fmean(found[-(len(found) // 4):])
