"""`posttrain pareto`: small fronts of real runs, killed and gone on with, and what it says of bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from integration.small import DATA
from posttrain.errors import ConfigError, DataError, InputError, RunInUse
from posttrain.registry import discover

pytest.importorskip("torch")
pytest.importorskip("posttrain_objectives")
pytestmark = pytest.mark.needs("posttrain_backends", "posttrain_estimators")

REWARDS = '''
def correct(completions, answer, **columns):
    return [float(c == a) + 0.1 * sum(x.isdigit() for x in c) for c, a in zip(completions, answer)]

def brevity(completions, **columns):
    return [-float(len(c)) for c in completions]
'''
BASE: dict[str, Any] = {
    "recipe": "grpo", "steps": 2, "threads": 1, "seed": 7,
    "policy": {"use": "torch", "hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "max_positions": 32,
               "device": "cpu"},
    "tokenizer": {"use": "characters", "alphabet": "0123456789+="},
    "task": {"use": "rows", "path": str(DATA / "rows.jsonl"), "held_out": str(DATA / "held_out.jsonl")},
    "rewards": {"correct": {"file": "rewards.py:correct", "weight": 2.0}, "brevity": {"file": "rewards.py:brevity"}},
    "reward_workers": {"count": 1},
    "rollout": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 4},
    "optimizer": {"lr": 5e-2}, "trackers": {"console": None, "jsonl": None}}
FRONT: dict[str, Any] = {"base": "train.yaml", "objectives": ["correct", "brevity"], "reference": [-1.0, -5.0],
                         "divisions": 2}
NAMES = [f"weights_correct-{w:g}_brevity-{1 - w:g}" for w in (1.0, 0.5, 0.0)]


def written(folder: Path, changes: dict[str, Any] | None = None, /, **front: Any) -> Path:
    """A front's file in `folder`, and what it needs; `changes` are those of the base."""
    folder.mkdir(exist_ok=True)
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "train.yaml").write_text(yaml.safe_dump({**BASE, **(changes or {})}))
    (folder / "front.yaml").write_text(yaml.safe_dump({**FRONT, "front": str(folder / "front"), **front}))
    return folder / "front.yaml"


def pareto(*arguments: object) -> None:
    """The command as the command line calls it; errors are raised."""
    from posttrain_objectives.command import pareto as command

    app = typer.Typer()
    app.command()(command)
    typer.main.get_command(app).main([str(a) for a in arguments], standalone_mode=False, obj=discover())


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "front" / "pareto.json").read_text())
    return found


@pytest.fixture(scope="module")
def covered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pareto") / "whole"
    pareto(written(folder), "-q")
    return folder


def test_every_point_is_an_ordinary_run_measured_on_held_out_prompts(covered: Path) -> None:
    import posttrain

    found = record(covered)
    assert [point["tag"] for point in found["points"]] == NAMES
    for point, weight in zip(found["points"], (1.0, 0.5, 0.0)):
        run = covered / "front" / point["tag"]
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert point["values"] == [last[f"eval/reward/{name}/mean"] for name in ("correct", "brevity")]
        spread = [last[f"eval/reward/{name}/std"] for name in ("correct", "brevity")]
        assert point["errors"] == pytest.approx([s / np.sqrt(5 - 1) for s in spread])  # of five prompts
        assert point["checkpoint"] == f"{point['tag']}/checkpoints/step-000002"
        assert (covered / "front" / point["checkpoint"]).is_dir()
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert [config["rewards"][name]["weight"] for name in ("correct", "brevity")] == [2.0 * weight, 1.0 - weight]
    assert posttrain.sample(covered / "front" / NAMES[0], "1+1=")


def test_the_record_says_what_follows_from_the_points(covered: Path) -> None:
    from posttrain_objectives.pareto import hypervolume, nondominated

    found = record(covered)
    F = np.array([point["values"] for point in found["points"]])
    assert found["hypervolume"] == [hypervolume(F[:n], (-1.0, -5.0)) for n in (1, 2, 3)]
    assert sorted(found["front"]) == sorted(np.array(NAMES)[nondominated(F)])
    assert found["knee"] in found["front"]


def test_page_and_picture(covered: Path) -> None:
    from posttrain_objectives.pareto.covering import Front
    from posttrain_objectives.pareto.page import page

    text = (covered / "front" / "pareto.html").read_text()
    assert text == page(Front.from_json((covered / "front" / "pareto.json").read_text(), ""), "front")
    assert record(covered)["knee"] in text and text.count("<circle") >= 6 and "<script" not in text
    assert all((covered / "front" / name / "report.html").is_file() and f'href="{name}/report.html"' in text
               for name in NAMES)


@pytest.mark.needs("matplotlib")
def test_the_picture_is_a_png(covered: Path) -> None:
    assert (covered / "front" / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_again_trains_nothing_and_a_finer_grid_only_what_is_new(
        covered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from posttrain_objectives.pareto import covering

    before, trained = (covered / "front" / "pareto.json").read_text(), []
    monkeypatch.setattr(covering.run, "train", lambda *a, **k: trained.append(a))
    pareto(covered / "front.yaml")
    assert (covered / "front" / "pareto.json").read_text() == before and not trained
    out, err = capsys.readouterr()
    assert err.count("is there") == 3 and "recommended: " in out and "3 of 3" not in err.splitlines()[0]
    with pytest.raises(InputError):  # of the fourth point, whose run the patched function did not make
        pareto(covered / "front.yaml", "divisions=4", "-q")
    assert len(trained) == 1 and record(covered)["points"] == json.loads(before)["points"]


def test_a_killed_command_goes_on_and_ends_as_if_never_killed(covered: Path, tmp_path: Path) -> None:
    """Killed in the second run, before its checkpoint."""
    file = written(tmp_path)
    script = ("from integration.small import kill_at; kill_at('posttrain.checkpoint:save', 2); "
              f"from integration.test_pareto_runs import pareto; pareto({str(file)!r}, '-q')")
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    killed = subprocess.run([sys.executable, "-c", script], timeout=120,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path})
    assert killed.returncode == -signal.SIGKILL and len(record(tmp_path)["points"]) == 1
    pareto(file, "-q")
    mine, whole = record(tmp_path), record(covered)
    assert {**mine, "base": ""} == {**whole, "base": ""}  # the base names this folder's files


def test_a_run_that_ended_before_the_record_was_written_is_not_trained_again(covered: Path) -> None:
    path = covered / "front" / "pareto.json"
    before, metrics = path.read_text(), (covered / "front" / NAMES[2] / "metrics.jsonl").read_bytes()
    path.write_text(json.dumps({**json.loads(before), "points": json.loads(before)["points"][:2]}))
    pareto(covered / "front.yaml", "-q")
    assert path.read_text() == before
    assert (covered / "front" / NAMES[2] / "metrics.jsonl").read_bytes() == metrics


def test_a_signal_says_how_to_go_on(covered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain_objectives.pareto import covering

    def stopped(*given: object, **named: object) -> None:
        raise covering.run.Interrupted("stopped by signal")

    monkeypatch.setattr(covering.run, "train", stopped)
    with pytest.raises(covering.run.Interrupted, match="all further points: posttrain pareto .*front.yaml divisions=3 "
                       r"'objectives=\[correct, brevity\]'$") as error:
        pareto(covered / "front.yaml", "divisions=3", "objectives=[correct, brevity]", "-q")
    assert error.value.exit_code == 143


PLUGIN = """
from posttrain.hookspecs import Component, hookimpl

@hookimpl
def components():
    return [Component("constraint", "held", "posttrain_objectives.constraints:PIDLagrangian", "for this test")]
"""


def test_levels_of_one_objective_are_kept_while_the_other_is_maximised(tmp_path: Path) -> None:
    (tmp_path / "held.py").write_text(PLUGIN)
    base = {"constraint": "held", "plugins": ["held.py"], "kl": "none"}
    pareto(written(tmp_path, base, method="epsilon_constraint", levels={"brevity": [-3.5, -1.5]}), "-q")
    assert [point["tag"] for point in record(tmp_path)["points"]] == ["brevity-from--3.5", "brevity-from--1.5"]
    for level in ("-3.5", "-1.5"):
        run = tmp_path / "front" / f"brevity-from-{level}"
        assert yaml.safe_load((run / "config.yaml").read_text())["rewards"]["brevity"]["at_least"] == float(level)
        assert "constraint/brevity/multiplier" in json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_levels_need_a_constraint_in_the_base(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        pareto(written(tmp_path, method="epsilon_constraint", levels={"brevity": [-3.5]}))
    assert "train.yaml cannot be run for the point brevity-from--3.5:" in str(error.value)
    assert "rewards.brevity has a limit, and nothing keeps it; set constraint:" in str(error.value)


def test_soups_lie_between_the_policies_they_are_mixed_of(tmp_path: Path) -> None:
    from posttrain_objectives.pareto.soups import soup
    from safetensors.numpy import load_file

    pareto(written(tmp_path, method="soups"), "-q")
    front, found = tmp_path / "front", record(tmp_path)
    name = "soup_correct-0.5_brevity-0.5"
    assert [point["tag"] for point in found["points"]] == [NAMES[0], NAMES[2], name]
    assert found["points"][2]["checkpoint"] == f"{name}/policy"
    one, two, mixed = (load_file(front / run / "policy" / "model.safetensors") for run in (NAMES[0], NAMES[2], name))
    assert all(np.array_equal(mixed[key], np.float32(0.5) * one[key] + np.float32(0.5) * two[key]) for key in one)
    again = soup([front / run / "policy" for run in (NAMES[0], NAMES[2])], [1.0, 0.0], tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (front / NAMES[0] / "policy/model.safetensors").read_bytes()


def test_a_soup_of_one_policy_alone_measures_what_its_run_did(covered: Path) -> None:
    """So that points of runs and of soups compare."""
    from dataclasses import replace

    from posttrain_objectives.pareto import covering
    from posttrain_objectives.pareto.plan import Candidate, read

    plan = read(covered / "front.yaml", [], discover())
    point = covering._mixed(plan, Candidate("alone", mix={NAMES[0]: 1.0}), discover(), "quiet")
    first = covering.opened(plan).points[0]
    assert replace(point, tag=first.tag, checkpoint=first.checkpoint) == first


def problems(error: pytest.ExceptionInfo[InputError]) -> list[str]:
    return [str(problem) for problem in error.value.problems]


def test_everything_wrong_with_a_file_is_said_at_once(tmp_path: Path) -> None:
    file = written(tmp_path)
    file.write_text("base: train.yaml\nobjectivs: [a, b]\nmethod: weight\ndivisions: two\n")
    with pytest.raises(ConfigError) as error:
        pareto(file)
    said = "\n".join(problems(error))
    assert f"objectivs is not a key; did you mean 'objectives'? ({file}:2)" in said
    assert "method" in said and "soups" in said and f"{file}:3" in said and f"{file}:4" in said
    assert f"objectives, reference must be given ({file})" in said and "FrontSettings" not in said
    assert "A front's file holds at least" in str(error.value)


@pytest.mark.parametrize(("text", "said"), [
    ("", "base, objectives, reference must be given"), ("# nothing\n", "base, objectives, reference must"),
    ("[1, 2]\n", "must be a block of `key: value` lines"), ("base: [\n", "not valid YAML"),
    ("base: train.yaml\nreference: [0.0, 0.0]\n", "objectives must be given")])
def test_a_file_that_holds_no_front_says_what_one_holds(text: str, said: str, tmp_path: Path) -> None:
    file = written(tmp_path)
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        pareto(file)
    (problem,) = problems(error)
    assert said in problem and str(file) in problem
    *_, example = str(error.value).partition("A front's file holds at least\n")
    assert set(yaml.safe_load(example)) == {"base", "objectives", "reference"}


@pytest.mark.parametrize(("front", "said"), [
    ({"objectives": ["correct", "brevty"]}, "objectives: the base has no reward 'brevty'; did you mean 'brevity'?"),
    ({"objectives": ["correct"], "reference": [0.0]}, "objectives must name at least two different rewards"),
    ({"reference": [0.0]}, "reference needs 2 finite numbers, one for each of correct, brevity"),
    ({"divisions": 0}, "divisions must be at least 1, got 0"),
    ({"levels": {"brevity": [-2.0]}}, "levels is of method: epsilon_constraint"),
    ({"method": "epsilon_constraint"}, "levels needs a list of numbers for all but one of correct, brevity"),
    ({"base": "trian.yaml"}, "base: no such file: "),
    ({"alpha": 0.0}, "alpha must be positive and finite"),
])
def test_a_front_that_cannot_be_is_refused(front: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        pareto(written(tmp_path, **front))
    assert any(said in problem for problem in problems(error)), problems(error)
    assert not (tmp_path / "front").exists()


@pytest.mark.parametrize(("base", "said"), [
    ({"recipe": "sft", "rewards": {}}, "base must learn from rewards (loop: rl), not supervised"),
    ({"rewards": {**BASE["rewards"], "correct": {"file": "rewards.py:correct", "weight": 0.0}}},
     "objectives: rewards.correct.weight is 0 in the base, but an objective is maximised"),
    ({"rewards": {**BASE["rewards"], "brevity": {"use": "size", "weight": -1}}},
     "rewards.brevity.weight is -1 in the base, but an objective is maximised, so its weight must be positive; write "
     "the reward with the other sign: a function that returns minus the length, or `use: length` with soft_limit"),
    ({"combiner": {"use": "gdpo", "weights": {"brevity": -1.0}}},
     "combiner.weights.brevity is -1 in the base, but an objective is maximised"),
    ({"combiner": {"use": "gdpo", "weights": {"brevity": 0.0}}}, "combiner.weights.brevity is 0 in the base"),
    ({"task": {"use": "rows", "path": str(DATA / "rows.jsonl")}}, "a front is compared on held-out prompts"),
    ({"estimator": "gea"}, "did you mean 'gae'")])
def test_a_base_that_makes_no_front_is_refused(base: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        pareto(written(tmp_path, base))
    assert any(said in problem for problem in problems(error)), problems(error)
    assert not (tmp_path / "front").exists()


def test_the_objective_that_levels_leave_out_is_maximised_too(tmp_path: Path) -> None:
    base = {"rewards": {**BASE["rewards"], "correct": {"file": "rewards.py:correct", "weight": -2.0}}}
    with pytest.raises(ConfigError, match="objectives: rewards.correct.weight is -2 in the base, but an objective"):
        pareto(written(tmp_path, base, method="epsilon_constraint", levels={"brevity": [-2.0]}))


@pytest.mark.parametrize("method", ["weights", "soups"])
def test_settings_of_the_base_hold_for_every_point(method: str, tmp_path: Path) -> None:
    from posttrain_objectives.pareto import covering
    from posttrain_objectives.pareto.plan import read

    file, settings = written(tmp_path, method=method, divisions=1), ["base.steps=3", "base.rewards.correct.weight=4.0"]
    plan = read(file, settings, discover())
    for candidate, weights in zip(plan.candidates, ([4.0, 0.0], [0.0, 1.0]), strict=True):
        loaded = covering.config.load(plan.base, plan.settings_of(candidate), discover()).settings
        assert loaded.steps == loaded.evaluate.every == 3
        assert [loaded.rewards[name].weight for name in ("correct", "brevity")] == weights
    assert plan.fingerprint() != read(file, [], discover()).fingerprint()


def test_wrong_settings_of_the_base_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stepps is not a key; did you mean 'steps'"):
        pareto(written(tmp_path), "base.stepps=3")


def test_a_soup_is_measured_with_the_settings_of_the_base(covered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from posttrain_objectives.pareto import covering
    from posttrain_objectives.pareto.plan import Candidate, read

    plan = replace(read(covered / "front.yaml", [], discover()), overrides=("base.rollout.max_new_tokens=1",))
    point = covering._mixed(plan, Candidate("short", mix={NAMES[0]: 1.0}), discover(), "quiet")
    assert point.values[1] >= -1.0 > covering.opened(replace(plan, overrides=())).points[0].values[1]


def test_standard_errors_are_over_the_prompts_to_which_a_reward_applies(covered: Path) -> None:
    from posttrain_objectives.pareto import covering
    from posttrain_objectives.pareto.plan import read

    plan, scores = read(covered / "front.yaml", [], discover()), np.array([0.0, 1.0, 5.0])
    assert plan.prompts == 5
    metrics = {"eval/reward/correct/mean": 2.0, "eval/reward/correct/std": scores.std(),
               "eval/reward/correct/excluded": 2.0, "eval/reward/brevity/mean": -3.0, "eval/reward/brevity/std": 0.5}
    point = covering._measured(plan, plan.candidates[0], metrics, plan.directory / "weights")
    assert point.errors == pytest.approx((scores.std(ddof=1) / np.sqrt(3), 0.5 / np.sqrt(5 - 1)))
    alone = {**metrics, "eval/reward/correct/std": 0.0, "eval/reward/correct/excluded": 4.0}
    assert covering._measured(plan, plan.candidates[0], alone, plan.directory / "weights").errors == ()


def test_points_that_would_not_compare_are_refused(covered: Path) -> None:
    before = (covered / "front" / "pareto.json").read_bytes()
    with pytest.raises(ConfigError, match="choose another folder: front=DIR") as error:
        pareto(covered / "front.yaml", "reference=[0.0, -9.0]")
    assert "reference: is (0.0, -9.0), was (-1.0, -5.0)" in str(error.value)
    (covered / "rewards.py").write_text(REWARDS + "\n# another reward\n")
    with pytest.raises(ConfigError, match="base: train.yaml, or a Python file of it, is not what it was"):
        pareto(covered / "front.yaml")
    (covered / "rewards.py").write_text(REWARDS)
    assert (covered / "front" / "pareto.json").read_bytes() == before


def test_a_damaged_record_and_a_folder_in_use(covered: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    file = written(tmp_path)
    (tmp_path / "front").mkdir()
    (tmp_path / "front" / "pareto.json").write_text('{"format": 1}')
    with pytest.raises(DataError, match="not the record of a front"):
        pareto(file)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be the folder of a front: File exists"):
        pareto(file, f"front={tmp_path / 'file'}")
    with FileLock(tmp_path / "front" / ".lock"), pytest.raises(RunInUse, match="another process covers the front"):
        pareto(file)


def settings_of_trackers(plan: Any) -> list[str]:
    return [setting for setting in plan.settings_of(plan.candidates[0]) if setting.startswith("trackers.")]


@pytest.mark.needs("mlflow", "sqlalchemy", "alembic")
def test_runs_in_mlflow_are_shown_under_one_of_the_front(tmp_path: Path) -> None:
    from posttrain_objectives.pareto.plan import read

    plan = read(written(tmp_path, {"trackers": {"mine": "mlflow", "jsonl": "jsonl"}}), [], discover())
    assert settings_of_trackers(plan) == ['trackers.mine.parent="front"']
    named = read(plan.file, ["base.trackers.mine.parent=sweep"], discover())
    assert settings_of_trackers(named) == ["trackers.mine.parent=sweep"], "the user's own stays"


@pytest.mark.parametrize(("combiner", "keys"), [
    ({"use": "gdpo", "weights": {"brevity": 0.5}}, ["combiner.weights.correct=1.0", "combiner.weights.brevity=0.0"]),
    (None, ["rewards.correct.weight=1.0", "rewards.brevity.weight=0.0"])])
def test_preferences_multiply_the_weights_of_the_base(
        combiner: dict[str, Any] | None, keys: list[str], tmp_path: Path) -> None:
    from posttrain_objectives.pareto.plan import read

    rewards = {name: {"file": f"rewards.py:{name}"} for name in ("correct", "brevity")}
    plan = read(written(tmp_path, {"combiner": combiner, "rewards": rewards}), [], discover())
    assert list(plan.candidates[0].settings) == keys
    half = 0.25 if combiner else 0.5
    assert plan.candidates[1].settings[1] == f"{keys[1].partition('=')[0]}={half}"


def test_the_page_of_the_docs_names_every_key_and_its_default() -> None:
    from dataclasses import MISSING, fields

    from posttrain_objectives.pareto.plan import FrontSettings

    text = (Path(__file__).parents[2] / "docs" / "pareto.md").read_text()
    table = text[text.index("| key | default |"):].split("\n\n")[0].splitlines()[2:]
    said = {}
    for line in table:
        keys, defaults = (cell.strip() for cell in line.split("|")[1:3])
        said |= dict(zip(keys.replace("`", "").split(", "), defaults.replace("`", "").split(", "), strict=True))
    ours = {f.name: "" if f.default is MISSING else str(f.default) for f in fields(FrontSettings)}
    assert {**said, "alpha": "1.0", "front": ""} == ours and said["alpha"] == "1"


def test_the_example_of_the_docs_is_a_plan(tmp_path: Path) -> None:
    from posttrain_objectives.pareto.plan import read

    text = (Path(__file__).parents[2] / "docs" / "pareto.md").read_text()
    rewards = {"accuracy": BASE["rewards"]["correct"], "brevity": BASE["rewards"]["brevity"]}
    file = written(tmp_path, {"rewards": rewards})
    file.write_text(text.split("```")[1])
    plan = read(file, [], discover())
    assert len(plan.candidates) == 5 and plan.directory == Path("runs/front")


def test_preferences_cover_the_simplex() -> None:
    from posttrain_objectives.pareto.plan import dirichlet, grid

    assert len(set(grid(3, 4))) == 15 and all(sum(w) == 1.0 for w in grid(3, 4))
    drawn = list(dirichlet(3, 6, 0.5, seed=1))
    assert drawn[:3] == list(dirichlet(3, 3, 0.5, seed=1)) and drawn != list(dirichlet(3, 6, 0.5, seed=2))
    assert np.sum(drawn, axis=1) == pytest.approx(1.0) and np.min(drawn) >= 0.0


def test_a_reward_that_does_not_apply_to_some_prompts_is_more_uncertain(tmp_path: Path) -> None:
    file = written(tmp_path, divisions=1)
    some = REWARDS.replace("for c in completions", "if i > 1 else None for i, c in enumerate(completions)")
    (tmp_path / "rewards.py").write_text(some)
    pareto(file, "-q")
    for point in record(tmp_path)["points"]:
        last = json.loads((tmp_path / "front" / point["tag"] / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["eval/reward/brevity/excluded"] == 2 and "eval/reward/correct/excluded" not in last
        spread = [last[f"eval/reward/{name}/std"] for name in ("correct", "brevity")]
        assert point["errors"] == pytest.approx([spread[0] / np.sqrt(5 - 1), spread[1] / np.sqrt(3 - 1)])
