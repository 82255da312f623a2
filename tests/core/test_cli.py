"""The command line: what it prints, how it ends, and what it does not import."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import posttrain
import pytest
import typer
from commandline import called, use
from needed import first_party
from posttrain import cli, run, scaffold
from posttrain.catalogue import field_docs
from posttrain.errors import CheckpointDamaged, InputError
from posttrain.hookspecs import ENTRY_POINT_GROUP, Component, hookimpl
from posttrain.protocols import KINDS
from posttrain.recipes import RECIPES
from posttrain.registry import Foreign, Registry, discover

HEAVY = ("numpy", "torch", "jax", "transformers", "scipy", "tokenizers", "rich", "omegaconf", "matplotlib")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what `posttrain init` writes."""
    monkeypatch.chdir(tmp_path)
    scaffold.write(tmp_path)
    return tmp_path


def process(arguments: Sequence[str]) -> tuple[float, list[str], str]:
    """Seconds of CPU, heavy modules and output of one command in a process of its own."""
    code = ("import sys, json, time, io, contextlib\nfrom posttrain.cli import main\nout = io.StringIO()\n"
            f"with contextlib.redirect_stdout(out): code = main({list(arguments)!r})\nassert code == 0, code\n"
            f"print(json.dumps([time.process_time(), sorted(set({HEAVY!r}) & set(sys.modules)), out.getvalue()]))")
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    seconds, heavy, out = json.loads(done.stdout)
    return seconds, heavy, out


@pytest.mark.parametrize(("arguments", "says"), [
    (["train", "--help"], "[KEY=VALUE]"), (["--help"], "plugins"), (["plugins"], "tracker"),
    (["plugins", "--json"], '"components"'),
])
def test_help_and_listing_are_quick_and_import_no_framework(arguments: list[str], says: str) -> None:
    seconds, heavy, out = process(arguments)
    assert heavy == [] and says in out
    assert seconds < 0.4, f"{seconds} s of CPU"  # 0.16 s on an idle core; NumPy alone takes another 0.1 s


@first_party
def test_plugins_lists_every_component_and_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = called(capsys, "plugins")
    assert (code, err) == (0, "")
    for component in discover().components():
        assert any(line.split()[:2] == [component.kind, component.name] for line in out.splitlines()), component
    assert all(any(line.split()[:2] == ["recipe", name] for line in out.splitlines()) for name in RECIPES)
    code, out, _ = called(capsys, "plugins", "kl")
    assert [line.split()[:2] for line in out.splitlines()] == [["kl", name] for name in (
        "adaptive", "band", "constrained", "cosine", "dual", "entropy", "fixed", "linear", "none", "pi", "pid")]


@first_party
def test_a_command_of_a_package_is_one_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = called(capsys, "pareto", "--help")
    assert code == 0 and "Cover a Pareto front" in out


@first_party
def test_plugins_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = called(capsys, "plugins", "estimator", "--json")
    listed = {c["name"]: c for c in json.loads(out)["components"]}
    assert code == 0 and listed["gae"]["distribution"] == "posttrain-estimators"
    assert listed["gae"]["version"] == posttrain.__version__


class Broken:
    """A plugin that fails in two hooks."""

    @hookimpl
    def components(self) -> list[Component]:
        raise RuntimeError("no such luck")


class BrokenCommands:
    """A plugin that cannot add its commands."""

    @hookimpl
    def commands(self, app: typer.Typer) -> None:
        raise RuntimeError("no commands")


def raised(cls: type) -> int:
    """The line of a class on which it raises: its last."""
    lines, first = inspect.getsourcelines(cls)
    return first + len(lines) - 1


class Commands:
    """A plugin with a command of its own."""

    @hookimpl
    def commands(self, app: typer.Typer) -> None:
        @app.command()
        def tune(context: typer.Context) -> None:
            """Search."""
            assert isinstance(context.obj, Registry)
            print("tuned")


def test_broken_and_foreign_plugins_are_told_loudly(capsys: pytest.CaptureFixture[str],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    found = discover([Broken(), BrokenCommands()], environ={}, entry_points=())
    use(monkeypatch, Registry(found.plugins, found.broken, (Foreign("from-tomorrow", "posttrain.v2"),), found.hooks,
                              found.rediscover))
    code, out, err = called(capsys, "plugins", "estimator")
    assert (code, out) == (0, "")
    assert err.splitlines() == [
        f"BROKEN plugin BrokenCommands: commands: RuntimeError: no commands (test_cli.py:{raised(BrokenCommands)})",
        f"BROKEN plugin Broken: RuntimeError: no such luck (test_cli.py:{raised(Broken)})",
        "  -> mend what was handed over",
        "IGNORED plugin from-tomorrow: it is written for 'posttrain.v2', another version of the plugin interface",
        "  -> install from-tomorrow's version for 'posttrain.v1', or uninstall it",
        "no estimator is installed",
        "  clipped_is, dr_grpo, gae, grpo, monte_carlo, n_step, opo, process, reinforce, reinforce_pp, "
        "reinforce_pp_baseline, remax, retrace, rloo, td0, td_lambda, tree_backup, upgo, vtrace: in "
        "posttrain-estimators, which is not installed: pip install posttrain-estimators"]
    broken = json.loads(called(capsys, "plugins", "--json")[1])
    assert broken["broken"][0]["distribution"] == "Broken" and broken["foreign"][0]["group"] == "posttrain.v2"


def test_plugins_add_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, discover([Commands()]))
    assert called(capsys, "tune") == (0, "tuned\n", "")


def test_nothing_installed_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, discover(environ={}, entry_points=()))
    assert "no plugin is installed: pip install" in called(capsys, "plugins")[2]


@first_party
def test_show_says_what_each_field_means(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = called(capsys, "show", "estimator", "rloo")
    assert code == 0
    assert "source:      Kool et al. 2019" in out and "provided by: posttrain-estimators" in out
    field = "  baseline: Literal['mean', 'leave_one_out', 'length_weighted'] = 'leave_one_out'\n"
    assert f"{field}      b: the mean of the group" in out, \
        "the preset's default and the attribute's docstring"


@first_party
@pytest.mark.needs("math_verify")
def test_every_component_can_be_shown_and_has_documented_fields(capsys: pytest.CaptureFixture[str]) -> None:
    found = discover()
    for component in found.components():
        code, out, err = called(capsys, "show", component.kind, component.name)
        assert (code, err) == (0, "") and component.summary in out
        target = found.load(component)
        undocumented = set(getattr(target, "__dataclass_fields__", {})) - set(field_docs(target))
        assert not undocumented, f"{component.target}: {undocumented}"


def test_show_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = called(capsys, "show", "recipe", "ppo")
    assert code == 0 and "critic: policy\n" in out and "Schulman et al. 2017" in out


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (["plugins", "estimatr"], 2, "'estimatr' is no kind of component; did you mean 'estimator'?  kinds: estimator, "),
    pytest.param(["show", "estimator", "grppo"], 2,
                 "estimator 'grppo' not found; did you mean 'grpo' (posttrain-estimators ", marks=first_party),
    (["show", "recipe", "grppo"], 2, "recipe 'grppo' not found; did you mean 'grpo'?  recipes: "),
    (["config", "gone.yaml"], 2, "cannot read gone.yaml: No such file or directory"),
    (["config", "train.yaml", "stepz=3"], 2, "stepz is not a key; did you mean 'steps'? (command line)"),
    pytest.param(["check", "train.yaml", "estimator=gae"], 2, "estimator 'gae' needs 'values'", marks=first_party),
    (["init"], 2, "this file exists and is not overwritten (train.yaml)"),
    (["sample", "nowhere", "1+1="], 2, "nowhere is not a run directory"),
    (["trian"], 2, "No such command 'trian'"), (["train"], 2, "FILE"), (["sample", "runs/x", "a", "-n", "0"], 2, "-n"),
])
def test_wrong_input_ends_with_2_and_no_traceback(capsys: pytest.CaptureFixture[str], folder: Path,
                                                  arguments: list[str], code: int, message: str) -> None:
    found, out, err = called(capsys, *arguments)
    assert found == code and message in err and "Traceback" not in err and out == ""


@pytest.mark.parametrize(("error", "code", "says"), [
    (InputError(["first", "second"]), 2, "first\nsecond\n"), (CheckpointDamaged("step 3 is damaged"), 3, "step 3 is"),
    (KeyboardInterrupt(), 130, ""),
])
def test_errors_end_with_their_exit_code(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                                         error: BaseException, code: int, says: str) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(run, "resume", failing)
    found, _, err = called(capsys, "resume", "runs/x")
    assert found == code and says in err and "Traceback" not in err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "resume", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["resume", "runs/x"])


@first_party
def test_config_prints_the_merged_configuration(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    code, out, _ = called(capsys, "config", "train.yaml", "seed=7", "kl=fixed", "kl.coef=0.5")
    assert code == 0 and "seed: 7\n" in out and "kl:\n  use: fixed\n  coef: 0.5\n" in out
    (folder / "again.yaml").write_text(out)
    assert called(capsys, "config", "again.yaml")[1] == out


@first_party
def test_check_prints_sizes_parts_files_and_rows(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    code, out, err = called(capsys, "check", "train.yaml", "rollout.group_size=4", "task.held_out_fraction=0.25")
    lines = [line.split() for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert ["episodes", "per", "step", "64", "(16", "prompts", "x", "4", "answers)"] in lines
    assert any(line[:2] == ["estimator", "grpo"] for line in lines)
    assert any(line and line[0].endswith("rewards.py") for line in lines)
    assert ["to", "learn", "from", "75"] in lines and ["held", "out", "25"] in lines


@first_party
def test_check_reports_rows_that_cannot_be_read(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (folder / "data.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"promt": "1+2="}\n')
    code, _, err = called(capsys, "check", "train.yaml")
    assert code == 2 and "data.jsonl:2" in err


def test_init_writes_what_runs_and_overwrites_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    where = tmp_path / "new" / "project"
    code, out, _ = called(capsys, "init", str(where))
    assert code == 0 and {path.name for path in where.iterdir()} == {"train.yaml", "rewards.py", "data.jsonl"}
    assert f"posttrain train {where / 'train.yaml'}" in out
    (where / "train.yaml").unlink()
    (where / "rewards.py").write_text("# mine\n")
    code, _, err = called(capsys, "init", str(where))
    assert code == 2 and (where / "rewards.py").read_text() == "# mine\n" and not (where / "train.yaml").exists()
    assert len(err.splitlines()) == 3, "both files that exist, and what to do"


@first_party
def test_train_eval_sample_and_resume(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    """The scaffold's own configuration for two steps, through every command that has a run."""
    code, out, err = called(capsys, "train", "train.yaml", "steps=2", "run=runs/here", "threads=1", "evaluate.every=0",
                            "--json")
    assert code == 0, err
    assert all(isinstance(json.loads(line), dict) for line in out.splitlines()) and len(out.splitlines()) >= 2
    assert (folder / "runs" / "here" / "config.yaml").is_file()
    code, out, _ = called(capsys, "eval", "runs/here", "--json")
    assert code == 0 and json.loads(out)
    code, out, _ = called(capsys, "sample", "runs/here", "1+1=", "-n", "3", "--temperature", "0", "--json")
    answers = [json.loads(line)["completion"] for line in out.splitlines()]
    assert code == 0 and len(answers) == 3 and len(set(answers)) == 1, "greedy answers are equal"
    code, _, err = called(capsys, "resume", "runs/here", "steps=3")
    assert code == 0, err
    steps = [json.loads(line)["step"] for line in (folder / "runs/here/metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 3
    code, _, err = called(capsys, "train", "train.yaml", "run=runs/here")
    assert code == 2 and "already holds a run" in err


def test_the_public_api_is_imported_on_use() -> None:
    """Each name of the list is there, where a reader and a type checker find it, and nothing else."""
    assert set(posttrain.__all__) <= set(dir(posttrain))
    for name in posttrain.__all__:
        value = getattr(posttrain, name)
        assert value.__name__ == name if name != "hookimpl" else callable(value)
    with pytest.raises(AttributeError, match="module 'posttrain' has no attribute 'trian'"):
        _ = posttrain.trian  # type: ignore[attr-defined]  # a name that is not there
    code = "import sys, posttrain; assert dir(posttrain); print(sorted(m for m in sys.modules if 'posttrain' in m))"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert "'posttrain'" in done.stdout and "posttrain." not in done.stdout


def test_recipe_is_no_kind_of_component() -> None:
    assert cli.RECIPE not in KINDS


# --- kinds of which nothing is installed ------------------------------------------------------------------------------

@pytest.mark.parametrize(("kind", "environ", "says"), [
    ("backend", {},
     ["no backend is installed",
      "  flax: in posttrain-backends, which is not installed: pip install 'posttrain-backends[flax]'",
      "  hf: in posttrain-backends, which is not installed: pip install 'posttrain-backends[hf]'",
      "  moe, ssm, torch: in posttrain-backends, which is not installed: pip install 'posttrain-backends[torch]'"]),
    ("batching", {"POSTTRAIN_BLOCK": "posttrain-core"},
     ["left out by POSTTRAIN_BLOCK: posttrain-core", "no batching is installed",
      "  first_fit: in posttrain-core, which POSTTRAIN_BLOCK leaves out: take it out of there"]),
    ("searcher", {}, ["no searcher is installed",
                      "  optuna: in posttrain-tuning, which is not installed: pip install 'posttrain-tuning[optuna]'"]),
])
def test_a_kind_of_which_nothing_is_installed_says_who_has_some(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str, environ: dict[str, str],
        says: list[str]) -> None:
    core, = (p for p in metadata.entry_points(group=ENTRY_POINT_GROUP) if p.value == "posttrain.plugin")
    use(monkeypatch, discover(environ=environ, entry_points=[core]))
    code, out, err = called(capsys, "plugins", kind)
    told = err.splitlines()
    assert (code, out) == (0, "") and told[:len(says)] == says
    assert called(capsys, "plugins", kind, "--json")[2] == "", "for programs, an empty list says it"
    assert "no tracker" not in called(capsys, "plugins", "tracker")[2] or environ


# --- plugins that are named, not installed ----------------------------------------------------------------------------

IN_A_FILE = '''
from dataclasses import dataclass
from enum import Enum
from posttrain.hookspecs import Component, hookimpl

class Mode(Enum):
    MEAN = "mean"
    SUM = "sum"

@dataclass(frozen=True)
class Mine:
    """All of it."""
    rate: float = 0.5
    """How much."""
    mode: Mode = Mode.SUM
    """Of the values."""
    tags: frozenset[str] = frozenset({"b", "a"})
    """Which."""

@hookimpl
def components():
    yield Component("estimator", "mine", __name__ + ":Mine", "my own")
'''


def test_plugins_and_show_see_what_an_option_names(capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(IN_A_FILE)
    assert not any(line.split()[1] == "mine" for line in called(capsys, "plugins", "estimator")[1].splitlines())
    both = ("--plugin", "./mine.py", "--plugin", "posttrain.toy")
    code, out, err = called(capsys, "plugins", "estimator", *both)
    listed = {line.split()[1]: line.split()[2] for line in out.splitlines()}
    assert (code, err) == (0, "")
    assert listed["mine"] == str(tmp_path / "mine.py") and listed["toy"] == "posttrain.toy"
    found = json.loads(called(capsys, "plugins", "estimator", "--json", *both)[1])["components"]
    assert {"mine", "toy"} <= {c["name"] for c in found}
    code, out, err = called(capsys, "show", "estimator", "mine", *both)
    assert (code, err) == (0, "") and "  rate: float = 0.5\n      How much.\n" in out
    assert "Mode, one of 'mean', 'sum' = 'sum'\n" in out and "  tags: frozenset[str] = frozenset({'a', 'b'})\n" in out


@first_party
def test_the_option_has_the_rules_of_a_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "broken_module.py").write_text("\n1 / 0\n")
    names = ["gone.py", "broken.py", "no.such.module", "broken_module", "json"]
    (tmp_path / "train.yaml").write_text(f"plugins: [{', '.join(names)}]\n")
    says = [f"no such file: {tmp_path / 'gone.py'}",
            "no.such.module is neither a file that ends in .py nor a module that can be imported: No module named 'no'",
            "broken_module cannot be imported: ZeroDivisionError: division by zero (broken_module.py:2)",
            f"{tmp_path / 'broken.py'}: ZeroDivisionError: division by zero (broken.py:1)",
            "json: TypeError: implements no hook; mark its functions with @posttrain.hookspecs.hookimpl"]
    options = [word for name in names for word in ("--plugin", name)]
    for command in (["plugins"], ["show", "estimator", "gae"]):
        code, out, err = called(capsys, *command, *options)
        assert (code, out) == (2, "") and err.splitlines() == [f"--plugin {text}" for text in says]
    code, _, err = called(capsys, "check", "train.yaml")
    assert code == 2 and [line.removesuffix(" (train.yaml:1)") for line in err.splitlines()[1:]] == [
        f"  plugins: {text}" for text in says]


def test_an_installed_plugin_may_be_named_too(capsys: pytest.CaptureFixture[str]) -> None:
    before = called(capsys, "plugins")
    assert called(capsys, "plugins", "--plugin", "posttrain.plugin") == before == (0, before[1], "")
