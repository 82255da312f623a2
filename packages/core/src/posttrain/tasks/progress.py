"""Says how far a long reading has come. Knows counts and the log alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
QUIET, EVERY = 2.0, 10.0
"""Seconds until the first line of a log, and between two."""
LOOK = 4096
"""Items between two looks at the clock."""


def shown(items: Iterable[T], what: str, total: int, unit: str,
          reached: Callable[[T], int] | None = None) -> Iterator[T]:
    """The items; what takes longer than `QUIET` seconds is logged. `reached` tells how far an item lies, by default
    its number.

    >>> list(shown("abc", "letters: checked", 3, "letters"))
    ['a', 'b', 'c']
    """
    due, last = time.monotonic() + QUIET, False
    for number, item in enumerate(items, start=1):
        yield item
        if number % LOOK == 0 and (now := time.monotonic()) >= due:
            due, last = now + EVERY, True
            log.info("%s %s of %s %s", what, f"{number if reached is None else reached(item):,}", f"{total:,}", unit)
    if last:
        log.info("%s all %s %s", what, f"{total:,}", unit)
