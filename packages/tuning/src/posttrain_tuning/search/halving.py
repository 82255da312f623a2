"""Which trials go on from a rung: asynchronous successive halving (Li et al. 2020, arXiv 1810.05934, algorithm 2).

Whenever a worker is free, a trial that waits goes on if it is among the best 1 / factor of its rung, the highest rung
first; else a new trial begins. Knows trials and their values, and no process.
"""

from __future__ import annotations

from collections.abc import Sequence

from posttrain_tuning.search.study import Study, Trial


def promoted(study: Study, rungs: int, factor: int, last: bool) -> Trial | None:
    """The waiting trial that goes on next; None where none is among the best of its rung. With `last` no trial will
    reach a rung any more below which nothing goes on, so that one trial of a rung goes on however few there are.

    >>> from posttrain.search import Goal
    >>> trials = [Trial(i, {}, "waiting", (x,)) for i, x in enumerate((0.1, 0.3, 0.2))]
    >>> promoted(Study((Goal("reward"),), tuple(trials)), 1, 3, last=False).number
    1
    >>> promoted(Study((Goal("reward"),), tuple(trials[:2])), 1, 3, last=False)
    """
    for rung in reversed(range(rungs)):
        reached = ranked(study, rung)
        below = any(t.status in ("asked", "waiting") and len(t.rungs) <= rung for t in study.trials)
        count = len(reached) // factor or (1 if last and not below else 0)
        for trial in reached[:count]:
            if trial.status == "waiting" and len(trial.rungs) == rung + 1:
                return trial
    return None


def ranked(study: Study, rung: int) -> Sequence[Trial]:
    """Trials that reached a rung, best first, of equal ones the first."""
    sign = -1 if study.goals[0].maximize else 1
    return sorted((t for t in study.trials if len(t.rungs) > rung), key=lambda t: (sign * t.rungs[rung], t.number))
