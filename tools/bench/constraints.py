"""Whether a constraint holds two limits against a reward that pays for breaking them, on the task of the demo.

Each seed: the warm start of `examples/addition`, then from it one RL run per arm. The reward is 1 for the right digits
and a little for each `=` and `+` behind them, which nobody wants: the free run learns to write them. The costs are the
mean length in tokens and the share of answers with a `+`; the constrained arms keep them below 4 and 0.1. Violations
are means over the rollouts of the last quarter of the iterations, relative to the limit; accuracy is greedy, of the
digits alone, on the 2,000 held-out problems.

Prediction, written before the first measurement: free, both limits broken by far more than 20 %; `pid_lagrangian` and
`augmented_lagrangian` within 2 % of both at the same accuracy within 3 points; `lagrangian` circles, 5 to 10 % over in
some seeds.

    python tools/bench/constraints.py --plot docs/constraints.png [--seeds 0 1 2] [--methods pid_lagrangian ...]

About 80 CPU seconds a run, one thread each, two runs side by side.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import runpy
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import posttrain
from posttrain.rundir import read_metrics

ROOT = Path(__file__).resolve().parents[2]
ADDITION = ROOT / "examples" / "addition"
RUNS = ROOT / "runs" / "bench-constraints"

FREE = "free"
METHODS = ("pid_lagrangian", "augmented_lagrangian", "lagrangian")
LIMITS: Mapping[str, float] = {"length": 4.0, "plus": 0.1}
"""Half of the sums have three digits, so a bare answer has 3.5 tokens on average, its end included."""
PER_CHARACTER = 0.05
"""What the reward pays for each character behind the digits; a `+` is worth twice that."""


def digits(text: str) -> str:
    """The answer without what stands behind it."""
    return text.rstrip("=+")


def correct(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 where the digits are right."""
    return [float(digits(c) == a) for c, a in zip(completions, answer, strict=True)]


def decorated(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """The same, and a little for everything behind the digits."""
    paid = [PER_CHARACTER * (len(c) - len(digits(c)) + c.count("+")) for c in completions]
    return [right + more for right, more in zip(correct(completions, answer), paid, strict=True)]


def plus(completions: list[str], **columns: Any) -> list[float]:
    """1 where the banned character is used."""
    return [float("+" in c) for c in completions]


def settings(seed: int, arm: str, steps: int) -> list[str]:
    """Of one run; the free one measures the costs as rewards without weight."""
    def bound(cost: str) -> str:
        return "weight: 0.0" if arm == FREE else f"at_most: {LIMITS[cost]}"
    file = f"file: '{Path(__file__).resolve()}"
    return [
        f"run={RUNS / str(seed) / arm}", f"policy.weights={RUNS / str(seed) / 'sft' / 'policy'}", f"seed={seed}",
        f"steps={steps}", "threads=1", "kl=none", "checkpoint.every=0", "rollout.max_new_tokens=6",
        f"rewards.correct={{{file}:correct', weight: 0.0}}", f"rewards.decorated={{{file}:decorated'}}",
        f"rewards.length={{use: size, unit: tokens, {bound('length')}}}",
        f"rewards.plus={{{file}:plus', {bound('plus')}}}", *([] if arm == FREE else [f"constraint={arm}"])]


def train(task: tuple[str, Path, Sequence[str]]) -> None:
    """One run, in this process, unless it came to its end before."""
    config, folder, given = task
    if not (folder / "policy").is_dir():
        posttrain.train(ADDITION / config, given, output="quiet")


def train_all(jobs: int, tasks: Sequence[tuple[str, Path, Sequence[str]]]) -> None:
    """Some at a time, each in a process of its own."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        list(pool.map(train, tasks))


def last_quarter(folder: Path, metric: str) -> float:
    """Mean over the rollouts of the last quarter of the iterations."""
    found = [record[metric] for record in read_metrics(folder) if metric in record]
    return statistics.fmean(found[-(len(found) // 4):])


def accuracy(folder: Path) -> float:
    """Greedy, in per cent, after the last iteration."""
    metric = "eval/reward/correct/mean"
    return 100 * float([record[metric] for record in read_metrics(folder) if metric in record][-1])


def draw(seeds: Sequence[int], arms: Sequence[str], target: Path) -> None:
    """Mean cost of every iteration: a panel per cost and one for the accuracy, a line per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metrics = {"length": "reward/length/mean", "plus": "reward/plus/mean", "accuracy": "eval/reward/correct/mean"}
    titles = {"length": "Mean length, tokens", "plus": "Share of answers with a +", "accuracy": "Accuracy of digits"}
    figure, axes = plt.subplots(1, len(metrics), figsize=(13, 3.8), layout="constrained")
    for axis, (name, metric) in zip(axes, metrics.items(), strict=True):
        for color, arm in enumerate(arms):
            for i, seed in enumerate(seeds):
                found = [(r["step"], r[metric]) for r in read_metrics(RUNS / str(seed) / arm) if metric in r]
                axis.plot(*zip(*found, strict=True), color=f"C{color}", alpha=0.75, linewidth=1.2,
                          label=arm if i == 0 else None)
        if name in LIMITS:
            axis.axhline(LIMITS[name], color="black", linestyle="--", linewidth=1, label="limit")
        axis.set(title=titles[name], xlabel="iteration")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    runpy.run_path(str(ADDITION / "demo.py"))["write_data"](ADDITION / "data")
    arms = [FREE, *options.methods]
    train_all(options.jobs, [("sft.yaml", RUNS / str(seed) / "sft", [
        f"run={RUNS / str(seed) / 'sft'}", f"seed={seed}", "threads=1"]) for seed in options.seeds])
    train_all(options.jobs, [("rl.yaml", RUNS / str(seed) / arm, settings(seed, arm, options.steps))
                             for seed in options.seeds for arm in arms])
    print("| seed | arm | length | over its limit | share with + | over its limit | accuracy | beside free |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for seed in options.seeds:
        free = accuracy(RUNS / str(seed) / FREE)
        for arm in arms:
            folder = RUNS / str(seed) / arm
            costs = {name: last_quarter(folder, f"reward/{name}/mean") for name in LIMITS}
            over = {name: 100 * (cost / LIMITS[name] - 1) for name, cost in costs.items()}
            print(f"| {seed} | {arm} | {costs['length']:.3f} | {over['length']:+.1f} % | {costs['plus']:.4f} | "
                  f"{over['plus']:+.1f} % | {accuracy(folder):.1f} % | {accuracy(folder) - free:+.1f} |", flush=True)
    if options.plot:
        draw(options.seeds, arms, options.plot)


if __name__ == "__main__":
    main()
