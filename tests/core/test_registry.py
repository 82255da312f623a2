"""The registry: discovery guards each plugin on its own, and every error says what to do next."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import posttrain
import pytest
from posttrain.errors import ConfigError, PluginError
from posttrain.hookspecs import Component, hookimpl
from posttrain.protocols import KINDS
from posttrain.registry import Broken, Foreign, Registry, discover, import_file

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


def install(folder: Path, distribution: str, source: str, *, version: str = "0.1.0", group: str = "posttrain.v1",
            requires: Sequence[str] = ()) -> None:
    """An installed distribution with one plugin module, as pip leaves it behind."""
    module = distribution.replace("-", "_") + "_under_test"
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {r}" for r in requires)]) + "\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nplugin = {module}\n")


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
    ("raise SystemExit(3)", "SystemExit: 3"),
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
    with pytest.raises(PluginError, match="broken plugins: a-broken"):
        registry.resolve("estimator", "gae")


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


def test_the_environment_allows_and_blocks(site: Path) -> None:
    install(site, "a-plugin", plugin_source("a"))
    install(site, "b-plugin", plugin_source("b"))
    assert found_in(site, {"POSTTRAIN_BLOCK": "A_plugin"}).names("estimator") == ("b",)
    assert found_in(site, {"POSTTRAIN_PLUGINS": "a-plugin"}).names("estimator") == ("a",)
    assert found_in(site, {"POSTTRAIN_PLUGINS": "a-plugin,b-plugin", "POSTTRAIN_BLOCK": "b-plugin"}
                    ).names("estimator") == ("a",)
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
    for name, reason in (("vtrace", r"is broken: a_plugin_under_test:Gone: AttributeError"),
                         ("other", r"is broken: gone_altogether:Trace: No module named")):
        with pytest.raises(PluginError, match=reason):
            registry.create("estimator", name)


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

    def __init__(self, told: list[tuple[Any, ...]], error: Exception | None = None) -> None:
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
    assert failed == (Broken("Observing", "step_finished: RuntimeError: disk full"),)
    assert registry.hooks.run_started(None) == registry.hooks.run_finished(None, None) == ()


def test_the_first_party_plugins_are_whole() -> None:
    registry = posttrain.discover()
    assert registry.broken == () and registry.foreign == ()
    assert {c.kind for c in registry.components()} <= set(KINDS)
    for component in registry.components():
        assert component.summary and registry.provider(component)[1] == posttrain.__version__
        assert callable(registry.load(component)), component


def test_listing_imports_no_framework_and_no_component() -> None:
    code = ("import sys; from posttrain.registry import discover; r = discover(); assert r.components('estimator');"
            "heavy = {'torch', 'jax', 'scipy', 'typer', 'rich', 'omegaconf', 'tokenizers', 'posttrain.tokenizers',"
            "'posttrain_estimators.baselines', 'posttrain_backends.torch_native'} & set(sys.modules);"
            "assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
