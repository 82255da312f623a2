"""Learning from given answers: negative log-likelihood. Knows neither rewards nor samplers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from posttrain.data import Array, Counts, Loss, MicroBatch, Term, TokenOutputs, Weights
from posttrain.ops import Ops
from posttrain.protocols import Need, Output

from posttrain_objectives.choices import require_choice
from posttrain_objectives.denominators import Mean, action_weights
from posttrain_objectives.diagnostics import mean_over_actions


@final
@dataclass(frozen=True, slots=True)
class SFT:
    """`sum(weight * -log pi)` of the given actions (supervised fine-tuning).

    Reads `logprobs` [N] and the batch's `weight` and `kl_weight` [N]. The metric `sft/nll` is the mean over actions
    whatever the denominator: exp of it is the perplexity.
    """

    denominator: Mean = "token_mean"
    """Mean over actions, or mean over episodes of their means."""

    def __post_init__(self) -> None:
        require_choice("denominator", self.denominator, ("token_mean", "sequence_mean"))

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    @property
    def outputs(self) -> frozenset[Output]:
        return frozenset({Output.LOGPROBS})

    @property
    def unit(self) -> Literal["action", "episode", "group"]:
        return "action"

    @property
    def slots(self) -> tuple[str, ...]:
        return ("main",)

    def weights(self, counts: Counts) -> Weights:
        weight = action_weights(self.denominator, counts)
        return Weights(weight=weight, kl_weight=weight)

    def __call__(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Array]) -> Loss:
        nll = -out.logprobs
        return Loss({"sft": Term(ops.xp.sum(batch.weight * nll))},
                    {"sft/nll": mean_over_actions(ops, nll, batch.kl_weight)})
