"""From a config to the parts of a run: tokenizer, rows, models, sampler, loaded in this order after `fitting.py` found
nothing wrong. Core's only room that puts parts together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from posttrain.comm import SingleProcess
from posttrain.config import SHARED_CRITIC, Loaded
from posttrain.constrained import limits_of
from posttrain.errors import ConfigError
from posttrain.fitting import (
    bounds_of,
    check,
    estimated_columns,
    name_of,
    needs_of,
    reward_columns,
    scores_answers,
    uncorrected,
)
from posttrain.loss import ExpertBalance, KLTerm, Measured, Sum, over_vocabulary
from posttrain.off_policy import approximates
from posttrain.passes import first_budget
from posttrain.progress import doing
from posttrain.protocols import (
    Adapted,
    Comparing,
    Learner,
    LoadRequest,
    Need,
    Objective,
    Optimization,
    Output,
    PromptSource,
    Sampler,
    Scorer,
    Tokenizer,
)
from posttrain.registry import Registry
from posttrain.rewards.pool import Pool
from posttrain.schema import Settings
from posttrain.state import RunState
from posttrain.supervised import Mute, answers_of, require_answers
from posttrain.trainer import Parts, optimiser_steps, sampling_of
from posttrain.update import Trained

log = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 2**16
"""Rows that are in memory together while all are looked at."""


def objective_of(settings: Settings, registry: Registry) -> Sum:
    """The policy's whole loss."""
    if settings.loop == "supervised":
        return Sum((settings.objective,))
    objective: Objective = settings.objective
    if settings.gradient_combiner is not None:
        objective = replace(objective, slots=reward_columns(settings))  # type: ignore[type-var]  # components are dataclasses
    parts: list[Objective] = [objective]
    if settings.kl.placement == "loss":
        parts.append(KLTerm(settings.kl))
    if settings.critic == SHARED_CRITIC:
        parts.append(settings.value_objective)
    if settings.update.entropy_coef:
        parts.append(registry.create("objective", "entropy"))
    if settings.update.expert_balance_coef:
        parts.append(ExpertBalance())
    measured_before = Need.LOGPROBS in needs_of(settings)  # then the KL is measured once, before the update
    by_sampling = settings.kl.placement != "none" and not over_vocabulary(settings.kl)
    return Sum((*parts, Measured(reference=by_sampling and not measured_before)))


def optimization_of(settings: Settings, block: Optimization) -> Optimization:
    """The optimiser block with the length of the schedule filled in."""
    steps = settings.steps * (optimiser_steps(settings) if settings.loop == "rl" else 1)
    return block if block.total_steps else replace(block, total_steps=steps)


def open_task(settings: Settings) -> tuple[Tokenizer, PromptSource]:
    """Tokenizer and rows; every malformed row is reported here."""
    with doing("loading the tokenizer"):
        tokenizer = settings.tokenizer.load()
    with doing("reading the rows"):
        source = settings.task.load(tokenizer, settings.data)
    if settings.loop == "supervised":
        require_answers(source, answers_of(settings.objective.needs))
    if settings.evaluate.every and not source.held_out():
        raise ConfigError(["evaluate.every asks for held-out rows, but the task holds none out; give task.held_out or "
                           "task.held_out_fraction, or set evaluate.every=0"])
    return tokenizer, source


def policy_request(settings: Settings, tokenizer: Tokenizer) -> LoadRequest:
    """What the policy's backend is asked for."""
    shared = settings.critic == SHARED_CRITIC or scores_answers(settings)
    heads = 1 if scores_answers(settings) else len(estimated_columns(settings)) if shared else 0
    of_actions = Need.ACTION_VALUES in settings.estimator.needs
    return LoadRequest(
        tokenizer.vocab_size, value_heads=0 if of_actions else heads, action_value_heads=heads if of_actions else 0,
        seed=settings.seed, threads=settings.threads, optimization=optimization_of(settings, settings.optimizer),
        comm=SingleProcess())


@contextmanager
def importing(loaded: Loaded, key: str) -> Iterator[None]:
    """For the loading of a part: says that it is under way, and turns a package that the component under `key` misses
    into a `PluginError` with the remedy."""
    component = loaded.components.get(key)
    with doing(f"loading {key}"), nullcontext() if component is None else loaded.registry.importing(component):
        yield


def reward_workers(settings: Settings) -> Pool:
    """The processes that call the rewards, not started yet."""
    block = settings.reward_workers
    return Pool(tuple(settings.rewards.values()), block.count, block.fork, settings.threads)


def references_of(loaded: Loaded, policy: Learner, request: LoadRequest) -> tuple[Scorer, Scorer | None]:
    """The model that the KL is taken to, and where that one moves, the policy as it is before training. One that moves
    in a framework of its own begins with the policy's weights, whichever it was loaded with."""
    how = loaded.settings.reference_update
    if not how.moves:
        return reference_of(loaded, policy, request), None
    if how.rate < 1 and isinstance(policy, Adapted) and policy.base() is not None:
        raise ConfigError(["reference_update.rate: a mean of two adapters' factors is no mean of what they do; use "
                           "rate: 1, or train all weights"])
    given = loaded.settings.reference
    with importing(loaded, "reference"):
        moving: Scorer = (given or loaded.settings.policy).load(replace(
            request, value_heads=0, action_value_heads=0, optimization=None))
    initial = reference_of(loaded, policy, request)
    for copy in (moving, initial) if given is not None else ():
        copy.load_params(policy.params(), policy.version)
    return moving, initial


def reference_of(loaded: Loaded, policy: Learner, request: LoadRequest) -> Scorer:
    """The model that the KL is taken to: the one that is given, else the policy before training. That is the policy
    itself without its adapter where it has one, and a second copy of its weights where all of them are trained."""
    given = loaded.settings.reference
    if given is None and isinstance(policy, Adapted) and (base := policy.base()) is not None:
        return base
    with importing(loaded, "reference"):
        reference: Scorer = (given or loaded.settings.policy).load(replace(
            request, value_heads=0, action_value_heads=0, optimization=None))
    return reference


def compare(policy: Learner, reference: Scorer) -> None:
    """Tell the policy's learner its reference. Raises `ConfigError` where it cannot be compared with it."""
    learner: object = policy
    if not isinstance(learner, Comparing):
        raise ConfigError([f"policy: a {type(policy).__name__} cannot be compared with a reference over the whole "
                           "vocabulary"], next_step="Take a KL that looks at sampled actions alone: kl.estimator=k2.")
    learner.compare_with(reference)


def require_logprobs(loaded: Loaded, policy: Scorer) -> None:
    """Raise `ConfigError` where the loaded policy is a model of values alone, which some backends load as critics and
    as reward models."""
    if Output.LOGPROBS not in policy.provides and not scores_answers(loaded.settings):
        raise ConfigError([f"policy: backend '{name_of(loaded, 'policy')}' loaded a model that gives "
                           f"{', '.join(sorted(policy.provides))} and no log-probs; it can be a critic, not a policy"],
                          next_step="Name a causal language model under policy, and this one under critic.")


def load_reward_models(loaded: Loaded, workers: Pool) -> None:
    """Load the rewards that are models into this process."""
    for i, (name, entry) in enumerate(loaded.settings.rewards.items()):
        if not callable(entry.call):
            with importing(loaded, f"rewards.{name}"):
                workers.load(i)


def build(loaded: Loaded, workers: Pool | None = None, opened: tuple[Tokenizer, PromptSource] | None = None) -> Parts:
    """Load everything. The order matters: what is cheap and often wrong comes first.

    `opened` is what `open_task` gave, where the rows were read already: to read them takes minutes where they are many.
    `workers` are already started where rewards shall load beside the models; else they start when first needed, and
    the caller closes `Parts.workers`.
    """
    check(loaded)
    settings = loaded.settings
    if uncorrected(settings):
        log.warning("answers are older than the policy that learns from them, and update.old_logprobs: recompute "
                    "leaves that uncorrected; leave it out, or add correction: tis")
    tokenizer, source = opened or open_task(settings)
    needs = needs_of(settings) if settings.loop == "rl" else settings.objective.needs
    columns = estimated_columns(settings)
    request = policy_request(settings, tokenizer)
    with importing(loaded, "policy"):
        policy = settings.policy.load(request)
    require_logprobs(loaded, policy)
    workers = workers or reward_workers(settings)
    load_reward_models(loaded, workers)
    trained = [Trained(policy, objective_of(settings, loaded.registry))]
    critic: Scorer | None = policy if settings.critic == SHARED_CRITIC else None
    if settings.critic is not None and critic is None:
        block = settings.critic_optimizer or settings.optimizer
        with importing(loaded, "critic"):
            learner = settings.critic.load(replace(
                request, value_heads=len(columns), optimization=optimization_of(settings, block)))
        trained.append(Trained(learner, Sum((settings.value_objective,)), prefix="critic/"))
        critic = learner
    over_all = settings.loop == "rl" and over_vocabulary(settings.kl)
    compared = over_all or Need.REF_LOGPROBS in needs
    reference, initial = references_of(loaded, policy, request) if compared else (None, None)
    if over_all and reference is not None:
        compare(policy, reference)
    engine = settings.rollout.engine if Output.LOGPROBS in policy.provides else Mute()
    apart = settings.rollout.staleness > 0 or approximates(engine)
    with importing(loaded, "rollout.engine"):
        evaluator = engine.start(policy, tokenizer, shared=True)
        sampler = engine.start(policy, tokenizer, shared=False) if apart else evaluator
    if settings.loop == "rl":  # a row too long for the model would otherwise stop the run when its turn comes
        with doing("checking that every prompt fits the policy"):
            check_prompts(evaluator, source, settings)
    return Parts(
        tokenizer=tokenizer, source=source, trained=tuple(trained), critic=critic, reference=reference,
        initial=initial, sampler=sampler, evaluator=evaluator, rewards=tuple(settings.rewards.values()),
        workers=workers, columns=columns, estimator=settings.estimator,
        correction=settings.correction, combiner=settings.combiner,
        gradient_combiner=settings.gradient_combiner, bounds=bounds_of(settings), constraint=settings.constraint,
        kl=settings.kl, batching=settings.batching,
        comm=request.comm, needs=needs,
        names={key: component.name for key, component in loaded.components.items()})


def check_prompts(sampler: Sampler, source: PromptSource, settings: Settings) -> None:
    """Raise one `DataError` for prompts that the model cannot answer; looks at some rows at a time."""
    sampling = sampling_of(settings)
    for start in range(0, source.rows, _ROWS_AT_A_TIME):
        sampler.check(source.take(start, min(_ROWS_AT_A_TIME, source.rows - start), settings.seed), sampling)
    held_out = source.held_out()
    for start in range(0, len(held_out), _ROWS_AT_A_TIME):
        sampler.check(held_out[start:start + _ROWS_AT_A_TIME], sampling)


def initial_state(parts: Parts, settings: Settings) -> RunState:
    """The state before the first step."""
    rewards = reward_columns(settings)
    return RunState(
        budget=first_budget(parts.batching), kl=parts.kl.init(),
        combiner=None if parts.combiner is None else parts.combiner.init(rewards),
        gradient_combiner=None if parts.gradient_combiner is None else parts.gradient_combiner.init(rewards),
        constraint=None if parts.constraint is None else parts.constraint.init(limits_of(parts.bounds)),
        limits=limits_of(parts.bounds))
