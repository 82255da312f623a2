"""Prompts from rows: a JSONL file or a Python list, in the format of RL2 or of TRL, every row checked before training.

Knows files, splits and epochs; what columns mean is in `formats.py`. Nothing about models, rewards or a run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np

from posttrain.data import Prompt
from posttrain.errors import SHOWN, DataError, Problem
from posttrain.protocols import PromptSource, RowRules, Tokenizer
from posttrain.tasks.formats import Format, Row, detect, prompt_of, row_of

log = logging.getLogger(__name__)

@final
@dataclass(frozen=True, slots=True)
class Rows:
    """Prompts from a JSONL file, one object per line, or from a list of dicts handed over from Python.

    A prompt is a text or a list of messages. All other columns reach the rewards as keyword arguments; those of an
    RL2 row's `extra_info` do, too, each under its own name. For supervised training an answer stands in `completion`
    (or `response`), or is the last message of the conversation.
    """

    path: str = field(default="", metadata={"path": True})
    """JSONL file of the rows to learn from."""
    held_out: str = field(default="", metadata={"path": True})
    """JSONL file of the rows to evaluate on."""
    held_out_fraction: float = 0.0
    """Part of the rows that is kept for evaluation, drawn by `split_seed`, where no rows are given for it."""
    split_seed: int = 0
    """Seed of that draw."""
    rows: tuple[dict[str, Any], ...] = ()
    """The rows themselves, from Python."""
    held_out_rows: tuple[dict[str, Any], ...] = ()
    """The rows to evaluate on, from Python."""
    prompt_key: str = "prompt"
    """Column of the prompt: text, or a list of messages."""
    messages_key: str = "messages"
    """Column of the conversation, where there is no prompt column."""
    completion_key: str = "completion"
    """Column of the answer, for supervised training."""
    limit: int = 0
    """Read only this many of the rows to learn from; 0 reads all."""
    shuffle: bool = True
    """A new order in each epoch; false keeps the order of the file."""

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.rows):
            raise ValueError("give either path (a JSONL file) or rows (a list of dicts, from Python)")
        given = [n for n in ("held_out", "held_out_rows", "held_out_fraction") if getattr(self, n)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say what is held out; keep one")
        if not 0 <= self.held_out_fraction < 1 or self.limit < 0:
            raise ValueError("held_out_fraction lies in [0, 1), and limit is not negative")

    def given(self) -> dict[str, tuple[dict[str, Any], ...]]:
        """Rows that came from Python, by the field that would name their file."""
        found = {"path": self.rows, "held_out": self.held_out_rows}
        return {name: rows for name, rows in found.items() if rows}

    def load(self, tokenizer: Tokenizer, rules: RowRules) -> PromptSource:
        """Read and check all rows; raises one `DataError` with every malformed one, by file, line and column."""
        name = self.path or "rows"
        read = list(_read(self.path) if self.path else _given(name, self.rows))
        checked = [_checked(name, read[: self.limit or None], self, tokenizer, rules)]
        if self.held_out or self.held_out_rows:
            name = self.held_out or "held_out_rows"
            read = list(_read(self.held_out) if self.held_out else _given(name, self.held_out_rows))
            checked.append(_checked(name, read, self, tokenizer, rules))
        if bad := [c for c in checked if c.problems and (rules.on_bad_row == "fail" or not c.prompts)]:
            raise _refusal(bad)
        for c in checked:
            log.info("%s: %d rows, %s", c.name, len(c.prompts), c.format)
            if c.problems:
                log.warning("%s: left out %d of %d rows, the first for: %s", c.name, len(c.problems), c.total,
                            c.problems[0][0])
        train, *kept = [c.prompts for c in checked]
        if self.held_out_fraction:
            train, *kept = _split(train, self.held_out_fraction, self.split_seed, self.path or "rows")
        return PromptRows(train, kept[0] if kept else (), self.shuffle)


@final
@dataclass(frozen=True, slots=True)
class PromptRows:
    """Loaded rows: endless shuffled epochs of those to learn from, and those kept for evaluation."""

    train: tuple[Prompt, ...]
    kept: tuple[Prompt, ...] = ()
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

        >>> source = PromptRows(tuple(Prompt(text=t) for t in "abc"))
        >>> sorted(p.text for p in source.take(3, 3, seed=7))
        ['a', 'b', 'c']
        """
        n, taken = self.rows, list[Prompt]()
        for epoch in range(cursor // n, -(-(cursor + count) // n)):
            order = np.random.default_rng([seed, epoch]).permutation(n) if self.shuffle else np.arange(n)
            taken += [self.train[i] for i in order[max(0, cursor - epoch * n): cursor + count - epoch * n]]
        return taken


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as a JSONL file. Raises `DataError` naming a row that JSON cannot hold."""
    lines = []
    for i, row in enumerate(rows):
        try:
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        except (TypeError, ValueError) as error:
            raise DataError([Problem(f"cannot be kept with the run: {error}", f"rows[{i}]")]) from error
    path.write_text("".join(lines), "utf-8")


def _read(path: str) -> Iterator[Row]:
    """The rows of a JSONL file; blank lines are passed over, what is no JSON object is kept as a problem."""
    try:
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError([Problem(f"the rows cannot be read: {error.strerror or error}; a path stands relative to the "
                                 "configuration file", path)]) from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _parsed(line, f"{path}:{number}")


def _parsed(line: bytes, where: str) -> Row:
    try:
        columns = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Row(where, problem=f"byte {error.start + 1} of the line is not UTF-8 ({error.reason}); save the file as "
                                  "UTF-8")
    except json.JSONDecodeError as error:
        return Row(where, problem=f"not JSON: {error.msg} at character {error.pos + 1}")
    except RecursionError:
        return Row(where, problem="not usable JSON: nested too deeply")
    return row_of(where, columns)


def _given(name: str, rows: Sequence[Any]) -> Iterator[Row]:
    """Rows handed over from Python."""
    return (row_of(f"{name}[{i}]", columns) for i, columns in enumerate(rows))


@dataclass(frozen=True, slots=True)
class Checked:
    """The rows of one file: prompts of the good ones, and what is wrong with each of the others."""

    name: str
    total: int
    format: Format
    prompts: tuple[Prompt, ...]
    problems: tuple[Sequence[Problem], ...]


def _checked(name: str, rows: Sequence[Row], keys: Rows, tokenizer: Tokenizer, rules: RowRules) -> Checked:
    if not rows:
        raise DataError([Problem("there is no row; write one JSON object per line", name)])
    form = detect(name, [r.columns for r in rows if not r.problem],
                  keys.prompt_key, keys.messages_key, keys.completion_key)
    made = [prompt_of(row, i, form, tokenizer, rules.max_prompt_tokens) for i, row in enumerate(rows)]
    return Checked(name, len(rows), form, tuple(m for m in made if isinstance(m, Prompt)),
                   tuple(m for m in made if not isinstance(m, Prompt)))


def _refusal(bad: Sequence[Checked]) -> DataError:
    """One error for all malformed rows, the first `SHOWN` problems in words."""
    found = [problem for c in bad for row in c.problems for problem in row]
    more = [f"  and {len(found) - SHOWN} more problems"] if len(found) > SHOWN else []
    empty = [c.name for c in bad if not c.prompts]
    advice = (f"no row of {' and '.join(empty)} is left; mend the rows" if empty
              else "mend them, or leave them out with data.on_bad_row=skip")
    title = ", ".join(f"{c.name}: {len(c.problems)} of {c.total} rows cannot be used" for c in bad)
    return DataError(found[:SHOWN], title, "\n".join([*more, advice]))


def _split(prompts: Sequence[Prompt], fraction: float, seed: int,
           name: str) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Rows to learn from and rows held out, both in the order of the file."""
    n = len(prompts)
    held = round(fraction * n)
    if not 0 < held < n:
        raise DataError([Problem(f"held_out_fraction {fraction} of {n} rows leaves nothing on one side; give more "
                                 "rows, another fraction, or held_out", name)])
    order = np.random.default_rng(seed).permutation(n)
    return tuple(prompts[i] for i in np.sort(order[held:])), tuple(prompts[i] for i in np.sort(order[:held]))
