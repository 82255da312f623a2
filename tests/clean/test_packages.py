"""The tests of a package where core and that package are installed, from wheels, and nothing else but pytest.

What a package's tests skip there must name a framework or an extra that is absent, and absent it must be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from environments import ROOT, Environment

from .conftest import RUN_TESTS, Fresh

pytestmark = [pytest.mark.clean, pytest.mark.timeout(1200)]

TESTS: dict[str, tuple[str, ...]] = {
    "estimators": ("tests/estimators", "tests/contracts/test_estimators.py", "tests/contracts/test_meta_estimators.py",
                   "tests/contracts/test_estimators_values.py", "tests/contracts/test_estimators_critic_free.py",
                   "tests/contracts/test_estimators_offpolicy.py", "tests/contracts/test_corrections.py",
                   "tests/oracles/test_oracles.py"),
    "objectives": ("tests/objectives", "tests/contracts/test_objectives.py", "tests/contracts/test_meta_objectives.py",
                   "tests/contracts/test_kl.py", "tests/contracts/test_mixing_objectives.py",
                   "tests/oracles/test_losses.py", "tests/oracles/test_mixing.py", "tests/oracles/test_pareto.py"),
    "backends": ("tests/backends", "tests/contracts/test_models.py", "tests/contracts/test_jax_engine.py",
                 "tests/contracts/test_jax_models.py", "tests/contracts/test_onnx_engine.py",
                 "tests/contracts/test_onnx_models.py"),
    "tuning": ("tests/tuning",),
    "core": ("tests/core", "tests/contracts"),
}
"""Package -> its tests; of core those that belong to no other."""
OF_THE_REPOSITORY = ("tests/core/test_component_pages.py", "tests/core/test_docs.py", "tests/core/test_guide.py",
                     "tests/core/test_packaging.py")
"""Tests of its pages and of all its distributions together."""
LIBRARIES = ("jax", "ml_dtypes", "rlax", "torch", "transformers")
"""What the arrays, the oracles and the models of tests are of."""
EXTRAS = ("datasets", "jinja2", "math_verify", "matplotlib", "mlflow", "peft", "pyarrow", "reasoning_gym",
          "tensorboard", "tokenizers", "wandb")
PACKAGES = ("posttrain_backends", "posttrain_estimators", "posttrain_objectives", "posttrain_tuning")
CIRCUMSTANCES = ("there is no CUDA device", "this user may write everywhere")
"""Other reasons for a skip: of the machine, and of who runs the tests."""
NOT_OF_EXTRAS = "not tokenizers and not mlflow and not tensorboard and not wandb"
"""Modules of core whose examples need an extra."""
MAY_BE_ABSENT: dict[str, tuple[str, ...]] = {
    "estimators": LIBRARIES[:4], "objectives": (*LIBRARIES[:4], "moocore"),
    "backends": ("flax", "jax", "ml_dtypes", "onnx", "onnxruntime", "optax", "transformers", "peft", "triton",
                 "posttrain_objectives", "bitsandbytes", "torchao", "xformers", "fla", "mamba_ssm"),
    "tuning": ("torch", "scipy", "cmaes", "optuna", "ray"),
    "core": (*LIBRARIES, *EXTRAS, *PACKAGES)}


def selection(package: str) -> list[str]:
    """Arguments of pytest: folders and files, and what another package's are."""
    others = [path for name, paths in TESTS.items() if name != package for path in paths]
    return [*TESTS[package], *(f"--ignore={path}" for path in (*others, *OF_THE_REPOSITORY)
                               if any(path.startswith(f"{folder}/") for folder in TESTS[package]))]


def report(environment: Environment, arguments: Sequence[str]) -> str:
    """What pytest says of the tests of this clone, which it must run against what is installed there."""
    modules = "posttrain", *(name for name in PACKAGES if name not in environment.missing(*PACKAGES))
    for module in modules:
        place = environment.output("python", "-c", f"import {module}; print({module}.__file__)", cwd=ROOT)
        assert Path(place).is_relative_to(environment.root)
    return environment.output("python", "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--color=no",
                              "-m", "not slow and not clean", *arguments, cwd=ROOT)


def unexplained(said: str, absent: Sequence[str]) -> list[str]:
    """Skips whose reason names nothing that is absent, and may be."""
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+?: (.*)$", said, re.MULTILINE)
    return [reason for reason in reasons if reason not in CIRCUMSTANCES
            and not any(re.search(rf"\b{name}\b", reason, re.IGNORECASE) for name in absent)]


@pytest.mark.parametrize(("package", "installed"), [
    ("core", ("core",)), ("estimators", ("core", "estimators")), ("objectives", ("core", "objectives")),
    ("backends", ("core", "backends[torch]")), ("tuning", ("core", "tuning"))])
def test_a_package_needs_core_alone(package: str, installed: tuple[str, ...], fresh: Fresh) -> None:
    environment = fresh(*installed, others=RUN_TESTS)
    there = {"core": ()}.get(package, (f"posttrain_{package}",))
    assert set(PACKAGES) - set(environment.missing(*PACKAGES)) == set(there)
    if package != "backends":
        assert environment.missing(*LIBRARIES) == list(LIBRARIES)
    said = report(environment, selection(package))
    assert not unexplained(said, environment.missing(*MAY_BE_ABSENT[package])), said
    modules = there or ("posttrain",)
    report(environment, ["--doctest-ignore-import-errors", "-k", NOT_OF_EXTRAS, "--pyargs", *modules])


def test_what_a_skip_says_is_looked_at() -> None:
    """The check above, where torch alone is missing."""
    said = "SKIPPED [2] tests/a.py:1: could not import 'torch': No module named 'torch'\n" \
           "SKIPPED [1] b.py:2: not measured: neither torch nor JAX is installed\n" \
           "SKIPPED [1] tests/a.py:3: numpy is not installed\nSKIPPED [1] tests/a.py:4: there is no CUDA device\n" \
           "SKIPPED [1] tests/a.py:5: too slow\n"
    assert unexplained(said, ["torch"]) == ["numpy is not installed", "too slow"]


def test_tuning_needs_core_alone(fresh: Fresh) -> None:
    """Its searchers have an extra of their own, and nothing is wrong without it."""
    environment = fresh("core", "tuning")
    assert environment.missing(*PACKAGES, *LIBRARIES) == [*PACKAGES[:3], *LIBRARIES]
    listed = json.loads(environment.output("posttrain", "plugins", "--json", cwd=environment.root))
    assert not listed["broken"] and "posttrain-tuning" in {p["distribution"] for p in listed["plugins"]}


def test_four_packages_and_one_extra_train_a_model_of_transformers(fresh: Fresh, tmp_path: Path) -> None:
    environment = fresh("core", "estimators", "objectives", "backends[hf]")
    absent = ("jax", "peft", "mlflow", "datasets", "reasoning_gym", "posttrain_tuning")
    assert environment.missing(*absent) == list(absent)
    out = environment.output("python", Path(__file__).with_name("hf_run.py"), tmp_path / "made", cwd=tmp_path)
    assert out.endswith("steps 2\n")
