"""The objectives here keep the contract of their kind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from posttrain.data import MicroBatch, TokenOutputs
from posttrain.testing import ObjectiveContract
from posttrain_objectives.entropy import Entropy
from posttrain_objectives.likelihood import SFT
from posttrain_objectives.policy_gradient import PolicyGradient
from posttrain_objectives.preference import DPO, BradleyTerry
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


def behavior_weight(p: PolicyGradient, held: TokenOutputs, batch: MicroBatch, n: int) -> float:
    """Of action n under decoupled PPO (Hilton et al. 2021, section 3), pi_old over mu, bounded; else 1."""
    if not p.behavior_cap:
        return 1.0
    old = held.logprobs if batch.old_logprobs is None else batch.old_logprobs
    return min(p.behavior_cap, math.exp(old[n] - batch.behavior_logprobs[n]))


class TestPolicyGradient(ObjectiveContract):
    components = (
        PolicyGradient(), PolicyGradient(denominator="sequence_mean"), PolicyGradient(clip_high=0.28),
        PolicyGradient(denominator="constant", length=7), PolicyGradient(dual_clip=1.3),
        PolicyGradient(ratio="sequence", clip_low=0.1, clip_high=0.12, denominator="sequence_mean"),
        PolicyGradient(behavior_cap=1.1))

    def oracle(self, component: PolicyGradient, out: TokenOutputs, held: TokenOutputs, batch: MicroBatch,
               coef: Mapping[str, float]) -> float:
        """Schulman et al. 2017, section 3; dual clipping: Ye et al. 2019."""
        total = 0.0
        for n, r in enumerate(ratios(component, out, held, batch)):
            A = batch.advantages[n]
            loss = -min(r * A, min(max(r, 1 - component.clip_low), 1 + component.clip_high) * A)
            if component.dual_clip and A < 0:
                loss = min(loss, -component.dual_clip * A)
            total += batch.weight[n] * loss * behavior_weight(component, held, batch, n)
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


class TestCISPO(ObjectiveContract):
    components = (PolicyGradient(surrogate="cispo", cap=1.2),
                  PolicyGradient(surrogate="cispo", cap=1.05, ratio="sequence", denominator="sequence_mean"))

    def oracle(self, component: PolicyGradient, out: TokenOutputs, held: TokenOutputs, batch: MicroBatch,
               coef: Mapping[str, float]) -> float:
        """MiniMax 2025, section 3.1: the ratio is a weight and no variable."""
        return sum(-w * min(r, component.cap) * A * x for w, r, A, x in zip(
            batch.weight, ratios(component, held, held, batch), batch.advantages, out.logprobs))

    def average(self, component: PolicyGradient, column: str, rows: list[list[float]]) -> float:
        return averaged(component.denominator, rows)


class TestSAPO(ObjectiveContract):
    components = (PolicyGradient(surrogate="sapo"),
                  PolicyGradient(surrogate="sapo", tau_positive=3.0, tau_negative=5.0, denominator="sequence_mean"))

    def oracle(self, component: PolicyGradient, out: TokenOutputs, held: TokenOutputs, batch: MicroBatch,
               coef: Mapping[str, float]) -> float:
        """Gao et al. 2025: a logistic gate around a ratio of 1."""
        total = 0.0
        for w, r, A in zip(batch.weight, ratios(component, out, held, batch), batch.advantages):
            tau = component.tau_positive if A > 0 else component.tau_negative
            total -= w * A * 4 / tau / (1 + math.exp(-max(tau * (r - 1), -700.0)))
        return total

    def average(self, component: PolicyGradient, column: str, rows: list[list[float]]) -> float:
        return averaged(component.denominator, rows)


def pairs_of(batch: MicroBatch) -> list[tuple[list[int], list[int]]]:
    """Actions of the preferred answer of each pair, and of the other."""
    found = []
    for g in sorted(set(batch.group.tolist())):
        actions = [n for n in range(len(batch.episode)) if batch.group[batch.episode[n]] == g]
        found.append(([n for n in actions if batch.preferred[n] == 1], [n for n in actions if batch.preferred[n] == 0]))
    return found


class TestDPO(ObjectiveContract):
    group_size = 2
    components = (DPO(), DPO(beta=0.7, label_smoothing=0.2), DPO(loss="ipo", beta=0.4, length_normalised=True),
                  DPO(loss="hinge", beta=0.8), DPO(beta=2.0, length_normalised=True))

    def oracle(self, component: DPO, out: TokenOutputs, held: TokenOutputs, batch: MicroBatch,
               coef: Mapping[str, float]) -> float:
        """Rafailov et al. 2023, equation 7; Azar et al. 2023, equation 17; Liu et al. 2023, equation 9."""
        total, beta, eps = 0.0, component.beta, component.label_smoothing
        for chosen, rejected in pairs_of(batch):
            good, bad = (sum(out.logprobs[n] - batch.ref_logprobs[n] for n in side)
                         / (len(side) if component.length_normalised else 1) for side in (chosen, rejected))
            Delta = good - bad
            losses = {"sigmoid": (1 - eps) * math.log1p(math.exp(-beta * Delta))
                      + eps * math.log1p(math.exp(beta * Delta)),
                      "ipo": (Delta - 1 / (2 * beta)) ** 2, "hinge": max(0.0, 1 - beta * Delta)}
            total += sum(batch.weight[n] for n in (*chosen, *rejected)) * losses[component.loss]
        return total

    def average(self, component: DPO, column: str, rows: list[list[float]]) -> float:
        return averaged("sequence_mean", rows)


class TestBradleyTerry(ObjectiveContract):
    group_size = 2
    components = (BradleyTerry(),)

    def oracle(self, component: BradleyTerry, out: TokenOutputs, held: TokenOutputs, batch: MicroBatch,
               coef: Mapping[str, float]) -> float:
        """Ouyang et al. 2022, equation 1, with the score at the last action."""
        return sum(sum(batch.value_weight[n] for n in (*chosen, *rejected))
                   * math.log1p(math.exp(-(row[chosen[-1]] - row[rejected[-1]])))
                   for chosen, rejected in pairs_of(batch) for row in out.values)

    def average(self, component: BradleyTerry, column: str, rows: list[list[float]]) -> float:
        return averaged("sequence_mean", rows)


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
