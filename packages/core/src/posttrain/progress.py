"""What a command is busy with before it has something to show: long phases, and how far a reading has come.

Said as records of the log `posttrain.progress`, each of which carries the `Activity` it tells of: at INFO what took
long, at DEBUG what begins and how it goes on. Who shows them, and how, is in `following.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, final

log = logging.getLogger(__name__)

T = TypeVar("T")
QUIET, EVERY = 2.0, 10.0
"""Seconds until something is said of an activity, and between two lines of a log."""
OFTEN = 0.5
"""Seconds between two counts of a reading, for a display that moves."""


@final
@dataclass(slots=True, eq=False)
class Activity:
    """Something that may take long. Attribute `activity` of the log records that tell of it."""

    over: bool = False


@contextmanager
def doing(what: str) -> Iterator[Callable[[str], None]]:
    """Says that the block is under way. What it gives takes what is to be said from then on.

    >>> with doing("loading the policy") as say:
    ...     say("loading the policy: 2 of 3 files")
    """
    activity, start = Activity(), time.monotonic()
    _say(logging.DEBUG, activity, what)
    try:
        yield lambda text: _say(logging.DEBUG, activity, text)
    finally:
        activity.over, seconds = True, time.monotonic() - start
        _say(_level(seconds >= QUIET), activity, f"{what}: {seconds:.0f} s")


def shown(items: Iterable[T], what: str, total: int, unit: str,
          reached: Callable[[T], int] | None = None) -> Iterator[T]:
    """The items; says how many of `total` have gone by. `reached` tells how far an item lies, by default its number.

    >>> list(shown("abc", "letters: checked", 3, "letters"))
    ['a', 'b', 'c']
    """
    activity, start, said = Activity(), time.monotonic(), False
    due, often = start + QUIET, start + OFTEN
    try:
        for number, item in enumerate(items, start=1):
            yield item
            if (now := time.monotonic()) >= often:
                at = number if reached is None else reached(item)
                _say(_level(now >= due), activity, f"{what} {at:,} of {total:,} {unit}")
                often, said = now + OFTEN, said or now >= due
                due = now + EVERY if now >= due else due
    finally:
        activity.over = True
        _say(_level(said), activity, f"{what} all {total:,} {unit}")


def _level(long: bool) -> int:
    return logging.INFO if long else logging.DEBUG


def _say(level: int, activity: Activity, text: str) -> None:
    if log.isEnabledFor(level):
        log.log(level, "%s", text, extra={"activity": activity})
