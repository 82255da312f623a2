"""The spine: the only place where order lives.

    prompts -> rollouts -> rewards -> (older rollouts) -> what models say of them -> constraint, combiner -> advantages
            -> optimiser steps -> KL controller -> weights to sampler and reference -> metrics, checkpoint, evaluation

Everything it calls is a part chosen by the config (`Parts`) or a pure step of `steps.py` and `update.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from posttrain import reference
from posttrain.comm import Comm
from posttrain.config import RewardEntry
from posttrain.constrained import INFEASIBLE, Bound, Constrained, costs_of
from posttrain.constrained import described as described_costs
from posttrain.data import Metric, Metrics, Prompt, Rollouts, Sampling, to_numpy
from posttrain.errors import ConfigError
from posttrain.loss import REFERENCE_KL
from posttrain.off_policy import weighs
from posttrain.passes import Budget, drawn
from posttrain.protocols import (
    KL,
    Batching,
    Combiner,
    Constraint,
    Correction,
    Estimator,
    GradientCombiner,
    Learner,
    Measuring,
    Need,
    Output,
    PromptSource,
    Reporting,
    Sampler,
    Scorer,
    Tokenizer,
)
from posttrain.rewards.pool import Pool
from posttrain.rewards.scoring import score as score_rewards
from posttrain.rewards.scoring import summed
from posttrain.rundir import TIMING
from posttrain.schema import Settings
from posttrain.state import RunState, Snapshot
from posttrain.steps import (
    Annotations,
    advantages,
    described,
    episode_rewards,
    final_scores,
    has_variance,
    kl_penalty,
    known_to_sampler,
    learnable,
    measured_kl,
    needed_outputs,
    sampler_gap,
    score,
    trusted,
    with_cost,
)
from posttrain.timing import Phases
from posttrain.update import Schedule, Trained, update

log = logging.getLogger(__name__)

SUM = "reward"
"""The column that holds the weighted sum of all rewards."""
KL_COST = "kl"
"""The column that holds the KL of each action where it is a cost."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that `compose.py` built from a config."""

    tokenizer: Tokenizer
    source: PromptSource
    trained: tuple[Trained, ...]
    """The policy, and a critic where it is a model of its own."""
    critic: Scorer | None
    """What values are asked of; the policy itself where they share a trunk."""
    reference: Scorer | None
    initial: Scorer | None
    """The policy before training, where the reference moves."""
    sampler: Sampler
    evaluator: Sampler
    """Samples with the current weights; the sampler itself unless that one lags behind or approximates them."""
    rewards: tuple[RewardEntry, ...]
    workers: Pool
    """Calls the rewards; whoever built the parts enters and leaves it."""
    columns: tuple[str, ...]
    """Columns that are estimated: `("reward",)`, or every reward where columns are combined; then the costs."""
    bounds: Mapping[str, Bound]
    """What is asked of the columns that are costs."""
    constraint: Constraint[Any] | None
    estimator: Estimator
    correction: Correction | None
    combiner: Combiner[Any] | None
    gradient_combiner: GradientCombiner[Any] | None
    kl: KL[Any]
    batching: Batching
    comm: Comm
    needs: frozenset[Need]
    names: Mapping[str, str]
    """What the configuration calls the components, by key: for errors."""

    @property
    def policy(self) -> Learner:
        return self.trained[0].learner


def iterate(parts: Parts, settings: Settings, state: RunState, phases: Phases) -> tuple[RunState, Metrics, Rollouts]:
    """One iteration: the next state, what was measured, and the rollouts for a look at them."""
    step = state.step + 1
    with phases("rollout"):
        fresh, state, metrics = gather(parts, settings, state, step, phases)
    rollouts, replay = state.replay.mixed(
        fresh, step, capacity=settings.replay.capacity, reuse=settings.replay.reuse, max_age=settings.replay.max_age,
        rng=np.random.default_rng((settings.seed, step, 1)))
    state = replace(state, step=step, replay=replay)
    if not learnable(rollouts, parts.columns).any():
        log.warning("step %d: no episode is left to learn from (all groups filtered, or no reward applies); no update "
                    "is made", step)
        state, _, found = controlled(parts, state, metrics, None)
        state, moved = reference_moved(parts, settings, state, None)
        return state, metrics + found + moved, fresh
    with phases("score"):
        notes, budget = annotate(parts, rollouts, state.budget)
    rollouts, known = trusted(rollouts, notes)
    metrics += {"sampler/non_finite": Metric(float((~known).sum()), reduction="sum")}
    metrics += sampler_gap(rollouts, notes) + lag(rollouts, parts.policy.version)
    kl = kl_metrics(parts.kl, state.kl, notes, int(fresh.is_action.sum()))
    if parts.kl.placement == "constraint":
        rollouts = with_cost(rollouts, KL_COST, kl_penalty(parts.kl, 1.0, rollouts, notes), parts.columns)
    state, constrained, found = controlled(parts, state, metrics, kl.get(REFERENCE_KL))
    metrics += kl + found
    taken = {parts.kl.placement: kl_penalty(parts.kl, state.kl.coef, rollouts, notes)
             } if parts.kl.placement in ("reward", "advantage") else {}
    signal = advantages(rollouts, notes, parts.estimator, parts.columns, correction=parts.correction,
                        combiner=parts.combiner, combiner_state=state.combiner, names=parts.names,
                        constrained=constrained, penalty=taken.get("reward"))
    if "advantage" in taken:
        signal = replace(signal, advantages=signal.advantages - taken["advantage"])
    if settings.update.non_finite_logprobs == "reject":
        signal = replace(signal, keep=signal.keep & known)
    coef = {"kl": state.kl.coef, "value": settings.update.value_coef, "entropy": settings.update.entropy_coef,
            "expert_balance": settings.update.expert_balance_coef}
    schedule = Schedule(settings.update.steps_per_rollout, settings.update.epochs, (settings.seed, step, 2),
                        settings.update.max_kl)
    with phases("update"):
        updated, budget, mixing = update(
            parts.trained, rollouts, signal, notes, old_logprobs(settings, rollouts, notes), coef, schedule,
            batching=parts.batching, budget=budget, comm=parts.comm, combiner=parts.gradient_combiner,
            combiner_state=state.gradient_combiner, phase=phases)
    metrics += signal.metrics + Metrics({name: m for name, m in updated.items() if name not in kl})
    state = replace(state, budget=budget, gradient_combiner=mixing, kl=next_kl(parts.kl, state.kl, metrics, rollouts))
    with phases("sync"):
        state = synced(parts, settings, state)
        state, moved = reference_moved(parts, settings, state, metrics.get(REFERENCE_KL))
    return state, metrics + moved, fresh


def gather(parts: Parts, settings: Settings, state: RunState, step: int,
           phases: Phases) -> tuple[Rollouts, RunState, Metrics]:
    """Generate and reward, and go on in the task; where asked, drop groups without variance and draw other prompts in
    their place."""
    rollout = settings.rollout
    wanted, cursor, budget, kept, dropped = rollout.prompts_per_step, state.cursor, state.budget, [], 0
    metrics = Metrics()
    for attempt in range(1 + rollout.max_refills * rollout.filter_zero_variance):
        prompts = parts.source.take(cursor, wanted, settings.seed)
        grouped = [replace(p, group=cursor + i) for i, p in enumerate(prompts) for _ in range(rollout.group_size)]
        cursor += len(prompts)
        rollouts, budget = drawn(parts.sampler, grouped, sampling_of(settings), (settings.seed, step, attempt),
                                 parts.batching, budget)
        if isinstance(parts.sampler, Reporting):
            metrics += reported(parts.sampler.metrics())
        with phases("reward"):
            rollouts, failures = rewarded(parts, settings, rollouts)
        metrics += failures.prefixed("reward")
        metrics += described(rollouts, {SUM: "reward", **{r.name: f"reward/{r.name}" for r in parts.rewards}})
        if rollout.filter_zero_variance:
            scored = [column for column in parts.columns if column in rollouts.rewards]
            alive: np.ndarray = np.any([has_variance(rollouts, column) for column in scored], axis=0)
            dropped += int((~alive).sum()) // rollout.group_size
            rollouts = rollouts.select(np.flatnonzero(alive))
            wanted -= rollouts.n_episodes // rollout.group_size
        if Need.GREEDY_REWARDS in parts.needs:
            rollouts, failures = with_greedy(parts, settings, rollouts, (settings.seed, step, attempt, 1))
            metrics += failures.prefixed("greedy")
        kept.append(rollouts)
        if not rollout.filter_zero_variance or wanted == 0:
            break
    if rollout.filter_zero_variance:
        metrics += {"rollout/filtered_groups": Metric(dropped, reduction="sum")}
    return Rollouts.concat(kept), replace(state, cursor=cursor, budget=budget), metrics


def reported(metrics: Metrics) -> Metrics:
    """A sampler's metrics under `rollout/`, but for seconds.

    >>> reported(Metrics({"busy": Metric(1.0, 2), "timing/refresh_time": Metric(0.1)})).values_by_name()
    {'rollout/busy': 0.5, 'timing/refresh_time': 0.1}
    """
    return Metrics({name if name.startswith(TIMING) else f"rollout/{name}": x for name, x in metrics.items()})


def rewarded(parts: Parts, settings: Settings, rollouts: Rollouts) -> tuple[Rollouts, Metrics]:
    """The rollouts with every reward and their sum, and how the rewards failed."""
    scored, failures = score_rewards(rollouts, parts.rewards, parts.workers, settings.reward_workers.max_error_rate)
    return summed(scored, parts.rewards), failures


def with_greedy(parts: Parts, settings: Settings, rollouts: Rollouts,
                seed: Sequence[int]) -> tuple[Rollouts, Metrics]:
    """The rollouts with the rewards of one greedy answer to each of their prompts, and how the rewards failed. A reward
    that does not apply to the greedy answer does not apply to the others."""
    _, first, group = np.unique(rollouts.group, return_index=True, return_inverse=True)
    sampling = replace(sampling_of(settings), temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
    answers = parts.sampler.rollout([rollouts.prompts[e] for e in first], sampling, seed)
    answers, failures = rewarded(parts, settings, answers)
    totals, excluded = {}, {}
    for column in parts.columns:
        total, missing = episode_rewards(answers, column)
        totals[column], excluded[column] = total[group], rollouts.excluded[column] | missing[group]
    return replace(rollouts, greedy_rewards=totals, excluded={**rollouts.excluded, **excluded}), failures


def annotate(parts: Parts, rollouts: Rollouts, budget: Budget) -> tuple[Annotations, Budget]:
    """Ask the models for exactly what some part needs, and for log-probs where the sampler's are no numbers. Raises
    `ConfigError` where the sampler did not say what some part needs."""
    if Need.BEHAVIOR_LOGPROBS in parts.needs and rollouts.behavior_logprobs is None:
        raise ConfigError(["the engine records no log-probs, which the correction or the ratio to the sampler needs"],
                          next_step="take another rollout.engine, or train on policy: no correction, rollout.staleness "
                                    "and replay.capacity 0")
    if Need.TURN in parts.needs and rollouts.turn is None:
        raise ConfigError(["the engine records no turns, which the estimator or the correction needs"],
                          next_step="take another rollout.engine, or unit token or sequence in place of turn")
    notes = Annotations()
    wanted = needed_outputs(parts.needs) if parts.critic is parts.policy else frozenset[Output]()
    replaced = Need.BEHAVIOR_LOGPROBS in parts.needs and not known_to_sampler(rollouts).all()
    if Need.LOGPROBS in parts.needs or wanted or replaced:
        out, budget = score(parts.policy, rollouts, wanted | {Output.LOGPROBS}, parts.batching, budget,
                            "score/policy")
        notes = Annotations(out.logprobs, out.entropy).with_critic(out)
    rollouts = replace(rollouts, routes=None)  # the others have routers of their own, if any
    if parts.critic is not None and parts.critic is not parts.policy:
        out, budget = score(parts.critic, rollouts, needed_outputs(parts.needs), parts.batching, budget, "score/critic")
        notes = notes.with_critic(out)
    if parts.reference is not None and Need.REF_LOGPROBS in parts.needs:
        out, budget = score(parts.reference, rollouts, frozenset({Output.LOGPROBS}), parts.batching, budget,
                            "score/reference")
        notes = replace(notes, ref_logprobs=out.logprobs)
    if parts.initial is not None:
        out, budget = score(parts.initial, rollouts, frozenset({Output.LOGPROBS}), parts.batching, budget,
                            "score/initial")
        notes = replace(notes, initial_logprobs=out.logprobs)
    for entry in parts.rewards:
        if entry.bootstrap:
            notes = replace(notes, final_scores=final_scores(rollouts, entry.name, entry.weight, parts.columns))
    return notes, budget


def old_logprobs(settings: Settings, rollouts: Rollouts, notes: Annotations) -> np.ndarray | None:
    """[N] pi_old of the ratio; None where it equals the policy at the update, which saves a pass."""
    if ratio_to_sampler(settings):
        return rollouts.behavior_logprobs
    return notes.logprobs if optimiser_steps(settings) > 1 else None


def ratio_to_sampler(settings: Settings) -> bool:
    """Whether the ratio is taken to the sampler's own log-probs."""
    off_policy = settings.rollout.staleness > 0 or settings.replay.capacity > 0
    corrected = settings.correction is not None or weighs(settings.estimator) or weighs(settings.objective)
    automatic = off_policy and not corrected
    return {"auto": automatic, "behavior": True, "recompute": False}[settings.update.old_logprobs]


def optimiser_steps(settings: Settings) -> int:
    """Optimiser steps of one rollout."""
    return settings.update.steps_per_rollout * settings.update.epochs


def sampling_of(settings: Settings) -> Sampling:
    """How rollouts for training are drawn."""
    r = settings.rollout
    return Sampling(r.temperature, r.top_p, r.top_k, r.min_p, r.max_new_tokens, tuple(r.stop))


def kl_metrics(kl: KL[Any], state: Any, notes: Annotations, own: int) -> Metrics:
    """The coefficient that is used, and the KL where it was measured before the update, of the first `own` actions:
    those of this iteration, before what is replayed."""
    if kl.placement == "none":
        return Metrics()
    found = Metrics({"kl/coef": Metric(state.coef, reduction="last")})
    for name, other in ((REFERENCE_KL, notes.ref_logprobs), ("kl/initial", notes.initial_logprobs)):
        if notes.logprobs is not None and other is not None:
            found += {name: measured_kl(notes.logprobs[:own], other[:own])}
    return found


def next_kl(kl: KL[Any], state: Any, metrics: Mapping[str, Metric], rollouts: Rollouts) -> Any:
    """The controller's state after this rollout."""
    if kl.placement == "none" or REFERENCE_KL not in metrics:  # nothing was measured where every action was rejected
        return state
    entropy = metrics.get("policy/entropy")
    return kl.update(state, kl=metrics[REFERENCE_KL].value, n=rollouts.n_episodes,
                     **({"entropy": entropy.value} if entropy else {}))


def reference_moved(parts: Parts, settings: Settings, state: RunState,
                    kl: Metric | None) -> tuple[RunState, Metrics]:
    """The state after the reference moved, where it does. Where it is reset, the controller forgets the KL to what it
    was before."""
    how = settings.reference_update
    if not how.moves or parts.reference is None:
        return state, Metrics()
    moves = reference.due(how, state.step, kl)
    if moves:
        held = reference.follow(parts.reference, state.reference, parts.policy, parts.policy.version, how.rate)
        state = replace(state, reference=held)
    if moves and how.rate == 1:
        state = replace(state, kl=reference.restarted(parts.kl, state.kl))
    return state, Metrics({"kl/reference_moved": Metric(float(moves), reduction="sum")})


def column_means(parts: Parts, measured: Mapping[str, Metric], kl: Metric | None) -> dict[str, float]:
    """Mean of each column over all answers of this iteration to which it applies, those of dropped groups among them,
    on all ranks; without columns that apply to none. That of the KL is per action."""
    found: dict[str, float] = {}
    for column in parts.columns:
        name = "reward/mean" if column == SUM else f"reward/{column}/mean"
        metric = (kl if column == KL_COST else measured.get(name)) or Metric(0.0, 0.0)
        total, n = parts.comm.sum(np.array([metric.total, metric.weight]))
        if n:
            found[column] = float(total / n)
    return found


def controlled(parts: Parts, state: RunState, measured: Mapping[str, Metric],
             kl: Metric | None) -> tuple[RunState, Constrained | None, Metrics]:
    """The state after constraint and combiner saw the mean rewards and costs of the policy's own answers."""
    means = column_means(parts, measured, kl)
    mixing: object = parts.combiner
    if isinstance(mixing, Measuring):
        rewards = {name: mean for name, mean in means.items() if name not in parts.bounds}
        state = replace(state, combiner=mixing.update(state.combiner, rewards))
    if parts.constraint is None:
        return state, None, Metrics()
    before, now = state.constraint, parts.constraint.update(state.constraint, costs_of(means, parts.bounds))
    for name in parts.bounds:
        if now.status[name] == INFEASIBLE != before.status[name]:
            log.warning("step %d: the limit of '%s' cannot be kept: it is still broken with its multiplier at the "
                        "largest allowed, %.3g; raise the limit, or what constraint '%s' allows", state.step, name,
                        now.multipliers[name], parts.names.get("constraint", type(parts.constraint).__name__))
    return replace(state, constraint=now), Constrained(parts.bounds, now), described_costs(means, parts.bounds, now)


def lag(rollouts: Rollouts, version: int) -> Metrics:
    """Optimiser steps between the weights that wrote an action and those that learn from it."""
    if rollouts.policy_version is None:
        return Metrics()
    behind = version - rollouts.policy_version
    return Metrics({"sampler/lag": Metric(float(behind.sum()), len(behind))})


def synced(parts: Parts, settings: Settings, state: RunState) -> RunState:
    """The state with the current weights remembered for a sampler that lags behind, and the sampler given its own."""
    if settings.rollout.staleness > 0:
        policy = parts.policy
        current = Snapshot(policy.version, {name: np.array(to_numpy(x)) for name, x in policy.params()})
        state = replace(state, stale=(*state.stale, current)[-(settings.rollout.staleness + 1):])
    resynced(parts, settings, state)
    return state


def resynced(parts: Parts, settings: Settings, state: RunState) -> None:
    """Give the sampler the weights it uses next: the current ones, or those of `staleness` iterations ago."""
    policy = parts.policy
    parts.evaluator.sync(policy.params(), policy.version)
    if state.stale:
        parts.sampler.sync(state.stale[0].params.items(), state.stale[0].version)
    elif parts.sampler is not parts.evaluator:
        parts.sampler.sync(policy.params(), policy.version)


def evaluate(parts: Parts, settings: Settings, phases: Phases) -> tuple[Metrics, Rollouts | None]:
    """Rewards of the current policy on held-out prompts."""
    prompts = held_out(parts.source, settings)
    if not prompts or not parts.rewards:
        return Metrics(), None
    sampling = replace(sampling_of(settings), temperature=settings.evaluate.temperature, top_p=1.0, top_k=0, min_p=0.0)
    with phases("evaluate"):
        rollouts = parts.evaluator.rollout(prompts, sampling, (settings.seed, 0, 3))
        rollouts, failures = rewarded(parts, settings, rollouts)
    names = {SUM: "eval/reward", **{r.name: f"eval/reward/{r.name}" for r in parts.rewards}}
    found = described(rollouts, names)
    kept = {name: m for name, m in found.items()
            if name.startswith("eval/") and (m.total or not name.endswith("/excluded"))}
    return Metrics({**kept, **failures.prefixed("eval/reward"), "eval/length": found["episode/length"]}), rollouts


def held_out(source: PromptSource, settings: Settings) -> Sequence[Prompt]:
    """The held-out prompts that are used, each a group of its own."""
    rows = source.held_out()
    limit = settings.evaluate.prompts or len(rows)
    return [replace(p, group=i) for i, p in enumerate(rows[:limit])]
