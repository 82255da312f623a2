"""Whether a constraint holds two limits against a reward that pays for breaking them, on the task of the demo.

Each seed: a warm start as in `examples/addition`, from demonstrations with up to two marks behind their digits, then
from it one RL run per arm. The reward is 1 for the right digits, and a little more for each `=` and `+` behind right
ones, which nobody wants: the free run learns to write them. The costs are the mean length in tokens and the share of
answers with a `+`; the constrained arms keep them below 4.5 and 0.25. Violations are means over the rollouts of the
last quarter of the iterations, relative to the limit; accuracy is greedy, of the digits alone, on the 2,000 held-out
problems.

Prediction, written before the first measurement: free, both limits broken by far more than 20 %; `pid_lagrangian` and
`augmented_lagrangian` within 2 % of both at the same accuracy within 3 points; `lagrangian` circles, 5 to 10 % over in
some seeds.

    python tools/bench/constraints.py --plot docs/constraints.png [--seeds 0 1 2] [--methods pid_lagrangian ...]

About 150 CPU seconds a run, one thread each, two runs side by side.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from addition_runs import ADDITION, ROOT, Task, history, last_quarter, train_all, write_data

RUNS = ROOT / "runs" / "bench-constraints"

FREE = "free"
METHODS = ("pid_lagrangian", "augmented_lagrangian", "lagrangian")
LIMITS: Mapping[str, float] = {"length": 4.5, "plus": 0.25}
"""A bare answer has four tokens: three digits and its end. A mean of 60 x 512 answers is uncertain by 1.0 % of the
second limit; of one of 0.1, the first that was tried, it would be by 1.7 %."""
MARKS = ("", "", "=", "+", "=+", "++")
"""What stands behind the digits of the demonstrations, in turn."""
PER_CHARACTER = 0.05
"""What the reward pays for each character behind the digits; a `+` is worth twice that."""


def digits(text: str) -> str:
    """The answer without what stands behind it."""
    return text.rstrip("=+")


def correct(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 where the digits are right."""
    return [float(digits(c) == a) for c, a in zip(completions, answer, strict=True)]


def decorated(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """The same, and a little more for everything behind right digits."""
    paid = [PER_CHARACTER * (len(c) - len(digits(c)) + c.count("+")) for c in completions]
    return [right * (1 + more) for right, more in zip(correct(completions, answer), paid, strict=True)]


def plus(completions: list[str], **columns: Any) -> list[float]:
    """1 where the banned character is used."""
    return [float("+" in c) for c in completions]


def write_demonstrations(rows: Path, path: Path) -> None:
    """The first rows of the training problems, their answers marked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, line in enumerate(rows.read_text().splitlines()[:1500]):
        row = json.loads(line)
        lines.append(json.dumps(row | {"completion": row["completion"] + MARKS[number % len(MARKS)]}) + "\n")
    path.write_text("".join(lines))


def settings(seed: int, arm: str, steps: int) -> list[str]:
    """Of one run; the free one measures the costs as rewards without weight."""
    def bound(cost: str) -> str:
        return "weight: 0.0" if arm == FREE else f"at_most: {LIMITS[cost]}"
    file = f"file: '{Path(__file__).resolve()}"
    return [
        f"policy.weights={RUNS / str(seed) / 'sft' / 'policy'}", f"seed={seed}", f"steps={steps}",
        "kl=none", "checkpoint.every=0", "rollout.max_new_tokens=6",
        f"rewards.correct={{{file}:correct', weight: 0.0}}", f"rewards.decorated={{{file}:decorated'}}",
        f"rewards.length={{use: size, unit: tokens, {bound('length')}}}",
        f"rewards.plus={{{file}:plus', {bound('plus')}}}", *([] if arm == FREE else [f"constraint={arm}"])]


def accuracy(folder: Path) -> float:
    """Greedy, in per cent, after the last iteration."""
    return 100 * history(folder, "eval/reward/correct/mean")[-1][1]


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
                found = history(RUNS / str(seed) / arm, metric)
                axis.plot(*zip(*found, strict=True), color=f"C{color}", alpha=0.75, linewidth=1.2,
                          label=arm if i == 0 else None)
        if name in LIMITS:
            axis.axhline(LIMITS[name], color="black", linestyle="--", linewidth=1, label="limit")
        axis.set(title=titles[name], xlabel="iteration")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(arms) + 1, frameon=False)
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    write_data()
    write_demonstrations(ADDITION / "data" / "train.jsonl", RUNS / "marked.jsonl")
    arms = [FREE, *options.methods]
    train_all(options.jobs, [Task("sft.yaml", RUNS / str(seed) / "sft", [
        f"seed={seed}", "steps=400", f"task.path={RUNS / 'marked.jsonl'}",
        "rollout.max_new_tokens=6"]) for seed in options.seeds])
    train_all(options.jobs, [Task("rl.yaml", RUNS / str(seed) / arm, settings(seed, arm, options.steps))
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
