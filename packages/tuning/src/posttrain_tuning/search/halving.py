"""Which trials go on from a rung: asynchronous successive halving (Li et al. 2020, arXiv 1810.05934, algorithm 2).

Whenever a worker is free, a trial that waits goes on if it is among the best 1 / factor of its rung, the highest rung
first; else a new trial begins. Knows trials and their values, and no process.
"""

from __future__ import annotations

from collections.abc import Sequence

from posttrain_tuning.search.study import Study, Trial


def promoted(study: Study, rungs: int, factor: int, last: bool) -> Trial | None:
    """The waiting trial that goes on next; None where none is among the best of its rung. With `last` no trial
    will begin any more: of a rung with fewer than `factor` the best one goes on, so that one comes to its end.

    >>> from posttrain.search import Goal
    >>> trials = [Trial(i, {}, "waiting", (x,)) for i, x in enumerate((0.1, 0.3, 0.2))]
    >>> promoted(Study((Goal("reward"),), tuple(trials)), 1, 3, last=False).number
    1
    >>> promoted(Study((Goal("reward"),), tuple(trials[:2])), 1, 3, last=False)
    """
    counts = [len(ranked(study, rung)) // factor for rung in range(rungs)]
    for rung in reversed(range(rungs)):
        if (trial := _waiting(study, rung, counts[rung])) is not None:
            return trial
    for rung in range(rungs) if last else ():
        coming = any(t.status == "asked" and len(t.rungs) <= rung for t in study.trials)
        if not counts[rung] and not coming and (trial := _waiting(study, rung, 1)) is not None:
            return trial
    return None


def _waiting(study: Study, rung: int, count: int) -> Trial | None:
    """The first of the best `count` trials of a rung that has not gone on from it."""
    best = ranked(study, rung)[:count]
    return next((t for t in best if t.status == "waiting" and len(t.rungs) == rung + 1), None)


def ranked(study: Study, rung: int) -> Sequence[Trial]:
    """Trials that reached a rung, best first, of equal ones the first."""
    sign = -1 if study.goals[0].maximize else 1
    return sorted((t for t in study.trials if len(t.rungs) > rung), key=lambda t: (sign * t.rungs[rung], t.number))
