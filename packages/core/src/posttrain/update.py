"""From a signal to optimiser steps: minibatches, weights from global counts, plan, accumulate, apply, retry.

The loss does not depend on the split: weights are made once per optimiser step, from counts over all ranks, so running
out of memory only means planning smaller parts and doing the same step again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from posttrain.batching import StepData, coarsest, counts_of, cut, units_of
from posttrain.comm import Comm
from posttrain.data import Counts, Metric, Metrics, Rollouts, Signal, Weights, ragged_indices
from posttrain.errors import ConfigError, Diverged
from posttrain.experts import expert_load
from posttrain.loss import SHARED, Sum
from posttrain.memory import memory_of
from posttrain.passes import Budget, Passes
from posttrain.protocols import Batching, GradientCombiner, Learner, Output
from posttrain.steps import Annotations

Phase = Callable[[str], AbstractContextManager[object]]
"""What is told when a part of an update begins and ends: `backward` and `optimiser`."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A learner and the loss it is trained with; a separate critic is a second one."""

    learner: Learner
    objective: Sum
    prefix: str = ""
    """Before the names of its metrics, `critic/` for a separate critic."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a rollout is cut into optimiser steps."""

    steps_per_rollout: int
    epochs: int
    seed: tuple[int, ...]
    max_kl: float = 0.0
    """The rest is left out where the policy has moved further than this from where it began; 0 leaves out nothing."""


def minibatches(rollouts: Rollouts, keep: np.ndarray, schedule: Schedule) -> Iterator[np.ndarray]:
    """Disjoint sets of episodes, shuffled anew in each epoch by whole groups; sets without an action are left out."""
    groups = np.unique(rollouts.group)
    for epoch in range(schedule.epochs):
        order = np.random.default_rng((*schedule.seed, epoch)).permutation(groups)
        for chosen in np.array_split(order, schedule.steps_per_rollout):
            episodes = np.flatnonzero(np.isin(rollouts.group, chosen))
            if np.isin(rollouts.action_episode[keep], episodes).any():
                yield episodes


def columns_of(rollouts: Rollouts, signal: Signal, notes: Annotations,
               old_logprobs: np.ndarray | None) -> dict[str, np.ndarray]:
    """`MicroBatch` columns that exist, on the action axis."""
    found = {"advantages": signal.advantages, "targets": signal.targets, "old_logprobs": old_logprobs,
             "behavior_logprobs": rollouts.behavior_logprobs, "ref_logprobs": notes.ref_logprobs,
             "old_values": notes.values}
    return {name: column for name, column in found.items() if column is not None}


def over_ranks(counts: Counts, comm: Comm) -> Counts:
    """Local per-episode counts with totals of all ranks."""
    actions, episodes = comm.sum(np.array([counts.actions, counts.episodes]))
    return replace(counts, actions=int(actions), episodes=int(episodes))


def per_action(weights: Weights, keep: np.ndarray, correction: np.ndarray) -> Weights:
    """Weights of kept actions put on the axis of all, corrections multiplied into the policy's."""
    def spread(x: np.ndarray | None) -> np.ndarray | None:
        if x is None:
            return None
        full = np.zeros(len(keep))
        full[keep] = x
        return full
    weight = spread(weights.weight)
    return Weights(None if weight is None else weight * correction, spread(weights.kl_weight),
                   spread(weights.value_weight))


def optimiser_step(trained: Sequence[Trained], rollouts: Rollouts, keep: np.ndarray, correction: np.ndarray,
                   columns: Mapping[str, np.ndarray], coef: Mapping[str, float], *, batching: Batching, budget: Budget,
                   comm: Comm, combiner: GradientCombiner[Any] | None = None, combiner_state: Any = None,
                   max_kl: float = 0.0, phase: Phase = nullcontext) -> tuple[Metrics, Budget, Any]:
    """One step of every learner on the same episodes -> metrics, token budget, state of the gradient combiner.

    With `max_kl` the step is not made where KL(pi_old || pi) per action is above it already, and `update/stopped` is 1.
    Raises `MemoryExhausted` when even single units do not fit, `Diverged` from the learner.
    """
    counts = over_ranks(counts_of(rollouts, keep), comm)
    unrouted = replace(rollouts, routes=None)  # a critic has experts of its own, if any
    data = [StepData(unrouted if i else rollouts, keep, per_action(t.objective.weights(counts), keep, correction),
                     columns) for i, t in enumerate(trained)]
    if Output.EXPERT_LOAD in trained[0].objective.outputs:
        token_weight, load = expert_load(rollouts, keep, comm)
        data[0] = replace(data[0], token_weight=token_weight, constants={Output.EXPERT_LOAD: load})
    units = units_of(rollouts, keep, coarsest(t.objective.unit for t in trained))
    costs = np.array([int(rollouts.episode_tokens[u].sum()) for u in units])
    groups = np.array([rollouts.group[u[0]] for u in units])
    passes = Passes(batching, budget, UPDATE, memory_of(trained[0].learner), comm)
    with phase("backward"):
        metrics, retries = _accumulate(trained, data, units, passes, costs, groups, coef), 0
        while passes.failed:
            for t in trained:
                t.learner.discard()
            passes.shrink(costs)
            metrics, retries = _accumulate(trained, data, units, passes, costs, groups, coef), retries + 1
    budget = passes.budget
    metrics = Metrics({name: _of_one_step(m) if "loss/" in name else m for name, m in metrics.items()})
    metrics += passes.metrics + {"batch/memory_retries": Metric(retries, reduction="sum")}
    if max_kl:
        stopped = moved(metrics, comm) > max_kl
        metrics += {STOPPED: Metric(float(stopped), reduction="max")}
        if stopped:
            for t in trained:
                t.learner.discard()
            return metrics, budget, combiner_state
    for t in trained:
        weights = None
        if combiner is not None and len(t.objective.slots) > 1:
            gramian = t.learner.gramian(t.objective.slots)
            mix = np.ones(len(gramian))  # where it is not finite the learner skips the step, and a solver would raise
            if np.isfinite(gramian).all():
                metrics += of_gradients(t.objective.slots, gramian)
                mix, combiner_state = combiner.weights(gramian, combiner_state)
            weights = {SHARED: 1.0, **dict(zip(t.objective.slots, mix.tolist(), strict=True))}
            metrics += {f"combiner/{slot}": Metric(w, reduction="last") for slot, w in weights.items()}
        try:
            with phase("optimiser"):
                applied = t.learner.apply(weights)
        except Diverged as error:
            raise Diverged(f"{error}\nrows of that step: {_rows(rollouts)}") from error
        metrics += Metrics({t.prefix + name: m for name, m in applied.items()})
    return metrics, budget, combiner_state


UPDATE = "update"
"""Name of the budget of passes that train."""


def of_gradients(slots: Sequence[str], gramian: np.ndarray) -> Metrics:
    """Norms of the slots' gradients before they are mixed, and the cosine of each two (0 where one of them is 0), from
    their Gramian [m, m]: means over the optimiser steps of a rollout.

    >>> found = of_gradients(("a", "b"), np.array([[4.0, -1.0], [-1.0, 1.0]])).values_by_name()
    >>> found["gradient/a/norm"], found["gradient/b/norm"], found["gradient/cosine/a/b"]
    (2.0, 1.0, -0.5)
    """
    norm = np.sqrt(np.maximum(np.diag(gramian), 0.0))
    unit = norm + (norm == 0)
    cosine = gramian / np.outer(unit, unit)
    found = {f"gradient/{slot}/norm": norm[i] for i, slot in enumerate(slots)} | {
        f"gradient/cosine/{a}/{b}": cosine[i, j]
        for i, a in enumerate(slots) for j, b in enumerate(slots) if i < j}
    return Metrics({name: Metric(float(x)) for name, x in found.items()})


STOPPED = "update/stopped"
"""1 where the rest of a rollout's optimiser steps was left out."""


def moved(metrics: Metrics, comm: Comm) -> float:
    """KL(pi_old || pi) per action over all ranks, as the objective measured it; raises `ConfigError` where it did not.
    """
    if (found := metrics.get("policy/approx_kl")) is None:
        raise ConfigError(["update.max_kl: the objective does not measure policy/approx_kl, the KL to the policy "
                           "before the update; use one with a ratio, such as ppo or grpo, or set update.max_kl=0"])
    total, weight = comm.sum(np.array([found.total, found.weight]))
    return float(total / weight) if weight else 0.0


def _rows(rollouts: Rollouts, shown: int = 8) -> str:
    """Where the first rows of a step come from."""
    places = list(dict.fromkeys(p.where or f"group {p.group}" for p in rollouts.prompts))
    return ", ".join(places[:shown]) + (f" and {len(places) - shown} more" if len(places) > shown else "")


def _of_one_step(metric: Metric) -> Metric:
    """A term that was summed over parts is complete: over several optimiser steps it is averaged."""
    return Metric(metric.total, 1.0)


def _accumulate(trained: Sequence[Trained], data: Sequence[StepData], units: Sequence[np.ndarray], passes: Passes,
                costs: np.ndarray, groups: np.ndarray, coef: Mapping[str, float]) -> Metrics:
    """Gradients of all parts, or of those before memory ran out; every rank does the same number of them."""
    metrics = Metrics()
    nothing = np.array([], np.int64)
    for part in passes.parts(costs, groups):
        episodes = np.concatenate([nothing, *(units[u] for u in part)])
        with passes.measured(int(costs[part].sum())):
            for t, step in zip(trained, data, strict=True):
                found = t.learner.accumulate(cut(step, episodes), t.objective, coef)
                metrics += {t.prefix + name: metric for name, metric in found.items()}
    return metrics


def update(trained: Sequence[Trained], rollouts: Rollouts, signal: Signal, notes: Annotations,
           old_logprobs: np.ndarray | None, coef: Mapping[str, float], schedule: Schedule, *, batching: Batching,
           budget: Budget, comm: Comm, combiner: GradientCombiner[Any] | None = None,
           combiner_state: Any = None, phase: Phase = nullcontext) -> tuple[Metrics, Budget, Any]:
    """All optimiser steps of one rollout."""
    columns = columns_of(rollouts, signal, notes, old_logprobs)
    actions, total = rollouts.episode_actions, Metrics()
    starts = np.cumsum(actions) - actions
    for episodes in minibatches(rollouts, signal.keep, schedule):
        a = ragged_indices(starts[episodes], actions[episodes])
        metrics, budget, combiner_state = optimiser_step(
            trained, rollouts.select(episodes), signal.keep[a], signal.correction[a],
            {name: column[..., a] for name, column in columns.items()}, coef, batching=batching, budget=budget,
            comm=comm, combiner=combiner, combiner_state=combiner_state, max_kl=schedule.max_kl,
            phase=phase)
        total += metrics
        if STOPPED in metrics and metrics[STOPPED].value:
            break
    return total, budget, combiner_state
