"""Estimators of the value of actions from episodes that another policy sampled: Retrace and tree backup.

Both are Q^ret_t = q_t + x_t with x_t = d_t + gamma c_{t+1} x_{t+1} and d_t = r_t + gamma E_pi Q(s_{t+1}) - q_t; they
differ in c. The ratio of the own action is not used: what is estimated is given the action. Knows values as numbers;
knows no model and no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, final

from posttrain.data import Array, Episodes, Estimate
from posttrain.ops import ops_of, reverse_recurrence, widen
from posttrain.protocols import Need

from posttrain_estimators.bootstrapping import Bootstrap, bootstrap_needs
from posttrain_estimators.fields import Truncation, check_fraction
from posttrain_estimators.importance import (
    Reduction,
    Unit,
    at_unit_starts,
    capped,
    check_ceiling,
    check_ratio,
    log_ratios,
    unit_needs,
    with_ratios,
)
from posttrain_estimators.multistep import (
    WithCritic,
    check_critic,
    columns_of,
    critic_needs,
    differences,
    estimate_of,
    next_values,
    one_step,
)


@final
@dataclass(frozen=True, slots=True)
class Retrace:
    """Q^ret_t = q_t + x_t, x_t = r_t + gamma E_pi Q(s_{t+1}) - q_t + gamma c_{t+1} x_{t+1}, c = lam min(c_max, pi/mu).

    Munos et al. 2016, arXiv 1606.02647, equation 3. Where Q comes from is `q`:

    `v_only`, from a critic of states: q and E_pi Q are both v. Then x_t = Q^ret_t - v_t are the advantages, and
    Q^ret_t = r_t + gamma ((1 - lam) v_{t+1} + lam vs_{t+1}) with the vs of V-trace, rho_max = c_max. The targets are
    vs_t = v_t + min(c_max, pi/mu) x_t: values trained on Q^ret itself, without the own ratio, would be the sampler's.

    `q_head`, from a critic of actions: q = Q(s, a) of the action taken, E_pi Q its mean over the vocabulary under the
    policy, also in the state after the last action (`bootstrap_values`). Advantages are Q^ret - E_pi Q, and targets
    Q^ret, for Q(s, a). Its fixed point is Q^pi whatever the sampler.

    Behind the last action, E_pi Q is 0 where the episode terminated, else what `truncation` and `bootstrap` say.
    Raises `ValueError` on construction where a field is out of its range, and on a batch without a column it needs.

    >>> episodes = Episodes.from_rows([[0.0, 1.0]], values=[[0.5, 0.5]], logprobs=[[-1.0, -2.0]],
    ...                               behavior_logprobs=[[-1.0, -1.0]])
    >>> Retrace()(episodes).advantages.round(3)
    array([0.184, 0.5  ])
    """

    q: Literal["v_only", "q_head"] = "v_only"
    """Where action values come from: the critic of states (`v_only`), or an action-value head over the vocabulary
    (`q_head`)."""
    gamma: float = 1.0
    """Discount per action, in [0, 1]."""
    lam: float = 1.0
    """Weight of longer returns, in [0, 1]: 0 is one step."""
    c_max: float = 1.0
    """Ceiling of the ratio in the trace; .inf cuts nothing."""
    trace_unit: Unit = "token"
    """What has one ratio: each action, a turn, or the whole episode."""
    trace_ratio: Reduction = "mean"
    """Ratio of a turn or an episode: the geometric mean of its actions' (`mean`), which each of them takes, or their
    product (`sum`), in which case it is one step for the trace, too: its c is taken once, at its first action."""
    dead_zone: float = 0.0
    """A log-ratio of an action that is smaller counts as 0; 0 keeps all. For mismatch that is only numerical."""
    whiten: bool = False
    """Standardise the advantages over the actions of the batch; never the targets."""
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
        if self.q not in SOURCES:
            raise ValueError(f"q must be one of v_only, q_head, got {self.q!r}; action values from log-ratios to the "
                             "reference (implicit_q), from a second state-value head (separate_v), the correction term "
                             "of ACER and Watkins' Q(lambda) are not offered")
        check_critic(self)
        check_fraction("lam", self.lam)
        check_ceiling("c_max", self.c_max)
        check_ratio("trace_unit", self.trace_unit, "trace_ratio", self.trace_ratio, self.dead_zone)

    @property
    def needs(self) -> frozenset[Need]:
        """Both log-probs and the values of `q`; turns and final scores where they are used."""
        values = critic_needs(self) if self.q == "v_only" else action_value_needs(self)
        return values | unit_needs(self.trace_unit)

    def __call__(self, episodes: Episodes, /) -> Estimate:
        """[N] advantages and targets; `keep` where `truncation` is `mask`."""
        log_rho = log_ratios(episodes, self.trace_unit, self.trace_ratio, self.dead_zone)
        ratio = ops_of(log_rho).xp.exp(log_rho)
        return with_ratios(SOURCES[self.q](self, capped(ratio, self.c_max), episodes), ratio, c_max=self.c_max)


@final
@dataclass(frozen=True, slots=True)
class TreeBackup:
    """Q^ret_t = q_t + x_t, x_t = r_t + gamma E_pi Q(s_{t+1}) - q_t + gamma c_{t+1} x_{t+1} with c_t = lam pi(a_t|s_t).

    Precup, Sutton and Singh 2000, Eligibility traces for off-policy policy evaluation. Needs no probabilities of the
    sampler; its traces are short wherever the policy is not sure. Advantages are Q^ret - E_pi Q and targets Q^ret, for
    Q(s, a). Behind the last action, E_pi Q is 0 where the episode terminated, else what `truncation` and `bootstrap`
    say. Raises `ValueError` on construction where a field is out of its range, and on a batch without a column it
    needs.

    >>> episodes = Episodes.from_rows([[0.0, 1.0]], action_values=[[0.5, 0.5]], expected_action_values=[[0.5, 0.5]],
    ...                               logprobs=[[-1.0, 0.0]])
    >>> TreeBackup()(episodes).targets
    array([1., 1.])
    """

    gamma: float = 1.0
    """Discount per action, in [0, 1]."""
    lam: float = 1.0
    """Weight of longer returns, in [0, 1]: 0 is one step."""
    whiten: bool = False
    """Standardise the advantages over the actions of the batch; never the targets."""
    truncation: Truncation = "bootstrap"
    """Truncated episodes: as in `Retrace`."""
    bootstrap: Bootstrap = "value"
    """What the state after the last action of a truncated episode is worth: as in `Retrace`."""
    overlong_length: int = 0
    """Number of actions from which the penalty of `truncation: soft` is 1."""
    overlong_buffer: int = 0
    """The penalty of `truncation: soft` rises from 0 over this many actions before `overlong_length`."""

    def __post_init__(self) -> None:
        check_critic(self)
        check_fraction("lam", self.lam)

    @property
    def needs(self) -> frozenset[Need]:
        """Action values with their means and the policy's log-probs; final scores where they are used."""
        return action_value_needs(self) | {Need.LOGPROBS}

    def __call__(self, episodes: Episodes, /) -> Estimate:
        """[N] advantages and targets; `keep` where `truncation` is `mask`."""
        if episodes.logprobs is None:
            raise ValueError("TreeBackup needs Episodes.logprobs, those of the policy before the update")
        pi = ops_of(episodes.logprobs).xp.exp(widen(episodes.logprobs))
        return _from_action_values(self, self.lam * pi, episodes)


def action_value_needs(how: WithCritic) -> frozenset[Need]:
    """Action values with their means; final scores where they stand in for the value of the last state."""
    return frozenset({Need.ACTION_VALUES}) | bootstrap_needs(how.truncation, how.bootstrap)


def _from_action_values(how: WithCritic, c: Array, episodes: Episodes) -> Estimate:
    """Advantages Q^ret - E_pi Q and targets Q^ret, from traces `c` [N]."""
    for name in ("action_values", "expected_action_values"):
        if getattr(episodes, name) is None:
            raise ValueError(f"{type(how).__name__} needs Episodes.{name} of an action-value head over the vocabulary; "
                             "retrace with q 'v_only' and vtrace do with a critic of states")
    r, EQ, last = columns_of(how, replace(episodes, values=episodes.expected_action_values))
    ops = ops_of(EQ)
    q = ops.stop_gradient(ops.xp.astype(episodes.action_values, EQ.dtype, copy=False))
    Q_ret = q + _traced(how.gamma, c, one_step(how.gamma, r, EQ, last, episodes) - q, episodes)
    return estimate_of(how, Q_ret - EQ, Q_ret, q, episodes)


def _traced(gamma: float, c: Array, d: Array, episodes: Episodes) -> Array:
    """[N] x_t = d_t + gamma c_{t+1} x_{t+1}."""
    xp = ops_of(d).xp
    c = xp.astype(c, d.dtype, copy=False)
    later = next_values(c, xp.zeros_like(c[:episodes.n_episodes]), episodes)
    return reverse_recurrence(gamma * later, d, episodes.offsets)


def _retrace_of_values(how: Retrace, ratio: Array, episodes: Episodes) -> Estimate:
    delta, v = differences(how, episodes)
    x = _traced(how.gamma, _trace(how, ratio, episodes), delta, episodes)
    return estimate_of(how, x, v + ops_of(v).xp.astype(ratio, v.dtype, copy=False) * x, v, episodes)


def _retrace_of_action_values(how: Retrace, ratio: Array, episodes: Episodes) -> Estimate:
    return _from_action_values(how, _trace(how, ratio, episodes), episodes)


def _trace(how: Retrace, ratio: Array, episodes: Episodes) -> Array:
    return how.lam * (at_unit_starts(ratio, how.trace_unit, episodes) if how.trace_ratio == "sum" else ratio)


SOURCES: Mapping[str, Callable[[Retrace, Array, Episodes], Estimate]] = {
    "v_only": _retrace_of_values, "q_head": _retrace_of_action_values}
"""Estimate from ratios [N] that are cut at `c_max`, by where action values come from."""
