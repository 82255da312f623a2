"""How one optimiser step is split into micro-batches: plan units under a token budget, then cut them out.

Knows arrays and counts, no framework and no loss. A unit (an episode, or a group where the objective compares its
answers) is never split; everything else about the split leaves loss and gradient unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

import numpy as np

from posttrain.data import Counts, MicroBatch, Rollouts, Weights, offsets_of, ragged_indices
from posttrain.errors import MemoryExhausted
from posttrain.protocols import Batching


@dataclass(frozen=True, slots=True, eq=False)
class StepData:
    """The episodes of one optimiser step on this rank, their weights, and the columns the objective needs."""

    rollouts: Rollouts
    keep: np.ndarray
    """[N] bool"""
    weights: Weights
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """`MicroBatch` field -> [N], [k, N] or [m, N]; the action axis is the last one."""
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)
    token_weight: np.ndarray | None = None
    """[M] in terms that run over tokens."""


def counts_of(rollouts: Rollouts, keep: np.ndarray) -> Counts:
    """Counts of one rank; add over ranks with `Comm.sum` before weights are made."""
    per_episode = np.bincount(rollouts.action_episode[keep], minlength=rollouts.n_episodes)
    return Counts(actions=int(per_episode.sum()), episodes=int((per_episode > 0).sum()), episode_actions=per_episode)


Unit = Literal["action", "episode", "group"]


def coarsest(units: Iterable[Unit]) -> Unit:
    """The unit that keeps together what each of the given ones keeps together."""
    order: tuple[Unit, ...] = ("action", "episode", "group")
    return max(units, key=order.index)


def units_of(rollouts: Rollouts, keep: np.ndarray, unit: Unit) -> list[np.ndarray]:
    """Episodes that must stay together, each list in order; episodes without a kept action are left out."""
    alive = np.unique(rollouts.action_episode[keep])
    if unit != "group":
        return [np.array([e]) for e in alive]
    groups = rollouts.group[alive]
    return [alive[groups == g] for g in np.unique(groups)]


def first_fit(costs: np.ndarray, budget: int) -> list[np.ndarray]:
    """Bins of item numbers: one item after the other, each into the first bin that has room (Johnson 1973).

    A tree over the bins' free room finds that bin in O(log n). An item over the budget gets a bin of its own.

    >>> [b.tolist() for b in first_fit(np.array([3, 5, 2, 4]), 7)]
    [[0, 2], [1], [3]]
    """
    n = len(costs)
    leaves = 1 << max(n - 1, 0).bit_length()
    room = [budget + 1] * (2 * leaves)  # 1 more where a bin is empty, so that an item over the budget finds no other
    bins: list[list[int]] = []
    for item, cost in enumerate(costs.tolist()):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= min(cost, budget + 1) else 2 * node + 1
        if node - leaves == len(bins):
            bins.append([])
            room[node] -= 1
        bins[node - leaves].append(item)
        room[node] -= cost
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [np.array(b) for b in bins]


def by_group(costs: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[n] the order of units that leaves groups together: the costliest group first, and in it the costliest unit.

    Where every unit is a group of its own, first fit in this order is first-fit decreasing.

    >>> by_group(np.array([1, 5, 6, 3]), np.array([0, 1, 0, 1]))
    array([1, 3, 2, 0])
    """
    group = np.unique(groups, return_inverse=True)[1]
    return np.lexsort((-costs, group, -np.bincount(group, costs)[group]))


def plan_by_group(batching: Batching, costs: np.ndarray, groups: np.ndarray, budget: int) -> list[np.ndarray]:
    """A plan for units that are offered group by group, so that few groups have units in several parts.

    A learner that computes a prompt once for all its answers in a part then computes it seldom. What a unit costs does
    not count on that: the budget holds for every learner.
    """
    order = by_group(costs, groups)
    return [order[part] for part in batching.plan(costs[order], budget)]


def smaller_budget(costs: np.ndarray, parts: Sequence[np.ndarray], error: MemoryExhausted) -> int:
    """Half of the largest part; raises where every part is a single unit already."""
    require_divisible(costs, parts, error)
    return max(1, max(int(costs[p].sum()) for p in parts) // 2)


def require_divisible(costs: np.ndarray, parts: Sequence[np.ndarray], error: MemoryExhausted) -> None:
    """Raise `MemoryExhausted` with advice where every part is a single unit already."""
    if all(len(p) <= 1 for p in parts):
        raise MemoryExhausted(
            f"memory ran out although every micro-batch holds a single unit (the largest has {int(costs.max())} "
            "tokens); shorten rollout.max_new_tokens, switch on policy.gradient_checkpointing or use a smaller model"
        ) from error


@final
@dataclass(frozen=True, slots=True)
class FirstFit:
    """First fit under a fixed budget of tokens, which shrinks only after running out of memory."""

    tokens: int = 16384
    """Tokens of one micro-batch."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")

    def plan(self, costs: np.ndarray, budget: int) -> list[np.ndarray]:
        return first_fit(costs, budget)


def cut(step: StepData, episodes: np.ndarray) -> MicroBatch:
    """The micro-batch of the given episodes (NumPy columns, kept actions only); no episodes give an empty one."""
    whole, part = step.rollouts, step.rollouts.select(episodes)
    actions = whole.episode_actions
    chosen = ragged_indices(offsets_of(actions)[episodes], actions[episodes])
    kept = step.keep[chosen]
    chosen = chosen[kept]
    lengths = np.diff(part.offsets)
    episode = part.action_episode[kept]
    weights, tokens = step.weights, whole.episode_tokens
    zero = np.zeros(len(chosen))
    token_weight = np.zeros(len(part.tokens)) if step.token_weight is None else step.token_weight[
        ragged_indices(offsets_of(tokens)[episodes], tokens[episodes])]
    def column(x: np.ndarray | None) -> np.ndarray:
        return zero if x is None else x[chosen]
    return MicroBatch(
        tokens=part.tokens, sequence=np.repeat(np.arange(len(lengths)), lengths),
        positions=np.arange(len(part.tokens)) - np.repeat(part.offsets[:-1], lengths),
        token_weight=token_weight, source=part.source[kept], episode=episode,
        group=np.unique(part.group, return_inverse=True)[1],
        count=np.maximum(np.bincount(episode, minlength=len(episodes)), 1),
        last=np.cumsum(part.episode_tokens) - 1, weight=column(weights.weight), kl_weight=column(weights.kl_weight),
        value_weight=column(weights.value_weight), routes=part.routes, temperature=whole.sampling.temperature,
        constants=step.constants, **{name: values[..., chosen] for name, values in step.columns.items()})
