"""Arithmetic of untrusted text: numbers, + - * / and brackets, exactly. Nothing of it is executed as Python.

The time is linear in the text, whose length is limited, and there is no recursion: nothing that a policy writes
hangs or overflows it. Knows neither puzzles nor rewards.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 200
"""Characters of an expression; more is none."""
TOKEN = re.compile(r"\s*(?:([0-9]{1,9})(?![0-9])|([-+*/()]))")
OPERATORS: Mapping[str, tuple[int, Callable[[Fraction, Fraction], Fraction]]] = {
    "+": (1, operator.add), "-": (1, operator.sub), "*": (2, operator.mul), "/": (2, operator.truediv)}
"""Sign -> how strongly it binds, and what it does."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The value of an expression, and the numbers that stand in it."""

    value: Fraction
    numbers: tuple[int, ...]


def evaluated(text: str) -> Evaluated | None:
    """The value of an expression; None where it is none, or divides by 0. Dijkstra's shunting yard (1961).

    >>> evaluated("(7 - 3) * 2 / 3")
    Evaluated(value=Fraction(8, 3), numbers=(7, 3, 2, 3))
    >>> evaluated("9**9"), evaluated("1/(2-2)"), evaluated("")
    (None, None, None)
    """
    tokens = _tokens(text)
    if not tokens:
        return None
    values: list[Fraction] = []
    waiting: list[str] = []
    operand = True  # whether an operand comes next
    for token in tokens:
        begins = token not in OPERATORS and token != ")"
        if begins != operand:
            return None
        if token == "(":
            waiting.append(token)
        elif begins:
            values.append(Fraction(token))
            operand = False
        elif not _reduce(values, waiting, OPERATORS[token][0] if token in OPERATORS else 0):
            return None
        elif token in OPERATORS:
            waiting.append(token)
            operand = True
        elif not waiting or waiting.pop() != "(":
            return None
    if operand or not _reduce(values, waiting, 0) or waiting:
        return None
    return Evaluated(values[0], tuple(int(token) for token in tokens if token.isdigit()))


def _tokens(text: str) -> list[str]:
    """Numbers and signs; empty where there is anything else."""
    text, place, found = text.rstrip(), 0, list[str]()
    while place < len(text) <= LONGEST:
        match = TOKEN.match(text, place)
        if match is None:
            return []
        found.append(match[1] or match[2])
        place = match.end()
    return found


def _reduce(values: list[Fraction], waiting: list[str], strength: int) -> bool:
    """Apply the waiting operators down to a bracket that bind at least so strongly; False where one divides by 0."""
    while waiting and waiting[-1] != "(" and OPERATORS[waiting[-1]][0] >= strength:
        right, left = values.pop(), values.pop()
        try:
            values.append(OPERATORS[waiting.pop()][1](left, right))
        except ZeroDivisionError:
            return False
    return True
