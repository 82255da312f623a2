"""A case of a measuring script in a process of its own, and the memory of one call in it. Linux alone."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
KEEP_FREED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 26)}
"""Of glibc, for times: no block is mapped of its own, and nothing is given back. For memory, freed pages have to be."""


def in_a_process(script: str, case: object, variables: Mapping[str, str], *arguments: str) -> dict[str, Any]:
    """The JSON that the script's last line holds when called so, on one thread; ends this process where it fails."""
    done = subprocess.run([sys.executable, script, *arguments], env={**os.environ, **ONE_THREAD, **variables},
                          stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{case} failed; its message stands above")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def extra_mib(call: Callable[[], object]) -> float:
    """Peak of resident memory during the call over what was resident before it, MiB."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew at what is resident now
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return (peak - before) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])
