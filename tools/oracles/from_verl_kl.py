"""Asks verl for the coefficients of its adaptive KL controller, in the environment of `from_verl.py` (verl.txt)."""

from __future__ import annotations

import json
import random
from importlib.metadata import version
from pathlib import Path

from verl.trainer.ppo.core_algos import AdaptiveKLController

FIXTURE = Path(__file__).parents[2] / "tests" / "oracles" / "fixtures" / "verl_kl.json"
SEED, ROLLOUTS = 22, 200
SETTINGS = ((0.05, 0.2, 1000.0), (0.1, 0.05, 10000.0), (6.0, 1.0, 300.0))
"""Target, first coefficient and horizon of each sequence; episodes stay below half of the horizon, where we stop."""


def main() -> None:
    rng = random.Random(SEED)
    cases = []
    for target, coef, horizon in SETTINGS:
        controller = AdaptiveKLController(coef, target, horizon)
        kls = [target * rng.expovariate(1.0) for _ in range(ROLLOUTS)]
        ns = [rng.randint(1, 128) for _ in range(ROLLOUTS)]
        coefs = []
        for kl, n in zip(kls, ns, strict=True):
            controller.update(kl, n)
            coefs.append(float(controller.value))
        cases.append({"target": target, "coef": coef, "horizon": horizon, "kls": kls, "ns": ns, "coefs": coefs})
    FIXTURE.write_text(json.dumps({"seed": SEED, "versions": {"verl": version("verl")}, "cases": cases}) + "\n")
    print(f"{FIXTURE.name}: {len(cases)} cases, {FIXTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
