"""The objectives and KL components here, core's `kl: none` among them, keep the contracts of their kinds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from posttrain.data import MicroBatch, TokenOutputs
from posttrain.loss import NoKL
from posttrain.testing import KLContract, ObjectiveContract
from posttrain_objectives.entropy import Entropy
from posttrain_objectives.kl import AdaptiveKL, FixedKL
from posttrain_objectives.likelihood import SFT
from posttrain_objectives.policy_gradient import PolicyGradient
from posttrain_objectives.value import ActionValue, Value


def averaged(denominator: str, rows: list[list[float]], length: int = 0) -> float:
    """Literal averages; an episode without an action does not count."""
    alive = [row for row in rows if row]
    if denominator == "token_mean":
        return sum(x for row in alive for x in row) / sum(len(row) for row in alive)
    if denominator == "sequence_mean":
        return sum(sum(row) / len(row) for row in alive) / len(alive)
    return sum(x for row in alive for x in row) / (len(alive) * length)


def ratios(p: PolicyGradient, out: TokenOutputs, held: TokenOutputs, batch: MicroBatch) -> list[float]:
    """Of each action; the token form of GSPO takes the episode's mean as it stands."""
    old = held.logprobs if batch.old_logprobs is None else batch.old_logprobs
    if p.ratio == "token":
        return [math.exp(out.logprobs[n] - old[n]) for n in range(len(old))]
    found = []
    for n in range(len(old)):
        same = [i for i in range(len(old)) if batch.episode[i] == batch.episode[n]]
        s = math.exp(sum(held.logprobs[i] - old[i] for i in same) / len(same))
        found.append(s * math.exp(out.logprobs[n] - held.logprobs[n]))
    return found


class TestPolicyGradient(ObjectiveContract):
    components = (
        PolicyGradient(), PolicyGradient(denominator="sequence_mean"), PolicyGradient(clip_high=0.28),
        PolicyGradient(denominator="constant", length=7), PolicyGradient(dual_clip=1.3),
        PolicyGradient(ratio="sequence", clip_low=0.1, clip_high=0.12, denominator="sequence_mean"))

    def oracle(self, component: PolicyGradient, out: TokenOutputs, held: TokenOutputs, batch: MicroBatch,
               coef: Mapping[str, float]) -> float:
        """Schulman et al. 2017, section 3; dual clipping: Ye et al. 2019."""
        total = 0.0
        for n, r in enumerate(ratios(component, out, held, batch)):
            A = batch.advantages[n]
            loss = -min(r * A, min(max(r, 1 - component.clip_low), 1 + component.clip_high) * A)
            if component.dual_clip and A < 0:
                loss = min(loss, -component.dual_clip * A)
            total += batch.weight[n] * loss
        return total

    def average(self, component: PolicyGradient, column: str, rows: list[list[float]]) -> float:
        return averaged(component.denominator, rows, component.length)

    def clipped(self, component: PolicyGradient, out: TokenOutputs, batch: MicroBatch) -> Sequence[bool]:
        bound = component.dual_clip or math.inf
        return [r > 1 + component.clip_high if A > 0 else r < 1 - component.clip_low or r > bound
                for r, A in zip(ratios(component, out, out, batch), batch.advantages)]


class TestReinforce(ObjectiveContract):
    components = (PolicyGradient(surrogate="reinforce"),
                  PolicyGradient(surrogate="reinforce", denominator="sequence_mean"))

    def oracle(self, component: PolicyGradient, out: TokenOutputs, held: TokenOutputs, batch: MicroBatch,
               coef: Mapping[str, float]) -> float:
        return sum(-w * A * x for w, A, x in zip(batch.weight, batch.advantages, out.logprobs))

    def average(self, component: PolicyGradient, column: str, rows: list[list[float]]) -> float:
        return averaged(component.denominator, rows)


class TestSFT(ObjectiveContract):
    components = (SFT(), SFT(denominator="sequence_mean"))

    def oracle(self, component: SFT, out: TokenOutputs, held: TokenOutputs, batch: MicroBatch,
               coef: Mapping[str, float]) -> float:
        return sum(-w * x for w, x in zip(batch.weight, out.logprobs))

    def average(self, component: SFT, column: str, rows: list[list[float]]) -> float:
        return averaged(component.denominator, rows)


class TestValue(ObjectiveContract):
    components = (Value(), Value(clip=0.3), Value(clip=0.3, denominator="sequence_mean"))

    def oracle(self, component: Value, out: TokenOutputs, held: TokenOutputs, batch: MicroBatch,
               coef: Mapping[str, float]) -> float:
        """Schulman et al. 2017, section 6, halved."""
        total = 0.0
        for j in range(len(out.values)):
            for n, w in enumerate(batch.value_weight):
                v, G = out.values[j][n], batch.targets[j][n]
                loss = (v - G) ** 2
                if component.clip:
                    old = (held.values if batch.old_values is None else batch.old_values)[j][n]
                    loss = max(loss, (min(max(v, old - component.clip), old + component.clip) - G) ** 2)
                total += w * loss / 2
        return coef["value"] * total

    def average(self, component: Value, column: str, rows: list[list[float]]) -> float:
        return averaged(component.denominator, rows)


class TestActionValue(ObjectiveContract):
    components = (ActionValue(), ActionValue(denominator="sequence_mean"))

    def oracle(self, component: ActionValue, out: TokenOutputs, held: TokenOutputs, batch: MicroBatch,
               coef: Mapping[str, float]) -> float:
        """Half the squared error of Q(s, a)."""
        return coef["value"] * sum(w * (Q[n] - G[n]) ** 2 / 2 for Q, G in zip(out.action_values, batch.targets)
                                   for n, w in enumerate(batch.value_weight))

    def average(self, component: ActionValue, column: str, rows: list[list[float]]) -> float:
        return averaged(component.denominator, rows)


class TestEntropy(ObjectiveContract):
    components = (Entropy(),)

    def oracle(self, component: Entropy, out: TokenOutputs, held: TokenOutputs, batch: MicroBatch,
               coef: Mapping[str, float]) -> float:
        return -coef["entropy"] * sum(w * h for w, h in zip(batch.kl_weight, out.entropy))

    def average(self, component: Entropy, column: str, rows: list[list[float]]) -> float:
        return averaged("token_mean", rows)


class TestNoKL(KLContract):
    components = (NoKL(),)

    def oracle(self, component: NoKL, logprob: float, ref_logprob: float) -> float:
        return 0.0


class OfControllers(KLContract):
    """What the two controllers share."""

    def target(self, component: FixedKL | AdaptiveKL) -> float | None:
        return component.target if isinstance(component, AdaptiveKL) else None


class TestK1InTheReward(OfControllers):
    components = (FixedKL(), FixedKL(coef=0.0, estimator="k1"), AdaptiveKL(), AdaptiveKL(target=0.2, horizon=50.0))

    def oracle(self, component: FixedKL | AdaptiveKL, logprob: float, ref_logprob: float) -> float:
        return logprob - ref_logprob


class TestK2InTheLoss(OfControllers):
    unbiased = False
    non_negative = True
    components = (FixedKL(placement="loss"), AdaptiveKL(placement="loss", estimator="k2"))

    def oracle(self, component: FixedKL | AdaptiveKL, logprob: float, ref_logprob: float) -> float:
        return (ref_logprob - logprob) ** 2 / 2


class TestK3InTheLoss(OfControllers):
    non_negative = True
    gradient = "forward"
    components = (FixedKL(placement="loss", estimator="k3"), AdaptiveKL(placement="loss", estimator="k3"))

    def oracle(self, component: FixedKL | AdaptiveKL, logprob: float, ref_logprob: float) -> float:
        return math.expm1(ref_logprob - logprob) - (ref_logprob - logprob)
