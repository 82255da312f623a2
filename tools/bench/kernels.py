"""Microseconds of kernels on a GPU, beside the form that core falls back to and the time that memory alone takes.

`triton_recurrence` against torch doubling, on 4 M float32 actions: episodes of 4096, lognormal lengths, one episode.
All results are asserted equal to the host's float64 solve first. Device time between two CUDA events, median over
repeats in turns; what a run before left in the cache is overwritten. "memory alone" is the least that can be moved, 12
bytes per action (x, decay, y), at the bandwidth of a large copy measured in the same run. "with checks" is
`reverse_recurrence` as users call it: it also asks whether all numbers are finite.

    python tools/bench/kernels.py [--actions 4194304] [--repeats 21]

Predicted for an H200, before any run (data sheet: 4.8 TB/s, so 10.5 microseconds for 4 M actions): at 4 M actions the
host, which marks the ends and starts three kernels, takes longer than the card: 60 to 120 microseconds. At 64 M, 40 to
60 % of the bandwidth, since 14 to 26 bytes are moved where 12 are the least. Doubling moves some 60 bytes per action
and step: 10 to 30 times as long as the kernel for episodes of 4096, 20 to 60 times for one long episode.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable

import numpy as np
import torch
from posttrain.ops import reverse_recurrence, use_kernels
from posttrain_backends.kernels.recurrence import TritonRecurrence

BYTES = 12
"""Per float32 action: x and decay are read, y is written."""
CACHE = 1 << 28
"""Bytes that are overwritten between two runs; more than any GPU's cache holds."""
Columns = tuple[torch.Tensor, torch.Tensor, np.ndarray]
"""decay [N], x [N], offsets [E+1]"""


def fixed_lengths(N: int, rng: np.random.Generator) -> np.ndarray:
    return np.append(np.arange(0, N, 4096), N)


def lognormal_lengths(N: int, rng: np.random.Generator) -> np.ndarray:
    """Median 1000 actions, 1.0 in the logarithm."""
    ends = np.cumsum(np.maximum(rng.lognormal(np.log(1000), 1.0, N // 500 + 1000).astype(np.int64), 1))
    return np.concatenate([[0], ends[ends < N], [N]])


def one_episode(N: int, rng: np.random.Generator) -> np.ndarray:
    return np.array([0, N])


LENGTHS = {"episodes of 4096": fixed_lengths, "lognormal lengths": lognormal_lengths, "one episode": one_episode}


def kernel_alone(decay: torch.Tensor, x: torch.Tensor, offsets: np.ndarray) -> torch.Tensor:
    y: torch.Tensor = TritonRecurrence()(decay, x, offsets)
    return y


def kernel_with_checks(decay: torch.Tensor, x: torch.Tensor, offsets: np.ndarray) -> torch.Tensor:
    with use_kernels([TritonRecurrence()]):
        y: torch.Tensor = reverse_recurrence(decay, x, offsets)
    return y


def doubling_with_checks(decay: torch.Tensor, x: torch.Tensor, offsets: np.ndarray) -> torch.Tensor:
    y: torch.Tensor = reverse_recurrence(decay, x, offsets)
    return y


FORMS: dict[str, Callable[..., torch.Tensor]] = {
    "triton_recurrence": kernel_alone, "triton_recurrence, with checks": kernel_with_checks,
    "doubling, with checks": doubling_with_checks}


def columns(lengths: str, N: int) -> Columns:
    rng = np.random.default_rng(0)
    offsets = LENGTHS[lengths](N, rng)
    decay, x = torch.full((N,), 0.99 * 0.95), torch.from_numpy(rng.standard_normal(N, dtype=np.float32))
    return decay, x, offsets


def assert_equal(form: str, on_card: Columns, expected: torch.Tensor) -> None:
    """Within 1e-5 of the largest result."""
    got = FORMS[form](*on_card)
    error = float((got.cpu().double() - expected).abs().max() / expected.abs().max())
    assert error <= 1e-5, f"{form} is {error} of the largest result off"


def seconds(form: Callable[..., torch.Tensor], *args: object) -> float:
    """Device time of one call, waits for the host included."""
    torch.empty(CACHE, dtype=torch.uint8, device="cuda").zero_()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
    torch.cuda.synchronize()
    start.record()
    form(*args)
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) * 1e-3


def missing() -> str:
    """Why no kernel can be measured here; empty where one can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "triton is not installed" if importlib.util.find_spec("triton") is None else ""


def bandwidth(repeats: int) -> float:
    """Bytes per second that a copy of 1 GiB reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * len(source) / statistics.median(seconds(target.copy_, source) for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--actions", type=int, default=1 << 22)
    parser.add_argument("--repeats", type=int, default=21)
    given = parser.parse_args()
    if reason := missing():
        print(f"not measured: {reason}")
        return
    least = BYTES * given.actions / bandwidth(given.repeats)
    print(f"{torch.cuda.get_device_name()}, {given.actions} float32 actions, median of {given.repeats}")
    for lengths in LENGTHS:
        decay, x, offsets = columns(lengths, given.actions)
        expected = reverse_recurrence(decay.double(), x.double(), offsets)
        on_card = (decay.cuda(), x.cuda(), offsets)
        for name in FORMS:
            assert_equal(name, on_card, expected)
        taken: dict[str, list[float]] = {name: [] for name in FORMS}
        for _ in range(given.repeats):  # in turns, so that a busy machine is busy for all
            for name, form in FORMS.items():
                taken[name].append(seconds(form, *on_card))
        print(f"{lengths}\n  {'memory alone':32s} {least * 1e6:10.1f} us")
        for name, times in taken.items():
            time = statistics.median(times)
            print(f"  {name:32s} {time * 1e6:10.1f} us   {least / time:5.0%} of the bandwidth")


if __name__ == "__main__":
    main()
