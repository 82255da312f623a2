"""The registry: discovery guards each plugin on its own, and every error says what to do next."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import posttrain
import pytest
from distributions import install
from needed import first_party
from posttrain.catalogue import remedy
from posttrain.doctor import plugins
from posttrain.errors import ConfigError, PluginError
from posttrain.hookspecs import Component, hookimpl
from posttrain.known import INDEX, known
from posttrain.protocols import KINDS
from posttrain.registry import Broken, Foreign, LeftOut, Registry, discover, import_file

PLUGIN = """
from dataclasses import dataclass
from posttrain.hookspecs import Component, hookimpl

@dataclass(frozen=True)
class Trace:
    gamma: float = 1.0
    rho_max: float = 1.0
    '''Largest weight.'''
    kind: str = ""

    def __post_init__(self):
        if not self.rho_max > 0:
            raise ValueError(f"rho_max must be positive, got {self.rho_max}")

@hookimpl
def components():
    return [Component("estimator", NAME, f"{__name__}:Trace", "traces", defaults=DEFAULTS)]
"""


YIELDS = "from posttrain.hookspecs import Component, hookimpl\n@hookimpl\ndef components():\n"


def plugin_source(name: str, **defaults: Any) -> str:
    return PLUGIN.replace("NAME", repr(name)).replace("DEFAULTS", repr(defaults))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterable[Path]:
    """A folder of distributions in front of `sys.path`; what is imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.endswith("_under_test"):
            del sys.modules[name]


def found_in(site: Path, environ: Mapping[str, str] | None = None, extra: Sequence[Any] = ()) -> Registry:
    points = [p for d in metadata.distributions(path=[str(site)]) for p in d.entry_points]
    return discover(extra, environ=environ or {}, entry_points=points)


def message(error: pytest.ExceptionInfo[Exception]) -> str:
    return str(error.value)


def test_installed_plugins_are_listed_and_made(site: Path) -> None:
    install(site, "other-estimators", plugin_source("vtrace", rho_max=2.0), version="3.1")
    registry = found_in(site)
    assert registry.names("estimator") == ("vtrace",) and registry.broken == ()
    component = registry.resolve("estimator", "vtrace")
    assert registry.provider(component) == ("other-estimators", "3.1")
    assert registry.create("estimator", "vtrace").rho_max == 2.0, "the preset's default"
    assert registry.create("estimator", "vtrace", rho_max=3).rho_max == 3.0, "a field over the preset"


def test_a_name_that_is_not_found_says_what_is(site: Path) -> None:
    install(site, "posttrain-estimators", plugin_source("vtrace"))
    with pytest.raises(PluginError) as error:
        found_in(site).resolve("estimator", "vtrce")
    assert message(error) == ("estimator 'vtrce' not found; did you mean 'vtrace' (posttrain-estimators 0.1.0)?  "
                              "installed: vtrace  all: posttrain plugins estimator")
    assert error.value.exit_code == 2


def test_a_long_list_of_names_is_cut() -> None:
    with pytest.raises(PluginError, match=r"installed: a0, a1, a2, a3, a4, a5, a6, a7, \.\.\.  all:"):
        discover([Declaring(*(Component("kl", f"a{i}", "m:C", "") for i in range(9)))], environ={},
                 entry_points=()).resolve("kl", "zzz")


def test_a_name_of_another_kind_is_pointed_out(site: Path) -> None:
    install(site, "posttrain-estimators", plugin_source("vtrace"))
    with pytest.raises(PluginError, match="objective 'vtrace' not found; 'vtrace' is declared with kind 'estimator'"):
        found_in(site).resolve("objective", "vtrace")


def test_a_kind_that_there_is_not_breaks_its_plugin_alone() -> None:
    wrong, right = Component("estimatr", "a", "m:C", ""), Component("estimator", "b", "m:C", "")
    registry = discover([Declaring(wrong), Declaring(right)], environ={}, entry_points=())
    broken, = registry.broken
    assert broken.error.startswith("ValueError: declares 'a' with kind 'estimatr', which is none; did you mean "
                                   "'estimator'? kinds: estimator, correction, ")
    assert registry.components() == (right,)


def test_a_clash_fails_only_where_the_ambiguous_name_is_used(site: Path) -> None:
    install(site, "a-plugin", plugin_source("vtrace", gamma=0.5), version="1.0")
    install(site, "b-plugin", plugin_source("vtrace", gamma=0.25), version="2.0")
    registry = found_in(site)
    assert registry.names("estimator") == ("vtrace",)
    assert [registry.provider(c)[0] for c in registry.components("estimator")] == ["a-plugin", "b-plugin"]
    with pytest.raises(PluginError) as error:
        registry.create("estimator", "vtrace")
    assert message(error) == ("estimator 'vtrace' is offered by a-plugin 1.0 and b-plugin 2.0; "
                              "choose one of 'a-plugin/vtrace', 'b-plugin/vtrace'")
    assert registry.create("estimator", "b-plugin/vtrace").gamma == 0.25
    assert registry.create("estimator", "B_plugin/vtrace").gamma == 0.25, "names of distributions are normalised"


@pytest.mark.parametrize(("source", "reason"), [
    ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
    ("def components(): return []", "TypeError: implements no hook; mark its functions with "
                                    "@posttrain.hookspecs.hookimpl"),
    ("raise SystemExit(3)", "SystemExit: 3 (a_broken_under_test.py:1)"),
    ("class Stop(BaseException): pass\nraise Stop('so be it')", "Stop: so be it (a_broken_under_test.py:2)"),
    ("1 +", "SyntaxError: invalid syntax"),
    (YIELDS + "    yield Component('kl', 'a', 'm:C', 'one')\n    raise LookupError('half way')",
     "LookupError: half way (a_broken_under_test.py:5)"),
    (YIELDS + "    pass", "TypeError: components() returned None; return or yield its components"),
    (YIELDS + "    return Component('kl', 'a', 'm:C', 'one')", "it must return or yield several components, as a list"),
    (YIELDS + "    yield Component('kl', 'a/b', 'm:C', 'one')",
     "declares kl 'a/b'; a name begins with a letter and holds letters, digits, '_', '-' and '.' alone"),
    (YIELDS + "    yield Component('kl', 'my kl', 'm:C', 'one')", "declares kl 'my kl'; a name begins"),
    (YIELDS + "    yield Component('kl', '', 'm:C', 'one')", "declares kl ''; a name begins"),
    (YIELDS + "    yield Component('kl', 'a', 'm.C', 'one')", "target 'm.C', which must be 'module:Class'"),
    (YIELDS + "    yield Component('kl', 'a', 'm:', 'one')", "target 'm:', which must be 'module:Class'"),
    (YIELDS + "    yield Component('kl', 'a', 'm:C', None, source=3)",
     "with summary=None, source=3, which must be text"),
    (YIELDS + "    yield Component('kl', 7, 'm:C', 'one')", "with name=7, which must be text"),
    (YIELDS + "    yield Component('kl', 'a', 'm:C', 'one', ['x'])", "defaults=['x'], which must map names"),
    (YIELDS + "    yield Component('kl', 'a', 'm:C', 'one', {1: 2})", "defaults={1: 2}, which must map names"),
    (PLUGIN.replace("def components", "def componets"), "unknown hook 'componets'"),
    ("from posttrain.hookspecs import hookimpl\n@hookimpl\ndef run_started(rum): pass", "rum"),
    ("from posttrain.hookspecs import hookimpl\n@hookimpl\ndef components(): return ['gae']", "'gae'"),
    ("from posttrain.hookspecs import hookimpl\n@hookimpl\ndef components(): return 1 / 0", "ZeroDivisionError"),
    (plugin_source("x").replace("return [", "return 2 * ["), "declares estimator 'x' twice"),
])
def test_a_broken_plugin_harms_no_other(site: Path, source: str, reason: str) -> None:
    install(site, "a-broken", source)
    install(site, "b-whole", plugin_source("vtrace"))
    registry = found_in(site)
    assert [b.distribution for b in registry.broken] == ["a-broken"]
    assert reason in registry.broken[0].error
    assert registry.create("estimator", "vtrace").gamma == 1.0
    assert registry.broken[0].remedy == "mend or upgrade it, or leave it out: POSTTRAIN_BLOCK=a-broken"
    with pytest.raises(PluginError, match=r"all: posttrain plugins estimator\nbroken plugin a-broken: "):
        registry.resolve("estimator", "mine")


def test_ctrl_c_during_an_import_goes_on_and_names_the_plugin(site: Path) -> None:
    install(site, "a-plugin", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt) as stop:
        found_in(site)
    assert stop.value.__notes__ == ["interrupted while plugin a-plugin was imported; to leave it out: "
                                    "POSTTRAIN_BLOCK=a-plugin"]


def test_what_a_plugin_prints_goes_to_stderr(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "a-plugin", "print('imported')\n" + plugin_source("a").replace(
        "def components():\n", "def components():\n    print('asked')\n").replace(
            "{__name__}:Trace", "printing_under_test:C"))
    (site / "printing_under_test.py").write_text("print('component')\nclass C: pass\n")
    registry = found_in(site)
    registry.load(registry.resolve("estimator", "a"))
    assert tuple(capsys.readouterr()) == ("", "imported\nasked\ncomponent\n")


def test_a_component_that_ends_the_process_on_import_is_broken(site: Path) -> None:
    install(site, "a-plugin", plugin_source("a").replace("{__name__}", "leaving_under_test"))
    (site / "leaving_under_test.py").write_text("import sys\nsys.exit('no GPU')\n")
    registry = found_in(site)
    with pytest.raises(PluginError, match=r"estimator 'a' \(a-plugin\) is broken: leaving_under_test:Trace: "
                                          r"SystemExit: no GPU \(leaving_under_test.py:2\)"):
        registry.create("estimator", "a")


def test_two_entry_points_of_one_distribution(site: Path) -> None:
    install(site, "a-plugin", plugin_source("a"))
    (site / "second_under_test.py").write_text(plugin_source("b"))
    points = site / "a_plugin-0.1.0.dist-info" / "entry_points.txt"
    points.write_text(points.read_text() + "second = second_under_test\nagain = a_plugin_under_test\n")
    registry = found_in(site)
    assert registry.broken == () and registry.names("estimator") == ("a", "b"), "the same module twice counts once"
    assert [p.distribution for p in registry.plugins] == ["a-plugin", "a-plugin"]
    (site / "third_under_test.py").write_text(plugin_source("b"))
    points.write_text(points.read_text() + "third = third_under_test\n")
    with pytest.raises(PluginError) as error:
        found_in(site).resolve("estimator", "b")
    assert message(error) == ("estimator 'b' is declared twice by a-plugin 0.1.0 (second_under_test:Trace and "
                              "third_under_test:Trace); its authors must rename one of the two")


def test_one_module_of_two_distributions_is_the_first_ones(site: Path) -> None:
    install(site, "a-plugin", plugin_source("a"))
    install(site, "b-plugin", "")
    (site / "b_plugin-0.1.0.dist-info" / "entry_points.txt").write_text("[posttrain.v1]\nx = a_plugin_under_test\n")
    registry = found_in(site)
    assert [b.error.partition(" (")[0] for b in registry.broken] == [
        "ValueError: its entry point names the same module as that of a-plugin; uninstall one of the two"]
    assert registry.names("estimator") == ("a",)


def test_one_object_or_file_twice_counts_once(tmp_path: Path) -> None:
    plugin, file = Declaring(Component("kl", "a", "m:C", "")), tmp_path / "b.py"
    file.write_text(plugin_source("b"))
    registry = discover([plugin, file, plugin], environ={}, entry_points=()).extended([file])
    assert registry.broken == () and len(registry.plugins) == 2
    file.write_text(plugin_source("c"))
    assert registry.extended([file]).names("estimator") == ("c",), "a file that changed is read anew"


def test_a_plugin_that_cannot_be_in_a_set_breaks_no_other() -> None:
    class Unhashable(Declaring):
        __hash__ = None  # type: ignore[assignment]  # the point of the test

    registry = discover([Unhashable(), Declaring(Component("kl", "a", "m:C", ""))], environ={}, entry_points=())
    assert [b.error for b in registry.broken] == ["TypeError: unhashable type: 'Unhashable'"]
    assert registry.names("kl") == ("a",)


@first_party
def test_the_environment_holds_for_cores_own_components_too() -> None:
    without = discover(environ={"POSTTRAIN_BLOCK": "posttrain-core"})
    assert without.names("tokenizer") == ("hf",) and without.names("estimator")
    alone = discover(environ={"POSTTRAIN_PLUGINS": "posttrain_core"})
    assert {p.distribution for p in alone.plugins} == {"posttrain-core"} and alone.names("tracker")
    for registry, kind, name, says in (
            (without, "tracker", "jsonl",
             "tracker 'jsonl' is in posttrain-core, which POSTTRAIN_BLOCK leaves out: take it out of there"),
            (alone, "estimator", "gae",
             "estimator 'gae' is in posttrain-estimators, which POSTTRAIN_PLUGINS leaves out: add it there")):
        with pytest.raises(PluginError) as error:
            registry.resolve(kind, name)
        assert message(error) == says


# --- names known, but not installed -----------------------------------------------------------------------------------

@pytest.mark.parametrize(("kind", "name", "says"), [
    ("estimator", "gae", "estimator 'gae' is in posttrain-estimators, which is not installed: "
                         "pip install posttrain-estimators"),
    ("estimator", "posttrain_estimators/gae", "estimator 'posttrain_estimators/gae' is in posttrain-estimators, which "
                                              "is not installed: pip install posttrain-estimators"),
    ("backend", "hf", "backend 'hf' is in posttrain-backends, which is not installed: "
                      "pip install 'posttrain-backends[hf]'"),
    ("tracker", "wandb", "tracker 'wandb' is in posttrain-core, which is not installed: "
                         "pip install 'posttrain-core[wandb]'"),
    ("estimator", "acer", "estimator 'acer' is not offered: its correction term needs both policies' probabilities and "
     "a value of every action that was not taken, which rollouts do not carry; use retrace (q: q_head)"),
    ("estimator", "ga", "estimator 'ga' not found; did you mean 'gae' (posttrain-estimators, not installed: "
                        "pip install posttrain-estimators)?  installed: none  all: posttrain plugins estimator"),
    ("estimator", "other/gae", "estimator 'other/gae' not found; did you mean 'gae' (posttrain-estimators, not "
                               "installed: pip install posttrain-estimators)?  installed: none  "
                               "all: posttrain plugins estimator"),
    ("estimator", "hf", "estimator 'hf' not found  installed: none  all: posttrain plugins estimator"),
])
def test_a_component_of_a_package_that_is_not_installed_says_what_to_install(kind: str, name: str, says: str) -> None:
    with pytest.raises(PluginError) as error:
        discover(environ={}, entry_points=()).resolve(kind, name)
    assert message(error) == says


def test_a_package_that_is_there_without_the_component_says_why(site: Path) -> None:
    install(site, "posttrain-estimators", plugin_source("vtrce"), version="0.0.1")
    install(site, "posttrain-objectives", "1 / 0")
    install(site, "posttrain-backends", "", group="posttrain.v0")
    registry = found_in(site)
    for kind, name, says in (
            ("estimator", "gae", "which is installed as 0.0.1 without it: pip install --upgrade posttrain-core "
                                 "posttrain-estimators"),
            ("kl", "fixed", "which is broken: ZeroDivisionError: division by zero "
                            "(posttrain_objectives_under_test.py:1)  "
                            "mend or upgrade it, or leave it out: POSTTRAIN_BLOCK=posttrain-objectives"),
            ("backend", "hf", "which is installed for 'posttrain.v0', another version of the plugin interface: pip "
                              "install --upgrade posttrain-core posttrain-backends")):
        with pytest.raises(PluginError) as error:
            registry.resolve(kind, name)
        assert message(error).partition(", ")[2] == says


@first_party
@pytest.mark.needs("posttrain_tuning")
def test_the_index_of_known_components_is_fresh() -> None:
    tool = import_file(Path(__file__).parents[2] / "tools" / "known_components.py")
    assert tool.index() == INDEX.read_text("utf-8"), "run: python tools/known_components.py"


@first_party
def test_every_extra_that_a_component_names_is_one_of_its_distribution() -> None:
    for component in known():
        offered = metadata.metadata(component.distribution).get_all("Provides-Extra") or []
        assert component.extra in ("", *offered), component


# --- hooks told on stderr ---------------------------------------------------------------------------------------------

def test_hooks_are_traced_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    declaring = Declaring(Component("kl", "a", "m:C", "one"), Component("kl", "b", "m:C", "two"))
    given = [declaring, Observing([], RuntimeError("disk full")), Observing([], SystemExit(3))]
    for environ in ({}, {"POSTTRAIN_TRACE_HOOKS": "0"}):
        discover(given, environ=environ, entry_points=()).hooks.step_finished(None, 3, {"reward": 0.5})
    assert capsys.readouterr().err == ""
    registry = discover(given, environ={"POSTTRAIN_TRACE_HOOKS": "1"}, entry_points=())
    failed = registry.hooks.step_finished(None, 3, {"reward": 0.5, "long": 1.0, "more": 2.0, "most": 3.0})
    assert [b.error.partition(" (")[0] for b in failed] == ["step_finished: RuntimeError: disk full",
                                                            "step_finished: SystemExit: 3"], "told, and not stopped"
    first, *others = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"hook Declaring: components\(\) -> 2 of \(Component\(.*, \.\.\.\) in \d+\.\d ms", first)
    arguments = r"\(run=None, step=3, metrics=\{'long': 1.0, 'more': 2.0, 'most': 3.0, \.\.\.\}\)"
    assert len(others) == 2
    assert re.fullmatch(rf"hook Observing: step_finished{arguments} raised RuntimeError: disk full in .* ms", others[0])
    assert re.fullmatch(rf"hook Observing: step_finished{arguments} raised SystemExit: 3 in .* ms", others[1])


def test_a_misspelled_hook_is_told_the_hooks(site: Path) -> None:
    install(site, "a-broken", PLUGIN.replace("def components", "def componets"))
    assert "the hooks are components, commands, run_started, step_finished, run_finished" in \
        found_in(site).broken[0].error


def test_a_plugin_of_another_interface_version_is_reported_and_not_imported(site: Path) -> None:
    install(site, "from-the-future", "raise AssertionError('imported')", group="posttrain.v2")
    install(site, "of-another-project", "raise AssertionError('imported')", group="pytest11")
    registry = found_in(site)
    assert registry.foreign == (Foreign("from-the-future", "posttrain.v2"),)
    assert registry.broken == () and registry.plugins == ()


@pytest.mark.parametrize("group", ["posttrain", "posttrain.plugins", "posttrain-v1", "posttrain_v1", "Posttrain.v1"])
def test_a_group_that_is_called_almost_so_is_reported_and_not_imported(site: Path, group: str) -> None:
    install(site, "posttrain-ep", "raise AssertionError('imported')", group=group)
    install(site, "of-another-project", "raise AssertionError('imported')", group="posttrainer")
    registry = found_in(site)
    assert registry.foreign == (Foreign("posttrain-ep", group),) and not registry.broken and not registry.plugins
    said = f"posttrain-ep declares its plugin in the group '{group}'; did you mean 'posttrain.v1'?"
    assert remedy(registry.foreign[0]) == said
    assert [finding.remedy for finding in plugins(registry) if finding.remedy] == [said]
    with pytest.raises(PluginError) as error:
        registry.create("estimator", "part")
    assert message(error).endswith(f"all: posttrain plugins estimator\n{said}")


def test_a_group_of_another_version_is_not_called_misnamed() -> None:
    assert [Foreign("a", group).misnamed for group in ("posttrain.v2", "posttrain.v0", "posttrain.v10")] == [""] * 3


def test_a_framework_that_is_missing_at_the_top_of_a_plugin_is_told_where_to_import_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)  # as if it were not installed
    for name, package in (("a", "jax.numpy"), ("b", "nothing_of_this_name")):
        (tmp_path / f"{name}.py").write_text(f"import os\nimport {package}\n")
    heavy, other = discover([tmp_path / "a.py", tmp_path / "b.py"], entry_points=()).broken
    assert re.fullmatch(r"ModuleNotFoundError: .* \(a\.py:2\); import it inside the function that computes",
                        heavy.error)
    assert other.error == "ModuleNotFoundError: No module named 'nothing_of_this_name' (b.py:2)"


def test_a_wrong_target_in_a_file_names_the_file_and_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "bad-target.py").write_text(PLUGIN.replace("NAME", "'part'").replace("DEFAULTS", "{}").replace(
        ":Trace", ":Traces"))
    with pytest.raises(PluginError) as error:
        discover([tmp_path / "bad-target.py"], entry_points=()).create("estimator", "part")
    assert message(error) == (f"estimator 'part' ({tmp_path / 'bad-target.py'}) is broken: bad-target.py has no "
                              "'Traces'; did you mean 'Trace'?")


def test_a_misspelled_hook_of_a_file_is_told_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "part.py").write_text(PLUGIN.replace("NAME", "'part'").replace("DEFAULTS", "{}").replace(
        "def components", "def component"))
    assert discover([tmp_path / "part.py"], entry_points=()).broken[0].error == (
        "PluginValidationError: unknown hook 'component'; did you mean 'components'?; the hooks are components, "
        "commands, run_started, step_finished, run_finished")


def test_a_field_without_a_default_is_named(site: Path) -> None:
    source = plugin_source("vtrace").replace("gamma: float = 1.0", "limit: int\n    gamma: float = 1.0")
    install(site, "a-plugin", source)
    registry = found_in(site)
    with pytest.raises(ConfigError) as error:
        registry.create("estimator", "vtrace", gama=0.5)
    assert message(error).splitlines() == [
        "estimator.gama is not a field of vtrace; did you mean 'gamma'?",
        "estimator: field 'limit' of Trace needs a default, or a value in the configuration (estimator.limit)"]
    assert registry.create("estimator", "vtrace", limit=3).limit == 3


def test_the_environment_allows_and_blocks(site: Path) -> None:
    install(site, "a-plugin", plugin_source("a"))
    install(site, "b-plugin", plugin_source("b"))
    assert found_in(site, {"POSTTRAIN_BLOCK": "A_plugin"}).names("estimator") == ("b",)
    assert found_in(site, {"POSTTRAIN_PLUGINS": "a-plugin"}).names("estimator") == ("a",)
    assert found_in(site, {"POSTTRAIN_PLUGINS": "a-plugin,b-plugin", "POSTTRAIN_BLOCK": "b-plugin"}
                    ).names("estimator") == ("a",)
    assert found_in(site, {"POSTTRAIN_PLUGINS": "a-plugin,b-plugin", "POSTTRAIN_BLOCK": "b-plugin"}
                    ).left_out == (LeftOut("b-plugin", "POSTTRAIN_BLOCK"),)
    missing = found_in(site, {"POSTTRAIN_PLUGINS": "a-plugin, c-plugin"})
    assert missing.broken == (Broken("c-plugin", "named by POSTTRAIN_PLUGINS, but not installed"),)


NEEDS_TRANSFORMERS = """
from posttrain.hookspecs import Component, hookimpl
@hookimpl
def components():
    return [Component("backend", "hf", "needs_transformers_under_test:HF", "")]
"""


def test_a_missing_package_names_the_extra_that_brings_it(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    install(site, "posttrain-backends", NEEDS_TRANSFORMERS, requires=[
        "posttrain-core==0.1.0", "torch>=2.11; extra == 'torch'", "transformers>=5; extra == 'everything'",
        "transformers>=5; extra == 'hf'"])
    (site / "needs_transformers_under_test.py").write_text("import transformers\nclass HF: pass\n")
    registry = found_in(site)
    with pytest.raises(PluginError) as error:
        registry.create("backend", "hf")
    assert message(error) == ("backend 'hf' needs transformers, which is not installed: "
                              "pip install 'posttrain-backends[hf]'")
    with (pytest.raises(PluginError, match="needs sklearn, which is not installed: pip install scikit-learn"),
          registry.importing(registry.resolve("backend", "hf"))):
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn.metrics")


def test_a_target_that_does_not_exist_is_the_plugins_fault(site: Path) -> None:
    install(site, "a-plugin", plugin_source("vtrace").replace(":Trace", ":Gone"))
    install(site, "b-plugin", plugin_source("other").replace("{__name__}", "gone_altogether"))
    registry = found_in(site)
    for name, reason in (("vtrace", r"is broken: a_plugin_under_test has no 'Gone'"),
                         ("other", r"is broken: gone_altogether:Trace: No module named")):
        with pytest.raises(PluginError, match=reason):
            registry.create("estimator", name)


def test_a_preset_of_fields_that_are_not_there_is_the_plugins_fault(site: Path) -> None:
    install(site, "a-plugin", plugin_source("vtrace", rho_mx=2.0))
    with pytest.raises(ConfigError) as error:
        found_in(site).create("estimator", "vtrace")
    assert message(error) == ("estimator 'vtrace' (a-plugin) is broken: its defaults name what is no field of "
                              "a_plugin_under_test:Trace: 'rho_mx'; did you mean 'rho_max'?")


def test_a_function_takes_no_fields(site: Path) -> None:
    install(site, "a-plugin", plugin_source("f").replace(":Trace", ":f") + "\ndef f(prompts, completions): return []\n")
    registry = found_in(site)
    assert registry.create("estimator", "f").__name__ == "f"
    with pytest.raises(ConfigError, match="estimator: f takes no fields, since a_plugin_under_test:f is no dataclass; "
                                          "given: by"):
        registry.create("estimator", "f", by=2)


def test_wrong_fields_are_told_all_at_once(site: Path) -> None:
    install(site, "a-plugin", plugin_source("vtrace"))
    registry = found_in(site)
    with pytest.raises(ConfigError) as error:
        registry.create("estimator", "vtrace", rho_mx=1.0, zzz=2, gamma="high", rho_max=-1.0)
    assert message(error).splitlines() == [
        "estimator.rho_mx is not a field of vtrace; did you mean 'rho_max'?",
        "estimator.zzz is not a field of vtrace; known: gamma, rho_max, kind",
        "estimator.gamma must be a number, got 'high'",
        "estimator: rho_max must be positive, got -1.0"]


@dataclass(frozen=True)
class Mine:
    """A component in this module."""

    gamma: float = 1.0


class Declaring:
    """A plugin as an object."""

    def __init__(self, *components: Component) -> None:
        self.declared = components

    @hookimpl
    def components(self) -> Iterable[Component]:
        return self.declared


def test_objects_and_files_are_plugins_too(tmp_path: Path) -> None:
    file = tmp_path / "my_plugin.py"
    file.write_text(plugin_source("in_a_file").replace('f"{__name__}:Trace"', '"my_plugin:Trace"'))
    gone = tmp_path / "gone.py"
    empty = discover(environ={}, entry_points=())
    registry = empty.extended([Declaring(Component("estimator", "mine", f"{__name__}:Mine", "")), file, gone])
    assert registry.names("estimator") == ("in_a_file", "mine")
    assert registry.create("estimator", "in_a_file", gamma=0.5).gamma == 0.5
    assert registry.provider(registry.resolve("estimator", "mine")) == ("Declaring", "")
    assert registry.broken[0].distribution == str(gone) and "No such file" in registry.broken[0].error
    assert empty.names("estimator") == (), "a registry is a value"
    with pytest.raises(PluginError, match="estimator 'mine' not found  installed: none"):
        empty.resolve("estimator", "mine")


def test_a_file_is_executed_again_only_where_it_changed(tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    file.write_text("x = [1]\n")
    first = import_file(file)
    assert import_file(file) is first
    file.write_text("x = [2]\n")
    assert import_file(file).x == [2] and first.x == [1]
    file.write_text("1 / 0\n")
    names = set(sys.modules)
    with pytest.raises(ZeroDivisionError):
        import_file(file)
    assert set(sys.modules) == names, "a module that failed is not kept"


class Observing:
    """A plugin that notes what it is told."""

    def __init__(self, told: list[tuple[Any, ...]], error: BaseException | None = None) -> None:
        self.told, self.error = told, error

    @hookimpl
    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        self.told.append((step, dict(metrics)))
        if self.error:
            raise self.error


def test_every_observer_is_told_though_one_raises() -> None:
    told: list[tuple[Any, ...]] = []
    registry = discover([Observing(told, RuntimeError("disk full")), Observing(told)], environ={}, entry_points=())
    failed = registry.hooks.step_finished(None, 3, {"reward": 0.5})
    assert told == [(3, {"reward": 0.5})] * 2
    assert [b.distribution for b in failed] == ["Observing"]
    assert failed[0].error.startswith("step_finished: RuntimeError: disk full (test_registry.py:")
    assert registry.hooks.run_started(None) == registry.hooks.run_finished(None, None) == ()


@first_party
@pytest.mark.needs("math_verify")
def test_the_first_party_plugins_are_whole() -> None:
    registry = posttrain.discover()
    assert registry.broken == () and registry.foreign == ()
    assert {c.kind for c in registry.components()} <= set(KINDS)
    for component in registry.components():
        assert component.summary and registry.provider(component)[1] == posttrain.__version__
        assert callable(registry.load(component)), component


@first_party
def test_listing_imports_no_framework_and_no_component() -> None:
    code = ("import sys; from posttrain.registry import discover; r = discover(); assert r.components('estimator');"
            "heavy = {'torch', 'jax', 'scipy', 'typer', 'rich', 'omegaconf', 'tokenizers', 'posttrain.tokenizers',"
            "'posttrain_estimators.baselines', 'posttrain_backends.torch_native'} & set(sys.modules);"
            "assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- several interfaces, and metadata that cannot be read -------------------------------------------------------------

def test_a_distribution_of_several_interfaces_is_used_by_its_part_for_this_one(site: Path) -> None:
    """Only one without an entry point of this version is told to be of another."""
    install(site, "of-both", plugin_source("a"))
    points = site / "of_both-0.1.0.dist-info" / "entry_points.txt"
    points.write_text(points.read_text() + "[posttrain.v2]\nnew = no_such_module\nnewer = no_such_module\n")
    install(site, "of-tomorrow", "raise AssertionError('imported')", group="posttrain.v2")
    later = site / "of_tomorrow-0.1.0.dist-info" / "entry_points.txt"
    later.write_text(later.read_text() + "second = of_tomorrow_under_test\n")
    registry = found_in(site)
    assert registry.names("estimator") == ("a",) and registry.broken == ()
    assert registry.foreign == (Foreign("of-tomorrow", "posttrain.v2"),), "once, and it alone"
    assert found_in(site, {"POSTTRAIN_PLUGINS": "of-tomorrow"}).foreign == registry.foreign


@pytest.mark.parametrize(("content", "reason"), [
    (b"[posttrain.v1]\nthis is no entry point\n", "TypeError"),
    (b"[posttrain.v1]\n\xff\xfe = x\n", "UnicodeDecodeError"),
])
def test_entry_points_that_cannot_be_read_break_their_distribution_alone(site: Path, content: bytes,
                                                                         reason: str) -> None:
    install(site, "half-written", "")
    (site / "half_written-0.1.0.dist-info" / "entry_points.txt").write_bytes(content)
    install(site, "b-whole", plugin_source("whole"))
    registry = discover(environ={})
    broken, = registry.broken
    assert broken.distribution == "half-written"
    assert broken.error.startswith(f"its entry_points.txt cannot be read: {reason}: ")
    assert broken.remedy == "install it anew: pip install --force-reinstall --no-deps half-written"
    assert "whole" in registry.names("estimator") and "jsonl" in registry.names("tracker")
    named = discover(environ={"POSTTRAIN_PLUGINS": "half-written"})
    assert [b.error for b in named.broken] == [broken.error], "it is installed"


def test_the_first_of_two_distributions_of_one_name_counts_also_where_another_is_half_written(
        site: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "half-written", "")
    (site / "half_written-0.1.0.dist-info" / "entry_points.txt").write_text("[posttrain.v1]\nthis is no entry point\n")
    install(site, "a-plugin", plugin_source("first"), version="2.0")
    behind = tmp_path_factory.mktemp("behind")
    install(behind, "a-plugin", plugin_source("second"), version="1.0")
    monkeypatch.setattr(sys, "path", [*sys.path, str(behind)])
    registry = discover(environ={})
    assert [p.version for p in registry.plugins if p.distribution == "a-plugin"] == ["2.0"]


def test_metadata_that_cannot_be_read_is_no_reason_to_stop(site: Path) -> None:
    install(site, "a-plugin", plugin_source("a"))
    (site / "a_plugin-0.1.0.dist-info" / "METADATA").write_bytes(b"Name: \xff\xfe\n")
    install(site, "b-plugin", plugin_source("b"))
    (site / "b_plugin-0.1.0.dist-info" / "METADATA").unlink()
    assert {"a", "b"} <= set(discover(environ={}).names("estimator"))


def test_an_entry_point_that_is_none_is_a_broken_plugin(site: Path) -> None:
    install(site, "a-plugin", plugin_source("a"))
    (site / "a_plugin-0.1.0.dist-info" / "entry_points.txt").write_text("[posttrain.v1]\nx = not a module!\n")
    registry = discover(environ={})
    assert [b.distribution for b in registry.broken] == ["a-plugin"] and registry.names("tracker")
