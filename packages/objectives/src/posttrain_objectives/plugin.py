"""What this package offers, as data: listing it imports neither the components nor a framework."""

from __future__ import annotations

from collections.abc import Iterable

from posttrain.hookspecs import Component, hookimpl

_POLICY_GRADIENT = "posttrain_objectives.policy_gradient:PolicyGradient"


@hookimpl
def components() -> Iterable[Component]:
    """Objectives and KL control."""
    return (*_policy_gradients(), *_other_objectives(), *_kls())


def _policy_gradients() -> Iterable[Component]:
    return (
        Component("objective", "ppo", _POLICY_GRADIENT, "clipped token ratios, mean over actions",
                  source="Schulman et al. 2017, arXiv 1707.06347, section 3"),
        Component("objective", "grpo", _POLICY_GRADIENT, "PPO's clip, mean over episodes of their means",
                  defaults={"denominator": "sequence_mean"}, source="Shao et al. 2024, arXiv 2402.03300, section 4.1"),
        Component("objective", "dapo", _POLICY_GRADIENT, "PPO with a higher upper clip, mean over actions",
                  defaults={"clip_high": 0.28}, source="Yu et al. 2025, arXiv 2503.14476, section 3"),
        Component("objective", "dr_grpo", _POLICY_GRADIENT, "PPO's clip, sum over episodes by a constant length",
                  defaults={"denominator": "constant"}, source="Liu et al. 2025, arXiv 2503.20783, section 3"),
        Component("objective", "gspo", _POLICY_GRADIENT, "one clipped ratio per episode, mean over episodes",
                  defaults={"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "denominator": "sequence_mean"},
                  source="Zheng et al. 2025, arXiv 2507.18071, token form"),
        Component("objective", "reinforce", _POLICY_GRADIENT, "plain policy gradient, -A log pi, mean over actions",
                  defaults={"surrogate": "reinforce"}, source="Williams 1992, Machine Learning 8"),
    )


def _other_objectives() -> Iterable[Component]:
    return (
        Component("objective", "sft", "posttrain_objectives.likelihood:SFT",
                  "negative log-likelihood of given answers"),
        Component("objective", "value", "posttrain_objectives.value:Value", "squared error of a critic, optional clip",
                  source="Schulman et al. 2017, arXiv 1707.06347, section 6"),
        Component("objective", "action_value", "posttrain_objectives.value:ActionValue",
                  "squared error of a critic's action values", source="Wang et al. 2017, arXiv 1611.01224"),
        Component("objective", "entropy", "posttrain_objectives.entropy:Entropy", "entropy bonus",
                  source="Williams and Peng 1991, Connection Science 3"),
    )


def _kls() -> Iterable[Component]:
    return (
        Component("kl", "fixed", "posttrain_objectives.kl:FixedKL", "constant coefficient",
                  source="estimators: Schulman 2020, Approximating KL divergence"),
        Component("kl", "adaptive", "posttrain_objectives.kl:AdaptiveKL", "coefficient that holds the KL at a target",
                  source="Ziegler et al. 2019, arXiv 1909.08593, section 2.2"),
    )
