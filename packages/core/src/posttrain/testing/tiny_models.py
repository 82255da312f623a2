"""What a model is tried on: few tokens in every awkward shape, a loss that is curved in all that a model says, and how
gradients are seen from outside. Knows the protocols of models and NumPy; no component and no contract.

`Learner` shows no gradient. AdamW without memory (betas 0) and with an `eps` far above every gradient moves a parameter
by `lr / eps * gradient`, so a step shows it: that is `PLAIN`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final

import numpy as np
import pytest

from posttrain.batching import StepData, cut
from posttrain.data import (
    Array,
    Counts,
    Loss,
    Metrics,
    MicroBatch,
    Prompt,
    Rollouts,
    Sampling,
    Term,
    TokenOutputs,
    Weights,
    offsets_of,
    to_numpy,
)
from posttrain.errors import PosttrainError
from posttrain.loss import SHARED
from posttrain.ops import Ops, ops_of
from posttrain.protocols import Learner, Need, Optimization, Output, Scorer

_FLAT = 1e15
"""An `eps` beside which the square root of a second moment is nothing."""
STEP = 64.0
"""What a gradient is multiplied by in a plain step."""
PLAIN = Optimization(lr=STEP * _FLAT, betas=(0.0, 0.0), eps=_FLAT, clip_norm=0.0)
"""Optimiser steps of `STEP` times the gradient."""
TRAINING = Optimization(lr=0.05)
"""A step as a run takes it."""
COEF: Mapping[str, float] = {"entropy": 0.1}
Named = dict[str, np.ndarray]
"""Parameter -> its numbers."""


# ---- tokens


def random_rollouts(vocab_size: int, seed: int = 0, episodes: int = 8) -> Rollouts:
    """Episodes of uneven length in groups of two that share a prompt; every third one is split in two sequences, and
    some tokens between actions were not chosen."""
    rng = np.random.default_rng(seed)
    rows, episode, is_action = [], [], []
    for e in range(episodes):
        prompt = np.random.default_rng([seed, e // 2]).integers(0, vocab_size, 2 + e % 4 // 2)
        for _ in range(2 if e % 3 == 0 else 1):
            rest = int(rng.integers(2, 7))
            rows.append(np.concatenate([prompt, rng.integers(0, vocab_size, rest)]))
            is_action.append(np.concatenate([np.zeros(len(prompt), bool), rng.random(rest - 1) < 0.7, [True]]))
            episode.append(e)
    return Rollouts(
        tokens=np.concatenate(rows).astype(np.int32), offsets=offsets_of(np.array([len(row) for row in rows])),
        episode=np.array(episode), is_action=np.concatenate(is_action), group=np.arange(episodes) // 2,
        finish=np.zeros(episodes, np.int8), terminated=np.ones(episodes, bool),
        prompts=tuple(Prompt(text="x") for _ in range(episodes)), completions=("",) * episodes,
        sampling=Sampling(temperature=0.8))


def all_continuations(prefixes: Sequence[Sequence[int]], vocab_size: int) -> Rollouts:
    """Every token of the vocabulary behind every prefix, an episode each."""
    rows = [[*prefix, token] for prefix in prefixes for token in range(vocab_size)]
    lengths, E = np.array([len(row) for row in rows]), len(rows)
    return Rollouts(
        tokens=np.array([t for row in rows for t in row], np.int32), offsets=offsets_of(lengths),
        episode=np.arange(E), is_action=np.concatenate([np.arange(n) == n - 1 for n in lengths]),
        group=np.arange(E) // vocab_size, finish=np.zeros(E, np.int8), terminated=np.ones(E, bool),
        prompts=tuple(Prompt(text="x") for _ in range(E)), completions=("",) * E)


def log_table(scorer: Scorer, prefixes: Sequence[Sequence[int]], vocab_size: int, temperature: float) -> np.ndarray:
    """[n, V] log-probs of every token behind every prefix."""
    found = scorer.score(all_continuations(prefixes, vocab_size), LOGPROBS, temperature).logprobs
    return np.asarray(found, np.float64).reshape(len(prefixes), vocab_size)


def pasts(rollouts: Rollouts) -> list[list[int]]:
    """[N] what stands before each action in its sequence."""
    starts = rollouts.offsets[np.searchsorted(rollouts.offsets, rollouts.source, side="right") - 1]
    return [rollouts.tokens[a:b].tolist() for a, b in zip(starts, rollouts.source)]


LOGPROBS = frozenset({Output.LOGPROBS})


# ---- a loss


@final
@dataclass(frozen=True)
class Probe:
    """-sum(w A pi / old) in every slot, entropy, the KL to a reference, and squared errors of values: what `outputs`
    allow. `spoil` is added to the loss as a multiple of the log-probs: a NaN makes every gradient one."""

    outputs: frozenset[Output] = LOGPROBS
    slots: tuple[str, ...] = ("main",)
    spoil: float = 0.0
    needs: frozenset[Need] = frozenset({Need.ADVANTAGES})
    unit: Literal["action", "episode", "group"] = "action"

    def weights(self, counts: Counts) -> Weights:
        return Weights()

    def __call__(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Array]) -> Loss:
        xp, shared = ops.xp, SHARED if len(self.slots) > 1 else self.slots[0]
        ratio = xp.exp(out.logprobs - batch.old_logprobs)
        rows = xp.reshape(batch.advantages, (len(self.slots), -1))
        terms = {f"policy_{slot}": Term(-xp.sum(batch.weight * rows[i] * ratio), slot=slot)
                 for i, slot in enumerate(self.slots)}
        if self.spoil:
            terms["spoilt"] = Term(xp.sum(out.logprobs * self.spoil), slot=shared)
        if Output.ENTROPY in self.outputs:
            terms["entropy"] = Term(-xp.sum(batch.kl_weight * out.entropy), coef["entropy"], shared)
        if Output.REFERENCE_KL in self.outputs:
            terms["kl"] = Term(xp.sum(batch.kl_weight * out.reference_kl), slot=shared)
        if Output.VALUES in self.outputs:
            if out.values is None:
                raise ValueError("an objective asks for values, and the learner gives it none")
            error = out.values - batch.targets
            terms["value"] = Term(xp.sum(batch.value_weight * error * error), 0.5, shared)
        real = xp.astype(batch.kl_weight > 0, ratio.dtype)  # bucket padding of a backend must not count
        return Loss(terms, {"ratio": (xp.sum(real * ops.stop_gradient(ratio)), xp.sum(real))})


def step_data(rollouts: Rollouts, slots: int = 1, heads: int = 0, seed: int = 0) -> StepData:
    """The columns of a step for `Probe`; some actions are rejected."""
    rng, N = np.random.default_rng(seed + 1), int(rollouts.is_action.sum())
    columns: Named = {"advantages": rng.normal(size=(slots, N)) if slots > 1 else rng.normal(size=N),
                      "old_logprobs": -1.5 - rng.random(N)}
    if heads:
        columns["targets"] = rng.normal(size=(heads, N))
    return StepData(rollouts, keep=rng.random(N) < 0.9, columns=columns, weights=Weights(
        weight=np.full(N, 1.0 / N), kl_weight=rng.random(N) / N, value_weight=rng.random(N) / N))


def accumulate(learner: Learner, data: StepData, probe: Probe, parts: Sequence[Sequence[int]] | None = None) -> Metrics:
    """All episodes in the given parts, or at once."""
    whole = [range(data.rollouts.n_episodes)] if parts is None else parts
    metrics = Metrics()
    for part in whole:
        metrics = metrics + learner.accumulate(cut(data, np.array(part, np.int64)), probe, COEF)
    return metrics


def loss_of(scorer: Scorer, data: StepData, probe: Probe) -> float:
    """What is differentiated, over all slots, from the scorer's numbers in NumPy."""
    batch = cut(data, np.arange(data.rollouts.n_episodes))
    out = scorer.score(data.rollouts, probe.outputs, data.rollouts.sampling.temperature)
    def kept(x: Array) -> Array:
        return None if x is None else np.asarray(to_numpy(x), np.float64)[..., data.keep]
    out = TokenOutputs(logprobs=kept(out.logprobs), entropy=kept(out.entropy), reference_kl=kept(out.reference_kl),
                       values=kept(out.values))
    return sum(float(t.coef * t.total) for t in probe(ops_of(out.logprobs), out, batch, COEF).terms.values())


# ---- weights


def weights_of(scorer: Scorer) -> Named:
    """Copies of all parameters and buffers."""
    return {name: np.array(to_numpy(x)) for name, x in scorer.params()}


def is_float(x: np.ndarray) -> bool:
    """Whether gradients can reach it."""
    return x.dtype.kind == "f"


def disturbed(weights: Named, seed: int, spread: float) -> Named:
    """The weights with normal noise, so that nothing is 0 and nothing uniform; whole numbers stay."""
    rng = np.random.default_rng(seed)
    return {name: (x + spread * rng.normal(size=x.shape)).astype(x.dtype) if is_float(x) else x
            for name, x in weights.items()}


def move(before: Named, after: Named) -> Named:
    """Before minus after: `STEP` times the gradient, where the step was plain."""
    return {name: np.asarray(x, np.float64) - np.asarray(after[name], np.float64)
            for name, x in before.items() if is_float(x)}


def flat(named: Named) -> np.ndarray:
    """All numbers in one row, in the order of the names."""
    return np.concatenate([np.zeros(0), *(named[name].ravel() for name in sorted(named))])


def floats_of(state: Mapping[str, np.ndarray]) -> int:
    """How many floating-point numbers there are."""
    return sum(x.size for x in state.values() if is_float(np.asarray(x)))


def unequal(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> list[str]:
    """Names of what differs in any bit."""
    return sorted(name for name in {*a, *b}
                  if name not in a or name not in b or not np.array_equal(a[name], b[name]))


@dataclass(frozen=True, slots=True)
class TwoAlike:
    """A group of two ranks that always hold the same numbers; counts what is summed."""

    rank: int = 0
    size: int = 2
    calls: list[int] = field(default_factory=list)

    def sum(self, x: np.ndarray) -> np.ndarray:
        self.calls.append(x.size)
        return 2 * np.asarray(x)

    def max(self, n: int) -> int:
        return n

    def any(self, flag: bool) -> bool:
        return flag


# ---- what is refused


@contextmanager
def refused(what: str, *names: str) -> Iterator[None]:
    """Fail unless the block raises an error made for people whose text holds one of `names`."""
    wanted = " or ".join(names)
    try:
        yield
    except (PosttrainError, ValueError, RuntimeError) as error:
        assert any(name.lower() in str(error).lower() for name in names), \
            f"{what} is refused without naming {wanted}: {type(error).__name__}: {error}"
    except Exception as error:
        pytest.fail(f"{what} ends in {type(error).__name__}: {error}; refuse it with an error that names {wanted} "
                    "(posttrain.errors.ConfigError)", pytrace=False)
    else:
        pytest.fail(f"{what} is accepted; refuse it with an error that names {wanted} (posttrain.errors.ConfigError)",
                    pytrace=False)


def with_actions_changed_behind(rollouts: Rollouts, vocab_size: int) -> tuple[Rollouts, np.ndarray]:
    """The last token of every sequence replaced, and [N] which actions are not among those."""
    last, tokens = rollouts.offsets[1:] - 1, rollouts.tokens.copy()
    tokens[last] = (tokens[last] + 1) % vocab_size
    return replace(rollouts, tokens=tokens), ~np.isin(rollouts.source, last)


def sequences_apart(rollouts: Rollouts) -> Rollouts:
    """Every sequence as an episode of its own."""
    S = len(rollouts.offsets) - 1
    none: dict[str, Any] = {"behavior_logprobs": None, "policy_version": None, "turn": None}
    return replace(rollouts, episode=np.arange(S), group=np.arange(S), finish=np.zeros(S, np.int8),
                   terminated=np.ones(S, bool), prompts=(Prompt(text="x"),) * S, completions=("",) * S, **none)
