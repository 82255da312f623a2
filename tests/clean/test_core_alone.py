"""Core alone, with no library for deep learning and no test runner: it lists, shows, writes packages, and trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from environments import Environment

from .conftest import Fresh

pytestmark = [pytest.mark.clean, pytest.mark.timeout(600)]

ABSENT = ("torch", "jax", "flax", "tensorflow", "transformers", "onnxruntime", "triton", "sklearn", "pytest",
          "posttrain_estimators", "posttrain_objectives", "posttrain_backends", "posttrain_tuning")
CONFIGURATION = """\
plugins: [posttrain.toy]
steps: 30
seed: 0
run: run
policy: toy
tokenizer: {use: characters, alphabet: "0123abcd"}
task: {use: rows, path: data.jsonl}
rewards: {correct: exact_match}
estimator: toy
objective: toy
kl: none
rollout: {engine: toy, prompts_per_step: 4, group_size: 16, max_new_tokens: 1}
optimizer: {lr: 0.5}
checkpoint: {every: 0}
"""
TIMED = """\
import resource, sys
from posttrain.cli import main
assert main(["train", "train.yaml", "--quiet"]) == 0
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(sum(u.ru_utime + u.ru_stime for u in used))
"""


@pytest.fixture(scope="module")
def core(fresh: Fresh) -> Environment:
    return fresh("core")


def test_no_framework_is_there(core: Environment) -> None:
    assert core.missing(*ABSENT) == list(ABSENT)


def test_a_toy_policy_in_numpy_learns_in_two_seconds_of_cpu(core: Environment, tmp_path: Path) -> None:
    """CPU seconds of the whole process, from the interpreter's start to the saved run, its workers among them."""
    (tmp_path / "data.jsonl").write_text("".join(
        json.dumps({"prompt": str(i), "answer": "abcd"[i]}) + "\n" for i in range(4)))
    (tmp_path / "train.yaml").write_text(CONFIGURATION)
    core.output("posttrain", "--help", cwd=tmp_path)  # compiles what is imported: an installation does that once
    core.output("python", "-c", "import posttrain.trainer, posttrain.toy.policy, posttrain.toy.engine", cwd=tmp_path)
    seconds = float(core.output("python", "-c", TIMED, cwd=tmp_path).splitlines()[-1])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward/mean"] for line in lines if "reward/mean" in line]
    assert rewards[0] < 0.5 and rewards[-1] == 1.0
    assert seconds < 2.0


def test_what_an_author_begins_with(core: Environment, tmp_path: Path) -> None:
    listed = core.output("posttrain", "plugins", cwd=tmp_path)
    assert "posttrain-core" in listed and "toy" not in listed
    assert "gamma" not in core.output("posttrain", "show", "tracker", "jsonl", cwd=tmp_path)
    assert "Python" in core.output("posttrain", "doctor", cwd=tmp_path)
    core.output("posttrain", "new", "estimator", "discounted", cwd=tmp_path)
    assert (tmp_path / "posttrain-discounted" / "pyproject.toml").is_file()
    core.output("posttrain", "init", cwd=tmp_path)
    refused = core.run("posttrain", "check", "train.yaml", cwd=tmp_path)
    assert refused.returncode == 2 and "pip install" in refused.stderr
