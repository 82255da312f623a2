"""What the demo still learns from old data: a sampler that lags behind, replay, and the corrections against both.

Each seed: the warm start of `examples/addition`, then from it one RL run per arm. All arms have the same rows, seeds,
optimiser and numbers of episodes and optimiser steps, unless the arm says so. The gain is greedy accuracy on the 2,000
held-out problems after the last step, minus that of the warm start.

Prediction, written before the first measurement, at an age of 8 iterations (32 optimiser steps): on policy +50 points;
uncorrected 15 to 30 points less, since answers that are long unlearnt are still pushed down; weights per token (`tis`,
`icepop`) keep 90 % of the gain; the ratio to the sampler in the loss keeps 80 %, since its clip cuts most gradients of
old answers; sequence weights lie below those of tokens by their variance. Half of the rollouts, each used five times,
reach the on-policy accuracy. `vtrace` gains +20 to +40 and `retrace` with action values +10 to +30: their critics
start at nothing, and GRPO's group baseline needs none.

    python tools/bench/stale.py --plot docs/stale.png [--seeds 0 1 2] [--arms ...] [--staleness 8] [--set steps=60 ...]

About 80 CPU seconds a run (`half, replay`: 140), one thread each, two runs side by side. What was found is told in
`docs/old_data.md`.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from addition_runs import ACCURACY, ROOT, Task, finished, history, train_all, write_data
from posttrain.rundir import CONFIG

RUNS = ROOT / "runs" / "bench-stale"

STALE = "rollout.staleness={age}"
COMMON = ("kl=none", "checkpoint.every=0")
"""No KL to the warm start in any arm: its adaptive coefficient is steered by a KL that is measured on the sampler's
answers, so it would differ between the arms and hide what the corrections do."""
HALF = "rollout.prompts_per_step=32"

VTRACE = ("estimator={use: vtrace, truncation: terminal}", "critic=policy")
"""An answer that is cut off is wrong here, so it must not earn the critic's value of its last state."""

ARMS: Mapping[str, tuple[str, ...]] = {
    "on policy": (),
    "uncorrected": (STALE, "update.old_logprobs=recompute"),
    "tis token": (STALE, "correction=tis"),
    "tis sequence": (STALE, "correction={use: tis, weight: sequence}"),
    "icepop": (STALE, "correction=icepop"),
    "ratio to sampler": (STALE, "update.old_logprobs=behavior"),
    "clipped_is": (STALE, "estimator=clipped_is"),
    "vtrace on policy": VTRACE,
    "vtrace": (STALE, *VTRACE),
    "retrace q_head": (STALE, "estimator={use: retrace, q: q_head, truncation: terminal}", "critic=policy",
                       "value_objective=action_value", "correction=tis"),
    "half": (HALF,),
    "half, replay": (HALF, "replay={reuse: 1024, capacity: 1280, max_age: 4}", "update.steps_per_rollout=10",
                     "correction=tis"),
}


@dataclass(frozen=True)
class Curve:
    """Held-out accuracy of one run, in per cent, and the answers that were generated for it."""

    steps: Sequence[int]
    accuracy: Sequence[float]
    answers_per_step: float

    @property
    def gain(self) -> float:
        return self.accuracy[-1] - self.accuracy[0]

    @property
    def answers(self) -> list[float]:
        """Fresh answers up to each point."""
        return [step * self.answers_per_step for step in self.steps]


def place(runs: Path, seed: int, arm: str) -> Path:
    """The run directory of an arm."""
    return runs / str(seed) / arm.replace(",", "").replace(" ", "-")


def learned(folder: Path) -> Curve:
    """What a finished run measured on the held-out problems."""
    rollout = yaml.safe_load((folder / CONFIG).read_text("utf-8"))["rollout"]
    found = history(folder, ACCURACY)
    return Curve([step for step, _ in found], [100 * accuracy for _, accuracy in found],
                 rollout["prompts_per_step"] * rollout["group_size"])


def table(curves: Mapping[str, Mapping[int, Curve]], seeds: Sequence[int]) -> str:
    """Gains of every seed, their median, and each as a share of the first arm's gain on the same seed."""
    first = next(iter(curves))
    head = ["arm", *(f"seed {seed}" for seed in seeds), "median gain", f"of {first}, by seed", "median accuracy",
            "fresh answers"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for arm, found in curves.items():
        median = statistics.median(curve.gain for curve in found.values())
        shares = [f"{curve.gain / whole:.0%}" if (whole := curves[first][seed].gain) > 0 else "none"
                  for seed, curve in found.items() if seed in curves[first]]
        last = statistics.median(curve.accuracy[-1] for curve in found.values())
        gains = [f"{found[seed].gain:+.1f}" if seed in found else "not run" for seed in seeds]
        lines.append(f"| {arm} | {' | '.join(gains)} | {median:+.1f} | {', '.join(shares)} | {last:.1f} % | "
                     f"{next(iter(found.values())).answers[-1]:,.0f} |")
    return "\n".join(lines)


PANELS: Mapping[str, Sequence[str]] = {
    "Without a critic": ("on policy", "uncorrected", "tis token", "tis sequence", "icepop", "ratio to sampler",
                         "clipped_is"),
    "With a critic": ("on policy", "vtrace on policy", "vtrace", "retrace q_head"),
    "Replay": ("on policy", "half", "half, replay"),
}


def draw(curves: Mapping[str, Mapping[int, Curve]], output: Path) -> None:
    """Medians of the seeds as lines, seeds as thin ones; replay over the answers that were generated."""
    from matplotlib.figure import Figure

    panels = {title: found for title, arms in PANELS.items() if len(found := [a for a in arms if a in curves]) > 1}
    figure = Figure(figsize=(5 * len(panels), 4.8), layout="constrained")
    colors = {arm: f"C{i}" for arms in PANELS.values() for i, arm in enumerate(arms)}
    for number, (title, arms) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), number)
        for arm in arms:
            found = list(curves[arm].values())
            x = found[0].answers if title == "Replay" else found[0].steps
            gains = [[accuracy - curve.accuracy[0] for accuracy in curve.accuracy] for curve in found]
            for gain in gains:
                axes.plot(x, gain, color=colors[arm], linewidth=0.7, alpha=0.35)
            axes.plot(x, [statistics.median(points) for points in zip(*gains, strict=True)], color=colors[arm],
                      linewidth=2, label=f"{arm} ({len(gains)} seed{'s' * (len(gains) > 1)})")
        axes.set(title=title, xlabel="fresh answers" if title == "Replay" else "iteration",
                 ylabel="gain of held-out accuracy, points")
        axes.grid(alpha=0.25)
        axes.legend(fontsize="small")
    figure.savefig(output, dpi=120)


def measure(options: argparse.Namespace) -> None:
    """Train the warm starts and then all arms."""
    write_data()
    if not options.keep:
        for arm in ("sft", *options.arms):
            for seed in options.seeds:
                shutil.rmtree(place(options.runs, seed, arm), ignore_errors=True)
    warm = {seed: place(options.runs, seed, "sft") for seed in options.seeds}
    train_all(options.jobs, [Task("sft.yaml", folder, (f"seed={seed}",)) for seed, folder in warm.items()])
    train_all(options.jobs, [Task("rl.yaml", place(options.runs, seed, arm), (
        f"seed={seed}", f"policy.weights={warm[seed] / 'policy'}", *COMMON,
        *(setting.replace("{age}", str(options.staleness)) for setting in ARMS[arm]), *options.settings))
        for seed in options.seeds for arm in options.arms])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--staleness", type=int, default=8, help="age of the sampler's weights, in iterations")
    parser.add_argument("--set", nargs="*", default=[], dest="settings", metavar="KEY=VALUE",
                        help="further settings of all arms, for example steps=60")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--keep", action="store_true", help="take runs that are finished instead of repeating them")
    parser.add_argument("--report", action="store_true", help="train nothing: table and picture of finished runs")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if not options.report:
        measure(options)
    folders = {arm: {seed: place(options.runs, seed, arm) for seed in options.seeds} for arm in options.arms}
    curves = {arm: found for arm, of_seeds in folders.items()
              if (found := {seed: learned(folder) for seed, folder in of_seeds.items() if finished(folder)})}
    print(table(curves, options.seeds))
    if options.plot:
        draw(curves, options.plot)


if __name__ == "__main__":
    main()
