"""The same RL on five kinds of model, by the files in `examples/addition`, each after a short warm start of its own.

A run is shown to learn where the mean reward of the last quarter of its iterations is above the first by at least 0.15
and by 4 standard errors, those of the means of two samples of iterations; that the reward rises within a quarter makes
this error larger than that of a constant reward. Accuracy is greedy, on the 2,000 held-out problems.

Prediction, written before the first measurement: `hf` learns as `torch` does, in 1.5 times its CPU seconds; `moe` as
well or a little better; `ssm`, whose state must hold two numbers of two digits, slower, but above 4 standard errors;
`quantized` loses a few points to nf4 first, and its adapters of rank 16 regain them more slowly than all weights would.

    python tools/bench/architectures.py --plot docs/architectures.png [--seed 0] [--kinds torch hf ...]

A warm start takes 20 to 60 CPU seconds, a run 80 to 200, one thread each, two side by side.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from addition_runs import ACCURACY, ROOT, Task, history, train_all, write_data

RUNS = ROOT / "runs" / "bench-architectures"

KINDS: Mapping[str, tuple[str, str]] = {"torch": ("rl.yaml", "torch"), "hf": ("hf.yaml", "torch"),
                                        "quantized": ("qlora.yaml", "torch"), "moe": ("moe.yaml", "moe"),
                                        "ssm": ("ssm.yaml", "ssm")}
"""Kind of model -> its configuration, and whose warm start it goes on from."""
WARM: Mapping[str, Sequence[str]] = {
    "torch": (), "moe": ("policy={use: moe, max_positions: 32}",), "ssm": ("policy={use: ssm}", "steps=35")}
"""Settings of a warm start, as the configurations say."""
REWARD = "reward/mean"


def place(seed: int, kind: str) -> Path:
    """The run directory of a kind of model."""
    return RUNS / str(seed) / kind


def warm(seed: int, kind: str) -> Path:
    """The run directory of the warm start it goes on from."""
    return RUNS / str(seed) / f"{KINDS[kind][1]}-sft"


def quarters(seed: int, kind: str) -> tuple[float, float, float]:
    """Mean reward of the first and the last quarter of the iterations, and the standard error of the difference."""
    rewards = [x for _, x in history(place(seed, kind), REWARD)]
    n = len(rewards) // 4
    first, last = rewards[:n], rewards[-n:]
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / n)
    return statistics.fmean(first), statistics.fmean(last), error


def table(seed: int, kinds: Sequence[str]) -> str:
    """A row for each kind of model."""
    lines = ["| `policy` | reward, first quarter | last quarter | rise | standard errors | accuracy before | after |",
             "|---|---:|---:|---:|---:|---:|---:|"]
    for kind in kinds:
        first, last, error = quarters(seed, kind)
        accuracy = [f"{100 * x:.1f} %" for _, x in history(place(seed, kind), ACCURACY)]
        lines.append(f"| `{kind}` | {first:.3f} | {last:.3f} | {last - first:+.3f} | {(last - first) / error:.1f} | "
                     f"{accuracy[0]} | {accuracy[-1]} |")
    return "\n".join(lines)


def draw(seed: int, kinds: Sequence[str], target: Path) -> None:
    """Mean reward of every iteration, and the accuracy on held-out problems where it was measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for number, (metric, title) in enumerate({REWARD: "mean reward", ACCURACY: "held-out accuracy"}.items(), 1):
        axes = figure.add_subplot(1, 2, number)
        for kind in kinds:
            axes.plot(*zip(*history(place(seed, kind), metric), strict=True), label=kind, linewidth=1.2)
        axes.set(title=title, xlabel="iteration", ylim=(0, 1))
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    write_data()
    seed = options.seed
    warm_starts = {warm(seed, kind): WARM[KINDS[kind][1]] for kind in options.kinds}
    train_all(options.jobs, [Task("sft.yaml", folder, [f"seed={seed}", *settings])
                             for folder, settings in warm_starts.items()])
    train_all(options.jobs, [Task(KINDS[kind][0], place(seed, kind), [
        f"seed={seed}", f"policy.weights={warm(seed, kind) / 'policy'}", "checkpoint.every=0"])
        for kind in options.kinds])
    print(table(seed, options.kinds))
    if options.plot:
        draw(seed, options.kinds, options.plot)


if __name__ == "__main__":
    main()
