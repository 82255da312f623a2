"""What the ways to weigh a KL do on the task of the demo: where the KL goes, what weight holds it, what it costs.

Each seed: the warm start of `examples/addition`, then from it one RL run per arm, all with the KL in the loss by the
default estimator. Means are over the last quarter of the iterations; accuracy is greedy on the 2,000 held-out problems.

Prediction, written before the first measurement: without a weight the KL passes 0.5; `pid`, `dual` and `band` hold it
within 20 % of the target after some 60 iterations, `adaptive` needs more, since 120 rollouts move it by a factor of
three at most; holding it at a fifth of its free value costs 10 points of accuracy or more, as digits have to move far.

    python tools/bench/kl.py --plot docs/kl.png [--seeds 0 1] [--arms ...]

About 90 CPU seconds a run, one thread each, two runs side by side.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from addition_runs import ACCURACY, ROOT, Task, history, last_quarter, train_all, write_data

RUNS = ROOT / "runs" / "bench-kl"

TARGET = 0.1
"""Nats per action."""
ARMS: Mapping[str, str] = {
    "measured only": "{use: fixed, placement: loss, coef: 0.0}",
    "fixed 0.04": "{use: fixed, placement: loss, coef: 0.04}",
    **{use: f"{{use: {use}, placement: loss, target: {TARGET}}}" for use in ("adaptive", "pid", "dual", "band")},
}
PANELS: Mapping[str, str] = {"kl/reference": "KL to the warm start, nats per action", "kl/coef": "its weight",
                             ACCURACY: "held-out accuracy"}


def place(seed: int, arm: str) -> Path:
    """The run directory of an arm."""
    return RUNS / str(seed) / arm.replace(" ", "-")


def table(seeds: Sequence[int], arms: Sequence[str]) -> str:
    """A row for each run."""
    lines = ["| seed | `kl` | KL | beside the target | weight | accuracy |", "|---|---|---:|---:|---:|---:|"]
    for seed in seeds:
        for arm in arms:
            folder = place(seed, arm)
            kl = last_quarter(folder, "kl/reference")
            beside = f"{100 * (kl / TARGET - 1):+.0f} %" if "target" in ARMS[arm] else ""
            lines.append(f"| {seed} | {arm} | {kl:.3f} | {beside} | {last_quarter(folder, 'kl/coef'):.4f} | "
                         f"{100 * history(folder, ACCURACY)[-1][1]:.1f} % |")
    return "\n".join(lines)


def draw(seed: int, arms: Sequence[str], target: Path) -> None:
    """The KL, its weight and the accuracy of one seed's runs over the iterations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    for number, (metric, title) in enumerate(PANELS.items(), 1):
        axes = figure.add_subplot(1, len(PANELS), number)
        for arm in arms:
            axes.plot(*zip(*history(place(seed, arm), metric), strict=True), label=arm, linewidth=1.2)
        axes.set(title=title, xlabel="iteration")
        axes.grid(alpha=0.25)
        if metric == "kl/reference":
            axes.axhline(TARGET, color="black", linestyle="--", linewidth=1, label="target")
            axes.legend(frameon=False, fontsize="small", ncols=2)
        if metric != ACCURACY:
            axes.set_yscale("log")
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    write_data()
    train_all(options.jobs, [Task("sft.yaml", place(seed, "sft"), [f"seed={seed}"]) for seed in options.seeds])
    train_all(options.jobs, [Task("rl.yaml", place(seed, arm), [
        f"seed={seed}", f"policy.weights={place(seed, 'sft') / 'policy'}", "checkpoint.every=0", f"kl={ARMS[arm]}"])
        for seed in options.seeds for arm in options.arms])
    print(table(options.seeds, options.arms))
    if options.plot:
        draw(options.seeds[0], options.arms, options.plot)


if __name__ == "__main__":
    main()
