"""Pareto fronts: an archive of trade-offs, indicators of how good they are, and runs that cover a front.

    >>> archive = ParetoArchive(("accuracy", "brevity"))
    >>> archive.insert((0.8, 0.3), tag="step-40")
    True
    >>> hypervolume([point.values for point in archive.front()], (0.0, 0.0))
    0.24
"""

from posttrain_objectives.pareto.archive import ParetoArchive, Point
from posttrain_objectives.pareto.dominance import crowding, knee, nondominated
from posttrain_objectives.pareto.indicators import additive_epsilon, contributions, hypervolume, igd_plus

__all__ = ["ParetoArchive", "Point", "additive_epsilon", "contributions", "crowding", "hypervolume", "igd_plus",
           "knee", "nondominated"]
