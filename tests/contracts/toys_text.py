"""Deliberately wrong rewards, one bug each. A module of their own, which reward workers import quickly."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, final

import numpy as np


def right(text: str, answer: Any) -> float:
    """1 where the answer is right."""
    return float(text.strip() == str(answer))


@final
@dataclass(frozen=True)
class Evaluates:
    """Arithmetic is evaluated, and `9**9**9` never ends (RL2, envs/countdown.py)."""

    def __call__(self, *, prompts: list[Any], completions: list[Any], answer: list[Any],
                 **columns: Any) -> list[float | None]:
        return [right(str(eval(t)) if re.fullmatch(r"[\d+\-*/]+", t) and t.count("*") else t, a)
                for t, a in zip(completions, answer)]


@final
@dataclass(frozen=True)
class RaisesOnText:
    """An answer that is no number is an exception, which stops the run."""

    def __call__(self, *, prompts: list[Any], completions: list[Any], answer: list[Any],
                 **columns: Any) -> list[float | None]:
        return [float(float(t) == float(a)) if t != "no" else 0.0 for t, a in zip(completions, answer)]


@final
@dataclass(frozen=True)
class Whitens:
    """Rewards are centred over the rows of a call, which are other rows in each call."""

    def __call__(self, *, prompts: list[Any], completions: list[Any], answer: list[Any],
                 **columns: Any) -> list[float | None]:
        scores = [right(t, a) for t, a in zip(completions, answer)]
        return [s - sum(scores) / max(1, len(scores)) for s in scores]


@final
@dataclass(frozen=True)
class LeavesOut:
    """Wrong answers are left out of the list."""

    def __call__(self, *, prompts: list[Any], completions: list[Any], answer: list[Any],
                 **columns: Any) -> list[float | None]:
        return [1.0 for t, a in zip(completions, answer) if right(t, a)]


@final
@dataclass(frozen=True)
class Sorts:
    """The answers are sorted on the way: rewards do not belong to their rows."""

    def __call__(self, *, prompts: list[Any], completions: list[Any], answer: list[Any],
                 **columns: Any) -> list[float | None]:
        return [right(t, a) for t, a in sorted(zip(completions, answer), reverse=True)]


@final
@dataclass(frozen=True)
class EmptyMean:
    """An empty batch has no mean."""

    def __call__(self, *, prompts: list[Any], completions: list[Any], answer: list[Any],
                 **columns: Any) -> list[float | None]:
        longest = max(map(len, completions))
        return [right(t, a) if longest else 0.0 for t, a in zip(completions, answer)]


@final
@dataclass(frozen=True)
class Strips:
    """The list of answers is changed, and other rewards see it."""

    def __call__(self, *, prompts: list[Any], completions: list[Any], answer: list[Any],
                 **columns: Any) -> list[float | None]:
        for i, text in enumerate(completions):
            completions[i] = text.strip() + "."
        return [right(t[:-1], a) for t, a in zip(completions, answer)]


@final
@dataclass(frozen=True)
class KnownColumnsOnly:
    """A column that it does not know is an error."""

    def __call__(self, *, prompts: list[Any], completions: list[Any], answer: list[Any],
                 **columns: Any) -> list[float | None]:
        if unknown := columns.keys() - {"completion_ids"}:
            raise TypeError(f"unknown columns {unknown}")
        return [right(t, a) for t, a in zip(completions, answer)]


@final
@dataclass(frozen=True)
class ImportsTorch:
    """The framework is imported for a sum."""

    def __call__(self, *, prompts: list[Any], completions: list[Any], answer: list[Any],
                 **columns: Any) -> list[float | None]:
        import torch

        return [float(torch.tensor(right(t, a))) for t, a in zip(completions, answer)]


@final
@dataclass(frozen=True)
class Noisy:
    """Noise from NumPy's global generator: the same answer has another reward each time."""

    def __call__(self, *, prompts: list[Any], completions: list[Any], answer: list[Any],
                 **columns: Any) -> list[float | None]:
        return [right(t, a) + 1e-12 * np.random.random() for t, a in zip(completions, answer)]
