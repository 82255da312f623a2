"""Seconds spent in each phase of an iteration. The clock comes in as an argument, as does who else watches phases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field


@dataclass(slots=True)
class Phases:
    """Adds up seconds by phase: `with phases("rollout"): ...`; a phase inside another counts in both."""

    clock: Callable[[], float]
    entered: Callable[[str], None] = lambda phase: None
    """Told when a phase begins."""
    watched: Callable[[str], AbstractContextManager[object]] = nullcontext
    """Open while a phase lasts."""
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.entered(name)
        start = self.clock()
        try:
            with self.watched(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.clock() - start

    def taken(self) -> dict[str, float]:
        """The seconds since the last call, and begin anew."""
        found, self.seconds = self.seconds, {}
        return found
