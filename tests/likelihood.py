"""The plainest objective, for tests of what a learner does with a loss."""

from __future__ import annotations

from typing import Any

import numpy as np
from posttrain.data import Counts, Loss, MicroBatch, Term, Weights
from posttrain.protocols import Output


class Likelihood:
    """The loss -sum(weight * logprob)."""

    needs, outputs, unit, slots = frozenset(), frozenset({Output.LOGPROBS}), "episode", ("main",)

    def weights(self, counts: Counts) -> Weights:
        return Weights(weight=np.ones(counts.actions))

    def __call__(self, ops: Any, out: Any, batch: MicroBatch, coef: Any) -> Loss:
        return Loss({"policy": Term(-ops.xp.sum(batch.weight * out.logprobs))})
