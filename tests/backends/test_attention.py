"""Attention by name on native models: all ways equal eager, wrong ones are found at load, absent ones by `check`."""

from __future__ import annotations

import logging
from pathlib import Path

import attentions
import numpy as np
import pytest
import torch
import yaml
from commandline import called
from posttrain.errors import ConfigError, PluginError
from posttrain.protocols import LoadRequest, Optimization
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models import attention
from posttrain_backends._torch.models.attention import ATTENTION, eager, fault_of
from posttrain_backends._torch.models.decoder import Decoder
from posttrain_backends.attention import KINDS, candidates, choose, installed
from posttrain_backends.families.shape import Shape
from posttrain_backends.hf import HF
from posttrain_backends.reward_models import RewardModel
from posttrain_backends.torch_native import Torch

torch.set_num_threads(1)

V = 23
SHAPE = Shape(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, head_dim=4, max_position_embeddings=64)
SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": torch.float32, "device": "cpu"}
LAYOUTS = {
    "one sequence": Layout.from_offsets([0, 7]),
    "ragged": Layout.from_offsets([0, 20, 23, 23, 34, 35]),
    "a shared prompt": Layout.from_offsets([0, 9, 16, 19], cells=np.array([*range(9), 0, 1, 2, 3, *range(9, 15)])),
    "a sequence that is the beginning of another": Layout.from_offsets(
        [0, 5, 8, 12], cells=np.array([0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 5, 6])),
}
WITHOUT_CUDA = ("sdpa", "flex")


def decoder(name: str, **fields) -> Decoder:
    """With weights large enough that attention is not uniform, the same under every name."""
    model = Decoder(SHAPE, precision="float32", attention=name, **fields)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator) + (p.ndim == 1))
    return model


def hidden(name: str, layout: Layout, *, trained: bool, **fields) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradient of every parameter."""
    model, M = decoder(name, **fields), len(layout.rows)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, V, M))
    with torch.set_grad_enabled(trained):
        logits = model.hidden(tokens, layout) @ model.output_weight.t()
    if not trained:
        return logits, {}
    (logits.log_softmax(-1) * torch.randn(M, V, generator=torch.Generator().manual_seed(2))).sum().backward()
    return logits.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def require_equal(name: str, layout: Layout, *, trained: bool, **fields) -> None:
    expected, gradients = hidden("eager", layout, trained=trained)
    found, own = hidden(name, layout, trained=trained, **fields)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert own.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(own[key], gradient, rtol=1e-4, atol=1e-3, msg=f"{key}: {{}}".format)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WITHOUT_CUDA)
def test_logits_and_gradients_equal_those_of_eager(name: str, layout: str) -> None:
    require_equal(name, LAYOUTS[layout], trained=name != "flex")  # flex only scores on a CPU


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flash_attention_4", "xformers"])
def test_kernels_of_others_are_called_as_their_interfaces_say(name: str, layout: str,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    attentions.install(monkeypatch)
    require_equal(name, LAYOUTS[layout], trained=True)
    require_equal(name, LAYOUTS[layout], trained=True, gradient_checkpointing=True)
    assert fault_of(name, **SIZES, trained=True) == ""


@pytest.mark.oracle
@pytest.mark.needs("xformers")
def test_the_masks_of_xformers_are_what_we_take_them_for() -> None:
    biases = pytest.importorskip("xformers.ops").fmha.attn_bias
    for kind, runs in ((biases.BlockDiagonalCausalFromBottomRightMask, ([9, 3, 3], [9, 7, 3])),
                       (biases.BlockDiagonalCausalMask, ([9, 3], None))):
        mask = kind.from_seqlens(*runs)
        sees = attentions.Mask.from_seqlens(*runs).sees
        assert torch.equal(mask.materialize(tuple(sees.shape)) == 0, sees)


def test_eager_is_the_formula() -> None:
    """Token by token and head by head in float64; a shared beginning once."""
    layout, generator = LAYOUTS["a shared prompt"], torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(15, n, 8, generator=generator, dtype=torch.float64) for n in (4, 2, 2))
    found = eager(layout)(q, k, v)
    for start, end in zip(layout.offsets[:-1], layout.offsets[1:], strict=True):
        cells = layout.cells[start:end]
        for place, token in enumerate(cells):
            before = cells[:place + 1]
            for head in range(4):
                weight = torch.exp(k[before, head // 2] @ q[token, head] / 8**0.5)
                torch.testing.assert_close(found[token, head], weight @ v[before, head // 2] / weight.sum())


# ---- what is found at load


def wrong_values(layout: Layout) -> attention.Attend:
    """Every sequence sees the one before it."""
    whole = Layout.from_offsets([0, len(layout.rows)])
    return attention.sdpa(whole)


def wrong_gradients(layout: Layout) -> attention.Attend:
    """Right values, half of the gradient of the keys."""
    right = attention.sdpa(layout)
    return lambda q, k, v: right(q, attentions.HalfGradient.apply(k), v)


def no_numbers(layout: Layout) -> attention.Attend:
    right = attention.sdpa(layout)
    return lambda q, k, v: right(q, k, v) * float("nan")


def raises(layout: Layout) -> attention.Attend:
    raise KeyError("no kernel for this device\nbecause")


WRONG = {"values": (wrong_values, r"its values differ from those of eager by \d\.\de[-+]0\d of the largest, above 1"),
         "gradients": (wrong_gradients, "its gradients of keys differ from those of eager"),
         "no numbers": (no_numbers, "its values differ from those of eager by inf"),
         "an error": (raises, "it raises KeyError: 'no kernel for this device")}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_attention_is_refused_by_name_at_load(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, said = WRONG[how]
    monkeypatch.setattr(attention, "ATTENTION", {**ATTENTION, "sdpa": function})
    request = LoadRequest(V, optimization=Optimization(total_steps=1))
    with pytest.raises(ConfigError, match=f"attention sdpa cannot be used here: {said}(.|\n)*Take attention: eager"):
        Torch(attention="sdpa", device="cpu").load(request)


def test_auto_leaves_out_what_is_wrong_and_says_so(monkeypatch: pytest.MonkeyPatch,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(attention, "ATTENTION", {**ATTENTION, "sdpa": wrong_values})
    with caplog.at_level(logging.WARNING):
        assert Torch(device="cpu").load(LoadRequest(V)).model.attention == "eager"
    assert "attention sdpa is left out: its values differ" in caplog.text


def test_a_wrong_gradient_concerns_only_who_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "ATTENTION", {**ATTENTION, "sdpa": wrong_gradients})
    assert fault_of("sdpa", **SIZES, trained=False) == ""
    assert Torch(attention="sdpa", device="cpu").load(LoadRequest(V)).model.attention == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_right_is_let_pass_in_every_type(dtype: torch.dtype) -> None:
    assert fault_of("sdpa", **{**SIZES, "dtype": dtype}, trained=True) == ""
    assert fault_of("eager", **{**SIZES, "dtype": dtype}, trained=True) == ""


def test_flex_scores_on_a_cpu_and_does_not_train_there() -> None:
    assert fault_of("flex", **SIZES, trained=False) == ""
    assert "does not support backward on CPU" in fault_of("flex", **SIZES, trained=True)
    assert Torch(attention="flex", device="cpu").load(LoadRequest(V)).model.attention == "flex"
    with pytest.raises(ConfigError, match="attention flex has no backward pass on a CPU, so it can score there and not "
                                          "train; take sdpa"):
        Torch(attention="flex", device="cpu").load(LoadRequest(V, optimization=Optimization(total_steps=1)))


def test_what_auto_takes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert candidates("cpu", "bf16") == ("sdpa",)
    assert candidates("cuda", "bf16") == candidates("cuda", "float32") == ("flex", "sdpa")
    monkeypatch.setattr("posttrain_backends.attention.installed", lambda name: True)
    assert candidates("cuda", "bf16") == ("flash_attention_3", "flash_attention_2", "flex", "sdpa")
    assert candidates("cuda", "float32") == ("flex", "sdpa")
    assert choose("auto", ("flex", "sdpa"), lambda name: "bad" if name == "flex" else "") == "sdpa"
    assert "attention flex is left out: bad" in caplog.text


# ---- what is found before anything is loaded

ABSENT = {"flash_attention_2": "needs flash-attn, which is not installed: pip install flash-attn",
          "flash_attention_3": "needs flash-attn-3, which is not installed: build it from the folder hopper",
          "flash_attention_4": "needs flash-attn-4, which is not installed: pip install --pre flash-attn-4",
          "xformers": "needs xformers, which is not installed: pip install xformers, built for the installed torch"}


@pytest.mark.parametrize("policy", ["torch", "hf"])
@pytest.mark.parametrize("name", ABSENT)
def test_check_tells_of_a_package_that_is_missing(name: str, policy: str, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain_backends.attention.installed", lambda name: False)
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump({
        "recipe": "grpo", "tokenizer": {"use": "characters", "alphabet": "01"},
        "task": [{"prompt": "0", "answer": "1"}], "rewards": {"correct": "exact_match"},
        "policy": {"use": policy, "attention": name, **({"weights": "model"} if policy == "hf" else {})}}))
    (tmp_path / "model").mkdir()
    code, _, err = called(capsys, "check", str(file))
    assert code == 2 and f"attention '{name}' {ABSENT[name]}" in err and "sdpa and flex come with torch" in err


@pytest.mark.parametrize("made", [Torch, HF, RewardModel])
def test_what_does_not_fit_device_and_precision_is_refused_when_made(made: type,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain_backends.attention.installed", lambda name: True)
    needed = {} if made is Torch else {"weights": "a"}
    with pytest.raises(ValueError, match="attention flash_attention_2 runs on CUDA alone, and device is cpu; take sd"):
        made(attention="flash_attention_2", device="cpu", precision="bf16", **needed)
    with pytest.raises(ValueError, match="attention flash_attention_2 does not compute in float32, but in bf16; take"):
        made(attention="flash_attention_2", **needed)
    monkeypatch.setattr("posttrain_backends.attention.installed", lambda name: False)
    with pytest.raises(PluginError, match="needs flash-attn, which is not installed"):
        made(attention="flash_attention_2", precision="bf16", **needed)


def test_the_native_model_refuses_more(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="attention flex does not compute in float64, but in bf16 and float32"):
        Torch(attention="flex", precision="float64")
    with pytest.raises(ValueError, match="a module from `file` computes its own"):
        Torch(attention="sdpa", file="model.py:build")
    if not torch.cuda.is_available():
        monkeypatch.setattr("posttrain_backends.attention.installed", lambda name: True)
        with pytest.raises(ConfigError, match="attention xformers runs on CUDA alone, and the model is on a CPU"):
            Torch(attention="xformers").load(LoadRequest(V))


def test_every_name_has_its_function_and_the_other_way_round() -> None:
    assert ATTENTION.keys() == KINDS.keys()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("name", [name for name in KINDS if name != "eager"])
def test_on_cuda_every_installed_name_is_sound(name: str) -> None:
    kind = KINDS[name]
    if not installed(name):
        pytest.skip(f"{kind.package} is not installed")
    dtype = torch.float32 if "float32" in kind.precisions else torch.bfloat16
    assert fault_of(name, **{**SIZES, "head_dim": 64, "dtype": dtype, "device": "cuda"}, trained=True) == ""
