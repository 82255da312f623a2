"""Constraints and gradient combiners against omnisafe, cooper, torchjd, cvxpy and scipy: their frozen answers.

`tools/oracles/from_{omnisafe,cooper,torchjd}.py` made the files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from posttrain_objectives.constraints import AugmentedLagrangian, Lagrangian, PIDLagrangian
from posttrain_objectives.gradients import IMTLG, MGDA, CAGrad, DualProjection, NashMTL, PCGrad, UPGrad

FIXTURES = Path(__file__).parent / "fixtures"
TOOLS = Path(__file__).parents[2] / "tools" / "oracles"


@dataclass(frozen=True, eq=False)
class Case:
    """What a function answered, called with some settings on an array."""

    function: str
    settings: Mapping[str, Any]
    given: np.ndarray
    result: np.ndarray

    def __str__(self) -> str:
        return f"{self.function}({', '.join(f'{k}={v}' for k, v in self.settings.items())}) of {self.given.shape}"


def read(library: str) -> tuple[dict[str, Any], list[Case]]:
    """Seed and versions, and all cases."""
    with np.load(FIXTURES / f"{library}.npz", allow_pickle=False) as file:
        about, numbers = json.loads(file["about"].tobytes()), iter(file["numbers"].tolist())
    def array(shape: list[int]) -> np.ndarray:
        return np.array([next(numbers) for _ in range(int(np.prod(shape)))]).reshape(shape)
    cases = [Case(c["function"], c["settings"], array(c["shapes"][0]), array(c["shapes"][1])) for c in about["cases"]]
    return about, cases


def cases_of(library: str, *functions: str) -> list[Any]:
    return [pytest.param(case, id=f"{i}-{case}") for i, case in enumerate(read(library)[1])
            if case.function in functions]


@pytest.mark.parametrize("library", ["omnisafe", "cooper", "torchjd"])
def test_files_are_of_the_pinned_versions(library: str) -> None:
    pins = (TOOLS / f"{library}.txt").read_text()
    for name, version in read(library)[0]["versions"].items():
        assert version.partition("+")[0] in pins, f"{library}.npz is of {name} {version}, {library}.txt pins others"


def followed(method: Any, costs: np.ndarray, limit: float) -> list[float]:
    """The multiplier after each measurement."""
    state, found = method.init({"cost": limit}), []
    for cost in costs:
        state = method.update(state, {"cost": float(cost)})
        found.append(state.multipliers["cost"])
    return found


UNIT = 1000.0
"""Of a violation. The libraries count it in the cost's own unit and do not bound it; in a unit this large it stays
within its bound here, and gains that are larger by as much give the same numbers."""


def in_unit(settings: Mapping[str, Any], *gains: str) -> dict[str, Any]:
    """Fields of ours that do what the settings of a library do."""
    return {**settings, **{name: UNIT * settings[name] for name in gains}, "scale": {"cost": UNIT}}


@pytest.mark.parametrize("case", cases_of("omnisafe", "lagrangian"))
def test_lagrangian_is_that_of_omnisafe(case: Case) -> None:
    settings = dict(case.settings)
    limit = settings.pop("limit")
    assert followed(Lagrangian(**in_unit(settings, "eta")), case.given, limit) == pytest.approx(
        case.result, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("case", cases_of("omnisafe", "pid_lagrangian"))
def test_pid_lagrangian_is_that_of_omnisafe(case: Case) -> None:
    settings = dict(case.settings)
    limit = settings.pop("limit")
    assert followed(PIDLagrangian(**in_unit(settings, "kp", "ki", "kd")), case.given, limit) == pytest.approx(
        case.result, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("case", cases_of("cooper", "Lagrangian"))
def test_lagrangian_is_that_of_cooper(case: Case) -> None:
    method = Lagrangian(lambda_max=1e9, **in_unit({"eta": case.settings["eta"]}, "eta"))
    assert followed(method, case.given, 0.0) == pytest.approx(case.result, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("case", cases_of("cooper", "AugmentedLagrangian"))
def test_augmented_lagrangian_finds_the_optimum_that_cooper_finds(case: Case) -> None:
    reward, cost = case.given
    method, theta = AugmentedLagrangian(), np.zeros(len(reward))
    state = method.init({"cost": case.settings["limit"]})
    for _ in range(8000):
        p = np.exp(theta) / np.exp(theta).sum()
        J, C = p @ reward, p @ cost
        state = method.update(state, {"cost": float(C)})
        lam = state.multipliers["cost"]
        theta = theta + 0.5 * p * (reward - J - lam * (cost - C)) / (1 + lam)
    assert [J, C, lam] == pytest.approx(case.result, abs=2e-3)


RULES: Mapping[str, tuple[Callable[..., Any], float]] = {
    "torchjd.UPGradWeighting": (UPGrad, 1e-6), "cvxpy.upgrad": (UPGrad, 1e-6),
    "torchjd.DualProjWeighting": (DualProjection, 1e-6), "cvxpy.dual_projection": (DualProjection, 1e-6),
    "torchjd.MGDAWeighting": (MGDA, 1e-3), "cvxpy.mgda": (MGDA, 1e-6), "torchjd.IMTLGWeighting": (IMTLG, 1e-9),
    "torchjd.PCGradWeighting": (PCGrad, 1e-12), "torchjd.CAGradWeighting": (CAGrad, 1e-4),
    "scipy.nash_mtl": (NashMTL, 1e-5)}
"""Function -> ours, and the tolerance relative to the longest gradient. torchjd's MGDA is a Frank-Wolfe method that
comes near slowly, and its CAGrad solves in the solver's default precision: cvxpy's answers to both are met at 1e-6."""


@pytest.mark.parametrize("case", cases_of("torchjd", *RULES))
def test_weights_give_the_same_direction(case: Case) -> None:
    """Directions are compared: weights of nearly dependent gradients are ill-conditioned."""
    rule, tolerance = RULES[case.function]
    w = weights(rule(**case.settings), case.given)
    scale = np.linalg.norm(case.given, axis=1).max() * np.abs(case.result).max()
    assert w @ case.given == pytest.approx(case.result @ case.given, abs=tolerance * scale)


@pytest.mark.parametrize("case", cases_of("torchjd", "cvxpy.cagrad"))
def test_cagrad_solves_the_problem_of_its_paper(case: Case) -> None:
    """cvxpy was asked for the d of the primal problem; its least product with a gradient is the optimum."""
    ours = case.given @ (weights(CAGrad(**case.settings), case.given) @ case.given)
    assert ours.min() == pytest.approx(case.result.min(), abs=1e-6 * float(np.abs(case.result).max()))


def weights(rule: Any, J: np.ndarray) -> np.ndarray:
    return np.asarray(rule.weights(J @ J.T, rule.init([str(i) for i in range(len(J))]))[0])
