"""The smallest real run: one-digit sums by a transformer of a few thousand parameters. Also a script, to be killed.

`python small.py DIRECTORY train|resume [MODULE:NAME CALL]` kills itself with SIGKILL when the named function is called
for the given time.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import posttrain
from posttrain.rundir import read_metrics

DATA = Path(__file__).with_name("data")
ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b), "answer": str(a + b)} for a in range(5) for b in range(5)]


def correct(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 for the sum, a little for any digit: groups then differ from the start."""
    return [float(c == a) + 0.1 * sum(x.isdigit() for x in c) for c, a in zip(completions, answer, strict=True)]


def config(directory: Path, **changes: Any) -> dict[str, Any]:
    """A configuration that runs six steps in about a second."""
    settings = {
        "recipe": "grpo", "steps": 6, "threads": 1, "run": str(directory), "seed": 7,
        "policy": {"use": "torch", "hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "max_positions": 32,
                   "device": "cpu"},
        "tokenizer": {"use": "characters", "alphabet": "0123456789+="},
        "task": {"use": "rows", "path": str(DATA / "rows.jsonl"), "held_out": str(DATA / "held_out.jsonl")},
        "rewards": {"correct": correct},
        "kl": {"use": "adaptive", "placement": "loss", "target": 0.05, "coef": 0.1, "horizon": 50},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 4},
        "optimizer": {"lr": 1e-2, "warmup_steps": 2, "schedule": "cosine"},
        "checkpoint": {"every": 2, "keep": 0}, "evaluate": {"every": 3},
        "trackers": {"console": None, "jsonl": None},
    }
    return {**settings, **changes}


def metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of a run's steps, without what differs each time."""
    return [{k: v for k, v in line.items() if k != "timing"} for line in read_metrics(run) if line["step"]]


def rise(means: Sequence[float]) -> tuple[float, float]:
    """The mean of the last quarter less that of the first, and its standard error."""
    n = len(means) // 4
    first, last = np.array(means[:n]), np.array(means[-n:])
    return float(last.mean() - first.mean()), float(np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / n))


def kill_at(function: str, call: int) -> None:
    """Replace `module:name` by one that ends this process at its n-th call."""
    module, _, path = function.partition(":")
    *owners, name = path.split(".")
    owner: Any = import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), iter(range(1, 10**9))

    def deadly(*args: Any, **named: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **named)

    setattr(owner, name, deadly)


if __name__ == "__main__":
    directory, action, *when = sys.argv[1:]
    if when:
        kill_at(when[0], int(when[1]))
    changes = json.loads(os.environ.get("CHANGES", "{}"))
    if action == "train":
        posttrain.train(config(Path(directory), **changes), output="quiet")
    else:
        posttrain.resume(directory, output="quiet")
