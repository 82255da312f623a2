"""Which of our components gives what a function of another library gives, and how settings and results are read.

The conventions in which libraries differ are folded into the inputs by `tools/oracles`, and said there; what is left of
them here is a field or a difference of columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from posttrain.data import Episodes, to_numpy
from posttrain_estimators.plugin import components

Settings = Mapping[str, Any]
Reader = Callable[[Any, Episodes], Any]
"""A column from what a component says of episodes, an `Estimate` or a `Corrected`."""


def advantages(said: Any, episodes: Episodes) -> Any:
    return said.advantages


def targets(said: Any, episodes: Episodes) -> Any:
    return said.targets


def returns(said: Any, episodes: Episodes) -> Any:
    """Of the policy's own lambda or trace, where that of the targets is another."""
    return said.advantages + episodes.values


def errors(said: Any, episodes: Episodes) -> Any:
    return said.targets - episodes.values


def errors_of_action_values(said: Any, episodes: Episodes) -> Any:
    return said.targets - episodes.action_values


def weights(said: Any, episodes: Episodes) -> Any:
    return said.weight


def weights_that_stay(said: Any, episodes: Episodes) -> Any:
    """0 where rejected."""
    return to_numpy(said.weight) * to_numpy(said.keep)


def keep(said: Any, episodes: Episodes) -> Any:
    return to_numpy(said.keep).astype(np.float64)


def metric(name: str) -> Reader:
    return lambda said, episodes: np.array([said.metrics[f"correction/{name}"].value])


def same(*names: str) -> Callable[[Settings], Settings]:
    """Fields that are called what the settings are."""
    return lambda s: {name: s[name] for name in names}


@dataclass(frozen=True)
class Ours:
    """A registered component, its fields, and which of its results are to be which of the library's."""

    component: str
    fields: Callable[[Settings], Settings]
    results: Mapping[str, Reader]
    when: Callable[[Settings], bool] = lambda s: True
    """The settings that the component can have."""
    bootstrap_values: str = "bootstrap_values"
    tolerance: float = 1e-10
    """In float64, relative to the largest number of a result. Above 1e-10 where the library adds a small number to a
    divisor that ours does not."""


def built(name: str, fields: Settings) -> Any:
    """The component that is registered under a name, with its preset."""
    component = _registered()[name]
    module, _, attribute = component.target.partition(":")
    return getattr(import_module(module), attribute)(**{**component.defaults, **fields})


@cache
def _registered() -> dict[str, Any]:
    return {component.name: component for component in components()}


_LAM = same("gamma", "lam")
_GAMMA = same("gamma")
_CRITIC_OF_ACTIONS = "expected_bootstrap_values"
_COUNTS_1e8 = 1e-9
"""verl divides by a count of actions plus 1e-8."""
_MEAN_1e8 = 1e-6
"""verl divides weights by their mean plus 1e-8, and squares them."""


def _retrace(s: Settings) -> dict[str, Any]:
    return {"gamma": s["gamma"], "lam": s["lam"], "c_max": s["c_max"], "trace_unit": s["unit"]}


def _vtrace(s: Settings) -> dict[str, Any]:
    return {"gamma": s["gamma"], "lam": s["lam"], "rho_max": s["rho_max"], "trace_unit": s["unit"]}


def _leaky(s: Settings) -> dict[str, Any]:
    return {"gamma": s["gamma"], "lam": s["lam"], "rho_max": s["rho_max"], "leak": s["alpha"]}


def _uncut(s: Settings) -> dict[str, Any]:
    """All leak is no ceiling."""
    return {"gamma": s["gamma"], "lam": s["lam"], "rho_max": math.inf, "c_max": math.inf}


def _longest(s: Settings) -> bool:
    """n behind the end of every episode, which has 21 actions at most."""
    return bool(s["n"] > 21)


_TD_LAMBDA_RETURNS = (
    Ours("td_lambda", _LAM, {"returns": targets}),
    Ours("gae", _LAM, {"returns": targets}),
    Ours("td0", _GAMMA, {"returns": targets}, when=lambda s: s["lam"] == 0.0),
    Ours("monte_carlo", _GAMMA, {"returns": targets}, when=lambda s: s["lam"] == 1.0))
_GAE = {"advantages": advantages, "returns": targets}

RLAX: Mapping[str, tuple[Ours, ...]] = {
    "lambda_returns": (
        *_TD_LAMBDA_RETURNS,
        Ours("gae", lambda s: {"gamma": s["gamma"], "lam": 0.3, "lam_critic": s["lam"]}, {"returns": targets}),
        Ours("upgo", lambda s: {"gamma": s["gamma"], "lam_critic": s["lam"]}, {"returns": targets})),
    "lambda_returns_by_state": (Ours("upgo", _GAMMA, {"returns": returns}),),
    "n_step_bootstrapped_returns": (
        Ours("n_step", same("gamma", "n"), {"returns": targets}, when=lambda s: s["lam"] == 1.0),
        Ours("n_step", lambda s: {"mixture": "geometric", **s}, {"returns": targets}),
        Ours("td_lambda", _LAM, {"returns": targets}, when=_longest)),
    "mixed_n_step_bootstrapped_returns": (
        Ours("n_step", lambda s: {"gamma": s["gamma"], "mixture": "given", "weights": tuple(s["weights"])},
             {"returns": targets}),
        Ours("n_step", lambda s: {"gamma": s["gamma"], "mixture": "uniform", "n": len(s["weights"])},
             {"returns": targets}, when=lambda s: len(set(s["weights"])) == 1)),
    "discounted_returns": (Ours("monte_carlo", _GAMMA, {"returns": targets}),),
    "discounted_rewards": (
        Ours("reinforce", _GAMMA, {"returns": advantages}),
        Ours("monte_carlo", lambda s: {"gamma": s["gamma"], "truncation": "terminal"}, {"returns": targets})),
    "truncated_gae": (
        Ours("gae", _LAM, {"advantages": advantages}), Ours("td_lambda", _LAM, {"advantages": advantages})),
    "truncated_gae_by_length": (
        Ours("gae", lambda s: {"gamma": s["gamma"], "length_adaptive": s["alpha"], "lam_min": s["lam_min"]},
             {"advantages": advantages}),),
    "vtrace": (Ours("vtrace", _vtrace, {"errors": errors}),),
    "vtrace_td_error_and_advantage": (
        Ours("vtrace", _vtrace, {"errors": errors, "advantages": advantages}),
        Ours("vtrace", lambda s: _vtrace(s) | {"weighted": False}, {"errors": errors, "q": returns}),
        Ours("vtrace", lambda s: _vtrace(s) | {"pg_bootstrap": "vs"}, {"advantages": advantages},
             when=lambda s: s["lam"] == 1.0)),
    "leaky_vtrace": (
        Ours("vtrace", _leaky, {"errors": errors}),
        Ours("vtrace", _uncut, {"errors": errors}, when=lambda s: s["alpha"] == 0.0)),
    "leaky_vtrace_td_error_and_advantage": (
        Ours("vtrace", _leaky, {"errors": errors, "advantages": advantages}),
        Ours("vtrace", _uncut, {"errors": errors, "advantages": advantages}, when=lambda s: s["alpha"] == 0.0)),
    "retrace": (
        Ours("retrace", lambda s: {"q": "q_head", **s}, {"errors": errors_of_action_values},
             bootstrap_values=_CRITIC_OF_ACTIONS),),
    "general_off_policy_returns_from_q_and_v": (
        Ours("retrace", lambda s: _retrace(s) | {"q": "q_head"}, {"returns": targets},
             bootstrap_values=_CRITIC_OF_ACTIONS),),
    "general_off_policy_returns_of_states": (
        Ours("retrace", lambda s: _retrace(s) | {"q": "v_only"}, {"returns": returns}),),
    "general_off_policy_returns_from_action_values": (
        Ours("tree_backup", _LAM, {"returns": targets}, bootstrap_values=_CRITIC_OF_ACTIONS),),
}

TORCHRL: Mapping[str, tuple[Ours, ...]] = {
    "generalized_advantage_estimate": (Ours("gae", _LAM, _GAE), Ours("td_lambda", _LAM, _GAE)),
    "vec_generalized_advantage_estimate": (Ours("gae", _LAM, _GAE),),
    "td_lambda_return_estimate": _TD_LAMBDA_RETURNS,
    "td_lambda_advantage_estimate": (Ours("td_lambda", _LAM, {"advantages": advantages}),),
    "vec_td_lambda_return_estimate": (Ours("td_lambda", _LAM, {"returns": targets}),),
    "td0_return_estimate": (Ours("td0", _GAMMA, _GAE), Ours("n_step", lambda s: {"n": 1, **s}, _GAE)),
    "td1_return_estimate": (Ours("monte_carlo", _GAMMA, _GAE), Ours("n_step", lambda s: {"n": 21, **s}, _GAE)),
    "vec_td1_return_estimate": (Ours("monte_carlo", _GAMMA, {"returns": targets}),),
    "vtrace_advantage_estimate": (
        Ours("vtrace", same("gamma", "rho_max", "c_max"), {"advantages": advantages, "targets": targets}),
        Ours("vtrace", lambda s: {"pg_bootstrap": "vs", **s}, {"advantages": advantages, "targets": targets})),
    "reward2go": (Ours("reinforce", _GAMMA, {"returns": advantages}),),
}

STABLE_BASELINES3: Mapping[str, tuple[Ours, ...]] = {
    "RolloutBuffer": (Ours("gae", _LAM, _GAE), Ours("td_lambda", _LAM, _GAE)),
}


def _by_std(s: Settings) -> bool:
    return bool(s["norm_adv_by_std_in_grpo"])


def _not_by_std(s: Settings) -> bool:
    return not s["norm_adv_by_std_in_grpo"]


def _nothing(s: Settings) -> Settings:
    return {}


_A = {"advantages": advantages}
_MEASURED = {"k1": metric("k1"), "k3": metric("k3")}
VERL: Mapping[str, tuple[Ours, ...]] = {
    "gae": (
        Ours("gae", lambda s: {"truncation": "terminal", **s}, {"returns": targets}),
        Ours("gae", lambda s: {"truncation": "terminal", "whiten": True, **s}, _A, tolerance=_COUNTS_1e8)),
    "grpo": (Ours("grpo", _nothing, _A, when=_by_std), Ours("dr_grpo", _nothing, _A, when=_not_by_std)),
    "gdpo": (
        Ours("grpo", lambda s: {"whiten": True, "statistics": "token"}, _A, when=_by_std, tolerance=_COUNTS_1e8),
        Ours("dr_grpo", lambda s: {"whiten": True, "statistics": "token"}, _A, when=_not_by_std,
             tolerance=_COUNTS_1e8)),
    "rloo": (Ours("rloo", _nothing, _A),),
    "rloo_vectorized": (Ours("rloo", _nothing, _A),),
    "opo": (Ours("opo", _nothing, _A),),
    "reinforce_plus_plus": (
        Ours("reinforce_pp", _GAMMA, _A, tolerance=_COUNTS_1e8), Ours("reinforce", _GAMMA, {"returns": advantages})),
    "reinforce_plus_plus_baseline": (Ours("reinforce_pp_baseline", _nothing, _A, tolerance=_COUNTS_1e8),),
    "remax": (Ours("remax", _nothing, _A), Ours("reinforce", _nothing, {"returns": advantages})),
    "grpo_of_steps": (
        Ours("process", lambda s: {"step": "turn"}, _A, when=_by_std),
        Ours("process", lambda s: {"step": "turn", "scale": "none"}, _A, when=_not_by_std)),
    "truncated": (
        Ours("tis", lambda s: {"weight": s["unit"], "cap": s["cap"]}, {"weights": weights, "keep": keep}),
        Ours("tis", lambda s: {"weight": s["unit"], "cap": s["cap"]}, _MEASURED, tolerance=_COUNTS_1e8),
        Ours("tis", lambda s: {"weight": s["unit"], "cap": s["cap"]}, {"ess": metric("ess")}, tolerance=_MEAN_1e8)),
    "truncated_and_normalised": (
        Ours("tis", lambda s: {"self_normalise": True, **s}, {"weights": weights}, tolerance=_COUNTS_1e8),),
    "icepop": (Ours("icepop", same("low", "high"), {"weights": weights_that_stay}),),
    "rejected": (
        Ours("geometric_mask", lambda s: {"low": s["low"], "high": s["high"],
                                          "reject": "token" if s["option"] == "token_k1" else "sequence"},
             {"keep": keep, "weights": weights}),),
    "weighted_grpo": (
        Ours("clipped_is", lambda s: {"base": "group", "unit": s["unit"], "rho_max": s["cap"]}, _A),),
    "weighted_returns": (
        Ours("clipped_is", lambda s: {"base": "reward_to_go", "gamma": s["gamma"], "unit": s["unit"],
                                      "rho_max": s["cap"]}, _A),),
}

OURS: Mapping[str, Mapping[str, tuple[Ours, ...]]] = {
    "rlax": RLAX, "torchrl": TORCHRL, "stable_baselines3": STABLE_BASELINES3, "verl": VERL}
"""Library -> function -> ours."""
