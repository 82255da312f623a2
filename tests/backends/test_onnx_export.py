"""Model folders written as ONNX: equal to transformers, at once and token by token, under names that others know."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from exchange import SIZES, V, library, written  # after the check that the libraries are there
from posttrain.errors import ConfigError, PluginError
from posttrain.protocols import Backend, Exported, Exporting
from posttrain_backends import installed
from posttrain_backends._onnx import export as exporter
from posttrain_backends.flax import Flax
from posttrain_backends.hf import HF
from posttrain_backends.torch_native import Torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the libraries' own

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
KINDS = {
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama, biases, tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
}
ROWS = [[2, 9, 4, 7, 3, 8, 5, 6], [11, 3, 2], [5, 2, 12, 4, 9]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """name -> a folder that transformers wrote, made once."""
    return cache(lambda name: written(tmp_path_factory.mktemp("model"), *KINDS[name]))


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory: pytest.TempPathFactory):
    """name -> the same folder as ONNX, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("onnx")
            export(folder(name), made[name])
        return made[name]
    return make


def export(saved: Path, target: Path, backend: Backend | None = None) -> Exported:
    made: object = backend or Torch(weights=str(saved), device="cpu")
    assert isinstance(made, Exporting) and made.formats == ("onnx",)
    target.mkdir(exist_ok=True)
    return made.export("onnx", saved, target)


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path / "model.onnx", options)


def on_the_left(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] ids and mask."""
    T = max(map(len, rows))
    return (torch.tensor([[0] * (T - len(row)) + row for row in rows]),
            torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows]))


@pytest.mark.oracle
@pytest.mark.parametrize("name", KINDS)
def test_greedy_answers_through_the_cache_equal_those_of_transformers(name, folder, exported):
    """Of rows padded on the left: the logits of the prompts, and then every token and its logits."""
    model, graph = library(folder(name)), session(exported(name))
    ids, mask = on_the_left(ROWS)
    past = {x.name: np.zeros((len(ROWS), x.shape[1], 0, x.shape[3]), np.float32) for x in graph.get_inputs()
            if x.name.startswith("past_key_values")}
    fed, cache = ids, None
    for _ in range(6):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1]:]
        logits, *present = graph.run(None, {"input_ids": fed.numpy(), "attention_mask": mask.numpy(),
                                            "position_ids": positions.numpy(), **past})
        with torch.no_grad():
            theirs = model(input_ids=fed, attention_mask=mask, position_ids=positions, past_key_values=cache,
                           use_cache=True)
        real = mask[:, -fed.shape[1]:].bool().numpy()
        np.testing.assert_allclose(logits[real], theirs.logits.numpy()[real], rtol=0, atol=1e-4)
        assert np.ptp(logits[real]) > 1
        past, cache = dict(zip(past, present)), theirs.past_key_values
        fed = theirs.logits[:, -1:].argmax(-1)
        assert (logits[:, -1:].argmax(-1) == fed.numpy()).all()
        mask = torch.cat([mask, torch.ones_like(fed)], 1)


@pytest.mark.parametrize("name", ["qwen3", "llama, biases, tied"])
def test_its_names_are_those_of_the_exporters_of_hugging_face_and_all_parameters_stand_outside(name, folder, exported):
    graph = onnx.load(exported(name) / "model.onnx", load_external_data=False).graph
    caches = [f"{i}.{part}" for i in range(SIZES["num_hidden_layers"]) for part in ("key", "value")]
    assert [x.name for x in graph.input] == ["input_ids", "attention_mask", "position_ids",
                                             *(f"past_key_values.{c}" for c in caches)]
    assert [x.name for x in graph.output] == ["logits", *(f"present.{c}" for c in caches)]
    parameters = load_file(folder(name) / "model.safetensors")
    outside = {x.name: x for x in graph.initializer if x.data_location == onnx.TensorProto.EXTERNAL}
    assert outside.keys() == parameters.keys()
    assert not [x.name for x in graph.initializer if x.name.endswith((".weight", ".bias")) and x.name not in outside]
    whole = onnx.load(exported(name) / "model.onnx").graph
    read = {x.name: onnx.numpy_helper.to_array(x) for x in whole.initializer}
    for parameter, value in parameters.items():
        np.testing.assert_array_equal(read[parameter], value.numpy())
    assert sorted(p.name for p in exported(name).iterdir()) == ["config.json", "model.onnx", "model.onnx_data"]


def test_it_says_how_far_it_is_and_how_it_is_used(folder, tmp_path):
    said = export(folder("qwen2"), tmp_path / "out")
    assert "log-probs and entropies differ from those of 'torch' by at most" in said.compared
    code = said.usage.removeprefix("```python\n").removesuffix("```").replace("FOLDER", str(tmp_path / "out"))
    found: dict[str, object] = {}
    exec(code, found)
    with torch.no_grad():
        theirs = library(folder("qwen2"))(input_ids=torch.tensor([[1, 2, 3]])).logits.numpy()
    np.testing.assert_allclose(found["logits"], theirs, rtol=0, atol=1e-4)


def test_what_a_learner_in_jax_saved_is_compared_in_jax(folder, exported, tmp_path):
    pytest.importorskip("flax")
    said = export(folder("qwen3"), tmp_path / "out", Flax(weights=str(folder("qwen3")), device="cpu"))
    assert "differ from those of 'jax' by at most" in said.compared
    for file in ("model.onnx", "model.onnx_data"):
        assert (tmp_path / "out" / file).read_bytes() == (exported("qwen3") / file).read_bytes()


def test_files_of_bfloat16_are_written_in_float32(folder, tmp_path):
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "config.json").write_text((folder("qwen3") / "config.json").read_text())
    save_file({name: x.bfloat16() for name, x in load_file(folder("qwen3") / "model.safetensors").items()},
              saved / "model.safetensors", metadata={"format": "pt"})
    export(saved, tmp_path / "out")
    model = onnx.load(tmp_path / "out" / "model.onnx")
    assert {x.data_type for x in model.graph.initializer} <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


@pytest.mark.parametrize("bug", ["a weight of another model", "positions of another model", "not a number"])
def test_a_graph_that_says_something_else_is_refused(bug, folder, tmp_path, monkeypatch):
    right = exporter.read_weights

    def wrong(saved, shape):
        for name, x in right(saved, shape):
            spoilt = bug != "positions of another model" and name == "model.norm.weight"
            yield name, x * (np.nan if bug == "not a number" else 1.01) if spoilt else x
    monkeypatch.setattr(exporter, "read_weights", wrong)
    if bug == "positions of another model":
        graph = exporter.exported
        monkeypatch.setattr(exporter, "exported", lambda shape: graph(replace(shape, rope_theta=20.0)))
    with pytest.raises(ConfigError, match=r"model\.onnx is another model than the saved one(.|\n)*0\.0001 is allowed"):
        export(folder("qwen2"), tmp_path / "out")


# ---- what is refused


@pytest.mark.parametrize(("kind", "traits", "said"), [
    ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
     "a qwen3_moe has experts"),
    ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 2}, "model_type is 'gpt2'")])
def test_other_architectures_are_refused_by_name(kind, traits, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        export(written(tmp_path, kind, traits), tmp_path / "out", HF(weights=str(tmp_path), device="cpu"))


@pytest.mark.parametrize(("backend", "said"), [
    (Torch(file="model.py:build"), "policy.file is code of its own"),
    (Flax(file="model.py:build"), "policy.file is code of its own"),
    (HF(weights="x", quantize="nf4"), r"the saved weights are rounded \(nf4\)")])
def test_what_is_no_plain_model_is_refused_by_name(backend, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        export(tmp_path, tmp_path / "out", backend)


def test_without_onnx_the_error_says_what_to_install(folder, tmp_path, monkeypatch):
    found = installed.find_spec
    monkeypatch.setattr(installed, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    with pytest.raises(PluginError, match=r"--format onnx needs onnxruntime.*posttrain-backends\[onnx\]"):
        export(folder("qwen2"), tmp_path / "out")


def test_a_vocabulary_that_is_larger_than_the_tokenizers_is_written_whole(tmp_path):
    path = written(tmp_path / "padded", "llama", {"vocab_size": 64})
    export(path, tmp_path / "out")
    assert session(tmp_path / "out").get_outputs()[0].shape[-1] == 64 > V
