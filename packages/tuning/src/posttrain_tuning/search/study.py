"""The record of a study: what happened to its trials, a line for each event, and what follows from it.

A line is appended whole before anything goes on, so whatever was killed, the record says how far it came. Knows no
process and no searcher.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, final

from posttrain.errors import ConfigError, DataError, Problem
from posttrain.rundir import JsonLines, replace_text
from posttrain.search import Goal, Result, Values, dominates

RECORD, HEADER, FORMAT = "trials.jsonl", "study.json", 1
"""Files in a study's folder, and the version of what they hold."""

Status = Literal["asked", "waiting", "complete", "pruned", "failed"]
"""Of a trial: under way or to be gone on with; at rest on a rung; over."""
OVER = ("complete", "pruned", "failed")


@final
@dataclass(frozen=True, slots=True)
class Trial:
    """What is known of a trial."""

    number: int
    values: Values
    status: Status = "asked"
    rungs: tuple[float, ...] = ()
    """Value of the objective at each rung that was reached."""
    end: int = 0
    """Number of the rung that it is to reach, or reached last; behind all rungs is the end of the run."""
    result: tuple[float, ...] = ()
    """One for each objective, as last measured; empty where nothing was."""
    violations: Mapping[str, float] = field(default_factory=dict)
    step: int = 0
    """Of training, after which they were measured."""
    reason: str = ""
    """Why it was pruned or failed."""
    deaths: int = 0
    """How often its process was killed while it was watched."""
    seconds: float = 0.0
    """That its processes took."""

    @property
    def is_over(self) -> bool:
        return self.status in OVER

    @property
    def feasible(self) -> bool:
        """Whether it came to its end within all constraints."""
        return self.status == "complete" and all(v <= 0 for v in self.violations.values())

    def told(self) -> Result:
        """What a searcher learns of it."""
        if self.status == "asked" or self.status == "waiting":
            raise ValueError(f"trial {self.number} is not over")
        return Result(self.status, self.result, self.step, dict(self.violations))


@final
@dataclass(frozen=True, slots=True)
class Study:
    """All trials so far, by number from 0."""

    goals: tuple[Goal, ...]
    trials: tuple[Trial, ...] = ()

    def with_trial(self, trial: Trial) -> Study:
        """In the place of the one of its number, or behind all."""
        return replace(self, trials=(*self.trials[:trial.number], trial, *self.trials[trial.number + 1:]))

    def ranked(self) -> list[Trial]:
        """Trials that ended within the constraints, best first; of several goals those of the front, by the first."""
        sign = -1 if self.goals[0].maximize else 1
        ended = [t for t in self.trials if t.feasible]
        best = [t for t in ended if not any(dominates(o.result, t.result, self.goals) for o in ended)]
        return sorted(ended if len(self.goals) == 1 else best, key=lambda t: (sign * t.result[0], t.number))

    def best(self) -> tuple[Trial, ...]:
        """The best trial, or all of the front; nothing where none ended within the constraints."""
        ranked = self.ranked()
        return tuple(ranked[:1] if len(self.goals) == 1 else ranked)


def applied(study: Study, event: Mapping[str, Any]) -> Study:
    """The study after one line of the record."""
    given = {name: value for name, value in event.items() if name != "trial"}
    given |= {name: tuple(given[name]) for name in ("rungs", "result") if name in given}
    number = event["trial"]
    if number > len(study.trials):
        raise ValueError(f"trial {number} comes before trial {len(study.trials)}")
    known = study.trials[number] if number < len(study.trials) else None
    return study.with_trial(Trial(number, **given) if known is None else replace(known, **given))


@final
class Record:
    """The open record of a study, which one process holds."""

    def __init__(self, directory: Path, goals: Sequence[Goal]) -> None:
        """Raises `DataError` where a line cannot be read."""
        self.study = read(directory, goals)
        self._lines = JsonLines(directory / RECORD)

    def append(self, number: int, **changes: Any) -> Trial:
        """What changed of a trial; returns the trial."""
        event = {"trial": number, **changes}
        study = applied(self.study, json.loads(json.dumps(event)))
        self._lines.append([event])
        self._lines.sync()
        self.study = study
        return study.trials[number]

    def close(self) -> None:
        self._lines.close()


def read(directory: Path, goals: Sequence[Goal]) -> Study:
    """The study whose record lies in a folder. Raises `DataError` naming the line that cannot be read."""
    path, study = directory / RECORD, Study(tuple(goals))
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            study = applied(study, json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError([Problem(f"not a line of a study: {error}", f"{path}:{number}")],
                            next_step="choose another folder: tune.study=DIR") from error
    return study


def require_same(directory: Path, goals: Iterable[Goal], fingerprint: Mapping[str, str]) -> None:
    """Write what a study is of into its folder, or compare with what is there. Raises `ConfigError` where its trials
    would not compare with further ones."""
    path = directory / HEADER
    header = {"format": FORMAT, "goals": [asdict(goal) for goal in goals], **fingerprint}
    if not path.is_file():
        replace_text(path, json.dumps(header, indent=1) + "\n")
        return
    try:
        found = json.loads(path.read_text("utf-8"))
        different = sorted(name for name in header if found[name] != header[name])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError([Problem(f"not a study of this version: {error!r}", str(path))],
                        next_step="choose another folder: tune.study=DIR") from error
    if different:
        raise ConfigError([Problem(f"{name} is not what it was", str(path)) for name in different],
                          title="the folder holds a study whose trials would not compare with further ones:",
                          next_step="choose another folder: tune.study=DIR")
