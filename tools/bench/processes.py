"""What scripts here share that measure each candidate in a process of its own: no measurement by itself."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
KEEP_FREED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 26)}
"""Of glibc: no block is mapped of its own, and nothing is given back."""
Numbers = Mapping[str, list[float]]
"""What a process measured, several times each."""


def in_a_process(script: str, arguments: Sequence[str], variables: Mapping[str, str]) -> Numbers:
    """The JSON that a script prints as the last line, run with these arguments."""
    done = subprocess.run([sys.executable, script, *arguments], env={**os.environ, **variables},
                          stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed; its message stands above")
    measured: Numbers = json.loads(done.stdout.splitlines()[-1])
    return measured


def in_rounds(script: str, names: Sequence[str], rounds: int, calls: int) -> dict[str, dict[str, float]]:
    """Medians of what `--case NAME --calls N` of a script measures, one thread, the names in turn in each round."""
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for _ in range(rounds):
        for name in names:
            numbers = in_a_process(script, ["--case", name, "--calls", str(calls)], ONE_THREAD)
            print(name, numbers, file=sys.stderr, flush=True)
            for key, values in numbers.items():
                taken[name].setdefault(key, []).extend(values)
    return {name: medians(numbers) for name, numbers in taken.items()}


def extra_peak(call: Callable[[], object]) -> float:
    """MiB of the peak of resident memory during a call, its result included, over what was resident before it."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew at what is resident now
    before = resident("VmRSS")
    result = call()
    peak = resident("VmHWM")
    del result
    return peak - before


def resident(key: str) -> float:
    """MiB of `VmRSS` or `VmHWM`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) / 1024


def medians(taken: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(numbers) for name, numbers in taken.items()}
