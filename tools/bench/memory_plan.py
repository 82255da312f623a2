"""Predicted against measured memory: 12 configurations of 3 families, each run in a process of its own.

Measured is the resident peak of a run of 2 steps (`memory.profile`) above what its process takes without a model, one
thread; predicted is `posttrain_tuning.memory.predict`, in another process, and its seconds without imports. `CODE` of
that module was chosen with the configurations marked `fitted` in sight. glibc's malloc is told to map every
array on its own, so that what is resident is in use: as it comes it keeps what was freed in pieces below 32 MiB, which
is seen with `--malloc`.

Expected before it was run: a median error of 4 %, the worst 10 %.

    python tools/bench/memory_plan.py [--malloc] [NAME]...     # minutes; prints the table of docs/memory.md
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from processes import ONE_THREAD

LLAMA = {"family": "llama", "hidden_size": 256, "layers": 4, "heads": 8, "kv_heads": 4}
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
QWEN = {"family": "qwen3", "hidden_size": 320, "layers": 6, "heads": 5, "kv_heads": 5}
SMOL = {"family": "smollm3", "hidden_size": 192, "layers": 8, "heads": 6, "kv_heads": 2}
SHARED = {"critic": "policy", "estimator": "gae", "objective": "ppo"}


def case(policy: Mapping[str, Any], tokens: int, new: int = 96, episodes: tuple[int, int] = (8, 8),
         **changes: Any) -> dict[str, Any]:
    """A configuration, by the tokens of a part, of an answer, and prompts and answers of a step."""
    prompts, group = episodes
    return {
        "recipe": "grpo", "steps": 2, "threads": 1, "seed": 7, "kl": "none", "memory": {"profile": True},
        "policy": {"use": "torch", "max_positions": 1024, "device": "cpu", **policy}, "tokenizer": "bytes",
        "rollout": {"prompts_per_step": prompts, "group_size": group, "max_new_tokens": new},
        "batching": {"use": "first_fit", "tokens": tokens}, "optimizer": {"lr": 1e-5}, "checkpoint": {"every": 0},
        "evaluate": {"every": 0}, "trackers": {"console": None, "jsonl": None}, **changes}


CASES: Mapping[str, tuple[bool, dict[str, Any]]] = {
    "llama": (True, case(LLAMA, 4096)),
    "llama, small parts": (True, case(LLAMA, 1024)),
    "llama, checkpointing": (True, case({**LLAMA, "gradient_checkpointing": True}, 4096)),
    "llama, reference": (True, case(LLAMA, 2048, kl="fixed")),
    "qwen3": (True, case(QWEN, 4096)),
    "qwen3, checkpointing": (True, case({**QWEN, "gradient_checkpointing": True}, 8192, episodes=(8, 16))),
    "qwen3, wide": (False, case({**QWEN, "hidden_size": 640, "heads": 10, "kv_heads": 10}, 2048)),
    "qwen3, supervised": (False, case(QWEN, 2048, recipe="sft", batch_size=64)),
    "smollm3": (True, case(SMOL, 4096)),
    "smollm3, critic": (False, case(SMOL, 4096, **SHARED)),
    "smollm3, long answers": (False, case(SMOL, 4096, new=512, episodes=(4, 4))),
    "smollm3, 8-bit moments": (False, case({**SMOL, "hidden_size": 480, "heads": 15, "kv_heads": 5}, 1024,
                                           optimizer={"lr": 1e-5, "moments": "int8"}))}
"""Name -> whether it was looked at while fitting, and the configuration."""


def rows() -> list[dict[str, str]]:
    """Prompts of 32 tokens and answers of 96."""
    return [{"prompt": f"{i:032d}", "completion": "x" * 95, "answer": str(i)} for i in range(64)]


def varied(completions: list[str], **columns: Any) -> list[float]:
    """Differs within groups."""
    return [float(len(c) % 7) for c in completions]


def measured(name: str) -> dict[str, Any]:
    """Bytes by phase, and of the whole run."""
    import posttrain
    import torch  # noqa: F401  # a part of the process, not of the model

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        posttrain.train({**CASES[name][1], "run": str(run), "task": {"use": "rows", "rows": rows()},
                         "rewards": {"varied": varied}}, output="quiet")
        found = json.loads((run / "memory.json").read_text())["measured"]
    phases = {phase: marks["host"] - found["base"] for phase, marks in found["phases"].items()}
    return {"phases": phases, "peak": max(phases.values())}


def predicted(name: str) -> dict[str, Any]:
    """The same, and the seconds it took."""
    import sympy  # noqa: F401  # what fake tensors import
    import torch._subclasses.fake_tensor  # noqa: F401
    from posttrain.config import load
    from posttrain.registry import discover
    from posttrain_backends._torch import generate, imagined, learner  # noqa: F401
    from posttrain_tuning.memory.predict import predict

    loaded = load({**CASES[name][1], "task": {"use": "rows", "rows": rows()}, "rewards": {"varied": varied}}, [],
                  discover())
    start, busy = time.perf_counter(), time.process_time()
    found = predict(loaded)
    return {"phases": found.phases, "peak": found.peak, "seconds": time.perf_counter() - start,
            "cpu": time.process_time() - busy}


def child(what: str, name: str, variables: Mapping[str, str]) -> dict[str, Any]:
    """The JSON of this script in another process."""
    done = subprocess.run([sys.executable, __file__, what, name], env={**os.environ, **ONE_THREAD, **variables},
                          stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{what} {name} failed; its message stands above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(names: list[str], variables: Mapping[str, str]) -> None:
    """Print the table."""
    errors: dict[bool, list[float]] = {True: [], False: []}
    print("| configuration | measured MiB | predicted MiB | error | seconds (CPU) | |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in names or CASES:
        fitted = CASES[name][0]
        real, said = child("measured", name, variables), child("predicted", name, {})
        errors[fitted].append(abs(said["peak"] / real["peak"] - 1))
        print(f"| {name} | {real['peak'] / 2**20:.0f} | {said['peak'] / 2**20:.0f} | "
              f"{100 * (said['peak'] / real['peak'] - 1):+.1f} % | {said['seconds']:.1f} ({said['cpu']:.1f}) | "
              f"{'fitted' if fitted else ''} |", flush=True)
        print(f"{name}: measured {_mib(real['phases'])}; predicted {_mib(said['phases'])}", file=sys.stderr, flush=True)
    for what, found in (("all", errors[True] + errors[False]), ("not fitted", errors[False])):
        if found:
            print(f"{what}: median {100 * statistics.median(found):.1f} %, worst {100 * max(found):.1f} %")


def _mib(phases: Mapping[str, int]) -> str:
    return ", ".join(f"{phase} {size / 2**20:.0f}" for phase, size in phases.items())


if __name__ == "__main__":
    if sys.argv[1:2] in (["measured"], ["predicted"]):
        print(json.dumps(globals()[sys.argv[1]](sys.argv[2])))
    else:
        main([name for name in sys.argv[1:] if name != "--malloc"], {} if "--malloc" in sys.argv else MAPPED)
