"""Quantised linear layers of bitsandbytes and torchao: read with transformers, and made to compute what they say.

What is switched off here was measured with bitsandbytes 0.50 and torchao 0.18:

- On CPUs with AVX512-BF16, bitsandbytes packs 4-bit weights anew in the first pass without gradients: their scales are
  rounded to bfloat16, also in what is saved, and from then on no gradient passes the layer. Layers are kept from it.
- The exception that LLM.int8() makes for large inputs takes columns out that are large in any row: what a token gives
  would depend on the tokens beside it. Its threshold is 0, which makes none.
- torchao passes no gradient through layers that round their inputs (`quantization.py` names them).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from posttrain.errors import ConfigError
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from posttrain_backends._torch.device import device_of
from posttrain_backends._torch.models.interface import COMPUTE_DTYPE
from posttrain_backends._torch.models.projections import is_plain
from posttrain_backends._torch.quantised_layers import compute_in_bfloat16, never_packed, require_matrices
from posttrain_backends._torch.quiet import import_quietly
from posttrain_backends.quantization import ADD_ADAPTER, QUANTIZERS, Quantizer, check_quantizer, nothing_to_train

if TYPE_CHECKING:
    from posttrain_backends.hf import HF

_GRADIENT = 1e-2
"""Of the probe, relative to the largest entry: a layer that rounds its inputs still has the gradient of one that does
not, and one that loses a path misses far more."""
_ADAPTER = "adapter_model.safetensors"
"""Beside the model's own files; with `adapter_config.json` it makes transformers load the adapter, too."""
_IN_BFLOAT16: frozenset[Quantizer] = frozenset({"int4"})
"""Whose kernels take and give bfloat16 alone."""


# ---- how a model is read


def reading(spec: HF, config: Any) -> dict[str, Any]:
    """What `from_pretrained` is told of types and places. The output matrix and what is not linear are not quantised.
    Raises `ConfigError` where nothing computes with such weights."""
    found, chosen = quantizer_of(config), spec.quantize
    if found is not None and chosen not in (None, found):
        raise ConfigError([f"policy.quantize is {chosen}, and the weights of {spec.weights or spec.model} are kept in "
                           f"{found} already; leave quantize out, or take the weights before they were quantised"])
    if found is not None and chosen is None and spec.adapter is not None and QUANTIZERS[found].rounds_inputs:
        raise ConfigError([f"the weights of {spec.weights or spec.model} are kept in {found}, whose layers round what "
                           "they read: log-probs of drawing and of training differ, and a run corrects for that only "
                           f"where it knows before it loads them; set policy.quantize: {found}"])
    if (quantizer := chosen or found) is None:
        return {"dtype": torch.float32}
    device = device_of(spec.device, spec.precision)
    try:
        check_quantizer(quantizer, device.type, trains=spec.adapter is not None)
    except ValueError as error:
        raise ConfigError([f"policy.{error}"]) from None
    import_quietly(QUANTIZERS[quantizer].library)
    dtype = torch.bfloat16 if quantizer in _IN_BFLOAT16 else torch.float32
    made = {} if found else {"quantization_config": _CONFIGURATIONS[quantizer](COMPUTE_DTYPE[spec.precision])}
    return {"dtype": dtype, "device_map": {"": device}, **made}


def _torchao(name: str, **fields: Any) -> Any:
    import torchao.quantization

    return TorchAoConfig(getattr(torchao.quantization, name)(**fields))


_CONFIGURATIONS: Mapping[Quantizer, Callable[[torch.dtype], Any]] = {
    "int8": lambda compute: BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    "nf4": lambda compute: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                              bnb_4bit_compute_dtype=compute),
    "int8_weight_only": lambda compute: _torchao("Int8WeightOnlyConfig"),
    "int8_dynamic": lambda compute: _torchao("Int8DynamicActivationInt8WeightConfig"),
    "int4": lambda compute: _torchao("Int4WeightOnlyConfig", int4_packing_format="tile_packed_to_4d"),
}


def quantizer_of(config: Any) -> Quantizer | None:
    """How a model's weights are kept, by its configuration; None where they are plain. Raises `ConfigError` where they
    are of another method."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    said = given if isinstance(given, dict) else given.to_dict()
    found = next((name for name, says in _SAYS.items() if says(said)), None)
    if found is None:
        method = str(said.get("quant_method", "an unknown method"))
        raise ConfigError([f"these weights are quantised by {method}, in a way that is not supported"],
                          next_step=f"Take the model before it was quantised, and one of quantize: "
                                    f"{', '.join(QUANTIZERS)}.")
    return found


def _torchao_says(kind: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda said: "torchao" in str(said.get("quant_method")).lower() and kind in str(said.get("quant_type"))


_SAYS: Mapping[Quantizer, Callable[[Mapping[str, Any]], bool]] = {
    "int8": lambda said: bool(said.get("load_in_8bit")) and not said.get("llm_int8_threshold"),
    "nf4": lambda said: bool(said.get("load_in_4bit")) and said.get("bnb_4bit_quant_type") == "nf4",
    "int8_weight_only": _torchao_says("Int8WeightOnlyConfig"),
    "int8_dynamic": _torchao_says("Int8DynamicActivationInt8WeightConfig"),
    "int4": _torchao_says("Int4WeightOnlyConfig"),
}


def prepared(causal: PreTrainedModel) -> PreTrainedModel:
    """The module, whose quantised layers now compute what their weights say wherever they stand. Raises `ConfigError`
    where most weights stand elsewhere and stay as they are."""
    if (quantizer := quantizer_of(causal.config)) is None:
        return causal
    require_matrices(causal, quantizer)
    for layer in map(never_packed, quantised(causal).values()):
        if quantizer in _IN_BFLOAT16:
            compute_in_bfloat16(layer)
    for p in causal.parameters():
        if type(p) is nn.Parameter:  # a copy: the file of all float weights is mapped while one of them lies in it
            p.data = p.data.to(torch.float32, copy=True)
    return causal


# ---- what its layers hold


def quantised(causal: nn.Module) -> dict[str, nn.Linear]:
    """The layers whose weights are quantised, by name; those under an adapter among them."""
    return {name: module for name, module in causal.named_modules()
            if isinstance(module, nn.Linear) and not is_plain(module)}


def is_quantised(causal: PreTrainedModel) -> bool:
    return quantizer_of(causal.config) is not None


def rounds_inputs(causal: PreTrainedModel) -> bool:
    """Whether its layers round what they read; see `Quantization.rounds_inputs`."""
    quantizer = quantizer_of(causal.config)
    return quantizer is not None and QUANTIZERS[quantizer].rounds_inputs


@torch.no_grad()
def dequantised(layer: nn.Linear) -> Tensor:
    """[out, in] the numbers that a layer multiplies by, in float32."""
    weight: Any = layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        found: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    elif hasattr(weight, "SCB"):
        from bitsandbytes.functional import int8_vectorwise_dequant

        found = int8_vectorwise_dequant(weight.data, kept(layer)[1])
    else:
        found = weight.dequantize()
    return found.float()


def kept(layer: Any) -> list[Tensor]:
    """What a layer keeps in place of its weight: small integers, and scales."""
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        return [weight.data, weight.quant_state.absmax]
    if hasattr(weight, "SCB"):
        return [weight.data, layer.state.SCB if weight.SCB is None else weight.SCB]  # the first pass takes them over
    return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]


def fingerprint(causal: nn.Module) -> Tensor:
    """[32] uint8: the SHA-256 of what all quantised layers keep, by name."""
    sha = hashlib.sha256()
    for name, layer in sorted(quantised(causal).items()):
        sha.update(name.encode())
        for x in kept(layer):
            sha.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(bytearray(sha.digest()), dtype=torch.uint8)


# ---- training and saving


def require_trainable(causal: PreTrainedModel, *, own_adapter: bool) -> None:
    """Raise `ConfigError` where a model cannot be trained as it was read: nothing in it would move, or what moves would
    get a part of its gradient."""
    if not own_adapter and any(".lora_" in name for name, _ in causal.named_parameters()):
        raise ConfigError(["these weights have an adapter, which can be scored and drawn from, and not trained on: go "
                           "on in the run that trained it (posttrain resume), or take the weights it is on"])
    layers, found = quantised(causal), quantizer_of(causal.config)
    if found is None or not layers:
        return
    if not own_adapter:
        raise ConfigError([f"policy.{nothing_to_train(found, ADD_ADAPTER)}"])
    name, layer = next(iter(layers.items()))
    if (error := gradient_error(layer)) > _GRADIENT:
        raise ConfigError([f"the gradient of the quantised layer {name} is not the one of its numbers (it differs by "
                           f"{error:.1e} of the largest): adapters in front of it would learn from a part of it; take "
                           "another quantize, or leave it out"])


def gradient_error(layer: nn.Linear) -> float:
    """Largest difference between the gradient that a layer passes on, after a pass without any as in scoring, and the
    one of its numbers, relative to the largest."""
    weight, generator = dequantised(layer), torch.Generator().manual_seed(0)
    x, g = (torch.randn(3, n, generator=generator).to(weight.device) for n in reversed(weight.shape))
    with torch.no_grad():
        layer(x)
    x.requires_grad_()
    with torch.enable_grad():
        y = layer(x)
    found = torch.autograd.grad(y, x, g.to(y.dtype))[0] if y.requires_grad else torch.zeros_like(x)
    expected = g @ weight
    return float((found - expected).abs().max() / expected.abs().max())


def save_quantised(causal: PreTrainedModel, folder: Path) -> None:
    """Write a folder that `from_pretrained` loads quantised as it is, with the adapter that is on it.

    An adapter is not merged: weights that are rounded again lose it, as its product is smaller than their steps."""
    adapters = getattr(causal, "peft_config", {})
    with _unwrapped(causal):
        causal.save_pretrained(folder, save_original_format=False)  # they have no other form
    if adapters:
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        adapters["default"].save_pretrained(str(folder))
        tensors = get_peft_model_state_dict(causal, adapter_name="default")
        save_file({f"base_model.model.{name}": t.detach().cpu().contiguous() for name, t in tensors.items()},
                  folder / _ADAPTER, metadata={"format": "pt"})


@contextmanager
def _unwrapped(causal: PreTrainedModel) -> Iterator[None]:
    """Inside, the module is the one without its adapter: of torchao's weights transformers saves what is in it, and
    not what it is told."""
    wrapped = {name: module for name, module in causal.named_modules() if hasattr(module, "base_layer")}
    told = getattr(causal, "_hf_peft_config_loaded", False)
    causal._hf_peft_config_loaded = False
    for name, module in wrapped.items():
        causal.set_submodule(name, module.base_layer)
    try:
        yield
    finally:
        causal._hf_peft_config_loaded = told
        for name, module in wrapped.items():
            causal.set_submodule(name, module)
