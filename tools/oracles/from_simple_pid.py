"""Asks simple-pid for the outputs of PI and PID controllers: `pip install -r simple_pid.txt`, then
`python from_simple_pid.py`.

Its input is minus the log-error of a KL and its setpoint 0, so that its error is log(KL / target) and its output is
log(beta / beta_0). It has the position form, and its first derivative is 0: every sequence begins at the target, where
ours is 0, too. With limits only an integral is asked for: there clamping the output is what both do.
"""

from __future__ import annotations

import json
import math
import random
from importlib.metadata import version
from pathlib import Path

from simple_pid import PID

FIXTURE = Path(__file__).parents[2] / "tests" / "oracles" / "fixtures" / "simple_pid.json"
SEED, SEQUENCES, ROLLOUTS = 21, 12, 60
TARGET, COEF = 0.05, 0.2
GAINS = ((0.1, 0.05, 0.02), (0.1, 0.05, 0.0), (0.3, 0.2, 0.1), (0.0, 0.5, 0.0))
LIMITS = (0.05, 1.0)
"""Of beta, for an integral alone."""


def outputs(kls: list[float], kp: float, ki: float, kd: float, limits: tuple[float, float] | None) -> list[float]:
    """beta after each KL."""
    bounds = (None, None) if limits is None else tuple(math.log(x / COEF) for x in limits)
    pid = PID(kp, ki, kd, setpoint=0.0, sample_time=None, output_limits=bounds)
    return [COEF * math.exp(pid(-math.log(kl / TARGET), dt=1.0)) for kl in kls]


def main() -> None:
    rng = random.Random(SEED)
    cases = []
    for i in range(SEQUENCES):
        kp, ki, kd = GAINS[i % len(GAINS)]
        limits = LIMITS if kp == kd == 0 else None
        kls = [TARGET] + [TARGET * math.exp(rng.uniform(-1.0, 1.0)) for _ in range(ROLLOUTS)]
        cases.append({"kp": kp, "ki": ki, "kd": kd, "limits": limits, "kls": kls,
                      "coefs": outputs(kls, kp, ki, kd, limits)})
    content = {"seed": SEED, "versions": {"simple-pid": version("simple-pid")}, "target": TARGET, "coef": COEF,
               "cases": cases}
    FIXTURE.write_text(json.dumps(content) + "\n")
    print(f"{FIXTURE.name}: {len(cases)} cases, {FIXTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
