"""KL controllers against simple-pid 2.0.1 and verl 0.9.1, whose answers `tools/oracles` has frozen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from posttrain_objectives.kl import PIDKL, AdaptiveKL

FIXTURES = Path(__file__).parents[1] / "oracles" / "fixtures"


def fixture(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FIXTURES / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize("case", range(12))
def test_pid_equals_simple_pid(case: int) -> None:
    """Its position form is our velocity form; a clamped output, for an integral alone, our clamped coefficient."""
    given = fixture("simple_pid")
    at = given["cases"][case]
    low, high = at["limits"] or (1e-9, 1e9)
    kl = PIDKL(target=given["target"], coef=given["coef"], kp=at["kp"], ki=at["ki"], kd=at["kd"], coef_min=low,
               coef_max=high)
    state, found = kl.init(), []
    for measured in at["kls"]:
        state = kl.update(state, kl=measured, n=1)
        found.append(state.coef)
    np.testing.assert_allclose(found, at["coefs"], rtol=1e-12)
    if at["limits"]:
        assert {low, high} & set(found), "the case must reach a limit"


@pytest.mark.parametrize("case", range(3))
def test_adaptive_equals_verl(case: int) -> None:
    at = fixture("verl_kl")["cases"][case]
    kl = AdaptiveKL(target=at["target"], coef=at["coef"], horizon=at["horizon"])
    state, found = kl.init(), []
    for measured, n in zip(at["kls"], at["ns"], strict=True):
        state = kl.update(state, kl=measured, n=n)
        found.append(state.coef)
    np.testing.assert_allclose(found, at["coefs"], rtol=1e-12)
