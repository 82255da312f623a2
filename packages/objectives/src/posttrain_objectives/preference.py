"""Losses of pairs of answers of which one is preferred: direct preference optimisation, and the reward model of Bradley
and Terry. Knows neither rewards of samplers nor how pairs are read.

A pair is a group of two episodes; `MicroBatch.preferred` marks the actions of the better one. Letters: Delta difference
of the two answers, sigma the logistic function, beta how far the policy may leave the reference, eps label smoothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, final

from posttrain.data import Array, Counts, Loss, MicroBatch, Term, TokenOutputs, Weights
from posttrain.ops import Ops
from posttrain.protocols import Need, Output

from posttrain_objectives.choices import require_choice
from posttrain_objectives.columns import required
from posttrain_objectives.denominators import action_weights

PairLoss = Literal["sigmoid", "ipo", "hinge"]


def sigmoid(ops: Ops, Delta: Array, beta: float, eps: float) -> Array:
    """-(1 - eps) log sigma(beta Delta) - eps log sigma(-beta Delta).

    Rafailov et al. 2023, arXiv 2305.18290, equation 7, where eps is 0: the derivative is then -beta sigma(-beta Delta).
    With eps, the probability that a label is wrong, it is the conservative form: Mitchell 2023, A note on DPO with
    noisy preferences.
    """
    return -(1.0 - eps) * ops.log_sigmoid(beta * Delta) - eps * ops.log_sigmoid(-beta * Delta)


def ipo(ops: Ops, Delta: Array, beta: float, eps: float) -> Array:
    """(Delta - 1 / (2 beta))^2: a margin to be met and not exceeded. Azar et al. 2023, arXiv 2310.12036, equation 17,
    whose tau is beta."""
    return (Delta - 0.5 / beta) ** 2


def hinge(ops: Ops, Delta: Array, beta: float, eps: float) -> Array:
    """max(0, 1 - beta Delta): no gradient beyond the margin. Liu et al. 2023, arXiv 2309.06657, equation 9, after Zhao
    et al. 2023, arXiv 2305.10425."""
    return ops.xp.clip(1.0 - beta * Delta, 0.0, None)


PAIR_LOSSES: Mapping[PairLoss, Callable[[Ops, Array, float, float], Array]] = {
    "sigmoid": sigmoid, "ipo": ipo, "hinge": hinge}


@final
@dataclass(frozen=True, slots=True)
class DPO:
    """The mean over pairs of `loss(Delta)`, with Delta the log-ratio log pi - log ref of the preferred answer less that
    of the other, each summed over its actions.

    Reads `logprobs` [N] and, of the batch, `ref_logprobs`, `preferred`, `weight` and `kl_weight` [N], `episode`,
    `group` and `count`. Metrics are means over pairs: `preference/accuracy` (fraction with Delta > 0), `margin`
    (beta Delta), `chosen` and `rejected` (beta times the log-ratio: the implicit rewards), `chosen_logprob` and
    `rejected_logprob`, all of whole answers, or per action with `length_normalised`. Raises `ValueError` where a field
    has no meaning, or a column is missing.
    """

    loss: PairLoss = "sigmoid"
    """DPO's own, the squared distance from a margin (IPO), or the hinge (SLiC)."""
    beta: float = 0.1
    """How dear it is to leave the reference: a smaller one lets the policy go further."""
    length_normalised: bool = False
    """Log-ratios are means over an answer's actions in place of sums, so that long answers do not count more."""
    label_smoothing: float = 0.0
    """Of loss sigmoid: the probability that a preference is the wrong way round."""

    def __post_init__(self) -> None:
        require_choice("loss", self.loss, PAIR_LOSSES)
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be positive and finite, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing lies in [0, 0.5), got {self.label_smoothing}: from 0.5 on a label says "
                             "nothing, or the contrary")
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing belongs to loss: sigmoid; leave it out of {self.loss}")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REF_LOGPROBS, Need.PREFERRED})

    @property
    def outputs(self) -> frozenset[Output]:
        return frozenset({Output.LOGPROBS})

    @property
    def unit(self) -> Literal["action", "episode", "group"]:
        """Both answers of a pair in one part."""
        return "group"

    @property
    def slots(self) -> tuple[str, ...]:
        return ("main",)

    def weights(self, counts: Counts) -> Weights:
        """Those of the two answers of a pair add up to 1 / pairs."""
        weight = action_weights("sequence_mean", counts)
        return Weights(weight=weight, kl_weight=weight)

    def __call__(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Array]) -> Loss:
        xp, logprobs = ops.xp, out.logprobs
        d = logprobs - ops.stop_gradient(required(batch, "ref_logprobs"))
        chosen, rejected = _sides(ops, batch)
        if self.length_normalised:
            per_action = 1.0 / xp.astype(xp.take(batch.count, batch.episode, axis=0), logprobs.dtype)
            chosen, rejected = chosen * per_action, rejected * per_action
        good, bad = _by_pair(ops, chosen * d, batch), _by_pair(ops, rejected * d, batch)
        Delta = good - bad
        total = xp.sum(_by_pair(ops, batch.weight, batch) * PAIR_LOSSES[self.loss](
            ops, Delta, self.beta, self.label_smoothing))
        measured = {
            "accuracy": Delta > 0, "margin": self.beta * Delta, "chosen": self.beta * good,
            "rejected": self.beta * bad, "chosen_logprob": _by_pair(ops, chosen * logprobs, batch),
            "rejected_logprob": _by_pair(ops, rejected * logprobs, batch)}
        return Loss({"dpo": Term(total)}, _means_over_pairs(ops, measured, batch, batch.kl_weight))


@final
@dataclass(frozen=True, slots=True)
class BradleyTerry:
    """The mean over pairs of -log sigma(s_chosen - s_rejected), added over the k value heads: a reward model.

    The score s of an answer is the value of the state before its last action. That action is the end of the sequence,
    so a causal model read at the last token of prompt and answer gives the score.

    Reads `values` [k, N] and, of the batch, `preferred` and `value_weight` [N], `episode`, `group` and `count`. Metrics
    are means over pairs (and heads): `preference/accuracy` (fraction with s_chosen > s_rejected), `margin`, `chosen`
    and `rejected` (the scores). Raises `ValueError` where a column is missing.
    """

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.PREFERRED})

    @property
    def outputs(self) -> frozenset[Output]:
        return frozenset({Output.VALUES})

    @property
    def unit(self) -> Literal["action", "episode", "group"]:
        """Both answers of a pair in one part."""
        return "group"

    @property
    def slots(self) -> tuple[str, ...]:
        return ("main",)

    def weights(self, counts: Counts) -> Weights:
        """Those of the two answers of a pair add up to 1 / pairs."""
        return Weights(value_weight=action_weights("sequence_mean", counts))

    def __call__(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Array]) -> Loss:
        xp, values = ops.xp, required(out, "values")
        chosen, rejected = _sides(ops, batch)
        last = _is_last(ops, batch, values)
        good, bad = _by_pair(ops, chosen * last * values, batch), _by_pair(ops, rejected * last * values, batch)
        Delta = good - bad
        total = xp.sum(_by_pair(ops, batch.value_weight, batch) * -ops.log_sigmoid(Delta))
        measured = {"accuracy": Delta > 0, "margin": Delta, "chosen": good, "rejected": bad}
        return Loss({"bradley_terry": Term(total)}, _means_over_pairs(ops, measured, batch, batch.value_weight))


def _sides(ops: Ops, batch: MicroBatch) -> tuple[Array, Array]:
    """[N] 1 on actions of preferred answers, and [N] 1 on those of the others."""
    preferred = ops.stop_gradient(required(batch, "preferred"))
    return preferred, 1.0 - preferred


def _by_pair(ops: Ops, x: Array, batch: MicroBatch) -> Array:
    """[..., N] -> [..., E] sums over the actions of each pair; there are at most as many pairs as episodes, and what is
    behind the last pair is 0."""
    pair = ops.xp.take(batch.group, batch.episode, axis=0)
    return ops.segment_sum(x, pair, batch.count.shape[0])


def _is_last(ops: Ops, batch: MicroBatch, values: Array) -> Array:
    """[N] 1 on the last action of each episode."""
    xp = ops.xp
    end = xp.take(xp.cumulative_sum(batch.count), batch.episode, axis=0)
    place = xp.cumulative_sum(xp.ones_like(batch.episode))
    return xp.astype(place == end, values.dtype)


def _means_over_pairs(ops: Ops, measured: Mapping[str, Array], batch: MicroBatch,
                      weight: Array) -> dict[str, tuple[Array, Array]]:
    """`preference/<name>` -> (total, count) over the pairs whose actions weigh something."""
    xp = ops.xp
    real = xp.astype(_by_pair(ops, weight, batch) > 0, weight.dtype)
    found = {}
    for name, x in measured.items():
        x = xp.astype(ops.stop_gradient(x), weight.dtype)
        counted = xp.broadcast_to(real, x.shape)
        found[f"preference/{name}"] = (xp.sum(counted * x), xp.sum(counted))
    return found
