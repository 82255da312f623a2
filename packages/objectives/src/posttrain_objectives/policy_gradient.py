"""The policy-gradient objective: ratio x surrogate x denominator. Its presets are PPO, GRPO, DAPO, Dr. GRPO, GSPO,
CISPO, SAPO and REINFORCE, which differ in these three alone (and in the estimator that makes their advantages, which is
elsewhere), and decoupled PPO, which weighs actions by the ratio to the sampler beside. Knows no framework, no KL, no
value function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from posttrain.data import Array, Counts, Loss, MicroBatch, Term, TokenOutputs, Weights
from posttrain.ops import Ops
from posttrain.protocols import Need, Output

from posttrain_objectives.choices import require_choice
from posttrain_objectives.columns import required
from posttrain_objectives.denominators import DENOMINATORS, Denominator, action_weights
from posttrain_objectives.diagnostics import mean_over_actions
from posttrain_objectives.kl_estimators import k3
from posttrain_objectives.ratios import RATIOS, Ratio, behavior_weight, log_ratio
from posttrain_objectives.surrogates import SURROGATES, Bounds, Surrogate


@final
@dataclass(frozen=True, slots=True)
class PolicyGradient:
    """`sum(weight * surrogate(ratio, advantage))`, one term per slot; the defaults are PPO.

    Reads `logprobs` [N] and, of the batch, `advantages` [N] or [m, N], `weight` and `kl_weight` [N], `old_logprobs`
    [N] or None, for the sequence ratio `episode` and `count`, and with `behavior_cap` `behavior_logprobs` [N]. Terms:
    `policy`, or `policy/<slot>` for each of the slots. Metrics, each a mean over the kept actions (and slots), every
    action counting the same: `policy/clip_low`, `policy/clip_high`, `policy/clip_dual` (fraction whose gradient that
    bound cut), `policy/capped` (fraction whose weight CISPO's cap cut), `policy/ratio`, `policy/behavior_weight`, and
    `policy/approx_kl`, the k3 estimate of KL(pi_old || pi).

    Raises `ValueError` where a field has no meaning or contradicts another.
    """

    ratio: Ratio = "token"
    """Ratio of each action, or the geometric mean over its episode (GSPO)."""
    surrogate: Surrogate = "clip"
    """PPO's clipped objective, plain -A log pi, -A log pi times a capped ratio (CISPO), or a soft gate (SAPO)."""
    clip_low: float = 0.2
    """The ratio is clipped at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped at 1 + clip_high."""
    dual_clip: float = 0.0
    """Bounds the loss of a negative advantage at this ratio, usually 3; 0 does not."""
    cap: float = 5.0
    """Of surrogate cispo: the largest ratio that an action is weighed by; the ratio itself, not its distance from 1."""
    tau_positive: float = 1.0
    """Of surrogate sapo: how fast the gate closes as the ratio leaves 1, where the advantage is positive."""
    tau_negative: float = 1.05
    """The same where it is not."""
    behavior_cap: float = 0.0
    """Weighs each action by min(behavior_cap, pi_old / mu), where mu is the sampler that wrote it and pi_old the policy
    before the update, recomputed (decoupled PPO); 0 does not. Takes the place of a correction."""
    denominator: Denominator = "token_mean"
    """Mean over actions, mean over episodes of their means, or sum over episodes by a constant length."""
    length: int = 0
    """The constant of `denominator: constant`, usually `${rollout.max_new_tokens}`; it must be given there."""
    slots: tuple[str, ...] = ("main",)
    """One per reward column where gradients are combined; set by the trainer."""

    def __post_init__(self) -> None:
        require_choice("ratio", self.ratio, RATIOS)
        require_choice("surrogate", self.surrogate, SURROGATES)
        require_choice("denominator", self.denominator, DENOMINATORS)
        if not 0 < self.clip_low <= 1 or not self.clip_high > 0:
            raise ValueError(f"clip_low lies in (0, 1] and clip_high is positive, got {self.clip_low} and "
                             f"{self.clip_high}: they are distances from a ratio of 1, as in 0.2")
        if self.dual_clip != 0 and not 1 < self.dual_clip < math.inf:
            raise ValueError(f"dual_clip must be above 1 and finite, or 0 for none, got {self.dual_clip}: it bounds "
                             "the ratio itself, as in 3")
        if not self.cap >= 1:
            raise ValueError(f"cap is a ratio of at least 1, got {self.cap}; .inf caps nothing")
        if not 0 < self.tau_positive < math.inf or not 0 < self.tau_negative < math.inf:
            raise ValueError("tau_positive and tau_negative are positive and finite, got "
                             f"{self.tau_positive} and {self.tau_negative}")
        if not (self.behavior_cap == 0 or self.behavior_cap >= 1):
            raise ValueError(f"behavior_cap is the largest pi_old / mu, at least 1, or 0 for no weight, got "
                             f"{self.behavior_cap}")
        if self.surrogate == "reinforce" and (self.ratio != "token" or self.dual_clip != 0):
            raise ValueError("surrogate reinforce has no ratio: leave ratio: token and dual_clip: 0, or use "
                             "surrogate: clip")
        if self.surrogate != "clip" and self.dual_clip != 0:
            raise ValueError(f"surrogate {self.surrogate} has no clip that dual_clip could bound; leave dual_clip: 0")
        if self.denominator == "constant" and self.length < 1:
            raise ValueError("denominator constant (dr_grpo) divides by a fixed length that does not depend on the "
                             "data: set length: ${rollout.max_new_tokens}, or a number of at least 1")
        if self.denominator != "constant" and self.length != 0:
            raise ValueError(f"length belongs to denominator constant; remove it or leave {self.denominator}")
        if not self.slots or len(set(self.slots)) != len(self.slots):
            raise ValueError(f"slots must be one or more different names, got {self.slots}")

    @property
    def needs(self) -> frozenset[Need]:
        """Advantages. Old log-probs are used where the batch has them; the first step on a rollout needs none."""
        behavior = frozenset({Need.BEHAVIOR_LOGPROBS}) if self.corrects_for_sampler else frozenset()
        return frozenset({Need.ADVANTAGES}) | behavior

    @property
    def corrects_for_sampler(self) -> bool:
        """Whether it weighs by pi_old / mu itself; see `posttrain.protocols.OffPolicy`."""
        return self.behavior_cap > 0

    @property
    def outputs(self) -> frozenset[Output]:
        return frozenset({Output.LOGPROBS})

    @property
    def unit(self) -> Literal["action", "episode", "group"]:
        """A sequence ratio needs its whole episode in one part."""
        return "episode" if self.ratio == "sequence" else "action"

    def weights(self, counts: Counts) -> Weights:
        """The same average for the policy term and for KL and entropy beside it."""
        weight = action_weights(self.denominator, counts, self.length)
        return Weights(weight=weight, kl_weight=weight)

    def __call__(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Array]) -> Loss:
        xp, logprobs = ops.xp, out.logprobs
        A = ops.stop_gradient(xp.reshape(required(batch, "advantages"), (len(self.slots), logprobs.shape[0])))
        d = log_ratio(ops, logprobs, batch.old_logprobs)
        r = RATIOS[self.ratio](ops, d, logprobs, batch)
        bounds = Bounds(self.clip_low, self.clip_high, self.dual_clip, self.cap, self.tau_positive, self.tau_negative)
        loss, events = SURROGATES[self.surrogate](ops, r, A, logprobs, bounds)
        measured = {**events, "ratio": r, "approx_kl": k3(ops, ops.stop_gradient(d))}
        weight = batch.weight
        if self.corrects_for_sampler:
            measured["behavior_weight"] = w = behavior_weight(
                ops, logprobs, batch.old_logprobs, required(batch, "behavior_logprobs"), self.behavior_cap)
            weight = weight * w
        terms = {
            "policy" if self.slots == ("main",) else f"policy/{slot}": Term(xp.sum(weight * loss[j]), slot=slot)
            for j, slot in enumerate(self.slots)
        }
        return Loss(terms, {f"policy/{name}": mean_over_actions(ops, x, batch.kl_weight)
                            for name, x in measured.items()})
