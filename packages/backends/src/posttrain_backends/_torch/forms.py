"""Which form reads a learner's logits and writes their gradient: a kernel where one fits, torch's operations elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from posttrain.errors import ConfigError
from posttrain.ops import fitting
from torch import Tensor

from posttrain_backends._torch.logits import PLAIN, Form
from posttrain_backends.kernels.availability import require_triton
from posttrain_backends.kernels.head import TritonHead
from posttrain_backends.on_torch import HeadKernel

_KERNELS: Mapping[HeadKernel, tuple[TritonHead, ...]] = {
    "auto": (TritonHead(),), "triton_head": (TritonHead(),), "torch": ()}
"""Those to choose from, by the setting `head_kernel`; each is asked for its op, framework and device."""


def form_on(weight: Tensor, compute: torch.dtype, wanted: HeadKernel) -> Form:
    """For logits of the output matrix `weight` [V, H], multiplied in `compute`. Raises `PluginError` where a kernel was
    asked for by name and is not installed, `ConfigError` where it does not fit."""
    logits, chosen = weight.new_empty(0, len(weight), dtype=compute), weight.new_empty(0, dtype=torch.int64)
    found = fitting(_KERNELS[wanted], "selective_log_softmax", "torch", logits, chosen, 1.0)
    if found is None and wanted == "triton_head":
        require_triton(wanted)
        raise ConfigError([f"head_kernel {wanted!r} is for CUDA, and the output matrix is on {weight.device.type} with "
                           f"logits in {str(compute).removeprefix('torch.')}"],
                          next_step="Leave head_kernel out: torch's operations give the same numbers.")
    return PLAIN if found is None else found
