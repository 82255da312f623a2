"""One call of a reward: run it, sync or async, and say in plain data what came of it.

Knows functions and lists: no rollouts, no processes, no framework. Both ends of a worker's pipe speak in these types.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Returned:
    """The reward answered, and its answer is right in length and type."""

    numbers: tuple[float | None, ...]
    """One per row; None where it does not apply."""


@dataclass(frozen=True, slots=True)
class Wrong:
    """The reward answered with something that is no list of finite numbers of the right length."""

    what: str
    row: int | None = None
    """Of the call, where one row is to blame."""


@dataclass(frozen=True, slots=True)
class Raised:
    """The reward raised an exception."""

    error: str
    """`ZeroDivisionError: division by zero`"""
    place: str
    """`rewards.py:7`, the innermost line."""
    traceback: str


@dataclass(frozen=True, slots=True)
class Overdue:
    """The call did not end in time, and its process was killed."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Ended:
    """The process ended during the call: killed for memory, by a fault in C code, or by the reward itself."""

    code: int
    """Exit status; negative: the signal."""


Failed = Raised | Overdue | Ended
Outcome = Returned | Wrong | Failed


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a reward comes from, so that another process can make it again."""

    location: str
    """`module:name` or `path.py:name`."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What its class is made with, or what is bound to the function."""

    @staticmethod
    def of(location: str, made: Any, given: Mapping[str, Any]) -> Origin:
        """The origin of `made`, which came from `location` and the fields `given` in a configuration."""
        if is_dataclass(made) and isinstance(_found(location), type):  # its fields hold defaults and conversions too
            return Origin(location, {f.name: getattr(made, f.name) for f in fields(made) if f.init})
        return Origin(location, dict(given))

    def load(self) -> Callable[..., Any]:
        """The reward, made anew."""
        found: Any = _found(self.location)
        if isinstance(found, type):
            made: Callable[..., Any] = found(**self.fields)
            return made
        return partial(found, **self.fields) if self.fields else found


def _found(location: str) -> object:
    place, _, name = location.rpartition(":")
    if not place.endswith(".py"):
        return getattr(importlib.import_module(place), name)
    from posttrain.registry import import_file  # only here: most workers need no registry

    return vars(import_file(Path(place)))[name]


def outcome(call: Callable[..., Any], columns: Mapping[str, Sequence[Any]], rows: int) -> Outcome:
    """Call the reward on `rows` rows. Whatever the author's code raises is told, except that memory ran out."""
    try:
        result = call(**columns)
        result = _awaited(result) if inspect.isawaitable(result) else result
    except MemoryError:
        raise
    except Exception as error:
        return raised(error)
    return checked(result, rows)


def raised(error: BaseException) -> Raised:
    """An exception as plain data."""
    frame = next(reversed(traceback.extract_tb(error.__traceback__)), None)
    return Raised(f"{type(error).__name__}: {error}", "" if frame is None else f"{frame.filename}:{frame.lineno}",
                  "".join(traceback.format_exception(error)))


def checked(result: Any, rows: int) -> Returned | Wrong:
    """A result as numbers. Nothing is mended: a NaN is no 0.

    >>> checked([1, None], 2)
    Returned(numbers=(1.0, None))
    >>> checked([0.5, "1"], 2)
    Wrong(what="'1' (str), which is no number", row=1)
    """
    if isinstance(result, str | bytes | Mapping) or not isinstance(result, Sequence | np.ndarray):
        return Wrong(f"{_shown(result)}, expected a list of {rows} numbers, one per completion (or None where the "
                     "reward does not apply)")
    if len(result) != rows:
        return Wrong(f"{len(result)} numbers for {rows} completions; return one per completion, in order, and None "
                     "where the reward does not apply")
    numbers: list[float | None] = []
    for row, value in enumerate(result):
        number = _number(value)
        if isinstance(number, str):
            return Wrong(number, row)
        numbers.append(number)
    return Returned(tuple(numbers))


def _number(value: Any) -> float | str | None:
    """The value as a finite number or None; else what is wrong with it."""
    if value is None:
        return None
    try:
        number = None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None:
        return f"{_shown(value)}, which is no number"
    return number if math.isfinite(number) else (
        f"{number}, which is not finite; guard the division or the logarithm that made it")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:60] + '...'} ({type(value).__name__})"


def _awaited(result: Awaitable[T]) -> T:
    """Run an async reward to its end, also where an event loop is already running (a notebook)."""
    async def run() -> T:
        return await result
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(run())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, run()).result()
