"""Asks pymoo about Pareto fronts: `pip install -r pymoo.txt`, then `python from_pymoo.py`.

It minimises, so points go in with their signs changed. Its crowding distance is divided by the number of objectives,
which is taken back here; of points with equal coordinates its neighbours are arbitrary, so it is asked about points
that differ in all.
"""

from __future__ import annotations

from importlib.metadata import version

import front_cases
import mixing_cases
import numpy as np
from pymoo.indicators.hv import HV
from pymoo.indicators.igd_plus import IGDPlus
from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting


def main() -> None:
    fixture, rng = mixing_cases.Fixture(), np.random.default_rng(front_cases.SEED)
    for points, front in front_cases.sets():
        m = points.shape[1]
        r, unique = front_cases.reference(m), np.unique(points, axis=0)
        better = np.zeros(len(unique))
        better[NonDominatedSorting().do(-unique, only_non_dominated_front=True)] = 1.0
        fixture.add("NonDominatedSorting", {}, unique, better)
        fixture.add("HV", {"reference": r.tolist()}, points, HV(ref_point=-r)(-points))
        fixture.add("IGDPlus", {"front": front.tolist()}, points, IGDPlus(-front)(-points))
        different = points + rng.uniform(0.0, 1e-3, points.shape)
        fixture.add("calc_crowding_distance", {}, different, m * calc_crowding_distance(-different))
    fixture.save("pymoo", front_cases.SEED, **{name: version(name) for name in ("pymoo", "numpy")})


if __name__ == "__main__":
    main()
