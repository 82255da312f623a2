"""`posttrain plugins` and `posttrain show`, the errors of the design word for word, and plugins in other processes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import posttrain
import pytest
from commandline import called, use
from distributions import install
from needed import first_party
from posttrain import catalogue, compose, config, run, scaffold
from posttrain.errors import RewardError
from posttrain.hookspecs import Component, hookimpl
from posttrain.registry import Foreign, Registry, discover
from posttrain.rewards.calls import Returned
from posttrain.rewards.pool import Job, Pool
from posttrain.rundir import RunDirectory

ROOT = Path(__file__).parents[2]

ESTIMATORS = '''
from dataclasses import dataclass
from posttrain.hookspecs import Component, hookimpl
from posttrain.protocols import Need

@dataclass(frozen=True)
class VTrace:
    """V-trace."""
    rho_max: float = 1.0
    """Largest weight."""
    needs = frozenset({Need.VALUES, Need.LOGPROBS})
    def __call__(self, episodes): raise NotImplementedError

@dataclass(frozen=True)
class GAE:
    needs = frozenset({Need.VALUES})
    def __call__(self, episodes): raise NotImplementedError

@dataclass(frozen=True)
class Group:
    needs = frozenset()
    def __call__(self, episodes): raise NotImplementedError

@hookimpl
def components():
    here = __name__
    return [Component("estimator", name, f"{here}:{cls}", name)
            for name, cls in dict(vtrace="VTrace", gae="GAE", grpo="Group", rloo="Group", reinforce="Group").items()]
'''
"""The distribution of estimators that the errors of the design speak of."""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterable[Path]:
    """A folder of distributions in front of `sys.path`; what is imported from it is forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.endswith("_under_test"):
            del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what `posttrain init` writes."""
    monkeypatch.chdir(tmp_path)
    scaffold.write(tmp_path)
    return tmp_path


# --- the four errors of the design, through the command line ----------------------------------------------------------

def test_error_of_a_misspelled_name(capsys: pytest.CaptureFixture[str], site: Path) -> None:
    install(site, "posttrain-estimators", ESTIMATORS)
    assert called(capsys, "show", "estimator", "vtrce") == (
        2, "", "estimator 'vtrce' not found; did you mean 'vtrace' (posttrain-estimators 0.1.0)?  "
               "installed: gae, grpo, reinforce, rloo, vtrace  all: posttrain plugins estimator\n")


def test_error_of_a_missing_package(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, site: Path,
                                    folder: Path) -> None:
    """A plugin as `posttrain-backends` is declared, whose backend imports transformers at once."""
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    install(site, "posttrain-backends", "from posttrain.hookspecs import Component, hookimpl\n@hookimpl\n"
            "def components():\n    return [Component('backend', 'hf', 'hf_under_test:HF', '', extra='hf')]\n",
            requires=["torch>=2.11; extra == 'hf'", "transformers>=5; extra == 'hf'"])
    (site / "hf_under_test.py").write_text("import transformers\nclass HF: pass\n")
    (folder / "train.yaml").write_text("task: {use: rows, path: data.jsonl}\npolicy: hf\n")
    code, _, err = called(capsys, "check", "train.yaml")
    assert code == 2 and ("backend 'hf' needs transformers, which is not installed: "
                          "pip install 'posttrain-backends[hf]'") in err


@first_party
def test_error_of_a_need_that_nobody_provides(capsys: pytest.CaptureFixture[str], site: Path, folder: Path) -> None:
    install(site, "posttrain-estimators", ESTIMATORS)
    code, out, err = called(capsys, "check", "train.yaml", "estimator=gae")
    assert (code, out) == (2, "")
    assert "estimator 'gae' needs 'values'; add a critic (critic: policy) or use one of: grpo, reinforce, rloo\n" in err


@first_party
def test_error_of_a_misspelled_field_names_its_line(capsys: pytest.CaptureFixture[str], site: Path,
                                                    folder: Path) -> None:
    install(site, "posttrain-estimators", ESTIMATORS)
    lines = [*(f"# {i}" for i in range(9)), "task: {use: rows, path: data.jsonl}",
             "rewards: {exact: {use: exact_match}}", "estimator:", "  use: vtrace", "  rho_mx: 2.0", ""]
    (folder / "train.yaml").write_text("\n".join(lines))
    assert called(capsys, "check", "train.yaml") == (
        2, "", "estimator.rho_mx is not a field of vtrace; did you mean 'rho_max'? (train.yaml:14)\n")
    (folder / "train.yaml").write_text("\n".join([*lines, "stepz: 3"]))
    code, _, err = called(capsys, "check", "train.yaml")
    assert code == 2 and err.splitlines() == [
        "train.yaml cannot be run:",
        "  estimator.rho_mx is not a field of vtrace; did you mean 'rho_max'? (train.yaml:14)",
        "  stepz is not a key; did you mean 'steps'? (train.yaml:16)"], "all problems of a file at once"


def test_error_of_a_package_that_is_not_installed(capsys: pytest.CaptureFixture[str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, discover(environ={}, entry_points=()))
    assert called(capsys, "show", "estimator", "gae") == (
        2, "", "estimator 'gae' is in posttrain-estimators, which is not installed: pip install posttrain-estimators\n")


# --- posttrain plugins ------------------------------------------------------------------------------------------------

class One:
    """A plugin."""

    @hookimpl
    def components(self) -> Iterable[Component]:
        yield Component("estimator", "mine", f"{__name__}:Documented", "the first", {"rate": 2.0}, "Somebody 2020")


class Two:
    """Another one, with a name of the first."""

    @hookimpl
    def components(self) -> Iterable[Component]:
        yield Component("estimator", "mine", f"{__name__}:Documented", "the second")


@dataclass(frozen=True)
class Documented:
    """Says what it does."""

    rate: float = 1.0
    """How fast."""
    names: tuple[str, ...] = ()
    """Which."""

    needs = frozenset({"values", "logprobs"})
    unit = "episode"


@dataclass(frozen=True)
class Asking:
    """Cannot be made without its field."""

    path: str
    """Where."""

    needs = frozenset({"values"})


def test_names_that_clash_are_listed_as_they_are_chosen(capsys: pytest.CaptureFixture[str],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, discover([One(), Two()], environ={}, entry_points=()))
    _, out, err = called(capsys, "plugins", "estimator")
    assert (out, err) == ("estimator  One/mine  One  the first\nestimator  Two/mine  Two  the second\n", "")
    assert "estimator mine: the second" in called(capsys, "show", "estimator", "Two/mine")[1]


def test_the_json_of_the_listing_keeps_its_schema(capsys: pytest.CaptureFixture[str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint
    found = discover([One(), Two()], environ={"POSTTRAIN_BLOCK": "unwanted"}, entry_points=[
        point("bad", "no_such_module_here", "posttrain.v1"), point("old", "a:b", "posttrain.v0"),
        point("unwanted", "a:b", "posttrain.v1")])
    use(monkeypatch, found)
    listed = json.loads(called(capsys, "plugins", "--json")[1])
    assert [p.pop("seconds") >= 0 for p in listed["plugins"]] == [True, True]
    assert listed == {
        "schema": 1,
        "components": [
            {"kind": "estimator", "name": "mine", "use": "One/mine", "clash": True, "summary": "the first",
             "target": f"{__name__}:Documented", "source": "Somebody 2020", "defaults": {"rate": 2.0},
             "distribution": "One", "version": ""},
            {"kind": "estimator", "name": "mine", "use": "Two/mine", "clash": True, "summary": "the second",
             "target": f"{__name__}:Documented", "source": "", "defaults": {}, "distribution": "Two", "version": ""}],
        "plugins": [{"distribution": "One", "version": "", "components": 1},
                    {"distribution": "Two", "version": "", "components": 1}],
        "broken": [{"distribution": "bad", "error": "ModuleNotFoundError: No module named 'no_such_module_here'",
                    "remedy": "mend or upgrade it, or leave it out: POSTTRAIN_BLOCK=unwanted,bad"}],
        "foreign": [{"distribution": "old", "group": "posttrain.v0",
                     "remedy": "install old's version for 'posttrain.v1', or uninstall it"}],
        "left_out": [{"distribution": "unwanted", "by": "POSTTRAIN_BLOCK"}]}
    assert json.loads(called(capsys, "plugins", "reward", "--json")[1])["components"] == []


def test_verbose_adds_target_source_defaults_and_times(capsys: pytest.CaptureFixture[str],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, discover([One()], environ={}, entry_points=()))
    _, out, _ = called(capsys, "plugins", "estimator", "--verbose")
    lines = [line.strip() for line in out.splitlines()]
    assert lines[1:4] == [f"target: {__name__}:Documented", "source: Somebody 2020", "defaults: rate=2.0"]
    assert lines[-1].startswith("One    1 components  ") and lines[-1].endswith(" ms")


@first_party
@pytest.mark.skipif(sys.platform == "win32", reason="pty is POSIX")
def test_a_terminal_gets_titles_and_lines_of_its_width() -> None:
    import pty

    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-m", "posttrain.cli", "plugins", "estimator"], stdout=theirs,
                          env={**os.environ, "COLUMNS": "80"}) as process:
        os.close(theirs)
        text = b""
        try:
            while part := os.read(ours, 65536):
                text += part
        except OSError:  # the end of a terminal, on Linux
            pass
    os.close(ours)
    lines = text.decode().splitlines()
    assert process.returncode == 0 and lines[0].split() == ["kind", "name", "provider", "summary"]
    assert len(lines) > 6 and max(map(len, lines)) <= 80


def test_an_interrupt_during_discovery_ends_with_130(capsys: pytest.CaptureFixture[str], site: Path) -> None:
    install(site, "a-plugin", "raise KeyboardInterrupt")
    assert called(capsys, "plugins") == (
        130, "", "interrupted while plugin a-plugin was imported; to leave it out: POSTTRAIN_BLOCK=a-plugin\n")


# --- posttrain show ---------------------------------------------------------------------------------------------------

def test_a_card_has_fields_needs_provider_and_file(capsys: pytest.CaptureFixture[str],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, discover([One()], environ={}, entry_points=()))
    shown = json.loads(called(capsys, "show", "estimator", "mine", "--json")[1])
    assert shown == {
        "kind": "estimator", "name": "mine", "summary": "the first", "source": "Somebody 2020", "distribution": "One",
        "version": "", "target": f"{__name__}:Documented", "file": __file__, "doc": "Says what it does.",
        "fields": [{"name": "rate", "type": "float", "default": "2.0", "doc": "How fast."},
                   {"name": "names", "type": "tuple[str, ...]", "default": "()", "doc": "Which."}],
        "aspects": {"needs": ["logprobs", "values"], "unit": ["episode"]},
        "missing": [], "install": "", "problem": ""}
    _, out, err = called(capsys, "show", "estimator", "mine")
    assert err == "" and f"file:        {__file__}\nneeds:       logprobs, values\nunit:        episode\n" in out


@first_party
def test_real_components_say_what_they_need_and_provide(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\nneeds:       values\n" in called(capsys, "show", "estimator", "gae")[1]
    assert "\nprovides:    " in called(capsys, "show", "backend", "torch")[1]
    _, out, _ = called(capsys, "show", "estimator", "gae")
    assert f"provided by: posttrain-estimators {posttrain.__version__}\n" in out and "multistep.py\n" in out


def test_a_component_that_must_be_given_a_field_is_shown_without_needs() -> None:
    class Plugin:
        @hookimpl
        def components(self) -> Iterable[Component]:
            yield Component("task", "asking", f"{__name__}:Asking", "asks")

    registry = discover([Plugin()], environ={}, entry_points=())
    found = catalogue.card(registry, registry.resolve("task", "asking"))
    assert found.aspects == {} and found.problem == "" and found.fields == (
        catalogue.FieldCard("path", "str", "", "Where."),)


def test_a_component_whose_package_is_missing_is_read_and_not_imported(capsys: pytest.CaptureFixture[str],
                                                                       site: Path) -> None:
    install(site, "a-plugin", "from posttrain.hookspecs import Component, hookimpl\n@hookimpl\ndef components():\n"
            "    return [Component('backend', 'big', 'big_under_test:Big', 'needs much', {'size': 3}, extra='all')]\n",
            requires=["no-such-package-of-this-name>=1; extra == 'all'", "numpy; extra == 'all'"])
    (site / "big_under_test.py").write_text(
        'from typing import ClassVar\nfrom dataclasses import dataclass\nimport no_such_package_of_this_name\n'
        '@dataclass(frozen=True)\nclass Big:\n    """Very big."""\n    framework: ClassVar[str] = "torch"\n'
        '    model: str\n    """Which."""\n    size: int = 1\n')
    code, out, err = called(capsys, "show", "backend", "big")
    assert code == 0 and "Very big." in out and str(site / "big_under_test.py") in out
    assert "  model: str = (to be given)\n      Which.\n  size: int = 3\n" in out
    assert err == "not installed: no-such-package-of-this-name; to use it: pip install 'a-plugin[all]'\n"
    assert json.loads(called(capsys, "show", "backend", "big", "--json")[1])["install"] == "pip install 'a-plugin[all]'"


def test_a_broken_component_is_shown_as_declared_and_ends_with_2(capsys: pytest.CaptureFixture[str],
                                                                 site: Path) -> None:
    install(site, "a-plugin", "from posttrain.hookspecs import Component, hookimpl\n@hookimpl\ndef components():\n"
            "    return [Component('backend', 'gone', 'gone_under_test:Gone', 'is not there')]\n")
    code, out, err = called(capsys, "show", "backend", "gone")
    assert code == 2 and "backend gone: is not there" in out
    assert err == ("backend 'gone' (a-plugin) is broken: gone_under_test:Gone: No module named 'gone_under_test'\n")


def test_foreign_plugins_have_a_remedy() -> None:
    assert catalogue.remedy(Foreign("old", "posttrain.v0")) == \
        "install old's version for 'posttrain.v1', or uninstall it"


# --- many plugins -----------------------------------------------------------------------------------------------------

def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_plugins", ROOT / "tools" / "bench" / "plugins.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_listing_fifty_plugins_imports_no_component_and_no_framework(tmp_path: Path) -> None:
    parts = bench().install(tmp_path, 50)
    heavy = [*parts, "numpy", "torch", "jax", "scipy", "rich", "omegaconf", "posttrain.tokenizers",
             "posttrain_estimators.baselines", "posttrain_backends.torch_native"]
    code = ("import sys, io, json, contextlib\nfrom posttrain.cli import main\nout = io.StringIO()\n"
            "with contextlib.redirect_stdout(out): assert main(['plugins', '--json']) == 0\n"
            f"assert not set({heavy!r}) & set(sys.modules), set({heavy!r}) & set(sys.modules)\n"
            "listed = json.loads(out.getvalue())\nassert not listed['broken'], listed['broken']\n"
            "print(sum(c['name'].startswith('dummy_') for c in listed['components']))")
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.stdout == "200\n", done.stderr


# --- the same plugins in workers --------------------------------------------------------------------------------------

REWARDS = '''
import os
from dataclasses import dataclass
from posttrain.hookspecs import Component, hookimpl
from posttrain.registry import discover

@dataclass(frozen=True)
class Seen:
    """The process, whether the environment reached it, and whether discovery there finds this plugin."""
    scale: float = 1.0

    def __call__(self, prompts, completions, **columns):
        found = "OWN" in discover().names("reward") or not INSTALLED
        return [float(os.getpid()), self.scale, float(os.environ.get("POSTTRAIN_BLOCK") == "nothing"), float(found)]

@hookimpl
def components():
    yield Component("reward", "OWN", TARGET, "what a worker sees", {"scale": 2.0})
'''


def seen_in_worker(text: str, folder: Path, registry: Registry) -> list[float]:
    """What the reward `seen` of a configuration answers in a worker, beginning with the worker's process."""
    (folder / "mine.yaml").write_text("task: {use: rows, path: data.jsonl}\nreward_workers: {count: 1}\n" + text)
    loaded = config.load(folder / "mine.yaml", [], registry)
    entry = loaded.settings.rewards["seen"]
    with compose.reward_workers(loaded.settings) as workers:
        assert isinstance(workers, Pool)
        columns: dict[str, Any] = {"prompts": ["a"] * 4, "completions": ["b"] * 4}
        outcome, = workers.run([Job(0, (0, 1, 2, 3), columns)])
    assert entry.origin is not None, "a fresh process makes it again, nothing is forked"
    numbers: list[float] = list(outcome.numbers)  # type: ignore[union-attr]  # else the test fails, as it must
    return numbers


@first_party
def test_a_worker_sees_the_reward_of_an_installed_plugin(site: Path, folder: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_BLOCK", "nothing")
    install(site, "a-plugin", REWARDS.replace("OWN", "mine").replace("INSTALLED", "True")
            .replace("TARGET", 'f"{__name__}:Seen"'))
    process, *others = seen_in_worker("rewards: {seen: mine}\n", folder, discover())
    assert process != os.getpid() and others == [2.0, 1.0, 1.0], "the preset, the environment, the plugins"


@first_party
def test_a_worker_sees_the_reward_of_a_single_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_BLOCK", "nothing")
    (folder / "p.py").write_text(REWARDS.replace("OWN", "mine").replace("INSTALLED", "False")
                                 .replace("TARGET", "'p:Seen'"))
    text = "plugins: [p.py]\nrewards: {seen: {use: mine, scale: 3}}\n"
    process, *others = seen_in_worker(text, folder, discover())
    assert process != os.getpid() and others[:2] == [3.0, 1.0]


class RewardPlugin:
    """A plugin handed over from Python, whose component is in an importable module."""

    @hookimpl
    def components(self) -> Iterable[Component]:
        yield Component("reward", "mine", "object_under_test:Seen", "of an object", {"scale": 4.0})


@first_party
def test_a_worker_sees_the_reward_of_an_object(site: Path, folder: Path) -> None:
    (site / "object_under_test.py").write_text(REWARDS.replace("INSTALLED", "False").replace("TARGET", "''"))
    process, *others = seen_in_worker("rewards: {seen: mine}\n", folder, discover([RewardPlugin()]))
    assert process != os.getpid() and others[0] == 4.0


# --- single files in the manifest -------------------------------------------------------------------------------------

@pytest.fixture
def single(folder: Path) -> Path:
    """A plugin in one file beside a configuration."""
    file = folder / "p.py"
    file.write_text(REWARDS.replace("OWN", "mine").replace("TARGET", "'p:Seen'").replace(
        "def __call__(self, prompts, completions, **columns):", "def __call__(self, prompts, completions, **columns):\n"
        "        return [self.scale] * len(prompts)"))
    return file


SINGLE = ("plugins=[p.py]", "rewards={mine: mine}", "threads=1", "evaluate.every=0", "rollout.prompts_per_step=2",
          "rollout.group_size=2", "rollout.max_new_tokens=2")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@first_party
def test_a_single_file_is_in_the_manifest_and_a_change_ends_the_promise_of_equal_bits(folder: Path,
                                                                                       single: Path) -> None:
    loaded = config.load(folder / "train.yaml", SINGLE, discover())
    manifest = run.manifest(loaded)
    assert manifest["user_files"][str(single)] == sha256(single) == loaded.files[str(single)]
    assert str(single) not in manifest["plugins"]
    with RunDirectory.create(folder / "here", config=config.to_yaml(loaded), manifest=manifest) as files:
        again = config.load(files.path / "config.yaml", [], discover())
        assert files.differences(run.manifest(again)) == [] and again.settings.rewards["mine"].call([""], [""]) == [2.0]
        before = sha256(single)
        single.write_text(single.read_text() + "# changed\n")
        told, = files.differences(run.manifest(config.load(files.path / "config.yaml", [], discover())))
    assert str(single) in told and before in told and sha256(single) in told


@first_party
@pytest.mark.slow
def test_resuming_says_that_a_single_file_changed(folder: Path, single: Path,
                                                  caplog: pytest.LogCaptureFixture) -> None:
    run.train("train.yaml", ["steps=1", "run=runs/here", *SINGLE], output="quiet")
    single.write_text(single.read_text() + "# changed\n")
    finished = run.resume("runs/here", ["steps=2"], output="quiet")
    told = [r.getMessage() for r in caplog.records if "no longer bitwise equal" in r.getMessage()]
    assert finished.state.step == 2 and len(told) == 1 and sha256(single) in told[0]


# --- modules in the manifest ------------------------------------------------------------------------------------------

MODULE = """
from posttrain.hookspecs import Component, hookimpl
@hookimpl
def components():
    yield Component("reward", "mine", "TARGET", "one for all")
"""
REWARD = "def one(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n"


def recorded(folder: Path, plugin: str, reward: str = "mine") -> tuple[dict[str, str], dict[str, str]]:
    """Plugins and user files in the manifest of a run with a plugin and a reward of it."""
    (folder / "mine.yaml").write_text("task: {use: rows, path: data.jsonl}\n")
    loaded = config.load(folder / "mine.yaml", [f"plugins=[{plugin}]", f"rewards={{r: {reward}}}"], discover())
    found = run.manifest(loaded)
    return found["plugins"], found["user_files"]


@first_party
def test_a_module_of_an_installed_distribution_has_its_version_and_its_hashes(folder: Path) -> None:
    plugins, files = recorded(folder, "posttrain.toy", "exact_match")
    package = Path(posttrain.__file__).parent / "toy"
    assert "posttrain.toy" not in plugins and plugins["posttrain-core"] == posttrain.__version__
    assert files == {str(path): sha256(path) for path in package.glob("*.py")} and len(files) >= 4


@first_party
def test_a_module_of_ones_own_is_hashed_like_a_file(folder: Path, site: Path) -> None:
    module = site / "own_under_test.py"
    module.write_text(MODULE.replace("TARGET", "own_under_test:one") + REWARD)
    plugins, files = recorded(folder, "own_under_test")
    assert files == {str(module): sha256(module)} and set(plugins).isdisjoint({"own_under_test", "", "unknown"})


@first_party
def test_of_a_package_all_files_are_hashed_and_its_distribution_is_named(folder: Path, site: Path) -> None:
    """What a module of a package declares may be in any other of its modules."""
    package = site / "wordy_under_test"
    (package / "inner").mkdir(parents=True)
    declares = MODULE.replace("TARGET", "wordy_under_test.inner.rewards:one")
    for name, text in (("__init__.py", ""), ("plugin.py", declares), ("inner/__init__.py", ""),
                       ("inner/rewards.py", REWARD)):
        (package / name).write_text(text)
    info = site / "wordy-2.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wordy\nVersion: 2.5\n")
    (info / "RECORD").write_text("wordy_under_test/__init__.py,,\nwordy_under_test/plugin.py,,\n")
    plugins, files = recorded(folder, "wordy_under_test.plugin")
    assert plugins["wordy"] == "2.5" and "wordy_under_test.plugin" not in plugins
    assert set(files) == {str(path) for path in package.rglob("*.py")} and len(files) == 4
    for name in [name for name in sys.modules if name.startswith("wordy_under_test")]:
        del sys.modules[name]


# --- classes of a single file in a worker -----------------------------------------------------------------------------

HOLDING = """
from dataclasses import dataclass
from enum import Enum
from typing import Any
import os
from posttrain.hookspecs import Component, hookimpl

class Mode(Enum):
    ONE = "one"
    TWO = "two"

@dataclass(frozen=True)
class Inner:
    scale: float = 1.0

@dataclass(frozen=True)
class Seen:
    mode: Mode = Mode.ONE
    inner: Inner = Inner()

    def __call__(self, prompts, completions, **columns):
        return [float(os.getpid()), float(self.mode is Mode.TWO), self.inner.scale, float(type(self.inner) is Inner)]

@hookimpl
def components():
    yield Component("reward", "mine", "p:Seen", "holds what only this file has")
"""


@first_party
@pytest.mark.parametrize("named", ["plugins: [p.py]\nrewards: {seen: {use: mine, ",
                                   "rewards: {seen: {file: 'p.py:Seen', "])
def test_a_worker_makes_a_reward_whose_fields_are_of_classes_of_a_single_file(folder: Path, named: str) -> None:
    (folder / "p.py").write_text(HOLDING)
    process, *others = seen_in_worker(named + "mode: two, inner: {scale: 3}}}\n", folder, discover())
    assert process != os.getpid() and others == [1.0, 3.0, 1.0]


@first_party
def test_a_class_that_a_worker_cannot_have_is_told_by_name(folder: Path) -> None:
    (folder / "p.py").write_text(HOLDING)
    (folder / "mine.yaml").write_text("task: {use: rows, path: data.jsonl}\nreward_workers: {count: 1}\n"
                                      "plugins: [p.py]\nrewards: {seen: mine}\n")
    loaded = config.load(folder / "mine.yaml", [], discover())
    (folder / "p.py").write_text(HOLDING + "# changed since\n")
    with compose.reward_workers(loaded.settings) as workers, pytest.raises(
            RewardError, match="reward 'seen' cannot be loaded in a worker: ModuleNotFoundError: No module named "
                               "'posttrain_file_p_"):
        assert isinstance(workers, Pool)
        workers.run([Job(0, (0,), {"prompts": ["a"], "completions": ["b"]})])


@first_party
def test_columns_of_classes_of_a_single_file_reach_a_worker(folder: Path) -> None:
    """A task in the same file may put whatever pickles into a row."""
    (folder / "p.py").write_text(HOLDING.replace("[float(os.getpid())", "[float(columns['inner'][0].scale)"))
    (folder / "mine.yaml").write_text("task: {use: rows, path: data.jsonl}\nreward_workers: {count: 1}\n"
                                      "plugins: [p.py]\nrewards: {seen: mine}\n")
    loaded = config.load(folder / "mine.yaml", [], discover())
    reward: Any = loaded.settings.rewards["seen"].call
    inner = type(reward.inner)(scale=7.0)
    with compose.reward_workers(loaded.settings) as workers:
        assert isinstance(workers, Pool)
        columns: dict[str, Any] = {"prompts": ["a"] * 4, "completions": ["b"] * 4, "inner": [inner] * 4}
        outcome, = workers.run([Job(0, (0, 1, 2, 3), columns)])
    assert outcome == Returned((7.0, 0.0, 1.0, 1.0))
