"""Each package that `posttrain new` writes in a fresh environment of its own, with what pip finds at the index."""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path

import pytest
from posttrain.authoring import OFFERS, Names

pytestmark = [pytest.mark.clean, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]


def finished(*command: str | Path, cwd: Path) -> str:
    """Output of a command that must succeed, without this process's Python settings."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("kind", OFFERS)
def test_a_new_package_needs_core_alone(kind: str, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    programs, name = tmp_path / "venv" / "bin", f"my_{kind}"
    pip = (programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint",
           ROOT / "constraints.txt")
    finished(*pip, f"{ROOT / 'packages' / 'core'}[testing]", cwd=tmp_path)
    finished(programs / "posttrain", "new", kind, name, cwd=tmp_path)
    root = tmp_path / Names(name).distribution
    finished(*pip, "--editable", ".", "posttrain-core[testing]", cwd=root)  # as its README says
    assert name in finished(programs / "posttrain", "plugins", kind, cwd=root).split()
    finished(programs / "posttrain", "train", "train.yaml", "--quiet", cwd=root)
    finished(programs / "python", "-m", "pytest", "-q", cwd=root)
    finished(programs / "python", "-m", "pip", "check", cwd=root)
