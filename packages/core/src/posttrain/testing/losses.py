"""Optimiser steps as a loss meets them, and what a loss says of one: value, metrics, gradients, in three frameworks.

Parts are cut by the code that cuts them in a run. Knows no contract.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any

import numpy as np

from posttrain.batching import StepData, counts_of, cut, units_of
from posttrain.data import (
    Array,
    Counts,
    Loss,
    MicroBatch,
    Prompt,
    Rollouts,
    TokenOutputs,
    Weights,
    offsets_of,
    ragged_indices,
)
from posttrain.ops import ops_of
from posttrain.protocols import Need, Objective, Output
from posttrain.testing.random_data import in_float64, installed_frameworks
from posttrain.update import per_action

COEF: Mapping[str, float] = {"kl": 0.1, "value": 0.7, "entropy": 0.3}
"""Coefficients as the loop gives them."""
COLUMN: Mapping[Need, str] = {
    Need.ADVANTAGES: "advantages", Need.TARGETS: "targets", Need.LOGPROBS: "old_logprobs",
    Need.BEHAVIOR_LOGPROBS: "behavior_logprobs", Need.REF_LOGPROBS: "ref_logprobs", Need.VALUES: "old_values",
    Need.PREFERRED: "preferred"}
"""Field of `MicroBatch` that each need stands for."""
OUTPUT: Mapping[Output, str] = {Output.LOGPROBS: "logprobs", Output.ENTROPY: "entropy", Output.VALUES: "values",
                               Output.ACTION_VALUES: "action_values", Output.REFERENCE_KL: "reference_kl"}
"""Field of `TokenOutputs` that each output stands for."""
WEIGHTS = ("weight", "kl_weight", "value_weight")


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """All episodes of an optimiser step in NumPy float64; some actions are rejected."""

    rollouts: Rollouts
    keep: np.ndarray
    """[N] bool"""
    correction: np.ndarray
    """[N] off-policy weights"""
    columns: Mapping[str, np.ndarray]
    """Field of `MicroBatch` -> [N] or [k, N]"""
    outputs: Mapping[str, np.ndarray]
    """Field of `TokenOutputs` -> [N] or [k, N]"""

    @property
    def counts(self) -> Counts:
        return counts_of(self.rollouts, self.keep)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What an objective is called with, in NumPy; `rows` [n] are its actions' places in the step."""

    out: TokenOutputs
    batch: MicroBatch
    rows: np.ndarray


def step_of(seed: int, lengths: Sequence[int], group: Sequence[int], *, reject: bool = True, spread: float = 0.4,
            heads: int = 0) -> Step:
    """A random step; log-ratios have the standard deviation `spread`, so that clip ranges of about 0.2 are left often.

    With `reject`, about a quarter of the actions is rejected, at times all of an episode, never all of the step.
    """
    rng, L = np.random.default_rng(seed), np.asarray(lengths, int)
    N, k = int(L.sum()), heads or 1 + seed % 2
    keep = rng.random(N) < (0.75 if reject else 1.0)
    keep[rng.integers(N)] = True
    old = -rng.exponential(size=N)
    values = rng.normal(size=(k, N))
    rollouts = _rollouts(rng, L, np.asarray(group, int))
    return Step(
        rollouts, keep, rng.uniform(0.5, 1.5, N),
        {"advantages": rng.normal(size=N), "targets": values + rng.normal(size=(k, N)), "old_logprobs": old,
         "behavior_logprobs": old + 0.1 * rng.normal(size=N), "ref_logprobs": old + 0.5 * rng.normal(size=N),
         "old_values": values + 0.4 * rng.normal(size=(k, N)), "preferred": _preferred(rollouts, seed)},
        {"logprobs": old + spread * rng.normal(size=N), "entropy": rng.exponential(size=N), "values": values,
         "action_values": rng.normal(size=(k, N)), "reference_kl": rng.exponential(size=N)})


def _preferred(rollouts: Rollouts, seed: int) -> np.ndarray:
    """[N] 1 on the actions of one episode of each group: the first or the last one."""
    group = rollouts.group
    best = [np.flatnonzero(group == g)[0 if (seed + g) % 2 else -1] for g in np.unique(group)]
    return np.isin(rollouts.action_episode, best).astype(np.float64)


def _rollouts(rng: np.random.Generator, lengths: np.ndarray, group: np.ndarray) -> Rollouts:
    """Each episode is one sequence: a prompt of one or two tokens, its actions, and at times a token behind them."""
    E = len(lengths)
    prompt, behind = rng.integers(1, 3, E), rng.integers(0, 2, E)
    is_action = np.concatenate([np.repeat([False, True, False], (p, n, b))
                                for p, n, b in zip(prompt, lengths, behind)])
    return Rollouts(
        tokens=rng.integers(0, 50, len(is_action)).astype(np.int32), offsets=offsets_of(prompt + lengths + behind),
        episode=np.arange(E), is_action=is_action, group=group, finish=np.zeros(E, np.int8),
        terminated=np.ones(E, bool), prompts=tuple(Prompt(text="", group=int(g)) for g in group),
        completions=("",) * E)


def part_of(step: Step, objective: Objective, chosen: np.ndarray | None = None,
            order: np.random.Generator | None = None) -> Part:
    """The part of the kept actions that `chosen` [N] bool marks (all of them by default), weighted as in a run."""
    whole = step.rollouts
    given = objective.weights(step.counts)
    require_one_per_kept_action(given, step.counts, objective)
    weights = per_action(given, step.keep, step.correction)
    keep = step.keep if chosen is None else step.keep & chosen
    episodes = np.unique(whole.action_episode[keep])
    if order is not None:
        episodes = order.permutation(episodes)
    actions = whole.episode_actions
    rows = ragged_indices((np.cumsum(actions) - actions)[episodes], actions[episodes])
    rows = rows[keep[rows]]
    batch = cut(StepData(whole, keep, weights, step.columns), episodes)
    out: dict[str, Any] = {name: x[..., rows] for name, x in step.outputs.items()}
    return Part(TokenOutputs(**out), batch, rows)


def require_one_per_kept_action(weights: Weights, counts: Counts, objective: Objective) -> None:
    """Fail where a weight column is on another axis than that of the kept actions."""
    N, E = int(counts.episode_actions.sum()), len(counts.episode_actions)
    for name in WEIGHTS:
        column = getattr(weights, name)
        hint = ("; np.repeat(x, counts.episode_actions) gives each action the number of its episode"
                if np.shape(column) == (E,) else "; counts.episode_actions.sum() says how many there are")
        assert column is None or np.shape(column) == (N,), (
            f"{type(objective).__name__}.weights gave {name} of shape {np.shape(column)} for {E} episodes with "
            f"{N} kept actions: one number per kept action is needed{hint}")


def split(step: Step, objective: Objective, rng: np.random.Generator, parts: int) -> list[Part]:
    """The step in parts that keep together what the objective's `unit` says, and nothing more."""
    N = len(step.keep)
    if objective.unit == "action":
        of_action = rng.integers(parts, size=N)
    else:
        episode, of_action = step.rollouts.action_episode, np.zeros(N, int)
        for unit in units_of(step.rollouts, step.keep, objective.unit):
            of_action[np.isin(episode, unit)] = rng.integers(parts)
    return [part_of(step, objective, of_action == p, rng) for p in range(parts) if (step.keep & (of_action == p)).any()]


def with_dummy(part: Part, actions: int) -> Part:
    """The part and, behind it, one episode of actions that weigh nothing, as a backend fills a bucket up."""
    b, M = part.batch, len(part.batch.tokens)
    dummy: dict[str, Any] = {
        "tokens": np.zeros(actions + 1, np.int32), "sequence": np.full(actions + 1, np.max(b.sequence, initial=-1) + 1),
        "positions": np.arange(actions + 1), "token_weight": np.zeros(actions + 1),
        "source": M + 1 + np.arange(actions), "episode": np.full(actions, len(b.count)),
        "group": np.array([np.max(b.group, initial=-1) + 1]), "count": np.array([actions]),
        "last": np.array([M + actions])}
    columns = {name: np.full((*np.shape(column)[:-1], actions), 0.0 if name in (*WEIGHTS, "preferred") else -3.0)
               for name in (*COLUMN.values(), *WEIGHTS) if (column := getattr(b, name)) is not None}
    longer: dict[str, Any] = {name: np.concatenate([getattr(b, name), x], axis=-1)
                              for name, x in {**dummy, **columns}.items()}
    def filled(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x, np.full((*x.shape[:-1], actions), -1.0)], axis=-1)
    out: dict[str, Any] = {name: filled(x) for name, x in outputs_of(part.out).items()}
    return Part(TokenOutputs(**out), replace(b, **longer), np.concatenate(
        [part.rows, np.max(part.rows, initial=-1) + 1 + np.arange(actions)]))


def with_columns(part: Part, **columns: Any) -> Part:
    """The part with other columns of its batch."""
    return replace(part, batch=replace(part.batch, **columns))


def with_outputs(part: Part, **outputs: Any) -> Part:
    """The part with other outputs of the model."""
    return replace(part, out=replace(part.out, **outputs))


def outputs_of(out: TokenOutputs) -> dict[str, Array]:
    """The outputs that are there."""
    return {name: x for name in OUTPUT.values() if (x := getattr(out, name)) is not None}


@dataclass(frozen=True, slots=True, eq=False)
class Evaluated:
    """What an objective says of a part, in NumPy."""

    value: float
    """sum(coef * total): what is differentiated."""
    terms: Mapping[str, float]
    """Raw totals."""
    slots: Mapping[str, str]
    """The slot of each term."""
    metrics: Mapping[str, tuple[float, float]]
    gradients: Mapping[str, np.ndarray]
    """Of `value`: output -> [n] or [k, n], and `batch.<column>` where columns were differentiated; {} in NumPy."""
    dtypes: Mapping[str, np.dtype[Any]]
    """Of the terms' totals."""


def evaluate(objective: Objective, part: Part, framework: str = "numpy", *, dtype: type = np.float64, slot: str = "",
             columns: Collection[str] = ()) -> Evaluated:
    """Value, metrics and gradients in one framework; of one slot's terms alone where `slot` names it.

    `columns` names columns of the batch in which the loss is differentiated beside the outputs.
    """
    leaves: dict[str, np.ndarray] = {name: np.asarray(x, dtype) for name, x in outputs_of(part.out).items()}
    leaves |= {f"batch.{name}": np.asarray(x, dtype) for name in columns
               if (x := getattr(part.batch, name)) is not None}
    make = (lambda x: x) if framework == "numpy" else installed_frameworks()[framework]
    with in_float64(framework):
        batch = converted(part.batch, make, dtype)

        def loss(arrays: Mapping[str, Array]) -> Loss:
            moved = {name[6:]: x for name, x in arrays.items() if name.startswith("batch.")}
            out = TokenOutputs(**{name: x for name, x in arrays.items() if not name.startswith("batch.")})
            found = objective(ops_of(out.logprobs), out, replace(batch, **moved), COEF)
            return replace(found, terms={n: t for n, t in found.terms.items() if slot in ("", t.slot)})
        return _EVALUATE[framework](loss, {name: make(x) for name, x in leaves.items()})


def converted(batch: MicroBatch, make: Callable[[np.ndarray], Array], dtype: type) -> MicroBatch:
    """The batch as arrays of a framework: integers as int64, numbers as `dtype`."""
    def moved(x: Any) -> Any:
        return make(np.asarray(x, dtype if x.dtype.kind == "f" else np.int64)) if isinstance(x, np.ndarray) else x
    return replace(batch, **{f.name: moved(getattr(batch, f.name)) for f in fields(batch)})


def total_of(loss: Loss) -> Array:
    """What is differentiated: the terms with their coefficients."""
    return sum(term.coef * term.total for term in loss.terms.values())


def _read(loss: Loss, gradients: Mapping[str, np.ndarray]) -> Evaluated:
    return Evaluated(
        float(total_of(loss)), {n: float(t.total) for n, t in loss.terms.items()},
        {n: t.slot for n, t in loss.terms.items()}, {n: (float(t), float(w)) for n, (t, w) in loss.metrics.items()},
        gradients, {n: np.dtype(str(t.total.dtype).removeprefix("torch.")) for n, t in loss.terms.items()})


def _in_numpy(loss: Callable[[Mapping[str, Array]], Loss], leaves: Mapping[str, Array]) -> Evaluated:
    return _read(loss(leaves), {})


def _in_torch(loss: Callable[[Mapping[str, Array]], Loss], leaves: Mapping[str, Array]) -> Evaluated:
    torch = import_module("torch")
    for x in leaves.values():
        x.requires_grad_()
    found = loss(leaves)
    attached = [name for name, pair in found.metrics.items() if any(getattr(x, "requires_grad", False) for x in pair)]
    assert not attached, f"metrics {attached} carry a gradient: pass them through ops.stop_gradient"
    total = total_of(found)
    given = (torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
             if getattr(total, "requires_grad", False) else [None] * len(leaves))
    gradients = {name: np.zeros(tuple(x.shape)) if g is None else g.numpy()
                 for (name, x), g in zip(leaves.items(), given, strict=True)}
    with torch.no_grad():
        detached = {n: replace(t, total=t.total.detach()) for n, t in found.terms.items()}
    return _read(Loss(detached, found.metrics), gradients)


def _in_jax(loss: Callable[[Mapping[str, Array]], Loss], leaves: Mapping[str, Array]) -> Evaluated:
    kept: list[Loss] = []

    def differentiated(arrays: Mapping[str, Array]) -> tuple[Array, Any]:
        found = loss(arrays)
        kept.append(found)
        return total_of(found), ({n: t.total for n, t in found.terms.items()}, dict(found.metrics))
    (_, (totals, metrics)), gradients = import_module("jax").value_and_grad(differentiated, has_aux=True)(leaves)
    terms = {n: replace(t, total=totals[n]) for n, t in kept[-1].terms.items()}
    return _read(Loss(terms, metrics), {name: np.asarray(g) for name, g in gradients.items()})


_EVALUATE: Mapping[str, Callable[[Callable[[Mapping[str, Array]], Loss], Mapping[str, Array]], Evaluated]] = {
    "numpy": _in_numpy, "torch": _in_torch, "jax": _in_jax}


def central_differences(f: Callable[[np.ndarray], float], x: np.ndarray, h: float = 1e-6) -> np.ndarray:
    """The gradient of `f` at `x`, of any shape, to about h^2."""
    gradient = np.zeros(x.shape)
    for i in np.ndindex(*x.shape):
        step = np.zeros(x.shape)
        step[i] = h
        gradient[i] = (f(x + step) - f(x - step)) / (2 * h)
    return gradient
