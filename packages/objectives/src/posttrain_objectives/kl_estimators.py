"""Estimators of the KL to the reference, where each may be placed, and what all KL components share of that.

Knows neither models nor coefficients: core multiplies, adds and places. Notation of Schulman (2020, "Approximating KL
divergence"): actions are drawn from pi, d = log pi_ref - log pi, rho = pi / pi_old.

Placement decides which estimator has a useful gradient (Tang and Munos 2025, arXiv 2506.09477; Liu et al. 2025,
arXiv 2510.01555). "Partial" is the gradient of each action's own KL at the prefixes as they were drawn, without its
effect on the KL of later actions; "exact" is that of the KL of whole episodes.

| placement | estimator | expected gradient, on policy |
|---|---|---|
| reward | k1 | exact, where the estimator of advantages sums rewards to go undiscounted |
| advantage | k1 | partial |
| loss | k2, k3+ | partial |
| loss | seq_k2 | exact, where all actions weigh alike |
| loss | k3 | partial, of the forward KL(pi_ref || pi), as GRPO has it |
| loss | exact | partial, and off policy, too |

`exact` is no estimate but the KL itself, summed over all actions of the state before each action: it does not depend on
the action that was drawn, and so has no noise of it and no ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, final

from posttrain import loss
from posttrain.data import Array
from posttrain.ops import Ops, widen
from posttrain.protocols import Compared

from posttrain_objectives.choices import require_choice
from posttrain_objectives.ratios import log_ratio

Placement = Literal["loss", "reward", "advantage"]
Sampled = Literal["k1", "k2", "k3", "k3+", "seq_k2"]
"""Estimators from the log-probs of the actions taken."""
Estimator = Literal["k1", "k2", "k3", "k3+", "seq_k2", "exact"]
Asked = Literal["auto", "k1", "k2", "k3", "k3+", "seq_k2", "exact"]
"""What a configuration may ask for."""
OffPolicy = Literal["none", "ratio"]


def k1(ops: Ops, d: Array) -> Array:
    """-d: unbiased, may be negative."""
    return -d


def k2(ops: Ops, d: Array) -> Array:
    """d^2 / 2: biased, never negative; on policy its gradient is that of each action's KL."""
    return 0.5 * d * d


def k3(ops: Ops, d: Array) -> Array:
    """e^d - 1 - d: unbiased, never negative; the same that core measures with."""
    return loss.k3(ops.xp, d)


def k3_plus(ops: Ops, d: Array) -> Array:
    """The value of k3 and the gradient of k2."""
    return k2(ops, d) + ops.stop_gradient(k3(ops, d) - k2(ops, d))


def ratio_times_k1(ops: Ops, d: Array, rho: Array) -> Array:
    """rho k1, rho differentiated: its gradient is rho (k1 + 1), and the mean of rho's own is 0."""
    return rho * k1(ops, d)


def ratio_times_k2(ops: Ops, d: Array, rho: Array) -> Array:
    """sg(rho) k2."""
    return ops.stop_gradient(rho) * k2(ops, d)


def ratio_times_k3(ops: Ops, d: Array, rho: Array) -> Array:
    """rho k3, rho differentiated. Of rho (e^d - 1 - d), rho e^d = pi_ref / pi_old is a constant and the rest has the
    derivative -rho d in log pi; it is set here, since the clamp of k3 would turn it around where d is large."""
    sg = ops.stop_gradient
    return sg(rho * k3(ops, d)) + sg(rho * d) * (d - sg(d))


def ratio_times_k3_plus(ops: Ops, d: Array, rho: Array) -> Array:
    """sg(rho) times the value of k3 and the gradient of k2."""
    return ops.stop_gradient(rho) * k3_plus(ops, d)


@final
@dataclass(frozen=True, slots=True)
class Form:
    """One estimator from samples."""

    of: Callable[[Ops, Array], Array]
    """Of d, where actions are drawn from pi."""
    weighed: Callable[[Ops, Array, Array], Array]
    """Of d and rho, where actions are drawn from pi_old: it has the gradient of the KL(pi || pi_ref)."""
    unit: Literal["action", "episode"] = "action"
    """Whose d it is taken of."""


ESTIMATORS: Mapping[Sampled, Form] = {
    "k1": Form(k1, ratio_times_k1), "k2": Form(k2, ratio_times_k2), "k3": Form(k3, ratio_times_k3),
    "k3+": Form(k3_plus, ratio_times_k3_plus), "seq_k2": Form(k2, ratio_times_k2, "episode")}


def divergence(ops: Ops, estimator: Sampled, logprobs: Array, compared: Compared,
               off_policy: OffPolicy = "none") -> Array:
    """[N] the estimate at each action, in float32 or better.

    That of a whole episode is spread evenly over its actions, so that their sum is the estimate of the episode.

    >>> import numpy as np
    >>> from posttrain.ops import ops_of
    >>> x, ref = np.log([0.5, 0.5]), np.log([0.5, 0.25])
    >>> one_episode = Compared(ref, episode=np.zeros(2, int), count=np.array([2]))
    >>> divergence(ops_of(x), "k1", x, one_episode).round(3)
    array([-0.   ,  0.693])
    >>> divergence(ops_of(x), "seq_k2", x, one_episode).round(3)
    array([0.12, 0.12])
    """
    xp, form, logprobs = ops.xp, ESTIMATORS[estimator], widen(logprobs)
    d = widen(compared.ref_logprobs) - logprobs
    log_rho = log_ratio(ops, logprobs, compared.old_logprobs)
    if form.unit == "episode":
        episodes = compared.count.shape[0]
        d, log_rho = (ops.segment_sum(x, compared.episode, episodes) for x in (d, log_rho))
    rho = xp.exp(xp.clip(log_rho, -loss.MAX_LOG_RATIO, loss.MAX_LOG_RATIO))
    k = form.of(ops, d) if off_policy == "none" else form.weighed(ops, d, rho)
    if form.unit == "action":
        return k
    return xp.take(k / xp.astype(compared.count, k.dtype), compared.episode, axis=0)


def exact(compared: Compared) -> Array:
    """[N] the KL over the whole vocabulary, as the learner computed it. Raises `ValueError` where it did not."""
    if compared.exact is None:
        raise ValueError("estimator exact sums over the whole vocabulary, which only a learner that was told its "
                         "reference does; Compared.exact must hold what it said")
    return widen(compared.exact)


DEFAULT_ESTIMATOR: Mapping[Placement, Estimator] = {"reward": "k1", "advantage": "k1", "loss": "k2"}
"""What `auto` stands for."""

_PUSHES_AWAY = ("{0} as {1} also punishes actions that the policy takes too seldom, which drives it away from the "
                "reference; use estimator: k1, or placement: loss")
_ONE_NUMBER = ("{0} as {1} says how far an episode is from the reference and not on which side; use estimator: k1, "
               "or placement: loss")
_ONE_FOR_ALL = ("{0} as {1} is one number for all actions of a state and cannot tell them apart; use estimator: k1, or "
                "placement: loss")
_VALUE_ONLY: Mapping[Estimator, str] = {"k2": _PUSHES_AWAY, "k3": _PUSHES_AWAY, "k3+": _PUSHES_AWAY,
                                        "seq_k2": _ONE_NUMBER, "exact": _ONE_FOR_ALL}
"""Why an estimator cannot be placed where its value counts and its gradient does not."""
_VALUE_PLACEMENTS: Mapping[Placement, str] = {"reward": "a reward", "advantage": "an advantage"}

FORBIDDEN: Mapping[tuple[Placement, Estimator], str] = {
    **{(placement, name): why.format(name, as_what) for placement, as_what in _VALUE_PLACEMENTS.items()
       for name, why in _VALUE_ONLY.items()},
    ("loss", "k1"): "the expected gradient of k1 as a loss is zero, so it would do nothing; use estimator: k2 (or k3, "
                    "as GRPO has it), off_policy: ratio, or placement: reward"}
"""Combinations whose gradient is not one of the KL, and why, where off_policy is none."""

NO_RATIO = ("estimator exact sums over all actions of a state, whichever was taken: after several optimiser steps it "
            "still has the gradient of the KL, and a ratio of the action taken would only add noise; leave off_policy: "
            "none")


def chosen_estimator(placement: Placement, estimator: Asked, off_policy: OffPolicy = "none") -> Estimator:
    """The estimator that is used; raises `ValueError` where its gradient would be none of the KL.

    >>> chosen_estimator("reward", "auto"), chosen_estimator("loss", "auto")
    ('k1', 'k2')
    """
    require_choice("placement", placement, DEFAULT_ESTIMATOR)
    require_choice("estimator", estimator, ("auto", *ESTIMATORS, "exact"))
    require_choice("off_policy", off_policy, ("none", "ratio"))
    found = DEFAULT_ESTIMATOR[placement] if estimator == "auto" else estimator
    if off_policy == "ratio" and placement != "loss":
        raise ValueError(f"off_policy ratio belongs to placement loss: what is placed in the {placement} is weighed "
                         "with it, by the ratio of the objective and by the correction; leave off_policy: none")
    if off_policy == "ratio" and found == "exact":
        raise ValueError(NO_RATIO)
    if off_policy == "none" and (why := FORBIDDEN.get((placement, found))):
        raise ValueError(f"KL estimator {found} cannot be used with placement {placement}: {why}")
    return found


class Placed:
    """What all KL components do with their fields `placement`, `estimator` and `off_policy`."""

    __slots__ = ()
    placement: Placement
    estimator: Asked
    off_policy: OffPolicy

    @property
    def unit(self) -> Literal["action", "episode", "group"]:
        """What the estimator takes as a whole."""
        chosen = self._chosen
        return "action" if chosen == "exact" else ESTIMATORS[chosen].unit

    @property
    def over_vocabulary(self) -> bool:
        """Whether it looks at all actions of a state; see `posttrain.protocols.OverVocabulary`."""
        return self._chosen == "exact"

    def divergence(self, ops: Ops, logprobs: Array, compared: Compared) -> Array:
        """[N] the estimate at each action."""
        chosen = self._chosen
        return exact(compared) if chosen == "exact" else divergence(ops, chosen, logprobs, compared, self.off_policy)

    @property
    def _chosen(self) -> Estimator:
        return chosen_estimator(self.placement, self.estimator, self.off_policy)
