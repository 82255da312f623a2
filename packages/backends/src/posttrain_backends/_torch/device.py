"""The device a model is put on. Knows no model."""

from __future__ import annotations

from typing import Literal

import torch
from posttrain.errors import ConfigError

from posttrain_backends._torch.models.interface import Precision

DeviceName = Literal["auto", "cpu", "cuda"]


def device_of(name: DeviceName, precision: Precision) -> torch.device:
    """`auto` takes CUDA where there is one. Raises `ConfigError` for a device or precision that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(["policy.device is 'cuda', and torch finds no CUDA device"],
                          next_step="Set policy.device=auto or cpu, or install a torch build with CUDA.")
    chosen = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(chosen, torch.cuda.current_device()) if chosen == "cuda" else torch.device(chosen)
    if precision == "bf16" and chosen == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError(["policy.precision is 'bf16', which this CUDA device does not compute"],
                          next_step="Set policy.precision=float32.")
    return device
