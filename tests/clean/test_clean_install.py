"""Fresh environments from this clone: core alone, core and one package, everything; and source archives.

Slow, and asks the configured package index: `make test-all` runs these.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.clean, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
FRAMEWORKS = ("torch", "jax", "transformers", "onnxruntime")
Run = Callable[..., str]


def finished(*command: str | Path) -> str:
    """Output of a command that must succeed, run outside the clone and without this environment's settings."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run([str(c) for c in command], cwd=ROOT.anchor, env=clean, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., Path]:
    """Install folders of the clone into a fresh environment; returns where its programs lie."""
    def made(*folders: str) -> Path:
        venv.create(tmp_path / "venv", with_pip=True)
        programs = tmp_path / "venv" / "bin"
        finished(programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                 "--constraint", ROOT / "constraints.txt", *(ROOT / folder for folder in folders))
        return programs
    return made


def absent(programs: Path, modules: tuple[str, ...]) -> bool:
    """Whether none of the modules can be imported."""
    code = f"import importlib.util as u; print([m for m in {modules!r} if u.find_spec(m)])"
    return finished(programs / "python", "-c", code).strip() == "[]"


def test_core_alone(install: Callable[..., Path]) -> None:
    programs = install("packages/core")
    assert absent(programs, (*FRAMEWORKS, "posttrain_estimators"))
    assert "posttrain-core" in finished(programs / "posttrain", "plugins")
    assert "Usage" in finished(programs / "posttrain", "--help")


@pytest.mark.parametrize(("package", "kind", "name"), [
    ("estimators", "estimator", "gae"), ("objectives", "objective", "ppo"), ("backends", "backend", "torch")])
def test_core_and_one_package(install: Callable[..., Path], package: str, kind: str, name: str) -> None:
    """A package lists what it offers, with nothing of the others and no framework installed."""
    programs = install("packages/core", f"packages/{package}")
    others = {"estimators", "objectives", "backends", "tuning"} - {package}
    assert absent(programs, (*FRAMEWORKS, *(f"posttrain_{other}" for other in others)))
    assert name in finished(programs / "posttrain", "plugins", kind).split()


def test_an_estimator_runs_without_a_framework(install: Callable[..., Path]) -> None:
    programs = install("packages/core", "packages/estimators")
    code = ("import sys, posttrain; gae = posttrain.discover().create('estimator', 'gae', gamma=0.5, lam=1.0); "
            "e = posttrain.Episodes.from_rows(rewards=[[0.0, 1.0]], values=[[0.0, 0.0]], bootstrap_values=[0.0]); "
            "print(*map(float, gae(e).targets)); assert 'torch' not in sys.modules")
    assert finished(programs / "python", "-c", code).split() == ["0.5", "1.0"]


def test_four_packages_and_one_extra_train_a_model_of_transformers(install: Callable[..., Path],
                                                                   tmp_path: Path) -> None:
    programs = install("packages/core", "packages/estimators", "packages/objectives", "packages/backends[hf]")
    assert absent(programs, ("jax", "peft", "mlflow", "datasets", "reasoning_gym", "posttrain_tuning"))
    script = Path(__file__).with_name("hf_run.py")
    assert finished(programs / "python", script, tmp_path / "made").endswith("steps 2\n")


def test_the_umbrella_brings_all_five(install: Callable[..., Path]) -> None:
    programs = install("packages/core", "packages/estimators", "packages/objectives", "packages/backends",
                       "packages/tuning", ".")
    code = "from importlib.metadata import version; print(version('posttrain'))"
    assert finished(programs / "python", "-c", code).strip() == "0.1.0"
    assert "broken" not in finished(programs / "posttrain", "plugins").lower()
    finished(programs / "python", "-m", "pip", "check")


@pytest.mark.parametrize("package", ["core", "estimators", "objectives", "backends", "tuning"])
def test_a_wheel_can_be_built_from_the_source_archive(package: str, tmp_path: Path) -> None:
    built = subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)],
                           cwd=ROOT / "packages" / package, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as held:
        held.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    finished(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
             "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"posttrain_{package}-")
