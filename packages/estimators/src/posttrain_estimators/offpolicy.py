"""Estimators for episodes that another policy sampled: temporal differences and traces weighted by clipped ratios.

Here pi is the policy before the update (`logprobs`), whose values are estimated, and mu the sampler
(`behavior_logprobs`); `importance.py` makes ratios of them. Knows values as numbers; knows no model and no loss.
Retrace and tree backup, which look at values of actions, are in `actionvalues.py`. ACER's correction term (Wang et al.
2017, arXiv 1611.01224) and Watkins' Q(lambda) are not here: the one needs pi, mu and a value of every action that was
not taken, the other which action is greedy, and rollouts carry neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, final

from posttrain.data import Array, Episodes, Estimate
from posttrain.ops import ops_of, reverse_recurrence
from posttrain.protocols import Estimator, Need

from posttrain_estimators.baselines import GroupBaseline, Reinforce
from posttrain_estimators.bootstrapping import Bootstrap
from posttrain_estimators.fields import Truncation, check_choice, check_fraction
from posttrain_estimators.importance import (
    Reduction,
    Unit,
    at_unit_ends,
    capped,
    check_ceiling,
    check_ratio,
    log_ratios,
    unit_needs,
    with_ratios,
)
from posttrain_estimators.multistep import GAE, check_critic, critic_needs, differences, estimate_of, next_values


@final
@dataclass(frozen=True, slots=True)
class VTrace:
    """vs_t = v_t + rho_t delta_t + gamma c_t (vs_{t+1} - v_{t+1}), advantages rho_t (r_t + gamma q_{t+1} - v_t).

    delta_t = r_t + gamma v_{t+1} - v_t, rho_t = min(rho_max, pi/mu), c_t = lam min(c_max, pi/mu). Espeholt et al. 2018,
    arXiv 1802.01561, equation 1, section 4.2 and remark 2; the leaky form by Zahavy et al. 2020, arXiv 2002.12928.
    Behind the last action, vs and q are 0 where the episode terminated, else what `truncation` and `bootstrap` say.
    Targets are vs: they are values of the policy proportional to min(rho_max mu, pi), which is pi itself only where
    `rho_max` cuts nothing.

    c_max = 1 is a hidden lambda: log-ratios of standard deviation sigma leave about (1 - sigma / sqrt(2 pi))^n of the
    trace after n tokens, 0.13 after 100 where sigma is 0.05, which rounding alone may give, and nothing after 2000, so
    an outcome reward reaches early tokens through the critic alone. `dead_zone` and `trace_unit` are against that;
    the metrics `ratio/mean`, `ratio/max`, `ratio/over_rho_max` and `ratio/over_c_max` show it.

    Raises `ValueError` on construction where a field is out of its range, and on a batch without a column it needs.

    >>> episodes = Episodes.from_rows([[0.0, 1.0]], values=[[0.5, 0.5]], logprobs=[[-1.0, -1.0]],
    ...                               behavior_logprobs=[[-1.0, -2.0]])
    >>> VTrace(lam=1.0)(episodes).targets
    array([1., 1.])
    """

    gamma: float = 1.0
    """Discount per action, in [0, 1]."""
    lam: float = 1.0
    """Weight of longer returns, in [0, 1]: 0 is one step, 1 the paper's own form."""
    rho_max: float = 1.0
    """Ceiling of the ratio on each temporal difference and on the advantage, at least `c_max`; .inf cuts nothing."""
    c_max: float = 1.0
    """Ceiling of the ratio in the trace; .inf cuts nothing."""
    leak: float = 1.0
    """alpha in [0, 1]: alpha min(ceiling, ratio) + (1 - alpha) ratio in place of each capped ratio; 1 has no leak."""
    pg_bootstrap: Literal["vs", "blended"] = "blended"
    """q_{t+1} of the advantage: vs_{t+1} (the paper), or lam vs_{t+1} + (1 - lam) v_{t+1}. Equal where lam is 1."""
    weighted: bool = True
    """rho on the advantage. Set it to false where the loss takes its own ratio to the sampler, or the correction would
    be applied twice; the targets are corrected either way."""
    trace_unit: Unit = "token"
    """What has one ratio: each action, a turn, or the whole episode."""
    trace_ratio: Reduction = "mean"
    """Ratio of a turn or an episode: the geometric mean of its actions' (`mean`), which each of them takes, or their
    product (`sum`), in which case it is one step for the trace, too: its c is taken once, at its last action."""
    dead_zone: float = 0.0
    """A log-ratio of an action that is smaller counts as 0; 0 keeps all. For mismatch that is only numerical."""
    whiten: bool = False
    """Standardise the advantages over the actions of the batch, before rho weighs them; never the targets."""
    truncation: Truncation = "bootstrap"
    """Truncated episodes: `bootstrap` continues with the value of the state after the last action, `terminal` ends
    there, `mask` leaves the episode out of policy update, value update and whitening, `soft` ends there and takes the
    overlong penalty from the last reward of every episode."""
    bootstrap: Bootstrap = "value"
    """Where `truncation` is `bootstrap`, what the state after the last action is worth: the critic's `value`, the
    `score` of a reward with `bootstrap: true`, or `zero`."""
    overlong_length: int = 0
    """Number of actions from which the penalty of `truncation: soft` is 1."""
    overlong_buffer: int = 0
    """The penalty of `truncation: soft` rises from 0 over this many actions before `overlong_length`."""

    def __post_init__(self) -> None:
        check_critic(self)
        check_fraction("lam", self.lam)
        check_fraction("leak", self.leak)
        check_ceiling("rho_max", self.rho_max)
        check_ceiling("c_max", self.c_max)
        if self.rho_max < self.c_max:
            raise ValueError(f"rho_max must be at least c_max, got {self.rho_max} < {self.c_max}; lower c_max, or "
                             "raise rho_max")
        check_choice("pg_bootstrap", self.pg_bootstrap, ("vs", "blended"))
        check_ratio("trace_unit", self.trace_unit, "trace_ratio", self.trace_ratio, self.dead_zone)

    @property
    def needs(self) -> frozenset[Need]:
        """Values and bootstrap values, both log-probs; turns and final scores where they are used."""
        return critic_needs(self) | unit_needs(self.trace_unit)

    @property
    def corrects_for_sampler(self) -> bool:
        """Whether advantages are already weighted by pi/mu."""
        return self.weighted

    def __call__(self, episodes: Episodes, /) -> Estimate:
        """[N] advantages and targets; `keep` where `truncation` is `mask`."""
        delta, v = differences(self, episodes)
        xp = ops_of(delta).xp
        log_ratio = log_ratios(episodes, self.trace_unit, self.trace_ratio, self.dead_zone)
        ratio = xp.astype(xp.exp(log_ratio), delta.dtype, copy=False)
        del log_ratio  # columns are large
        rho = self._leaky(ratio, self.rho_max)
        c = rho if self.c_max == self.rho_max else self._leaky(ratio, self.c_max)
        if self.trace_ratio == "sum":
            c = at_unit_ends(c, self.trace_unit, episodes)
        errors = reverse_recurrence(self.gamma * self.lam * c, rho * delta, episodes.offsets)
        A = next_values(errors, xp.zeros_like(errors[:episodes.n_episodes]), episodes)
        A *= self.gamma * (1.0 if self.pg_bootstrap == "vs" else self.lam)
        A += delta
        del delta
        errors += v
        estimate = estimate_of(self, A, errors, v, episodes)
        if self.weighted:  # after whitening, whose mean would give an advantage to what has no weight
            estimate = replace(estimate, advantages=rho * estimate.advantages)
        return with_ratios(estimate, ratio, rho_max=self.rho_max, c_max=self.c_max)

    def _leaky(self, ratio: Array, ceiling: float) -> Array:
        cut = capped(ratio, ceiling)
        return cut if self.leak == 1 else self.leak * cut + (1.0 - self.leak) * ratio


@final
@dataclass(frozen=True, slots=True)
class ClippedIS:
    """A_t = min(rho, rho_max) A^base_t with rho = pi/mu of the action's token, turn or sequence.

    Importance sampling, truncated (Ionides 2008; per token the rho of Espeholt et al. 2018, arXiv 1802.01561) on the
    advantage, with a ceiling of its own. Three policies are told apart, as by Hilton et al. 2021 (arXiv 2110.00641):
    the behaviour policy mu that sampled, the proximal policy pi_old before the update, and the current one pi. The
    weight here is pi_old/mu and constant during an update; the loss has the ratio pi/pi_old, clipped around 1. Their
    product is pi/mu, so a loss whose ratio is taken to the sampler must not be used with it.

    Raises `ValueError` on construction where a field is out of its range or belongs to another base, and on a batch
    without a column it needs.

    >>> episodes = Episodes.from_rows([[1.0], [0.0]], logprobs=[[-1.0], [-1.0]], behavior_logprobs=[[-3.0], [-1.0]])
    >>> ClippedIS()(episodes).advantages
    array([ 1. , -0.5])
    """

    base: Literal["gae", "reward_to_go", "group"] = "group"
    """What is weighted: `gae` (needs a critic, whose targets it gives, not weighted), the `reward_to_go` without a
    baseline, or the sum of rewards minus the mean of the `group`."""
    gamma: float = 1.0
    """Discount per action, in [0, 1]; base `group` has none."""
    lam: float = 0.95
    """Weight of longer returns in base `gae`, in [0, 1]."""
    unit: Unit = "token"
    """What has one ratio: each action, a turn, or the whole episode."""
    unit_ratio: Reduction = "sum"
    """Ratio of a turn or an episode: the product of its actions' (`sum`), or their geometric mean (`mean`)."""
    rho_max: float = 2.0
    """Ceiling of the ratio; .inf cuts nothing."""
    dead_zone: float = 0.0
    """A log-ratio of an action that is smaller counts as 0; 0 keeps all. For mismatch that is only numerical."""
    truncation: Truncation = "terminal"
    """Truncated episodes: `terminal` takes their rewards as they are, `mask` leaves them out of statistics and update,
    `soft` takes the overlong penalty from the last reward of every episode, `bootstrap` (base `gae` alone) continues
    with the value of the state after the last action."""
    bootstrap: Bootstrap = "value"
    """Where `truncation` is `bootstrap`, what the state after the last action is worth."""
    overlong_length: int = 0
    """Number of actions from which the penalty of `truncation: soft` is 1."""
    overlong_buffer: int = 0
    """The penalty of `truncation: soft` rises from 0 over this many actions before `overlong_length`."""

    def __post_init__(self) -> None:
        check_choice("base", self.base, BASES)
        check_ceiling("rho_max", self.rho_max)
        check_ratio("unit", self.unit, "unit_ratio", self.unit_ratio, self.dead_zone)
        for field in fields(self):
            if field.name in _OF_OTHER_BASES[self.base] and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name} is no field of base {self.base!r}; leave it out, or choose a base that "
                                 "has it, such as gae")
        BASES[self.base](self)

    @property
    def needs(self) -> frozenset[Need]:
        """Both log-probs and what the base needs; turns where they have a ratio."""
        return unit_needs(self.unit) | BASES[self.base](self).needs

    @property
    def corrects_for_sampler(self) -> bool:
        """Advantages are already weighted by pi/mu."""
        return True

    def __call__(self, episodes: Episodes, /) -> Estimate:
        """[N] advantages; targets of base `gae`; `keep` where `truncation` is `mask`."""
        estimate = BASES[self.base](self)(episodes)
        A = estimate.advantages
        xp = ops_of(A).xp
        ratio = xp.exp(log_ratios(episodes, self.unit, self.unit_ratio, self.dead_zone))
        weighted = replace(estimate, advantages=A * xp.astype(capped(ratio, self.rho_max), A.dtype))
        return with_ratios(weighted, ratio, rho_max=self.rho_max)


def _ends(how: ClippedIS) -> dict[str, Any]:
    """The fields about how episodes end, which every base has."""
    return {"truncation": how.truncation, "overlong_length": how.overlong_length,
            "overlong_buffer": how.overlong_buffer}


BASES: Mapping[str, Callable[[ClippedIS], Estimator]] = {
    "gae": lambda how: GAE(gamma=how.gamma, lam=how.lam, bootstrap=how.bootstrap, **_ends(how)),
    "reward_to_go": lambda how: Reinforce(gamma=how.gamma, **_ends(how)),
    "group": lambda how: GroupBaseline(scale="none", **_ends(how))}
"""The estimator whose advantages are weighted."""

_OF_OTHER_BASES: Mapping[str, tuple[str, ...]] = {
    "gae": (), "reward_to_go": ("lam", "bootstrap"), "group": ("gamma", "lam", "bootstrap")}
"""Fields that a base does not read."""
