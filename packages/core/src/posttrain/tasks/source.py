"""Checked rows as an endless sequence of prompts: every malformed row reported at once, epochs, and what is held out.

Rows are parsed when they are asked for, so that they may be more than memory holds. Knows tables (sequences of rows)
and prompts; no file and no format of one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import SupportsIndex, final, overload

import numpy as np

from posttrain.data import Prompt
from posttrain.errors import SHOWN, DataError, Problem
from posttrain.progress import shown
from posttrain.protocols import PromptSource, RowRules, Tokenizer
from posttrain.tasks.formats import Census, Format, Keys, RowTable, problems_of, prompt_of

log = logging.getLogger(__name__)

_FIRST = 1000
"""Rows by which the meaning of the columns is guessed."""


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one file or data set, and what it is called."""

    name: str
    rows: RowTable


@dataclass(frozen=True, slots=True)
class Split:
    """Which rows of a table are held out where no table of its own is given for that."""

    fraction: float = 0.0
    seed: int = 0


def load(learn: Table, held_out: Table | None, keys: Keys, split: Split, shuffle: bool, tokenizer: Tokenizer,
         rules: RowRules) -> PromptSource:
    """Check all rows; raises one `DataError` with every malformed one."""
    tables = [learn] if held_out is None else [learn, held_out]
    checked = [_checked(table, keys, tokenizer, rules) for table in tables]
    if bad := [c for c in checked if c.bad and (rules.on_bad_row == "fail" or not len(c.prompts))]:
        raise _refusal(bad)
    for c in checked:
        log.info("%s: %d rows, %s", c.name, len(c.prompts), c.format)
        if c.bad:
            log.warning("%s: left out %d of %d rows, the first for: %s", c.name, c.bad, c.total, c.shown[0])
    train, *kept = [c.prompts for c in checked]
    if split.fraction:
        train, *kept = _split(train, split, learn.name)
    return PromptRows(train, kept[0] if kept else (), shuffle)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Prompts(Sequence[Prompt]):
    """The prompts of the rows `numbers` of a table, each read when it is asked for."""

    rows: RowTable
    format: Format
    numbers: np.ndarray | range

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, at: SupportsIndex) -> Prompt: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, at: SupportsIndex | slice) -> Prompt | Sequence[Prompt]:
        if isinstance(at, slice):
            return Prompts(self.rows, self.format, self.numbers[at])
        number = int(self.numbers[at])
        made = prompt_of(self.rows[number], number, self.format)
        if not isinstance(made, Prompt):  # it was checked, so its bytes are other ones now
            raise DataError([*made, "the row was good when it was checked; start again to read the file anew"])
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    def chosen(self, places: np.ndarray) -> Prompts:
        """Those at some places, in their order."""
        numbers = self.numbers
        picked = numbers.start + numbers.step * places if isinstance(numbers, range) else numbers[places]
        return Prompts(self.rows, self.format, picked)


@final
@dataclass(frozen=True, slots=True)
class PromptRows:
    """Loaded rows: endless shuffled epochs of those to learn from, and those kept for evaluation."""

    train: Prompts
    kept: Sequence[Prompt] = ()
    shuffle: bool = True

    @property
    def rows(self) -> int:
        """Rows of one epoch."""
        return len(self.train)

    def held_out(self) -> Sequence[Prompt]:
        """Rows kept for evaluation, in order."""
        return self.kept

    def take(self, cursor: int, count: int, seed: int) -> Sequence[Prompt]:
        """Rows `cursor .. cursor + count` of an endless sequence of epochs; a pure function of its arguments.

        >>> from posttrain.tasks.formats import Row
        >>> rows = [Row(f"letters:{i}", {"prompt": text}) for i, text in enumerate("abc")]
        >>> source = PromptRows(Prompts(rows, Format("prompt"), range(3)))
        >>> sorted(p.text for p in source.take(3, 3, seed=7))
        ['a', 'b', 'c']
        """
        n, places = self.rows, [np.zeros(0, np.int64)]
        for epoch in range(cursor // n, -(-(cursor + count) // n)):
            order = _order(seed, epoch, n) if self.shuffle else np.arange(n)
            places.append(order[max(0, cursor - epoch * n): cursor + count - epoch * n])
        return self.train.chosen(np.concatenate(places))


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    """[n] the order of an epoch. Kept for two epochs: to draw that of ten million rows takes a fifth of a second."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.flags.writeable = False
    return order


@dataclass(frozen=True, slots=True)
class Checked:
    """The rows of one table: prompts of the good ones, how many are bad, and the first problems in words."""

    name: str
    total: int
    format: Format
    prompts: Prompts
    bad: int
    problems: int
    shown: tuple[Problem, ...]


def _checked(table: Table, keys: Keys, tokenizer: Tokenizer, rules: RowRules) -> Checked:
    """Reads the rows once where the first of them are like the rest, else twice."""
    if not len(table.rows):
        raise DataError([Problem("there is no row; write one JSON object per line", table.name)])
    form = _guessed(table, keys)
    checked, found = _checked_as(form, table, keys, tokenizer, rules)
    return checked if found == form else _checked_as(found, table, keys, tokenizer, rules)[0]


def _guessed(table: Table, keys: Keys) -> Format:
    """What the columns mean, by the first rows."""
    census = Census(keys)
    for row in islice(table.rows, _FIRST):
        if not row.problem:
            census.add(row.columns)
    with suppress(DataError):  # later rows may have what these lack
        return census.format(table.name)
    return Format(keys.prompt)


def _checked_as(form: Format, table: Table, keys: Keys, tokenizer: Tokenizer, rules: RowRules
                ) -> tuple[Checked, Format]:
    """All rows, checked as if their columns meant `form`; and what they mean. Raises `DataError` where no row has a
    prompt."""
    name, n, census = table.name, len(table.rows), Census(keys)
    good, problems, first = np.ones(n, bool), 0, list[Problem]()
    for i, row in enumerate(shown(table.rows, f"{name}: checked", n, "rows")):
        if not row.problem:
            census.add(row.columns)
        if wrong := problems_of(row, i, form, tokenizer, rules.max_prompt_tokens):
            good[i], problems = False, problems + len(wrong)
            first += wrong[: SHOWN - len(first)]
    numbers = range(n) if good.all() else np.flatnonzero(good)
    return Checked(name, n, form, Prompts(table.rows, form, numbers), n - len(numbers), problems,
                   tuple(first)), census.format(name)


def _refusal(bad: Sequence[Checked]) -> DataError:
    """One error for all malformed rows, the first `SHOWN` problems in words."""
    found, total = [problem for c in bad for problem in c.shown], sum(c.problems for c in bad)
    more = [f"  and {total - SHOWN} more problems"] if total > SHOWN else []
    empty = [c.name for c in bad if not len(c.prompts)]
    advice = (f"no row of {' and '.join(empty)} is left; mend the rows" if empty
              else "mend them, or leave them out with data.on_bad_row=skip")
    title = ", ".join(f"{c.name}: {c.bad} of {c.total} rows cannot be used" for c in bad)
    return DataError(found[:SHOWN], title, "\n".join([*more, advice]))


def _split(prompts: Prompts, split: Split, name: str) -> tuple[Prompts, Prompts]:
    """Rows to learn from and rows held out, both in the order of the file."""
    n = len(prompts)
    held = round(split.fraction * n)
    if not 0 < held < n:
        raise DataError([Problem(f"held_out_fraction {split.fraction} of {n} rows leaves nothing on one side; give "
                                 "more rows, another fraction, or held_out", name)])
    order = np.random.default_rng(split.seed).permutation(n)
    return prompts.chosen(np.sort(order[held:])), prompts.chosen(np.sort(order[:held]))
