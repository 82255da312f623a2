"""Asks botorch about Pareto fronts: `pip install -r botorch.txt`, then `python from_botorch.py`."""

from __future__ import annotations

from importlib.metadata import version

import front_cases
import mixing_cases
import torch
from botorch.utils.multi_objective.hypervolume import Hypervolume
from botorch.utils.multi_objective.pareto import is_non_dominated


def main() -> None:
    torch.set_num_threads(1)
    fixture = mixing_cases.Fixture()
    for points, _ in front_cases.sets():
        r, given = front_cases.reference(points.shape[1]), torch.from_numpy(points)
        kept = is_non_dominated(given, maximize=True, deduplicate=True)
        fixture.add("is_non_dominated", {}, points, kept.numpy())
        front = given[kept & (given > torch.from_numpy(r)).all(dim=1)]
        volume = Hypervolume(torch.from_numpy(r)).compute(front) if len(front) else 0.0
        fixture.add("Hypervolume", {"reference": r.tolist()}, points, volume)
    fixture.save("botorch", front_cases.SEED, **{name: version(name) for name in ("botorch", "torch", "numpy")})


if __name__ == "__main__":
    main()
