"""Memory of torch's devices: how much is in use, and running out of it as core's `MemoryExhausted`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from posttrain.errors import MemoryExhausted
from posttrain.memory import HostMemory
from posttrain.protocols import Memory, Usage
from posttrain.watermark import Bytes, Watermark

_T = TypeVar("_T")

SNAPSHOT = "out_of_memory.pickle"
"""In a run directory: to be looked at with pytorch.org/memory_viz."""
_ENTRIES = 100_000
"""Allocations whose places in the code are remembered for a snapshot; the oldest are forgotten."""


@final
class CudaMemory:
    """What tensors take of a CUDA device, as torch's allocator counts them; what is free counts what it holds back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self) -> Usage:
        _cuda_watermark(self._device).reset()
        free, _ = torch.cuda.mem_get_info(self._device)
        used = torch.cuda.memory_allocated(self._device)
        held = torch.cuda.memory_reserved(self._device)
        return Usage(used, held + free, held, held)

    def peak(self, since: Usage) -> int:
        return torch.cuda.max_memory_allocated(self._device)


def memory_of_device(device: torch.device) -> Memory:
    """That of a device; of all but CUDA's it is the host's."""
    return CudaMemory(device) if device.type == "cuda" else HostMemory()


def watermark_of(device: torch.device) -> Watermark | None:
    """See `posttrain.protocols.Accounted.watermark`."""
    return _cuda_watermark(device) if device.type == "cuda" else None


@cache
def _cuda_watermark(device: torch.device) -> Watermark:
    def level() -> Bytes:
        return {"allocated": torch.cuda.memory_allocated(device), "reserved": torch.cuda.memory_reserved(device)}

    def peak() -> Bytes:
        return {"allocated": torch.cuda.max_memory_allocated(device),
                "reserved": torch.cuda.max_memory_reserved(device)}
    return Watermark(level, peak, lambda: torch.cuda.reset_peak_memory_stats(device))


def snapshot_where_it_fails(device: torch.device, folder: Path) -> None:
    """Write a snapshot of CUDA's allocator into the folder when it is out of memory, also where the step is then done
    again in smaller parts; of several, the last one stays."""
    if device.type != "cuda":
        return
    torch.cuda.memory._record_memory_history(max_entries=_ENTRIES)

    def write(*told: Any) -> None:
        torch.cuda.memory._dump_snapshot(str(folder / SNAPSHOT))  # type: ignore[no-untyped-call]  # torch leaves it so
    attach: Callable[[Callable[..., None]], None] = torch._C._cuda_attach_out_of_memory_observer  # type: ignore[attr-defined]  # torch leaves it undeclared
    attach(write)


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
