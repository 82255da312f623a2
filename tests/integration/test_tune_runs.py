"""`posttrain tune`: small studies of real runs, killed and gone on with, and what it says of bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import posttrain
import pytest
import typer
import yaml
from posttrain.errors import ConfigError, PosttrainError, RunInUse
from posttrain.registry import discover
from posttrain.rundir import read_metrics

pytestmark = pytest.mark.needs("optuna", "posttrain_tuning")

REWARDS = '''
import os, time

def correct(completions, answer, **columns):
    time.sleep(float(os.environ.get("SLEEP", "0")))
    return [float(c == a) for c, a in zip(completions, answer)]
'''
BASE: dict[str, Any] = {
    "plugins": ["posttrain.toy"], "steps": 6, "threads": 1, "policy": "toy", "estimator": "toy", "objective": "toy",
    "kl": "none", "tokenizer": {"use": "characters", "alphabet": "0123abcd"},
    "task": {"use": "rows", "path": "data.jsonl", "held_out": "data.jsonl"},
    "rewards": {"correct": {"file": "rewards.py:correct"}}, "reward_workers": {"count": 1},
    "rollout": {"engine": "toy", "prompts_per_step": 4, "group_size": 8, "max_new_tokens": 1},
    "checkpoint": {"every": 1}, "trackers": {"console": None, "jsonl": None}}
TUNE: dict[str, Any] = {
    "space": {"optimizer.lr": {"log_uniform": [1e-3, 1.0]}, "rollout": {"group_size": {"choice": [2, 8]}}},
    "objectives": [{"metric": "eval/reward/mean"}], "trials": 3, "searcher": {"use": "optuna", "sampler": "random"}}


def written(folder: Path, changes: dict[str, Any] | None = None, /, **tune: Any) -> Path:
    """A study's file in `folder`, and what it needs; `changes` are those of the configuration."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "data.jsonl").write_text("".join(
        json.dumps({"prompt": str(i), "answer": "abcd"[i]}) + "\n" for i in range(4)))
    block = {**TUNE, "study": str(folder / "study"), **tune}
    (folder / "tune.yaml").write_text(yaml.safe_dump({**BASE, **(changes or {}), "tune": block}))
    return folder / "tune.yaml"


def tune(*arguments: object) -> None:
    """The command as the command line calls it; errors are raised."""
    from posttrain_tuning.command import tune as command

    app = typer.Typer()
    app.command()(command)
    typer.main.get_command(app).main([str(a) for a in arguments], standalone_mode=False, obj=discover())


def trials(folder: Path) -> list[Any]:
    from posttrain_tuning.search.plan import read
    from posttrain_tuning.search.study import read as read_study

    plan = read(folder / "tune.yaml", [], discover())
    return list(read_study(plan.directory, plan.goals).trials)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "timing"} for line in read_metrics(run)]


def started(folder: Path, **environment: str) -> subprocess.Popen[bytes]:
    """The command in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "posttrain.cli", "tune", str(folder / "tune.yaml"), "-q"],
                            env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def lease(folder: Path, trial: int) -> Any:
    from posttrain_tuning.search import worker

    return worker.read(folder / "study" / "leases" / f"trial-{trial:04d}.json")


def steps(folder: Path, trial: int) -> int:
    path = folder / "study" / f"trial-{trial:04d}" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nothing disturbed."""
    folder = tmp_path_factory.mktemp("tune") / "whole"
    tune(written(folder), "-q")
    return folder


def same(one: Any, other: Any) -> bool:
    return (one.values, one.status, one.result, one.step) == (other.values, other.status, other.result, other.step)


def test_every_trial_is_an_ordinary_run_measured_as_asked(whole: Path) -> None:
    found = trials(whole)
    assert [t.status for t in found] == ["complete"] * 3
    for trial in found:
        run = whole / "study" / f"trial-{trial.number:04d}"
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["optimizer"]["lr"] == trial.values["optimizer.lr"]
        assert str(config["rollout"]["group_size"]) == trial.values["rollout.group_size"]
        assert "tune" not in config and trial.result == (metrics(run)[-1]["eval/reward/mean"],) and trial.step == 6
        assert posttrain.sample(run, "0")


def test_the_best_configuration_trains_to_the_same_numbers(whole: Path, tmp_path: Path) -> None:
    best = max(trials(whole), key=lambda t: (t.result[0], -t.number))
    text = (whole / "study" / "best.yaml").read_text()
    assert text.startswith(f"# trial-{best.number:04d} of study: eval/reward/mean ") and "tune:" not in text
    posttrain.train(whole / "study" / "best.yaml", [f"run={tmp_path / 'again'}"], output="quiet")
    assert metrics(tmp_path / "again") == metrics(whole / "study" / f"trial-{best.number:04d}")


def test_a_file_with_a_search_is_an_ordinary_configuration(whole: Path, tmp_path: Path) -> None:
    run = posttrain.train(whole / "tune.yaml", [f"run={tmp_path / 'base'}"], output="quiet")
    assert run.state.step == 6 and run.settings.rollout.group_size == 8


def test_the_page_shows_every_trial(whole: Path) -> None:
    page = (whole / "study" / "tune.html").read_text()
    assert all(f'href="trial-{n:04d}/report.html"' in page for n in range(3)) and "<script" not in page
    assert page.count("<circle") == 3 and "http-equiv=\"refresh\"" not in page and "parallel coordinates" in page


def test_the_same_command_again_runs_nothing_and_more_trials_only_what_is_new(whole: Path) -> None:
    before = (whole / "study" / "trials.jsonl").read_bytes()
    tune(whole / "tune.yaml", "-q")
    assert (whole / "study" / "trials.jsonl").read_bytes() == before
    tune(whole / "tune.yaml", "-q", "tune.trials=4", "tune.workers=2")
    try:
        assert (whole / "study" / "trials.jsonl").read_bytes().startswith(before) and len(trials(whole)) == 4
    finally:
        (whole / "study" / "trials.jsonl").write_bytes(before)


@pytest.mark.parametrize("whom", ["worker", "study", "both"])
def test_what_is_killed_goes_on_and_ends_with_the_same_trials(whole: Path, tmp_path: Path, whom: str) -> None:
    """kill -9 in the midst of the second trial."""
    written(tmp_path)
    study = started(tmp_path, SLEEP="0.1")
    until(lambda: steps(tmp_path, 1) >= 3)
    victim = lease(tmp_path, 1)
    if whom in ("study", "both"):
        study.kill()
        study.wait()
        assert victim.alive, "a trial outlives its study"
    if whom in ("worker", "both"):
        os.kill(victim.pid, signal.SIGKILL)
    if whom == "worker":
        assert study.wait(60) == 0
    else:
        tune(tmp_path / "tune.yaml", "-q")
    found = trials(tmp_path)
    assert all(map(same, found, trials(whole))) and len(found) == 3
    assert found[1].deaths == (1 if whom == "worker" else 0)
    for trial in found:
        name = f"study/trial-{trial.number:04d}"
        assert metrics(tmp_path / name) == metrics(whole / name)
    assert lease(tmp_path, 1).pid == victim.pid or whom != "study", "it was watched again, not run again"


def test_a_trial_that_is_killed_twice_fails_and_the_study_goes_on(tmp_path: Path) -> None:
    written(tmp_path, trials=2)
    study = started(tmp_path, SLEEP="0.1")
    killed = set[int]()
    while len(killed) < 2:
        until(lambda: steps(tmp_path, 0) >= 2 + len(killed) and lease(tmp_path, 0).pid not in killed)
        killed.add(lease(tmp_path, 0).pid)
        os.kill(lease(tmp_path, 0).pid, signal.SIGKILL)
        until(lambda: trials(tmp_path)[0].deaths == len(killed))
    assert study.wait(60) == 0
    first, second = trials(tmp_path)
    assert (first.status, second.status) == ("failed", "complete")
    assert first.reason == "its process was killed 2 times, last by SIGKILL"


def test_a_signal_saves_the_trials_and_the_study_goes_on(whole: Path, tmp_path: Path) -> None:
    written(tmp_path, workers=2)
    study = started(tmp_path, SLEEP="0.1")
    until(lambda: steps(tmp_path, 0) >= 2 and steps(tmp_path, 1) >= 1)
    study.terminate()
    assert study.wait(60) == 143 and not lease(tmp_path, 0).alive and not lease(tmp_path, 1).alive
    tune(tmp_path / "tune.yaml", "-q")
    assert all(map(same, trials(tmp_path), trials(whole)))


def test_halving_goes_on_from_checkpoints_as_if_never_stopped(whole: Path, tmp_path: Path) -> None:
    file = written(tmp_path, trials=4, halving={"rungs": [2, 4], "factor": 2})
    tune(file, "-q")
    found = trials(tmp_path)
    ended = [t for t in found if t.status == "complete"]
    assert 1 <= len(ended) < 4 and all(len(t.rungs) == 2 and t.step == 6 for t in ended)
    assert all(t.reason.startswith("not among the best at step ") for t in found if t.status == "pruned")
    for trial in [t for t in ended if t.number < 3]:
        name, at_ends = f"study/trial-{trial.number:04d}", {"eval/reward/mean"}
        mine, theirs = metrics(tmp_path / name), metrics(whole / name)
        assert [m.get("reward/mean") for m in mine] == [m.get("reward/mean") for m in theirs]
        assert at_ends <= mine[2].keys() and not at_ends & theirs[2].keys(), "it is evaluated on its rungs, too"


def test_trials_are_pruned_by_bounds_and_several_objectives_give_a_front(tmp_path: Path) -> None:
    file = written(tmp_path, {"steps": 40}, trials=3, objectives=[
        {"metric": "reward/mean", "reduce": "mean_last", "over": 2},
        {"metric": "update/gradient_norm", "direction": "minimize"}],
        prune=[{"metric": "reward/mean", "at_least": 2.0, "after": 3}])
    name = next(k for k in metrics_of_a_step(tmp_path) if "norm" in k)
    text = file.read_text().replace("update/gradient_norm", name)
    file.write_text(text)
    os.environ["SLEEP"] = "0.05"
    try:
        tune(file, "-q")
    finally:
        del os.environ["SLEEP"]
    found = trials(tmp_path)
    assert all(t.status == "pruned" and "reward/mean is " in t.reason and "below 2" in t.reason for t in found)
    assert all(3 < t.step < 40 for t in found), "it ends after the step that is under way"
    tune(file, "-q", "tune.prune=[]", "tune.trials=2", f"tune.study={tmp_path / 'front'}", "steps=4")
    assert list((tmp_path / "front").glob("front-*.yaml")) and not (tmp_path / "front" / "best.yaml").exists()


def metrics_of_a_step(folder: Path) -> list[str]:
    posttrain.train(folder / "tune.yaml", [f"run={folder / 'one'}", "steps=1"], output="quiet")
    return list(metrics(folder / "one")[-1])


def test_a_constraint_keeps_trials_from_being_the_best(tmp_path: Path) -> None:
    file = written(tmp_path, {"steps": 2}, trials=2, constraints=[{"metric": "reward/mean", "at_least": 2.0}])
    tune(file, "-q")
    assert all(t.status == "complete" and t.violations["reward/mean at least 2"] > 1.0 for t in trials(tmp_path))
    assert not (tmp_path / "study" / "best.yaml").exists()


def test_where_every_trial_fails_the_study_ends(tmp_path: Path) -> None:
    file = written(tmp_path, {"steps": 1}, trials=9, objectives=[{"metric": "no/such"}])
    with pytest.raises(PosttrainError, match="all of the first 3 trials failed: no finite no/such was measured"):
        tune(file, "-q")
    (tmp_path / "rewards.py").write_text("def correct(completions, **columns):\n    raise ValueError('broken')\n")
    with pytest.raises(PosttrainError, match=r"broken.*mend the function.*\(exit code 2\)"):
        tune(file, "-q", f"tune.study={tmp_path / 'other'}")


@pytest.mark.parametrize(("changes", "block", "says"), [
    ({}, {"trails": 3}, "tune.trails is not a key; did you mean 'trials'?"),
    ({}, {"space": {"optimizer.lr": {"log_unifrom": [1, 2]}}}, "did you mean 'log_uniform'"),
    ({}, {"space": {"optimzer.lr": {"uniform": [1, 2]}}}, "optimzer is no key; did you mean 'optimizer'?"),
    ({}, {"space": {"optimizer.lr": {"uniform": [-1, 1]}}}, "lr must be positive, got -1"),
    ({}, {"space": {"estimator": {"choice": ["toy", {"use": "toy", "lam": {"int": [0, 1]}}]}}}, "lam is not a"),
    ({}, {"space": {"run": {"choice": ["a", "b"]}}}, "run is the same in all trials"),
    ({}, {"space": {}}, "tune.space must say what is tried"),
    ({}, {"halving": {"rungs": [2, 6]}}, "rungs must be below steps, which is 6"),
    ({}, {"halving": {"rungs": [2]}, "objectives": [{"metric": "a"}, {"metric": "b"}]}, "ranks trials by one"),
    ({}, {"searcher": {"use": "optuna", "sampler": "grid"}}, "grid needs a step for optimizer.lr"),
    ({}, {"searcher": "optna"}, "did you mean 'optuna'"),
    ({"task": {"use": "rows", "path": "data.jsonl"}}, {}, "the task holds none out"),
    ({}, {"constraints": [{"metric": "kl"}]}, "at_most or at_least must be given"),
    ({}, {"devices": ["0"], "workers": 2}, "devices needs one for each of 2 workers"),
])
def test_what_cannot_be_searched_is_said_before_the_first_trial(
        changes: dict[str, Any], block: dict[str, Any], says: str, tmp_path: Path) -> None:
    file = written(tmp_path, changes, **block)
    with pytest.raises(ConfigError) as error:
        tune(file, "-q")
    assert says in str(error.value) and not (tmp_path / "study").exists()


def test_problems_are_told_with_their_line(tmp_path: Path) -> None:
    file = written(tmp_path)
    file.write_text(file.read_text() + "  trails: 3\n")
    lines = file.read_text().splitlines()
    with pytest.raises(ConfigError, match=rf"tune.yaml:{lines.index('  trails: 3') + 1}\)"):
        tune(file, "-q")
    with pytest.raises(ConfigError, match="has no block tune"):
        file.write_text(yaml.safe_dump(BASE))
        tune(file, "-q")


def test_settings_reach_the_search_and_the_configuration(tmp_path: Path) -> None:
    from posttrain_tuning.search.plan import read

    plan = read(written(tmp_path), ["tune.searcher.sampler=tpe", "tune.space.optimizer.lr={uniform: [0.1, 0.2]}",
                                    "steps=4", "tune.halving={rungs: [2]}"], discover())
    assert plan.settings.searcher.sampler == "tpe" and plan.space.domains["optimizer.lr"].low == 0.1  # type: ignore[union-attr]
    assert plan.ends({"optimizer.lr": 0.1, "rollout.group_size": "2"}) == (2, 4)
    assert "steps=4" in plan.of_trial({"optimizer.lr": 0.1, "rollout.group_size": "2"})


def test_a_folder_of_another_study_and_one_in_use(whole: Path) -> None:
    from filelock import FileLock

    with pytest.raises(ConfigError, match="configuration is not what it was"):
        tune(whole / "tune.yaml", "-q", "steps=7")
    with FileLock(whole / "study" / ".lock"), pytest.raises(RunInUse, match="another process runs the study"):
        tune(whole / "tune.yaml", "-q")


@pytest.mark.needs("mlflow", "sqlalchemy", "alembic")
def test_trials_in_mlflow_are_shown_under_one_of_the_study(tmp_path: Path) -> None:
    from posttrain_tuning.search.plan import read

    values = {"optimizer.lr": 0.1, "rollout.group_size": "2"}
    plan = read(written(tmp_path, {"trackers": {"mine": "mlflow"}}), [], discover())
    assert 'trackers.mine.parent="study"' in plan.of_run(0, values)
    named = read(plan.file, ["trackers.mine.parent=sweep"], discover())
    assert not [text for text in named.of_run(0, values) if text.endswith('"study"')], "the user's own stays"


DOCS = Path(__file__).parents[2] / "docs" / "tuning.md"


def test_the_page_of_the_docs_names_every_key_and_its_default() -> None:
    from dataclasses import fields

    from posttrain_tuning.search.plan import TuneSettings

    table = DOCS.read_text().split("## Keys of the block")[1].split("\n\n")[1].splitlines()[2:]
    said = {cells[1].strip().strip("`"): cells[2].strip().strip("`") for cells in (line.split("|") for line in table)}
    assert set(said) == {"space", *(f.name for f in fields(TuneSettings))}
    ours = TuneSettings()
    assert all(said[name] == str(getattr(ours, name)).removesuffix(".0") for name in ("trials", "workers", "hours",
                                                                                    "searcher", "retries"))
    assert [o.metric for o in ours.objectives] == ["eval/reward/mean"] and "eval/reward/mean" in said["objectives"]


@pytest.mark.needs("posttrain_objectives")
def test_the_example_of_the_docs_is_a_plan(tmp_path: Path) -> None:
    from posttrain_tuning.search.plan import read

    written(tmp_path)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "tune.yaml").write_text(next(t for t in DOCS.read_text().split("```") if t.startswith("\n# tune.yaml")))
    plan = read(tmp_path / "tune.yaml", [], discover())
    assert plan.directory == Path("runs/tune-study") and plan.settings.trials == 24
    assert [name for name, _, always in plan.space.parameters() if not always] == ["kl=adaptive.target"]


@pytest.mark.slow
@pytest.mark.needs("ray")
def test_a_population_is_killed_goes_on_and_the_worst_take_over_from_the_best(tmp_path: Path) -> None:
    """Six members on one node, the study killed after the first of them reached step 4."""
    file = written(tmp_path, {"steps": 6}, trials=6, workers=2, population={"every": 2})
    study = started(tmp_path)
    until(lambda: any((tmp_path / "study").glob("trial-*/checkpoints/step-000004")), 200)
    study.kill()
    study.wait()
    tune(file, "-q")
    found = trials(tmp_path)
    assert [t.status for t in found] == ["complete"] * 6 and all(t.step == 6 for t in found)
    assert (tmp_path / "study" / "best.yaml").is_file()
    exploited = list((tmp_path / "study" / "ray").rglob("pbt_policy_*.txt"))
    assert exploited, "somebody took over weights"


@pytest.mark.parametrize(("block", "says"), [
    ({"population": {"every": 2}, "halving": {"rungs": [2]}}, "without constraints, prune and halving"),
    ({"population": {"every": 6}}, "every must be below steps, which is 6"),
    ({"population": {"every": 2}, "trials": 1}, "needs two trials at least"),
    ({"population": {"every": 2}, "space": {"kl": {"choice": ["none", {"use": "fixed", "coef": {"uniform": [0, 1]}}]}}},
     "kl=fixed.coef exists with one option alone"),
    ({"population": {"every": 2, "quantile": 0.6}}, "quantile lies in (0, 0.5]"),
])
def test_what_a_population_cannot_do_is_said_before_it_begins(
        block: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        tune(written(tmp_path, **block), "-q")
    assert says in str(error.value)


def test_a_population_needs_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain_tuning.search import plan

    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs Ray Tune, .* pip install 'posttrain-tuning\[ray\]'"):
        tune(written(tmp_path, population={"every": 2}), "-q")
