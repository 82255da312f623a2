"""Trackers observe a run: components with `start(run)`, sessions that are told of steps, and the one circuit breaker.

A tracker that raises is switched off with one warning; it can neither change nor stop nor lose a run, since every
metric is in the run directory before any tracker hears of it. Knows no single tracker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import final

from posttrain.protocols import ObservedRun, Tracker, TrackerSession

logger = logging.getLogger(__name__)


@final
class Silent:
    """A session that tells nobody."""

    def phase_started(self, phase: str) -> None:
        pass

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def finished(self, error: BaseException | None) -> None:
        pass


def start(trackers: Mapping[str, Tracker], run: ObservedRun) -> TrackerSession:
    """Start all trackers; one session that passes everything on to those that work."""
    return _Guarded(trackers, run)


@final
class _Guarded:
    """The circuit breaker around every tracker. Ctrl-C passes through: it is not the tracker's error."""

    def __init__(self, trackers: Mapping[str, Tracker], run: ObservedRun) -> None:
        self._sessions: dict[str, TrackerSession] = {}
        for name, tracker in trackers.items():
            try:
                self._sessions[name] = tracker.start(run)
            except Exception as error:
                _warn(name, error)

    def phase_started(self, phase: str) -> None:
        self._each(lambda session: session.phase_started(phase))

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        self._each(lambda session: session.step_finished(step, metrics))

    def finished(self, error: BaseException | None) -> None:
        self._each(lambda session: session.finished(error))
        self._sessions.clear()

    def _each(self, tell: Callable[[TrackerSession], None]) -> None:
        for name, session in list(self._sessions.items()):
            try:
                tell(session)
            except Exception as error:
                del self._sessions[name]
                _warn(name, error)
                with suppress(Exception):  # let go of what it holds, such as the terminal; it was warned of already
                    session.finished(error)


def _warn(name: str, error: Exception) -> None:
    logger.warning("tracker '%s' failed and is switched off for the rest of this run; metrics.jsonl stays complete "
                   "(%s: %s)", name, type(error).__name__, error)
