"""A whole GRPO step of a policy in JAX beside the same in torch: the settings of `step.py`, from equal weights.

Each side is a process of its own, on one thread, and sides take turns. The first step compiles: it is shown apart, and
`--warm` steps are not counted. Shown are medians over the others: CPU seconds, wall seconds of the phases, and the peak
of resident memory over what was resident before the model was loaded. Rewards, losses and gradient norms of the first
steps are asserted equal before anything is shown.

    python tools/bench/flax_step.py [--setting small] [--repeats 3] [--steps 12]

Prediction, written before the first run: the rollout is 0.4 of torch's, as `jax_rollout.py` has found for short
prompts. The update multiplies the same matrices in a rectangle of powers of two, 32 rows of 128 where texts have 70
tokens, and computes a prompt once for each answer: 2x of torch. With the rollout at half of torch's step, the whole is
1.2x. Memory: the rectangle's activations, of which XLA fuses away some: 1.5x. The first step is ten seconds longer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from processes import ONE_THREAD, in_a_process, medians, resident
from step import SETTINGS, Setting, config, forget_peak, prepare

SIDES = ("torch", "flax")
XLA_ON_ONE_THREAD = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}
PHASES = ("rollout", "score", "update")
EQUAL = {"reward/mean": 1e-9, "loss/policy": 1e-4, "grad_norm": 1e-3}
"""What is compared of a step, and how far apart it may be: the gradient's norm relatively."""


def train(side: str, setting: Setting, folder: Path, steps: int) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    import posttrain

    directory = Path(tempfile.mkdtemp(dir=folder)) / "run"
    policy = {"use": side, "weights": str(folder), "device": "cpu"}
    posttrain.train({**config(setting, folder, steps, directory), "policy": policy}, output="quiet")
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def measured(side: str, setting: Setting, folder: Path, steps: int, warm: int) -> dict[str, list[float]]:
    """Numbers of this process. What is imported is so before memory is looked at."""
    import posttrain_backends._jax.learner
    import posttrain_backends._torch.learner  # noqa: F401  # both, so that both begin alike

    base = forget_peak()
    lines = train(side, setting, folder, steps + warm)
    cpu = [line["timing"]["seconds"] * line["timing"]["cpu_percent"] / 100 for line in lines]
    return {"CPU s": cpu[warm:], "first step, CPU s": cpu[:1], "extra MiB": [resident("VmHWM") - base],
            **{f"wall s, {phase}": [line["timing"][phase] for line in lines[warm:] if phase in line["timing"]]
               for phase in PHASES},
            **{name: [line[name] for line in lines] for name in EQUAL}}


def compared(name: str, repeats: int, steps: int, warm: int) -> dict[str, dict[str, float]]:
    """Medians by side, of processes that took turns."""
    found: dict[str, dict[str, list[float]]] = {side: {} for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        prepare(SETTINGS[name], Path(folder))
        for _ in range(repeats):
            first: dict[str, Mapping[str, Sequence[float]]] = {}
            for side in SIDES:
                first[side] = in_a_process(
                    __file__, ["--case", side, name, folder, "--steps", str(steps), "--warm", str(warm)],
                    {**ONE_THREAD, **XLA_ON_ONE_THREAD, "JAX_PLATFORMS": "cpu"})
                for key, numbers in first[side].items():
                    found[side].setdefault(key, []).extend(numbers)
            for key, apart in EQUAL.items():
                mine, other = (first[side][key][:3] for side in SIDES)
                np.testing.assert_allclose(other, mine, rtol=apart, atol=apart, err_msg=key)
    return {side: medians({key: x for key, x in numbers.items() if x and key not in EQUAL})
            for side, numbers in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", nargs="+", choices=list(SETTINGS), default=["small"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        side, name, folder = given.case
        print(json.dumps(measured(side, SETTINGS[name], Path(folder), given.steps, given.warm)))
        return
    for name in given.setting:
        found = compared(name, given.repeats, given.steps, given.warm)
        print(f"{name:20s} {'torch':>10s} {'flax':>10s} {'flax / torch':>13s}")
        for key, torch in found["torch"].items():
            print(f"{key:20s} {torch:10.3f} {found['flax'][key]:10.3f} {found['flax'][key] / torch:13.2f}")


if __name__ == "__main__":
    main()
