"""Two-digit addition from scratch: a short supervised warm start, then reinforcement learning, then the curves.

Run it with `make demo`. It writes its data beside this file and its two runs under `runs/`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path

import posttrain
from posttrain.errors import PluginError
from posttrain.report import plot

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent.parent / "runs"
HELD_OUT = 2000


def write_data(folder: Path) -> None:
    """All sums of two numbers below 100; 2,000 of them are kept out of both training phases."""
    pairs = [(a, b) for a in range(100) for b in range(100)]
    random.Random(0).shuffle(pairs)
    folder.mkdir(exist_ok=True)
    for name, chosen in (("held_out", pairs[:HELD_OUT]), ("train", pairs[HELD_OUT:])):
        rows = ({"prompt": f"{a:02}+{b:02}=", "completion": f"{a + b:03}", "answer": f"{a + b:03}"} for a, b in chosen)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=RUNS, help="where the two run directories go")
    options = parser.parse_args()
    warm, learned = options.runs / "addition-sft", options.runs / "addition-rl"
    for old in (warm, learned):  # the demo starts anew each time
        shutil.rmtree(old, ignore_errors=True)
    write_data(HERE / "data")
    clock = time.perf_counter()

    print("1. Warm start: supervised learning from given answers", flush=True)
    posttrain.train(HERE / "sft.yaml", [f"seed={options.seed}", f"run={warm}"])
    before = posttrain.evaluate(warm)["eval/reward/mean"]
    print(f"   held-out accuracy {before:.1%} on {HELD_OUT:,} problems\n")

    print("2. Reinforcement learning from the exact answer", flush=True)
    posttrain.train(HERE / "rl.yaml", [f"seed={options.seed}", f"run={learned}", f"policy.weights={warm / 'policy'}"])
    after = posttrain.evaluate(learned)["eval/reward/mean"]

    print(f"\nheld-out accuracy: {before:.1%} before RL, {after:.1%} after it "
          f"({100 * (after - before):+.1f} points on {HELD_OUT:,} problems never trained on)")
    print(f"three answers:     {'  '.join('37+48=' + text for text in posttrain.sample(learned, '37+48=', n=3))}")
    try:
        plot([learned], learned / "curves.png")
        print(f"curves:            {learned / 'curves.png'}")
    except PluginError as error:
        print(f"curves:            not drawn: {error}")
    print(f"took:              {time.perf_counter() - clock:.0f} s")


if __name__ == "__main__":
    main()
