"""Fronts, hypervolumes and distances against moocore, pymoo and botorch, whose answers `tools/oracles` has frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from posttrain_objectives.pareto import (
    additive_epsilon,
    contributions,
    crowding,
    hypervolume,
    igd_plus,
    nondominated,
)

from .test_mixing import Case, read

pytestmark = pytest.mark.oracle
TOOLS = Path(__file__).parents[2] / "tools" / "oracles"
TOLERANCE = 1e-12
SETS = 24


def volume(case: Case) -> float:
    return hypervolume(case.given, case.settings["reference"])


def behind(case: Case) -> float:
    return igd_plus(case.given, case.settings["front"])


OURS: Mapping[str, Mapping[str, Callable[[Case], object]]] = {
    "moocore": {
        "is_nondominated": lambda case: nondominated(case.given),
        "hypervolume": volume,
        "hv_contributions": lambda case: contributions(case.given, case.settings["reference"]),
        "igd_plus": behind,
        "epsilon_additive": lambda case: additive_epsilon(case.given, case.settings["front"])},
    "pymoo": {
        "NonDominatedSorting": lambda case: nondominated(case.given),
        "HV": volume, "IGDPlus": behind,
        "calc_crowding_distance": lambda case: crowding(case.given)},
    "botorch": {
        "is_non_dominated": lambda case: nondominated(case.given),
        "Hypervolume": volume},
}
"""Library -> its function -> ours."""


@pytest.mark.parametrize(("library", "function"), [(name, f) for name, functions in OURS.items() for f in functions])
def test_equal(library: str, function: str) -> None:
    cases = [case for case in read(library)[1] if case.function == function]
    assert len(cases) == SETS and {case.given.shape[1] for case in cases} == {2, 3, 4, 5}
    for case in cases:
        np.testing.assert_allclose(np.asarray(OURS[library][function](case), np.float64), case.result, rtol=TOLERANCE,
                                   atol=TOLERANCE, err_msg=str(case.given.shape))


@pytest.mark.parametrize("library", OURS)
def test_files_are_of_the_pinned_versions(library: str) -> None:
    pins = (TOOLS / f"{library}.txt").read_text().splitlines()
    for name, version in read(library)[0]["versions"].items():
        assert f"{name}=={version.partition('+')[0]}" in pins
