"""The component `flax`: what it refuses, and that Hugging Face's models are its own, both ways."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax")
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers")

import jax
import torch
from posttrain.config import load
from posttrain.data import to_numpy
from posttrain.errors import ConfigError
from posttrain.protocols import LoadRequest, Optimization
from posttrain.registry import discover
from posttrain.testing.tiny_models import disturbed, weights_of
from posttrain_backends.flax import Flax

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the libraries' own
V = 61
SIZES = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}
KINDS = {
    "llama": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    "qwen2": {"tie_word_embeddings": True}, "qwen3": {"head_dim": 8},
    "smollm3": {"num_hidden_layers": 4, "tie_word_embeddings": False, "pad_token_id": None}}


def model_in(folder: Path, kind: str):
    """A model of transformers whose weights are not small, saved."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind]})
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model


def logits(learner, tokens: np.ndarray) -> np.ndarray:
    model = learner.structure.bound(dict(learner.params()))
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return np.asarray(model.hidden(jax.numpy.asarray(tokens), positions) @ model.output_weight.T)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_and_back(kind, tmp_path):
    theirs = model_in(tmp_path / "hf", kind)
    tokens = np.random.default_rng(0).integers(0, V, (2, 24))
    def asked(model):
        with torch.no_grad():
            return model(torch.from_numpy(tokens)).logits.numpy()
    ours = Flax(weights=str(tmp_path / "hf"), device="cpu").load(LoadRequest(V))
    np.testing.assert_allclose(logits(ours, tokens), asked(theirs), rtol=1e-5, atol=2e-5)
    ours.load_params(disturbed(weights_of(ours), 2, 0.1).items(), 1)
    ours.save(tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", attn_implementation="eager", dtype=torch.float32).eval()
    assert back.config.model_type == kind
    np.testing.assert_allclose(logits(ours, tokens), asked(back), rtol=1e-5, atol=2e-5)
    names = {name for name, _ in back.named_parameters()}
    assert names == weights_of(ours).keys()


def test_weights_in_half_precision_are_read(tmp_path):
    model_in(tmp_path, "qwen3").to(torch.bfloat16).save_pretrained(tmp_path)
    ours = Flax(weights=str(tmp_path), device="cpu").load(LoadRequest(V))
    assert all(x.dtype == np.float32 for x in weights_of(ours).values())


# ---- what it refuses

@pytest.mark.parametrize("fields, message", [
    ({"adapter": {"use": "lora"}}, "no low-rank adapters yet(?s:.*)policy.use=hf"),
    ({"quantize": "nf4"}, "no quantised weights yet(?s:.*)policy.use=torch"),
    ({"family": "qwen2_moe"}, "qwen2_moe has experts(?s:.*)policy.use=moe"),
    ({"hidden_size": 10, "heads": 4}, "hidden_size 10 is not a multiple of heads 4"),
    ({"file": "m.py:build", "precision": "bf16"}, "are for the native transformer")])
def test_what_is_not_there_yet_is_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        load({"policy": {"use": "flax", **fields}}, [], discover())


@pytest.mark.parametrize("config, message", [
    ({"model_type": "mixtral", **SIZES, "num_local_experts": 4}, r"is a mixtral, whose experts(?s:.*)use: torch"),
    ({"model_type": "mamba2"}, "the flax backend does not compute(?s:.*)use: ssm"),
    ({"model_type": "gpt2"}, "the flax backend does not compute(?s:.*)use: hf")])
def test_a_folder_of_another_model_names_the_backend_for_it(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        Flax(weights=str(tmp_path)).load(LoadRequest(0))


def test_moments_in_8_bits_are_refused():
    with pytest.raises(ConfigError, match="moments: int8"):
        Flax(hidden_size=8, heads=2, layers=1, device="cpu").load(
            LoadRequest(V, optimization=Optimization(moments="int8")))


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="policy.device is tpu, and JAX finds none(?s:.*)policy.device=auto"):
        Flax(hidden_size=8, heads=2, layers=1, device="tpu").load(LoadRequest(V))


def test_threads_and_precision_leave_the_process_alone():
    """64 bits are on while a float64 model computes, and off for everybody else."""
    learner = Flax(hidden_size=8, heads=2, layers=1, device="cpu", precision="float64").load(LoadRequest(V))
    assert {x.dtype for x in weights_of(learner).values()} == {np.dtype(np.float64)}
    assert jax.numpy.zeros(1).dtype == np.float32 and to_numpy(jax.numpy.ones(1, float)).dtype == np.float32


def test_torch_is_not_needed():
    """A model in JAX is loaded, scored, trained and saved where neither torch nor transformers is imported."""
    code = """
import sys, tempfile
from pathlib import Path
from posttrain.protocols import LoadRequest, Optimization, Output
from posttrain.testing.tiny_models import Probe, accumulate, random_rollouts, step_data
from posttrain_backends.flax import Flax
learner = Flax(hidden_size=8, layers=1, heads=2, device="cpu").load(LoadRequest(8, optimization=Optimization()))
accumulate(learner, step_data(random_rollouts(8)), Probe())
learner.apply()
learner.score(random_rollouts(8), frozenset({Output.LOGPROBS}), 1.0)
with tempfile.TemporaryDirectory() as folder:
    learner.save(Path(folder))
    Flax(weights=folder, device="cpu").load(LoadRequest(8))
print(sorted({"torch", "transformers"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
