"""Asks stable-baselines3 for GAE: `pip install -r stable_baselines3.txt`, then `python from_stable_baselines3.py`.

Its buffer is one environment's steps, in which our episodes follow one another. It knows where episodes start, not how
they end: a flag belongs to the first step of an episode, and cuts both the value and the trace behind the step before.
What its algorithms do for a cut episode is to add gamma times the value of the last state to the last reward, and so
does this script; but for the last episode of the buffer, if it is cut, that value is told to the buffer itself.
"""

from __future__ import annotations

from importlib.metadata import version

import cases
import numpy as np
import torch
from cases import Batch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer

SEED, BATCHES = 13, 20
CHOICES = {"gamma": (1.0, 0.99, 0.9, 0.5), "lam": (0.0, 0.5, 0.95, 1.0)}


def rollout_buffer(batch: Batch, gamma: float, lam: float) -> dict[str, np.ndarray]:
    ends = batch.ends
    rewards, values, last = batch.action_column("rewards").copy(), batch.action_column("values"), batch.sequences[-1]
    for episode, end in list(zip(batch.sequences, np.flatnonzero(ends)))[:-1]:
        if not episode.terminated:
            rewards[end] += gamma * episode.values[-1]
    space = spaces.Box(-1.0, 1.0, (1,))
    buffer = RolloutBuffer(len(ends), space, space, device="cpu", gae_lambda=lam, gamma=gamma, n_envs=1)
    for column in ("rewards", "values", "advantages", "episode_starts"):
        setattr(buffer, column, getattr(buffer, column).astype(np.float64))  # float32 unless told
    nothing = np.zeros((1, 1))
    for t, start in enumerate(np.roll(ends, 1)):
        buffer.add(nothing, nothing, rewards[t:t + 1], np.array([start]), torch.from_numpy(values[t:t + 1]),
                   torch.zeros(1))
    buffer.compute_returns_and_advantage(torch.tensor([last.values[-1]], dtype=torch.float64),
                                         np.array([last.terminated]))
    return {"advantages": buffer.advantages, "returns": buffer.returns}


def main() -> None:
    torch.set_num_threads(1)
    rng, fixture = np.random.default_rng(SEED), cases.Fixture(cases.batches(SEED, BATCHES))
    for i, batch in enumerate(fixture.batches):
        settings = cases.drawn(rng, CHOICES)
        fixture.add("RolloutBuffer", i, settings, rollout_buffer(batch, **settings))
    fixture.save("stable_baselines3", SEED, **{name: version(name) for name in ("stable-baselines3", "torch")})


if __name__ == "__main__":
    main()
