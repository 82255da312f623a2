"""Write the index of components of the project's own packages, by which an error knows what to install.

Run after a component was added, renamed or removed: python tools/known_components.py
"""

from __future__ import annotations

import json
from importlib import metadata

from posttrain.doctor import PACKAGES
from posttrain.hookspecs import ENTRY_POINT_GROUP
from posttrain.known import INDEX
from posttrain.registry import discover


def index() -> str:
    """The index as it must be for the packages that are installed here, one component a line."""
    points = [point for name in PACKAGES for point in metadata.distribution(name).entry_points
              if point.group == ENTRY_POINT_GROUP]
    registry = discover(environ={}, entry_points=points)
    if registry.broken:
        raise SystemExit(f"broken: {registry.broken}")
    entries = sorted((p.distribution, c.kind, c.name, c.extra) for p in registry.plugins for c in p.components)
    fields = ("distribution", "kind", "name", "extra")
    lines = [json.dumps({field: value for field, value in zip(fields, entry) if value}) for entry in entries]
    return "[\n" + ",\n".join(lines) + "\n]\n"


if __name__ == "__main__":
    INDEX.write_text(index(), "utf-8")
    print(f"wrote {INDEX}")
