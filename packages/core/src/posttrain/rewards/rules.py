"""Rewards that are rules on the text of an answer: exact match, regular expression, length.

Each has the TRL signature: lists in, one number per answer out, None where a row does not say what it should be
compared with. Knows texts and columns alone: no rollout, no model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from posttrain.errors import did_you_mean


@final
@dataclass(frozen=True, slots=True)
class ExactMatch:
    """1 where the answer equals a column of the row, else 0; a list in that column holds several right answers.

    >>> ExactMatch()(prompts=["1+1=", "1+2=", "?"], completions=["2 ", "4", "7"], answer=[2, ["3", "three"], None])
    [1.0, 0.0, None]
    """

    answer_key: str = "answer"
    """Column of the right answer. A number is compared as Python writes it."""
    strip: bool = True
    """Ignore white space at both ends."""
    ignore_case: bool = False
    """Compare without regard to case."""

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        def form(text: str) -> str:
            return _normal(text, self.strip, self.ignore_case)
        wanted = [_right_answers(value) for value in column(columns, self.answer_key)]
        return [None if right is None else float(form(text) in map(form, right))
                for text, right in zip(completions, wanted, strict=True)]


_PICK: Mapping[str, Callable[[Sequence[re.Match[str]]], re.Match[str]]] = {
    "first": lambda matches: matches[0], "last": lambda matches: matches[-1]}


@final
@dataclass(frozen=True, slots=True)
class Regex:
    r"""1 where a pattern is found in the answer, else 0; with `answer_key`, where what it captures is right.

    >>> Regex(r"^\d+$")(prompts=["1+1=", "1+2="], completions=["2", "three"])
    [1.0, 0.0]
    >>> Regex(r"#### (\d+)", answer_key="answer", which="last")(
    ...     prompts=["1+1="], completions=["#### 3, no: #### 2"], answer=["2"])
    [1.0]
    """

    pattern: str = ""
    """A regular expression of Python's `re`; `(?s)`, `(?i)` and `(?m)` in front set its flags."""
    answer_key: str = ""
    """Column to compare with; empty: finding the pattern is enough."""
    group: int = 1
    """Group that captures the answer."""
    which: Literal["first", "last"] = "first"
    """The match that counts where there are several."""
    strip: bool = True
    """Ignore white space at both ends of what was captured."""
    ignore_case: bool = False
    """Of the comparison, not of the pattern."""

    def __post_init__(self) -> None:
        if not self.pattern:
            raise ValueError("pattern is empty and would be found in every answer; give a regular expression")
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is no regular expression: {error}") from error
        if self.which not in _PICK:
            raise ValueError(f"which is one of {', '.join(_PICK)}, got {self.which!r}")
        if self.answer_key and not 0 <= self.group <= groups:
            raise ValueError(f"group {self.group} is to be compared, but pattern {self.pattern!r} has {groups}; "
                             "put the answer in brackets, or set group: 0 for the whole match")

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        if not self.answer_key:
            return [float(re.search(self.pattern, text) is not None) for text in completions]
        def form(text: str) -> str:
            return _normal(text, self.strip, self.ignore_case)
        wanted = [_right_answers(value) for value in column(columns, self.answer_key)]
        return [None if right is None else float(any(form(found) in map(form, right) for found in self._captured(text)))
                for text, right in zip(completions, wanted, strict=True)]

    def _captured(self, text: str) -> list[str]:
        """What the counting match captured; empty where there is no match or the group took no part in it."""
        matches = list(re.finditer(self.pattern, text))
        captured = _PICK[self.which](matches)[self.group] if matches else None
        return [] if captured is None else [captured]


_LENGTH: Mapping[str, Callable[[str, Any], int]] = {
    "characters": lambda text, ids: len(text),
    "words": lambda text, ids: len(text.split()),
    "tokens": lambda text, ids: len(ids),
}


@final
@dataclass(frozen=True, slots=True)
class Length:
    """A soft penalty for long answers: 0 up to `soft_limit`, then falling in a line to -1 at `hard_limit`, -1 beyond.

    With n the length: min(0, max(-1, (soft_limit - n) / (hard_limit - soft_limit))). In tokens this is the soft
    overlong punishment of DAPO (Yu et al. 2025, arXiv 2503.14476, equation 13), whose cache is
    `hard_limit - soft_limit`.

    >>> Length(soft_limit=2, hard_limit=6)(prompts=[""] * 4, completions=["ab", "abc", "abcdef", "abcdefgh"])
    [0.0, -0.25, -1.0, -1.0]
    """

    soft_limit: int = 256
    """Length up to which there is no penalty."""
    hard_limit: int = 512
    """Length from which on the penalty is -1."""
    unit: Literal["characters", "words", "tokens"] = "characters"
    """What is counted; words are separated by white space, tokens are all that the policy chose."""

    def __post_init__(self) -> None:
        if not 0 <= self.soft_limit < self.hard_limit:
            raise ValueError(f"limits must rise from 0: soft_limit {self.soft_limit}, hard_limit {self.hard_limit}")
        _require_unit(self.unit)

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        cache = self.hard_limit - self.soft_limit
        return [min(0.0, max(-1.0, (self.soft_limit - n) / cache)) for n in _lengths(self.unit, completions, columns)]


@final
@dataclass(frozen=True, slots=True)
class Size:
    """The length of an answer: a cost to keep below a limit, as in {use: size, unit: tokens, at_most: 40}.

    >>> Size("words")(prompts=["", ""], completions=["two words", ""])
    [2.0, 0.0]
    """

    unit: Literal["characters", "words", "tokens"] = "characters"
    """What is counted; words are separated by white space, tokens are all that the policy chose."""

    def __post_init__(self) -> None:
        _require_unit(self.unit)

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        return [float(n) for n in _lengths(self.unit, completions, columns)]


def _require_unit(unit: str) -> None:
    """Raise `ValueError` for a unit of length that there is not."""
    if unit not in _LENGTH:
        raise ValueError(f"unit is one of {', '.join(_LENGTH)}, got {unit!r}")


def _lengths(unit: str, completions: Sequence[str], columns: Mapping[str, Any]) -> list[int]:
    """The length of each answer."""
    ids = column(columns, "completion_ids") if unit == "tokens" else [None] * len(completions)
    return [_LENGTH[unit](text, i) for text, i in zip(completions, ids, strict=True)]


def column(columns: Mapping[str, Any], name: str) -> Any:
    """A column that a reward asks for by name. Raises `LookupError` with the columns there are."""
    if name not in columns:
        raise LookupError(f"no row has a column '{name}'{did_you_mean(name, columns)}; "
                          f"the columns are {', '.join(sorted(columns)) or 'none'}")
    return columns[name]


def _right_answers(value: Any) -> list[str] | None:
    """The texts that count as right; None where the row says nothing."""
    if value is None:
        return None
    return [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]


def _normal(text: str, strip: bool, ignore_case: bool) -> str:
    text = text.strip() if strip else text
    return text.casefold() if ignore_case else text
