"""Quantised weights of the backend `hf`: what they compute, what learns on them, what is left out of a state, what is
saved, and what is refused."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from likelihood import Likelihood
from ragged import answers_to_one_prompt

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

from posttrain.batching import StepData, cut  # after the check that the libraries are there
from posttrain.data import Prompt, Sampling, Weights
from posttrain.errors import ConfigError, PluginError
from posttrain.protocols import LoadRequest, Optimization, Output
from posttrain_backends._torch.models.hf import CachedHFModel
from posttrain_backends._torch.quantised import compute_in_bfloat16, dequantised, gradient_error, quantised
from posttrain_backends._torch.quiet import import_quietly
from posttrain_backends.engines import Batched
from posttrain_backends.hf import HF, Lora
from posttrain_backends.quantization import QUANTIZERS
from posttrain_backends.torch_native import Torch

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the libraries' own

V = 61
SIZES = {"vocab_size": V, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1}
HERE = tuple(name for name, q in QUANTIZERS.items() if not q.cuda_only)
LEARNING = tuple(name for name in HERE if QUANTIZERS[name].differentiable)
AGREE = {name: 0.1 if QUANTIZERS[name].rounds_inputs else 2e-5 for name in HERE}
"""Nats between log-probs of the same weights that were come by in another way: drawn, or in other numbers."""
LOGPROBS = frozenset({Output.LOGPROBS})
GIVEN = answers_to_one_prompt(12, (3, 9, 1, 14), low=0, high=V, seed=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=True)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def load(folder: Path, quantize: str | None = None, *, train: bool = False, **fields):
    adapter = {"adapter": Lora(rank=4)} if train else {}
    request = LoadRequest(V, seed=5, optimization=Optimization(lr=1e-2) if train else None)
    return HF(weights=str(folder), device="cpu", quantize=quantize, **{**adapter, **fields}).load(request)


def oracle(learner, folder: Path):
    """transformers' own module in float32 with the numbers that the quantised layers stand for, and the adapter's
    product added."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wrapped = {name: m for name, m in learner.model.causal.named_modules() if hasattr(m, "lora_A")}
    with torch.no_grad():
        for name, layer in quantised(learner.model.causal).items():
            name = name.removesuffix(".base_layer")
            weight = plain.get_submodule(name).weight
            weight.copy_(dequantised(layer))
            if name in wrapped:
                weight.add_(wrapped[name].get_delta_weight("default"))
    return plain.eval()


def logprobs_of(causal, given=GIVEN) -> torch.Tensor:
    """Of the actions, differentiable, by the library's logits, a sequence at a time."""
    found = []
    for a, b in zip(given.offsets[:-1], given.offsets[1:], strict=True):
        ids = torch.from_numpy(given.tokens[a:b].astype(np.int64))
        table = causal(input_ids=ids[None]).logits[0].log_softmax(-1)
        found.append(table[:-1].gather(1, ids[1:, None])[:, 0][torch.from_numpy(given.is_action[a + 1:b])])
    return torch.cat(found)


def shake(learner) -> None:
    """Move the adapter, so that it is no longer zero."""
    shaken(learner, 0.05, only=".lora_")


def shaken(learner, spread: float, only: str = "") -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in learner.model.named_parameters():
            if only in name:
                p.add_(spread * torch.randn(p.shape, generator=generator))


WEIGHTS = np.linspace(-1, 1, int(GIVEN.is_action.sum()))


def accumulate(learner, *parts: list[int]) -> None:
    step = StepData(GIVEN, np.ones(len(WEIGHTS), bool), Weights(weight=WEIGHTS))
    for part in parts or ([0, 1, 2, 3],):
        learner.accumulate(cut(step, np.array(part)), Likelihood(), {})


@pytest.mark.oracle
@pytest.mark.parametrize("quantize", HERE)
def test_log_probs_are_those_of_the_numbers_that_the_weights_stand_for(quantize, base):
    learner = load(base, quantize, train=quantize in LEARNING)
    shake(learner)
    with torch.no_grad():
        expected = logprobs_of(oracle(learner, base)).numpy()
        plain = logprobs_of(transformers.AutoModelForCausalLM.from_pretrained(base)).numpy()
    found = learner.score(GIVEN, LOGPROBS, 1.0).logprobs
    np.testing.assert_allclose(found, expected, rtol=0, atol=AGREE[quantize])
    untouched = load(base, quantize).score(GIVEN, LOGPROBS, 1.0).logprobs
    moved = np.abs(untouched - plain).max()
    assert (0.05 if quantize == "nf4" else 1e-3) < moved < 1  # it is quantised, and still the same model


@pytest.mark.oracle
@pytest.mark.parametrize("quantize", LEARNING)
def test_only_the_adapter_learns_and_by_the_gradient_of_those_numbers(quantize, base):
    """In particular after scoring: that must not change what a layer computes or passes on."""
    learner = load(base, quantize, train=True)
    shake(learner)
    learner.score(GIVEN, LOGPROBS, 1.0)
    accumulate(learner)
    found = {name: g.clone() for name, g in learner._gradients["main"].items()}
    assert found and all(".lora_" in name for name in found)
    plain = oracle(learner, base)
    (-(torch.from_numpy(WEIGHTS).float() * logprobs_of(plain)).sum()).backward()
    for name, module in learner.model.causal.named_modules():
        if hasattr(module, "lora_A"):
            g, scale = plain.get_submodule(name).weight.grad, module.scaling["default"]
            for factor, expected in (("A", scale * module.lora_B.default.weight.t() @ g),
                                     ("B", scale * g @ module.lora_A.default.weight.t())):
                error = (found[f"{name}.lora_{factor}.default.weight"] - expected).abs().max()
                assert error <= (0.1 if QUANTIZERS[quantize].rounds_inputs else 1e-4) * expected.abs().max()


@pytest.mark.parametrize("quantize", ["nf4", "int8_weight_only"])
def test_gradients_do_not_depend_on_the_split(quantize, base):
    learner = load(base, quantize, train=True)
    shake(learner)
    found = []
    for parts in ([[0, 1, 2, 3]], [[0], [3, 1], [2]]):
        accumulate(learner, *parts)
        found.append({name: g.clone() for name, g in learner._gradients["main"].items()})
        learner.discard()
    largest = max(float(g.abs().max()) for g in found[0].values())
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=0, atol=3e-6 * largest)


class Letters:
    """A tokenizer of one letter per id."""

    vocab_size, bos, eos, pad = V, None, 0, 0

    def encode(self, text):
        return [ord(c) - 60 for c in text]

    def decode(self, tokens):
        return "".join(chr(int(t) + 60) for t in tokens if t)


@pytest.mark.parametrize("quantize", HERE)
@pytest.mark.parametrize("shared", [True, False])
def test_drawn_log_probs_are_those_of_scoring_up_to_the_rounding_of_inputs(quantize, shared, base):
    learner = load(base, quantize, train=quantize in LEARNING)
    shake(learner)
    assert isinstance(learner.model, CachedHFModel) and learner.model.shares_prompts
    sampler = Batched(slots=3).start(learner, Letters(), shared=shared)
    if quantize in LEARNING:
        sampler.sync(learner.params(), 1)
    prompts = [Prompt(text=t, group=g) for g, t in enumerate(["abc", "abc", "hello", "b", "abc"])]
    drawn = sampler.rollout(prompts, Sampling(max_new_tokens=9), (0, 1))
    scored = learner.score(drawn, LOGPROBS, 1.0).logprobs
    np.testing.assert_allclose(drawn.behavior_logprobs, scored, rtol=0, atol=AGREE[quantize])


@pytest.mark.parametrize("quantize", LEARNING)
def test_a_state_holds_the_adapter_alone_and_tells_the_weights_that_it_is_on(quantize, base, tmp_path):
    learner = load(base, quantize, train=True)
    accumulate(learner)
    learner.apply()
    state = learner.state()
    assert {n for n in state if n.startswith("weights.")} == {f"weights.{n}" for n, _ in learner.params()}
    assert all(".lora_" in name for name, _ in learner.params()) and state["frozen_weights"].shape == (32,)
    again = load(base, quantize, train=True)
    again.load_state(state)
    for model in (learner, again):
        accumulate(model)
        model.apply()
    for (name, a), (other, b) in zip(learner.state().items(), again.state().items(), strict=True):
        assert name == other and np.array_equal(a, b)
    changed = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    changed.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="others than those that this adapter was trained on"):
        load(tmp_path, quantize, train=True).load_state(state)


@pytest.mark.parametrize("quantize", HERE)
def test_what_is_saved_is_quantised_and_loads_with_its_adapter_here_and_in_the_library(quantize, base, tmp_path):
    learner = load(base, quantize, train=quantize in LEARNING)
    shake(learner)
    before = learner.score(GIVEN, LOGPROBS, 1.0).logprobs
    learner.save(tmp_path / "saved")
    assert np.array_equal(learner.score(GIVEN, LOGPROBS, 1.0).logprobs, before)
    size, plain = ((folder / "model.safetensors").stat().st_size for folder in (tmp_path / "saved", base))
    assert size < (0.3 if quantize == "nf4" else 0.45) * plain
    again = load(tmp_path / "saved")
    assert np.array_equal(again.score(GIVEN, LOGPROBS, 1.0).logprobs, before)
    library = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        found = logprobs_of(library).numpy()
    packed = quantize == "nf4"  # by the library, on some CPUs, in its own layers: with scales in bfloat16
    np.testing.assert_allclose(found, before, rtol=0, atol=5e-2 if packed else AGREE[quantize])
    again.save(tmp_path / "twice")
    assert np.array_equal(load(tmp_path / "twice").score(GIVEN, LOGPROBS, 1.0).logprobs, before)


@pytest.mark.parametrize("quantize", HERE)
@pytest.mark.parametrize("adapter", [None, Lora(rank=4)])
def test_a_policy_is_drawn_from_in_quantised_form_and_keeps_its_own(quantize, adapter, base):
    """What a sampler records is what the quantised model of the same weights says, also after an update."""
    request = LoadRequest(V, optimization=Optimization(lr=0.1))
    learner = HF(weights=str(base), device="cpu", adapter=adapter).load(request)
    shake(learner)
    before = {name: t.clone() for name, t in learner.trunk.causal.state_dict().items()}
    sampler = Batched(slots=3, quantize=quantize).start(learner, Letters(), shared=False)
    assert all(torch.equal(before[name], t) for name, t in learner.trunk.causal.state_dict().items())
    prompts = [Prompt(text=t, group=g) for g, t in enumerate(["abc", "abc", "hello", "b", "abc"])]
    for version in (0, 1):
        drawn = sampler.rollout(prompts, Sampling(max_new_tokens=9), (0, version))
        copy = sampler._drawn.model.causal
        rounded = oracle(type("Holder", (), {"model": sampler._drawn.model}), base)
        if adapter is None:  # the rest of the oracle's weights are the updated ones, too
            plain = {n: t for n, t in learner.trunk.causal.state_dict().items()
                     if n.removesuffix(".weight") not in quantised(copy)}
            rounded.load_state_dict(plain, strict=False)
        with torch.no_grad():
            expected = logprobs_of(rounded, drawn).numpy()
        np.testing.assert_allclose(drawn.behavior_logprobs, expected, rtol=0, atol=AGREE[quantize])
        scored = learner.score(drawn, LOGPROBS, 1.0).logprobs
        assert np.abs(drawn.behavior_logprobs - scored).max() > 1e-4
        accumulate(learner)
        learner.apply()
        sampler.sync(learner.params(), 1)
    assert (drawn.policy_version == 1).all()


def test_what_cannot_be_drawn_from_in_quantised_form_says_why(base, monkeypatch):
    with pytest.raises(ConfigError, match="quantised already, and drawn from as they are"):
        Batched(quantize="int8").start(load(base, "nf4"), Letters(), shared=False)
    with pytest.raises(ConfigError, match=r"rollout\.engine\.quantize: the kernels of int4 are for CUDA alone"):
        Batched(quantize="int4").start(load(base), Letters(), shared=False)
    sampler = Batched(quantize="nf4").start(load(base), Letters(), shared=False)
    with pytest.raises(ConfigError, match="weights given to the sampler"):
        sampler.sync({"a": np.zeros(1)}.items(), 1)
    policy = load(base)
    monkeypatch.setattr("posttrain_backends.installed.find_spec", lambda name: None)
    with pytest.raises(PluginError, match=r"engine.quantize needs torchao.*backends\[quantized\]"):
        Batched(quantize="int8_dynamic").start(policy, Letters(), shared=False)


def test_what_a_native_model_saved_is_quantised_by_the_library(tmp_path):
    native = Torch(hidden_size=64, layers=2, heads=4, kv_heads=2, device="cpu").load(LoadRequest(V))
    shaken(native, 0.1)
    native.save(tmp_path)
    plain = native.score(GIVEN, LOGPROBS, 1.0).logprobs
    found = load(tmp_path, "int8_weight_only").score(GIVEN, LOGPROBS, 1.0).logprobs
    assert 1e-4 < np.abs(found - plain).max() < 0.2


def test_a_quantised_reference_of_a_plain_policy(base):
    """With the KL over the whole vocabulary, which reads its hidden states."""
    policy, reference = load(base, None), load(base, "nf4")
    policy.compare_with(reference)
    kl = policy.score(GIVEN, frozenset({Output.REFERENCE_KL}), 1.0).reference_kl
    assert (kl > 0).all() and kl.mean() > 1e-3


@pytest.mark.parametrize("quantize", ["nf4", "int8_weight_only"])
def test_bf16(quantize, base):
    exact, half = (load(base, quantize, train=True, precision=p).score(GIVEN, LOGPROBS, 1.0).logprobs
                   for p in ("float32", "bf16"))
    assert 0 < np.abs(exact - half).max() < 0.3


def test_a_layer_that_loses_a_gradient_is_found(base):
    layer = next(iter(quantised(load(base, "int8_dynamic").model.causal).values()))
    assert gradient_error(layer) > 0.5
    with pytest.raises(ConfigError, match=r"gradient of the quantised layer .*q_proj\S* is not the one of its numbers"):
        from posttrain_backends._torch.quantised import require_trainable

        require_trainable(load(base, "int8_dynamic").model.causal, own_adapter=True)


def test_layers_whose_kernels_take_bfloat16_do_so_in_a_model_of_float32(base):
    layer = next(iter(quantised(load(base, "int8_weight_only").model.causal).values()))
    x = torch.randn(3, 64)
    plain, seen = layer(x), []
    layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    compute_in_bfloat16(layer)
    layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    half = layer(x)
    assert seen == [torch.float32, torch.bfloat16] and half.dtype == torch.float32
    torch.testing.assert_close(half, plain, rtol=0, atol=0.02 * float(plain.abs().max()))


def test_what_is_refused_by_name(base, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"kernels of int4 are for CUDA alone.*take one of int8, nf4"):
        HF(weights="a", quantize="int4", device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"policy.quantize: the kernels of int4 are for CUDA alone"):
        HF(weights=str(base), quantize="int4").load(LoadRequest(V))
    with pytest.raises(ValueError, match=r"torchao passes no gradient.*Take int8 or nf4 or int8_weight_only"):
        HF(weights="a", quantize="int8_dynamic", adapter=Lora())
    with pytest.raises(ValueError, match="GGUF file are unpacked to float32"):
        HF(weights="a.gguf", quantize="nf4")
    with pytest.raises(ConfigError, match="weights in nf4 stay as they are, so nothing would be trained"):
        load(base, "nf4", train=True, adapter=None)
    load(base, "nf4", train=True).save(tmp_path)
    with pytest.raises(ConfigError, match="quantize is int8, and the weights of .* are kept in nf4 already"):
        load(tmp_path, "int8")
    with pytest.raises(ConfigError, match="have an adapter already"):
        load(tmp_path, train=True)
    with pytest.raises(ConfigError, match="can be scored and drawn from, and not trained on"):
        load(tmp_path, train=True, adapter=None)
    load(base, "int8").save(tmp_path / "rounding")
    with pytest.raises(ConfigError, match="kept in int8, whose layers round.*set policy.quantize: int8"):
        load(tmp_path / "rounding", train=True)
    load(tmp_path / "rounding", "int8", train=True)
    monkeypatch.setattr("posttrain_backends.installed.find_spec", lambda name: name != "bitsandbytes" or None)
    with pytest.raises(PluginError, match=r"needs bitsandbytes.*pip install 'posttrain-backends\[quantized\]'"):
        load(base, "nf4")


def test_weights_of_another_method_are_refused(base, tmp_path):
    config = transformers.AutoConfig.from_pretrained(base)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="quantised by gptq"):
        load(tmp_path)


def test_experts_would_not_be_quantised_and_are_refused(tmp_path):
    config = transformers.AutoConfig.for_model("qwen3_moe", **SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2,
                                               moe_intermediate_size=16)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"experts\S* holds several matrices in one .*, which nf4 would leave"):
        load(tmp_path, "nf4")


def test_a_classifier_is_not_quantised(tmp_path):
    config = transformers.AutoConfig.for_model("llama", **SIZES, num_labels=1)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="not quantised yet"):
        HF(weights=str(tmp_path), device="cpu", quantize="nf4").load(LoadRequest(V, value_heads=1))


SILENT = """
import sys, types
fetched = []
sys.modules["kernels"] = kernels = types.ModuleType("kernels")
kernels.get_kernel = lambda *names, **more: fetched.append(names)
from posttrain_backends._torch.quiet import import_quietly
import_quietly("torchao", "bitsandbytes")
import bitsandbytes, torchao
assert not fetched and sys.modules["kernels"] is kernels, fetched
"""


def test_the_libraries_are_imported_in_silence_and_run_no_code_of_the_hub():
    done = subprocess.run([sys.executable, "-c", SILENT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_else_they_log_is_heard(caplog):
    import_quietly("bitsandbytes")
    with caplog.at_level(logging.WARNING):
        logging.getLogger("torchao").warning("something else")
    assert "something else" in caplog.text
