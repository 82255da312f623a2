"""A run in a process whose memory is limited once its models are loaded: `python limited.py DIRECTORY PLANNER MIB`.

`PLANNER` is a name, or `unretried`: first fit, and the first part that does not fit ends the run. 0 MiB do not limit.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import posttrain
from integration import small
from posttrain import passes
from posttrain.hookspecs import hookimpl
from posttrain.memory import HostMemory

CHANGES: dict[str, Any] = {
    "steps": 3, "tokenizer": "bytes", "optimizer": {"lr": 1e-3}, "evaluate": {"every": 0},
    "policy": {"use": "torch", "hidden_size": 64, "layers": 2, "heads": 2, "kv_heads": 1, "max_positions": 96,
               "device": "cpu"},
    "rollout": {"prompts_per_step": 32, "group_size": 8, "max_new_tokens": 64}}
"""Some 15,000 tokens to a step, which take some hundred MiB in one part."""


class Limiting:
    """A plugin that leaves so many MiB beside what is held when the run starts."""

    def __init__(self, mib: int) -> None:
        self.mib = mib

    @hookimpl
    def run_started(self, run: Any) -> None:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (HostMemory().start().used + self.mib * 2**20, hard))


def unretried(costs: Any, parts: Any, error: Exception) -> int:
    raise error


if __name__ == "__main__":
    directory, planner, mib = sys.argv[1:]
    batching: dict[str, Any] = {"use": "first_fit", "tokens": 1 << 15}
    if planner == "adaptive":
        batching = {"use": "adaptive", "tokens": 256, "knee": 0.0}
    elif planner == "unretried":
        passes.smaller_budget = unretried
    registry = posttrain.discover([Limiting(int(mib))] if int(mib) else [])
    posttrain.train(small.config(Path(directory), batching=batching, **CHANGES), registry=registry, output="quiet")
