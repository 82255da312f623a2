"""The few array operations that everything else is arithmetic around, in NumPy, torch and JAX.

Two of them carry the library: `reverse_recurrence`, which is every return and advantage recursion, and `segment_sum`,
which is every statistic of a group or an episode. A third, `selective_log_softmax`, is what a policy's logits say of
its actions. A kernel may replace each (`use_kernels`); nothing else changes.
Imports no framework: an array that arrives has loaded its own. Knows nothing about episodes beyond their offsets.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar, final

import numpy as np

from posttrain.data import Array, to_numpy

if TYPE_CHECKING:  # protocols.py imports this module
    from posttrain.protocols import Kernel

Framework = Literal["numpy", "torch", "jax"]
K = TypeVar("K", bound="Kernel")


@final
@dataclass(frozen=True, slots=True)
class Ops:
    """An array namespace, and what the array API standard lacks. Differentiable where the framework differentiates."""

    xp: Any
    """The array-api-compat namespace."""
    stop_gradient: Callable[[Array], Array]
    """The same numbers, constant to a derivative."""
    segment_sum: Callable[[Array, Array, int], Array]
    """`segment_sum` of this module."""
    log_sigmoid: Callable[[Array], Array]
    """log(1 / (1 + exp(-x))), without overflow."""
    sigmoid: Callable[[Array], Array]
    """1 / (1 + exp(-x)), without overflow."""


def ops_of(array: Array) -> Ops:
    """The operations for the framework of `array` (JAX tracers included); raises `TypeError` for anything else.

    >>> float(ops_of(np.zeros(1)).sigmoid(np.zeros(1))[0])
    0.5
    """
    return _OPS[framework_of(array)]()


def framework_of(array: Array) -> Framework:
    """Whose array it is; raises `TypeError` where it belongs to none of the three."""
    from array_api_compat import is_jax_array, is_numpy_array, is_torch_array

    if is_numpy_array(array):
        return "numpy"
    if is_torch_array(array):
        return "torch"
    if is_jax_array(array):
        return "jax"
    raise TypeError(f"expected an array of NumPy, torch or JAX, got {type(array).__module__}.{type(array).__name__}")


def like(array: np.ndarray, x: Array) -> Array:
    """A NumPy array as an array of `x`'s framework, on `x`'s device, with its own dtype."""
    return _LIKE[framework_of(x)](array, x)


def widen(x: Array) -> Array:
    """`x` in float32 or better: half precision loses a recursion or a long sum entirely."""
    xp = ops_of(x).xp
    return xp.astype(x, xp.promote_types(x.dtype, xp.float32), copy=False)


def segment_sum(x: Array, ids: Array, n: int) -> Array:
    """Sums of `x` [N] or [k, N] over equal `ids` [N] in 0 .. n-1 -> [n] or [k, n]; float32 or better, differentiable.

    >>> segment_sum(np.array([1.0, 2.0, 4.0]), np.array([0, 2, 0]), 3)
    array([5., 0., 2.])
    """
    framework, x = framework_of(x), widen(x)
    kernel = _kernel("segment_sum", framework, x, ids, n)
    return _SEGMENT_SUM[framework](x, ids, n) if kernel is None else kernel(x, ids, n)


def segment_mean(x: Array, ids: np.ndarray, n: int) -> Array:
    """[n] means of `x` [N] over equal `ids`; 0 for a segment without members."""
    xp = ops_of(x).xp
    return segment_sum(x, ids, n) / xp.clip(segment_sum(xp.ones_like(x), ids, n), 1.0, None)


def segment_deviation(x: Array, ids: np.ndarray, n: int) -> Array:
    """[N] `x` minus the mean of its segment; exactly 0 where all members are equal, so also where there is one alone.

    The mean of equal numbers is rarely that number in floating point: eight rewards of 0.1 would leave a residue that
    a division by their standard deviation turns into an advantage.

    >>> segment_deviation(np.array([0.0, 1.0, 0.1]), np.array([0, 0, 1]), 2)
    array([-0.5,  0.5,  0. ])
    """
    xp = ops_of(x).xp
    member = np.zeros(n, np.int64)
    member[ids] = np.arange(len(ids))
    differs = segment_sum(x != x[member[ids]], ids, n) > 0
    return xp.where(differs[ids], x - segment_mean(x, ids, n)[ids], 0.0)


def segment_std(x: Array, ids: np.ndarray, n: int, ddof: int) -> Array:
    """[n] standard deviations of `x` [N] over equal `ids`, divisor count - ddof, in two passes; 0 where undefined."""
    xp = ops_of(x).xp
    squares = segment_sum(segment_deviation(x, ids, n) ** 2, ids, n)
    return xp.sqrt(squares / xp.clip(segment_sum(xp.ones_like(x), ids, n) - ddof, 1.0, None))


def whiten(x: Array, keep: np.ndarray | None = None) -> Array:
    """(x - mean) / sqrt(variance + 1e-8) over the kept actions, divisor n - 1; 0 for the others.

    Unchanged where fewer than two are kept: the variance is then undefined.
    """
    xp, x = ops_of(x).xp, widen(x)
    keep = np.ones(len(x), bool) if keep is None else keep
    if keep.sum() < 2:
        return xp.where(like(keep, x), x, 0.0)
    ids = (~keep).astype(np.int64)
    scale = xp.sqrt(segment_std(x, ids, 2, ddof=1)[0] ** 2 + 1e-8)
    return xp.where(like(keep, x), segment_deviation(x, ids, 2) / scale, 0.0)


def selective_log_softmax(logits: Array, chosen: Array, temperature: float = 1.0) -> Array:
    """log p(chosen) and the entropy of p = softmax(logits / temperature): logits [N, V], chosen [N] -> [2, N].

    In float32 or better, differentiable in the logits; log-probs are at most 0. A logit of -inf is a probability of 0.

    >>> selective_log_softmax(np.array([[0.0, 0.0, -np.inf]]), np.array([1])).round(4)
    array([[-0.6931],
           [ 0.6931]])
    """
    kernel = _kernel("selective_log_softmax", framework_of(logits), logits, chosen, temperature)
    if kernel is not None:
        return kernel(logits, chosen, temperature)
    ops, z = ops_of(logits), widen(logits) / temperature
    xp = ops.xp
    below = z - ops.stop_gradient(xp.max(z, axis=-1, keepdims=True))  # the largest is 0, so nothing overflows
    q = xp.exp(below)
    total = xp.sum(q, axis=-1)
    logprobs = xp.take_along_axis(below, chosen[:, None], axis=-1)[:, 0] - xp.log(total)
    entropy = xp.log(total) - xp.sum(q * xp.where(q > 0, below, 0.0), axis=-1) / total
    return xp.stack([logprobs, entropy])


def reverse_recurrence(decay: Array | float, x: Array, offsets: np.ndarray) -> Array:
    """y[t] = x[t] + decay[t] * y[t+1] within each episode; nothing crosses an episode and nothing carries a gradient.

    `x` [N] of any framework, `decay` a number or [N] of the same one (that of an episode's last action is ignored),
    `offsets` [E+1]. Half precision is computed and returned in float32. Outside a JAX trace, raises `ValueError` where
    an input is not finite, with the number of the episode. On the host this is a BLAS solve with a bidiagonal matrix
    (`tools/bench/recurrence.py` says why); on an accelerator and in a trace, doubling.

    >>> reverse_recurrence(0.5, np.array([1.0, 2.0, 4.0]), np.array([0, 2, 3]))
    array([2., 2., 4.])
    """
    ops, framework = ops_of(x), framework_of(x)
    xp = ops.xp
    x = widen(x)
    decay = _column_of(decay, x) if isinstance(decay, int | float) else widen(decay)
    if x.ndim != 1 or offsets[-1] != len(x) or decay.shape != x.shape:
        raise ValueError(f"reverse_recurrence takes a flat ragged column of {offsets[-1]} actions and a decay for each"
                         f" or one for all, got shapes {tuple(x.shape)} and {tuple(decay.shape)}")
    dtype = xp.promote_types(x.dtype, decay.dtype)
    x, decay = (ops.stop_gradient(xp.astype(column, dtype, copy=False)) for column in (x, decay))
    if len(x) == 0:
        return x
    traced = _is_traced(x) or _is_traced(decay)
    on_host = not traced and _device_of(framework, x) == "cpu"
    form = _kernel("reverse_recurrence", framework, decay, x, offsets) or (_bidiagonal_solve if on_host else _doubling)
    y = form(decay, x, offsets)
    if traced or _all_finite(y):
        return y
    _refuse_non_finite("x", x, offsets)
    _refuse_non_finite("decay", xp.where(like(_is_last(offsets), x), 0.0, decay), offsets)
    return _doubling(decay, x, offsets)  # an overflow, which in any other form may have reached other episodes


def _column_of(number: float, x: Array) -> Array:
    """[N] one number, where the host solves a view of it, which takes no memory; kernels want it contiguous."""
    xp = ops_of(x).xp
    if _kernels.get() or _is_traced(x) or _device_of(framework_of(x), x) != "cpu":
        return xp.full_like(x, number)
    return xp.broadcast_to(xp.full((), number, dtype=x.dtype), x.shape)


def _is_last(offsets: np.ndarray) -> np.ndarray:
    """[N] bool, whether an action is the last of its episode."""
    last = np.zeros(offsets[-1], bool)
    last[offsets[1:] - 1] = True
    return last


def _bidiagonal_solve(decay: Array, x: Array, offsets: np.ndarray) -> Array:
    """(I - shift(decay)) y = x by back substitution in BLAS, on the host.

    In windows that fit into the cache. The last row of a window is the first of the one behind it, solved already and
    left as it is, so every number is the one that a single solve gives.
    """
    from scipy.linalg import blas

    y, a = to_numpy(x).copy(), to_numpy(decay)
    solve = {np.dtype(np.float32): blas.stbsv, np.dtype(np.float64): blas.dtbsv}[y.dtype]
    band = np.zeros((min(_WINDOW, len(y)) + 1, 2), y.dtype)  # transposed: banded storage of an upper bidiagonal matrix
    for stop in range(len(y), 0, -_WINDOW):
        start, rows = max(stop - _WINDOW, 0), min(stop + 1, len(y)) - max(stop - _WINDOW, 0)
        np.negative(a[start:start + rows - 1], out=band[1:rows, 0])
        first, last = np.searchsorted(offsets, (start, start + rows))
        band[offsets[first:last] - start, 0] = 0.0  # column t holds the decay of t - 1
        y[start:start + rows] = solve(1, band[:rows].T, y[start:start + rows], diag=1, overwrite_x=1)
    return like(y, x)


_WINDOW = 1 << 16


def _doubling(decay: Array, x: Array, offsets: np.ndarray) -> Array:
    """The recurrence in log2(longest episode) steps over all actions at once, for accelerators and traces.

    Pairs (a, y) compose to (a a', y + a y'). Composition stops at a = 0 instead of multiplying by it, so no number of
    one episode touches another. Products of decays have to be finite, as they are for decays up to 1.
    """
    xp = ops_of(x).xp
    a, y, span = xp.where(like(_is_last(offsets), x), 0.0, decay), x, 1
    with np.errstate(over="ignore", invalid="ignore"):
        while span < np.diff(offsets).max():
            end = xp.zeros_like(x[:span])
            a_next, y_next = xp.concatenate([a[span:], end]), xp.concatenate([y[span:], end])
            y = xp.where(a != 0, y + a * y_next, y)
            a = xp.where(a != 0, a * a_next, 0.0)
            span *= 2
    return y


def _all_finite(y: Array) -> bool:
    """A finite sum has no term that is not; only where it is not finite (it may overflow), each term is looked at.

    Whatever is not finite in a recurrence's inputs is not finite in its result, so the result alone is checked.
    """
    xp = ops_of(y).xp
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(xp.isfinite(xp.sum(y))) or bool(xp.all(xp.isfinite(y)))


def _refuse_non_finite(name: str, column: Array, offsets: np.ndarray) -> None:
    numbers = to_numpy(column)
    for i in np.flatnonzero(~np.isfinite(numbers))[:1]:
        episode = np.searchsorted(offsets, i, side="right") - 1
        raise ValueError(f"{name} of reverse_recurrence is {numbers[i]} at action {i - offsets[episode]} of episode "
                         f"{episode}; find what produced it: it would reach every earlier action of the episode")


_kernels: ContextVar[tuple[Kernel, ...]] = ContextVar("kernels", default=())


@contextmanager
def use_kernels(kernels: Iterable[Kernel]) -> Iterator[None]:
    """Within the block, `reverse_recurrence`, `segment_sum` and `selective_log_softmax` use the first of these that
    fits.

    A kernel is called as `(decay[N], x[N], offsets[E+1])`, both columns of one dtype, as `(x, ids, n)`, or as
    `(logits[N, V], chosen[N], temperature)`. Its `device` is `cpu`, or torch's or JAX's own name of the accelerator.
    """
    token = _kernels.set(tuple(kernels))
    try:
        yield
    finally:
        _kernels.reset(token)


def _kernel(op: str, framework: Framework, *args: Any) -> Kernel | None:
    kernels = _kernels.get()
    return fitting(kernels, op, framework, *args) if kernels else None


def fitting(kernels: Iterable[K], op: str, framework: Framework, *args: Any) -> K | None:
    """The first of these whose op, framework and device are those of a call, and which supports its arguments."""
    device = _device_of(framework, args[0])
    return next((k for k in kernels if (k.op, k.framework, k.device) == (op, framework, device) and k.supports(*args)),
                None)


def _device_of(framework: Framework, x: Array) -> str:
    """`cpu`, or the framework's name of the accelerator; in a JAX trace, where its default backend computes."""
    if _is_traced(x):
        return str(sys.modules["jax"].default_backend())
    return _DEVICE[framework](x)


def _is_traced(x: Array) -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, jax.core.Tracer)


@cache
def _numpy_ops() -> Ops:
    from array_api_compat import numpy as xp
    from scipy.special import expit, log_expit

    return Ops(xp, lambda x: x, segment_sum, log_expit, expit)


@cache
def _torch_ops() -> Ops:
    from array_api_compat import torch as xp

    functional = sys.modules["torch"].nn.functional
    return Ops(xp, lambda x: x.detach(), segment_sum, functional.logsigmoid, functional.sigmoid)


@cache
def _jax_ops() -> Ops:
    jax = sys.modules["jax"]
    return Ops(jax.numpy, jax.lax.stop_gradient, segment_sum, jax.nn.log_sigmoid, jax.nn.sigmoid)


def _numpy_segment_sum(x: np.ndarray, ids: np.ndarray, n: int) -> np.ndarray:
    sums = np.stack([np.bincount(ids, row, n) for row in np.atleast_2d(x)])
    return sums.reshape(*x.shape[:-1], n).astype(x.dtype)


def _torch_segment_sum(x: Array, ids: Array, n: int) -> Array:
    ids = sys.modules["torch"].as_tensor(ids, device=x.device)
    return x.new_zeros((*x.shape[:-1], n)).index_add(-1, ids, x)


def _jax_segment_sum(x: Array, ids: Array, n: int) -> Array:
    return sys.modules["jax"].numpy.zeros((*x.shape[:-1], n), x.dtype).at[..., ids].add(x)


def _jax_like(array: np.ndarray, x: Array) -> Array:
    jax = sys.modules["jax"]
    return jax.numpy.asarray(array) if _is_traced(x) else jax.device_put(array, next(iter(x.devices())))


_OPS: Mapping[Framework, Callable[[], Ops]] = {"numpy": _numpy_ops, "torch": _torch_ops, "jax": _jax_ops}
_SEGMENT_SUM: Mapping[Framework, Callable[[Array, Array, int], Array]] = {
    "numpy": _numpy_segment_sum, "torch": _torch_segment_sum, "jax": _jax_segment_sum}
_LIKE: Mapping[Framework, Callable[[np.ndarray, Array], Array]] = {
    "numpy": lambda array, x: array, "jax": _jax_like,
    "torch": lambda array, x: sys.modules["torch"].as_tensor(array, device=x.device)}
_DEVICE: Mapping[Framework, Callable[[Array], str]] = {
    "numpy": lambda x: "cpu", "torch": lambda x: x.device.type, "jax": lambda x: next(iter(x.devices())).platform}
