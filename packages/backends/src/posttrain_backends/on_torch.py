"""What backends on torch have in common before torch is imported: the outputs of their learner, and the way to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from posttrain.errors import ConfigError
from posttrain.protocols import LoadRequest, Output

from posttrain_backends.installed import require
from posttrain_backends.quantization import QUANTIZERS, Quantizer, check_quantizer

if TYPE_CHECKING:
    from posttrain_backends._torch.learner import TorchLearner
    from posttrain_backends._torch.models.interface import NativeModel

OUTPUTS = frozenset({Output.LOGPROBS, Output.ENTROPY, Output.VALUES, Output.BOOTSTRAP_VALUES, Output.ACTION_VALUES,
                     Output.EXPECTED_ACTION_VALUES, Output.REFERENCE_KL})
"""Of every language model that a torch learner trains."""
HeadKernel = Literal["auto", "triton_head", "torch"]
"""Which form of the output head reads logits and writes their gradient; see `_torch/forms.py`."""


def native_learner(request: LoadRequest, made: Callable[[LoadRequest], NativeModel], weights: str, head_chunk: int,
                   head_kernel: HeadKernel = "auto", quantize: Quantizer | None = None,
                   frozen: str = "") -> TorchLearner:
    """The learner of the model that `made` makes, with the weights and heads of the folder `weights`, if one is named,
    quantised where that is asked. Raises `ConfigError` where they or the kernel do not fit and where it would be
    trained and is `frozen`, `PluginError` where the kernel or the library of quantised layers is not installed."""
    if frozen and request.optimization is not None:
        raise ConfigError([frozen])
    if quantize is not None:
        require("quantize", QUANTIZERS[quantize].library, extra="quantized")
    import torch

    from posttrain_backends._torch.forms import form_on
    from posttrain_backends._torch.learner import TorchLearner

    if request.threads:
        torch.set_num_threads(request.threads)
    model = made(request)
    learner = TorchLearner(model, optimization=request.optimization, value_heads=request.value_heads,
                           action_value_heads=request.action_value_heads, head_rows=head_chunk, comm=request.comm,
                           form=form_on(model.output_weight, model.compute_dtype, head_kernel))
    if weights:
        model.load(Path(weights))
        learner.load_heads(Path(weights))
    if quantize is not None:
        from posttrain_backends._torch.quantised_layers import quantise

        try:
            check_quantizer(quantize, learner.device.type)
        except ValueError as error:
            raise ConfigError([str(error)]) from None
        quantise(model, quantize)
    return learner
