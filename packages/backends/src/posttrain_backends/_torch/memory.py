"""Memory of torch's devices: how much is in use, and running out of it as core's `MemoryExhausted`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, final

import torch
from posttrain.errors import MemoryExhausted
from posttrain.memory import HostMemory
from posttrain.protocols import Memory, Usage

_T = TypeVar("_T")


@final
class CudaMemory:
    """What tensors take of a CUDA device, as torch's allocator counts them; what is free counts what it holds back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self) -> Usage:
        torch.cuda.reset_peak_memory_stats(self._device)
        free, _ = torch.cuda.mem_get_info(self._device)
        used = torch.cuda.memory_allocated(self._device)
        return Usage(used, torch.cuda.memory_reserved(self._device) + free, used)

    def peak(self, since: Usage) -> int:
        return torch.cuda.max_memory_allocated(self._device)


def memory_of_device(device: torch.device) -> Memory:
    """That of a device; of all but CUDA's it is the host's."""
    return CudaMemory(device) if device.type == "cuda" else HostMemory()


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
