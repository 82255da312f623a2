"""The three rewards of `fronts.py`: an answer that is exact, one that is brief, one that is a round estimate."""

from __future__ import annotations

from typing import Any


def exact(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 for the sum."""
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def brief(completions: list[str], **columns: Any) -> list[float]:
    """1 for one character or none, 0 for four."""
    return [min(1.0, (4 - len(c)) / 3) for c in completions]


def round(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 for three digits that are a multiple of ten within five of the sum."""
    return [float(c.isdigit() and len(c) == 3 and int(c) % 10 == 0 and abs(int(c) - int(a)) <= 5)
            for c, a in zip(completions, answer, strict=True)]
