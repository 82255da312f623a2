"""What ranks must agree on: sums of counts, the longest plan, and whether anybody ran out of memory.

Gradients are summed, never averaged: weights already carry the global counts. One process is the default; a group of
ranks is any object with these methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, final

import numpy as np

__all__ = ["Comm", "SingleProcess"]


class Comm(Protocol):
    """A group of ranks. Every method is a collective: all ranks call it in the same order."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def sum(self, x: np.ndarray) -> np.ndarray:
        """The elementwise sum over ranks."""
        ...
    def max(self, n: int) -> int:
        """The largest of the ranks' numbers."""
        ...
    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        ...


@final
@dataclass(frozen=True, slots=True)
class SingleProcess:
    """The group of one rank."""

    rank: int = 0
    size: int = 1

    def sum(self, x: np.ndarray) -> np.ndarray:
        return x

    def max(self, n: int) -> int:
        return n

    def any(self, flag: bool) -> bool:
        return flag
