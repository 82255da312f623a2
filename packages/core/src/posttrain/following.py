"""Shows on standard error what a command is busy with: one line that moves on a terminal, else a line every so often.

Listens to the log `posttrain.progress` alone, so that no other library's log is let through. What takes less than
`QUIET` seconds is never shown. A thread of its own lives only while something is under way.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO, final

from posttrain import progress
from posttrain.progress import EVERY, QUIET, Activity
from posttrain.trackers.console import duration

if TYPE_CHECKING:
    from rich.live import Live

TICK = 0.1
"""Seconds between two looks at what is under way."""

Clock = Callable[[], float]
"""Seconds, rising."""


class Display(Protocol):
    """Where the text of what is under way is shown."""

    def show(self, text: str, seconds: float) -> None:
        """What is under way now, and for how long."""
        ...
    def clear(self) -> None:
        """Nothing is."""
        ...


@contextmanager
def following(wanted: bool = True) -> Iterator[None]:
    """Inside the block what is under way is shown on standard error, unless it is not `wanted`."""
    if not wanted:
        yield
        return
    handler = Follower(display(sys.stderr), time.monotonic)
    before = progress.log.level
    progress.log.addHandler(handler)
    progress.log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        progress.log.removeHandler(handler)
        progress.log.setLevel(before)
        handler.close()


def display(out: TextIO) -> Display:
    """A line that moves needs a terminal that can move its cursor and somebody who looks at it."""
    moving = out.isatty() and os.environ.get("TERM") != "dumb" and "CI" not in os.environ
    return MovingLine(out) if moving else Lines()


@final
class Lines:
    """A line now and then, for logs: the first when something has taken `QUIET` seconds, the next `EVERY` later."""

    def __init__(self) -> None:
        self._due = 0.0

    def show(self, text: str, seconds: float) -> None:
        if seconds >= self._due:
            print(f"{text} ({duration(seconds)})", file=sys.stderr, flush=True)
            self._due = seconds + EVERY

    def clear(self) -> None:
        self._due = 0.0


@final
class MovingLine:
    """One line that is rewritten and vanishes. Where another display has taken over standard error, lines above it."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._above = out, Lines()
        self._live: Live | None = None

    def show(self, text: str, seconds: float) -> None:
        from rich.text import Text

        if self._live is None:
            if sys.stderr is not self._out:
                self._above.show(text, seconds)
                return
            self._live = _started(self._out)
        self._live.update(Text(f"{text} ({duration(seconds)})", overflow="ellipsis", no_wrap=True), refresh=True)

    def clear(self) -> None:
        self._above.clear()
        if self._live is not None:
            self._live.stop()
            self._live = None


def _started(out: TextIO) -> Live:
    """What others write to standard error stands above the line; standard output may go elsewhere and is left alone."""
    from rich.console import Console
    from rich.live import Live

    live = Live(console=Console(file=out), auto_refresh=False, transient=True, redirect_stdout=False)
    live.start()
    return live


@final
class Follower(logging.Handler):
    """Keeps what is under way, by its activity, and shows the latest that has taken `QUIET` seconds."""

    def __init__(self, display: Display, clock: Clock) -> None:
        super().__init__(logging.DEBUG)
        self._display, self._clock = display, clock
        self._under_way: dict[Activity, tuple[str, float]] = {}
        self._idle: threading.Event | None = None
        self._thread: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """One more thing, or one less. Called with the handler's lock."""
        activity: Activity = record.__dict__["activity"]
        if activity.over:
            self._under_way.pop(activity, None)
        else:
            _, since = self._under_way.get(activity, ("", self._clock()))
            self._under_way[activity] = record.getMessage(), since
        if not self._under_way:
            self._rest()
        elif self._thread is None:
            self._idle = threading.Event()
            self._thread = threading.Thread(target=self._work, args=(self._idle,), name="progress", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._rest()
        super().close()

    def look(self) -> None:
        """Show what takes long by now."""
        now = self._clock()
        long = [(text, now - since) for text, since in list(self._under_way.values()) if now - since >= QUIET]
        if long:
            self._display.show(*long[-1])
        else:
            self._display.clear()

    def _work(self, idle: threading.Event) -> None:
        while not idle.wait(TICK):
            self.look()

    def _rest(self) -> None:
        """End the thread, so that a fork meets none, and take the line away."""
        if self._idle is not None and self._thread is not None:
            self._idle.set()
            self._thread.join()
            self._idle = self._thread = None
            self._display.clear()
