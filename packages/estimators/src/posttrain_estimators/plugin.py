"""Declares the estimators of this package by name. Knows names and summaries, imports none of them."""

from __future__ import annotations

from posttrain.hookspecs import Component, hookimpl

_GROUP = "posttrain_estimators.baselines:GroupBaseline"


@hookimpl
def components() -> list[Component]:
    return [
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
        Component("estimator", "gae", "posttrain_estimators.multistep:GAE",
                  "generalised advantages and value targets from a critic",
                  source="Schulman et al. 2016, arXiv 1506.02438, equation 16"),
    ]
