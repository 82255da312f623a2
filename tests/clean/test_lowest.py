"""The lowest versions that the packages say they work with, together in one environment: torch alone is today's."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from environments import ROOT, Environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .conftest import RUN_TESTS, Fresh
from .test_packages import OF_THE_REPOSITORY, TESTS, report

pytestmark = [pytest.mark.clean, pytest.mark.timeout(1800)]

PACKAGES = {"core": ("testing",), "estimators": (), "objectives": (), "backends": ("hf", "lora"), "tuning": ()}
"""Package -> the extras whose requirements are at their lowest, too."""
OTHERS_DEPRECATE = ("-W", "default::DeprecationWarning")
"""Old libraries use what new ones deprecate."""


def lowest() -> dict[str, str]:
    """Distribution -> the version after `>=`; of torch the one in constraints.txt."""
    found: dict[str, str] = {}
    for package, extras in PACKAGES.items():
        project = tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text("utf-8"))["project"]
        lines = [*project["dependencies"], *(r for e in extras for r in project["optional-dependencies"][e])]
        for requirement in map(Requirement, lines):
            if not requirement.name.startswith("posttrain"):
                bound, = (part for part in requirement.specifier if part.operator == ">=")
                found[canonicalize_name(requirement.name)] = bound.version
    pinned = (line.partition("==") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines())
    return {**found, **{name: version for name, _, version in pinned if name == "torch"}}


@pytest.fixture(scope="module")
def oldest(fresh: Fresh, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    file = tmp_path_factory.mktemp("lowest") / "constraints.txt"
    file.write_text("".join(f"{name}=={version}\n" for name, version in lowest().items()))
    return fresh("", *(f"{name}[{','.join(extras)}]" if extras else name for name, extras in PACKAGES.items()),
                 others=RUN_TESTS, constraints=file)


def test_they_are_installed(oldest: Environment) -> None:
    code = f"from importlib.metadata import version; print(*(version(n) for n in {list(lowest())!r}))"
    found = oldest.output("python", "-c", code, cwd=oldest.root).split()
    for wanted, version in zip(lowest().values(), found, strict=True):
        assert Requirement(f"x=={wanted}").specifier.contains(version.partition("+")[0])


@pytest.mark.parametrize("package", TESTS)
def test_the_tests_of_a_package_pass(package: str, oldest: Environment) -> None:
    others = [f"--ignore={path}" for path in (*OF_THE_REPOSITORY, *(
        p for name, paths in TESTS.items() if package == "core" != name for p in paths if p.endswith(".py")))]
    report(oldest, [*OTHERS_DEPRECATE, *TESTS[package], *others])


def test_a_model_of_transformers_is_trained_and_drawn_from_quickly(oldest: Environment, tmp_path: Path) -> None:
    done = oldest.run("python", Path(__file__).with_name("hf_run.py"), tmp_path / "made", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("steps 2\n"), done.stderr
    assert "without a cache" not in done.stderr
