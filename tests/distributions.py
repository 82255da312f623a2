"""Installed distributions for tests: a folder on the path with what pip leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def install(folder: Path, distribution: str, source: str, *, version: str = "0.1.0", group: str = "posttrain.v1",
            requires: Sequence[str] = ()) -> None:
    """An installed distribution with one plugin module, as pip leaves it behind."""
    module = distribution.replace("-", "_") + "_under_test"
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {r}" for r in requires)]) + "\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nplugin = {module}\n")
