"""Every estimator gives in torch and JAX what it gives in NumPy, in the same dtype, and changes nothing it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from frameworks import FRAMEWORKS, HALVES, in_float64
from posttrain.data import Episodes, to_numpy
from posttrain.ops import framework_of
from posttrain.protocols import Estimator
from posttrain_estimators.baselines import GroupBaseline, Reinforce
from posttrain_estimators.multistep import GAE

COLUMNS = ("rewards", "values", "bootstrap_values")
ESTIMATORS: dict[str, Estimator] = {
    "reinforce": Reinforce(gamma=0.9), "reinforce_white": Reinforce(0.9, "batch", True, "mask"),
    "grpo": GroupBaseline(), "grpo_mask": GroupBaseline(truncation="mask"), "batch": GroupBaseline(scale="batch"),
    "dr_grpo": GroupBaseline(scale="none"), "rloo": GroupBaseline("leave_one_out", "none"),
    "gae": GAE(0.99), "gae_white": GAE(0.99, whiten=True, truncation="mask")}
every = pytest.mark.parametrize("name", ESTIMATORS)


def episodes() -> Episodes:
    rng = np.random.default_rng(5)
    lengths = [3, 1, 4, 2, 5, 1, 3]
    def column() -> list[np.ndarray]:
        return [rng.normal(size=n) for n in lengths]
    return Episodes.from_rows(column(), values=column(), bootstrap_values=rng.normal(size=7),
                              terminated=[True, False, True, True, False, True, True], group=[1, 1, 1, 5, 5, 5, 9])


def converted(e: Episodes, make: Callable[[np.ndarray], Any]) -> Episodes:
    return replace(e, **{name: make(getattr(e, name)) for name in COLUMNS})


@every
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_equal_in_every_framework(name: str, framework: str) -> None:
    expected = ESTIMATORS[name](episodes())
    with in_float64(framework):
        got = ESTIMATORS[name](converted(episodes(), FRAMEWORKS[framework]))
        for column in ("advantages", "targets", "keep"):
            ours, numpy = getattr(got, column), getattr(expected, column)
            assert (ours is None) == (numpy is None)
            if ours is not None:
                assert framework_of(ours) == framework
                assert to_numpy(ours).dtype == numpy.dtype
                np.testing.assert_allclose(to_numpy(ours), numpy, rtol=1e-13, atol=1e-13)
    for metric, value in expected.metrics.values_by_name().items():
        assert got.metrics[metric].value == pytest.approx(value, rel=1e-12)


@every
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_float32_stays_float32(name: str, framework: str) -> None:
    make = FRAMEWORKS[framework]
    got = ESTIMATORS[name](converted(episodes(), lambda a: make(a.astype(np.float32))))
    expected = ESTIMATORS[name](episodes())
    for column in ("advantages", "targets"):
        if getattr(got, column) is not None:
            assert to_numpy(getattr(got, column)).dtype == np.float32
            np.testing.assert_allclose(to_numpy(getattr(got, column)), getattr(expected, column), rtol=1e-4, atol=1e-5)


@every
@pytest.mark.parametrize("half", HALVES)
def test_half_precision_is_computed_in_float32(name: str, half: str) -> None:
    given = converted(episodes(), HALVES[half])
    exact = converted(given, lambda a: to_numpy(a).astype(np.float64))
    got, expected = ESTIMATORS[name](given), ESTIMATORS[name](exact)
    for column in ("advantages", "targets"):
        if getattr(got, column) is not None:
            assert to_numpy(getattr(got, column)).dtype == np.float32
            np.testing.assert_allclose(to_numpy(getattr(got, column)), getattr(expected, column), rtol=1e-4, atol=1e-5)


@every
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_changes_nothing_it_is_given_and_repeats_itself(name: str, framework: str) -> None:
    given = converted(episodes(), lambda a: FRAMEWORKS[framework](a.astype(np.float32)))
    before = {f.name: None if (c := getattr(given, f.name)) is None else to_numpy(c).copy() for f in fields(given)}
    first, second = ESTIMATORS[name](given), ESTIMATORS[name](given)
    for column, was in before.items():
        if was is not None:
            np.testing.assert_array_equal(to_numpy(getattr(given, column)), was)
    np.testing.assert_array_equal(to_numpy(first.advantages), to_numpy(second.advantages))


@every
def test_a_gradient_does_not_pass(name: str) -> None:
    given = converted(episodes(), lambda a: FRAMEWORKS["torch"](a).requires_grad_())
    estimate = ESTIMATORS[name](given)
    assert not estimate.advantages.requires_grad
    assert estimate.targets is None or not estimate.targets.requires_grad
