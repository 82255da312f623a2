"""Ragged cases for objectives, and one way to evaluate a loss and its gradient in NumPy, torch and JAX, in float64.

A test that evaluates in a framework that is not installed is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from posttrain.data import Counts, Loss, MicroBatch, TokenOutputs, Weights
from posttrain.ops import ops_of
from posttrain.protocols import Objective

FRAMEWORKS = ("numpy", "torch", "jax")
COEF = {"value": 0.7, "entropy": 0.3}
ACTION_FIELDS = ("weight", "kl_weight", "value_weight", "advantages", "targets", "old_logprobs", "ref_logprobs",
                 "behavior_logprobs", "old_values")


@dataclass(frozen=True, eq=False)
class Case:
    """E episodes of `lengths` kept actions (0 allowed): differentiable outputs and batch columns, NumPy float64."""

    lengths: tuple[int, ...]
    outputs: Mapping[str, np.ndarray]
    """logprobs [N], entropy [N], values [k, N]"""
    columns: Mapping[str, np.ndarray]
    """`MicroBatch` fields whose last axis is the action's."""

    @property
    def counts(self) -> Counts:
        lengths = np.array(self.lengths, int)
        return Counts(int(lengths.sum()), int((lengths > 0).sum()), lengths)

    @property
    def episode(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def with_columns(self, **columns: np.ndarray | None) -> Case:
        merged = {**self.columns, **columns}
        return replace(self, columns={name: x for name, x in merged.items() if x is not None})

    def with_outputs(self, **outputs: np.ndarray) -> Case:
        return replace(self, outputs={**self.outputs, **outputs})

    def rows(self, flat: np.ndarray) -> list[np.ndarray]:
        """[N] -> one row per episode."""
        return np.split(flat, np.cumsum(self.lengths)[:-1])


def random_case(seed: int, lengths: Sequence[int] = (3, 0, 5, 1, 4), spread: float = 0.3, heads: int = 1) -> Case:
    """Log-ratios of standard deviation `spread`, so that clip ranges of about 0.2 are left often."""
    rng = np.random.default_rng(seed)
    N = sum(lengths)
    old = -rng.exponential(1.0, N)
    values = rng.normal(size=(heads, N))
    behavior = old + np.random.default_rng([seed, 1]).normal(scale=0.5, size=N)
    return Case(
        tuple(lengths),
        {"logprobs": old + rng.normal(scale=spread, size=N), "entropy": rng.exponential(size=N), "values": values},
        {"advantages": rng.normal(size=N), "targets": values + rng.normal(size=(heads, N)), "old_logprobs": old,
         "behavior_logprobs": behavior,
         "ref_logprobs": old + rng.normal(scale=0.5, size=N),
         "old_values": values + rng.normal(scale=0.4, size=(heads, N))})


def weighted(case: Case, weights: Weights) -> Case:
    """The case with weight columns; zeros where the objective has no such term."""
    names = ("weight", "kl_weight", "value_weight")
    zero = np.zeros(sum(case.lengths))
    return case.with_columns(**{n: zero if (w := getattr(weights, n)) is None else w for n in names})


def part_of(case: Case, episodes: Sequence[int]) -> Case:
    """The chosen episodes, in the given order; weights stay those of the whole."""
    starts = np.concatenate([[0], np.cumsum(case.lengths)])
    chosen = np.concatenate([np.arange(starts[e], starts[e + 1]) for e in episodes] or [np.zeros(0, int)]).astype(int)
    return Case(tuple(case.lengths[e] for e in episodes), {n: x[..., chosen] for n, x in case.outputs.items()},
                {n: x[..., chosen] for n, x in case.columns.items()})


def with_dummy(case: Case, actions: int) -> Case:
    """The case and an appended episode of zero-weight actions, as a backend pads a bucket."""
    def padded(name: str, x: np.ndarray) -> np.ndarray:
        fill = 0.0 if name.endswith("weight") else -0.5
        return np.concatenate([x, np.full((*x.shape[:-1], actions), fill)], axis=-1)
    return Case((*case.lengths, actions), {n: padded(n, x) for n, x in case.outputs.items()},
                {n: padded(n, x) for n, x in case.columns.items()})


def micro_batch(case: Case, asarray: Callable[[np.ndarray], Any]) -> MicroBatch:
    """The case as one part: episodes without an action are left out, as core does."""
    alive = np.array([length for length in case.lengths if length > 0], int)
    N, E = int(alive.sum()), len(alive)
    index = {"tokens": np.zeros(N, np.int32), "sequence": np.repeat(np.arange(E), alive), "positions": np.arange(N),
             "source": np.arange(N), "episode": np.repeat(np.arange(E), alive), "group": np.arange(E), "count": alive,
             "last": np.cumsum(alive) - 1}
    return MicroBatch(token_weight=asarray(np.zeros(N)), **{n: asarray(x) for n, x in index.items()},
                      **{n: asarray(case.columns[n]) for n in ACTION_FIELDS if n in case.columns})


@dataclass(frozen=True, eq=False)
class Evaluated:
    """A loss in NumPy: `value` is what is differentiated; `gradients` by output, absent for framework numpy."""

    value: float
    terms: Mapping[str, float]
    metrics: Mapping[str, tuple[float, float]]
    gradients: Mapping[str, np.ndarray]

    def __add__(self, other: Evaluated) -> Evaluated:
        """Of two parts: values and metrics add, gradients are joined along the action axis."""
        return Evaluated(
            self.value + other.value, {n: x + other.terms[n] for n, x in self.terms.items()},
            {n: (t + other.metrics[n][0], w + other.metrics[n][1]) for n, (t, w) in self.metrics.items()},
            {n: np.concatenate([g, other.gradients[n]], axis=-1) for n, g in self.gradients.items()})


def total(loss: Loss) -> Any:
    return sum(term.coef * term.total for term in loss.terms.values())


def evaluate(framework: str, objective: Objective, case: Case, dtype: type = np.float64) -> Evaluated:
    """Value, terms, metrics and gradients of the case, whose weights are already set, in one framework."""
    return {"numpy": _numpy, "torch": _torch, "jax": _jax}[framework](objective, case, dtype)


def _cast(x: np.ndarray, dtype: type) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(dtype) if x.dtype.kind == "f" else x


def _evaluated(loss: Loss, gradients: Mapping[str, np.ndarray]) -> Evaluated:
    return Evaluated(float(total(loss)), {n: float(t.total) for n, t in loss.terms.items()},
                     {n: (float(t), float(w)) for n, (t, w) in loss.metrics.items()}, gradients)


def _numpy(objective: Objective, case: Case, dtype: type) -> Evaluated:
    batch = micro_batch(case, lambda x: _cast(x, dtype))
    out = TokenOutputs(**{n: _cast(x, dtype) for n, x in case.outputs.items()})
    return _evaluated(objective(ops_of(out.logprobs), out, batch, COEF), {})


def _torch(objective: Objective, case: Case, dtype: type) -> Evaluated:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    batch = micro_batch(case, lambda x: torch.as_tensor(_cast(x, dtype)))
    leaves = {n: torch.tensor(_cast(x, dtype), requires_grad=True) for n, x in case.outputs.items()}
    loss = objective(ops_of(leaves["logprobs"]), TokenOutputs(**leaves), batch, COEF)
    assert not any(x.requires_grad for pair in loss.metrics.values() for x in pair), "metrics must be detached"
    total(loss).backward()
    gradients = {n: np.zeros(x.shape) if x.grad is None else x.grad.numpy() for n, x in leaves.items()}
    return _evaluated(Loss({n: replace(t, total=t.total.detach()) for n, t in loss.terms.items()}, loss.metrics),
                      gradients)


def _jax(objective: Objective, case: Case, dtype: type) -> Evaluated:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        batch = micro_batch(case, lambda x: jax.numpy.asarray(_cast(x, dtype)))
        leaves = {n: jax.numpy.asarray(_cast(x, dtype)) for n, x in case.outputs.items()}
        def traced(leaves: Mapping[str, Any]) -> tuple[Any, tuple[Any, Any]]:
            loss = objective(ops_of(leaves["logprobs"]), TokenOutputs(**leaves), batch, COEF)
            return total(loss), ({n: t.total for n, t in loss.terms.items()}, loss.metrics)
        (value, (terms, metrics)), gradients = jax.value_and_grad(traced, has_aux=True)(leaves)
        return Evaluated(float(value), {n: float(x) for n, x in terms.items()},
                         {n: (float(t), float(w)) for n, (t, w) in metrics.items()},
                         {n: np.asarray(g) for n, g in gradients.items()})


def central_differences(f: Callable[[np.ndarray], float], x: np.ndarray, h: float = 1e-6) -> np.ndarray:
    """The gradient of `f` at `x`, of any shape."""
    gradient = np.zeros(x.shape)
    for i in np.ndindex(*x.shape):
        step = np.zeros(x.shape)
        step[i] = h
        gradient[i] = (f(x + step) - f(x - step)) / (2 * h)
    return gradient


def averaged(rows: Sequence[np.ndarray], how: str, length: int = 0) -> float:
    """Literal averages over ragged rows, one row per episode; empty rows do not count."""
    alive = [row for row in rows if len(row)]
    if how == "token_mean":
        return sum(float(x) for row in alive for x in row) / sum(len(row) for row in alive)
    if how == "sequence_mean":
        return sum(sum(float(x) for x in row) / len(row) for row in alive) / len(alive)
    return sum(float(x) for row in alive for x in row) / (len(alive) * length)
