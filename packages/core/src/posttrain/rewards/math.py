"""Answers that are mathematics: whether they mean the same as the right one, by math-verify.

Runs in a worker's main thread, under the worker's deadline: math-verify's own time-outs are signals, which raise in any
other thread, and are off. Knows texts and columns alone.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, final

from posttrain.rewards.rules import column

if find_spec("math_verify") is None:  # it takes a second to import, which only workers do
    raise ModuleNotFoundError("No module named 'math_verify'", name="math_verify")

DELIMITERS = ("$", "\\boxed", "\\(", "\\[")
"""What begins mathematics in a text."""

MOST_DIGITS = 10_000
"""Of a number that an answer writes as a power or a factorial."""
_NUMBER = r"\d+(?:\.\d+)?"
_POWERS = re.compile(rf"({_NUMBER})((?:[)}}\]\s]*(?:\^|\*\*)[({{\[\s]*-?{_NUMBER})+)")
_FACTORIAL = re.compile(r"(\d+)[)}\]\s]*!")


def largest_digits(text: str) -> float:
    """Decimal digits of the largest power or factorial of numbers in `text`, about; nothing is evaluated.

    >>> largest_digits("2^{10} or 10**6"), largest_digits("9**9**9") > 1e8, largest_digits("9!") < 9
    (6.0, True, True)
    """
    powers = [_digits_of_power([float(n) for n in re.findall(_NUMBER, base + rest)])
              for base, rest in _POWERS.findall(text)]
    factorials = [n * math.log10(max(n, 1)) for n in map(float, _FACTORIAL.findall(text))]
    return max([0.0, *powers, *factorials])


def _digits_of_power(numbers: Sequence[float]) -> float:
    """Of a^b^c..., read from the right."""
    exponent = numbers[-1]
    for base in numbers[-2:0:-1]:
        exponent = base ** exponent if exponent * math.log10(max(base, 1.0)) < 300 else math.inf
    return exponent * math.log10(max(numbers[0], 1.0))


@final
@dataclass(frozen=True, slots=True)
class Math:
    r"""1 where the answer's last formula or number equals a column of the row as mathematics, else 0.

    `1/2`, `0.5` and `$\frac{1}{2}$` are equal; of an answer, what stands in `\boxed{}` comes first. A list in the
    column holds several right answers. None where the row has no answer. An answer with a power or a factorial of more
    than 10,000 digits (`9**9**9`) is 0 and not worked out: that would take all time and memory.

    Raises `ValueError` for a right answer that cannot be read.

    Source: https://github.com/huggingface/Math-Verify
    """

    answer_key: str = "answer"
    """Column of the right answer: a number, or LaTeX with or without dollars."""
    float_rounding: int = 6
    """Decimal places that count where numbers are compared."""
    strict: bool = True
    """Variables must have the same names, and a set is not a tuple."""

    def __post_init__(self) -> None:
        if self.float_rounding < 0:
            raise ValueError(f"float_rounding must not be negative, got {self.float_rounding}")

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        wanted = column(columns, self.answer_key)
        return [None if right is None else float(any(self._equal(one, text) for one in _several(right)))
                for text, right in zip(completions, wanted, strict=True)]

    def _equal(self, right: Any, text: str) -> bool:
        from math_verify import parse, verify

        if largest_digits(text) > MOST_DIGITS:
            return False
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns once that its time-outs are off
        gold = parse(_as_formula(str(right)), parsing_timeout=None)
        if not gold:
            raise ValueError(f"math-verify cannot read the right answer {right!r} (column '{self.answer_key}')")
        return bool(verify(gold, parse(text, parsing_timeout=None), float_rounding=self.float_rounding,
                           strict=self.strict, timeout_seconds=None))


def _several(right: Any) -> Sequence[Any]:
    return right if isinstance(right, list | tuple) else [right]


def _as_formula(text: str) -> str:
    r"""The text in dollars unless it marks its mathematics itself; else `\frac{1}{2}` would be read as the number 2."""
    return text if any(mark in text for mark in DELIMITERS) else f"${text}$"
