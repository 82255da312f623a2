"""The contract over the rollout engine `onnx`, by torch policies and one of transformers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from posttrain.testing import EngineContract
from posttrain_backends.hf import HF
from posttrain_backends.onnx_engine import OnnxEngine
from posttrain_backends.torch_native import Torch

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Work beside a folder that holds a Llama of transformers."""
    with contextlib.chdir(tmp_path_factory.mktemp("models")), torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32)).save_pretrained("tiny")
        yield


class TestOnnxEngine(EngineContract):
    components = (OnnxEngine(), OnnxEngine(slots=3, prefill_tokens=5), OnnxEngine(weights="inputs", cache_tokens=40))
    backend = Torch(hidden_size=16, layers=2, heads=2, kv_heads=1, max_positions=32, device="cpu")
    max_positions = 32


class TestOnnxEngineOnQwen3(EngineContract):
    components = (OnnxEngine(),)
    backend = Torch(hidden_size=32, layers=2, heads=2, kv_heads=1, max_positions=32, device="cpu", family="qwen3",
                    tied_embeddings=True)
    max_positions = 32


class TestOnnxEngineOnHF(EngineContract):
    components = (OnnxEngine(slots=5),)
    backend = HF(weights="tiny", device="cpu")
    max_positions = 32
