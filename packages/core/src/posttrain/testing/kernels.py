"""Contract of kernels: a faster form of an op of `posttrain.ops` is the same op, for all that it says it supports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Literal, cast

import numpy as np
import pytest

from posttrain.data import Array, offsets_of, to_numpy
from posttrain.ops import (
    framework_of,
    like,
    ops_of,
    reverse_recurrence,
    segment_sum,
    selective_log_softmax,
    use_kernels,
)
from posttrain.protocols import Kernel
from posttrain.testing.contract import ComponentContract, named
from posttrain.testing.random_data import in_float64, installed_frameworks

Op = Literal["reverse_recurrence", "segment_sum", "selective_log_softmax"]
OPS: Mapping[Op, Callable[..., Array]] = {
    "reverse_recurrence": reverse_recurrence, "segment_sum": segment_sum,
    "selective_log_softmax": selective_log_softmax}
SIZES = (0, 1, 2, 7, 33, 257, 1025)
"""Numbers of actions, or of logits; odd ones leave the last block of a kernel half empty."""
TOLERANCE: Mapping[str, float] = {"float32": 2e-5, "float64": 1e-11}
"""Relative to the largest sum of absolute values: the order of a sum is a kernel's own."""


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Arguments of an op, what they are, and how large its results may be, and what its gradient is computed from."""

    name: str
    args: tuple[Any, ...]
    scale: float
    slope_scale: float = 1.0


class KernelContract(ComponentContract):
    """Contract of kernels (`posttrain.protocols.Kernel`). The reference is the op itself: no oracle is asked for.

    A kernel whose framework or device is not there is not measured.
    """

    kind = "kernel"
    protocol = Kernel
    tolerance: ClassVar[float] = 1.0
    """Factor on `TOLERANCE`, for a kernel that trades accuracy for speed."""

    def test_names_an_op_that_there_is(self, component: Kernel) -> None:
        """Core asks by op, framework and device; another name is never asked for."""
        assert component.op in OPS, f"op {component.op!r} is not one of {', '.join(OPS)}"
        assert component.framework in ("numpy", "torch", "jax"), f"framework {component.framework!r} is none of three"
        assert component.device, "device is `cpu` or the accelerator's name"

    def test_equals_the_reference(self, component: Kernel) -> None:
        """Odd sizes, nothing at all, episodes of one action, strided columns, huge and equal numbers."""
        used = 0
        for dtype, case in self._cases(component):
            if not component.supports(*case.args):
                continue
            used += 1
            expected, got = OPS[cast(Op, component.op)](*case.args), component(*case.args)
            where = f"{case.name}, {dtype}"
            assert framework_of(got) == component.framework, f"{where}: the result is an array of {framework_of(got)}"
            assert got.shape == expected.shape, f"{where}: shape {tuple(got.shape)}, not {tuple(expected.shape)}"
            assert got.dtype == expected.dtype, f"{where}: {got.dtype}, not {expected.dtype}"
            atol = self.tolerance * TOLERANCE[dtype] * case.scale
            np.testing.assert_allclose(to_numpy(got), to_numpy(expected), rtol=0, atol=atol,
                                       err_msg=f"{named(component)} and the reference differ: {where}")
        assert used, f"{named(component)}.supports refuses every case: it would never be used"

    def test_core_computes_the_same_with_it(self, component: Kernel) -> None:
        """Where `supports` says no, core falls back; with the kernel or without, the numbers are the op's."""
        op = OPS[cast(Op, component.op)]
        for dtype, case in self._cases(component):
            expected = op(*case.args)
            with use_kernels([component]):
                got = op(*case.args)
            atol = self.tolerance * TOLERANCE[dtype] * case.scale
            np.testing.assert_allclose(to_numpy(got), to_numpy(expected), rtol=0, atol=atol,
                                       err_msg=f"{component.op} with {named(component)}: {case.name}, {dtype}")

    def test_says_what_it_does_not_support(self, component: Kernel) -> None:
        """`supports` answers with a bool and never raises, whatever the arguments; what it accepts can be computed."""
        make = self._maker(component)
        with in_float64(component.framework):
            strange = [Case("float16", _ARGS[cast(Op, component.op)](lambda x: make(_half(x)), 7, 0), 1.0),
                       Case("whole numbers", _ARGS[cast(Op, component.op)](lambda x: make(_whole(x)), 7, 0), 1.0)]
            for case in [*(c for _, c in self._cases(component)), *strange]:
                try:
                    answer = component.supports(*case.args)
                except Exception as error:
                    raise AssertionError(f"{named(component)}.supports raises {type(error).__name__} ({error}) for "
                                         f"{case.name}; it must answer False") from error
                assert isinstance(answer, bool | np.bool_), f"supports answers {answer!r} for {case.name}, not a bool"
                if answer:
                    try:
                        component(*case.args)
                    except Exception as error:
                        raise AssertionError(f"{named(component)} supports {case.name} and raises "
                                             f"{type(error).__name__}: {error}") from error

    def test_has_the_gradient_of_the_reference(self, component: Kernel) -> None:
        """All but the recurrence are differentiated inside losses; that carries no gradient."""
        if component.framework == "numpy":
            return
        op = OPS[cast(Op, component.op)]
        for dtype, case in self._cases(component):
            at = _COLUMN[cast(Op, component.op)]
            if not component.supports(*case.args) or not case.args[at].shape[-1]:
                continue

            def weighted(x: Array, case: Case = case, at: int = at) -> Array:
                args = (*case.args[:at], x, *case.args[at + 1:])
                y = op(*args)
                return (y * _like(np.cos(np.arange(y.shape[-1])), y)).sum()
            expected = _GRADIENT[component.framework](weighted, case.args[at])
            with use_kernels([component]):
                got = _GRADIENT[component.framework](weighted, case.args[at])
            np.testing.assert_allclose(got, expected, rtol=self.tolerance * TOLERANCE[dtype],
                                       atol=self.tolerance * TOLERANCE[dtype] * case.slope_scale,
                                       err_msg=f"the gradient through {named(component)} is not that of "
                                               f"{component.op}: {case.name}, {dtype}")

    def test_works_in_a_trace(self, component: Kernel) -> None:
        """JAX compiles the loop: a kernel sees tracers there, whose numbers nobody knows."""
        if component.framework != "jax":
            return
        dtype, case = next((d, c) for d, c in self._cases(component) if c.name.startswith("33 "))
        jax, op = import_module("jax"), OPS[cast(Op, component.op)]
        at = _COLUMN[cast(Op, component.op)]
        with in_float64("jax"), use_kernels([component]):
            got = jax.jit(lambda x: op(*case.args[:at], x, *case.args[at + 1:]))(case.args[at])
        np.testing.assert_allclose(to_numpy(got), to_numpy(op(*case.args)), rtol=0,
                                   atol=self.tolerance * TOLERANCE[dtype] * case.scale)

    def test_changes_no_input(self, component: Kernel) -> None:
        """The columns are used again by everything behind it."""
        for _, case in self._cases(component):
            arrays = [x for x in case.args if hasattr(x, "shape")]
            before = [to_numpy(x).copy() for x in arrays]
            if component.supports(*case.args):
                component(*case.args)
            for x, saved in zip(arrays, before, strict=True):
                assert np.array_equal(to_numpy(x), saved), f"{named(component)} changed an argument: {case.name}"

    def test_shows_what_is_not_finite(self, component: Kernel) -> None:
        """A NaN that a kernel hides would train a model: core looks at the result alone, and names the episode."""
        make = self._maker(component)
        args = _ARGS[cast(Op, component.op)](lambda x: make(_poisoned(x)), 33, 1)
        with in_float64(component.framework):
            if not component.supports(*args):
                return
            assert not np.isfinite(to_numpy(component(*args))).all(), f"{named(component)} hides a NaN of its input"

    # ---- arguments

    def _maker(self, component: Kernel) -> Callable[[np.ndarray], Array]:
        """How an array of the kernel's framework is made on its device; skips where either is not there."""
        makers: dict[str, Callable[[np.ndarray], Array]] = {"numpy": np.array, **installed_frameworks()}
        if component.framework not in makers:
            pytest.skip(f"not measured: {component.framework} is not installed")
        make = makers[component.framework]
        if component.device == "cpu":
            return make
        place = _PLACE[component.framework](component.device)
        if place is None:
            pytest.skip(f"not measured: {component.framework} sees no {component.device} here")
        return lambda x: place(make(x))

    def _cases(self, component: Kernel) -> Iterator[tuple[str, Case]]:
        """(dtype, arguments) of every shape and kind of number."""
        make, sizes = self._maker(component), (0, 1, 33) if component.framework == "jax" else SIZES
        with in_float64(component.framework):
            for dtype in TOLERANCE:
                def cast_to(x: np.ndarray, dtype: str = dtype) -> Array:
                    return make(x.astype(dtype) if x.dtype.kind == "f" else x)
                for size in sizes:
                    yield from ((dtype, case) for case in _CASES[cast(Op, component.op)](cast_to, size))


def _recurrence(make: Callable[[np.ndarray], Array], n: int, seed: int) -> tuple[Any, ...]:
    """decay, x, offsets of `n` actions in ragged episodes, some of one action."""
    rng = np.random.default_rng((n, seed))
    lengths = np.diff(np.unique(np.concatenate([[0, n], rng.integers(0, n + 1, n // 4)])))
    return make(rng.uniform(0.0, 1.0, n)), make(rng.normal(size=n)), offsets_of(lengths)


def _segments(make: Callable[[np.ndarray], Array], n: int, seed: int) -> tuple[Any, ...]:
    """x, ids, number of segments, one of which at least is empty."""
    rng = np.random.default_rng((n, seed))
    segments = n // 3 + 2
    return make(rng.normal(size=n)), rng.integers(0, segments - 1, n), segments


def _logits(make: Callable[[np.ndarray], Array], n: int, seed: int) -> tuple[Any, ...]:
    """2 rows of `n` logits, the last of which is chosen in the second; no row where `n` is 0."""
    rng = np.random.default_rng((n, seed))
    chosen = rng.integers(0, n, 2) if n else np.zeros(0, np.int64)
    chosen[1:] = n - 1
    return make(3.0 * rng.normal(size=(len(chosen), max(n, 1)))), make(chosen), 0.7


_ARGS: Mapping[Op, Callable[[Callable[[np.ndarray], Array], int, int], tuple[Any, ...]]] = {
    "reverse_recurrence": _recurrence, "segment_sum": _segments, "selective_log_softmax": _logits}
_COLUMN: Mapping[Op, int] = {"reverse_recurrence": 1, "segment_sum": 0, "selective_log_softmax": 0}
"""The argument whose gradient somebody may ask for."""


def _recurrence_cases(make: Callable[[np.ndarray], Array], n: int) -> Iterator[Case]:
    decay, x, offsets = _recurrence(np.array, n, 0)
    kinds = {
        "numbers and decays of every size": (decay, x), "decay 1": (np.ones(n), x), "decay 0": (np.zeros(n), x),
        "huge numbers": (decay, 1e20 * x), "equal numbers": (np.full(n, 0.95), np.full(n, 0.1))}
    for name, (a, column) in kinds.items():
        yield Case(f"{n} actions, {name}", (make(a), make(column), offsets), float(np.abs(column).sum()) + 1e-30)
    yield Case(f"{n} actions in one episode", (make(decay), make(x), offsets_of(np.array([n] if n else [], int))),
               float(np.abs(x).sum()) + 1e-30)
    yield Case(f"{n} actions, every second of a longer column", (_strided(make, decay), _strided(make, x), offsets),
               float(np.abs(x).sum()) + 1e-30)


def _segment_cases(make: Callable[[np.ndarray], Array], n: int) -> Iterator[Case]:
    x, ids, segments = _segments(np.array, n, 0)
    scale = float(np.abs(x).sum()) + 1e-30
    kinds = {"random numbers": (x, scale), "huge numbers": (1e20 * x, 1e20 * scale),
             "equal numbers": (np.full(n, 0.1), 0.1 * n + 1e-30)}
    for name, (column, size) in kinds.items():
        yield Case(f"{n} actions, {name}", (make(column), ids, segments), size)
    yield Case(f"{n} actions, ids of the framework", (make(x), make(ids), segments), scale)
    yield Case(f"{n} actions in one segment", (make(x), np.zeros(n, np.int64), 1), scale)
    rows = np.stack([x, -2.0 * x, np.ones(n)])
    yield Case(f"{n} actions in 3 rows", (make(rows), ids, segments), 3.0 * scale + n)
    yield Case(f"{n} actions, every second of a longer column", (_strided(make, x), ids, segments), scale)
    yield Case(f"{n} actions in 3 columns, transposed", (make(rows.T.copy()).T, ids, segments), 3.0 * scale + n)


def _logits_cases(make: Callable[[np.ndarray], Array], n: int) -> Iterator[Case]:
    logits, chosen, temperature = _logits(np.array, n, 0)
    impossible = np.where(np.arange(logits.shape[1]) % 2 == (chosen[:, None] + 1) % 2, -np.inf, logits)
    kinds = {"random numbers": logits, "far from zero": logits + 100.0, "far from each other": 20.0 * logits,
             "equal numbers": np.full(logits.shape, 0.1), "every second impossible": impossible}
    made = {**{name: (make(z), temperature) for name, z in kinds.items()},
            "temperature 1": (make(logits), 1.0), "transposed": (make(logits.T.copy()).T, temperature),
            "every second row of more": (_strided(make, logits), temperature)}
    for name, (z, T) in made.items():
        largest = _largest(to_numpy(z) / T)
        yield Case(f"{n} logits, {name}", (z, make(chosen), T), largest, largest)


def _largest(z: np.ndarray) -> float:
    """Of the logits that are possible, and at least 1: entropies are near that."""
    return float(np.abs(z[np.isfinite(z)]).max(initial=1.0))


_CASES: Mapping[Op, Callable[[Callable[[np.ndarray], Array], int], Iterator[Case]]] = {
    "reverse_recurrence": _recurrence_cases, "segment_sum": _segment_cases, "selective_log_softmax": _logits_cases}


def _strided(make: Callable[[np.ndarray], Array], x: np.ndarray) -> Array:
    """The same numbers, not contiguous where the framework knows strides."""
    return make(np.repeat(x, 2, axis=0))[::2]


def _half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16) if x.dtype.kind == "f" else x


def _whole(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int64)


def _poisoned(x: np.ndarray) -> np.ndarray:
    """A NaN in the middle."""
    if x.dtype.kind != "f":
        return x
    x = x.copy()
    x[len(x) // 2] = np.nan
    return x


def _like(weights: np.ndarray, y: Array) -> Array:
    """Weights as an array beside `y`."""
    return ops_of(y).xp.astype(like(weights, y), y.dtype)


def _torch_gradient(f: Callable[[Array], Array], x: Array) -> np.ndarray:
    leaf = x.detach().requires_grad_()
    y = f(leaf)
    if not y.requires_grad:
        return np.zeros(tuple(x.shape))
    return to_numpy(import_module("torch").autograd.grad(y, leaf)[0])


def _jax_gradient(f: Callable[[Array], Array], x: Array) -> np.ndarray:
    return np.asarray(import_module("jax").grad(f)(x))


_GRADIENT: Mapping[str, Callable[[Callable[[Array], Array], Array], np.ndarray]] = {
    "torch": _torch_gradient, "jax": _jax_gradient}


def _torch_place(device: str) -> Callable[[Array], Array] | None:
    torch = import_module("torch")
    there = getattr(torch, device, None)
    return (lambda x: x.to(device)) if there is not None and there.is_available() else None


def _jax_place(device: str) -> Callable[[Array], Array] | None:
    jax = import_module("jax")
    try:
        found = jax.devices(device)[0]
    except RuntimeError:
        return None
    return lambda x: jax.device_put(x, found)


_PLACE: Mapping[str, Callable[[str], Callable[[Array], Array] | None]] = {
    "numpy": lambda device: None, "torch": _torch_place, "jax": _jax_place}
