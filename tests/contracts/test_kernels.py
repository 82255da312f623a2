"""The contract of kernels, kept by plain kernels of every op in three frameworks."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, final

import numpy as np
from posttrain.data import Array
from posttrain.hookspecs import Component, hookimpl
from posttrain.ops import framework_of
from posttrain.testing import KernelContract


@final
@dataclass(frozen=True, slots=True)
class LoopedRecurrence:
    """y[t] = x[t] + decay[t] y[t+1] as a loop over the actions of NumPy or torch columns in float32 or float64."""

    framework: Literal["numpy", "torch"] = "numpy"
    """Whose arrays it takes."""

    @property
    def op(self) -> str:
        return "reverse_recurrence"

    @property
    def device(self) -> str:
        return "cpu"

    def supports(self, *args: Array) -> bool:
        decay, x, _ = args
        return x.dtype == decay.dtype and str(x.dtype).removeprefix("torch.") in ("float32", "float64")

    def __call__(self, *args: Array) -> Array:
        decay, x, offsets = args
        y = np.array(x) if self.framework == "numpy" else x.clone()
        last = set((offsets[1:] - 1).tolist())
        for t in range(len(y) - 2, -1, -1):
            if t not in last:
                y[t] += decay[t] * y[t + 1]
        return y


def _numpy_sums(x: np.ndarray, ids: np.ndarray, n: int) -> np.ndarray:
    sums = np.zeros((*x.shape[:-1], n), x.dtype)
    np.add.at(sums, (..., ids), x)
    return sums


def _torch_sums(x: Array, ids: Array, n: int) -> Array:
    torch = import_module("torch")
    one_hot = torch.nn.functional.one_hot(torch.as_tensor(ids), n).to(x.dtype)
    return x @ one_hot if len(ids) else x.new_zeros((*x.shape[:-1], n))


def _jax_sums(x: Array, ids: Array, n: int) -> Array:
    jax = import_module("jax")
    return jax.ops.segment_sum(x.T, jax.numpy.asarray(ids), n).T


SUMS = {"numpy": _numpy_sums, "torch": _torch_sums, "jax": _jax_sums}


@final
@dataclass(frozen=True, slots=True)
class PlainSums:
    """Segment sums by each framework's own means; columns alone where `rows` is off."""

    framework: Literal["numpy", "torch", "jax"] = "numpy"
    """Whose arrays it takes."""
    rows: bool = True
    """Whether [k, N] is supported, too."""

    @property
    def op(self) -> str:
        return "segment_sum"

    @property
    def device(self) -> str:
        return "cpu"

    def supports(self, *args: Array) -> bool:
        x = args[0]
        return (self.rows or x.ndim == 1) and framework_of(x) == self.framework \
            and str(x.dtype).removeprefix("torch.") in ("float32", "float64")

    def __call__(self, *args: Array) -> Array:
        return SUMS[self.framework](*args)


def _numpy_log_softmax(z: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    from scipy.special import entr, log_softmax

    log_p = log_softmax(z, axis=-1)
    return np.stack([np.take_along_axis(log_p, chosen[:, None], -1)[:, 0], entr(np.exp(log_p)).sum(-1)])


def _torch_log_softmax(z: Array, chosen: Array) -> Array:
    torch = import_module("torch")
    log_p = torch.log_softmax(z, -1)
    p_log_p = log_p.exp() * torch.where(log_p > -torch.inf, log_p, 0.0)
    return torch.stack([log_p.gather(1, chosen[:, None])[:, 0], -p_log_p.sum(-1)])


def _jax_log_softmax(z: Array, chosen: Array) -> Array:
    jax = import_module("jax")
    log_p = jax.nn.log_softmax(z)
    p_log_p = jax.numpy.exp(log_p) * jax.numpy.where(log_p > -jax.numpy.inf, log_p, 0.0)
    return jax.numpy.stack([jax.numpy.take_along_axis(log_p, chosen[:, None], -1)[:, 0], -p_log_p.sum(-1)])


LOG_SOFTMAX = {"numpy": _numpy_log_softmax, "torch": _torch_log_softmax, "jax": _jax_log_softmax}


@final
@dataclass(frozen=True, slots=True)
class PlainLogSoftmax:
    """Log-probs and entropies by the log-softmax that each framework brings."""

    framework: Literal["numpy", "torch", "jax"] = "numpy"
    """Whose arrays it takes."""

    @property
    def op(self) -> str:
        return "selective_log_softmax"

    @property
    def device(self) -> str:
        return "cpu"

    def supports(self, *args: Array) -> bool:
        return str(args[0].dtype).removeprefix("torch.") in ("float32", "float64")

    def __call__(self, *args: Array) -> Array:
        logits, chosen, temperature = args
        return LOG_SOFTMAX[self.framework](logits / temperature, chosen)


@hookimpl
def components() -> Iterable[Component]:
    """This module is a plugin."""
    return [Component("kernel", "looped", f"{__name__}:LoopedRecurrence", "the recurrence as a loop"),
            Component("kernel", "plain_sums", f"{__name__}:PlainSums", "segment sums"),
            Component("kernel", "plain_log_softmax", f"{__name__}:PlainLogSoftmax", "log-probs and entropies")]


class TestPlainKernels(KernelContract):
    components = (LoopedRecurrence(), LoopedRecurrence("torch"), PlainSums(), PlainSums(rows=False),
                  PlainSums("torch"), PlainSums("jax"), PlainLogSoftmax(), PlainLogSoftmax("torch"),
                  PlainLogSoftmax("jax"))
    plugins = (sys.modules[__name__],)
