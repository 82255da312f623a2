"""The six distributions: one version, dependencies that are used and declared, types, licences, light imports."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import posttrain
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from posttrain.testing.random_data import MAKERS

ROOT = Path(__file__).parents[2]
PLUGINS = ("estimators", "objectives", "backends", "tuning")
PACKAGES = ("core", *PLUGINS)
MODULE = {"core": "posttrain", **{name: f"posttrain_{name}" for name in PLUGINS}}
FRAMEWORKS = ("torch", "jax", "flax", "transformers", "onnx", "onnxruntime", "triton", "vllm")
HEAVY = (*FRAMEWORKS, "scipy", "matplotlib", "tokenizers", "jinja2", "rich", "typer")
IMPORTED_AS = {"pyyaml": "yaml", "mlflow-skinny": "mlflow", "onnxruntime-gpu": "onnxruntime"}
"""Distributions whose import name is not their own."""
FOR_ANOTHER = {"alembic": "mlflow", "sqlalchemy": "mlflow", "gguf": "transformers", "accelerate": "transformers"}
"""Distributions that another one imports for us and does not bring: MLflow's database, what transformers reads
GGUF files and places quantised weights with."""

WHERE_INSTALLED = {"backends": {"fla", "mamba_ssm", "xformers"}}
"""Modules that are used where they are installed, and stand in no extra: kernels that only CUDA's compiler builds."""
IN_PLACE_OF = {"onnx-gpu": "onnx"}
"""Extras that exclude another one, which is the one of `all`; what they alone require is not installed for tests."""


def pyproject(package: str = "") -> dict[str, Any]:
    return tomllib.loads((ROOT / "packages" / package / "pyproject.toml" if package else ROOT / "pyproject.toml")
                         .read_text())


def project(package: str = "") -> dict[str, Any]:
    found: dict[str, Any] = pyproject(package)["project"]
    return found


def names(requirements: list[str]) -> set[str]:
    """Import names of the required distributions."""
    found = {canonicalize_name(Requirement(r).name) for r in requirements}
    return {IMPORTED_AS.get(name, name).replace("-", "_") for name in found}


def extras(package: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = project(package).get("optional-dependencies", {})
    return found


def optional(package: str) -> list[str]:
    """What all extras of a package require."""
    return [requirement for requirements in extras(package).values() for requirement in requirements]


def used(package: str) -> set[str]:
    """Top-level modules that the code of a package imports, in functions too, or imports by a name in a string."""
    found = set()
    for path in (ROOT / "packages" / package / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module)
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                called = ast.unparse(node.func)
                if called.endswith("import_module") or called == "_imported":
                    found.add(str(node.args[0].value))
    return {name.partition(".")[0] for name in found}


def test_one_version_and_the_umbrella_pins_it() -> None:
    versions = {name or "posttrain": project(name)["version"] for name in ("", *PACKAGES)}
    assert len(set(versions.values())) == 1, versions
    version = versions["posttrain"]
    assert version == posttrain.__version__
    assert sorted(project()["dependencies"]) == sorted(f"posttrain-{name}=={version}" for name in PACKAGES)
    for name in PLUGINS:
        assert project(name)["dependencies"] == [f"posttrain-core=={version}"]


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_installed_is_this_version(package: str) -> None:
    assert metadata.version(f"posttrain-{package}") == project(package)["version"]


def test_the_umbrella_forwards_every_extra() -> None:
    forwarded = dict(project()["optional-dependencies"])
    every = {extra: f"posttrain-{package}[{extra}]=={project()['version']}"
             for package in PACKAGES for extra in extras(package)}
    assert forwarded.pop("all") == [f"posttrain[{','.join(sorted(every.keys() - IN_PLACE_OF))}]"]
    assert forwarded == {extra: [requirement] for extra, requirement in every.items()}


@pytest.mark.parametrize("package", PACKAGES)
def test_metadata(package: str) -> None:
    folder, found = ROOT / "packages" / package, project(package)
    assert found["license"] == project()["license"] == "Apache-2.0"
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert found["requires-python"] == project()["requires-python"] == ">=3.11"
    assert found["readme"] == "README.md" and f"posttrain-{package}" in (folder / "README.md").read_text()
    assert (folder / "src" / MODULE[package] / "py.typed").is_file()
    assert found["entry-points"] == {"posttrain.v1": {package: f"{MODULE[package]}.plugin"}}
    assert (folder / "src" / MODULE[package] / "plugin.py").is_file()


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_is_declared(package: str) -> None:
    """Plugin packages may also use what core brings; the contract kit compares those frameworks that are installed."""
    declared = names(project("core")["dependencies"]) | names(optional(package))
    compared = set(MAKERS) if package == "core" else WHERE_INSTALLED.get(package, set())
    ours = {"posttrain", MODULE[package]}
    assert used(package) - set(sys.stdlib_module_names) - ours - compared <= declared


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_declared_is_imported(package: str) -> None:
    """No dependency and no extra stands for code that does not exist."""
    declared = names([*project(package)["dependencies"], *optional(package)]) - {"posttrain_core"}
    assert {FOR_ANOTHER.get(name, name) for name in declared} <= used(package)


def test_constraints_pin_every_requirement_and_name_no_host() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    assert len(pins) == len(lines) and not any("/" in line or "+" in line for line in lines)
    wanted = [*pyproject()["dependency-groups"]["dev"], *pyproject()["build-system"]["requires"]]
    for package in PACKAGES:
        wanted += project(package)["dependencies"]
        wanted += [r for extra, needed in extras(package).items() if extra not in IN_PLACE_OF for r in needed]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if not name.startswith("posttrain"):
            assert name in pins and requirement.specifier.contains(pins[name]), f"{requirement} in constraints.txt"


@pytest.mark.parametrize("module", [*MODULE.values(), *(f"{name}.plugin" for name in MODULE.values())])
def test_importing_a_package_or_its_plugin_is_light(module: str) -> None:
    heavy = run("-c", f"import sys, {module}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))")
    assert heavy.split() == []


def run(*arguments: str) -> str:
    """Output of a fresh interpreter."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_continuous_integration_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "make test" in script.read_text()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_wheel_holds_code_types_and_licence(package: str, tmp_path: Path) -> None:
    """Built without isolation and without an index, from the folder of the package."""
    from zipfile import ZipFile

    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT / "packages" / package, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = set(ZipFile(wheel).namelist())
    source = ROOT / "packages" / package / "src"
    code = {str(path.relative_to(source)) for path in (source / MODULE[package]).rglob("*.py")}
    assert code | {f"{MODULE[package]}/py.typed"} <= held
    extra = {name for name in held - code if ".dist-info/" not in name}
    assert extra <= {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()}
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in held)
