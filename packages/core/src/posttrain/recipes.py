"""Recipes: named sets of config defaults that choose estimator, objective and KL so that they fit together.

`recipe: grpo` in a configuration puts one below everything the user writes. Plain data: names of components and values
of keys, nothing else is known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Recipe:
    """Defaults of a configuration, and where they come from."""

    summary: str
    source: str
    settings: Mapping[str, Any]


RECIPES: Mapping[str, Recipe] = {
    "reinforce": Recipe(
        "policy gradient of the reward-to-go, no critic and no clipping",
        "Williams 1992, Machine Learning 8",
        {"estimator": "reinforce", "objective": "reinforce", "kl": "none"}),
    "grpo": Recipe(
        "rewards standardised within the answers to one prompt, PPO's clip, KL in the loss",
        "Shao et al. 2024, arXiv 2402.03300, section 4.1 (KL coefficient 0.04, estimator k3)",
        {"estimator": "grpo", "objective": "grpo",
         "kl": {"use": "fixed", "coef": 0.04, "placement": "loss", "estimator": "k3"}}),
    "dr_grpo": Recipe(
        "GRPO without its two biases: no division by the group's deviation nor by the answer's length, no KL",
        "Liu et al. 2025, arXiv 2503.20783",
        {"estimator": "dr_grpo", "objective": {"use": "dr_grpo", "length": "${rollout.max_new_tokens}"},
         "kl": "none"}),
    "rloo": Recipe(
        "policy gradient with the mean of the other answers as baseline, KL in the reward",
        "Ahmadian et al. 2024, arXiv 2402.14740; Kool et al. 2019",
        {"estimator": "rloo", "objective": "reinforce", "kl": {"use": "fixed", "placement": "reward"}}),
    "ppo": Recipe(
        "critic on the policy's trunk, GAE, four passes with clipped ratios, adaptive KL in the reward",
        "Schulman et al. 2017, arXiv 1707.06347; Ziegler et al. 2019, arXiv 1909.08593, section 2.2",
        {"estimator": {"use": "gae", "gamma": 1.0, "lam": 0.95, "whiten": True}, "critic": "policy", "objective": "ppo",
         "kl": {"use": "adaptive", "placement": "reward"}, "update": {"epochs": 4}}),
    "dapo": Recipe(
        "GRPO with a higher upper clip, a mean over tokens, groups of equal rewards drawn anew, no KL",
        "Yu et al. 2025, arXiv 2503.14476, section 3 (16 optimiser steps per rollout of 8,192 episodes there)",
        {"estimator": "grpo", "objective": "dapo", "kl": "none", "rollout": {"filter_zero_variance": True},
         "update": {"steps_per_rollout": 4}}),
    "gspo": Recipe(
        "one clipped ratio per answer in place of one per token, group-standardised rewards, no KL",
        "Zheng et al. 2025, arXiv 2507.18071, section 5 (four minibatches per rollout)",
        {"estimator": "grpo", "objective": "gspo", "kl": "none", "update": {"steps_per_rollout": 4}}),
    "sft": Recipe(
        "supervised training on given answers",
        "negative log-likelihood, mean over the answers' tokens",
        {"loop": "supervised", "objective": "sft", "kl": "none"}),
    "dpo": Recipe(
        "supervised training on pairs: preferred answers made likelier than rejected ones, relative to the start",
        "Rafailov et al. 2023, arXiv 2305.18290 (beta 0.1)",
        {"loop": "supervised", "objective": "dpo", "kl": "none"}),
    "reward_model": Recipe(
        "supervised training on pairs: a score that is higher for preferred answers than for rejected ones",
        "Bradley and Terry 1952, Biometrika 39; Ouyang et al. 2022, arXiv 2203.02155, section 3.5",
        {"loop": "supervised", "objective": "bradley_terry", "kl": "none"}),
}
