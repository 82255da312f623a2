"""The native decoder as each of its families: exchanged with transformers, drawn from, made anew, or refused."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers")

from exchange import (
    LENGTHS,
    SIZES,
    TOKENIZER,
    V,
    library,
    native,
    our_logits,
    ragged,
    randomise,
    require_equal_logits_and_gradients,
    their_logits,
    written,
)  # after the check that the library is there
from posttrain.data import Prompt, Sampling
from posttrain.errors import ConfigError
from posttrain.protocols import LoadRequest, Output
from posttrain_backends._torch.layout import Layout
from posttrain_backends.engines import Batched
from posttrain_backends.families.config import read_shape
from posttrain_backends.families.rope import Linear, Llama3
from posttrain_backends.torch_native import Torch
from safetensors.torch import load_file, save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the libraries' own

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
KINDS = {
    "llama": ("llama", {"head_dim": 16, "num_key_value_heads": 4}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 3.0}}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "smollm2": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5,
                          "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "qwen3, biases": ("qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "smollm3, biases": ("smollm3", {"no_rope_layers": [0, 1], "attention_bias": True, "mlp_bias": True,
                                    "tie_word_embeddings": False}),
}
LOGPROBS = frozenset({Output.LOGPROBS})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """name -> a folder that transformers wrote, made once."""
    return cache(lambda name: written(tmp_path_factory.mktemp("model"), *KINDS[name]))


@pytest.mark.oracle
@pytest.mark.parametrize("name", KINDS)
def test_logits_and_gradients_equal_those_of_transformers(name, folder):
    require_equal_logits_and_gradients(native(folder(name)).model.requires_grad_(), library(folder(name)))


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_folder_is_the_same_family_with_equal_logits(name, folder, tmp_path):
    model = native(folder(name)).model
    model.save(tmp_path)
    first, second = (transformers.AutoConfig.from_pretrained(path).to_dict() for path in (folder(name), tmp_path))
    others = {"_name_or_path", "no_rope_layer_interval", "bos_token_id", "eos_token_id", "pad_token_id"}
    assert {key: second[key] for key in first.keys() - others} == {key: first[key] for key in first.keys() - others}
    assert read_shape(tmp_path) == read_shape(folder(name))
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folder(name) / "model.safetensors").keys()
    with torch.no_grad():
        torch.testing.assert_close(their_logits(library(tmp_path)), our_logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_recorded_log_probs_of_drawn_tokens_equal_scored_ones(name, folder):
    """With shared prompts, uneven rows, and again after the weights were changed in place."""
    learner = native(folder(name))
    sampler = Batched(slots=4).start(learner, TOKENIZER, shared=True)
    prompts = [Prompt(text=t, group=i) for i, t in enumerate(["abc", "0+1", "hgfedcba"]) for _ in range(3)]
    for i in range(2):
        drawn = sampler.rollout(prompts, Sampling(max_new_tokens=9), (0, i))
        scored = learner.score(drawn, LOGPROBS, 1.0).logprobs
        np.testing.assert_allclose(drawn.behavior_logprobs, scored, rtol=0, atol=1e-5)
        with torch.no_grad():
            for p in learner.model.parameters():
                p.mul_(0.9).add_(0.02)


@pytest.mark.parametrize("name", ["llama, biases", "qwen2", "qwen3, biases", "smollm3"])
def test_bf16_computes_near_float32_by_both_ways(name, folder):
    exact, half = native(folder(name)).model, native(folder(name), precision="bf16").model
    tokens, layout = ragged()
    positions = torch.tensor(LENGTHS) - 1
    last = torch.from_numpy(layout.offsets[1:]) - 1
    with torch.no_grad():
        expected = exact.hidden(tokens, layout)
        hidden, keys, values = half.prefill(tokens, layout)
        cache = half.new_cache(len(LENGTHS), 64)
        cache.write(layout.rows, layout.positions, keys, values)
        decoded = half.decode(tokens[last], positions, cache)
    assert cache.keys[0].dtype == torch.bfloat16
    for found, wanted in ((hidden, expected), (decoded, expected[last])):
        assert 0 < (found - wanted).abs().mean() < 0.05 * wanted.abs().mean()


@pytest.mark.oracle
def test_stretched_frequencies_equal_those_of_transformers():
    """At the sizes of Llama 3.1 8B, where some frequencies are kept, some divided and some between."""
    stretched = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                 "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(head_dim=128, max_position_embeddings=131072, rope_parameters=stretched)
    frequency = 5e5 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    found = Llama3(8.0, 1.0, 4.0, 8192)(frequency)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    torch.testing.assert_close(found, expected.double(), rtol=2e-6, atol=0)
    divided = (found / frequency).numpy()
    assert (divided == 1).any() and np.isclose(divided, 1 / 8).any() and ((divided > 0.2) & (divided < 0.9)).any()


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["llama 3.1", "qwen3"])
def test_logits_stay_equal_far_into_a_context(name, folder, tmp_path):
    """Angles at position 2000 have errors of 1e-4 in float32; here they are the same ones."""
    model = library(edited(folder(name), tmp_path, max_position_embeddings=2048))
    ours, tokens = native(tmp_path).model, ragged()[0].repeat(36)[:2048]
    with torch.no_grad():
        found = ours.hidden(tokens, Layout.from_offsets([0, 2048])) @ ours.output_weight.t()
        torch.testing.assert_close(found, model(input_ids=tokens[None]).logits[0], rtol=0, atol=2e-5)


# ---- what folders hold


def test_a_sharded_folder_loads_and_names_what_it_lacks(folder, tmp_path):
    model = library(folder("qwen3"))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    save_file({"unrelated": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(our_logits(native(tmp_path).model), their_logits(model), rtol=0, atol=1e-5)
    shards[1].unlink()
    with pytest.raises(ConfigError, match=rf"has no {shards[1].name}, which its model.safetensors.index.json names"):
        native(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ConfigError, match=r"holds neither model.safetensors nor model.*\n.*Qwen3 or SmolLM"):
        native(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_read_exactly(dtype, folder, tmp_path):
    model = library(folder("qwen2, tied")).to(dtype)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == dtype
    ours = native(tmp_path).model
    theirs = dict(model.named_parameters())
    assert all(p.dtype == torch.float32 and torch.equal(p, theirs[name].float()) for name, p in ours.named_parameters())


def edited(source: Path, target: Path, remove: tuple[str, ...] = (), **changes) -> Path:
    """A copy of a folder whose configuration says something else."""
    config = json.loads((source / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in remove}
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(json.dumps({**kept, **changes}))
    (target / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    return target


@pytest.mark.parametrize("name, older, scaling", [
    ("smollm2", {"rope_theta": 1e5, "rope_scaling": None}, None),
    ("llama, linear", {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 3.0}}, Linear(3.0)),
    ("llama 3.1", {"rope_theta": 500.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
     Llama3(8.0, 1.0, 4.0, 32))])
def test_older_and_newer_keys_give_the_same_shape(name, older, scaling, folder, tmp_path):
    old = edited(folder(name), tmp_path, remove=("rope_parameters",), **older)
    assert read_shape(old) == read_shape(folder(name)) and read_shape(old).rope_scaling == scaling
    theirs = [transformers.AutoConfig.from_pretrained(path).rope_parameters for path in (old, folder(name))]
    assert theirs[0].items() >= theirs[1].items()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "smollm3"])
def test_silence_means_what_it_means_to_transformers(kind, tmp_path):
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                         "num_attention_heads", "max_position_embeddings")}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **sizes}))
    shape, theirs = read_shape(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
    for name in ("num_key_value_heads", "tie_word_embeddings", "rms_norm_eps"):
        assert getattr(shape, name) == getattr(theirs, name), name
    assert shape.rope_theta == theirs.rope_parameters["rope_theta"]
    assert shape.head_dim == (getattr(theirs, "head_dim", None) or 8)
    assert list(shape.no_rope_layers) == getattr(theirs, "no_rope_layers", [])


def test_a_tied_folder_may_repeat_its_embedding_but_not_contradict_it(folder, tmp_path):
    source = folder("smollm2")
    edited(source, tmp_path)
    weights = load_file(source / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    more = {"lm_head.weight": embedding.clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**weights, **more}, tmp_path / "model.safetensors")
    assert torch.equal(our_logits(native(tmp_path).model), our_logits(native(source).model))
    save_file({**weights, "lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lm_head.weight and model.embed_tokens.weight differ\n.*to false"):
        native(tmp_path)


def test_an_embedding_may_be_padded_but_not_be_of_another_tokenizer(tmp_path):
    for size in (64, 65):
        Torch(device="cpu", hidden_size=16, layers=1).load(LoadRequest(size)).save(tmp_path / str(size))
    assert len(native(tmp_path / "64", vocab_size=61).model.output_weight) == 64
    for size, vocab_size in ((65, 61), (64, 65)):
        with pytest.raises(ConfigError, match=f"has a vocabulary of {size}, the tokenizer needs {vocab_size}"):
            native(tmp_path / str(size), vocab_size=vocab_size)


@pytest.mark.parametrize("name, changes, said", [
    ("llama", {"model_type": "olmoe"}, r"model_type is 'olmoe'; native are llama, qwen2, qwen3, smollm3, mixtral, "),
    ("qwen3", {"model_type": "qwen3_next"}, r"model_type is 'qwen3_next'; native are llama"),
    ("qwen2", {"hidden_act": "gelu"}, r"hidden_act is 'gelu'; native is 'silu'"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
     r"rope_type is 'yarn'; native are default, linear, llama3"),
    ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, r"rope_type is 'dynamic'; native are"),
    ("qwen3", {"rope_parameters": {"rope_type": "longrope"}}, r"rope_type is 'longrope'; native are"),
    ("llama 3.1", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
     r"rope_type is 'llama3', but it does not say high_freq_factor, low_freq_factor"),
    ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0.5; native is 1.0"),
    ("llama", {"quantization_config": {"bits": 4}}, r"quantised \(quantization_config\)"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16},
     r"sliding_window is 16, below max_position_embeddings 64, and some layers use it; native is full attention"),
    ("qwen3", {"layer_types": None, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
     r"sliding_window is 16"),
    ("smollm3", {"layer_types": None, "use_sliding_window": True, "sliding_window": 16}, r"sliding_window is 16"),
    ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers says something of 2 layers, num_hidden_layers is 4"),
    ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, r"layer_types has linear_attention"),
    ("llama", {"intermediate_size": None}, r"it does not say intermediate_size"),
])
def test_another_model_is_refused_with_what_is_native_and_where_it_goes(name, changes, said, folder, tmp_path):
    with pytest.raises(ConfigError, match=rf"{said}(.|\n)*Take {{use: hf, weights: {tmp_path}}} for it"):
        native(edited(folder(name), tmp_path, **changes))


@pytest.mark.parametrize("name, changes", [
    ("qwen2", {"layer_types": None, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}),
    ("qwen3", {"layer_types": None, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    ("qwen2", {"layer_types": None, "use_sliding_window": False, "sliding_window": 16}),
    ("llama", {"use_sliding_window": True, "sliding_window": 16})])
def test_a_window_that_no_layer_feels_is_none(name, changes, folder, tmp_path):
    path = edited(folder(name), tmp_path, **changes)
    with torch.no_grad():
        torch.testing.assert_close(our_logits(native(path).model), their_logits(library(path)), rtol=0, atol=1e-5)


# ---- new models


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "smollm3"])
def test_a_new_model_of_a_family_loads_in_transformers(family, tmp_path):
    component = Torch(family=family, hidden_size=32, layers=4, heads=4, kv_heads=2, max_positions=64, device="cpu")
    model = component.load(LoadRequest(V, seed=1)).model
    names = {name: p for name, p in model.named_parameters() if p.ndim == 1}
    assert all(torch.equal(p, torch.full_like(p, float("norm" in name))) for name, p in names.items())
    assert any("q_norm" in name for name in names) == (family == "qwen3")
    assert any("q_proj.bias" in name for name in names) == (family == "qwen2")
    randomise(model)
    model.save(tmp_path)
    theirs = library(tmp_path)
    assert theirs.config.model_type == family
    assert family != "smollm3" or theirs.config.no_rope_layers == [1, 1, 1, 0]
    with torch.no_grad():
        torch.testing.assert_close(their_logits(theirs), our_logits(model), rtol=0, atol=1e-5)
