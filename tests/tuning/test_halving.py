"""Successive halving: which trials go on, and what the record says of them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from posttrain.errors import ConfigError, DataError
from posttrain.search import Goal, Space, read

pytest.importorskip("posttrain_tuning")
from posttrain_tuning.search.halving import promoted
from posttrain_tuning.search.importance import importances
from posttrain_tuning.search.study import RECORD, Record, Study, Trial, require_same
from posttrain_tuning.search.study import read as read_study

GOAL = (Goal("reward"),)


def simulated(trials: int, rungs: int, factor: int, order: list[float], maximize: bool = True) -> list[int]:
    """One worker, values that do not change from rung to rung; the rungs that each trial reached."""
    study = Study((Goal("reward", maximize),))
    while True:
        fresh = len(study.trials) < trials
        trial = promoted(study, rungs, factor, last=not fresh)
        if trial is None and not fresh:
            return [len(t.rungs) + (t.status == "complete") for t in study.trials]
        if trial is None:
            trial = Trial(len(study.trials), {})
        value, reached = order[trial.number], len(trial.rungs)
        status = "complete" if reached == rungs else "waiting"
        more = trial.rungs if status == "complete" else (*trial.rungs, value)
        study = study.with_trial(Trial(trial.number, {}, status, more, result=(value,)))  # type: ignore[arg-type]


def test_the_best_reach_the_end() -> None:
    """Nine trials, one rung, one in three: worst first many go on, since each was the best when it came."""
    rising = simulated(9, 1, 3, [float(i) for i in range(9)])
    falling = simulated(9, 1, 3, [float(-i) for i in range(9)])
    assert rising[8] == 2 and falling == [2, 2, 2, 1, 1, 1, 1, 1, 1]
    assert simulated(9, 1, 3, [float(i) for i in range(9)], maximize=False) == falling


@pytest.mark.parametrize("seed", range(5))
def test_the_best_of_all_is_never_left_behind(seed: int) -> None:
    values = random.Random(seed).sample(range(100), 12)
    reached = simulated(12, 2, 2, [float(v) for v in values])
    assert reached[values.index(max(values))] == 3 and sum(r == 3 for r in reached) < 9


def test_too_few_trials_still_give_one_that_ends() -> None:
    assert simulated(2, 2, 3, [0.0, 1.0]) == [1, 3]


def test_a_record_is_read_as_it_was_written_but_for_a_torn_line(tmp_path: Path) -> None:
    record = Record(tmp_path, GOAL)
    record.append(0, values={"lr": 0.1})
    record.append(0, status="waiting", rungs=[0.5], result=[0.5], step=2)
    record.append(1, values={"lr": 0.2})
    record.close()
    with (tmp_path / RECORD).open("ab") as file:
        file.write(b'{"trial": 1, "stat')
    assert read_study(tmp_path, GOAL) == record.study
    again = Record(tmp_path, GOAL)
    again.append(1, status="failed", reason="it was killed")
    again.close()
    assert [t.status for t in read_study(tmp_path, GOAL).trials] == ["waiting", "failed"]
    assert read_study(tmp_path, GOAL).trials[0].rungs == (0.5,)
    (tmp_path / RECORD).write_text('{"trial": 3}\n')
    with pytest.raises(DataError, match=r"trials.jsonl:1"):
        Record(tmp_path, GOAL)


def test_a_folder_keeps_to_one_study(tmp_path: Path) -> None:
    require_same(tmp_path, GOAL, {"space": "a"})
    require_same(tmp_path, GOAL, {"space": "a"})
    with pytest.raises(ConfigError, match="space is not what it was") as error:
        require_same(tmp_path, GOAL, {"space": "b"})
    assert "tune.study=DIR" in str(error.value)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(DataError):
        require_same(tmp_path, GOAL, {"space": "a"})


def test_the_best_keep_the_constraints_and_a_front_is_not_dominated() -> None:
    def trial(number: int, *values: float, violation: float = 0.0) -> Trial:
        return Trial(number, {}, "complete", result=values, violations={"kl": violation})
    given_up = Trial(3, {}, "pruned", result=(9.0,))
    study = Study(GOAL, (trial(0, 1.0), trial(1, 3.0, violation=0.1), trial(2, 2.0), given_up))
    assert [t.number for t in study.best()] == [2] and [t.number for t in study.ranked()] == [2, 0]
    two = (Goal("reward"), Goal("kl", maximize=False))
    front = Study(two, (trial(0, 1.0, 0.1), trial(1, 2.0, 0.2), trial(2, 1.5, 0.3), trial(3, 2.0, 0.2)))
    assert [t.number for t in front.best()] == [1, 3, 0]
    assert Study(GOAL).best() == ()


def test_importance_finds_what_matters() -> None:
    rng = random.Random(0)
    space: Space = read({"lr": {"log_uniform": [1e-4, 1.0]}, "noise": {"uniform": [0, 1]},
                         "kind": {"choice": ["a", {"use": "b", "c": {"uniform": [0, 1]}}]}}, (), lambda *_: None)
    trials = []
    for number in range(60):
        values = {"lr": 10 ** rng.uniform(-4, 0), "noise": rng.random(), "kind": rng.choice(["a", "b"])}
        values |= {"kind=b.c": rng.random()} if values["kind"] == "b" else {}
        trials.append(Trial(number, values, "complete", result=(values["lr"] + 0.1 * (values["kind"] == "a"),)))
    found = importances(space, trials, 0)
    assert next(iter(found)) == "lr" and found["lr"] > 0.6 and found["noise"] < 0.15 and found["kind=b.c"] < 0.3
    assert importances(space, trials[:3], 0) == {}
