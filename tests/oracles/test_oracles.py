"""Estimators and corrections give what independent libraries gave for hundreds of random ragged batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from frameworks import FRAMEWORKS
from posttrain.data import to_numpy
from posttrain_estimators.plugin import components

from .answers import LIBRARIES, Case, about, answers
from .ours import OURS, Ours, built

pytestmark = pytest.mark.oracle
TOOLS = Path(__file__).parents[2] / "tools" / "oracles"
FLOAT32 = 1e-5
"""Largest difference in float32, as `Ours.tolerance` is that in float64."""
WITHOUT_AN_ORACLE: dict[str, str] = {}
"""Registered name -> why no library answers for it."""


def asked() -> list[object]:
    """Each function of each library, and each component that is to give the same."""
    return [pytest.param(library, function, ours, id=f"{library}-{function}-{ours.component}{number or ''}")
            for library, functions in OURS.items() for function, all_ours in functions.items()
            for number, ours in enumerate(all_ours)]


def cases_of(library: str, function: str, ours: Ours) -> list[Case]:
    return [case for case in answers(library) if case.function == function and ours.when(case.settings)]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize(("library", "function", "ours"), asked())
def test_equal(library: str, function: str, ours: Ours, framework: str, dtype: type) -> None:
    array, tolerance = FRAMEWORKS[framework], max(ours.tolerance, FLOAT32 if dtype is np.float32 else 0.0)
    cases = cases_of(library, function, ours)
    assert cases, "no case of the fixture has settings that this component can have"
    for case in cases:
        episodes = case.episodes(lambda column: array(column.astype(dtype)), ours.bootstrap_values)
        said = built(ours.component, ours.fields(case.settings))(episodes)
        for name, read in ours.results.items():
            expected = case.results[name]
            np.testing.assert_allclose(
                to_numpy(read(said, episodes)), expected, rtol=0.0, atol=tolerance * max(1.0, np.abs(expected).max()),
                err_msg=f"{name} of {case}")


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_fixture_names_the_versions_that_its_script_pins(library: str) -> None:
    said, pins = about(library), (TOOLS / f"{library}.txt").read_text()
    assert isinstance(said["seed"], int)
    assert library in {name.replace("-", "_") for name in said["versions"]}
    for name, version in said["versions"].items():
        assert f"{name}=={version.partition('+')[0]}\n" in pins  # torch's has the kind of its build behind a plus


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_function_of_a_fixture_is_compared(library: str) -> None:
    assert {case.function for case in answers(library)} == set(OURS[library])
    for function, all_ours in OURS[library].items():
        results = {name for case in answers(library) if case.function == function for name in case.results}
        assert results - {name for ours in all_ours for name in ours.results} <= {"k1", "k3", "ess", "keep"}


def test_there_are_hundreds_of_cases_and_they_differ() -> None:
    found = [case for library in LIBRARIES for case in answers(library)]
    lengths = np.concatenate([case.lengths for case in found])
    terminated = [case.columns["terminated"] for case in found]
    assert len(found) >= 200
    assert (lengths == 1).sum() >= 200
    assert len(set(lengths.tolist())) >= 5
    assert all(sum(bool(kind(ends)) for ends in terminated) >= 20 for kind in (
        np.all, lambda ends: not ends.any(), lambda ends: ends.any() and not ends.all()))


def test_every_component_has_an_oracle_or_a_reason() -> None:
    covered = {ours.component for library, functions in OURS.items() for function, all_ours in functions.items()
               for ours in all_ours if cases_of(library, function, ours)}
    registered = {component.name for component in components()}
    assert covered | set(WITHOUT_AN_ORACLE) == registered
    assert not covered & set(WITHOUT_AN_ORACLE)
