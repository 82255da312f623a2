"""Virtual environments for tests, and how programs in them are run.

`core_alone` is made of what is installed here, so without an index and in a second: core and what its tests need
(pytest, Hypothesis), no framework, and none of the plugin packages. Those of `tests/clean` ask an index.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
BUILDERS = ("hatchling", "editables")
"""What builds the packages."""


def clean_environ() -> dict[str, str]:
    """This process's environment without its Python settings."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "POSTTRAIN"))}


def finished(*command: str | Path, cwd: Path) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run([*map(str, command)], cwd=cwd, env=clean_environ(), capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@final
@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment, and how its programs are run."""

    root: Path

    @property
    def programs(self) -> Path:
        """Where its programs lie."""
        return self.root / "bin"

    def run(self, *command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        """One of its programs, without this process's Python settings."""
        return subprocess.run([str(self.programs / command[0]), *map(str, command[1:])], cwd=cwd, env=clean_environ(),
                              capture_output=True, text=True, check=False, timeout=240)

    def output(self, *command: str | Path, cwd: Path) -> str:
        """Output of a program that must succeed."""
        return finished(self.programs / command[0], *command[1:], cwd=cwd)

    def missing(self, *modules: str) -> list[str]:
        """Those of the modules that cannot be imported here."""
        code = f"import importlib.util as u; print(*(m for m in {modules!r} if u.find_spec(m) is None))"
        return self.output("python", "-c", code, cwd=self.root).split()

    def install(self, folders: Sequence[Path], scratch: Path) -> None:
        """Install folders as their users would, but for the index: what they need must be there."""
        pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
        done = subprocess.run(
            [*pip, "--python", self.programs / "python", "install", "--no-index", "--no-build-isolation", *folders],
            cwd=scratch, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def core_alone(root: Path) -> Environment:
    """A fresh environment with core, its requirements, pytest and Hypothesis."""
    venv.create(root, symlinks=True)
    made = Environment(root)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(root), "platbase": str(root)}))
    project = tomllib.loads((ROOT / "packages" / "core" / "pyproject.toml").read_text("utf-8"))["project"]
    for name in closure([*project["dependencies"], *project["optional-dependencies"]["testing"], *BUILDERS]):
        _link(metadata.distribution(name), packages)
    made.install([ROOT / "packages" / "core"], root)
    return made


def closure(requirements: Sequence[str]) -> set[str]:
    """Distributions that are required, directly or not, with the extras that are asked for on the way."""
    found: set[str] = set()
    done: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        wanted = waiting.pop()
        key = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if key in done:
            continue
        done.add(key)
        found.add(key[0])
        for required in map(Requirement, metadata.requires(wanted.name) or []):
            if required.marker is None or any(required.marker.evaluate({"extra": e}) for e in ("", *wanted.extras)):
                waiting.append(required)
    return found


def _link(distribution: metadata.Distribution, packages: Path) -> None:
    """The files of a distribution under the environment's path, as links."""
    base = Path(str(distribution.locate_file("")))
    for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
        if not (packages / top).exists():
            (packages / top).symlink_to(base / top)
