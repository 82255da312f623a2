"""The load of experts over one optimiser step, from the routes that a sampler recorded. Knows arrays alone.

The loss that evens it out is E sum_e f_e P_e in each layer, with f_e the share of the tokens that expert e was sent and
P_e the mean of its router's probability (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6). f is a constant of the
whole step, so that what is left is a sum over tokens, which any split into parts leaves as it is.
"""

from __future__ import annotations

import numpy as np

from posttrain.comm import Comm
from posttrain.data import Rollouts
from posttrain.errors import ConfigError


def tokens_read(rollouts: Rollouts, keep: np.ndarray) -> np.ndarray:
    """[M] bool, the tokens before the last kept action of their sequence: those that its actions depend on."""
    last = np.zeros(len(rollouts.offsets) - 1, np.int64)
    source = rollouts.source[keep]
    np.maximum.at(last, np.searchsorted(rollouts.offsets, source, side="right") - 1, source)
    return np.asarray(np.arange(len(rollouts.tokens)) < np.repeat(last, np.diff(rollouts.offsets)))


def expert_load(rollouts: Rollouts, keep: np.ndarray, comm: Comm) -> tuple[np.ndarray, np.ndarray]:
    """[M] the weight of each token, 1 / the number that are read, and [L, E] the share of those tokens that each expert
    of each layer was sent, rows adding up to 1; over all ranks. E is the largest expert in use, and one.

    Raises `ConfigError` where the rollouts hold no routes.
    """
    if rollouts.routes is None:
        raise ConfigError(["update.expert_balance_coef: the engine records no experts, so their load is not known"],
                          next_step="take rollout.engine: batched and a policy with experts, or leave it out")
    read = tokens_read(rollouts, keep)
    routes, free = rollouts.routes[read], np.iinfo(rollouts.routes.dtype).max
    known, L = routes != free, routes.shape[1]
    E = comm.max(int(routes[known].max(initial=0)) + 1)
    place = (np.arange(L)[:, None] * E + routes)[known]
    sent = comm.sum(np.bincount(place, minlength=L * E).reshape(L, E))
    total = int(comm.sum(np.array([read.sum()]))[0])
    return read / max(total, 1), sent / np.maximum(sent.sum(axis=1, keepdims=True), 1)
