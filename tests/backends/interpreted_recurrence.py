"""The recurrence's Triton kernel on the host, against a literal float64 loop, and its contract.

Not collected by its name: Triton's interpreter has to be chosen before Triton is imported, so `test_triton_recurrence`
runs this file in a process of its own. Small blocks, since the interpreter takes half a millisecond per action; they
cross one another often, and their carries fill more than one block, too.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from posttrain.data import offsets_of
from posttrain.ops import reverse_recurrence, use_kernels
from posttrain.testing import KernelContract
from posttrain_backends.kernels.recurrence import TritonRecurrence

TOLERANCE = {np.float32: 1e-5, np.float64: 1e-12}
"""Relative to the largest result."""
LENGTHS = {
    "one action": [1], "one block": [8], "one action more than a block": [9], "one episode over many blocks": [150],
    "episodes of one action": [1] * 20, "ends at the ends of blocks": [8, 16, 8], "ragged": [3, 1, 40, 2, 7, 1, 30, 5]}


def looped(decay: np.ndarray, x: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    y: np.ndarray = x.astype(np.float64)
    for start, stop in pairwise(offsets):
        for t in range(stop - 2, start - 1, -1):
            y[t] += float(decay[t]) * y[t + 1]
    return y


def columns(lengths: list[int], dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng, offsets = np.random.default_rng(len(lengths)), offsets_of(np.array(lengths))
    decay = rng.uniform(0.8, 1.0, offsets[-1]).astype(dtype)
    decay[rng.random(len(decay)) < 0.05] = 0.0
    return decay, rng.normal(size=len(decay)).astype(dtype), offsets


class TestContract(KernelContract):
    components = (TritonRecurrence(block=64, device="cpu"),)


@pytest.mark.parametrize("block", [8, 64])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", LENGTHS)
def test_equals_a_loop(name: str, dtype: Any, block: int) -> None:
    decay, x, offsets = columns(LENGTHS[name], dtype)
    kernel = TritonRecurrence(block=block, device="cpu")
    got = kernel(torch.from_numpy(decay), torch.from_numpy(x), offsets)
    expected = looped(decay, x, offsets)
    assert got.numpy().dtype == dtype
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE[dtype] * np.abs(expected).max())


def test_nothing_of_a_neighbour_reaches_an_episode() -> None:
    decay, x, offsets = columns([5, 9, 4, 30], np.float64)
    kernel = TritonRecurrence(block=8, device="cpu")
    together = kernel(torch.from_numpy(decay), torch.from_numpy(x), offsets).numpy()
    for start, stop in pairwise(offsets):
        own = (torch.from_numpy(column[start:stop]) for column in (decay, x))
        alone = kernel(*own, np.array([0, stop - start]))
        np.testing.assert_allclose(together[start:stop], alone, rtol=1e-12)


def test_the_decay_of_a_last_action_is_not_looked_at() -> None:
    decay, x, offsets = columns([5, 9, 4], np.float64)
    kernel, other = TritonRecurrence(block=8, device="cpu"), decay.copy()
    other[offsets[1:] - 1] = np.nan
    np.testing.assert_array_equal(kernel(*map(torch.from_numpy, (decay, x)), offsets),
                                  kernel(*map(torch.from_numpy, (other, x)), offsets))


def test_core_calls_it_and_names_the_episode_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    compute = TritonRecurrence.__call__

    def counted(self: TritonRecurrence, *args: Any) -> Any:
        calls.append(len(args[1]))
        return compute(self, *args)

    monkeypatch.setattr(TritonRecurrence, "__call__", counted)
    x, offsets = torch.tensor([1.0, 2.0, 4.0]), np.array([0, 2, 3])
    with use_kernels([TritonRecurrence(block=2, device="cpu")]):
        assert reverse_recurrence(0.5, x, offsets).tolist() == [2.0, 2.0, 4.0]
        assert calls == [3]
        x[2] = torch.nan
        with pytest.raises(ValueError, match="x of reverse_recurrence is nan at action 0 of episode 1"):
            reverse_recurrence(0.5, x, offsets)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # NumPy interprets
def test_an_overflow_stays_in_its_episode() -> None:
    x, offsets = torch.tensor([1.0, 3e38, 3e38]), np.array([0, 1, 3])
    with use_kernels([TritonRecurrence(block=2, device="cpu")]):
        assert reverse_recurrence(1.0, x, offsets).tolist() == [1.0, float("inf"), pytest.approx(3e38)]
