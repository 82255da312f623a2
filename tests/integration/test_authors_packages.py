"""Packages of authors in an environment that holds core alone: those that `posttrain new` writes, and the examples.

Each is installed as its users would install it, listed, tried in its toy run, and tested by its own tests.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from environments import ROOT, Environment, core_alone
from posttrain.authoring import OFFERS, Names

pytestmark = [pytest.mark.timeout(300),
              pytest.mark.skipif(sys.platform == "win32", reason="environments are made of links")]

NEW = {f"new-{kind}": (kind, f"my_{kind}") for kind in OFFERS}
EXAMPLES = {path.name: path for path in sorted((ROOT / "examples" / "plugins").iterdir()) if path.is_dir()}
KINDS = {"posttrain-robust": {"estimator"}, "posttrain-countdown": {"reward", "task"}, "posttrain-sqlite": {"tracker"},
         **{case: set(OFFERS[kind]) for case, (kind, _) in NEW.items()}}
"""What each offers."""
LEARNED = {"posttrain-countdown": 0.1}
"""Reward at the end of the toy run; 1 where it is not named."""


@pytest.fixture(scope="session")
def authors(tmp_path_factory: pytest.TempPathFactory) -> tuple[Environment, dict[str, Path]]:
    """The environment, and where each package lies."""
    folder = tmp_path_factory.mktemp("authors")
    environment = core_alone(folder / "environment")
    folders = {name: folder / name for name in EXAMPLES}
    for name, source in EXAMPLES.items():
        shutil.copytree(source, folders[name], ignore=shutil.ignore_patterns("__pycache__", "runs"))
    for case, (kind, name) in NEW.items():
        environment.output("posttrain", "new", kind, name, cwd=folder)
        folders[case] = folder / Names(name).distribution
    environment.install(list(folders.values()), folder)
    return environment, folders


def test_the_environment_holds_no_framework(authors: tuple[Environment, dict[str, Path]]) -> None:
    environment, folders = authors
    code = ("import importlib.util as u; print(*[m for m in ('torch', 'jax', 'transformers', 'posttrain_estimators', "
            "'posttrain_objectives', 'posttrain_backends') if u.find_spec(m)])")
    assert environment.output("python", "-c", code, cwd=folders["new-estimator"]).split() == []


def test_all_are_listed(authors: tuple[Environment, dict[str, Path]]) -> None:
    environment, folders = authors
    found = json.loads(environment.output("posttrain", "plugins", "--json", cwd=folders["new-estimator"]))
    assert found["broken"] == found["foreign"] == []
    offered: dict[str, set[str]] = {}
    for component in found["components"]:
        offered.setdefault(component["distribution"], set()).add(component["kind"])
        assert component["summary"] and not component["clash"]
    assert {name: offered[path.name] for name, path in folders.items()} == KINDS


@pytest.mark.parametrize("case", [*NEW, *EXAMPLES])
def test_it_is_installed_with_its_types(case: str, authors: tuple[Environment, dict[str, Path]]) -> None:
    environment, folders = authors
    module = folders[case].name.replace("-", "_")
    code = f"import importlib.resources as r; print(r.files('{module}').joinpath('py.typed').is_file())"
    assert environment.output("python", "-c", code, cwd=folders[case].parent).strip() == "True"


@pytest.mark.parametrize("case", [*NEW, *EXAMPLES])
def test_it_learns_in_the_toy_run(case: str, authors: tuple[Environment, dict[str, Path]]) -> None:
    environment, folders = authors
    environment.output("posttrain", "train", "train.yaml", "--quiet", cwd=folders[case])
    lines = (folders[case] / "runs" / "train" / "metrics.jsonl").read_text("utf-8").splitlines()
    first, last = (json.loads(line)["reward/mean"] for line in (lines[0], lines[-1]))
    reached = LEARNED.get(case, 1.0)
    assert first < 0.6 * reached and last > 0.9 * reached


@pytest.mark.parametrize("case", [*NEW, *EXAMPLES])
def test_its_own_tests_pass(case: str, authors: tuple[Environment, dict[str, Path]]) -> None:
    environment, folders = authors
    out = environment.output("python", "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", cwd=folders[case])
    skipped = [line for line in out.splitlines() if line.startswith("SKIPPED")]
    assert all("not measured" in line for line in skipped), out


def test_the_tracker_of_the_template_writes_in_the_toy_run(authors: tuple[Environment, dict[str, Path]]) -> None:
    environment, folders = authors
    folder = folders["new-tracker"]
    environment.output("posttrain", "train", "train.yaml", "steps=3", "run=short", "--quiet", cwd=folder)
    lines = (folder / "short" / "metrics.csv").read_text("utf-8").splitlines()
    assert lines[0] == "step,metric,value"
    assert [line.split(",")[0] for line in lines if ",reward/mean," in line] == ["1", "2", "3"]
