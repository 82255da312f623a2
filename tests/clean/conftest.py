"""What the tests here share: wheels of the packages, each built once, and fresh environments that they go into."""

from __future__ import annotations

import functools
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from environments import ROOT, Environment, finished

Fresh = Callable[..., Environment]
RUN_TESTS = ("pytest", "hypothesis", "pytest-timeout")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The wheel of a package ('' for the umbrella), as it would be published: through its source archive."""
    @functools.cache
    def built(package: str) -> Path:
        folder = tmp_path_factory.mktemp("wheel")
        source = ROOT / "packages" / package if package else ROOT
        finished(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=source)  # sdist, and the wheel
        found, = folder.glob("*.whl")
        return found
    return built


@pytest.fixture(scope="session")
def fresh(wheel: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    """A fresh environment with the packages that are named (`backends[hf]` with an extra) and other requirements."""
    def made(*packages: str, others: Sequence[str] = (), constraints: Path = ROOT / "constraints.txt") -> Environment:
        root = tmp_path_factory.mktemp("environment")
        venv.create(root, symlinks=True)
        wanted = []
        for package in packages:
            name, bracket, extras = package.partition("[")
            wanted.append(f"{wheel(name)}{bracket}{extras}")
        finished(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python",
                 root / "bin" / "python", "install", "--constraint", constraints, *wanted, *others, cwd=root)
        return Environment(root)
    return made
