"""Each package that `posttrain new` writes in a fresh environment of its own, with what pip finds at the index."""

from __future__ import annotations

from pathlib import Path

import pytest
from environments import ROOT
from posttrain.authoring import OFFERS, Names

from .conftest import Fresh

pytestmark = [pytest.mark.clean, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("kind", OFFERS)
def test_a_new_package_needs_core_alone(kind: str, fresh: Fresh, tmp_path: Path) -> None:
    environment, name = fresh("core[testing]", others=("pip",)), f"my_{kind}"
    environment.output("posttrain", "new", kind, name, cwd=tmp_path)
    root = tmp_path / Names(name).distribution
    environment.output("python", "-m", "pip", "--quiet", "install", "--constraint", ROOT / "constraints.txt",
                       "--editable", ".", "posttrain-core[testing]", cwd=root)  # as its README says
    assert name in environment.output("posttrain", "plugins", kind, cwd=root).split()
    environment.output("posttrain", "train", "train.yaml", "--quiet", cwd=root)
    environment.output("python", "-m", "pytest", "-q", cwd=root)
    environment.output("python", "-m", "pip", "check", cwd=root)
