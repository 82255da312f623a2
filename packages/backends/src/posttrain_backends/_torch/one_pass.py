"""Which losses are known while the logits of a chunk of actions still exist, and their slopes in what those say.

A loss whose unit is the action is a sum over actions, so any of them are a part of their own: their terms and metrics
add up. Knows objectives and columns; neither how logits are made nor how parameters get their gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from posttrain.data import Array, Loss, MicroBatch, TokenOutputs
from posttrain.ops import ops_of
from posttrain.protocols import Objective, Output
from torch import Tensor

from posttrain_backends._torch.logits import Reading, Slopes

READ = frozenset({Output.LOGPROBS, Output.ENTROPY, Output.REFERENCE_KL})
"""Outputs that come from logits."""
_OF_ACTIONS = READ | {Output.VALUES, Output.ACTION_VALUES}
"""Outputs whose last axis is that of actions, with a gradient."""
_COLUMNS = ("source", "episode", "weight", "kl_weight", "value_weight", "advantages", "targets", "old_logprobs",
            "behavior_logprobs", "ref_logprobs", "old_values", "preferred")
"""Fields of a `MicroBatch` whose last axis is that of actions."""


def takes_one_pass(objective: Objective) -> bool:
    """Whether its loss is a sum over actions, of one slot and of outputs of actions, logits among them.

    Others need two passes: a ratio of whole episodes and a pair of answers know no slope before all of their log-probs,
    and a second slot has another gradient for the same logits.
    """
    return (objective.unit == "action" and len(objective.slots) == 1 and objective.outputs <= _OF_ACTIONS
            and bool(objective.outputs & READ))


def actions_of(batch: MicroBatch, rows: slice) -> MicroBatch:
    """Some of the actions; tokens and episodes stay all there, so numbers that point to them hold."""
    columns = {name: getattr(batch, name) for name in _COLUMNS}
    return replace(batch, **{name: column[..., rows] for name, column in columns.items() if column is not None})


@final
@dataclass(frozen=True, slots=True, eq=False)
class LossOfChunks:
    """The slopes of an objective in what is said of some actions, for `head.walk`; keeps each chunk's loss."""

    objective: Objective
    coef: Mapping[str, float]
    batch: MicroBatch
    """In tensors."""
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    """`TokenOutputs` field -> [k, N], outputs that do not come from logits."""
    d_beside: Mapping[str, Tensor] = field(default_factory=dict)
    """Their gradients, by the same names; each chunk writes its own columns."""
    losses: list[Loss] = field(default_factory=list)
    """Of the chunks so far, detached; terms and metrics of all of them add up to those of the whole."""

    def __call__(self, rows: slice, reading: Reading) -> Slopes:
        columns = {"logprobs": reading.logprobs, "entropy": reading.entropy, "reference_kl": reading.kl,
                   **{name: column[:, rows] for name, column in self.beside.items()}}
        leaves = {name: x.detach().requires_grad_() for name, x in columns.items() if x is not None}
        with torch.enable_grad():
            out = TokenOutputs(**leaves)  # type: ignore[arg-type]  # aux, of another type, is not among them
            loss = self.objective(ops_of(out.logprobs), out, actions_of(self.batch, rows), self.coef)
            found = _gradients(loss, leaves)
        for name, gradient in self.d_beside.items():
            if (slope := found[name]) is not None:
                gradient[:, rows] = slope
        self.losses.append(_detached(loss))
        return Slopes(found["logprobs"], found.get("entropy"), found.get("reference_kl"))


def _gradients(loss: Loss, leaves: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Of the sum of all terms, each times its coefficient; None in leaves that no term depends on."""
    scaled = [term.coef * term.total for term in loss.terms.values()]
    if not (alive := [x for x in scaled if isinstance(x, Tensor) and x.requires_grad]):
        return dict.fromkeys(leaves)
    return dict(zip(leaves, torch.autograd.grad(sum(alive[1:], alive[0]), list(leaves.values()), allow_unused=True)))


def _detached(loss: Loss) -> Loss:
    def alone(x: Array) -> Any:
        return x.detach() if isinstance(x, Tensor) else x
    return Loss({name: replace(term, total=alone(term.total)) for name, term in loss.terms.items()},
                {name: (alone(total), alone(weight)) for name, (total, weight) in loss.metrics.items()})
