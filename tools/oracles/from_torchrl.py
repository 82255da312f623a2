"""Asks torchrl for returns and advantages: `pip install -r torchrl.txt`, then `python from_torchrl.py`.

Its functions take [batch, time, 1]. A batch of ours is one row in which the episodes follow one another: `done` is true
at the last step of each, however it ended, and `terminated` at those where nothing follows. The value of the next state
is a column of its own, so a cut episode keeps that of its last state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import cases
import numpy as np
import torch
from cases import Batch
from torchrl.objectives.value import functional

SEED, BATCHES = 12, 16
GAMMAS, LAMBDAS = (1.0, 0.99, 0.9, 0.5), (0.0, 0.5, 0.95, 1.0)
SLOW_GAMMAS, SLOW_LAMBDAS = (1.0, 0.99, 0.9), (0.9, 0.95, 1.0)
"""Of the vectorised forms: they drop factors (gamma lam)^l below 1e-7, which these stay above for 21 steps, and fail
where gamma lam is 0."""
Answer = Mapping[str, Any]


def tensor(x: np.ndarray) -> torch.Tensor:
    """[N] as [1, N, 1]."""
    return torch.from_numpy(np.ascontiguousarray(x))[None, :, None]


def ends(batch: Batch) -> dict[str, torch.Tensor]:
    done = batch.ends
    terminated = done.copy()
    terminated[done] = batch.terminated
    return {"done": tensor(done), "terminated": tensor(terminated)}


def following(batch: Batch) -> dict[str, torch.Tensor]:
    """Rewards, values of the next states, and where episodes end."""
    return {"next_state_value": tensor(np.concatenate([e.values[1:] for e in batch.sequences])),
            "reward": tensor(batch.action_column("rewards")), **ends(batch)}


def around(batch: Batch) -> dict[str, torch.Tensor]:
    """The same with the values of the states before."""
    return {"state_value": tensor(batch.action_column("values")), **following(batch)}


def generalized_advantage_estimate(batch: Batch, gamma: float, lam: float) -> Answer:
    advantages, returns = functional.generalized_advantage_estimate(gamma, lam, **around(batch))
    return {"advantages": advantages, "returns": returns}


def vec_generalized_advantage_estimate(batch: Batch, gamma: float, lam: float) -> Answer:
    advantages, returns = functional.vec_generalized_advantage_estimate(gamma, lam, **around(batch))
    return {"advantages": advantages, "returns": returns}


def td_lambda_return_estimate(batch: Batch, gamma: float, lam: float) -> Answer:
    return {"returns": functional.td_lambda_return_estimate(gamma, lam, **following(batch))}


def td_lambda_advantage_estimate(batch: Batch, gamma: float, lam: float) -> Answer:
    return {"advantages": functional.td_lambda_advantage_estimate(gamma, lam, **around(batch))}


def vec_td_lambda_return_estimate(batch: Batch, gamma: float, lam: float) -> Answer:
    return {"returns": functional.vec_td_lambda_return_estimate(gamma, lam, **following(batch))}


def td0_return_estimate(batch: Batch, gamma: float) -> Answer:
    return {"returns": functional.td0_return_estimate(gamma, **following(batch)),
            "advantages": functional.td0_advantage_estimate(gamma, **around(batch))}


def td1_return_estimate(batch: Batch, gamma: float) -> Answer:
    return {"returns": functional.td1_return_estimate(gamma, **following(batch)),
            "advantages": functional.td1_advantage_estimate(gamma, **around(batch))}


def vec_td1_return_estimate(batch: Batch, gamma: float) -> Answer:
    return {"returns": functional.vec_td1_return_estimate(gamma, **following(batch))}


def vtrace_advantage_estimate(batch: Batch, gamma: float, rho_max: float, c_max: float) -> Answer:
    log_pi, log_mu = (tensor(batch.action_column(name)) for name in ("log_pi", "log_mu"))
    advantages, targets = functional.vtrace_advantage_estimate(
        gamma, log_pi, log_mu, **around(batch), rho_thresh=rho_max, c_thresh=c_max)
    return {"advantages": advantages, "targets": targets}


def reward2go(batch: Batch, gamma: float) -> Answer:
    """Rewards alone: nothing stands behind a last step, cut or not."""
    return {"returns": functional.reward2go(tensor(batch.action_column("rewards")), ends(batch)["done"], gamma)}


WITH_LAMBDA = {"gamma": GAMMAS, "lam": LAMBDAS}
SLOW = {"gamma": SLOW_GAMMAS, "lam": SLOW_LAMBDAS}
FUNCTIONS: Mapping[Callable[..., Answer], Mapping[str, Sequence[Any]]] = {
    generalized_advantage_estimate: WITH_LAMBDA, vec_generalized_advantage_estimate: SLOW,
    td_lambda_return_estimate: WITH_LAMBDA, td_lambda_advantage_estimate: WITH_LAMBDA,
    vec_td_lambda_return_estimate: SLOW, td0_return_estimate: {"gamma": GAMMAS},
    td1_return_estimate: {"gamma": GAMMAS}, vec_td1_return_estimate: {"gamma": SLOW_GAMMAS},
    vtrace_advantage_estimate: {"gamma": GAMMAS, "rho_max": (1.0, 1.5, 2.0, 1e9), "c_max": (0.5, 1.0, 1.5, 1e9)},
    reward2go: {"gamma": SLOW_GAMMAS}}
"""Function -> the settings that are drawn for each batch."""


def main() -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # it multiplies gamma by a mask of integers, which gives the default dtype
    rng, fixture = np.random.default_rng(SEED), cases.Fixture(cases.batches(SEED, BATCHES))
    for function, choices in FUNCTIONS.items():
        for i, batch in enumerate(fixture.batches):
            settings = cases.drawn(rng, choices)
            if settings.get("c_max", 0.0) > settings.get("rho_max", 1e9):
                settings["c_max"] = settings["rho_max"]
            fixture.add(function.__name__, i, settings, function(batch, **settings))
    fixture.save("torchrl", SEED, **{name: version(name) for name in ("torchrl", "torch", "tensordict")})


if __name__ == "__main__":
    main()
