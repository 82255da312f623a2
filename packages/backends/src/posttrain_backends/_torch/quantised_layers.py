"""Linear layers of a model in place of which a library's stand, whose weights are quantised. Knows no learner.

The output matrix, embeddings, norms, adapters and convolutions stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from posttrain.errors import ConfigError
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models.interface import LanguageModel
from posttrain_backends._torch.quiet import import_quietly
from posttrain_backends.quantization import QUANTIZERS, Quantizer

_PACKS = "support_avx512bf16_for_cpu"
"""Of the 4-bit layers of bitsandbytes: whether they may pack their weights anew."""


def quantise(model: LanguageModel, quantizer: Quantizer) -> tuple[str, ...]:
    """Replace the model's linear layers -> their names. Raises `ConfigError` where the model does not compute with the
    others, or most of its weights would stay as they are."""
    require_matrices(model.module, quantizer)
    import_quietly(QUANTIZERS[quantizer].library)
    model.requires_grad_(False)
    names = tuple(name for name, layer in model.module.named_modules()
                  if isinstance(layer, nn.Linear) and not isinstance(layer, NonDynamicallyQuantizableLinear)
                  and ".lora_" not in name and layer.weight is not model.output_weight)
    for name in names:
        layer: Any = model.module.get_submodule(name)
        put(model.module, name, quantizer, layer.weight, layer.bias)
    _require_called(model, quantizer)
    return names


def put(module: nn.Module, name: str, quantizer: Quantizer, weight: Tensor, bias: Tensor | None) -> None:
    """Let a layer with this weight, rounded, and this bias, live, stand under a name."""
    device = cast(nn.Linear, module.get_submodule(name)).weight.device
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.to(device, torch.float32, copy=True), requires_grad=False)
    layer = never_packed(_LAYERS[quantizer](made))
    layer.register_parameter("bias", bias)  # type: ignore[arg-type]  # it is a parameter of the layer before
    if bias is not None:  # bitsandbytes gives it the type of the input, for good
        layer.register_forward_pre_hook(lambda _, given: (given[0].to(bias.dtype), *given[1:]), prepend=True)
    module.set_submodule(name, layer.eval())


def require_matrices(module: nn.Module, quantizer: Quantizer) -> None:
    """Raise `ConfigError` where most weights do not stand in linear layers."""
    stacked = [name for name, p in module.named_parameters() if p.ndim == 3 and min(p.shape) > 1]
    if stacked:
        raise ConfigError([f"quantize: {stacked[0]} holds several matrices in one (experts), which {quantizer} would "
                           "leave as they are; leave quantize out, or take a model without experts"])


@torch.no_grad()
def _require_called(model: LanguageModel, quantizer: Quantizer) -> None:
    """Raise `ConfigError` where the model fails on a short sequence."""
    device = model.output_weight.device
    try:
        model.hidden(torch.zeros(2, dtype=torch.long, device=device), Layout.from_offsets([0, 2], device))
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        raise ConfigError([f"quantize: the model does not compute with linear layers in {quantizer}: {error}"],
                          next_step="Leave quantize out; in a module of your own, call its linear layers instead of "
                                    "reading their weights.") from error


# ---- one layer


def never_packed(layer: nn.Module) -> nn.Module:
    """The layer, which keeps its weights as they are; see `quantised.py`."""
    if hasattr(layer, _PACKS):
        setattr(layer, _PACKS, False)
    return layer


def compute_in_bfloat16(layer: nn.Module) -> None:
    """Give the layer its input in bfloat16, and what it says in float32 to the others."""
    layer.register_forward_pre_hook(lambda _, given: (given[0].bfloat16(), *given[1:]))
    layer.register_forward_hook(lambda _, given, out: out.float())


def _nf4(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer: nn.Module = Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4", device="meta",
                                  compress_statistics=False)
    layer.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False)
    return layer.to(linear.weight.device)


def _int8(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    layer: nn.Module = Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False,
                                    threshold=0.0, device="meta")
    layer.weight = Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    return layer.to(linear.weight.device)


def _torchao(name: str, **fields: Any) -> Callable[[nn.Linear], nn.Module]:
    def quantised(linear: nn.Linear) -> nn.Module:
        import torchao.quantization as library

        library.quantize_(linear, getattr(library, name)(**fields))
        return linear
    return quantised


def _int4(linear: nn.Linear) -> nn.Module:
    layer = _torchao("Int4WeightOnlyConfig", int4_packing_format="tile_packed_to_4d")(linear.bfloat16())
    compute_in_bfloat16(layer)
    return layer


_LAYERS: Mapping[Quantizer, Callable[[nn.Linear], nn.Module]] = {
    "int8": _int8, "nf4": _nf4, "int8_weight_only": _torchao("Int8WeightOnlyConfig"),
    "int8_dynamic": _torchao("Int8DynamicActivationInt8WeightConfig"), "int4": _int4,
}
"""Quantizer -> a layer, without bias, from a plain one that is used up."""
