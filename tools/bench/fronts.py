"""How much of a front each way of covering one reaches, from equal numbers of answers, on the task of the demo.

Three objectives that exclude each other in one answer (`front_rewards.py`): `exact`, the right digits; `brief`, 1 for
one character and a third for the three of a sum; `round`, a multiple of ten within five of the sum. Each seed: a warm
start as in `examples/addition`, from demonstrations of all three kinds, then from it one front per method by
`posttrain pareto`: the same random preferences for all, a run for each. A point is the mean over the 2,000 held-out
problems of answers drawn at temperature 1: a policy that settles between kinds does so by drawing.

    weighted_sum   rewards summed with the preferences as weights
    tchebycheff    `combiner: smooth_tchebycheff` with the preferences as weights
    ideal          the same, and as ideal point about what a policy for one objective alone reaches here
    soups          a run for each objective, as long as two of the others, and mixed weights of these three

Prediction, written before the first measurement: sums end at the corner of the largest product of weight and chance,
so they leave two or three points that are not dominated; `tchebycheff` keeps all six, at twice the hypervolume; soups
lie between, since policies that were trained apart for so long answer badly in the middle. `ideal` is an arm since the
first front of `tchebycheff` was seen: a kind of answer that dies out early is no longer drawn, and nothing brings it
back.

    python tools/bench/fronts.py --plot docs/fronts.png [--seeds 0 1 2] [--methods weighted_sum ...]

About 60 CPU seconds a run, one thread each, two fronts side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from addition_runs import ADDITION, ROOT, finished, history, write_data

RUNS = ROOT / "runs" / "bench-fronts"

REWARDS = Path(__file__).resolve().with_name("front_rewards.py")
OBJECTIVES = ("exact", "brief", "round")
REFERENCE = (-0.05, 0.28, -0.05)
"""A little worse than the worst that the best policy for another objective does."""
PREFERENCES = {"preferences": "dirichlet", "draws": 6, "alpha": 2.0, "seed": 0}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "weighted_sum": {},
    "tchebycheff": {"combiner": {"use": "smooth_tchebycheff"}},
    "ideal": {"combiner": {"use": "smooth_tchebycheff", "ideal": {"exact": 0.7, "brief": 1.0, "round": 0.8}}},
    "soups": {},
}
KINDS = ("exact", "exact", "exact", "round", "brief")
"""Of the demonstrations, in turn."""


def demonstrated(kind: str, answer: str) -> str:
    """What an answer of this kind looks like."""
    return {"exact": answer, "round": f"{10 * ((int(answer) + 5) // 10):03}", "brief": "="}[kind]


def write_demonstrations(rows: Path, path: Path) -> None:
    """The first training problems, answered in all kinds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [json.loads(line) for line in rows.read_text().splitlines()[:1500]]
    path.write_text("".join(json.dumps(row | {"completion": demonstrated(KINDS[i % len(KINDS)], row["answer"])}) + "\n"
                            for i, row in enumerate(found)))


def base(seed: int, method: str, steps: int) -> dict[str, Any]:
    """The configuration that all points of a front share."""
    own = {"steps": steps * (2 if method == "soups" else 1), **METHODS[method]}
    return {
        "extends": str(ADDITION / "rl.yaml"), "seed": seed, "threads": 1, "kl": "none",
        "policy": {"weights": str(RUNS / str(seed) / "sft" / "policy")},
        "rewards": {"correct": None, **{name: {"file": f"{REWARDS}:{name}"} for name in OBJECTIVES}},
        "evaluate": {"every": own["steps"], "temperature": 1.0}, "checkpoint": {"every": 0}, **own}


def front(seed: int, method: str) -> dict[str, Any]:
    """The file of `posttrain pareto`."""
    return {"base": f"{method}.yaml", "objectives": list(OBJECTIVES), "reference": list(REFERENCE),
            "front": str(RUNS / str(seed) / method), **PREFERENCES,
            "method": "soups" if method == "soups" else "weights"}


def environment() -> dict[str, str]:
    """One thread for every library."""
    return {**os.environ, **{f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}}


def posttrain(*arguments: str) -> None:
    """The command, quietly; its own message where it fails."""
    done = subprocess.run([str(Path(sys.executable).with_name("posttrain")), *arguments], env=environment(),
                          capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"posttrain {' '.join(arguments)}\n{done.stdout}{done.stderr}")


def warm_start(seed: int) -> None:
    """Supervised, from the demonstrations, unless it is there."""
    run = RUNS / str(seed) / "sft"
    if not finished(run):
        posttrain("train", str(ADDITION / "sft.yaml"), f"run={run}", f"seed={seed}", "threads=1",
                  f"task.path={RUNS / 'kinds.jsonl'}")


def cover(seed: int, method: str, steps: int) -> None:
    """One front; what is there is kept."""
    folder = RUNS / str(seed)
    (folder / f"{method}.yaml").write_text(yaml.safe_dump(base(seed, method, steps)))
    (folder / f"{method}-front.yaml").write_text(yaml.safe_dump(front(seed, method)))
    posttrain("pareto", str(folder / f"{method}-front.yaml"))


def covered(seed: int, method: str) -> dict[str, Any]:
    """Its `pareto.json`."""
    found: dict[str, Any] = json.loads((RUNS / str(seed) / method / "pareto.json").read_text("utf-8"))
    return found


def answers(seed: int, method: str) -> tuple[int, float]:
    """Answers that a front was trained on, and their tokens."""
    of_runs = [[length for _, length in history(folder, "episode/length")]
               for folder in sorted((RUNS / str(seed) / method).iterdir()) if (folder / "metrics.jsonl").is_file()]
    each = 64 * 8
    return each * sum(map(len, of_runs)), each * sum(map(sum, of_runs))


def table(seeds: Sequence[int], methods: Sequence[str]) -> str:
    """A row for each front."""
    lines = ["| seed | method | points | not dominated | hypervolume | of weighted_sum | answers | tokens |",
             "|---|---|---:|---:|---:|---:|---:|---:|"]
    for seed in seeds:
        whole = covered(seed, methods[0])["hypervolume"][-1]
        for method in methods:
            found, (count, tokens) = covered(seed, method), answers(seed, method)
            volume = found["hypervolume"][-1]
            lines.append(f"| {seed} | {method} | {len(found['points'])} | {len(found['front'])} | {volume:.4f} | "
                         f"{volume / whole:.2f} | {count:,} | {tokens / 1e6:.2f} M |")
    return "\n".join(lines)


def draw(seeds: Sequence[int], methods: Sequence[str], target: Path) -> None:
    """Each pair of objectives: points of all seeds, those of the fronts filled."""
    from itertools import combinations

    from matplotlib.figure import Figure

    pairs = list(combinations(range(len(OBJECTIVES)), 2))
    figure = Figure(figsize=(4.4 * len(pairs), 4), layout="constrained")
    for place, (i, j) in enumerate(pairs, 1):
        axes = figure.add_subplot(1, len(pairs), place)
        for color, method in enumerate(methods):
            for seed in seeds:
                found = covered(seed, method)
                for best in (False, True):
                    points = [p["values"] for p in found["points"] if (p["tag"] in found["front"]) == best]
                    axes.scatter([p[i] for p in points], [p[j] for p in points], s=26, edgecolors=f"C{color}",
                                 facecolors=f"C{color}" if best else "none", alpha=0.8,
                                 label=method if best and seed == seeds[0] else None)
        axes.set(xlabel=OBJECTIVES[i], ylabel=OBJECTIVES[j])
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--jobs", type=int, default=2, help="fronts side by side, one thread each")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    write_data()
    write_demonstrations(ADDITION / "data" / "train.jsonl", RUNS / "kinds.jsonl")
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(warm_start, options.seeds))
        list(pool.map(lambda task: cover(*task, options.steps),
                      [(seed, method) for seed in options.seeds for method in options.methods]))
    print(table(options.seeds, options.methods))
    if options.plot:
        draw(options.seeds, options.methods, options.plot)


if __name__ == "__main__":
    main()
