"""The entropy bonus of a policy. Knows no other term."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from posttrain.data import Array, Counts, Loss, MicroBatch, Term, TokenOutputs, Weights
from posttrain.ops import Ops
from posttrain.protocols import Need, Output

from posttrain_objectives.columns import required
from posttrain_objectives.denominators import action_weights


@final
@dataclass(frozen=True, slots=True)
class Entropy:
    """`-sum(kl_weight * entropy)`: minimising it keeps the policy from becoming deterministic.

    Reads `entropy` [N], that of the whole distribution at each action: a sampled -log pi would have an expected
    gradient of zero. Beside a policy objective it is averaged as that one is; alone it is the mean over actions.
    """

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    @property
    def outputs(self) -> frozenset[Output]:
        return frozenset({Output.ENTROPY})

    @property
    def unit(self) -> Literal["action", "episode", "group"]:
        return "action"

    @property
    def slots(self) -> tuple[str, ...]:
        return ("main",)

    def weights(self, counts: Counts) -> Weights:
        return Weights(kl_weight=action_weights("token_mean", counts))

    def __call__(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Array]) -> Loss:
        return Loss({"entropy": Term(-ops.xp.sum(batch.kl_weight * required(out, "entropy")), coef["entropy"])})
