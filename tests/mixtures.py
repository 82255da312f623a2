"""Mixtures of experts on trial: answers whose experts are recorded, the same sent elsewhere, and one optimiser step
seen from inside. Needs torch and transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from exchange import TOKENIZER
from posttrain.batching import FirstFit, StepData
from posttrain.comm import SingleProcess
from posttrain.data import Prompt, Rollouts, Sampling
from posttrain.loss import ExpertBalance, Sum
from posttrain.protocols import Optimization, Output
from posttrain.testing.tiny_models import Probe, accumulate
from posttrain.update import Trained, optimiser_step
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models.mixture import Routes
from posttrain_backends.engines import Batched

LOGPROBS = frozenset({Output.LOGPROBS})
PROMPTS = [Prompt(text=t, group=i) for i, t in enumerate(["abc", "0+1", "hgfedcba"]) for _ in range(3)]


def recorded_by(learner: Any, **fields: Any) -> Rollouts:
    """Answers of different lengths, with fewer rows than prompts, so that rows are refilled and move."""
    return Batched(**{"slots": 4, "prefill_tokens": 5, **fields}).start(learner, TOKENIZER, shared=True).rollout(
        PROMPTS, Sampling(max_new_tokens=7), (0, 0))


def chosen(learner: Any, rollouts: Rollouts) -> np.ndarray:
    """[M, L, k] what the model chooses by itself, each sequence computed alone."""
    model, routes = learner.model, Routes()
    with torch.no_grad():
        model.hidden(torch.from_numpy(rollouts.tokens).long(), Layout.from_offsets(rollouts.offsets), routes)
    return routes.joined().numpy()


def elsewhere(rollouts: Rollouts, experts: int) -> Rollouts:
    """The same rollouts, as if the sampler's routers had sent each token to the next expert."""
    assert rollouts.routes is not None
    free = rollouts.routes == 255
    return replace(rollouts, routes=np.where(free, 255, (rollouts.routes + 1) % experts).astype(np.uint8))


def step_of(learner: Any, data: StepData, parts: Sequence[Sequence[int]] | None = None
            ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The gradients of one optimiser step, and what `apply` measured."""
    accumulate(learner, data, Probe(LOGPROBS), parts)
    gradients = {name: g.numpy().copy() for name, g in learner._gradients["main"].items()}
    return gradients, dict(learner.apply().values_by_name())


def balanced(moved: Rollouts, parts_of: int, learner: Any, coef: float = 0.7, objective: Any = None,
             keep: np.ndarray | None = None) -> dict[str, float]:
    """One optimiser step of `ExpertBalance` in parts of so many tokens."""
    N = int(moved.is_action.sum())
    keep = np.ones(N, bool) if keep is None else keep
    whole = Sum((objective or ExpertBalance(),))
    return dict(optimiser_step([Trained(learner, whole)], moved, keep, np.ones(N), {}, {"expert_balance": coef},
                               batching=FirstFit(), budget=parts_of, comm=SingleProcess())[0].values_by_name())


class Ascent:
    """Keeps the gradients of a step and moves nothing."""

    lr, settings = 0.0, Optimization(clip_norm=0.0)

    def __init__(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        self.parameters, self.seen = parameters, dict[str, np.ndarray]()

    def step(self) -> None:
        self.seen = {name: p.grad.numpy().copy() for name, p in self.parameters.items() if p.grad is not None}
