"""The whole loss of a learner: an objective plus KL, value and entropy terms, summed by core.

Each term keeps its own coefficient and weight. The added terms stand in the slot `shared` where gradients of several
slots are combined; with one slot they join it, since a slot of its own would cost a second backward pass for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, final

from posttrain import answers
from posttrain.batching import coarsest
from posttrain.data import Array, Counts, Loss, MicroBatch, Term, TokenOutputs, Weights
from posttrain.errors import ConfigError
from posttrain.ops import Ops
from posttrain.protocols import KL, Compared, Need, Objective, Output, OverVocabulary

__all__ = ["SHARED"]
"""What authors of backends may import; the rest is for the loop."""

SHARED = "shared"
REFERENCE_KL = "kl/reference"
"""The metric that holds the mean KL to the reference per action."""
MAX_LOG_RATIO = 20.0
"""A larger log-ratio counts as this one in `exp`: e^20 = 5e8 is far outside every clip range, and still finite in
float32 after a multiplication by an advantage."""


def k3(xp: Any, d: Array) -> Array:
    """e^d - 1 - d, never negative: KL(p || q) of actions drawn from p, d = log q - log p (Schulman 2020).

    d is clamped at `MAX_LOG_RATIO`; not below, where p is furthest above q and the gradient must go on.
    """
    d = xp.clip(d, None, MAX_LOG_RATIO)
    return xp.expm1(d) - d


def over_vocabulary(kl: KL[Any]) -> bool:
    """Whether a KL looks at all actions of a state, and so needs the reference's probabilities of all of them."""
    asked: object = kl
    return isinstance(asked, OverVocabulary) and asked.over_vocabulary


@final
@dataclass(frozen=True, slots=True)
class NoKLState:
    """A coefficient that stays 0."""

    coef: float = 0.0
    """The weight of a KL that is not there."""


@final
@dataclass(frozen=True, slots=True)
class NoKL:
    """No KL: no reference model is loaded and nothing is added."""

    @property
    def placement(self) -> Literal["none"]:
        return "none"

    @property
    def unit(self) -> Literal["action"]:
        return "action"

    def divergence(self, ops: Ops, logprobs: Array, compared: Compared) -> Array:
        return ops.xp.zeros_like(logprobs)

    def init(self) -> NoKLState:
        return NoKLState()

    def update(self, state: NoKLState, *, kl: float, n: int, **measured: float) -> NoKLState:
        return state


@final
@dataclass(frozen=True, slots=True)
class KLTerm:
    """`coef["kl"] * sum(kl_weight * divergence)`, for a KL placed in the loss.

    Metric: `kl/clamped`, the fraction of actions whose log-ratio is beyond what `exp` is given; or, of a KL over the
    whole vocabulary, which has no such, `kl/reference`, its mean.
    """

    kl: KL[Any]
    slots: tuple[str, ...] = (SHARED,)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset() if over_vocabulary(self.kl) else frozenset({Need.REF_LOGPROBS})

    @property
    def outputs(self) -> frozenset[Output]:
        return frozenset({Output.REFERENCE_KL if over_vocabulary(self.kl) else Output.LOGPROBS})

    @property
    def unit(self) -> Literal["action", "episode", "group"]:
        return self.kl.unit

    def weights(self, counts: Counts) -> Weights:
        return Weights()

    def __call__(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Array]) -> Loss:
        xp = ops.xp
        compared = Compared(batch.ref_logprobs, batch.episode, batch.count, batch.old_logprobs, out.reference_kl)
        total = xp.sum(batch.kl_weight * self.kl.divergence(ops, out.logprobs, compared))
        real = batch.kl_weight > 0
        if over_vocabulary(self.kl):
            mask = xp.astype(real, total.dtype)
            measured = {REFERENCE_KL: (xp.sum(mask * ops.stop_gradient(out.reference_kl)), xp.sum(mask))}
            return Loss({"kl": Term(total, coef["kl"], SHARED)}, measured)
        far = real & (xp.abs(batch.ref_logprobs - ops.stop_gradient(out.logprobs)) > MAX_LOG_RATIO)
        metrics = {"kl/clamped": (xp.sum(xp.astype(far, total.dtype)), xp.sum(xp.astype(real, total.dtype)))}
        return Loss({"kl": Term(total, coef["kl"], SHARED)}, metrics)


@final
@dataclass(frozen=True, slots=True)
class ExpertBalance:
    """`coef["expert_balance"] * sum(token_weight * a)`, a per token as `Output.EXPERT_LOAD` has it: 1 where each router
    and the load of its experts are uniform, up to E where all tokens go to one."""

    needs: frozenset[Need] = frozenset()
    outputs: frozenset[Output] = frozenset({Output.EXPERT_LOAD})
    unit: Literal["action", "episode", "group"] = "action"
    slots: tuple[str, ...] = (SHARED,)

    def weights(self, counts: Counts) -> Weights:
        return Weights()

    def __call__(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Array]) -> Loss:
        total = ops.xp.sum(batch.token_weight * out.aux[Output.EXPERT_LOAD])
        return Loss({"expert_balance": Term(total, coef["expert_balance"], SHARED)})


@final
@dataclass(frozen=True, slots=True)
class Measured:
    """No loss: the entropy of the policy and its KL to the reference, as sums over actions."""

    reference: bool = False
    needs: frozenset[Need] = frozenset()
    outputs: frozenset[Output] = frozenset({Output.LOGPROBS, Output.ENTROPY})
    unit: Literal["action", "episode", "group"] = "action"
    slots: tuple[str, ...] = (SHARED,)

    def weights(self, counts: Counts) -> Weights:
        return Weights()

    def __call__(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Array]) -> Loss:
        xp = ops.xp
        # kl_weight is positive exactly on real actions: bucket padding of a backend must not count
        real = xp.astype(batch.kl_weight > 0, out.logprobs.dtype)
        n = xp.sum(real)
        metrics = {"policy/entropy": (ops.stop_gradient(xp.sum(real * out.entropy)), n)}
        if self.reference:
            d = batch.ref_logprobs - ops.stop_gradient(out.logprobs)
            metrics[REFERENCE_KL] = (xp.sum(real * k3(xp, d)), n)
        return Loss({}, metrics)


@final
@dataclass(frozen=True, slots=True)
class Sum:
    """The sum of objectives; the first one is the policy's (or the critic's), the others are added to it."""

    parts: tuple[Objective, ...]

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset().union(*(part.needs for part in self.parts))

    @property
    def outputs(self) -> frozenset[Output]:
        return frozenset().union(*(part.outputs for part in self.parts))

    @property
    def unit(self) -> Literal["action", "episode", "group"]:
        return coarsest(part.unit for part in self.parts)

    @property
    def slots(self) -> tuple[str, ...]:
        return self.parts[0].slots

    def weights(self, counts: Counts) -> Weights:
        """The columns of all parts; where two fill one, the earlier part's holds. KL and entropy are weighed as the
        part's own terms where it says nothing else."""
        found = [w if w.kl_weight is not None else replace(w, kl_weight=w.weight)
                 for w in (part.weights(counts) for part in self.parts)]
        def first(name: str) -> Any:
            return next((x for w in found if (x := getattr(w, name)) is not None), None)
        return Weights(*(first(name) for name in ("weight", "kl_weight", "value_weight")))

    def __call__(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Array]) -> Loss:
        own = _loss_of(self.parts[0], ops, out, batch, coef)
        terms, metrics = dict(own.terms), dict(own.metrics)
        slot = SHARED if len(self.slots) > 1 else self.slots[0]
        for part in self.parts[1:]:
            added = _loss_of(part, ops, out, batch, coef)
            if twice := sorted((terms.keys() & added.terms.keys()) | (metrics.keys() & added.metrics.keys())):
                raise ConfigError([f"two parts of the loss have a term or metric called '{name}'; an objective beside "
                                   "which core adds its own must call its own otherwise" for name in twice])
            terms.update({name: replace(term, slot=slot) for name, term in added.terms.items()})
            metrics.update(added.metrics)
        return Loss(terms, metrics)


def _loss_of(part: Objective, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Array]) -> Loss:
    """The loss of one part. Raises `PluginError` for one that is none, or that reads what it does not declare."""
    who = f"objective {type(part).__name__}"
    return answers.loss(who, answers.asked(who, part, (ops, out, batch, coef), "needs and outputs", out, batch))
