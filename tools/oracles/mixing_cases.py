"""The file that keeps what oracles answer about multipliers and weights of gradients: for each case settings, an array
that was given, and an array that came back. Knows no library, not even ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).parents[2] / "tests" / "oracles" / "fixtures"


class Fixture:
    """Cases of one library; there is nothing in the file but numbers and a text of JSON."""

    def __init__(self) -> None:
        self.cases: list[dict[str, Any]] = []
        self.arrays: list[np.ndarray] = []

    def add(self, function: str, settings: Mapping[str, Any], given: Any, result: Any) -> None:
        """What `function` answered, called with `settings` on `given`."""
        arrays = [np.asarray(x, np.float64) for x in (given, result)]
        self.cases.append({"function": function, "settings": dict(settings), "shapes": [x.shape for x in arrays]})
        self.arrays.extend(x.reshape(-1) for x in arrays)

    def save(self, library: str, seed: int, **versions: str) -> None:
        """Write `library`.npz, the same bytes for the same answers; `versions` are those of what gave them."""
        about = {"seed": seed, "versions": versions, "cases": self.cases}
        path = FIXTURES / f"{library}.npz"
        np.savez_compressed(path, about=np.frombuffer(json.dumps(about).encode(), np.uint8),
                            numbers=np.concatenate(self.arrays))
        print(f"{path.name}: {len(self.cases)} cases, {path.stat().st_size} bytes")
