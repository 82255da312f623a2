"""`posttrain export RUN --format onnx`: what other programs load is the policy of the run, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import posttrain
import pytest
from commandline import called
from integration import small
from posttrain.errors import ConfigError, InputError
from posttrain.export import export
from posttrain.protocols import Output
from posttrain.run import opened
from posttrain.testing.tiny_models import random_rollouts

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps with checkpoints at 2 and 4."""
    directory = tmp_path_factory.mktemp("runs") / "sums"
    posttrain.train(small.config(directory, steps=4), output="quiet")
    return directory


def logprobs(folder: Path, rows: list[np.ndarray]) -> np.ndarray:
    """Of all tokens behind the first of each row, one row after the other."""
    session = ort.InferenceSession(folder / "model.onnx")
    past = {x.name: np.zeros((1, x.shape[1], 0, x.shape[3]), np.float32) for x in session.get_inputs()
            if x.name.startswith("past_key_values")}
    found = []
    for row in rows:
        z = session.run(["logits"], {"input_ids": row[None], "attention_mask": np.ones_like(row)[None],
                                     "position_ids": np.arange(len(row))[None], **past})[0][0, :-1].astype(np.float64)
        found.append((z - np.logaddexp.reduce(z, axis=-1, keepdims=True))[np.arange(len(z)), row[1:]])
    return np.concatenate(found)


def of_the_run(run: Path, **how: Any) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows of tokens, and what the run's policy says of them."""
    _, parts = opened(run, (), **how)
    data = random_rollouts(14)
    data = replace(data, is_action=~np.isin(np.arange(len(data.tokens)), data.offsets[:-1]))
    said = parts.policy.score(data, frozenset({Output.LOGPROBS}), 1.0).logprobs
    rows = [data.tokens[a:b].astype(np.int64) for a, b in zip(data.offsets, data.offsets[1:])]
    return rows, np.asarray(said)


def test_the_folder_holds_the_policy_of_the_newest_checkpoint(run: Path, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    code, out, err = called(capsys, "export", str(run), "--format", "onnx", "--output", str(folder))
    assert (code, err) == (0, "")
    assert "differ from those of 'torch' by at most" in out and f"wrote {folder}" in out
    rows, expected = of_the_run(run)
    np.testing.assert_allclose(logprobs(folder, rows), expected, rtol=0, atol=1e-4)
    assert np.ptp(expected) > 0.1
    earlier = export(run, tmp_path / "earlier", step=2, form="onnx")
    assert np.abs(logprobs(earlier, rows) - expected).max() > 1e-3, "another checkpoint is another model"


def test_what_stands_beside_the_graph(run: Path) -> None:
    """Tokenizer, sampling and card as in a Hugging Face folder, no second copy of the weights, nothing left behind."""
    folder = export(run, form="onnx")
    assert folder == run / "exports" / "step-000004-onnx"
    there = {p.name for p in folder.iterdir()}
    assert there >= {"model.onnx", "model.onnx_data", "config.json", "generation_config.json", "tokenizer.json",
                     "README.md"} and not [name for name in there if name.endswith(".safetensors")]
    assert [p.name for p in (run / "exports").iterdir()] == [folder.name]
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 1
    card = (folder / "README.md").read_text()
    assert "- onnx" in card and "library_name" not in card and "onnxruntime.InferenceSession" in card
    assert "by at most" in card


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = export_base(tmp_path / "base", transformers)
    posttrain.train(small.config(
        tmp_path / "run", steps=4, evaluate={"every": 0},
        policy={"use": "hf", "weights": str(base), "device": "cpu", "adapter": {"use": "lora", "rank": 2}}),
        output="quiet")
    rows, expected = of_the_run(tmp_path / "run")
    np.testing.assert_allclose(logprobs(export(tmp_path / "run", form="onnx"), rows), expected, rtol=0, atol=1e-4)


def export_base(folder: Path, transformers: Any) -> Path:
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=14, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, eos_token_id=1, pad_token_id=0,
        bos_token_id=None)).save_pretrained(folder)
    return folder


# ---- what is refused


@pytest.mark.parametrize(("arguments", "said"), [
    (("nowhere",), "is not a run directory"),
    (("RUN", "--format", "onxx"), "backend 'torch' writes no format 'onxx'; did you mean 'onnx'?"),
    (("RUN", "--format", "onnx", "--step", "3"), "there is no checkpoint of step 3"),
    (("RUN", "--format", "onnx", "--output", "RUN"), "overwrites nothing")])
def test_bad_input_is_refused(arguments: tuple[str, ...], said: str, run: Path,
                              capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = called(capsys, "export", *(str(run) if a == "RUN" else a for a in arguments))
    assert code == 2 and said in err and not out
    if "onxx" in arguments:
        assert "What it writes: huggingface, onnx." in err


def test_a_backend_without_formats_is_refused_by_name(tmp_path: Path) -> None:
    posttrain.train(small.config(tmp_path / "run", steps=4, evaluate={"every": 0}, policy={
        "use": "ssm", "hidden_size": 16, "layers": 1, "head_dim": 8, "state_size": 4, "device": "cpu"}), output="quiet")
    with pytest.raises(InputError, match=r"'ssm' writes no format 'onnx'(.|\n)*What it writes: huggingface\."):
        export(tmp_path / "run", form="onnx")


def test_a_mixture_of_experts_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    posttrain.train(small.config(tmp_path / "run", steps=4, evaluate={"every": 0}, policy={
        "use": "moe", "hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "experts": 2, "max_positions": 32,
        "device": "cpu"}), output="quiet")
    with pytest.raises(ConfigError, match="a qwen3_moe has experts"):
        export(tmp_path / "run", form="onnx")
    assert not list((tmp_path / "run" / "exports").iterdir())


def test_a_run_that_trained_scores_is_refused(tmp_path: Path) -> None:
    pairs = [{"prompt": f"{a}=", "chosen": str(a), "rejected": str((a + 1) % 10)} for a in range(10)]
    posttrain.train({
        "recipe": "reward_model", "steps": 2, "threads": 1, "run": str(tmp_path / "run"), "seed": 7, "batch_size": 4,
        "policy": small.config(tmp_path)["policy"], "tokenizer": {"use": "characters", "alphabet": "0123456789+="},
        "task": {"use": "rows", "rows": pairs, "held_out_rows": pairs[:2]},
        "trackers": {"console": None, "jsonl": None}}, output="quiet")
    with pytest.raises(InputError, match="the run trained a model that scores answers"):
        export(tmp_path / "run", form="onnx")
