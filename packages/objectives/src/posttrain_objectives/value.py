"""The losses of a critic: of values, and of action values. Knows neither the policy's loss nor how targets are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from posttrain.data import Array, Counts, Loss, MicroBatch, Term, TokenOutputs, Weights
from posttrain.ops import Ops
from posttrain.protocols import Need, Output

from posttrain_objectives.choices import require_choice
from posttrain_objectives.columns import required
from posttrain_objectives.denominators import Mean, action_weights
from posttrain_objectives.diagnostics import mean_over_actions


@final
@dataclass(frozen=True, slots=True)
class Value:
    """`sum(value_weight * max((v - G)^2, (clip(v, v_old +- clip) - G)^2) / 2)`, added over the k value heads.

    Reads `values` [k, N] and, of the batch, `targets` [k, N], `value_weight` [N] and, with a clip, `old_values`
    [k, N] or None. Schulman et al. 2017, arXiv 1707.06347, section 6, with the clip of its published implementation.

    Metrics are means over the kept actions, of each head: with G the target and e = G - v, `value/target`,
    `value/target_squared`, `value/error`, `value/error_squared` (`value/0/target` and so on with several heads), so
    that over any parts and ranks explained variance = 1 - (E[e^2] - E[e]^2) / (E[G^2] - E[G]^2); and `value/clipped`,
    the fraction whose gradient the clip cut.
    """

    clip: float = 0.0
    """How far a value may move from the one before the update; 0 does not clip. Where returns are much larger than
    the clip it freezes the critic, hence off by default."""
    denominator: Mean = "token_mean"
    """Mean over actions, or mean over episodes of their means."""

    def __post_init__(self) -> None:
        if not self.clip >= 0:
            raise ValueError(f"clip must not be negative (0 is off), got {self.clip}")
        require_choice("denominator", self.denominator, ("token_mean", "sequence_mean"))

    @property
    def needs(self) -> frozenset[Need]:
        """Targets, and the values before the update where they bound the new ones."""
        old = frozenset({Need.VALUES}) if self.clip > 0 else frozenset()
        return frozenset({Need.TARGETS}) | old

    @property
    def outputs(self) -> frozenset[Output]:
        return frozenset({Output.VALUES})

    @property
    def unit(self) -> Literal["action", "episode", "group"]:
        return "action"

    @property
    def slots(self) -> tuple[str, ...]:
        return ("main",)

    def weights(self, counts: Counts) -> Weights:
        return Weights(value_weight=action_weights(self.denominator, counts))

    def __call__(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Array]) -> Loss:
        v: Array = required(out, "values")
        G: Array = ops.stop_gradient(required(batch, "targets"))
        weight = batch.value_weight
        squared = (v - G) ** 2
        metrics = _moments(ops, v, G, weight)
        if self.clip > 0:
            bounded = _bounded(ops, v, batch.old_values, self.clip)
            clipped = (bounded - G) ** 2
            metrics["value/clipped"] = mean_over_actions(ops, clipped > squared, weight)
            squared = ops.xp.maximum(squared, clipped)
        total = ops.xp.sum(weight * (0.5 * squared))
        return Loss({"value": Term(total, coef["value"])}, metrics)


@final
@dataclass(frozen=True, slots=True)
class ActionValue:
    """`sum(value_weight * (Q(s, a) - G)^2 / 2)` of the actions taken, added over the k action-value heads.

    Reads `action_values` [k, N] and, of the batch, `targets` [k, N] and `value_weight` [N]: the squared error whose
    gradient step moves Q towards a return such as Retrace's (Wang et al. 2017, arXiv 1611.01224). Rows
    of other actions get no gradient. Raises `ValueError` where a column is missing.

    Metrics are those of `Value`, with Q(s, a) in place of v: `value/target`, `value/target_squared`, `value/error`,
    `value/error_squared` (`value/0/target` and so on with several heads).
    """

    denominator: Mean = "token_mean"
    """Mean over actions, or mean over episodes of their means."""

    def __post_init__(self) -> None:
        require_choice("denominator", self.denominator, ("token_mean", "sequence_mean"))

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.TARGETS})

    @property
    def outputs(self) -> frozenset[Output]:
        return frozenset({Output.ACTION_VALUES})

    @property
    def unit(self) -> Literal["action", "episode", "group"]:
        return "action"

    @property
    def slots(self) -> tuple[str, ...]:
        return ("main",)

    def weights(self, counts: Counts) -> Weights:
        return Weights(value_weight=action_weights(self.denominator, counts))

    def __call__(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Array]) -> Loss:
        Q: Array = required(out, "action_values")
        G: Array = ops.stop_gradient(required(batch, "targets"))
        total = ops.xp.sum(batch.value_weight * (0.5 * (Q - G) ** 2))
        return Loss({"value": Term(total, coef["value"])}, _moments(ops, Q, G, batch.value_weight))


def _bounded(ops: Ops, v: Array, old: Array | None, clip: float) -> Array:
    """clip(v, v_old - clip, v_old + clip) [k, N]; no old values means that the critic has not moved."""
    v_old = ops.stop_gradient(v if old is None else old)
    # not v_old + clip(v - v_old): rounding would then move values that are within the bounds
    return ops.xp.minimum(ops.xp.maximum(v, v_old - clip), v_old + clip)


def _moments(ops: Ops, v: Array, G: Array, weight: Array) -> dict[str, tuple[Array, Array]]:
    """First and second moments of target and error, of each head."""
    heads, moments = v.shape[0], {}
    for j in range(heads):
        prefix = "value" if heads == 1 else f"value/{j}"
        e = G[j] - v[j]
        for name, x in {"target": G[j], "target_squared": G[j] ** 2, "error": e, "error_squared": e**2}.items():
            moments[f"{prefix}/{name}"] = mean_over_actions(ops, x, weight)
    return moments
