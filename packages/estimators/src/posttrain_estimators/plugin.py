"""Declares the estimators and corrections of this package by name. Knows names and summaries, imports none of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from posttrain.hookspecs import Component, hookimpl

_GROUP = "posttrain_estimators.baselines:GroupBaseline"
_CORRECTION = "posttrain_estimators.corrections:ImportanceCorrection"


@hookimpl
def components() -> Iterable[Component]:
    """Estimators without and with a critic, off-policy ones, and corrections."""
    return (*_critic_free(), *_with_critic(), *_off_policy(), *_corrections())


def _critic_free() -> Iterable[Component]:
    return (
        Component("estimator", "reinforce", "posttrain_estimators.baselines:Reinforce",
                  "discounted reward-to-go, with an optional batch baseline and whitening",
                  source="Williams 1992, Machine Learning 8"),
        Component("estimator", "grpo", _GROUP, "outcome reward standardised within the group of one prompt",
                  source="Shao et al. 2024, arXiv 2402.03300, section 4.1.2"),
        Component("estimator", "dr_grpo", _GROUP, "outcome reward minus the mean of its group, not divided",
                  defaults={"scale": "none"}, source="Liu et al. 2025, arXiv 2503.20783"),
        Component("estimator", "rloo", _GROUP, "outcome reward minus the mean of the group's other answers",
                  defaults={"baseline": "leave_one_out", "scale": "none"},
                  source="Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740"),
        Component("estimator", "reinforce_pp", "posttrain_estimators.baselines:Reinforce",
                  "discounted reward-to-go, whitened over all actions of the batch",
                  defaults={"whiten": True, "statistics": "token"}, source="Hu et al. 2025, arXiv 2501.03262"),
        Component("estimator", "reinforce_pp_baseline", _GROUP,
                  "outcome reward minus the mean of its group, whitened over all actions of the batch",
                  defaults={"scale": "none", "whiten": True, "statistics": "token"},
                  source="Hu et al. 2025, arXiv 2501.03262"),
        Component("estimator", "opo", _GROUP, "outcome reward minus the length-weighted mean of its group",
                  defaults={"baseline": "length_weighted", "scale": "none"},
                  source="Hao et al. 2025, arXiv 2505.23585"),
        Component("estimator", "remax", "posttrain_estimators.baselines:ReMax",
                  "reward-to-go minus the reward of the greedy answer to the same prompt",
                  source="Li et al. 2023, arXiv 2310.10505, algorithm 1"),
        Component("estimator", "process", "posttrain_estimators.process:ProcessReward",
                  "step rewards standardised within the group, summed over later steps",
                  source="Shao et al. 2024, arXiv 2402.03300, section 4.1.3"),
    )


def _with_critic() -> Iterable[Component]:
    return (
        Component("estimator", "gae", "posttrain_estimators.multistep:GAE",
                  "generalised advantages and value targets from a critic",
                  source="Schulman et al. 2016, arXiv 1506.02438, equation 16"),
        Component("estimator", "td_lambda", "posttrain_estimators.multistep:TDLambda",
                  "lambda-returns as targets, minus the critic's value as advantages",
                  source="Sutton and Barto 2018, section 12.1"),
        Component("estimator", "td0", "posttrain_estimators.multistep:TDLambda",
                  "one-step temporal differences of a critic", defaults={"lam": 0.0},
                  source="Sutton 1988, Machine Learning 3"),
        Component("estimator", "monte_carlo", "posttrain_estimators.multistep:TDLambda",
                  "whole returns with a final bootstrap, minus the critic's value", defaults={"lam": 1.0},
                  source="Sutton and Barto 2018, section 5.1"),
        Component("estimator", "n_step", "posttrain_estimators.mixtures:NStep",
                  "n-step returns: fixed n, or a uniform, geometric or given mixture",
                  source="Sutton and Barto 2018, sections 7.1, 12.1 and 12.3"),
        Component("estimator", "upgo", "posttrain_estimators.mixtures:UPGO",
                  "returns that go on while actions do better than the critic expects",
                  source="Vinyals et al. 2019, Nature 575"),
    )


def _off_policy() -> Iterable[Component]:
    return (
        Component("estimator", "vtrace", "posttrain_estimators.offpolicy:VTrace",
                  "value targets and advantages from another policy's episodes, by clipped ratios",
                  source="Espeholt et al. 2018, arXiv 1802.01561, equation 1"),
        Component("estimator", "retrace", "posttrain_estimators.actionvalues:Retrace",
                  "off-policy returns with clipped traces, from a critic of states or of actions",
                  source="Munos et al. 2016, arXiv 1606.02647, equation 3"),
        Component("estimator", "tree_backup", "posttrain_estimators.actionvalues:TreeBackup",
                  "off-policy returns of an action-value head, traces by the policy's own probabilities",
                  source="Precup, Sutton and Singh 2000"),
        Component("estimator", "clipped_is", "posttrain_estimators.offpolicy:ClippedIS",
                  "advantages weighted by a truncated ratio to the sampler, per token, turn or sequence",
                  source="Ionides 2008; Hilton et al. 2021, arXiv 2110.00641"),
    )


def _corrections() -> Iterable[Component]:
    return (
        Component("correction", "tis", _CORRECTION, "importance weights pi/mu, truncated at a ceiling",
                  source="Yao et al. 2025, Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"),
        Component("correction", "icepop", _CORRECTION,
                  "importance weights per token; tokens whose ratio is out of bounds are rejected",
                  defaults={"cap": math.inf, "reject": "token", "low": 0.5, "high": 5.0},
                  source="Ring-1T, arXiv 2510.18855"),
        Component("correction", "geometric_mask", _CORRECTION,
                  "rejects sequences whose mean ratio per token is out of bounds; no weights",
                  defaults={"weight": "none", "reject": "sequence", "low": 0.99, "high": 1.01},
                  source="Liu, Li et al. 2025, When Speed Kills Stability"),
    )
