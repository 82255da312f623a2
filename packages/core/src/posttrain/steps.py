"""The pure steps of one iteration: score what was generated, fold it on the action axis, estimate, measure.

Order lives in `trainer.py`; here each step is a function of its arguments. Knows arrays and protocols, no framework.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from posttrain import answers
from posttrain.constrained import Constrained, kept_by_any
from posttrain.constrained import mixed as mixed_with_costs
from posttrain.data import (
    FINISH,
    Episodes,
    Estimate,
    Metric,
    Metrics,
    Rollouts,
    Signal,
    TokenOutputs,
    offsets_of,
    ragged_indices,
    to_numpy,
)
from posttrain.errors import RewardError
from posttrain.loss import k3
from posttrain.memory import memory_of
from posttrain.ops import ops_of
from posttrain.passes import Budget, Passes
from posttrain.protocols import KL, Batching, Combiner, Compared, Correction, Estimator, Need, Output, Scorer

ANY_REWARD = "any"
"""Column of a rollout whose rewards do not matter."""


@dataclass(frozen=True, slots=True, eq=False)
class Annotations:
    """What models said of rollouts before the update, on their action axis."""

    logprobs: np.ndarray | None = None
    """[N] pi_old"""
    entropy: np.ndarray | None = None
    """[N]"""
    ref_logprobs: np.ndarray | None = None
    """[N]"""
    initial_logprobs: np.ndarray | None = None
    """[N] of the policy before training, where the reference moves"""
    values: np.ndarray | None = None
    """[k, N]"""
    bootstrap_values: np.ndarray | None = None
    """[k, E] of states, or the mean of action values under the policy"""
    action_values: np.ndarray | None = None
    """[k, N]"""
    expected_action_values: np.ndarray | None = None
    """[k, N]"""
    final_scores: np.ndarray | None = None
    """[E]"""

    def with_critic(self, out: TokenOutputs) -> Annotations:
        """The same with what a critic said."""
        last = out.expected_bootstrap_values if out.bootstrap_values is None else out.bootstrap_values
        return replace(self, values=out.values, bootstrap_values=last, action_values=out.action_values,
                       expected_action_values=out.expected_action_values)


def score(scorer: Scorer, rollouts: Rollouts, outputs: frozenset[Output], batching: Batching, budget: Budget,
          use: str = "score") -> tuple[TokenOutputs, Budget]:
    """Outputs of all actions, computed in parts under a token budget that is smaller after memory ran out. An adapting
    planner has a budget for each `use`."""
    costs = rollouts.episode_tokens
    passes = Passes(batching, budget, use, memory_of(scorer))
    while True:
        parts, scored = list[np.ndarray](), list[TokenOutputs]()
        for part in passes.parts(costs, rollouts.group):
            with passes.measured(int(costs[part].sum())):
                scored.append(scorer.score(rollouts.select(part), outputs, rollouts.sampling.temperature))
            parts.append(part)
        if not passes.failed:
            return _in_order(rollouts, parts, scored), passes.budget
        passes.shrink(costs)


def _in_order(rollouts: Rollouts, parts: Sequence[np.ndarray], scored: Sequence[TokenOutputs]) -> TokenOutputs:
    """Undo the order of the plan."""
    order = np.concatenate(parts)
    position = np.argsort(order)
    actions = rollouts.episode_actions
    starts = offsets_of(actions[order])[:-1][position]
    by_action = ragged_indices(starts, actions)
    def joined(name: str, index: np.ndarray) -> np.ndarray | None:
        columns = [getattr(out, name) for out in scored]
        return None if columns[0] is None else np.concatenate(columns, axis=-1)[..., index]
    return TokenOutputs(
        logprobs=joined("logprobs", by_action), entropy=joined("entropy", by_action),
        reference_kl=joined("reference_kl", by_action),
        values=joined("values", by_action), bootstrap_values=joined("bootstrap_values", position),
        action_values=joined("action_values", by_action),
        expected_action_values=joined("expected_action_values", by_action),
        expected_bootstrap_values=joined("expected_bootstrap_values", position))


def folded(rollouts: Rollouts, column: np.ndarray) -> np.ndarray:
    """A reward column on tokens [M] -> on actions [N]: what stands on a tool or user token belongs to the action that
    caused it, the latest one of the same episode (Section 0.1 of the algorithm reference)."""
    token_episode = np.repeat(rollouts.episode, np.diff(rollouts.offsets))
    owner = np.cumsum(rollouts.is_action) - 1
    N = int(rollouts.is_action.sum())
    owned = (owner >= 0) & (rollouts.action_episode[np.maximum(owner, 0)] == token_episode) if N else owner >= 0
    alive = rollouts.episode_actions[token_episode] > 0
    stray = np.flatnonzero(~owned & alive & (column != 0))
    if len(stray):
        e = token_episode[stray[0]]
        raise RewardError(f"episode {e} ({rollouts.prompts[e].where or 'no location'}) has a reward before its first "
                          "action, which no action can have caused; place it on a later token")
    return np.bincount(owner[owned], column[owned], minlength=N)


def episodes_of(rollouts: Rollouts, column: str, notes: Annotations, row: int = 0,
                penalty: np.ndarray | None = None) -> tuple[Episodes, np.ndarray]:
    """The action axis of one reward column, and the indices [N'] of its actions in the rollouts.

    Left out: episodes without an action, and those to which the reward does not apply. `row` picks the value output;
    `penalty` [N] is taken from the reward of each action.
    """
    actions = rollouts.episode_actions
    excluded = rollouts.excluded.get(column, np.zeros(rollouts.n_episodes, bool))
    alive = np.flatnonzero((actions > 0) & ~excluded)
    chosen = ragged_indices(offsets_of(actions)[alive], actions[alive])
    rewards = folded(rollouts, rollouts.rewards[column])
    if penalty is not None:
        rewards = rewards - penalty
    def picked(x: np.ndarray | None, which: np.ndarray = chosen) -> np.ndarray | None:
        return None if x is None else np.asarray(x[which], np.float64)
    def of_row(x: np.ndarray | None) -> np.ndarray | None:
        return None if x is None else x[row]
    return Episodes(
        offsets=offsets_of(actions[alive]), rewards=rewards[chosen], terminated=rollouts.terminated[alive],
        group=rollouts.group[alive], values=picked(of_row(notes.values)),
        bootstrap_values=picked(of_row(notes.bootstrap_values), alive),
        action_values=picked(of_row(notes.action_values)),
        expected_action_values=picked(of_row(notes.expected_action_values)),
        final_scores=picked(notes.final_scores, alive),
        greedy_rewards=picked(rollouts.greedy_rewards.get(column), alive), logprobs=picked(notes.logprobs),
        behavior_logprobs=picked(rollouts.behavior_logprobs), ref_logprobs=picked(notes.ref_logprobs),
        turn=None if rollouts.turn is None else rollouts.turn[chosen]), chosen


def advantages(rollouts: Rollouts, notes: Annotations, estimator: Estimator, columns: Sequence[str], *,
               correction: Correction | None = None, combiner: Combiner[Any] | None = None, combiner_state: Any = None,
               names: Mapping[str, str] = MappingProxyType({}), penalty: np.ndarray | None = None,
               constrained: Constrained | None = None) -> Signal:
    """Run the estimator once per column, combine or stack rewards, mix costs in, and correct for the sampler.

    Several columns without a combiner give one row of advantages per column, for gradients to be combined. Those of
    `constrained` are costs; `penalty` is taken from rewards alone. `names` are what the configuration calls the
    components, by kind. Raises `PluginError` for a wrong answer of one.
    """
    bounds = {} if constrained is None else constrained.bounds
    estimates = {}
    who = answers.title("estimator", estimator, names)
    for row, column in enumerate(columns):
        episodes, chosen = episodes_of(rollouts, column, notes, row if len(columns) > 1 else 0,
                                       None if column in bounds else penalty)
        estimate = answers.estimate(who, answers.asked(who, estimator, (episodes,), "needs", episodes),
                                    episodes.n_episodes, len(chosen), _place(rollouts, chosen))
        critic = notes.values if notes.values is not None else notes.action_values
        now = np.zeros(int(rollouts.is_action.sum())) if critic is None else critic[row if len(columns) > 1 else 0]
        estimates[column] = _on_all_actions(estimate, chosen, now)
    targets = [e.targets for e in estimates.values() if e.targets is not None]
    keep = kept_by_any(estimates.values())
    metrics = Metrics()
    for column, estimate in estimates.items():
        metrics += estimate.metrics.prefixed(column) if len(columns) > 1 else estimate.metrics
    rewards = {column: estimate for column, estimate in estimates.items() if column not in bounds}
    if combiner is not None:
        who, everything = answers.title("combiner", combiner, names), np.arange(len(keep))
        mixed = answers.estimate(who, combiner.combine(rewards, combiner_state), rollouts.n_episodes, len(keep),
                                 _place(rollouts, everything), indexable=False)
        mixed = replace(mixed, keep=kept_by_any(rewards.values()) if mixed.keep is None else mixed.keep)
        metrics += mixed.metrics
    else:
        stacked = np.stack([e.advantages for e in rewards.values()])
        mixed = Estimate(stacked[0] if len(rewards) == 1 else stacked, keep=kept_by_any(rewards.values()))
    if constrained is not None:
        mixed = mixed_with_costs(mixed, {column: estimates[column] for column in bounds}, bounds,
                                 constrained.state)
        metrics += mixed.metrics
    rows, keep = mixed.advantages, to_numpy(mixed.keep).copy()
    weight = np.ones(len(keep))
    if correction is not None:
        episodes, chosen = episodes_of(_without_rewards(rollouts, columns), ANY_REWARD, notes)
        who = answers.title("correction", correction, names)
        corrected = answers.corrected(who, answers.asked(who, correction, (episodes,), "needs", episodes),
                                      episodes.n_episodes, len(chosen), _place(rollouts, chosen))
        weight[chosen] = to_numpy(corrected.weight)
        keep[chosen] &= to_numpy(corrected.keep)
        metrics = metrics + corrected.metrics
    return Signal(advantages=rows, keep=keep, correction=weight, metrics=metrics,
                  targets=np.stack(targets) if targets else None)


def _place(rollouts: Rollouts, chosen: np.ndarray) -> answers.Place:
    """Where the i-th of some actions comes from: its episode, and the row of the episode's prompt."""
    def place(i: int) -> str:
        e = int(rollouts.action_episode[chosen[i]])
        row = rollouts.prompts[e].where
        return f"episode {e}, row {row}" if row else f"episode {e}"
    return place


def _without_rewards(rollouts: Rollouts, columns: Sequence[str]) -> Rollouts:
    """The same episodes for a correction, which reads log-probs and never rewards: all to which some reward applies."""
    nowhere = np.zeros(rollouts.n_episodes, bool)
    excluded = np.logical_and.reduce([rollouts.excluded.get(column, nowhere) for column in columns])
    return replace(rollouts, rewards={ANY_REWARD: np.zeros(len(rollouts.tokens))}, excluded={ANY_REWARD: excluded})


def _on_all_actions(estimate: Estimate, chosen: np.ndarray, values: np.ndarray) -> Estimate:
    """An estimate of some actions on the axis of all: the others get advantage 0, what the critic says now as target,
    and are out. Another column may keep them, and then the critic of this one has nothing to learn there."""
    def spread(x: Any, others: np.ndarray) -> np.ndarray:
        full = others.copy()
        full[chosen] = x
        return full
    nothing = np.zeros(len(values))
    return replace(
        estimate, advantages=spread(to_numpy(estimate.advantages), nothing),
        targets=None if estimate.targets is None else spread(
            to_numpy(estimate.targets), np.asarray(values, np.float64)),
        keep=spread(True if estimate.keep is None else to_numpy(estimate.keep), nothing.astype(np.bool_)))


def kl_penalty(kl: KL[Any], coef: float, rollouts: Rollouts, notes: Annotations) -> np.ndarray:
    """[N] what a KL takes from the reward of each action, or from its advantage."""
    logprobs = np.asarray(notes.logprobs, np.float64)
    compared = Compared(np.asarray(notes.ref_logprobs, np.float64), rollouts.action_episode,
                        np.maximum(rollouts.episode_actions, 1))
    return coef * np.asarray(kl.divergence(ops_of(logprobs), logprobs, compared))


def with_cost(rollouts: Rollouts, name: str, cost: np.ndarray, columns: Sequence[str]) -> Rollouts:
    """The rollouts with a column that holds the cost [N] of each action above the mean of all: the gradient of a mean
    per action, where a sum would make episodes short. It applies where some other of `columns` does."""
    column = np.zeros(len(rollouts.tokens))
    column[rollouts.source] = cost - cost.mean()
    excluded: np.ndarray = np.all([rollouts.excluded[c] for c in columns if c != name], axis=0)
    return replace(rollouts, rewards={**rollouts.rewards, name: column},
                   excluded={**rollouts.excluded, name: excluded})


def measured_kl(logprobs: np.ndarray, other: np.ndarray) -> Metric:
    """KL(policy || other) per action, by k3, from the log-probs [N] of both."""
    d = np.asarray(other, np.float64) - np.asarray(logprobs, np.float64)
    return Metric(float(np.sum(k3(np, d))), len(d))


def needed_outputs(needs: frozenset[Need]) -> frozenset[Output]:
    """What the critic must be asked for."""
    return frozenset(output for need, outputs in _OF_CRITIC.items() if need in needs for output in outputs)


_OF_CRITIC: Mapping[Need, tuple[Output, ...]] = {
    Need.VALUES: (Output.VALUES, Output.BOOTSTRAP_VALUES),
    Need.ACTION_VALUES: (Output.ACTION_VALUES, Output.EXPECTED_ACTION_VALUES)}


def learnable(rollouts: Rollouts, columns: Sequence[str]) -> np.ndarray:
    """[E] whether an episode has an action and, in some of the columns, a reward that applies to it."""
    applies = ~np.all([rollouts.excluded[column] for column in columns if column in rollouts.excluded], axis=0)
    mask: np.ndarray = applies & (rollouts.episode_actions > 0)
    return mask


def final_scores(rollouts: Rollouts, column: str, weight: float, columns: Sequence[str]) -> np.ndarray:
    """[E] weighted score that a reward gives to truncated episodes; 0 for those that terminated. Raises `RewardError`
    for a truncated one to which it does not apply and from which some of `columns` would be learned."""
    totals, excluded = episode_rewards(rollouts, column)
    missing = np.flatnonzero(excluded & ~rollouts.terminated & learnable(rollouts, columns))
    if len(missing):
        where = rollouts.prompts[missing[0]].where or f"number {missing[0]} of the step"
        raise RewardError(f"reward '{column}' gives no score to a truncated episode (row {where}), and with "
                          "bootstrap: true the estimator continues with it; let it score unfinished answers, too")
    return np.where(rollouts.terminated | excluded, 0.0, weight * totals)


def known_to_sampler(rollouts: Rollouts) -> np.ndarray:
    """[N] whether the sampler's log-prob, where it records any, is a finite number."""
    mu = rollouts.behavior_logprobs
    known: np.ndarray = np.ones(int(rollouts.is_action.sum()), bool) if mu is None else np.isfinite(mu)
    return known


def trusted(rollouts: Rollouts, notes: Annotations) -> tuple[Rollouts, np.ndarray]:
    """The rollouts with every sampler's log-prob that is no finite number replaced by the trainer's (ratio 1; 0 where
    nobody asked for them), and [N] bool, where nothing had to be replaced."""
    mu, known = rollouts.behavior_logprobs, known_to_sampler(rollouts)
    if mu is None or known.all():
        return rollouts, known
    pi = np.zeros_like(mu) if notes.logprobs is None else np.asarray(notes.logprobs, mu.dtype)
    return replace(rollouts, behavior_logprobs=np.where(known, mu, pi)), known


def has_variance(rollouts: Rollouts, column: str) -> np.ndarray:
    """[E] whether the episode's group holds different rewards."""
    totals, excluded = episode_rewards(rollouts, column)
    group = np.unique(rollouts.group, return_inverse=True)[1]
    low, high = np.full(group.max(initial=-1) + 1, np.inf), np.full(group.max(initial=-1) + 1, -np.inf)
    np.minimum.at(low, group[~excluded], totals[~excluded])
    np.maximum.at(high, group[~excluded], totals[~excluded])
    return (high > low)[group]


def episode_rewards(rollouts: Rollouts, column: str) -> tuple[np.ndarray, np.ndarray]:
    """[E] total reward of each episode, and [E] bool where the reward does not apply."""
    token_episode = np.repeat(rollouts.episode, np.diff(rollouts.offsets))
    totals = np.bincount(token_episode, rollouts.rewards[column], minlength=rollouts.n_episodes)
    return totals, rollouts.excluded.get(column, np.zeros(rollouts.n_episodes, bool))


def described(rollouts: Rollouts, columns: Mapping[str, str]) -> Metrics:
    """Metrics of a rollout: rewards (column -> metric prefix), lengths, why episodes ended, groups without variance."""
    found = Metrics()
    for column, prefix in columns.items():
        totals, excluded = episode_rewards(rollouts, column)
        applicable = totals[~excluded]
        n = len(applicable)
        found += {f"{prefix}/mean": Metric(float(applicable.sum()), n),
                  f"{prefix}/std": Metric(float(applicable.std()) if n else float("nan"), reduction="last"),
                  f"{prefix}/excluded": Metric(float(excluded.sum()), reduction="sum")}
    lengths = rollouts.episode_actions
    E = rollouts.n_episodes
    found += {"episode/length": Metric(float(lengths.sum()), E),
              "episode/longest": Metric(float(lengths.max(initial=0)), reduction="max"),
              "episode/empty": Metric(float((lengths == 0).sum()), reduction="sum"),
              **{f"finish/{why}": Metric(float((rollouts.finish == code).sum()), E)
                 for code, why in enumerate(FINISH) if (rollouts.finish == code).any()}}
    return found


def sampler_gap(rollouts: Rollouts, notes: Annotations) -> Metrics:
    """How far the sampler's recorded log-probs are from the trainer's of the same tokens."""
    if notes.logprobs is None or rollouts.behavior_logprobs is None:
        return Metrics()
    gap = np.asarray(notes.logprobs, np.float64) - rollouts.behavior_logprobs
    N = len(gap)
    return Metrics({"sampler/gap": Metric(float(np.abs(gap).sum()), N),
                    "sampler/gap_max": Metric(float(np.abs(gap).max(initial=0.0)), reduction="max"),
                    "sampler/k3": Metric(float(np.sum(k3(np, gap))), N)})
