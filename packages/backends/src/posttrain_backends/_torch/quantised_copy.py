"""A copy of a policy to draw from, whose linear layers are quantised anew whenever it is given weights.

Its log-probs are its own: a trainer that learns from its answers corrects for them. Knows no sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any, final

import torch
from posttrain.data import Array
from torch import Tensor, nn

from posttrain_backends._torch.models.files import copy_named
from posttrain_backends._torch.models.hf import HFModel
from posttrain_backends._torch.quantised import compute_in_bfloat16, never_packed
from posttrain_backends._torch.quiet import import_quietly
from posttrain_backends.quantization import QUANTIZERS, Quantizer


@final
class QuantisedCopy:
    """`model` draws; `load` gives it other weights. The output matrix, adapters and what is not linear stay as they
    are."""

    def __init__(self, model: HFModel, quantizer: Quantizer) -> None:
        import_quietly(QUANTIZERS[quantizer].library)
        self.model, self._quantise = deepcopy(model), _LAYERS[quantizer]
        self.model.requires_grad_(False)
        causal = self.model.causal
        kept = {id(causal.get_output_embeddings())}
        layers = {name: layer for name, layer in causal.named_modules()
                  if isinstance(layer, nn.Linear) and ".lora_" not in name and id(layer) not in kept}
        self._places = {f"{name}.weight": name for name in layers}
        live = self.model.state_dict()
        self._rounded = live.keys() & self._places.keys()
        self._plain = {name: t for name, t in live.items() if name not in self._rounded}
        for name, layer in layers.items():
            self._put(name, layer.weight.data, layer.bias)

    def load(self, items: Iterable[tuple[str, Array]]) -> None:
        """Take all the policy's weights. Raises `ConfigError` where names or shapes do not fit."""
        given = {name: torch.as_tensor(x) for name, x in items}
        shapes: dict[str, Tensor] = {name: torch.empty_like(given[name]) for name in self._rounded & given.keys()}
        copy_named(given.items(), {**self._plain, **shapes}, "the weights given to the sampler")
        for name in sorted(shapes):
            layer: Any = self.model.causal.get_submodule(self._places[name])
            self._put(self._places[name], given[name], layer.bias)

    def _put(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        """Replace a layer by one with this weight, rounded, and this bias, live."""
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        made.weight = nn.Parameter(weight.to(self.model.device, torch.float32, copy=True), requires_grad=False)
        layer = never_packed(self._quantise(made))
        layer.register_parameter("bias", bias)  # type: ignore[arg-type]  # it is a parameter of the layer before
        self.model.causal.set_submodule(name, layer.eval())


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
