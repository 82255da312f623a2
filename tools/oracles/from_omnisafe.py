"""Asks omnisafe for the multipliers of its Lagrangian and PID-Lagrangian on random costs: `pip install -r omnisafe.txt`
and `pip install --no-deps omnisafe==0.5.0`, then `python from_omnisafe.py`.

Two of its files are loaded by themselves: the rest needs simulators, and these two need nothing of it.
"""

from __future__ import annotations

from importlib.metadata import distribution, version
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

import mixing_cases
import numpy as np
import torch

SEED, STEPS = 31, 80


def alone(name: str) -> ModuleType:
    """A file of omnisafe.common, without its package."""
    path = str(distribution("omnisafe").locate_file(f"omnisafe/common/{name}.py"))
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lagrangian(costs: np.ndarray, limit: float, eta: float, lambda_max: float) -> list[float]:
    rule = alone("lagrange").Lagrange(limit, 0.0, eta, "SGD", lambda_max)
    found = []
    for cost in costs:
        rule.update_lagrange_multiplier(float(cost))
        found.append(float(rule.lagrangian_multiplier.detach()))
    return found


def pid_lagrangian(costs: np.ndarray, limit: float, kp: float, ki: float, kd: float, ema: float,
                   lambda_max: float) -> list[float]:
    """omnisafe's running means begin at 0, so its first derivative is the whole cost; here they begin at the first
    measurement, as ours do. Its derivative is over one rollout."""
    rule: Any = alone("pid_lagrange").PIDLagrangian(
        pid_kp=kp, pid_ki=ki, pid_kd=kd, pid_d_delay=1, pid_delta_p_ema_alpha=ema, pid_delta_d_ema_alpha=ema,
        sum_norm=False, diff_norm=False, penalty_max=lambda_max, lagrangian_multiplier_init=0.0, cost_limit=limit)
    rule._delta_p, rule._cost_d = float(costs[0]) - limit, float(costs[0])
    rule._cost_ds.append(float(costs[0]))
    found = []
    for cost in costs:
        rule.pid_update(float(cost))
        found.append(rule.lagrangian_multiplier)
    return found


def main() -> None:
    torch.set_default_dtype(torch.float64)
    rng, fixture = np.random.default_rng(SEED), mixing_cases.Fixture()
    for _ in range(8):
        limit = float(rng.uniform(0.5, 2.0))
        costs = limit * rng.uniform(0.2, 2.0, size=STEPS)
        given = {"eta": float(rng.choice([0.01, 0.05, 0.3])), "lambda_max": float(rng.choice([0.5, 10.0]))}
        fixture.add("lagrangian", {"limit": limit, **given}, costs, lagrangian(costs, limit, **given))
        given = {"kp": float(rng.choice([0.0, 0.5, 1.0])), "ki": float(rng.choice([0.01, 0.05])),
                 "kd": float(rng.choice([0.0, 0.5, 1.0])), "ema": float(rng.choice([0.0, 0.5, 0.9])),
                 "lambda_max": float(rng.choice([2.0, 100.0]))}
        fixture.add("pid_lagrangian", {"limit": limit, **given}, costs, pid_lagrangian(costs, limit, **given))
    fixture.save("omnisafe", seed=SEED, omnisafe=version("omnisafe"), torch=version("torch"))


if __name__ == "__main__":
    main()
