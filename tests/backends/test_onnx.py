"""The backend `onnx` against torch and transformers: every family, ragged batches, temperatures, moving weights."""

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
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from exchange import LENGTHS, SIZES, V, library, native, written  # after the check that the libraries are there
from posttrain.data import Prompt, Rollouts, offsets_of, to_numpy
from posttrain.errors import ConfigError, PluginError
from posttrain.protocols import Frozen, LoadRequest, Optimization, Output, Scorer
from posttrain.reference import blended, copied
from posttrain_backends._onnx import scorer as scorers
from posttrain_backends.installed import installed_runtimes, require_one_runtime, require_onnx
from posttrain_backends.onnx import Onnx
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the libraries' own

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
KINDS = {
    "llama, heads of 16": ("llama", {"head_dim": 16, "num_key_value_heads": 4}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 3.0}}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3, tied": ("qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "smollm3, heads of 16": ("smollm3", {"num_hidden_layers": 4, "head_dim": 16, "mlp_bias": True}),
}
BOTH = frozenset({Output.LOGPROBS, Output.ENTROPY})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """name -> a folder that transformers wrote, made once."""
    return cache(lambda name: written(tmp_path_factory.mktemp("model"), *KINDS[name]))


def scorer(path: Path, vocab_size: int = V, **fields) -> Scorer:
    return Onnx(weights=str(path), **fields).load(LoadRequest(vocab_size, threads=1))


def rollouts(lengths: list[int] = LENGTHS, seed: int = 3) -> Rollouts:
    """Sequences of uneven length, an episode each; some tokens are actions, and none of the first ones."""
    rng, E = np.random.default_rng(seed), len(lengths)
    is_action = np.concatenate([np.r_[False, rng.random(n - 1) < 0.6] for n in lengths])
    return Rollouts(
        tokens=rng.integers(1, V, sum(lengths)).astype(np.int32), offsets=offsets_of(np.array(lengths)),
        episode=np.arange(E), is_action=is_action, group=np.arange(E), finish=np.zeros(E, np.int8),
        terminated=np.ones(E, bool), prompts=(Prompt(text="x"),) * E, completions=("",) * E)


def require_equal(found: Scorer, expected: Scorer, batch: Rollouts, temperature: float = 1.0) -> None:
    ours, theirs = (model.score(batch, BOTH, temperature) for model in (found, expected))
    assert np.ptp(theirs.logprobs) > 0.5
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=5e-5)
    np.testing.assert_allclose(ours.entropy, theirs.entropy, rtol=0, atol=5e-5)


# ---- what it says


@pytest.mark.oracle
@pytest.mark.parametrize("name", KINDS)
def test_logprobs_equal_those_of_transformers(name, folder):
    batch, model = rollouts(), library(folder(name))
    with torch.no_grad():
        rows = torch.from_numpy(batch.tokens.astype(np.int64)).split(LENGTHS)
        logits = torch.cat([model(input_ids=row[None]).logits[0] for row in rows])
    log_p = torch.log_softmax(logits.double() / 0.7, -1).numpy()
    out = scorer(folder(name)).score(batch, BOTH, 0.7)
    before = log_p[batch.source - 1]
    np.testing.assert_allclose(out.logprobs, before[np.arange(len(before)), batch.tokens[batch.source]], atol=5e-5)
    np.testing.assert_allclose(out.entropy, -(np.exp(before) * before).sum(-1), atol=5e-5)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_outputs_equal_those_of_torch(name, temperature, folder):
    require_equal(scorer(folder(name)), native(folder(name)), rollouts(), temperature)


def test_the_company_of_a_sequence_and_the_size_of_a_call_change_nothing(folder, monkeypatch):
    path, batch = folder("qwen3"), rollouts([5, 40, 1, 11, 6, 7, 33, 2])
    whole = scorer(path).score(batch, BOTH, 1.0)
    monkeypatch.setattr(scorers, "_TOKENS", 40)  # one long sequence, or a few short ones
    cut = scorer(path, head_chunk=3).score(batch, BOTH, 1.0)
    alone = [scorer(path).score(batch.select(np.array([e])), BOTH, 1.0).logprobs for e in range(batch.n_episodes)]
    for found in (cut.logprobs, np.concatenate(alone)):
        np.testing.assert_allclose(found, whole.logprobs, rtol=0, atol=5e-6)
    np.testing.assert_allclose(cut.entropy, whole.entropy, rtol=0, atol=5e-6)


def test_what_is_not_asked_for_is_not_there(folder):
    batch, model = rollouts(), scorer(folder("qwen2"))
    assert model.score(batch, frozenset({Output.LOGPROBS}), 1.0).entropy is None
    nothing = model.score(batch, frozenset(), 1.0)
    assert nothing.entropy is None and np.isnan(nothing.logprobs).all()
    none = replace(batch, is_action=np.zeros(len(batch.tokens), bool))
    assert len(model.score(none, BOTH, 1.0).logprobs) == 0
    with pytest.raises(ConfigError, match="onnx backend gives no values"):
        model.score(batch, frozenset({Output.VALUES}), 1.0)


def test_a_sequence_beyond_the_models_positions_is_refused(folder):
    with pytest.raises(ConfigError, match="65 tokens does not fit the model's 64 positions"):
        batch = rollouts([66])
        is_action = np.arange(66) == 65
        scorer(folder("qwen2")).score(replace(batch, is_action=is_action), BOTH, 1.0)


# ---- weights


@pytest.mark.parametrize("name", ["llama, biases", "qwen3", "smollm3"])
def test_weights_are_refreshed_in_place_update_after_update(name, folder):
    torch_model, onnx_model, rng = native(folder(name)), scorer(folder(name)), np.random.default_rng(0)
    held = dict(onnx_model.params())
    for version in range(1, 4):
        moved = {n: np.asarray(to_numpy(x) + 0.05 * rng.normal(size=x.shape), np.float32)
                 for n, x in torch_model.params()}
        torch_model.load_params(moved.items(), version)
        onnx_model.load_params(moved.items(), version)
        assert onnx_model.version == version
        require_equal(onnx_model, torch_model, rollouts(seed=version))
    assert all(held[n] is x and np.array_equal(x, moved[n]) for n, x in onnx_model.params())


def test_parameters_have_the_names_and_values_of_the_files_and_are_live(folder):
    model, batch = scorer(folder("qwen3, tied")), rollouts()
    files = load_file(folder("qwen3, tied") / "model.safetensors")
    params = dict(model.params())
    assert params.keys() == files.keys()
    assert all(np.array_equal(x, files[n].numpy()) for n, x in params.items())
    before = model.score(batch, BOTH, 1.0)
    params["model.norm.weight"] *= 0
    uniform = model.score(batch, BOTH, 1.0)
    assert not np.allclose(before.logprobs, uniform.logprobs)
    np.testing.assert_allclose(uniform.logprobs, -np.log(V), rtol=1e-6)


def test_it_follows_a_policy_as_a_moving_reference(folder):
    policy, reference, twin = native(folder("qwen2")), scorer(folder("qwen2")), native(folder("qwen2"))
    rng = np.random.default_rng(1)
    moved = {n: to_numpy(x) + 0.1 * rng.normal(size=x.shape).astype(np.float32) for n, x in policy.params()}
    policy.load_params(moved.items(), 1)
    mean = blended(copied(reference), copied(policy), 0.5)
    for model in (reference, twin):
        model.load_params(mean.items(), 1)
    require_equal(reference, twin, rollouts())


def test_weights_that_do_not_fit_are_refused_and_change_nothing(folder):
    model = scorer(folder("qwen2"))
    before = {n: x.copy() for n, x in model.params()}
    changed = {n: x + 1 for n, x in before.items()}
    changed.pop("model.norm.weight")
    with pytest.raises(ConfigError, match=r"model\.norm\.weight is missing"):
        model.load_params(changed.items(), 1)
    assert all(np.array_equal(x, before[n]) for n, x in model.params())


def test_files_of_bfloat16_are_read_exactly(folder, tmp_path):
    path = folder("qwen2")
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    halves = {n: x.bfloat16() for n, x in load_file(path / "model.safetensors").items()}
    save_file(halves, tmp_path / "model.safetensors")
    assert all(np.array_equal(x, halves[n].float().numpy()) for n, x in scorer(tmp_path).params())


# ---- what is refused


def test_nothing_is_trained_and_the_reason_says_what_onnx_can_do():
    component = Onnx(weights="anywhere")
    assert isinstance(component, Frozen)
    for word in ("no", "torch", "flax", "reference", "rollout.engine: onnx", "reward with use: onnx", "--format onnx"):
        assert word in component.frozen
    with pytest.raises(ConfigError, match="nothing to train with"):
        component.load(LoadRequest(V, optimization=Optimization()))


@pytest.mark.parametrize("request_, said", [(LoadRequest(V, value_heads=1), "no values"),
                                            (LoadRequest(V, action_value_heads=1), "no values")])
def test_values_are_refused(request_, said):
    with pytest.raises(ConfigError, match=said):
        Onnx(weights="anywhere").load(request_)


def test_a_new_model_is_refused():
    with pytest.raises(ConfigError, match="weights names no folder"):
        Onnx().load(LoadRequest(V))


def test_another_vocabulary_is_refused(folder):
    with pytest.raises(ConfigError, match="vocabulary"):
        scorer(folder("qwen2"), V + 1)


@pytest.mark.parametrize("kind, traits", [("mixtral", {"num_local_experts": 2}), ("gpt2", {"n_positions": 64})])
def test_other_architectures_are_refused_by_name(kind, traits, tmp_path):
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **traits})
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=kind):
        scorer(tmp_path)


def test_heads_that_onnx_runtime_does_not_know_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="head_dim is 12"):
        scorer(written(tmp_path, "qwen3", {"head_dim": 12}))


def test_two_builds_of_onnx_runtime_are_refused_with_both_names():
    assert len(installed_runtimes()) == 1
    with pytest.raises(PluginError, match="onnxruntime and onnxruntime-gpu are installed") as refused:
        require_one_runtime("backend 'onnx'", frozenset({"onnxruntime", "onnxruntime-gpu"}))
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in str(refused.value)


def test_cuda_without_its_build_is_refused():
    if "onnxruntime-gpu" in installed_runtimes():
        pytest.skip("the build for CUDA is installed")
    with pytest.raises(PluginError, match=r"posttrain-backends\[onnx-gpu\]"):
        require_onnx("backend 'onnx'", "cuda")
