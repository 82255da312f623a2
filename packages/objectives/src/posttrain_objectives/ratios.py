"""Importance ratios of the current policy to the one that wrote the actions. Knows neither clipping nor averaging."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from posttrain.data import Array, MicroBatch
from posttrain.loss import MAX_LOG_RATIO
from posttrain.ops import Ops

Ratio = Literal["token", "sequence"]


def log_ratio(ops: Ops, logprobs: Array, old_logprobs: Array | None) -> Array:
    """[N] log pi/pi_old, clamped to +-`MAX_LOG_RATIO`.

    No old log-probs means that the policy has not moved since it was scored: the ratio is 1, and its gradient that of
    `logprobs`.
    """
    old = ops.stop_gradient(logprobs if old_logprobs is None else old_logprobs)
    return ops.xp.clip(logprobs - old, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def behavior_weight(ops: Ops, logprobs: Array, old_logprobs: Array | None, behavior_logprobs: Array,
                    cap: float) -> Array:
    """[N] min(cap, pi_old / mu), detached: what decoupled PPO weighs an action by (Hilton et al. 2021,
    arXiv 2110.00641, section 3, with a bound). mu wrote the action, pi_old is the policy before the update."""
    old = ops.stop_gradient(logprobs if old_logprobs is None else old_logprobs)
    d = log_ratio(ops, old, behavior_logprobs)
    return ops.xp.clip(ops.xp.exp(d), None, cap)


def token_ratio(ops: Ops, d: Array, logprobs: Array, batch: MicroBatch) -> Array:
    """[N] r_t = exp(d_t), the ratio of each action (Schulman et al. 2017, arXiv 1707.06347, section 3)."""
    return ops.xp.exp(d)


def sequence_ratio(ops: Ops, d: Array, logprobs: Array, batch: MicroBatch) -> Array:
    """[N] sg(s) * exp(logp_t - sg(logp_t)) with s = exp(mean of d over the actions of the episode).

    The token form of GSPO (Zheng et al. 2025, arXiv 2507.18071, GSPO-token): its value is s, the length-normalised
    ratio of the whole episode, and where the advantage is constant over the episode and actions weigh alike, its
    gradient is that of s. Advantages may differ within an episode.
    """
    xp = ops.xp
    episodes = batch.count.shape[0]
    mean = ops.segment_sum(d, batch.episode, episodes) / xp.astype(batch.count, d.dtype)
    s = ops.stop_gradient(xp.take(xp.exp(mean), batch.episode, axis=0))
    return s * xp.exp(logprobs - ops.stop_gradient(logprobs))


RATIOS: Mapping[Ratio, Callable[[Ops, Array, Array, MicroBatch], Array]] = {
    "token": token_ratio,
    "sequence": sequence_ratio,
}
