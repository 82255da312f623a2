"""The demo in other frameworks: trained by torch, by `policy.use=flax`, and by torch with `rollout.engine=onnx`.

Each seed and arm: the warm start of `examples/addition`, then its RL; accuracy is greedy, on the 2,000 held-out
problems. The frameworks draw other random numbers, so runs of equal seeds differ as those of other seeds do; what must
agree are the losses from the same weights and the same rollouts, which `--losses` compares over 20 iterations of four
optimiser steps each.

Prediction, written before the first measurement: medians within 3 points of torch; losses within 1e-5.

    python tools/bench/cross.py [--seeds 0 1 2] [--arms torch flax "onnx rollouts"] [--losses]

A warm start takes 20 CPU seconds in torch, a run 80, one thread each, two side by side; what is finished is not done
again, and the numbers of every run stand as JSON lines in `runs/bench-cross/results.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import posttrain
from addition_runs import ACCURACY, ADDITION, ROOT, Task, history, train_all, write_data
from posttrain.testing.replayed import Recording, Replaying
from posttrain_backends.engines import Batched

RUNS = ROOT / "runs" / "bench-cross"
RESULTS = RUNS / "results.jsonl"


class Arm(NamedTuple):
    """What is set for the warm start and for the RL, and whose warm start it goes on from."""

    warm_start: str
    warm: Sequence[str] = ()
    learned: Sequence[str] = ()


ARMS: Mapping[str, Arm] = {
    "torch": Arm("torch"),
    "flax": Arm("flax", ("policy.use=flax",), ("policy.use=flax",)),
    "onnx rollouts": Arm("torch", (), ("rollout.engine=onnx",)),
}
ITERATIONS = 20
"""Of the comparison of losses."""
PARTS = ("rollout", "update", "sync")
"""Of an iteration."""
COMPARED = ("loss/policy", "loss/kl", "policy/entropy", "grad_norm")


def warm(seed: int, name: str) -> Path:
    """The run directory of a warm start."""
    return RUNS / str(seed) / f"{name}-sft"


def learned(seed: int, arm: str) -> Path:
    """The run directory of the RL of an arm."""
    return RUNS / str(seed) / arm.replace(" ", "-")


def result(seed: int, arm: str) -> dict[str, Any]:
    """Accuracy before and after the RL, and the median seconds of the parts of an iteration."""
    folder = learned(seed, arm)
    accuracy = [x for _, x in history(folder, ACCURACY)]
    timing = [json.loads(line).get("timing", {}) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = {part: statistics.median([step[part] for step in timing if part in step])
               for part in PARTS}
    return {"arm": arm, "seed": seed, "before": accuracy[0], "after": accuracy[-1], "seconds": seconds}


def table(results: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> str:
    """A row for each arm: accuracies of its seeds, their median, and what it lies from torch's."""
    def after(arm: str) -> list[float]:
        return [100 * r["after"] for r in results if r["arm"] == arm]
    base = statistics.median(after("torch")) if after("torch") else float("nan")
    lines = ["| arm | accuracy after RL, by seed | median | to torch | rollout, update, sync (s per iteration) |",
             "|---|---|---:|---:|---|"]
    for arm in arms:
        median = statistics.median(after(arm))
        seconds = [statistics.median(r["seconds"][part] for r in results if r["arm"] == arm) for part in PARTS]
        lines.append(f"| `{arm}` | {', '.join(f'{x:.1f} %' for x in after(arm))} | {median:.1f} % | "
                     f"{median - base:+.1f} | {', '.join(f'{x:.3f}' for x in seconds)} |")
    return "\n".join(lines)


def train_arms(seeds: Sequence[int], arms: Sequence[str], jobs: int) -> list[dict[str, Any]]:
    """Results of all runs, those that are not finished trained first."""
    starts = {(seed, ARMS[arm].warm_start): ARMS[ARMS[arm].warm_start].warm for seed in seeds for arm in arms}
    train_all(jobs, [Task("sft.yaml", warm(seed, name), [f"seed={seed}", *settings])
                     for (seed, name), settings in starts.items()])
    train_all(jobs, [Task("rl.yaml", learned(seed, arm), [
        f"seed={seed}", f"policy.weights={warm(seed, ARMS[arm].warm_start) / 'policy'}", "checkpoint.every=0",
        *ARMS[arm].learned]) for seed in seeds for arm in arms])
    results = [result(seed, arm) for seed in seeds for arm in arms]
    RESULTS.write_text("".join(json.dumps(one) + "\n" for one in results))
    return results


def losses(seed: int, backend: str, engine: object) -> Path:
    """The directory of a short run of a backend from the warm start of torch."""
    folder = RUNS / str(seed) / f"losses-{backend}"
    shutil.rmtree(folder, ignore_errors=True)
    config = {"extends": str(ADDITION / "rl.yaml"), "rollout": {"engine": engine}, "evaluate": {"every": 0},
              "checkpoint": {"every": 0}}
    return posttrain.train(config, [
        f"seed={seed}", f"run={folder}", f"steps={ITERATIONS}", "threads=1", f"policy.use={backend}",
        f"policy.weights={warm(seed, 'torch') / 'policy'}"], output="quiet").directory


def compare_losses(seed: int) -> str:
    """A row for each metric: its largest difference between torch and flax, and its largest value in torch."""
    train_all(1, [Task("sft.yaml", warm(seed, "torch"), [f"seed={seed}"])])
    recording = Recording(Batched())
    torch = losses(seed, "torch", recording)
    flax = losses(seed, "flax", Replaying(recording.kept))
    lines = [f"| metric of {ITERATIONS} iterations | largest difference, torch to flax | largest in torch |",
             "|---|---:|---:|"]
    for metric in COMPARED:
        ours, theirs = ([x for _, x in history(folder, metric)] for folder in (flax, torch))
        difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        lines.append(f"| `{metric}` | {difference:.1e} | {max(map(abs, theirs)):.3g} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--losses", action="store_true", help="compare losses only, of the first seed")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    options = parser.parse_args()
    write_data()
    print(compare_losses(options.seeds[0]) if options.losses else
          table(train_arms(options.seeds, options.arms, options.jobs), options.arms))


if __name__ == "__main__":
    main()
