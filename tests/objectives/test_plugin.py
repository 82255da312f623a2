"""What the package declares: names, targets that exist, defaults that build, sources, and no framework imported."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import fields

import pytest
from posttrain.hookspecs import Component
from posttrain.registry import discover
from posttrain_objectives.plugin import components

COMPONENTS = tuple(components())
REQUIRED = {"dr_grpo": {"length": 16}}
"""Fields that have no default."""
every_component = pytest.mark.parametrize("component", COMPONENTS, ids=lambda c: f"{c.kind}-{c.name}")


def class_of(component: Component) -> type:
    module, name = component.target.split(":")
    return getattr(importlib.import_module(module), name)


def test_names() -> None:
    names = {kind: [c.name for c in COMPONENTS if c.kind == kind] for kind in {c.kind for c in COMPONENTS}}
    assert names == {"objective": ["ppo", "ppo_dual_clip", "decoupled_ppo", "grpo", "dapo", "dr_grpo", "gspo", "cispo",
                                   "sapo", "reinforce", "sft", "dpo", "bradley_terry", "value", "action_value",
                                   "entropy"],
                     "kl": ["fixed", "linear", "cosine", "adaptive", "pi", "pid", "band", "dual", "entropy",
                            "constrained"],
                     "constraint": ["lagrangian", "log_lagrangian", "pid_lagrangian", "augmented_lagrangian", "crpo",
                                    "p3o"],
                     "combiner": ["sum", "normalised_sum", "mo_grpo", "gdpo", "tchebycheff", "smooth_tchebycheff",
                                  "achievement"],
                     "gradient_combiner": ["upgrad", "dual_proj", "mgda", "pcgrad", "cagrad", "imtl_g", "nash_mtl",
                                           "mean"]}


@every_component
def test_component_is_built_from_its_name_as_by_hand(component: Component) -> None:
    given = REQUIRED.get(component.name, {})
    by_hand = class_of(component)(**{**component.defaults, **given})
    assert discover().create(component.kind, component.name, **given) == by_hand
    if component.kind == "objective":  # a part of what a backend compiles for
        assert hash(by_hand) == hash(class_of(component)(**{**component.defaults, **given}))


@every_component
def test_component_is_documented(component: Component) -> None:
    cls = class_of(component)
    assert component.summary and cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(")
    lines = importlib.import_module(cls.__module__).__loader__.get_source(cls.__module__).splitlines()
    body = lines[next(i for i, line in enumerate(lines) if line.startswith(f"class {cls.__name__}")):]
    for field in fields(cls):
        at = next(i for i, line in enumerate(body) if line.startswith(f"    {field.name}: "))
        assert body[at + 1].startswith('    """'), f"{cls.__name__}.{field.name} has no docstring"


def test_components_and_their_classes_import_no_framework() -> None:
    targets = sorted({c.target.split(":")[0] for c in COMPONENTS})
    code = f"""import importlib, sys
for name in {["posttrain_objectives.plugin", *targets]!r}: importlib.import_module(name)
assert not {{"torch", "jax", "scipy", "transformers"}} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True)
