"""Arrays of NumPy, torch and JAX for tests: a test that asks for a framework that is not installed is skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from posttrain.testing import random_data


def _torch(a: np.ndarray) -> Any:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch.from_numpy(np.array(a))


def _jax(a: np.ndarray) -> Any:
    return pytest.importorskip("jax").numpy.asarray(a)


FRAMEWORKS: dict[str, Callable[[np.ndarray], Any]] = {"numpy": np.array, "torch": _torch, "jax": _jax}
"""Name -> how a NumPy array becomes one of its arrays."""


def _numpy_bfloat16(a: np.ndarray) -> Any:
    return np.array(a, pytest.importorskip("ml_dtypes").bfloat16)


def _torch_bfloat16(a: np.ndarray) -> Any:
    return _torch(a).bfloat16()


def _torch_float16(a: np.ndarray) -> Any:
    return _torch(a).half()


def _jax_bfloat16(a: np.ndarray) -> Any:
    return _jax(a).astype("bfloat16")


HALVES: dict[str, Callable[[np.ndarray], Any]] = {
    "numpy float16": lambda a: np.array(a, np.float16), "numpy bfloat16": _numpy_bfloat16,
    "torch bfloat16": _torch_bfloat16, "torch float16": _torch_float16, "jax bfloat16": _jax_bfloat16}
"""The same in half precision."""


@contextmanager
def in_float64(framework: str) -> Iterator[None]:
    """JAX computes in float32 unless told."""
    if framework == "jax":
        pytest.importorskip("jax")
    with random_data.in_float64(framework):
        yield
