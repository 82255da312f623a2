"""What is published of each package: wheels, source archives, their metadata, and the umbrella that pins them."""

from __future__ import annotations

import sys
import tarfile
import venv
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import pytest
from environments import ROOT, finished

pytestmark = [pytest.mark.clean, pytest.mark.timeout(600)]

MODULES = {"core": "posttrain", **{name: f"posttrain_{name}" for name in (
    "estimators", "objectives", "backends", "tuning")}}
package = pytest.mark.parametrize("package", MODULES)


@package
def test_a_wheel_holds_all_that_is_in_the_source_and_no_test(package: str, wheel: Callable[[str], Path]) -> None:
    source, module = ROOT / "packages" / package / "src", MODULES[package]
    held = {name for name in ZipFile(wheel(package)).namelist() if ".dist-info/" not in name}
    there = {str(p.relative_to(source)) for p in (source / module).rglob("*")
             if p.is_file() and not any(part.startswith((".", "__pycache__")) for part in p.parts)}
    assert held == there and f"{module}/py.typed" in held
    if package == "core":
        assert "posttrain/known_components.json" in held and "posttrain/templates/init/train.yaml.tmpl" in held
    assert not [name for name in held if "/tests/" in name and "/templates/" not in name]


@package
def test_metadata_of_a_wheel(package: str, wheel: Callable[[str], Path]) -> None:
    archive = ZipFile(wheel(package))
    path, = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    read = message_from_bytes(archive.read(path))
    assert read["Name"] == f"posttrain-{package}" and read["License-Expression"] == "Apache-2.0"
    assert read["Description-Content-Type"] == "text/markdown" and read["Requires-Python"] == ">=3.11"
    readme = (ROOT / "packages" / package / "README.md").read_text("utf-8")
    assert str(read.get_payload()).strip() == readme.strip()
    assert archive.read(path.replace("METADATA", "licenses/LICENSE")) == (ROOT / "LICENSE").read_bytes()


@package
def test_the_source_archive_gives_the_same_wheel(package: str, wheel: Callable[[str], Path], tmp_path: Path) -> None:
    archive, = wheel(package).parent.glob("*.tar.gz")
    with tarfile.open(archive) as held:
        held.extractall(tmp_path / "source", filter="data")
    source, = (tmp_path / "source").iterdir()
    finished(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=source)
    built, = tmp_path.glob("*.whl")
    assert sorted(ZipFile(built).namelist()) == sorted(ZipFile(wheel(package)).namelist())


def test_the_umbrella_resolves_with_all_extras(wheel: Callable[[str], Path], tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", symlinks=True)
    out = finished(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python",
                   tmp_path / "venv" / "bin" / "python", "install", "--dry-run", "--constraint",
                   ROOT / "constraints.txt", *map(wheel, MODULES), f"{wheel('')}[all]", cwd=tmp_path)
    last = out.strip().splitlines()[-1]
    assert last.startswith("Would install")
    for name in ("posttrain", *(f"posttrain-{n}" for n in MODULES), "transformers", "wandb", "math-verify"):
        assert f" {name}-" in last
