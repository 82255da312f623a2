"""Whether the parts of a configuration fit together: what each needs is provided, and nothing is done twice or not at
all. Reads the configuration alone and loads nothing; `compose.py` loads what fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any, TypeGuard

from posttrain.annotations import dotted
from posttrain.config import SHARED_CRITIC, Loaded
from posttrain.constrained import Bound, limits_of
from posttrain.errors import ConfigError, PluginError, PosttrainError, Problem
from posttrain.layers import slots
from posttrain.loss import over_vocabulary
from posttrain.off_policy import weighs
from posttrain.protocols import Frozen, Limited, Need, OffPolicy, Output, Selective
from posttrain.registry import Registry
from posttrain.schema import Settings
from posttrain.shape import PROTOCOLS, misshapen
from posttrain.supervised import PROVIDED
from posttrain.trainer import KL_COST, SUM, optimiser_steps, ratio_to_sampler, sampling_of

_FOR_ESTIMATORS = frozenset({Need.VALUES, Need.ACTION_VALUES, Need.FINAL_SCORES, Need.GREEDY_REWARDS})
"""Columns that another part finds only where the estimator asks for them, too."""


def reward_columns(settings: Settings) -> tuple[str, ...]:
    """The columns of rewards that are estimated one by one."""
    several = settings.combiner is not None or settings.gradient_combiner is not None
    return tuple(name for name, entry in settings.rewards.items()
                 if not entry.bootstrap and entry.bound is None) if several else (SUM,)


def estimated_columns(settings: Settings) -> tuple[str, ...]:
    """The columns for which the estimator runs: rewards, then costs."""
    return (*reward_columns(settings), *bounds_of(settings))


def bounds_of(settings: Settings) -> dict[str, Bound]:
    """The columns that are costs, and what is asked of them."""
    costs = {name: entry.bound for name, entry in settings.rewards.items() if entry.bound is not None}
    kl: object = settings.kl
    limited = settings.kl.placement == "constraint" and isinstance(kl, Limited)
    return costs | ({KL_COST: Bound(at_most=settings.kl.at_most)} if limited else {})


def needs_of(settings: Settings) -> frozenset[Need]:
    """Batch columns that some part of an RL run needs."""
    needs: frozenset[Need] = settings.estimator.needs | settings.objective.needs
    if settings.correction is not None:
        needs |= settings.correction.needs
    if settings.kl.placement != "none":
        if settings.replay.capacity > 0 or not over_vocabulary(settings.kl):
            needs |= {Need.REF_LOGPROBS}
        if settings.reference_update.moves or settings.replay.capacity > 0:  # measured apart from the loss
            needs |= {Need.LOGPROBS}
    recomputed = optimiser_steps(settings) > 1 and not ratio_to_sampler(settings)
    if recomputed or settings.kl.placement in ("reward", "advantage", "constraint") or sampling_of(settings).truncates:
        needs |= {Need.LOGPROBS}
    if ratio_to_sampler(settings):
        needs |= {Need.BEHAVIOR_LOGPROBS}
    return needs


def chosen(settings: Settings) -> Iterator[tuple[str, str, Any]]:
    """Key, kind and component of every part but the rewards, which are plain functions as a rule."""
    for key, meta in slots():
        held: Any = settings
        for name in key:
            held = getattr(held, str(name))
        found = {(*key, name): part for name, part in held.items()} if meta.get("many") else {key: held}
        if meta["kind"] != "reward":
            yield from ((dotted(at), meta["kind"], part) for at, part in found.items()
                        if part is not None and part != SHARED_CRITIC)


def check_shapes(loaded: Loaded) -> None:
    """Raise `PluginError` with all in which components are not what their kind asks for."""
    problems = [replace(problem, message=f"{key} '{name_of(loaded, key)}' is no {kind}: {problem.message}")
                for key, kind, part in chosen(loaded.settings) for problem in misshapen(part, PROTOCOLS[kind])]
    if problems:
        raise PluginError(problems, "components are not what their kind asks for:" if len(problems) > 1 else "",
                          "what each kind asks for: posttrain.protocols; posttrain.testing has a contract for each")


def check(loaded: Loaded) -> None:
    """Raise `PluginError` for components without the shape of their kind, else `ConfigError` with everything that does
    not fit together. Loads nothing."""
    check_shapes(loaded)
    settings = loaded.settings
    problems = [Problem("task is not set; name the rows to learn from (task: {use: rows, path: data.jsonl})")
                ] if settings.task is None else []
    if SUM in settings.rewards:
        problems.append(Problem(f"rewards.{SUM}: the sum of all rewards has that name; choose another"))
    problems += _check_trained(settings)
    problems += _check_engine(loaded)
    problems += _check_rl(loaded) if settings.loop == "rl" else _check_supervised(loaded)
    if problems:
        raise ConfigError(problems, "the configuration does not fit together:" if len(problems) > 1 else "")


def _check_trained(settings: Settings) -> list[Problem]:
    """What is trained can be."""
    trained = {"policy": settings.policy, "critic": settings.critic}
    return [Problem(f"{key}.{part.frozen}") for key, part in trained.items() if _is_frozen(part)]


def _is_frozen(part: object) -> TypeGuard[Frozen]:
    return isinstance(part, Frozen) and bool(part.frozen)


def _check_supervised(loaded: Loaded) -> list[Problem]:
    """Nothing is asked of the loop that it cannot give, and nothing is said that it would not read."""
    settings, problems, objective = loaded.settings, [], f"objective '{name_of(loaded, 'objective')}'"
    if missing := settings.objective.needs - PROVIDED:
        problems.append(Problem(f"loop: supervised cannot train {objective}, which needs "
                                f"{', '.join(sorted(missing))}; choose objective: sft, dpo or bradley_terry, or "
                                "loop: rl"))
    of_rl = {"reference_update": settings.reference_update.moves, "kl": settings.kl.placement != "none",
             "stop.kl": settings.stop.kl > 0, "update.max_kl": settings.update.max_kl > 0,
             "update.expert_balance_coef": settings.update.expert_balance_coef > 0,
             "constraint": settings.constraint is not None or bool(bounds_of(settings))}
    problems += [Problem(f"{key}: loop: supervised has no rollouts, so nothing reads it; leave it out")
                 for key, given in of_rl.items() if given]
    if scores_answers(settings) and settings.rewards:
        problems.append(Problem(f"rewards: {objective} trains scores of given answers, and no model that writes "
                                "answers to be rewarded; remove rewards"))
    return problems


def _is_beside_the_policy(settings: Settings) -> bool:
    """Whether a reference is given where the policy's own backend could load the copy of it."""
    return settings.reference is not None and settings.reference.framework == settings.policy.framework


def scores_answers(settings: Settings) -> bool:
    """Whether what is trained is a model of values alone: a reward model."""
    return settings.loop == "supervised" and Output.VALUES in settings.objective.outputs


def name_of(loaded: Loaded, key: str) -> str:
    """What the configuration calls the component under a key."""
    return loaded.components[key].name if key in loaded.components else key


def _check_rl(loaded: Loaded) -> list[Problem]:
    settings, problems = loaded.settings, []
    if not settings.rewards:
        problems.append(Problem("rewards is empty; name at least one, for example rewards: {correct: exact_match}"))
    if Need.ADVANTAGES not in settings.objective.needs:
        problems.append(Problem(f"objective '{name_of(loaded, 'objective')}' learns from given answers; "
                                "use loop: supervised (recipe: sft, dpo or reward_model)"))
    problems += _check_critic(loaded)
    problems += _check_off_policy(loaded)
    problems += _check_final_scores(loaded)
    problems += _check_constraint(loaded)
    problems += _check_vocabulary_kl(loaded)
    if settings.combiner is not None and settings.gradient_combiner is not None:
        problems.append(Problem("combiner mixes advantages and gradient_combiner mixes gradients; choose one"))
    if settings.gradient_combiner is not None and "slots" not in {f.name for f in fields(settings.objective)}:
        problems.append(Problem(f"objective '{name_of(loaded, 'objective')}' has no field slots, so its gradients "
                                "cannot be taken per reward; use combiner, or another objective"))
    if len(reward_columns(settings)) > 1:
        problems += [Problem(f"rewards.{name}.weight is {entry.weight:g}, but each reward is estimated by itself and "
                             "mixed by the combiner; leave it out, and give weights to the combiner")
                     for name, entry in settings.rewards.items() if entry.weight != 1]
    if len(reward_columns(settings)) > 1 and settings.kl.placement == "reward":
        problems.append(Problem("kl.placement: reward would be taken from every reward column; use placement: loss"))
    if settings.gradient_combiner is not None and settings.kl.placement == "advantage":
        problems.append(Problem("kl.placement: advantage would be taken from the advantages of every reward; use "
                                "placement: loss"))
    if settings.reference_update.moves and (settings.kl.placement == "none" or _is_beside_the_policy(settings)):
        problems.append(Problem("reference_update moves the copy of the policy that the KL is taken to; set kl, and "
                                "leave reference out, or give one of another framework"))
    if settings.update.max_kl and ratio_to_sampler(settings):
        problems.append(Problem("update.max_kl measures from the policy before the update, and the ratio is to the "
                                "sampler, which is further away; add correction: tis, or leave max_kl out"))
    if settings.stop.kl and settings.kl.placement == "none":
        problems.append(Problem("stop.kl ends the run by its KL to the reference, which kl: none does not measure; use "
                                "kl: {use: fixed, coef: 0.0} to measure it alone"))
    if settings.update.max_kl and optimiser_steps(settings) == 1:
        problems.append(Problem("update.max_kl leaves out the rest of a rollout's optimiser steps, and there is one; "
                                "raise update.steps_per_rollout or update.epochs, or leave it out"))
    if settings.update.expert_balance_coef and Output.EXPERT_LOAD not in settings.policy.provides:
        problems.append(Problem(f"update.expert_balance_coef evens out the load of experts, of which backend "
                                f"'{name_of(loaded, 'policy')}' gives none; use policy: moe, or leave it out"))
    if Output.LOGPROBS not in settings.policy.provides:
        problems.append(Problem(f"backend '{name_of(loaded, 'policy')}' gives no log-probs and cannot be a policy"))
    if settings.update.steps_per_rollout > settings.rollout.prompts_per_step:
        problems.append(Problem(f"update.steps_per_rollout is {settings.update.steps_per_rollout}, but a rollout has "
                                f"only {settings.rollout.prompts_per_step} groups (rollout.prompts_per_step)"))
    if settings.replay.reuse > settings.replay.capacity:
        problems.append(Problem("replay.reuse is larger than replay.capacity; no more can be reused than is kept"))
    return problems


def _check_engine(loaded: Loaded) -> list[Problem]:
    """The engine draws from policies of the framework; one that nothing trains is refused as that."""
    engine, policy = loaded.settings.rollout.engine, loaded.settings.policy
    is_drawn_from = Output.LOGPROBS in policy.provides and not _is_frozen(policy)
    if not is_drawn_from or not isinstance(engine, Selective) or policy.framework in engine.frameworks:
        return []
    return [Problem(f"rollout.engine: '{name_of(loaded, 'rollout.engine')}' draws from policies in "
                    f"{' or '.join(sorted(engine.frameworks))}, and policy '{name_of(loaded, 'policy')}' is in "
                    f"{policy.framework}; take rollout.engine: batched, which draws in the policy's own framework")]


def _check_off_policy(loaded: Loaded) -> list[Problem]:
    """The ratio to the sampler enters the policy's loss once."""
    settings, problems, estimator = loaded.settings, [], name_of(loaded, "estimator")
    correction = settings.correction
    if correction is not None and (unmet := correction.needs & _FOR_ESTIMATORS - settings.estimator.needs):
        problems.append(Problem(f"correction '{name_of(loaded, 'correction')}' needs {', '.join(sorted(unmet))}, which "
                                f"are there only for an estimator that reads them, and '{estimator}' does not"))
    if ratio_to_sampler(settings) and correction is not None:
        problems.append(Problem("update.old_logprobs: behavior corrects for the sampler in the ratio; a correction "
                                "would do it twice"))
    problems += _check_weighing_objective(loaded)
    if not weighs(settings.estimator):
        return problems
    if ratio_to_sampler(settings):
        problems.append(Problem(f"update.old_logprobs: behavior corrects for the sampler in the ratio, and estimator "
                                f"'{estimator}' in its advantages; leave old_logprobs out"))
    if correction is not None and not (isinstance(correction, OffPolicy) and not correction.corrects_for_sampler):
        problems.append(Problem(f"estimator '{estimator}' corrects for the sampler in its advantages; correction "
                                f"'{name_of(loaded, 'correction')}' would do it twice: leave one of them out"))
    return problems


def _check_weighing_objective(loaded: Loaded) -> list[Problem]:
    """An objective that weighs by pi_old / mu itself is the only part that does."""
    settings, objective = loaded.settings, f"objective '{name_of(loaded, 'objective')}'"
    if not weighs(settings.objective):
        return []
    problems = []
    if settings.update.old_logprobs == "behavior":
        problems.append(Problem(f"update.old_logprobs: behavior takes the sampler for pi_old, and {objective} weighs "
                                "by pi_old / mu, which would then be 1; leave old_logprobs out, or use ppo"))
    if settings.correction is not None:
        problems.append(Problem(f"{objective} weighs by the ratio to the sampler itself; correction "
                                f"'{name_of(loaded, 'correction')}' would do it twice: leave one of them out"))
    if weighs(settings.estimator):
        problems.append(Problem(f"{objective} and estimator '{name_of(loaded, 'estimator')}' both weigh by the ratio "
                                "to the sampler; take objective: ppo, or another estimator"))
    return problems


def uncorrected(settings: Settings) -> bool:
    """Whether stale or replayed answers are learned from as if the policy had just written them."""
    old = settings.rollout.staleness > 0 or settings.replay.capacity > 0
    weighed = settings.correction is not None or weighs(settings.estimator) or weighs(settings.objective)
    return settings.loop == "rl" and old and not weighed and not ratio_to_sampler(settings)


def _check_final_scores(loaded: Loaded) -> list[Problem]:
    """A reward scores the ends of truncated episodes exactly where the estimator asks for it."""
    settings, estimator = loaded.settings, name_of(loaded, "estimator")
    scoring = [name for name, entry in settings.rewards.items() if entry.bootstrap]
    if scoring and len(estimated_columns(settings)) > 1:
        return [Problem(f"rewards.{scoring[0]}.bootstrap: one score cannot continue the returns of several rewards and "
                        "costs; use estimator.bootstrap: value, or a single reward")]
    if Need.FINAL_SCORES in settings.estimator.needs and len(scoring) != 1:
        return [Problem(f"estimator '{estimator}' continues truncated episodes with the score of one reward, and "
                        f"{len(scoring) or 'none'} of the rewards have bootstrap: true; give it to exactly one")]
    if scoring and Need.FINAL_SCORES not in settings.estimator.needs:
        return [Problem(f"rewards.{scoring[0]}.bootstrap: estimator '{estimator}' continues with no reward's score; "
                        "set estimator.bootstrap: score where it has that field, or leave it out")]
    return []


def _check_constraint(loaded: Loaded) -> list[Problem]:
    """A constraint is there exactly where a reward is a cost."""
    settings, bounds = loaded.settings, bounds_of(loaded.settings)
    name = next(iter(bounds), "")
    if settings.kl.placement == "constraint" and KL_COST not in bounds:
        return [Problem(f"kl '{name_of(loaded, 'kl')}' is placed in constraint and has no at_most, the largest mean KL "
                        "per action; see posttrain.protocols.Limited")]
    if settings.constraint is None:
        key = f"rewards.{name}" if name in settings.rewards else name
        return [Problem(f"{key} has a limit, and nothing keeps it; set constraint: pid_lagrangian, or another "
                        "(posttrain plugins constraint)")] if bounds else []
    if not bounds:
        return [Problem(f"constraint '{name_of(loaded, 'constraint')}' has nothing to keep; give a reward at_most or "
                        "at_least, as in rewards: {length: {use: size, at_most: 40}}")]
    problems = []
    if settings.kl.placement == "constraint" and Need.GREEDY_REWARDS in settings.estimator.needs:
        problems.append(Problem(f"estimator '{name_of(loaded, 'estimator')}' compares with greedy answers, which have "
                                "no KL; use kl: dual, or another estimator"))
    if KL_COST in settings.rewards and settings.kl.placement == "constraint":
        problems.append(Problem(f"rewards.{KL_COST}: the KL is a cost of that name; choose another"))
    if all(entry.bootstrap or entry.bound is not None for entry in settings.rewards.values()):
        problems.append(Problem("every reward is a cost, and none is left to be raised; name one without a limit"))
    if settings.gradient_combiner is not None:
        problems.append(Problem("constraint mixes advantages and gradient_combiner mixes gradients; use combiner"))
    try:
        settings.constraint.init(limits_of(bounds))
    except (ConfigError, ValueError) as error:
        problems.append(Problem(f"constraint: {error}"))
    return problems


def _check_vocabulary_kl(loaded: Loaded) -> list[Problem]:
    """A KL over the whole vocabulary is said by the policy's learner, which must be able to read the reference."""
    settings, problems = loaded.settings, []
    if not over_vocabulary(settings.kl):
        return []
    instead = "use estimator: k2 (placement: loss), which looks at sampled actions and has the same expected gradient"
    if settings.kl.placement != "loss":
        problems.append(Problem(f"kl '{name_of(loaded, 'kl')}' is over the whole vocabulary, which is there in the "
                                f"loss alone, and its placement is {settings.kl.placement}; set placement: loss"))
    if Output.REFERENCE_KL not in settings.policy.provides:
        problems.append(Problem(f"kl '{name_of(loaded, 'kl')}' is over the whole vocabulary, which backend "
                                f"'{name_of(loaded, 'policy')}' does not compare with a reference; {instead}, or "
                                "policy: torch or policy: hf"))
    elif settings.reference is not None and settings.reference.framework != settings.policy.framework:
        problems.append(Problem(f"kl '{name_of(loaded, 'kl')}' is over the whole vocabulary, and the reference is of "
                                f"{settings.reference.framework} where the policy is of {settings.policy.framework}; "
                                f"{instead}"))
    return problems


def _check_critic(loaded: Loaded) -> list[Problem]:
    """A critic is there exactly where the estimator asks for values, and is trained on what it gives."""
    settings, estimator = loaded.settings, name_of(loaded, "estimator")
    if Need.ACTION_VALUES in settings.estimator.needs:
        return _check_action_values(loaded)
    needed = Need.VALUES in settings.estimator.needs
    if needed and settings.critic is None:
        return [Problem(f"estimator '{estimator}' needs 'values'; add a critic (critic: policy) or use one of: "
                        f"{', '.join(_estimators(loaded.registry, values=False))}")]
    if settings.critic is not None and not needed:
        return [Problem(f"estimator '{estimator}' gives nothing to train a critic on; set critic: none or use one of: "
                        f"{', '.join(_estimators(loaded.registry, values=True))}")]
    if settings.critic is not None and Output.VALUES not in settings.value_objective.outputs:
        name = name_of(loaded, "value_objective")
        return [Problem(f"value_objective '{name}' trains no critic of states; use value")]
    return []


def _check_action_values(loaded: Loaded) -> list[Problem]:
    """Action values are averaged under the policy over the whole vocabulary, so the policy's own model gives them."""
    settings, problems = loaded.settings, []
    who = f"estimator '{name_of(loaded, 'estimator')}' needs 'action_values'"
    if settings.critic != SHARED_CRITIC:
        problems.append(Problem(f"{who}, from a head on the policy's trunk; set critic: policy and "
                                "value_objective: action_value"))
    elif Output.ACTION_VALUES not in settings.value_objective.outputs:
        problems.append(Problem(f"{who}, which value_objective '{name_of(loaded, 'value_objective')}' does not train; "
                                "set value_objective: action_value"))
    if Output.ACTION_VALUES not in settings.policy.provides:
        problems.append(Problem(f"{who}, which backend '{name_of(loaded, 'policy')}' does not provide; use policy: "
                                "torch or policy: hf"))
    return problems


def _estimators(registry: Registry, values: bool) -> list[str]:
    """Installed estimators that need a critic, or none; one that cannot be made without fields is no advice."""
    found = []
    for name in registry.names("estimator"):
        with suppress(PosttrainError):
            needs = registry.create("estimator", name).needs
            if bool(needs & {Need.VALUES, Need.ACTION_VALUES}) == values:
                found.append(name)
    return found
