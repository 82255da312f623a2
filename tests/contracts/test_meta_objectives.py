"""The contracts of objectives, KL and kernels catch wrong ones: a bug each, and the test that must find it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import numpy as np
import pytest
from posttrain.data import Array, Counts, Loss, MicroBatch, Term, TokenOutputs, Weights
from posttrain.hookspecs import Component, hookimpl
from posttrain.ops import Ops
from posttrain.protocols import Compared, Need, Output
from posttrain.testing import ComponentContract, KernelContract, KLContract, ObjectiveContract, failures


def log_ratio(ops: Ops, out: TokenOutputs, batch: MicroBatch) -> Array:
    old = ops.stop_gradient(out.logprobs if batch.old_logprobs is None else batch.old_logprobs)
    return ops.xp.clip(out.logprobs - old, -20.0, 20.0)


def advantages(ops: Ops, batch: MicroBatch) -> Array:
    if batch.advantages is None:
        raise ValueError("MicroBatch.advantages is missing")
    return ops.stop_gradient(batch.advantages)


def mean(ops: Ops, x: Array, batch: MicroBatch) -> tuple[Array, Array]:
    real = ops.xp.astype(batch.weight > 0, x.dtype)
    return ops.xp.sum(real * ops.stop_gradient(x)), ops.xp.sum(real)


def clipped_loss(ops: Ops, r: Array, A: Array) -> Array:
    return -ops.xp.minimum(r * A, ops.xp.clip(r, 0.8, 1.2) * A)


@final
@dataclass(frozen=True)
class Right:
    """PPO's clip at 0.2, mean over actions; keeps the contract."""

    slots: tuple[str, ...] = ("main",)
    """One per reward column."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.ADVANTAGES})

    @property
    def outputs(self) -> frozenset[Output]:
        return frozenset({Output.LOGPROBS})

    @property
    def unit(self) -> Literal["action", "episode", "group"]:
        return "action"

    def weights(self, counts: Counts) -> Weights:
        weight = np.full(int(counts.episode_actions.sum()), 1.0 / max(counts.actions, 1))
        return Weights(weight=weight, kl_weight=weight)

    def __call__(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Array]) -> Loss:
        A = ops.xp.reshape(advantages(ops, batch), (len(self.slots), out.logprobs.shape[0]))
        r = ops.xp.exp(log_ratio(ops, out, batch))
        loss = clipped_loss(ops, r, A)
        return Loss({f"policy/{slot}": Term(ops.xp.sum(batch.weight * loss[j]), slot=slot)
                     for j, slot in enumerate(self.slots)}, {"ratio": mean(ops, r, batch)})


@final
@dataclass(frozen=True)
class State:
    """A coefficient."""

    coef: float
    """beta"""


@final
@dataclass(frozen=True)
class RightKL:
    """k2 in the loss, with a coefficient that follows the KL; keeps the contract."""

    target: float = 0.1
    """KL to be held."""

    @property
    def placement(self) -> Literal["loss"]:
        return "loss"

    @property
    def unit(self) -> Literal["action"]:
        return "action"

    def divergence(self, ops: Ops, logprobs: Array, compared: Compared) -> Array:
        return 0.5 * (logprobs - compared.ref_logprobs) ** 2

    def init(self) -> State:
        return State(0.1)

    def update(self, state: State, *, kl: float, n: int, **measured: float) -> State:
        if not math.isfinite(kl):
            return state
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        return State(min(max(state.coef * (1.0 + 0.1 * error), 1e-6), 100.0))


@final
@dataclass(frozen=True)
class RightKernel:
    """Segment sums of NumPy columns; keeps the contract."""

    framework: Literal["numpy"] = "numpy"
    """Whose arrays it takes."""

    @property
    def op(self) -> str:
        return "segment_sum"

    @property
    def device(self) -> str:
        return "cpu"

    def supports(self, *args: Array) -> bool:
        return args[0].ndim == 1 and args[0].dtype in (np.float32, np.float64)

    def __call__(self, *args: Array) -> Array:
        x, ids, n = args
        sums = np.zeros(n, x.dtype)
        np.add.at(sums, ids, x)
        return sums


@hookimpl
def components() -> Iterable[Component]:
    """This module is a plugin that declares what is right in it."""
    return [Component("objective", "right", f"{__name__}:Right", "PPO"),
            Component("kl", "right", f"{__name__}:RightKL", "k2"),
            Component("kernel", "right", f"{__name__}:RightKernel", "segment sums")]


class Contract(ObjectiveContract):
    """The right objective's formula."""

    plugins = (sys.modules[__name__],)

    def oracle(self, component: Any, out: TokenOutputs, held: TokenOutputs, batch: MicroBatch,
               coef: Mapping[str, float]) -> float:
        old = held.logprobs if batch.old_logprobs is None else batch.old_logprobs
        total = 0.0
        for x, mu, A, w in zip(out.logprobs, old, batch.advantages, batch.weight, strict=True):
            r = math.exp(x - mu)
            total -= w * min(r * A, min(max(r, 0.8), 1.2) * A)
        return total

    def average(self, component: Any, column: str, rows: list[list[float]]) -> float:
        return sum(x for row in rows for x in row) / sum(len(row) for row in rows)

    def clipped(self, component: Any, out: TokenOutputs, batch: MicroBatch) -> list[bool]:
        r = np.exp(out.logprobs - batch.old_logprobs)
        return [bool(x > 1.2 if A > 0 else x < 0.8) for x, A in zip(r, batch.advantages, strict=True)]


class TestRight(Contract):
    components = (Right(),)


class KLOfRight(KLContract):
    plugins = (sys.modules[__name__],)
    unbiased = False
    non_negative = True

    def oracle(self, component: Any, logprob: float, ref_logprob: float) -> float:
        return (logprob - ref_logprob) ** 2 / 2

    def target(self, component: Any) -> float:
        return 0.1


class TestRightKL(KLOfRight):
    components = (RightKL(),)


class KLOnASchedule(KLOfRight):
    """A coefficient of 0.1 (k + 1)."""

    def target(self, component: Any) -> None: ...

    def schedule(self, component: Any, k: int) -> float:
        return 0.1 * (k + 1)


class KLByEntropy(KLOfRight):
    """A coefficient that is 0.2 where the entropy is low, and 0.1 where it is high."""

    def target(self, component: Any) -> None: ...

    def driven(self, component: Any) -> tuple[Mapping[str, float], Mapping[str, float]]:
        return {"entropy": 0.1}, {"entropy": 2.0}


class KernelOfRight(KernelContract):
    plugins = (sys.modules[__name__],)


class TestRightKernel(KernelOfRight):
    components = (RightKernel(),)


# ---- objectives that are wrong


class Wrong:
    """Everything of `Right` but one thing."""

    needs: ClassVar[Any] = frozenset({Need.ADVANTAGES})
    outputs: ClassVar[Any] = frozenset({Output.LOGPROBS})
    unit: ClassVar[str] = "action"
    slots: ClassVar[tuple[str, ...]] = ("main",)

    def weights(self, counts: Counts) -> Weights:
        return Right().weights(counts)

    def __call__(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Array]) -> Loss:
        return self.changed(ops, out, batch, ops.xp.exp(log_ratio(ops, out, batch)), advantages(ops, batch))

    def changed(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, r: Array, A: Array) -> Loss:
        return self.summed(ops, batch, self.loss(ops, out, batch, r, A), r)

    def loss(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, r: Array, A: Array) -> Array:
        return clipped_loss(ops, r, A)

    def summed(self, ops: Ops, batch: MicroBatch, loss: Array, r: Array) -> Loss:
        return Loss({"policy": Term(ops.xp.sum(batch.weight * loss))}, {"ratio": mean(ops, r, batch)})


def wrong(name: str, base: type = Wrong, **members: Any) -> Any:
    """A final frozen dataclass like `base` but for the given members."""
    made = type(name, (base,), {"__doc__": f"Wrong in one thing: {name}.", "__module__": __name__, **members})
    return final(dataclass(frozen=True)(made))()


def no_stop_of_old(self: Any, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Any) -> Loss:
    old = out.logprobs if batch.old_logprobs is None else ops.stop_gradient(batch.old_logprobs)
    r = ops.xp.exp(ops.xp.clip(out.logprobs - old, -20.0, 20.0))
    return Wrong().changed(ops, out, batch, r, advantages(ops, batch))


def unclamped(self: Any, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Any) -> Loss:
    old = out.logprobs if batch.old_logprobs is None else batch.old_logprobs
    r = ops.xp.exp(10.0 * (out.logprobs - ops.stop_gradient(old)))
    return Wrong().changed(ops, out, batch, r, advantages(ops, batch))


def attached_advantages(self: Any, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Any) -> Loss:
    advantages(ops, batch)
    return Wrong().changed(ops, out, batch, ops.xp.exp(log_ratio(ops, out, batch)), batch.advantages)


def mean_of_means(self: Any, ops: Ops, batch: MicroBatch, loss: Array, r: Array) -> Loss:
    return Loss({"policy": Term(ops.xp.sum(batch.weight * loss) / ops.xp.sum(batch.weight))})


def plain_mean(self: Any, ops: Ops, batch: MicroBatch, loss: Array, r: Array) -> Loss:
    return Loss({"policy": Term(ops.xp.mean(loss) + 0.0 * ops.xp.sum(batch.weight))})


def with_metric(metric: Callable[[Ops, MicroBatch, Array], Any]) -> Callable[..., Loss]:
    def summed(self: Any, ops: Ops, batch: MicroBatch, loss: Array, r: Array) -> Loss:
        return Loss({"policy": Term(ops.xp.sum(batch.weight * loss))}, {"ratio": metric(ops, batch, r)})
    return summed


def whitened(self: Any, ops: Ops, out: TokenOutputs, batch: MicroBatch, r: Array, A: Array) -> Array:
    return clipped_loss(ops, r, A - ops.xp.mean(A))


def soft_clip(self: Any, ops: Ops, out: TokenOutputs, batch: MicroBatch, r: Array, A: Array) -> Array:
    return clipped_loss(ops, r, A) - 1e-9 * r * A


def with_entropy(self: Any, ops: Ops, out: TokenOutputs, batch: MicroBatch, r: Array, A: Array) -> Array:
    return clipped_loss(ops, r, A) - 0.01 * out.entropy


def in_double(self: Any, ops: Ops, out: TokenOutputs, batch: MicroBatch, r: Array, A: Array) -> Array:
    return ops.xp.astype(clipped_loss(ops, r, A), ops.xp.float64)


def in_place(self: Any, ops: Ops, out: TokenOutputs, batch: MicroBatch, r: Array, A: Array) -> Array:
    if isinstance(batch.advantages, np.ndarray):
        batch.advantages[...] *= 1.5
    return clipped_loss(ops, r, A)


def on_the_host(self: Any, ops: Ops, out: TokenOutputs, batch: MicroBatch, r: Array, A: Array) -> Array:
    return clipped_loss(ops, r, A) if bool(ops.xp.any(ops.xp.abs(r) > 0)) else r


def of_frozen_ratio(self: Any, ops: Ops, out: TokenOutputs, batch: MicroBatch, r: Array, A: Array) -> Array:
    return clipped_loss(ops, ops.stop_gradient(r), A)


def upper_clip_alone(self: Any, ops: Ops, out: TokenOutputs, batch: MicroBatch, r: Array, A: Array) -> Array:
    return -ops.xp.clip(r, 0.8, 1.2) * A


def unnamed_advantages(self: Any, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Any) -> Loss:
    return Wrong().changed(ops, out, batch, ops.xp.exp(log_ratio(ops, out, batch)), ops.stop_gradient(batch.advantages))


def of_this_rank(self: Any, counts: Counts) -> Weights:
    n = int(counts.episode_actions.sum())
    return Weights(weight=np.full(n, 1.0 / max(n, 1)), kl_weight=np.full(n, 1.0 / max(n, 1)))


def mean_over_episodes(self: Any, counts: Counts) -> Weights:
    n = counts.episode_actions
    weight = np.repeat(1.0 / (max(counts.episodes, 1) * np.maximum(n, 1)), n)
    return Weights(weight=weight, kl_weight=weight)


def per_episode(self: Any, counts: Counts) -> Weights:
    weight = np.full(len(counts.episode_actions), 1.0 / max(counts.actions, 1))
    return Weights(weight=weight, kl_weight=weight)


@final
@dataclass(frozen=True)
class OneSlot(Wrong):
    """Wrong in one thing: it takes slots and gives its first one all terms."""

    slots: tuple[str, ...] = ("main",)  # type: ignore[misc]  # a class variable of the base
    """One per reward column."""

    def changed(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, r: Array, A: Array) -> Loss:
        A = ops.xp.reshape(A, (len(self.slots), out.logprobs.shape[0]))
        loss = ops.xp.sum(clipped_loss(ops, r, A), axis=0)
        return Loss({"policy": Term(ops.xp.sum(batch.weight * loss), slot=self.slots[0])})


OBJECTIVES_CAUGHT: list[tuple[Any, str]] = [
    # RL2's and many peers' first gradient: a clip on both sides, whatever the sign of the advantage
    (wrong("UpperClipAlone", loss=upper_clip_alone), "test_equals_its_oracle"),
    (wrong("FrozenRatio", loss=of_frozen_ratio), "test_gradient_is_that_of_its_oracle"),
    (wrong("SoftClip", loss=soft_clip), "test_gradient_is_zero_where_it_clips"),
    # trl/issues/2617, ms-swift/issues/10117, verl/issues/7110: a mean in each part
    (wrong("MeanOfMeans", summed=mean_of_means), "test_any_split_gives_the_same"),
    (wrong("MeanOfMeans", summed=mean_of_means), "test_does_not_average_by_itself"),
    (wrong("PlainMean", summed=plain_mean), "test_actions_without_weight_change_nothing"),
    (wrong("WhitensByPart", loss=whitened), "test_any_split_gives_the_same"),
    # RL2, issue 11: counts of one rank
    (wrong("LocalCounts", weights=of_this_rank), "test_ranks_add_up"),
    (wrong("OtherDenominator", weights=mean_over_episodes), "test_weights_average_as_said"),
    (wrong("PerEpisode", weights=per_episode), "test_weights_are_one_number_per_kept_action"),
    (wrong("PaddingInMetrics", summed=with_metric(lambda ops, b, r: (
        ops.xp.sum(ops.stop_gradient(r)), ops.xp.sum(ops.xp.ones_like(r))))),
     "test_actions_without_weight_change_nothing"),
    (wrong("MetricIsAMean", summed=with_metric(lambda ops, b, r: (
        mean(ops, r, b)[0] / mean(ops, r, b)[1], ops.xp.sum(ops.stop_gradient(b.weight)) * 0.0 + 1.0))),
     "test_any_split_gives_the_same"),
    (wrong("MetricIsANumber", summed=with_metric(lambda ops, b, r: ops.xp.sum(ops.stop_gradient(r)))),
     "test_metrics_are_totals_with_weights"),
    (wrong("AttachedMetric", summed=with_metric(lambda ops, b, r: (
        ops.xp.sum(ops.xp.astype(b.weight > 0, r.dtype) * r), mean(ops, r, b)[1]))),
     "test_metrics_are_totals_with_weights"),
    # trl/pull/6637: log-ratios of ±100
    (wrong("Unclamped", __call__=unclamped), "test_survives_extreme_log_ratios"),
    (wrong("InDouble", loss=in_double), "test_float32_stays_float32"),
    (wrong("AttachedAdvantages", __call__=attached_advantages), "test_data_carries_no_gradient"),
    (wrong("UnnamedEntropy", loss=with_entropy), "test_reads_what_it_names_and_nothing_else"),
    (wrong("UnnamedAdvantages", needs=frozenset(), __call__=unnamed_advantages),
     "test_reads_what_it_names_and_nothing_else"),
    (wrong("NamesTooMuch", needs=frozenset({Need.ADVANTAGES, Need.REF_LOGPROBS})),
     "test_reads_what_it_names_and_nothing_else"),
    (wrong("OldNotStopped", __call__=no_stop_of_old), "test_without_old_columns_nothing_has_moved"),
    (OneSlot(), "test_slots_are_those_given"),
    (wrong("OnTheHost", loss=on_the_host), "test_may_be_a_static_argument"),
    (wrong("InPlace", loss=in_place), "test_is_pure"),
]


# ---- KL components that are wrong


class WrongKL:
    """Everything of `RightKL` but one thing."""

    placement: ClassVar[str] = "loss"
    unit: ClassVar[str] = "action"

    def divergence(self, ops: Ops, logprobs: Array, compared: Compared) -> Array:
        return RightKL().divergence(ops, logprobs, compared)

    def init(self) -> Any:
        return State(0.1)

    def update(self, state: Any, *, kl: float, n: int, **measured: float) -> Any:
        return RightKL().update(state, kl=kl, n=n)


def wrong_kl(name: str, **members: Any) -> Any:
    return wrong(name, WrongKL, **members)


def clamped(self: Any, ops: Ops, logprobs: Array, compared: Compared) -> Array:
    return 0.5 * ops.xp.clip(logprobs - compared.ref_logprobs, -20.0, 20.0) ** 2


def overflowing(self: Any, ops: Ops, logprobs: Array, compared: Compared) -> Array:
    d = compared.ref_logprobs - logprobs
    return 0.5 * d**2 + 0.0 * ops.xp.exp(d)


def no_gradient(self: Any, ops: Ops, logprobs: Array, compared: Compared) -> Array:
    return 0.5 * ops.stop_gradient(logprobs - compared.ref_logprobs) ** 2 + 0.0 * logprobs


def k1(self: Any, ops: Ops, logprobs: Array, compared: Compared) -> Array:
    return logprobs - compared.ref_logprobs


def summed_over_episodes(self: Any, ops: Ops, logprobs: Array, compared: Compared) -> Array:
    d = logprobs - compared.ref_logprobs
    whole = ops.segment_sum(d, compared.episode, compared.count.shape[0]) / compared.count
    return 0.5 * ops.xp.take(whole, compared.episode, axis=0) ** 2


def half_weighed(self: Any, ops: Ops, logprobs: Array, compared: Compared) -> Array:
    found = RightKL().divergence(ops, logprobs, compared)
    return found if compared.old_logprobs is None else 0.5 * found


def upside_down(self: Any, state: State, *, kl: float, n: int, **measured: float) -> State:
    error = min(max(1.0 - kl / 0.1, -0.2), 0.2) if math.isfinite(kl) else 0.0
    return State(min(max(state.coef * (1.0 + 0.1 * error), 1e-6), 100.0))


def unbounded(self: Any, state: State, *, kl: float, n: int, **measured: float) -> State:
    return State(state.coef * (kl / 0.1) ** 0.5 if math.isfinite(kl) and kl > 0 else state.coef * 0.5)


def takes_nan(self: Any, state: State, *, kl: float, n: int, **measured: float) -> State:
    return State(state.coef * (1.0 + 0.1 * float(np.clip(kl / 0.1 - 1.0, -0.2, 0.2))))


def deaf(self: Any, state: State, *, kl: float, n: int) -> State:
    return RightKL().update(state, kl=kl, n=n)


REMEMBERED = [0.1]


def remembering(self: Any, state: State, *, kl: float, n: int, **measured: float) -> State:
    REMEMBERED[0] = RightKL().update(State(REMEMBERED[0]), kl=kl, n=n).coef
    return State(REMEMBERED[0])


@final
@dataclass(frozen=True)
class Forgetful:
    """A state with a part that no checkpoint holds."""

    coef: float = 0.1
    """beta"""
    history: tuple[float, ...] = ()
    """KLs; a tuple becomes a list in JSON."""


def late(self: Any, state: State, *, kl: float, n: int, **measured: float) -> State:
    return State(state.coef + 0.1 + 1e-6) if math.isfinite(kl) else state


def other_way(self: Any, state: State, *, kl: float, n: int, entropy: float = math.nan, **measured: float) -> State:
    return state if math.isnan(entropy) else State(0.1 if entropy < 1 else 0.2)


def keeping_history(self: Any, state: Forgetful, *, kl: float, n: int, **measured: float) -> Forgetful:
    return Forgetful(RightKL().update(State(state.coef), kl=kl, n=n).coef, (*state.history[-3:], kl))


KLS_CAUGHT: list[tuple[Any, str]] = [
    (wrong_kl("K1", divergence=k1), "test_equals_its_oracle"),
    (wrong_kl("K1InTheLoss", divergence=k1), "test_has_the_gradient_that_it_claims"),
    (wrong_kl("K1IsNegative", divergence=k1), "test_is_what_it_claims"),
    (wrong_kl("Stopped", divergence=no_gradient), "test_has_the_gradient_that_it_claims"),
    (wrong_kl("K2InTheReward", placement="reward"), "test_has_the_gradient_that_it_claims"),
    (wrong_kl("UnitTooSmall", divergence=summed_over_episodes), "test_unit_is_what_it_needs_whole"),
    (wrong_kl("OtherWithOldLogprobs", divergence=half_weighed), "test_no_old_logprobs_mean_the_policy_itself"),
    # trl/pull/6637
    (wrong_kl("Clamped", divergence=clamped), "test_survives_extreme_log_ratios"),
    (wrong_kl("Overflowing", divergence=overflowing), "test_survives_extreme_log_ratios"),
    (wrong_kl("NegativeStart", init=lambda self: State(-0.1)), "test_begins_with_a_usable_coefficient"),
    (wrong_kl("NoneAddsSomething", placement="none"), "test_begins_with_a_usable_coefficient"),
    (wrong_kl("UpsideDown", update=upside_down), "test_moves_the_coefficient_the_right_way"),
    (wrong_kl("Unbounded", update=unbounded), "test_stays_bounded"),
    (wrong_kl("TakesNaN", update=takes_nan), "test_refuses_what_was_not_measured"),
    # verl/issues/2653
    (wrong_kl("NotSaved", init=lambda self: Forgetful(), update=keeping_history), "test_state_survives_a_checkpoint"),
    (wrong_kl("Remembering", update=remembering), "test_is_pure"),
    (wrong_kl("Deaf", update=deaf), "test_accepts_what_else_is_measured"),
]


# ---- kernels that are wrong


class WrongKernel:
    """Everything of `RightKernel` but one thing."""

    op: ClassVar[str] = "segment_sum"
    framework: ClassVar[str] = "numpy"
    device: ClassVar[str] = "cpu"

    def supports(self, *args: Array) -> bool:
        return RightKernel().supports(*args)

    def __call__(self, *args: Array) -> Array:
        return RightKernel()(*args)


def wrong_kernel(name: str, **members: Any) -> Any:
    return wrong(name, WrongKernel, **members)


def whole_blocks(self: Any, x: np.ndarray, ids: np.ndarray, n: int) -> np.ndarray:
    whole = max(len(x) // 4 * 4, min(len(x), 4))
    return RightKernel()(x[:whole], ids[:whole], n)


def in_half(self: Any, x: np.ndarray, ids: np.ndarray, n: int) -> np.ndarray:
    return RightKernel()(x.astype(np.float32), ids, n).astype(x.dtype)


def scratching(self: Any, x: np.ndarray, ids: np.ndarray, n: int) -> np.ndarray:
    sums = RightKernel()(x, ids, n)
    x[...] = 0.0
    return sums


def raising(self: Any, x: np.ndarray, ids: np.ndarray, n: int) -> bool:
    if x.dtype == np.float64:
        raise TypeError("float64")
    return x.ndim == 1


def hiding(self: Any, x: np.ndarray, ids: np.ndarray, n: int) -> np.ndarray:
    return RightKernel()(np.nan_to_num(x), ids, n)


def buffer(self: Any, x: np.ndarray, ids: np.ndarray, n: int) -> np.ndarray:
    base = x if x.base is None else x.base
    return RightKernel()(base.reshape(-1)[:len(x)], ids, n)


KERNELS_CAUGHT: list[tuple[Any, str]] = [
    (wrong_kernel("WholeBlocks", __call__=whole_blocks), "test_equals_the_reference"),
    (wrong_kernel("InHalf", __call__=in_half), "test_equals_the_reference"),
    (wrong_kernel("IgnoresStrides", __call__=buffer), "test_equals_the_reference"),
    (wrong_kernel("WholeBlocks", __call__=whole_blocks), "test_core_computes_the_same_with_it"),
    (wrong_kernel("NeverUsed", supports=lambda self, *args: False), "test_equals_the_reference"),
    (wrong_kernel("SupportsAll", supports=lambda self, *args: True), "test_says_what_it_does_not_support"),
    (wrong_kernel("Raising", supports=raising), "test_says_what_it_does_not_support"),
    (wrong_kernel("Scratching", __call__=scratching), "test_changes_no_input"),
    (wrong_kernel("Hiding", __call__=hiding), "test_shows_what_is_not_finite"),
    (wrong_kernel("OtherOp", op="segment_max"), "test_names_an_op_that_there_is"),
]


CAUGHT: list[tuple[type[ComponentContract], Any, str]] = [
    *((Contract, component, test) for component, test in OBJECTIVES_CAUGHT),
    *((KLOfRight, component, test) for component, test in KLS_CAUGHT),
    (KLOnASchedule, wrong_kl("Late", update=late), "test_follows_its_schedule"),
    (KLByEntropy, wrong_kl("OtherWay", update=other_way), "test_is_driven_by_what_its_author_names"),
    *((KernelOfRight, component, test) for component, test in KERNELS_CAUGHT)]
SEEN_IN_GRADIENTS = {"AttachedMetric", "OldNotStopped", "Clamped"}
"""Wrong in what is differentiated alone, by tests that measure more than gradients."""


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # some of these divide by zero, on purpose
@pytest.mark.parametrize(("contract", "component", "test"), CAUGHT,
                         ids=[f"{type(component).__name__}-{test}" for _, component, test in CAUGHT])
def test_a_wrong_component_is_caught(contract: type[ComponentContract], component: Any, test: str) -> None:
    if type(component).__name__ in SEEN_IN_GRADIENTS:
        pytest.importorskip("torch")
    found = dict(failures(contract, component, only=test))
    assert test in found, f"{type(component).__name__} passes {test}"
    assert found[test].startswith(("AssertionError", "Failed")), found[test]


@pytest.mark.parametrize("contract", [TestRight, TestRightKL, TestRightKernel])
def test_what_is_right_has_no_failures(contract: type[ComponentContract]) -> None:
    assert not list(failures(contract))


def test_what_an_author_must_write_is_asked_for() -> None:
    for contract, component, test, named in (
            (ObjectiveContract, Right(), "test_equals_its_oracle", "def oracle"),
            (ObjectiveContract, Right(), "test_weights_average_as_said", "def average"),
            (KLContract, RightKL(), "test_equals_its_oracle", "def oracle")):
        assert named in dict(failures(contract, component, only=test))[test]


def test_a_claim_that_is_too_narrow_is_caught() -> None:
    tried = type("Tried", (KLOfRight,), {"components": (RightKL(),), "non_negative": False})
    assert dict(failures(tried, only="test_is_what_it_claims"))
    tried = type("Tried", (Contract,), {"components": (Right(),), "clipped": lambda self, c, out, batch:
                                        [False] * len(out.logprobs)})
    assert dict(failures(tried, only="test_gradient_is_zero_where_it_clips"))


def test_an_objective_that_compares_answers_names_its_group() -> None:
    """The same objective by another unit: what it promises is what is tested."""
    assert not dict(failures(PairContract, Pairs(), only="test_any_split_gives_the_same"))
    assert dict(failures(PairContract, wrong("ByEpisode", PairsByEpisode), only="test_any_split_gives_the_same"))


class PairsByEpisode:
    """-log sigmoid of the difference of the two answers' log-probs, weighted by the better one's first action."""

    needs: ClassVar[Any] = frozenset({Need.ADVANTAGES})
    outputs: ClassVar[Any] = frozenset({Output.LOGPROBS})
    unit: ClassVar[str] = "episode"
    slots: ClassVar[tuple[str, ...]] = ("main",)

    def weights(self, counts: Counts) -> Weights:
        return Right().weights(counts)

    def __call__(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Array]) -> Loss:
        sign = ops.xp.where(advantages(ops, batch) > 0, 1.0, -1.0)
        of_group = ops.xp.take(batch.group, batch.episode, axis=0)
        margin = ops.segment_sum(sign * out.logprobs, of_group, batch.group.shape[0])
        return Loss({"pairs": Term(-ops.xp.sum(batch.weight * ops.log_sigmoid(ops.xp.take(margin, of_group, axis=0))))})


@final
@dataclass(frozen=True)
class Pairs(PairsByEpisode):
    """The same, kept together by group."""

    unit: ClassVar[str] = "group"


class PairContract(Contract):
    group_size = 2
