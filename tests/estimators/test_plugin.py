"""The declarations: what they name exists, presets fit, fields are documented, and listing imports nothing."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from dataclasses import MISSING, fields, replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from posttrain.data import Episodes
from posttrain.hookspecs import Component
from posttrain_estimators.plugin import components

DECLARED = {component.name: component for component in components()}
every = pytest.mark.parametrize("name", DECLARED)


def class_of(component: Component) -> type:
    module, _, name = component.target.partition(":")
    found: type = getattr(import_module(module), name)
    return found


def test_names() -> None:
    names = {kind: {c.name for c in DECLARED.values() if c.kind == kind} for kind in ("estimator", "correction")}
    assert names["estimator"] == {
        "reinforce", "reinforce_pp", "reinforce_pp_baseline", "grpo", "dr_grpo", "rloo", "opo", "remax", "process",
        "gae", "td_lambda", "td0", "monte_carlo", "n_step", "upgo", "vtrace", "retrace", "tree_backup", "clipped_is"}
    assert names["correction"] == {"tis", "icepop", "geometric_mask"}
    assert len(DECLARED) == sum(map(len, names.values()))


@every
def test_is_in_the_docs(name: str) -> None:
    page = Path(__file__).parents[2] / "docs" / "estimators.md"
    assert f"`{name}`" in page.read_text("utf-8")


@every
def test_can_be_made_and_called(name: str) -> None:
    component = DECLARED[name]
    made = class_of(component)(**component.defaults)
    rows = [[0.1, 0.2], [0.3]]
    batch = replace(
        Episodes.from_rows([[0.0, 1.0], [0.5]], values=rows, bootstrap_values=[0.0, 0.4], action_values=rows,
                           expected_action_values=rows, logprobs=[[-1.0, -2.0], [-0.5]],
                           behavior_logprobs=[[-1.1, -1.9], [-0.5]]), greedy_rewards=np.array([0.5, 0.5]))
    result = made(batch)
    assert (result.advantages if component.kind == "estimator" else result.weight).shape == (3,)
    assert component.summary and component.source


def test_presets_are_what_their_papers_say() -> None:
    batch = Episodes.from_rows([[1.0], [2.0], [6.0]])
    made = {name: class_of(DECLARED[name])(**DECLARED[name].defaults)(batch).advantages.tolist()
            for name in ("dr_grpo", "rloo", "opo", "reinforce", "reinforce_pp", "grpo")}
    assert made["opo"] == made["dr_grpo"]  # equal lengths
    assert made["reinforce_pp"] == pytest.approx([x / 7.0 ** 0.5 for x in (-2.0, -1.0, 3.0)], rel=1e-8)
    assert made["dr_grpo"] == [-2.0, -1.0, 3.0]
    assert made["rloo"] == [-3.0, -1.5, 4.5]
    assert made["reinforce"] == [1.0, 2.0, 6.0]
    assert made["grpo"] == pytest.approx([x / (7.0 ** 0.5 + 1e-6) for x in (-2.0, -1.0, 3.0)], rel=1e-12)


@every
def test_every_field_has_a_default_and_a_meaning(name: str) -> None:
    component = class_of(DECLARED[name])
    body = ast.parse(inspect.getsource(component)).body[0].body  # type: ignore[attr-defined]  # it is a class
    documented = {field.target.id for field, text in pairwise(body) if isinstance(field, ast.AnnAssign)
                  and isinstance(text, ast.Expr) and isinstance(text.value.value, str)}
    assert documented == {field.name for field in fields(component)}
    assert all(field.default is not MISSING for field in fields(component))


def test_listing_imports_no_estimator_and_no_framework() -> None:
    code = ("import sys; from posttrain_estimators.plugin import components; components(); "
            "print(*(m for m in ('torch', 'jax', 'scipy', 'posttrain_estimators.baselines', "
            "'posttrain_estimators.multistep') if m in sys.modules))")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_making_one_imports_no_framework() -> None:
    code = ("import sys; from posttrain_estimators.multistep import GAE; from posttrain.data import Episodes; "
            "GAE()(Episodes.from_rows([[1.0]], values=[[0.0]])); print(*({'torch', 'jax'} & set(sys.modules)))")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
