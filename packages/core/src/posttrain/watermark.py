"""The marks that a device keeps of the most that was in use, shared by spans that overlap.

A kernel and an allocator have one peak, which whoever measures sets back. So a reset tells every open span first what
it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import final

Bytes = Mapping[str, int]
"""Mark -> bytes: of a device there may be several, as what is allocated and what is held for that."""


@final
@dataclass(slots=True, eq=False)
class Span:
    """A stretch of time."""

    start: Bytes
    """In use when it began."""
    peak: dict[str, int] = field(default_factory=dict)
    """The most since then."""

    def note(self, seen: Bytes) -> None:
        """Keep the larger of each."""
        for name, value in seen.items():
            self.peak[name] = max(self.peak.get(name, 0), value)


@final
class Watermark:
    """`level` is what is in use, `peak` the most since `reset`, all of one device.

    >>> used = [5]
    >>> mark = Watermark(level=lambda: {"host": used[-1]}, peak=lambda: {"host": max(used)},
    ...                  reset=lambda: used.__setitem__(slice(-1), []))
    >>> with mark.span() as outer:
    ...     used += [9, 6]
    ...     with mark.span() as inner:
    ...         used.append(7)
    >>> outer.start, outer.peak, inner.start, inner.peak
    ({'host': 5}, {'host': 9}, {'host': 6}, {'host': 7})
    """

    def __init__(self, level: Callable[[], Bytes], peak: Callable[[], Bytes], reset: Callable[[], None]) -> None:
        self.level, self._peak, self._reset = level, peak, reset
        self._open: list[Span] = []

    def reset(self) -> None:
        """Let the marks begin anew at what is in use; spans that are open keep what they were."""
        seen = self._peak() if self._open else {}
        for span in self._open:
            span.note(seen)
        self._reset()

    @contextmanager
    def span(self) -> Iterator[Span]:
        """Its peaks are known when it ends."""
        self.reset()
        span = Span(self.level())
        self._open.append(span)
        try:
            yield span
        finally:
            span.note(self._peak())
            self._open.remove(span)
