"""Asks moocore about Pareto fronts: `pip install -r moocore.txt`, then `python from_moocore.py`.

Its contributions of points that are there twice or dominated are 0, as ours.
"""

from __future__ import annotations

from importlib.metadata import version

import front_cases
import mixing_cases
import moocore
import numpy as np


def main() -> None:
    fixture = mixing_cases.Fixture()
    for points, front in front_cases.sets():
        r = front_cases.reference(points.shape[1])
        def add(function: str, result: object, points: np.ndarray = points, **settings: object) -> None:
            fixture.add(function, settings, points, result)
        add("is_nondominated", moocore.is_nondominated(points, maximise=True, keep_weakly=False))
        add("hypervolume", moocore.hypervolume(points, ref=r, maximise=True), reference=r.tolist())
        add("hv_contributions", moocore.hv_contributions(points, ref=r, maximise=True, ignore_dominated=False),
            reference=r.tolist())
        add("igd_plus", moocore.igd_plus(points, ref=front, maximise=True), front=front.tolist())
        add("epsilon_additive", moocore.epsilon_additive(points, ref=front, maximise=True), front=front.tolist())
    fixture.save("moocore", front_cases.SEED, **{name: version(name) for name in ("moocore", "numpy")})


if __name__ == "__main__":
    main()
