"""Tensors that take no memory, and what they would take: torch's fake tensors, counted by their storages.

What is computed is the shape, type and lifetime of every tensor, by the code that computes the real ones. Whole numbers
that come from the host (tokens, positions, offsets) are real, so that shapes which depend on them are known; of what is
not known it is said that it is finite, differs from what it is compared with, and is larger than nothing. Knows no
model.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, final

import numpy as np
import torch
from posttrain.watermark import Bytes, Watermark
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST = "host"


@final
class Counted:
    """Bytes of the storages that are alive, and the most since the last reset."""

    def __init__(self) -> None:
        self.alive = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def see(self, tensor: Tensor) -> None:
        """Count its storage until nobody holds it."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(reference: weakref.ref[Any]) -> None:
            self.alive -= size
            self._known.pop(key, None)
        self._known[key] = weakref.ref(storage, gone)
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def watermark(self) -> Watermark:
        """In the form of the host's."""
        def level() -> Bytes:
            return {HOST: self.alive}

        def peak() -> Bytes:
            return {HOST: self.peak}

        def reset() -> None:
            self.peak = self.alive
        return Watermark(level, peak, reset)


@final
class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it so
    """Counts what operations make; what has whole numbers of the host alone is computed, and not counted. Answers, too,
    where a backward pass asks for numbers, which no function mode sees."""

    def __init__(self, counted: Counted, drawn: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it so
        self._counted, self._drawn = counted, drawn

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(isinstance(x, FakeTensor) for x in given) and _is_real(func, given, kwargs.get("device"), kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten.nonzero.default:
            return _nonzero(args[0])
        if func is torch.ops.aten._local_scalar_dense.default:
            return _number(args[0], self._drawn)
        made = func(*args, **kwargs)
        for x in tree_leaves(made):
            if isinstance(x, FakeTensor):
                self._counted.see(x)
        return made


def _is_real(func: Any, given: list[Tensor], device: torch.device | None, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation on no fake tensor is carried out: those on real ones, the making of whole numbers and
    truths, and that of tensors that take no memory anyway."""
    if device is not None and device.type == "meta":
        return True
    if given:
        return device is None or not any(x.is_meta for x in given)
    dtype = kwargs.get("dtype")
    if dtype is None:
        return "arange" in func.name()
    return not (dtype.is_floating_point or dtype.is_complex)


_TRUE, _FALSE = frozenset({"ne", "__ne__", "isfinite"}), frozenset({
    "eq", "__eq__", "gt", "__gt__", "lt", "__lt__", "ge", "__ge__", "le", "__le__", "isnan", "isinf"})
_NOT = frozenset({"__invert__", "bitwise_not", "logical_not", "logical_not_"})


@final
class _Answering(TorchFunctionMode):
    """Says something where code asks for the numbers of fake tensors."""

    def __init__(self, drawn: int) -> None:
        super().__init__()
        self._drawn = drawn
        self._asked: Mapping[str, Callable[[Tensor], Any]] = {
            "numpy": self._numpy, "nonzero": _nonzero, "item": lambda x: _number(x, drawn), "tolist": lambda x: [],
            "__bool__": _truth, "__float__": lambda x: 0.0, "__int__": lambda x: drawn}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self._asked and args and isinstance(args[0], FakeTensor):
            return self._asked[name](args[0])
        if name == "__deepcopy__" and isinstance(args[0], FakeTensor):
            return _copied(*args)
        made = func(*args, **(kwargs or {}))
        if isinstance(made, FakeTensor) and made.dtype == torch.bool:
            given = [x for x in tree_leaves(args) if isinstance(x, FakeTensor)]
            made.imagined_truth = (  # type: ignore[attr-defined]
                name in _TRUE or (name not in _FALSE and any(map(_truth, given)) != (name in _NOT)))
        return made

    def _numpy(self, x: Tensor) -> np.ndarray:
        """[...] of one number that takes no memory: tokens are `drawn`."""
        dtype = torch.empty(0, dtype=x.dtype, device="meta").dtype
        whole = not dtype.is_floating_point
        kind = np.int64 if whole else np.float32 if dtype != torch.float64 else np.float64
        return np.full(tuple(x.shape), self._drawn if whole else -1.0, kind)


def _copied(x: Tensor, memo: dict[int, Any]) -> Tensor:
    """As `copy.deepcopy` does it, which asks real tensors for their address."""
    if id(x) not in memo:
        copy = x.detach().clone()
        memo[id(x)] = torch.nn.Parameter(copy, x.requires_grad) if isinstance(x, torch.nn.Parameter) else copy
    found: Tensor = memo[id(x)]
    return found


def _number(x: Tensor, drawn: int) -> float | int | bool:
    return _truth(x) if x.dtype == torch.bool else 0.0 if x.dtype.is_floating_point else drawn


def _nonzero(x: Tensor) -> Tensor:
    """Everything or nothing."""
    with unset_fake_temporarily():
        return torch.full(tuple(x.shape), _truth(x)).nonzero()


def _truth(x: Tensor) -> bool:
    return bool(getattr(x, "imagined_truth", True))


@contextmanager
def imagined(drawn: int) -> Iterator[Watermark]:
    """While it lasts, what torch makes takes no memory; its watermark says what it would take. What is drawn is
    the token `drawn`."""
    counted = Counted()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # torch's own code does
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Counting(counted, drawn))
        stack.enter_context(_Answering(drawn))
        yield counted.watermark()
