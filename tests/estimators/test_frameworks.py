"""Every estimator and correction gives in torch and JAX what it gives in NumPy, in the same dtype, and changes nothing
it is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from frameworks import FRAMEWORKS, HALVES, in_float64
from posttrain.data import Episodes, to_numpy
from posttrain.hookspecs import Component
from posttrain.ops import framework_of
from posttrain_estimators.actionvalues import Retrace
from posttrain_estimators.baselines import GroupBaseline, Reinforce, ReMax
from posttrain_estimators.corrections import ImportanceCorrection
from posttrain_estimators.mixtures import UPGO, NStep
from posttrain_estimators.multistep import GAE, TDLambda
from posttrain_estimators.offpolicy import ClippedIS, VTrace
from posttrain_estimators.plugin import components
from posttrain_estimators.process import ProcessReward

COLUMNS = ("rewards", "values", "bootstrap_values", "final_scores", "greedy_rewards", "action_values",
           "expected_action_values", "logprobs", "behavior_logprobs")


def built(component: Component) -> Any:
    module, _, attribute = component.target.partition(":")
    return getattr(import_module(module), attribute)(**component.defaults)


COMPONENTS: dict[str, Any] = {
    **{component.name: built(component) for component in components()},
    "reinforce gamma": Reinforce(0.9), "reinforce white": Reinforce(0.9, "batch", True, "mask"),
    "reinforce others": Reinforce(baseline="leave_one_out", whiten=True, statistics="row"),
    "reinforce soft": Reinforce(truncation="soft", overlong_length=5, overlong_buffer=3),
    "grpo mask": GroupBaseline(truncation="mask"), "grpo drop": GroupBaseline(truncation="mask", incomplete="drop"),
    "batch": GroupBaseline(scale="batch"), "batch token": GroupBaseline(scale="batch", statistics="token"),
    "grpo white": GroupBaseline(whiten=True), "remax white": ReMax(0.9, whiten=True, truncation="mask"),
    "process batch": ProcessReward(scale="batch"), "process turn": ProcessReward(step="turn", truncation="mask"),
    "gae gamma": GAE(0.99), "gae white": GAE(0.99, whiten=True, truncation="mask"),
    "gae decoupled": GAE(0.99, lam_critic=1.0), "gae length": GAE(0.99, length_adaptive=0.5, lam_min=0.1),
    "gae score": GAE(bootstrap="score"), "gae zero": GAE(bootstrap="zero"),
    "gae soft": GAE(truncation="soft", overlong_length=5, overlong_buffer=3),
    "td_lambda gamma": TDLambda(0.9, 0.5), "td_lambda white": TDLambda(0.9, whiten=True, truncation="mask"),
    "n_step fixed": NStep(0.9, n=2), "n_step uniform": NStep(0.9, n=3, mixture="uniform"),
    "n_step geometric": NStep(0.9, n=3, mixture="geometric", lam=0.7),
    "n_step given": NStep(0.9, mixture="given", weights=(0.5, 0.0, 0.25, 0.25)), "upgo gamma": UPGO(0.9, 0.7),
    "vtrace lam": VTrace(0.9, 0.7, rho_max=2.0, leak=0.5), "vtrace vs": VTrace(0.9, 0.7, pg_bootstrap="vs"),
    "vtrace turn": VTrace(trace_unit="turn", dead_zone=0.1), "vtrace uncut": VTrace(rho_max=math.inf, c_max=math.inf),
    "vtrace sequence": VTrace(trace_unit="sequence", trace_ratio="sum", weighted=False),
    "retrace turn": Retrace(gamma=0.9, lam=0.7, trace_unit="turn", trace_ratio="sum"),
    "retrace q_head": Retrace("q_head", gamma=0.9, lam=0.7, whiten=True),
    "clipped_is gae": ClippedIS("gae", gamma=0.9, unit="turn"),
    "clipped_is to go": ClippedIS("reward_to_go", gamma=0.9, unit="sequence", unit_ratio="mean"),
    "tis sequence": ImportanceCorrection("sequence"), "tis normalised": ImportanceCorrection(self_normalise=True),
    "tis turn": ImportanceCorrection("turn", reject="turn", low=0.8, high=1.2),
    "measuring": ImportanceCorrection("none")}
"""All that is registered, with their presets, and what further fields switch on."""
every = pytest.mark.parametrize("name", COMPONENTS)


def episodes() -> Episodes:
    rng = np.random.default_rng(5)
    lengths = [3, 1, 4, 2, 5, 1, 3]
    def column() -> list[np.ndarray]:
        return [rng.normal(size=n) for n in lengths]
    def negative(spread: float) -> list[np.ndarray]:
        return [rng.uniform(-1.0 - spread, -1.0 + spread, n) for n in lengths]
    e = Episodes.from_rows(column(), values=column(), bootstrap_values=rng.normal(size=7), action_values=column(),
                           expected_action_values=column(), logprobs=negative(0.4), behavior_logprobs=negative(0.4),
                           terminated=[True, False, True, True, False, True, True], group=[1, 1, 1, 5, 5, 5, 9])
    turn = np.concatenate([np.arange(n) // 2 for n in lengths])
    return replace(e, turn=turn, final_scores=rng.normal(size=7), greedy_rewards=rng.normal(size=7))


def converted(e: Episodes, make: Callable[[np.ndarray], Any]) -> Episodes:
    return replace(e, **{name: make(getattr(e, name)) for name in COLUMNS})


def arrays(said: Any) -> dict[str, Any]:
    """What an `Estimate` or a `Corrected` has of arrays."""
    found = {f.name: getattr(said, f.name) for f in fields(said) if f.name != "metrics"}
    return {name: array for name, array in found.items() if array is not None}


def assert_float32_of(said: Any, expected: Any) -> None:
    """`said` are numbers of float32 and close to those of `expected`, and keeps the same."""
    ours, exact = arrays(said), arrays(expected)
    assert ours.keys() == exact.keys()
    for name, array in ours.items():
        assert to_numpy(array).dtype == (bool if name == "keep" else np.float32)
        np.testing.assert_allclose(to_numpy(array), to_numpy(exact[name]), rtol=1e-4, atol=1e-5, err_msg=name)


@every
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_equal_in_every_framework(name: str, framework: str) -> None:
    expected = COMPONENTS[name](episodes())
    with in_float64(framework):
        got = COMPONENTS[name](converted(episodes(), FRAMEWORKS[framework]))
        ours, numpy = arrays(got), arrays(expected)
        assert ours.keys() == numpy.keys()
        for column, array in ours.items():
            assert framework_of(array) == framework
            assert to_numpy(array).dtype == numpy[column].dtype
            np.testing.assert_allclose(to_numpy(array), numpy[column], rtol=1e-13, atol=1e-13, err_msg=column)
    assert got.metrics.keys() == expected.metrics.keys()
    for metric, value in expected.metrics.values_by_name().items():
        assert got.metrics[metric].value == pytest.approx(value, rel=1e-12, abs=1e-15)


@every
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_float32_stays_float32(name: str, framework: str) -> None:
    make = FRAMEWORKS[framework]
    got = COMPONENTS[name](converted(episodes(), lambda a: make(a.astype(np.float32))))
    assert_float32_of(got, COMPONENTS[name](episodes()))


@every
@pytest.mark.parametrize("half", HALVES)
def test_half_precision_is_computed_in_float32(name: str, half: str) -> None:
    given = converted(episodes(), HALVES[half])
    exact = converted(given, lambda a: to_numpy(a).astype(np.float64))
    assert_float32_of(COMPONENTS[name](given), COMPONENTS[name](exact))


@every
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_changes_nothing_it_is_given_and_repeats_itself(name: str, framework: str) -> None:
    given = converted(episodes(), lambda a: FRAMEWORKS[framework](a.astype(np.float32)))
    before = {f.name: None if (c := getattr(given, f.name)) is None else to_numpy(c).copy() for f in fields(given)}
    first, second = arrays(COMPONENTS[name](given)), arrays(COMPONENTS[name](given))
    for column, was in before.items():
        if was is not None:
            np.testing.assert_array_equal(to_numpy(getattr(given, column)), was)
    for column, array in first.items():
        np.testing.assert_array_equal(to_numpy(array), to_numpy(second[column]))


@every
def test_a_gradient_does_not_pass(name: str) -> None:
    given = converted(episodes(), lambda a: FRAMEWORKS["torch"](a).requires_grad_())
    assert not any(array.requires_grad for array in arrays(COMPONENTS[name](given)).values())
