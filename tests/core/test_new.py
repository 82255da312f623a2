"""`posttrain new` and `posttrain init`: what they write and refuse, and that what is written keeps its contract."""

from __future__ import annotations

import ast
import doctest
import json
import keyword
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import posttrain
import pytest
import yaml
from commandline import called
from packaging.requirements import Requirement
from posttrain import authoring, cli, scaffold, tasks
from posttrain.authoring import OFFERS, Names, core_requirement, texts
from posttrain.config import load
from posttrain.errors import InputError
from posttrain.hookspecs import ENTRY_POINT_GROUP
from posttrain.registry import Registry, discover, import_file
from posttrain.tasks import source
from posttrain.testing import ComponentContract, failures

KINDS = tuple(OFFERS)
EXAMPLES = Path(__file__).parents[2] / "examples" / "plugins"


@pytest.fixture(scope="module")
def registry() -> Registry:
    return discover()


# ---- what is written


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_is_complete(kind: str) -> None:
    files = texts(kind, "my_thing")
    assert {"README.md", "pyproject.toml", "train.yaml", "tests/test_my_thing.py", "src/posttrain_my_thing/__init__.py",
            "src/posttrain_my_thing/plugin.py", "src/posttrain_my_thing/py.typed"} <= files.keys()
    assert len(files) >= 8 and not any("$" in text or "PACKAGE" in path + text for path, text in files.items())
    found = tomllib.loads(files["pyproject.toml"])
    assert found["project"]["name"] == "posttrain-my-thing"
    assert found["project"]["entry-points"] == {ENTRY_POINT_GROUP: {"my_thing": "posttrain_my_thing.plugin"}}
    assert found["project"]["dependencies"] == [core_requirement()]
    assert yaml.safe_load(files["train.yaml"])["plugins"] == ["posttrain.toy"]
    for what in ("pip install posttrain-my-thing", f"posttrain show {kind} my_thing", "pytest", "train.yaml", "twine"):
        assert what in files["README.md"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_module_is_python_says_what_it_is_and_fits_a_line(kind: str) -> None:
    for path, text in texts(kind, "usual_name").items():
        if path.endswith(".py"):
            assert ast.get_docstring(ast.parse(text)), path
            assert max(map(len, text.splitlines())) <= 120, path


def test_the_requirement_allows_this_version_and_not_the_next_that_may_break() -> None:
    allowed = Requirement(core_requirement()).specifier
    assert allowed.contains(posttrain.__version__)
    assert not Requirement(core_requirement("0.1.0")).specifier.contains("0.2.0")
    assert not Requirement(core_requirement("1.2.3")).specifier.contains("2.0.0")
    assert Requirement(core_requirement("1.2.3")).specifier.contains("1.9.0")


def test_examples_require_what_a_new_package_would() -> None:
    found = [tomllib.loads(path.read_text("utf-8"))["project"] for path in EXAMPLES.glob("*/pyproject.toml")]
    assert [project["dependencies"] for project in found] == [[core_requirement()]] * 3


def test_the_command_says_what_it_wrote_and_what_is_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = called(capsys, "new", "estimator", "my_thing", "--directory", str(tmp_path))
    root = tmp_path / "posttrain-my-thing"
    assert (code, err) == (0, "")
    written = {path for path in root.rglob("*") if path.is_file()}
    assert {f"wrote {path}" for path in written} == set(out.splitlines()[:-1])
    assert out.splitlines()[-1].startswith(f"next: cd {root}; pip install --editable .")


# ---- what is refused


@pytest.mark.parametrize(("name", "says"), [
    ("MyThing", "for example 'my_thing'"), ("my-thing", "for example 'my_thing'"), ("2d", "for example 'd'"),
    ("_x", "for example 'x'"), ("my__thing", "for example 'my_thing'"), ("", "is no name"), ("größe", "is no name"),
    ("../up", "for example 'up'"), ("a b", "for example 'a_b'"),
    ("gae", "estimator 'gae' is already offered by posttrain-estimators"),
    ("core", "distribution posttrain-core is one of posttrain's own"),
    ("episodes", "the class would be called Episodes"), ("none", "the class would be called None"),
    ("value_error", "the class would be called ValueError"),
])
def test_names_that_cannot_be(name: str, says: str, tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(InputError) as caught:
        authoring.new("estimator", name, tmp_path, registry)
    assert says in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_backend_may_not_take_an_engines_name(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(InputError, match="engine 'batched' is already offered by posttrain-backends"):
        authoring.new("backend", "batched", tmp_path, registry)


def test_names_of_our_packages_are_taken_where_they_are_not_installed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="estimator 'gae' is already offered by posttrain-estimators"):
        authoring.new("estimator", "gae", tmp_path, discover(entry_points=()))


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = called(capsys, "new", "estimater", "My Thing", "-d", str(tmp_path))
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "posttrain new estimater My Thing writes nothing:",
        "  'estimater' is no kind of component; did you mean 'estimator'?",
        "  'My Thing' is no name: small letters and digits, words joined by '_', a letter first; for example "
        "'my_thing'",
        "posttrain new KIND NAME [--directory DIR], KIND one of estimator, objective, kl, reward, task, tracker, "
        "backend"]


def test_a_kind_without_a_template_is_refused_by_name(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(InputError, match="there is no template for kind 'tokenizer'"):
        authoring.new("tokenizer", "mine", tmp_path, registry)


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "posttrain-mine").mkdir()
    code, _, err = called(capsys, "new", "kl", "mine", "-d", str(tmp_path))
    assert code == 2 and f"this exists and is not overwritten ({tmp_path / 'posttrain-mine'})" in err
    assert list((tmp_path / "posttrain-mine").iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        authoring.new("kl", "mine", tmp_path / "file", registry)


def test_no_word_of_python_becomes_a_class() -> None:
    assert {word for word in keyword.kwlist if word[0].isupper()} <= authoring._taken_names("reward")


# ---- what is written works here, where torch and JAX are installed


@pytest.fixture
def package(tmp_path: Path, registry: Registry, request: pytest.FixtureRequest) -> Iterator[tuple[Path, Registry]]:
    """A package that was just written, importable from its folder, and a registry that holds it."""
    kind = request.param
    authoring.new(kind, f"fresh_{kind}", tmp_path, registry)
    root = tmp_path / Names(f"fresh_{kind}").distribution
    sys.path.insert(0, str(root / "src"))
    try:
        module = __import__(f"posttrain_fresh_{kind}.plugin", fromlist=["plugin"])
        yield root, registry.extended([module])
    finally:
        sys.path.remove(str(root / "src"))
        for name in [name for name in sys.modules if name.startswith(f"posttrain_fresh_{kind}")]:
            del sys.modules[name]


@pytest.mark.parametrize("package", KINDS, indirect=True)
def test_its_configuration_can_be_read(package: tuple[Path, Registry], request: pytest.FixtureRequest) -> None:
    root, registry = package
    loaded = load(root / "train.yaml", [], registry)
    assert any(c.target.startswith("posttrain_fresh_") for c in loaded.components.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_toy_run_tells_actions_from_episodes(kind: str) -> None:
    """With one action per episode, a number per episode passes for one per action. A task's prompts end as its answers
    do, so a policy that sees one token cannot learn to stop."""
    text = yaml.safe_load(texts(kind, "my_thing")["train.yaml"])
    assert text["rollout"]["max_new_tokens"] == (1 if kind == "task" else 2)


@pytest.mark.parametrize("package", ["estimator", "backend"], indirect=True)
def test_its_toy_run_learns(package: tuple[Path, Registry], capsys: pytest.CaptureFixture[str]) -> None:
    """To stop, too; all kinds in an environment of their own: `tests/integration/test_authors_packages.py`."""
    root, _ = package
    plugin = f"{root.name.replace('-', '_')}.plugin"
    code = cli.main(["train", str(root / "train.yaml"), f"run={root / 'run'}", f"plugins=[posttrain.toy,{plugin}]",
                     "--quiet"])
    assert code == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    rewards = [line["reward/mean"] for line in lines]
    assert rewards[0] < 0.2 and min(rewards[-5:]) > 0.95 and lines[0]["episode/length"] > 1.5


@pytest.mark.parametrize("package", KINDS, indirect=True)
def test_paths_among_its_fields_are_relative_to_the_configuration(package: tuple[Path, Registry]) -> None:
    """Fields that hold paths say so; `file` of the tracker is a name in the run directory."""
    _, registry = package
    own = [c for c in registry.components() if c.target.startswith("posttrain_fresh_")]
    assert own
    for component in own:
        for f in fields(registry.load(component)):
            assert f.metadata.get("path", False) == (f.name in ("weights", "path", "directory")), f.name


@pytest.mark.parametrize("package", ["backend"], indirect=True)
def test_weights_of_a_configuration_elsewhere_are_found_beside_it(
        package: tuple[Path, Registry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, registry = package
    (root / "saved").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = (root / "train.yaml").read_text("utf-8").replace("rank: 4", "rank: 4, weights: saved")
    (root / "again.yaml").write_text(text, "utf-8")
    assert Path(load(root / "again.yaml", [], registry).settings.policy.weights) == root / "saved"


@pytest.mark.parametrize("kind", KINDS)
def test_the_readme_says_what_is_still_the_templates(kind: str) -> None:
    text = " ".join(texts(kind, "my_thing")["README.md"].split())
    change = text[text.index("## Change"):text.index("## Publish")]
    assert "| `train.yaml` |" in change
    assert "The summary and the source in `plugin.py`" in change and "until you change them" in change


@pytest.mark.parametrize("package", ["estimator", "kl", "reward", "backend"], indirect=True)
def test_it_keeps_its_contract_in_every_framework(package: tuple[Path, Registry], tmp_path: Path) -> None:
    """The others are tried in an environment of core alone: `tests/integration/test_authors_packages.py`."""
    root, _ = package
    (file,) = (root / "tests").glob("test_*.py")
    module = import_file(file)
    contracts = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, ComponentContract)
                 and c.__module__ == module.__name__]
    assert contracts
    for contract in contracts:
        contract.plugins = (root / "src" / root.name.replace("-", "_") / "plugin.py",)
        assert list(failures(contract, tmp_path=tmp_path)) == []


# ---- posttrain init


def test_init_writes_three_files_and_overwrites_none(tmp_path: Path) -> None:
    assert sorted(path.name for path in scaffold.write(tmp_path)) == ["data.jsonl", "rewards.py", "train.yaml"]
    (tmp_path / "rewards.py").unlink()
    with pytest.raises(InputError, match=r"(?s)data\.jsonl.*train\.yaml"):
        scaffold.write(tmp_path)
    assert not (tmp_path / "rewards.py").exists()


# ---- what they import is public


PUBLIC = ("data", "errors", "hookspecs", "ops", "protocols", "search", "testing")
"""Modules of core of which every name without an underscore is for authors; of others, what `__all__` lists."""

ROOT = Path(__file__).parents[2]
SHOWN = {**{f"{kind}: {path}": text for kind in KINDS for path, text in texts(kind, "any_thing").items()
            if path.endswith(".py")},
         **{str(path.relative_to(ROOT)): path.read_text("utf-8") for path in (ROOT / "examples").rglob("*.py")},
         **{f"{page.name}, block {i}": block for page in (ROOT / "docs" / "plugins").glob("*.md")
            for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL))}}
"""Python that authors copy from: templates, examples and the guide."""


def imported(text: str) -> Iterator[tuple[str, str]]:
    """Module and name of each import of core; the doctests' too."""
    doctests = "\n".join(e.source for e in doctest.DocTestParser().get_examples(text))
    for node in (*ast.walk(ast.parse(text)), *ast.walk(ast.parse(doctests))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "posttrain":
            yield from ((str(node.module), alias.name) for alias in node.names)
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.startswith("posttrain."))


def private(module: str, name: str) -> bool:
    """Whether an import is of what is in no public list."""
    parts = module.split(".")
    if any(part.startswith("_") for part in (*parts, name)):
        return True
    if parts[1:2] and parts[1] in PUBLIC:
        return False
    return name not in getattr(import_module(module), "__all__", ())


@pytest.mark.parametrize("place", SHOWN)
def test_what_authors_copy_from_imports_what_is_public(place: str) -> None:
    assert [f"{module}: {name}" for module, name in imported(SHOWN[place]) if private(module, name)] == []


def test_the_check_of_imports_sees_what_is_private() -> None:
    """And all kinds of imports, of which there are many."""
    found = set(imported("from posttrain.tasks.source import load\nimport posttrain.loss\ndef f():\n"
                         '    """\n    >>> from posttrain.tokenizers import BOS\n    """\n'
                         "    from posttrain.ops import _x\n"))
    assert found == {("posttrain.tasks.source", "load"), ("posttrain.loss", ""), ("posttrain.tokenizers", "BOS"),
                     ("posttrain.ops", "_x")} and all(private(*one) for one in found)
    assert not private("posttrain.tasks", "load") and not private("posttrain", "train")
    assert sum(len(list(imported(text))) for text in SHOWN.values()) > 100


def test_public_lists_hold_what_is_there_and_the_tasks_list_imports_nothing_heavy() -> None:
    for module in {module for text in SHOWN.values() for module, _ in imported(text)}:
        there = import_module(module)
        assert all(hasattr(there, name) for name in getattr(there, "__all__", ())), module
    assert set(tasks.__all__) <= set(dir(tasks)) and tasks.load is source.load
    with pytest.raises(AttributeError, match="module 'posttrain.tasks' has no attribute 'laod'"):
        _ = tasks.laod  # a name that is not there
    code = "import sys, posttrain.tasks; print({'numpy', 'posttrain.tasks.source', 'pyarrow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"
