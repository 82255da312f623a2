"""Running out of memory in torch, on any device, as core's `MemoryExhausted`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from posttrain.errors import MemoryExhausted

_T = TypeVar("_T")


def translating_memory_errors(compute: Callable[[], _T]) -> _T:
    """Run `compute`; where memory runs out raise `MemoryExhausted`, after the frames that hold tensors are gone."""
    try:
        return compute()
    except torch.OutOfMemoryError as error:
        message = str(error)
    except RuntimeError as error:
        message = str(error)
        if not any(sign in message for sign in ("DefaultCPUAllocator: can't allocate memory", "not enough memory")):
            raise
    raise MemoryExhausted(message.partition("\n")[0])
