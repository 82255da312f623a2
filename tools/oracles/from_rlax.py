"""Asks rlax for returns, advantages and off-policy targets: `pip install -r rlax.txt`, then `python from_rlax.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import rlax
from cases import Episode

SEED, BATCHES = 11, 20
GAMMAS, LAMBDAS = (1.0, 0.99, 0.9, 0.5), (0.0, 0.5, 0.95, 1.0)
Answer = Mapping[str, Any]


def lambda_returns(e: Episode, gamma: float, lam: float) -> Answer:
    return {"returns": compiled(rlax.lambda_returns)(e.rewards, e.discounts(gamma), e.values[1:], lam)}


def lambda_returns_by_state(e: Episode, gamma: float) -> Answer:
    """lambda is 1 in a state whose own one-step return is at least its value, and 0 elsewhere: UPGO."""
    better = e.rewards + e.discounts(gamma) * e.values[1:] >= e.values[:-1]
    lam = np.append(better[1:], True).astype(float)  # of the states after actions; that after the last does not matter
    return {"returns": compiled(rlax.lambda_returns)(e.rewards, e.discounts(gamma), e.values[1:], lam)}


def n_step_bootstrapped_returns(e: Episode, gamma: float, lam: float, n: int) -> Answer:
    function = compiled(rlax.n_step_bootstrapped_returns, n=n)
    return {"returns": function(e.rewards, e.discounts(gamma), e.values[1:], lambda_t=lam)}


def mixed_n_step_bootstrapped_returns(e: Episode, gamma: float, weights: Sequence[float]) -> Answer:
    """The average of the returns of 1, 2, ... steps, by weights."""
    return {"returns": sum(w * n_step_bootstrapped_returns(e, gamma, 1.0, n)["returns"]
                           for n, w in enumerate(weights, 1))}


def discounted_returns(e: Episode, gamma: float) -> Answer:
    """v_t[-1], what stands behind the last action, counts by the last discount: not at all behind an end."""
    return {"returns": compiled(rlax.discounted_returns)(e.rewards, e.discounts(gamma), e.values[1:])}


def discounted_rewards(e: Episode, gamma: float) -> Answer:
    """The same without a value, for an episode that is judged as it stands whether it was cut or not."""
    return {"returns": compiled(rlax.discounted_returns)(e.rewards, np.full(len(e.rewards), gamma), 0.0)}


def truncated_gae(e: Episode, gamma: float, lam: float) -> Answer:
    function = compiled(rlax.truncated_generalized_advantage_estimation)
    return {"advantages": function(e.rewards, e.discounts(gamma), lam, e.values)}


def truncated_gae_by_length(e: Episode, gamma: float, alpha: float, lam_min: float) -> Answer:
    """lambda = 1 - 1 / (alpha T), at least `lam_min`: the policy's of VAPO."""
    return truncated_gae(e, gamma, max(lam_min, 1.0 - 1.0 / (alpha * len(e.rewards))))


def off_policy(e: Episode, gamma: float, unit: str) -> tuple[np.ndarray, ...]:
    """v_tm1, v_t, r_t, discount_t and rho_tm1 of V-trace."""
    return e.values[:-1], e.values[1:], e.rewards, e.discounts(gamma), cases.by_unit(e, unit)


def vtrace(e: Episode, gamma: float, lam: float, rho_max: float, unit: str) -> Answer:
    return {"errors": compiled(rlax.vtrace)(*off_policy(e, gamma, unit), lam, rho_max)}


def vtrace_td_error_and_advantage(e: Episode, gamma: float, lam: float, rho_max: float, unit: str) -> Answer:
    out = compiled(rlax.vtrace_td_error_and_advantage)(*off_policy(e, gamma, unit), lam, rho_max, rho_max)
    return {"errors": out.errors, "advantages": out.pg_advantage, "q": out.q_estimate}


def leaky_vtrace(e: Episode, gamma: float, lam: float, rho_max: float, alpha: float) -> Answer:
    return {"errors": compiled(rlax.leaky_vtrace)(*off_policy(e, gamma, "token"), alpha, lam, rho_max)}


def leaky_vtrace_td_error_and_advantage(e: Episode, gamma: float, lam: float, rho_max: float, alpha: float) -> Answer:
    function = compiled(rlax.leaky_vtrace_td_error_and_advantage)
    out = function(*off_policy(e, gamma, "token"), alpha, lam, rho_max, rho_max)
    return {"errors": out.errors, "advantages": out.pg_advantage}


def retrace(e: Episode, gamma: float, lam: float) -> Answer:
    """rlax divides by mu + 1e-8, to be safe where mu is 0. Ours is not, so it is given mu - 1e-8: the ratio is then
    the textbook's, and comparable to the last digits. mu_t is of the action in the state after each action, and of
    rank 1; the one after the last state is not used, and any number does."""
    mu = np.append(np.exp(e.log_mu[1:]), 0.5) - 1e-8
    errors = compiled(rlax.retrace)(e.q[:-1], e.q[1:], e.actions[:-1], e.actions[1:], e.rewards, e.discounts(gamma),
                                    e.pi[1:], mu, lam)
    return {"errors": errors}


def general_off_policy_returns_from_q_and_v(e: Episode, gamma: float, lam: float, c_max: float, unit: str) -> Answer:
    """c_t and q_t are of the states between the actions, v_t of those after them: q and v of action values."""
    c = lam * np.minimum(c_max, cases.by_unit(e, unit))[1:]
    q, v = e.q[np.arange(len(e.q)), e.actions], (e.pi * e.q).sum(axis=1)
    function = compiled(rlax.general_off_policy_returns_from_q_and_v)
    return {"returns": function(q[1:-1], v[1:], e.rewards, e.discounts(gamma), c)}


def general_off_policy_returns_of_states(e: Episode, gamma: float, lam: float, c_max: float, unit: str) -> Answer:
    """The same where the one value of a state stands for those of its actions."""
    c = lam * np.minimum(c_max, cases.by_unit(e, unit))[1:]
    function = compiled(rlax.general_off_policy_returns_from_q_and_v)
    return {"returns": function(e.values[1:-1], e.values[1:], e.rewards, e.discounts(gamma), c)}


def general_off_policy_returns_from_action_values(e: Episode, gamma: float, lam: float) -> Answer:
    """c_t = lambda pi(a_t | x_t): tree backup. That of the last state is not used."""
    c = lam * np.append(np.exp(e.log_pi[1:]), 0.5)
    function = compiled(rlax.general_off_policy_returns_from_action_values)
    return {"returns": function(e.q[1:], e.actions[1:], e.rewards, e.discounts(gamma), c, e.pi[1:])}


COMPILED: dict[Any, Callable[..., Any]] = {}


def compiled(function: Callable[..., Any], **constants: Any) -> Callable[..., Any]:
    """`function` of arrays, compiled once for each length."""
    key = (function, *sorted(constants.items()))
    if key not in COMPILED:
        COMPILED[key] = jax.jit(partial(function, **constants))
    def call(*args: Any, **named: Any) -> Any:
        return COMPILED[key](*(jnp.asarray(x) for x in args), **{name: jnp.asarray(x) for name, x in named.items()})
    return call


UNITS = ("token", "token", "turn", "sequence")
V_TRACE = {"gamma": GAMMAS, "lam": LAMBDAS, "rho_max": (1.0, 1.5, 4.0)}
TRACES = {"gamma": GAMMAS, "lam": LAMBDAS, "c_max": (0.5, 1.0, 2.0, 1e9), "unit": UNITS}
UNIFORM = tuple((1.0 / n,) * n for n in (1, 2, 3, 4, 5, 7, 8))
WEIGHTS = (*UNIFORM, (0.5, 0.0, 0.25, 0.25), (0.0, 0.0, 1.0), (0.0625, 0.9375))
FUNCTIONS: Mapping[Callable[..., Answer], Mapping[str, Sequence[Any]]] = {
    lambda_returns: {"gamma": GAMMAS, "lam": LAMBDAS},
    lambda_returns_by_state: {"gamma": GAMMAS},
    n_step_bootstrapped_returns: {"gamma": GAMMAS, "lam": (1.0, 1.0, 0.5, 0.95), "n": (1, 2, 3, 5, 8, 30)},
    mixed_n_step_bootstrapped_returns: {"gamma": GAMMAS, "weights": WEIGHTS},
    discounted_returns: {"gamma": GAMMAS},
    discounted_rewards: {"gamma": GAMMAS},
    truncated_gae: {"gamma": GAMMAS, "lam": LAMBDAS},
    truncated_gae_by_length: {"gamma": GAMMAS, "alpha": (0.05, 0.5, 2.0), "lam_min": (0.0, 0.5)},
    vtrace: V_TRACE | {"unit": UNITS},
    vtrace_td_error_and_advantage: V_TRACE | {"unit": UNITS},
    leaky_vtrace: V_TRACE | {"alpha": (0.0, 0.3, 0.9)},
    leaky_vtrace_td_error_and_advantage: V_TRACE | {"alpha": (0.0, 0.3, 0.9)},
    retrace: {"gamma": GAMMAS, "lam": LAMBDAS},
    general_off_policy_returns_from_q_and_v: TRACES,
    general_off_policy_returns_of_states: TRACES,
    general_off_policy_returns_from_action_values: {"gamma": GAMMAS, "lam": LAMBDAS}}
"""Function -> the settings that are drawn for each batch. rlax takes one sequence at a time: each episode is one."""


def main() -> None:
    jax.config.update("jax_enable_x64", True)  # float32 unless told
    rng, fixture = np.random.default_rng(SEED), cases.Fixture(cases.batches(SEED, BATCHES))
    for function, choices in FUNCTIONS.items():
        for i, batch in enumerate(fixture.batches):
            settings = cases.drawn(rng, choices)
            fixture.add(function.__name__, i, settings, cases.over_episodes(
                function(e, **settings) for e in batch.sequences))
    fixture.save("rlax", SEED, rlax=version("rlax"), jax=version("jax"))


if __name__ == "__main__":
    main()
