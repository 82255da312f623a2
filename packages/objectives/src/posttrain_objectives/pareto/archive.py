"""The best trade-offs found so far: a set of points of which none dominates another, kept small, with what made them.

All objectives are maximised. Knows points, not what they are measured on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Self, final

import numpy as np
from posttrain.errors import DataError, Problem

from posttrain_objectives.pareto.dominance import Floats, boxes, crowding, knee, weakly_dominates
from posttrain_objectives.pareto.indicators import SLICED, contributions, hypervolume

FORMAT = 1
"""Of `ParetoArchive.to_json`."""


@final
@dataclass(frozen=True, slots=True)
class Point:
    """One measured trade-off."""

    values: tuple[float, ...]
    """[m] means of the objectives."""
    tag: str = ""
    """What it is called."""
    errors: tuple[float, ...] = ()
    """[m] standard errors of the means; empty where they are exact."""
    checkpoint: str = ""
    """Where the weights are that have these values."""


@final
@dataclass(frozen=True, slots=True)
class Rules:
    """What an archive keeps."""

    objectives: tuple[str, ...]
    """Names of the m objectives."""
    reference: tuple[float, ...] = ()
    """[m] reference point of hypervolumes; empty for none."""
    epsilon: tuple[float, ...] = ()
    """[m] steps of a grid of which one point a box is kept; empty keeps every point that is not dominated."""
    capacity: int = 0
    """Most points kept; 0 for no limit."""
    confidence: float = 0.95
    """Of the one-sided bound that a point with standard errors stands for."""

    def __post_init__(self) -> None:
        m = len(self.objectives)
        if m < 1 or len(set(self.objectives)) < m or "" in self.objectives:
            raise ValueError(f"objectives must be different names, at least one, got {self.objectives}")
        for name in ("reference", "epsilon"):
            given = getattr(self, name)
            if len(given) not in (0, m) or not all(map(math.isfinite, given)):
                raise ValueError(f"{name} needs {m} finite numbers, one for each of {', '.join(self.objectives)}, got "
                                 f"{given}")
        if any(step <= 0 for step in self.epsilon):
            raise ValueError(f"epsilon must be positive, got {self.epsilon}")
        if self.capacity < 0:
            raise ValueError(f"capacity must not be negative, got {self.capacity}; 0 keeps every point")
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence lies in [0.5, 1), got {self.confidence}")

    def bounds(self, points: Sequence[Point]) -> Floats:
        """[N, m] what points are compared by: means, or mean - z * standard error where there is one, with z the
        quantile of the normal distribution at `confidence`. Noise can then not win by luck."""
        z = NormalDist().inv_cdf(self.confidence)
        rows = [np.subtract(p.values, z * np.asarray(p.errors) if p.errors else 0.0) for p in points]
        return np.array(rows, np.float64).reshape(len(points), len(self.objectives))


@final
class ParetoArchive:
    """Points of which none dominates another.

    Which points stay does not depend on the order of insertion, as long as neither `capacity` nor a tie decides: equal
    points and equal distances leave the one that came first.

    >>> archive = ParetoArchive(("accuracy", "brevity"), reference=(0.0, 0.0))
    >>> archive.insert((0.8, 0.3), tag="step-40"), archive.insert((0.5, 0.6), tag="step-80")
    (True, True)
    >>> archive.insert((0.4, 0.6), tag="step-90")
    False
    >>> [point.tag for point in archive.front()], archive.hypervolume()
    (['step-40', 'step-80'], 0.39)
    """

    def __init__(self, objectives: Iterable[str], *, reference: Iterable[float] = (),
                 epsilon: float | Iterable[float] = (), capacity: int = 0, confidence: float = 0.95) -> None:
        """See `Rules`; one number as `epsilon` stands for every objective. Raises `ValueError`."""
        names = (objectives,) if isinstance(objectives, str) else tuple(objectives)
        steps = (float(epsilon),) * len(names) if isinstance(epsilon, int | float) else tuple(map(float, epsilon))
        self.rules = Rules(names, tuple(map(float, reference)), steps, capacity, confidence)
        self._points: tuple[Point, ...] = ()

    def insert(self, values: Iterable[float], *, tag: str = "", errors: Iterable[float] = (), checkpoint: str = ""
               ) -> bool:
        """Offer a point; returns whether it is in the archive now. Points that it dominates leave.

        `errors` are standard errors of the values: compared is then the lower bound (`Rules.bounds`). Raises
        `ValueError` for a wrong number of values and for ones that are not finite.
        """
        new = Point(self._checked(values, "value"), tag, self._checked(errors, "standard error", empty=True),
                    checkpoint)
        self._points = bounded(self.rules, inserted(self.rules, self._points, new))
        return any(point is new for point in self._points)

    def front(self) -> tuple[Point, ...]:
        """The points, from the best in the first objective to the worst."""
        return tuple(sorted(self._points, key=lambda point: point.values, reverse=True))

    def knee(self) -> Point:
        """The point that gives up least of everything: farthest beyond the plane through the ends of the front.

        Raises `ValueError` where the archive is empty.

        >>> archive = ParetoArchive(("accuracy", "brevity"))
        >>> [archive.insert(y) for y in ((0.9, 0.0), (0.8, 0.7), (0.0, 0.9))]
        [True, True, True]
        >>> archive.knee().values
        (0.8, 0.7)
        """
        points = self.front()
        return points[knee(self.rules.bounds(points))]

    def hypervolume(self) -> float:
        """What the points dominate above the reference point. Raises `ValueError` where there is none."""
        if not self.rules.reference:
            raise ValueError("a hypervolume needs a reference point: ParetoArchive(objectives, reference=(...))")
        return hypervolume(self.rules.bounds(self._points), self.rules.reference)

    def to_json(self) -> str:
        """Rules and points; numbers come back bit for bit."""
        return json.dumps({"format": FORMAT, **asdict(self.rules), "points": [asdict(p) for p in self._points]},
                          ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = "") -> Self:
        """What `to_json` wrote, found at `where`. Raises `DataError`.

        >>> archive = ParetoArchive(("a", "b"))
        >>> archive.insert((0.1, 0.2), tag="x", errors=(0.01, 0.0))
        True
        >>> ParetoArchive.from_json(archive.to_json()) == archive
        True
        """
        try:
            return cls._read(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError([Problem(f"not an archive of points: {error!r}", where)]) from error

    @classmethod
    def _read(cls, given: Mapping[str, Any]) -> Self:
        if given["format"] != FORMAT:
            raise ValueError(f"it has format {given['format']!r}, this version reads {FORMAT}")
        archive = cls(**{name: given[name] for name in Rules.__dataclass_fields__})
        archive._points = tuple(
            Point(archive._checked(p["values"], "value"), str(p["tag"]),
                  archive._checked(p["errors"], "standard error", empty=True), str(p["checkpoint"]))
            for p in given["points"])
        return archive

    def _checked(self, given: Iterable[float], what: str, empty: bool = False) -> tuple[float, ...]:
        numbers, names = tuple(float(x) for x in given), self.rules.objectives
        if empty and not numbers:
            return ()
        if len(numbers) != len(names):
            raise ValueError(f"a point needs one {what} for each of {', '.join(names)}, got {len(numbers)}")
        for name, x in zip(names, numbers):
            if not math.isfinite(x) or (empty and x < 0):
                raise ValueError(f"the {what} of {name} is {x}")
        return numbers

    def __len__(self) -> int:
        return len(self._points)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParetoArchive) and (self.rules, self._points) == (other.rules, other._points)

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        return f"ParetoArchive({', '.join(self.rules.objectives)}: {len(self)} points)"


def inserted(rules: Rules, points: tuple[Point, ...], new: Point) -> tuple[Point, ...]:
    """The points with a new one that none of them weakly dominates, and without those that it dominates."""
    if rules.epsilon:
        return _in_boxes(rules, points, new)
    F, y = rules.bounds(points), rules.bounds([new])[0]
    if weakly_dominates(F, y).any():
        return points
    return (*(point for point, beaten in zip(points, (y >= F).all(axis=1)) if not beaten), new)


def _in_boxes(rules: Rules, points: tuple[Point, ...], new: Point) -> tuple[Point, ...]:
    """The same among boxes of a grid; of two points in one box the one nearer to its best corner stays, which is the
    dominating one where one of them dominates (Laumanns et al. 2002, algorithm 3)."""
    epsilon, y = np.asarray(rules.epsilon), rules.bounds([new])
    B, b = boxes(rules.bounds(points), epsilon), boxes(y, epsilon)[0]
    same = (b == B).all(axis=1)
    if (weakly_dominates(B, b) & ~same).any():
        return points
    def distance(F: Floats) -> Floats:
        return np.asarray(np.linalg.norm(b + 1 - F / epsilon, axis=1))
    if (distance(rules.bounds(points))[same] <= distance(y)[0]).any():
        return points
    return (*(point for point, beaten in zip(points, (b >= B).all(axis=1)) if not beaten), new)


def bounded(rules: Rules, points: tuple[Point, ...]) -> tuple[Point, ...]:
    """At most `capacity` points: as long as there are more, without the one that adds least hypervolume, or, where
    there is no reference point or more than four objectives, the one that is most crowded; of equal ones the last."""
    while rules.capacity and len(points) > rules.capacity:
        F = rules.bounds(points)
        worth = contributions(F, rules.reference) if rules.reference and F.shape[1] <= SLICED else crowding(F)
        least = len(points) - 1 - int(np.argmin(worth[::-1]))
        points = points[:least] + points[least + 1:]
    return points
