"""What the host says of the memory of this process: what is in use, what may be, and the peak. Linux tells all of it.

Held is what `RLIMIT_DATA` counts: private memory that was asked for. The kernel keeps no peak of that, only of what was
touched (`VmHWM`, which can be reset); a peak is taken to rise in both alike. In use is what is held but for what malloc
was given back and keeps; how much of that is used at a peak nobody knows, so a peak is told only where most of what was
needed came new.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, final

from posttrain.protocols import Memory, Metered, Usage
from posttrain.watermark import Watermark

HOST = "host"
"""Name of the mark of this process's memory."""
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CGROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Files of a container's limit and use, as the second and the first version of cgroups name them."""
_NO_LIMIT = 2**60
"""Bytes from which on a limit is none."""


@final
class HostMemory:
    """Memory of this process. Where the system is not Linux, nothing is known of it."""

    def start(self) -> Usage:
        """The limit is the nearest of: the process's own (`RLIMIT_DATA`, `RLIMIT_AS`), its container's, the machine's.
        """
        status = _status()
        if not status:
            return Usage()
        RESIDENT.reset()
        held = status["VmData"]
        return Usage(max(0, held - _kept()), held + min(_rooms(status)), held, status["VmRSS"])

    def peak(self, since: Usage) -> int:
        status = _status()
        if not status:
            return 0
        new = max(status["VmHWM"] - since.resident, status["VmData"] - since.held)
        return since.held + new if 2 * new >= since.held - since.used else 0


def memory_of(model: object) -> Memory:
    """That of a scorer's or a sampler's device."""
    return model.memory() if isinstance(model, Metered) else HostMemory()


def _status() -> Mapping[str, int]:
    """Bytes by name, from the kernel; empty where it is not Linux."""
    if not sys.platform.startswith("linux"):
        return {}
    fields = (line.split() for line in _STATUS.read_text().splitlines() if line.startswith("Vm"))
    return {name.rstrip(":"): 1024 * int(value) for name, value, *_ in fields}


class _Mallinfo2(ctypes.Structure):
    """glibc's account of malloc, `struct mallinfo2`."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


@cache
def _account() -> Callable[[], Any]:
    """Where glibc is not the C library, of nothing."""
    found = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if found is None:
        return _Mallinfo2
    found.restype = _Mallinfo2
    account: Callable[[], Any] = found
    return account


def _kept() -> int:
    """Bytes that malloc keeps free for later."""
    return int(_account()().fordblks)


def _forget_peak() -> None:
    """Let `VmHWM` begin at what is resident now; without the right to do so the peak is that of the whole process."""
    if not sys.platform.startswith("linux"):
        return
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


RESIDENT = Watermark(level=lambda: {HOST: _status().get("VmRSS", 0)}, peak=lambda: {HOST: _status().get("VmHWM", 0)},
                     reset=_forget_peak)
"""Of the memory of this process that is in the machine's; 0 where the system is not Linux."""


def _rooms(status: Mapping[str, int]) -> Iterator[int]:
    """Bytes that are free under each limit there is."""
    import resource

    import psutil

    yield psutil.virtual_memory().available
    for limit, used in ((resource.RLIMIT_DATA, status["VmData"]), (resource.RLIMIT_AS, status["VmSize"])):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            yield max(0, soft - used)
    for limit_file, used_file in _CGROUPS:
        most, now = (_number(Path("/sys/fs/cgroup") / name) for name in (limit_file, used_file))
        if 0 < most < _NO_LIMIT:
            yield max(0, most - now)


def _number(path: Path) -> int:
    """The number in a file; 0 where there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0
