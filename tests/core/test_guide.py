"""The guide for authors in `docs/plugins/`: every block on its pages is executed, page by page, as a reader would.

A page is read from top to bottom in a folder of its own. A block whose first line is `# name.py` (or .yaml, .toml) is
that file; other Python is executed, in one namespace per page. A `pyproject.toml` is installed, as far as metadata
goes. YAML that is no file stands for keys over the page's `train.yaml`. In a console, `posttrain` runs, and what is
shown below it must be what it prints (`...` stands for anything), with exit code 0 unless `echo $?` says otherwise.
Files called `test_*.py` are run by one pytest for all pages. A block is left out by `<!-- not run: REASON -->` above
it, and by nothing else; a page by `<!-- needs: PACKAGE -->`, where that is not installed.
"""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from importlib import invalidate_caches
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from posttrain import cli, config, data, ops, testing
from posttrain.errors import PosttrainError
from posttrain.hookspecs import ENTRY_POINT_GROUP, KINDS
from posttrain.registry import discover

GUIDE = Path(__file__).parents[2] / "docs" / "plugins"
PAGES = sorted(path.stem for path in GUIDE.glob("*.md"))
PAGE_OF = {**{kind: kind for kind in KINDS}, "constraint": "mixing", "combiner": "mixing",
           "gradient_combiner": "mixing", "backend": "backend_and_engine", "engine": "backend_and_engine",
           "batching": "batching_and_searcher", "searcher": "batching_and_searcher"}
"""Kind -> the page that explains it."""
OTHER_COMMANDS = ("pytest", "echo $?")
"""What a console may hold beside `posttrain` without being marked: pytest runs all test files in any case."""
BASE = {
    "plugins": ["posttrain.toy"], "policy": "toy", "estimator": "toy", "objective": "toy", "kl": "none",
    "tokenizer": {"use": "characters", "alphabet": "0123abcd"}, "rollout": {"engine": "toy"}}
"""What keys are laid over on pages without a `train.yaml`."""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    left_out: str
    """Why it is not run; empty where it is."""

    @property
    def file(self) -> str:
        """The file that it is; empty where it is none."""
        named = re.match(r"# ([\w./-]+\.(?:py|yaml|toml))\n", self.text)
        return named[1] if named else ""

    @property
    def place(self) -> str:
        return f"{self.page}.md:{self.line}"


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page in order."""
    lines = (GUIDE / f"{page}.md").read_text("utf-8").splitlines()
    start, language = None, ""
    for number, line in enumerate(lines, start=1):
        if start is None and (opened := re.match(r"```(\w*)$", line)):
            start, language = number, opened[1]
        elif start is not None and line == "```":
            mark = re.fullmatch(r"<!-- not run: (\S.*) -->", lines[start - 2])
            yield Block(page, start, language, "\n".join(lines[start:number - 1]) + "\n", mark[1] if mark else "")
            start = None
    assert start is None, f"{page}.md: the block of line {start} is not closed"


def require_what_it_needs(page: str) -> None:
    """Skip where a package that the page names is not installed."""
    for package in re.findall(r"^<!-- needs: (\w+) -->$", (GUIDE / f"{page}.md").read_text("utf-8"), re.MULTILINE):
        pytest.importorskip(package)


def write(block: Block, folder: Path) -> Path:
    """The file of a block, and for a `pyproject.toml` what an installation would add."""
    path = folder / block.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text, "utf-8")
    if path.name == "pyproject.toml":
        install(tomllib.loads(block.text)["project"], folder)
    return path


def install(project: Mapping[str, Any], folder: Path) -> None:
    """Metadata of a distribution as pip writes it: name, version, requirements, entry points."""
    info = folder / f"{str(project['name']).replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    extras = project.get("optional-dependencies", {})
    needed = [f"Requires-Dist: {r}" for r in project.get("dependencies", [])]
    needed += [f'Provides-Extra: {extra}\nRequires-Dist: {r} ; extra == "{extra}"'
               for extra, brought in extras.items() for r in brought]
    (info / "METADATA").write_text("\n".join(
        ["Metadata-Version: 2.4", f"Name: {project['name']}", f"Version: {project['version']}", *needed]) + "\n")
    (info / "entry_points.txt").write_text("".join(
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in points.items())
        for group, points in project["entry-points"].items()))
    invalidate_caches()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, current and importable; what was imported from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "src", tmp_path):
        monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("COLUMNS", "200")
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_as_it_stands(page: str, folder: Path, capsys: pytest.CaptureFixture[str],
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    require_what_it_needs(page)
    names: dict[str, object] = {"__name__": page}
    for block in blocks(page):
        if block.left_out:
            continue
        if block.file:
            written = write(block, folder)
            if block.language == "python":
                compile(block.text, str(written), "exec")
            if block.language == "yaml":
                loads(written)
        elif block.language == "python":
            exec(compile("\n" * block.line + block.text, str(GUIDE / f"{page}.md"), "exec"), names)
        elif block.language == "yaml":
            loads_over_the_pages_own(block, folder)
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "console":
            console(block, capsys, monkeypatch)
        else:
            assert block.language == "text", f"{block.place}: a block of '{block.language}' is not checked"


def loads(path: Path) -> None:
    """A configuration is right as far as keys, values, names and types go."""
    config.load(path, [], discover())


def loads_over_the_pages_own(block: Block, folder: Path) -> None:
    """Some keys, over those of the page's `train.yaml`."""
    below = folder / "train.yaml"
    if not below.exists():
        below = folder / "base.yaml"
        below.write_text(yaml.safe_dump(BASE))
    path = folder / f"line-{block.line}.yaml"
    path.write_text(f"extends: {below.name}\n{block.text}")
    try:
        loads(path)
    except PosttrainError as error:
        raise AssertionError(f"{block.place}: {error}") from error


def console(block: Block, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command, what it prints, and how it ends."""
    commands = [part.partition("\n") for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]]
    code = 0
    for i, (command, _, expected) in enumerate(commands):
        words = shlex.split(command, comments=True)
        following = commands[i + 1] if i + 1 < len(commands) else ("", "", "")
        environment = {}
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        if command.startswith(OTHER_COMMANDS):
            assert command != "echo $?" or expected.strip() == str(code), f"{block.place}: ended with {code}"
            continue
        assert words[0] == "posttrain", f"{block.place}: {words[0]} is not run; mark the block and say why"
        capsys.readouterr()
        with monkeypatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            code = cli.main(words[1:])
        said = "".join(capsys.readouterr())
        assert code == 0 or following[0] == "echo $?", f"{block.place}: $ {command} ended with {code}:\n{said}"
        if expected.strip():
            flags = ELLIPSIS | NORMALIZE_WHITESPACE
            assert OutputChecker().check_output(expected, said, flags), f"{block.place}: $ {command} printed\n{said}"


@pytest.fixture(scope="module")
def contracts(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Counter[str]]:
    """Page -> how its tests ended: `passed`, `skipped`, and a line for each that failed."""
    root = tmp_path_factory.mktemp("guide")
    for page in PAGES:
        for block in blocks(page):
            if block.file and not block.left_out and not block.file.endswith("pyproject.toml"):
                write(block, root / page)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(root),
                           "--junitxml", str(root / "report.xml"), str(root)], cwd=root, check=False, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (root / "report.xml").exists(), f"pytest did not run:\n{done.stdout}{done.stderr}"
    found: dict[str, Counter[str]] = {page: Counter() for page in PAGES}
    for case in ElementTree.parse(root / "report.xml").iter("testcase"):
        page = case.get("classname", "").partition(".")[0]
        bad = [f"{case.get('classname')}.{case.get('name')}: {e.get('message')}\n{e.text}" for e in case
               if e.tag in ("failure", "error")]
        expected = [e for e in case if e.tag == "skipped"]
        found[page][bad[0] if bad else "skipped" if expected else "passed"] += 1
    return found


def with_tests() -> list[str]:
    """Pages that show a test."""
    return [page for page in PAGES if any(b.file.rpartition("/")[2].startswith("test_") for b in blocks(page))]


@pytest.mark.parametrize("page", with_tests())
def test_the_contracts_of_a_page_hold(page: str, contracts: Mapping[str, Counter[str]]) -> None:
    require_what_it_needs(page)
    outcomes = contracts[page]
    failed = [text for text in outcomes if text not in ("passed", "skipped")]
    assert not failed, "\n".join(failed)
    assert outcomes["passed"] > 5, f"{page}: {dict(outcomes)}"


def test_every_kind_has_a_page_with_its_contract() -> None:
    for kind in KINDS:
        text = (GUIDE / f"{PAGE_OF[kind]}.md").read_text("utf-8")
        contract = "".join(word.capitalize() for word in kind.split("_")).replace("Kl", "KL") + "Contract"
        assert contract in testing.__all__ and re.search(rf"\({contract}\)", text), f"{kind}: no {contract} is shown"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (GUIDE / f"{page}.md").read_text("utf-8")):
            assert (GUIDE / link).exists(), f"{page}.md links to {link}"
    index = (GUIDE / "README.md").read_text("utf-8")
    assert [page for page in PAGES if page != "README" and f"({page}.md)" not in index] == []


def test_little_is_left_out_and_lines_are_short() -> None:
    every = [block for page in PAGES for block in blocks(page)]
    assert len(every) > 60
    assert sum(bool(block.left_out) for block in every) <= len(every) // 10
    for page in PAGES:
        for number, line in enumerate((GUIDE / f"{page}.md").read_text("utf-8").splitlines(), start=1):
            assert len(line) <= 145, f"{page}.md:{number} has {len(line)} characters"


def public_functions() -> Iterator[tuple[str, inspect.Signature]]:
    """Names and signatures of what `posttrain.ops` offers."""
    for name, made in vars(ops).items():
        if inspect.isfunction(made) and made.__module__ == ops.__name__ and not name.startswith("_"):
            yield name, inspect.signature(made)


def test_the_page_of_operations_lists_each_with_its_parameters() -> None:
    text = (GUIDE / "ops.md").read_text("utf-8")
    for name, signature in public_functions():
        shown = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}"
                          for p in signature.parameters.values())
        assert f"| `{name}({shown})` |" in text, f"ops.md does not list {name}({shown})"
    for member in fields(ops.Ops):
        assert re.search(rf"^\| `ops\.{member.name}\b", text, re.MULTILINE), f"ops.md does not list ops.{member.name}"


def test_the_page_of_objectives_lists_every_column_of_a_batch() -> None:
    text = (GUIDE / "objective.md").read_text("utf-8")
    rows = "".join(line for line in text.splitlines(keepends=True) if line.startswith("|"))
    left_out = {"constants"}  # no objective's business: a place for numbers of core
    assert [f.name for f in fields(data.MicroBatch) if f.name not in left_out and f"{f.name}`" not in rows] == []


def test_toy_runs_have_answers_of_several_actions() -> None:
    """With one action per episode, a number per episode passes for one per action."""
    shown = [(block.place, yaml.safe_load(block.text)) for page in PAGES for block in blocks(page)
             if block.language == "yaml" and not block.left_out]
    lengths = {place: text["rollout"]["max_new_tokens"] for place, text in shown
               if isinstance(text, dict) and "max_new_tokens" in (text.get("rollout") or {})}
    assert len(lengths) > 8 and min(lengths.values()) > 1, lengths


def test_contracts_and_tests_that_pages_name_are_there() -> None:
    there = {name for contract in testing.__all__ for name in dir(getattr(testing, contract))}
    for page in PAGES:
        text = (GUIDE / f"{page}.md").read_text("utf-8")
        assert set(re.findall(r"\b[A-Z]\w*Contract\b", text)) <= set(testing.__all__), page
        named = set(re.findall(r"[\"'`](test_\w+)[\"'`]", text))
        assert named <= there, f"{page}.md names {sorted(named - there)}"


def test_a_pyproject_is_of_this_interface() -> None:
    shown = [b for page in PAGES for b in blocks(page) if b.language == "toml" and "entry-points" in b.text]
    assert shown
    for block in shown:
        groups = tomllib.loads(block.text)["project"]["entry-points"]
        assert list(groups) == [ENTRY_POINT_GROUP], f"{block.place}: {list(groups)}"
