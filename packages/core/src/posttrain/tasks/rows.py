"""The task `rows`: prompts from files or a Python list, in the format of RL2 or of TRL.

How files are read is in `files.py`, what columns mean in `formats.py`, epochs and splits in `source.py`. Nothing about
models, rewards or a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from posttrain.errors import DataError, Problem
from posttrain.protocols import PromptSource, RowRules, Tokenizer
from posttrain.tasks.files import given_rows, read
from posttrain.tasks.formats import Keys
from posttrain.tasks.source import Split, Table, load


@final
@dataclass(frozen=True, slots=True)
class Rows:
    """Prompts from a file, from a folder of files, or from a list of dicts handed over from Python.

    Files are read by their ending: `.jsonl` (and any other: one JSON object per line), `.csv` (a first row of names),
    both also with `.gz`, `.parquet`, and `.arrow`, `.feather` or `.ipc`. They may be larger than memory.
    A prompt is a text or a list of messages. All other columns reach the rewards as keyword arguments; those of an
    RL2 row's `extra_info` do, too, each under its own name. For supervised training an answer stands in `completion`
    (or `response`), or is the last message of the conversation. For training on pairs the better answer stands in
    `chosen` and the other in `rejected`: both as answers to the prompt, or both as whole conversations.
    """

    path: str = field(default="", metadata={"path": True})
    """File of the rows to learn from, or a folder: all its files of these endings, in the order of their names."""
    held_out: str = field(default="", metadata={"path": True})
    """File or folder of the rows to evaluate on."""
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
    chosen_key: str = "chosen"
    """Column of the preferred answer, for training on pairs."""
    rejected_key: str = "rejected"
    """Column of the other answer."""
    limit: int = 0
    """Read only this many of the rows to learn from; 0 reads all."""
    shuffle: bool = True
    """A new order in each epoch; false keeps the order of the file."""

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.rows):
            raise ValueError("give either path (a file or a folder) or rows (a list of dicts, from Python)")
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
        learn = (read(self.path, self.limit) if self.path
                 else Table("rows", given_rows("rows", self.rows[: self.limit or None])))
        held_out = (read(self.held_out) if self.held_out
                    else Table("held_out_rows", given_rows("held_out_rows", self.held_out_rows))
                    if self.held_out_rows else None)
        keys = Keys(self.prompt_key, self.messages_key, self.completion_key, self.chosen_key, self.rejected_key)
        split = Split(self.held_out_fraction, self.split_seed)
        return load(learn, held_out, keys, split, self.shuffle, tokenizer, rules)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as a JSONL file. Raises `DataError` naming a row that JSON cannot hold."""
    lines = []
    for i, row in enumerate(rows):
        try:
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        except (TypeError, ValueError) as error:
            raise DataError([Problem(f"cannot be kept with the run: {error}", f"rows[{i}]")]) from error
    path.write_text("".join(lines), "utf-8")


