"""Quantised weights of linear layers by name: which library makes them, and what they are good for.

What computes is the library's; how it is brought to compute what it says stands in `_torch/quantised.py`. Imports no
framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

Quantizer = Literal["int8", "nf4", "int8_weight_only", "int8_dynamic", "int4"]
"""How the weights of linear layers are kept: see `QUANTIZERS`."""


@final
@dataclass(frozen=True, slots=True)
class Quantization:
    """What a way of keeping weights can do."""

    library: Literal["bitsandbytes", "torchao"]
    """The package whose layers compute."""
    rounds_inputs: bool = False
    """Whether layers round their inputs, too: a difference of one ulp may then become one of 1/127, so that a text
    read at once and token by token gives log-probs that differ by some 0.01."""
    differentiable: bool = True
    """Whether the gradient reaches the layer's input, which adapters in front of it learn by."""
    cuda_only: bool = False
    """Whether its kernels are for CUDA alone."""


QUANTIZERS: Mapping[Quantizer, Quantization] = {
    "int8": Quantization("bitsandbytes", rounds_inputs=True),
    "nf4": Quantization("bitsandbytes"),
    "int8_weight_only": Quantization("torchao"),
    "int8_dynamic": Quantization("torchao", rounds_inputs=True, differentiable=False),
    "int4": Quantization("torchao", differentiable=False, cuda_only=True),
}
"""`int8` is LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339) without its exception for large inputs, which looks at
all tokens of a batch; `nf4` is of QLoRA (Dettmers et al. 2023, arXiv 2305.14314)."""


def check_quantizer(quantizer: Quantizer, device: str, *, trains: bool = False, precision: str = "float32") -> None:
    """Raise `ValueError` where nothing computes with such weights on the device or as exactly as is asked, and where an
    adapter on them would not learn."""
    traits = QUANTIZERS[quantizer]
    if precision == "float64":
        raise ValueError(f"quantize: the layers of {traits.library} compute in float32 at most, and precision is "
                         "float64; take float32, or leave quantize out")
    if traits.cuda_only and device == "cpu":
        elsewhere = ", ".join(name for name, q in QUANTIZERS.items() if not q.cuda_only)
        raise ValueError(f"quantize: the kernels of {quantizer} are for CUDA alone, and the device is {device}; take "
                         f"one of {elsewhere}")
    if trains and not traits.differentiable:
        trainable = " or ".join(name for name, q in QUANTIZERS.items() if q.differentiable)
        raise ValueError(f"quantize: {quantizer} is for scoring and sampling, as {traits.library} passes no gradient "
                         f"through its layers: an adapter would learn from a part of it. Take {trainable}, or leave "
                         "adapter out")


ADD_ADAPTER = "add adapter: {use: lora}, or leave quantize out"
ADAPT_IN_HF = "adapters that learn on them are those of backend hf, which loads the same folder: {use: quantized, " \
    "weights: ...%s}; or leave quantize out"
"""Of native models; with what else that backend must be told."""


def nothing_to_train(quantizer: Quantizer | None, remedy: str) -> str:
    """Why a model in such weights and without an adapter cannot be trained; empty where its weights are plain."""
    return f"quantize: weights in {quantizer} stay as they are, so nothing would be trained; {remedy}" \
        if quantizer else ""
