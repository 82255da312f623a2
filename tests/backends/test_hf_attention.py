"""Attention by name on modules of transformers: equal to eager padded, packed and as trees; wrong ones are found."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import attentions
import numpy as np
import pytest
import torch

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers")

from posttrain.errors import ConfigError  # after the check that the library is there
from posttrain.protocols import LoadRequest, Optimization
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models.hf import HFModel
from posttrain_backends._torch.models.hf_attention import FLEX, attending, switch
from posttrain_backends._torch.models.hf_probe import fault_of
from posttrain_backends.hf import HF
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

torch.set_num_threads(1)
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # the library's own
              pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")]

V = 61
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}
KINDS = {"llama": SIZES, "llama, deep": {**SIZES, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6},
         "qwen3": {**SIZES, "head_dim": 32}, "mistral": {**SIZES, "sliding_window": 16},
         "bloom": {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4},
         "mamba": {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}}
TRAINED = LoadRequest(V, optimization=Optimization(total_steps=1))
RAGGED = Layout.from_offsets([0, 20, 23, 34, 35])
SHARED = Layout.from_offsets([0, 9, 16], cells=np.array([*range(9), 0, 1, 2, 3, 4, 9, 10]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """name -> a folder of random weights, large enough that attention is not uniform; made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            torch.manual_seed(3)
            made[name] = tmp_path_factory.mktemp("model")
            model = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.for_model(name.partition(",")[0], **KINDS[name]))
            for p in model.parameters():
                p.data.mul_(5 if p.ndim > 1 else 1)
            model.save_pretrained(made[name])
        return made[name]
    return make


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Flex as it is: to compile it takes half a minute for each shape on a CPU."""
    with torch.compiler.set_stance("force_eager"):
        yield


def load(path: Path, request: LoadRequest = TRAINED, **fields) -> HFModel:
    return HF(weights=str(path), device="cpu", **fields).load(request).model


def values(model: HFModel, layout: Layout, *, trained: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of ragged tokens, and the gradient of every parameter."""
    M = len(layout.rows)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, V, M))
    model.causal.zero_grad()
    with torch.set_grad_enabled(trained):
        logits = model.hidden(tokens, layout) @ model.output_weight.t()
    if not trained:
        return logits, {}
    (logits.log_softmax(-1) * torch.randn(M, V, generator=torch.Generator().manual_seed(2))).sum().backward()
    return logits.detach(), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def require_equal(found, expected) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-4)
    assert found[1].keys() == expected[1].keys()
    for key, gradient in expected[1].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-3, atol=1e-3, msg=f"{key}: {{}}".format)


@pytest.mark.parametrize("packing", ["never", "always"])
@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_logits_and_gradients_equal_those_of_eager_in_padded_rows(kind, name, packing, folder):
    expected = values(load(folder(kind), attention="eager", packing="never"), RAGGED)
    model = load(folder(kind), attention=name, packing=packing)
    assert model.packed == (packing == "always") and model.causal.config._attn_implementation == name
    require_equal(values(model, RAGGED), expected)


@pytest.mark.parametrize("packing", ["never", "always"])
def test_flex_scores_on_a_cpu(packing, folder, uncompiled):
    model = load(folder("llama"), LoadRequest(V), attention="flex", packing=packing)
    assert model.causal.config._attn_implementation == FLEX and model.shares_prompts == (packing == "never")
    for layout in (RAGGED, *([SHARED] if model.shares_prompts else [])):
        require_equal(values(model, layout, trained=False),
                      values(load(folder("llama"), LoadRequest(V), attention="eager"), layout, trained=False))
    assert model.causal.config._attn_implementation == FLEX


def test_flex_does_not_train_on_a_cpu(folder, uncompiled):
    with pytest.raises(ConfigError, match="attention flex has no backward pass on a CPU, so it can score there and not "
                                          "train; take sdpa"):
        load(Path("no weights are read"), attention="flex")
    assert "NotImplementedError: FlexAttention does not support backward on CPU" in fault_of(
        load(folder("llama")), "flex", trained=True)


@pytest.mark.parametrize("packed", [False, True])
def test_xformers_is_registered_and_called_as_its_interface_says(packed, folder, monkeypatch):
    attentions.install(monkeypatch)
    model = load(folder("llama"), packing="always" if packed else "never")
    expected = values(model, RAGGED)
    assert fault_of(model, "xformers", trained=True) == ""
    with attending(model.causal, "xformers"):
        require_equal(values(model, RAGGED), expected)
    assert model.causal.config._attn_implementation == "sdpa"


def test_xformers_is_not_given_what_it_has_no_kernel_for(folder, monkeypatch):
    attentions.install(monkeypatch)
    assert "xformers computes no sliding_window here" in fault_of(load(folder("mistral")), "xformers", trained=True)


@pytest.mark.needs("xformers")
def test_xformers_itself_says_why_it_does_not_run_on_a_cpu(folder):
    assert "it raises NotImplementedError: No operator found for `memory_efficient_attention_forward`" in fault_of(
        load(folder("llama")), "xformers", trained=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="said where there is no CUDA device")
def test_kernels_of_the_hub_are_not_asked_for(folder):
    causal = load(folder("llama")).causal
    with pytest.raises(ValueError, match="cannot use the installed package: it is too old, or there is no CUDA device"):
        switch(causal, "flash_attention_2")
    causal._compatible_flash_implementations = ["org/kernel"]
    with pytest.raises(ValueError, match="a LlamaForCausalLM is made for org/kernel"):
        switch(causal, "flash_attention_2")
    assert causal.config._attn_implementation == "sdpa"


def sees_all(module, query, key, value, attention_mask, **named):
    module.is_causal = False
    return sdpa_attention_forward(module, query, key, value, attention_mask, **named)


def half_gradients(module, query, key, value, attention_mask, **named):
    return sdpa_attention_forward(module, query, attentions.HalfGradient.apply(key), value, attention_mask, **named)


def nearly_right(module, query, key, value, attention_mask, **named):
    out, nothing = sdpa_attention_forward(module, query, key, value, attention_mask, **named)
    return out * (1 + 2e-5), nothing


def no_kernel(*given, **named):
    raise TypeError("no kernel for these heads\nsee elsewhere")


WRONG = {"values": (sees_all, r"its hidden states of padded rows differ from those of eager by \d\.\de.0\d of the "),
         "gradients": (half_gradients, "its gradients of padded rows differ from those of eager")}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_attention_is_refused_by_name_at_load(how, folder, monkeypatch):
    function, said = WRONG[how]
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", function)
    with pytest.raises(ConfigError, match=f"attention sdpa cannot be used here: {said}(.|\n)*Take attention: eager"):
        load(folder("llama"), attention="sdpa")


def test_one_that_raises_is_refused_by_name_at_load(folder, monkeypatch, uncompiled):
    monkeypatch.setitem(AttentionInterface._global_mapping, FLEX, no_kernel)
    with pytest.raises(ConfigError, match="attention flex cannot be used here: it raises TypeError: no kernel for "
                                          "these heads\nTake attention: sdpa"):
        load(folder("llama"), LoadRequest(V), attention="flex")


def test_auto_leaves_out_what_is_wrong_and_says_so(folder, monkeypatch, caplog):
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", half_gradients)
    with caplog.at_level(logging.WARNING):
        assert load(folder("llama")).causal.config._attn_implementation == "eager"
    assert "attention sdpa is left out: its gradients of padded rows differ" in caplog.text
    assert load(folder("llama"), LoadRequest(V)).causal.config._attn_implementation == "sdpa"  # which trains nothing


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_modules_that_do_not_let_theirs_be_chosen_keep_it(kind, folder, caplog):
    with caplog.at_level(logging.WARNING):
        own = load(folder(kind)).causal.config._attn_implementation
    assert "is left out" not in caplog.text
    with pytest.raises(ConfigError, match="attention flex cannot be used here: it raises"):
        load(folder(kind), LoadRequest(V), attention="flex")
    assert own in ("eager", "sdpa")


def test_bf16_is_held_against_its_own_rounding(folder, monkeypatch):
    assert load(folder("llama"), precision="bf16", attention="sdpa").causal.config._attn_implementation == "sdpa"
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sees_all)
    with pytest.raises(ConfigError, match="attention sdpa cannot be used here: its hidden states"):
        load(folder("llama"), precision="bf16", attention="sdpa")


def test_rounding_to_8_bits_is_told_from_what_is_wrong(folder, monkeypatch):
    """The last bits of an attention move what the next layer rounds by a whole step."""
    def rounded(module, given):
        step = given[0].abs().amax(-1, keepdim=True) / 127
        return ((given[0] / step).round() * step,)

    model = load(folder("llama, deep"))
    for module in model.causal.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounded)
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", nearly_right)
    assert fault_of(model, "sdpa", trained=False) == ""
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sees_all)
    assert "its hidden states of padded rows differ from those of eager" in fault_of(model, "sdpa", trained=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_on_cuda_auto_finds_one_that_is_sound_and_better_than_padding(precision, folder, caplog):
    with caplog.at_level(logging.WARNING):
        model = HF(weights=str(folder("qwen3")), device="cuda", precision=precision).load(TRAINED).model
    assert "is left out" not in caplog.text and model.causal.config._attn_implementation != "sdpa"
