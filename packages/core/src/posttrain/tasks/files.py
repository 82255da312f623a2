"""Rows of a file by its ending, of a folder of files, or of a Python list: each a sequence of rows.

Knows which module reads which ending; not what columns mean.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, final

from posttrain.errors import SHOWN, DataError, Problem
from posttrain.tasks.arrow import read_arrow, read_parquet
from posttrain.tasks.formats import Row, RowTable, row_of
from posttrain.tasks.records import read_csv, read_jsonl
from posttrain.tasks.source import Table

Reader = Callable[[str, int], RowTable]
"""Path and number of rows (0: all) -> rows."""

READERS: Mapping[str, Reader] = {
    ".jsonl": read_jsonl, ".ndjson": read_jsonl, ".json": read_jsonl, ".csv": read_csv,
    ".parquet": read_parquet, ".arrow": read_arrow, ".feather": read_arrow, ".ipc": read_arrow}
"""Ending -> what reads it; JSONL and CSV may also end in `.gz`."""

PACKED = (".jsonl.gz", ".ndjson.gz", ".json.gz", ".csv.gz")


def read(path: str, limit: int = 0) -> Table:
    """The rows of a file or a folder, at most `limit` where that is not 0. Raises `DataError` where they cannot be
    read."""
    if not Path(path).is_dir():
        return Table(path, _reader(path)(path, limit))
    files = [str(p) for p in sorted(Path(path).iterdir()) if p.is_file() and _ends(p.name)]
    if not files:
        raise DataError([Problem("the rows cannot be read: the folder holds no file that ends in "
                                 f"{', '.join([*READERS, *PACKED])}", path)])
    parts, left = list[RowTable](), limit
    for file in files:
        if limit and not left:
            break
        parts.append(_reader(file)(file, left))
        left -= min(left, len(parts[-1]))
    return Table(path, Joined(parts, [0, *accumulate(map(len, parts))]))


def given_rows(name: str, rows: Sequence[Any]) -> RowTable:
    """Rows handed over from Python, as they are when the run is resumed and reads them from the file that is kept.

    Raises one `DataError` with every row that JSON cannot hold.

    >>> given_rows("rows", [{"prompt": "1+1=", "near": (1, 3)}])[0].columns
    {'prompt': '1+1=', 'near': [1, 3]}
    """
    kept, wrong = list[Row](), list[Problem]()
    for i, columns in enumerate(rows):
        try:
            kept.append(row_of(f"{name}[{i}]", json.loads(json.dumps(columns, ensure_ascii=False).encode())))
        except (TypeError, ValueError) as error:
            wrong.append(Problem(f"cannot be kept with the run as JSON: {error}", f"{name}[{i}]"))
    if wrong:
        raise DataError(wrong[:SHOWN], f"{name}: {len(wrong)} of {len(rows)} rows cannot be kept")
    return kept


def _ends(name: str) -> bool:
    return Path(name).suffix in READERS or name.endswith(PACKED)


def _reader(path: str) -> Reader:
    return READERS.get(Path(path.removesuffix(".gz")).suffix, read_jsonl)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """The rows of several files one after the other; `starts[i]` is the number of the first row of file `i`."""

    parts: Sequence[RowTable]
    starts: Sequence[int]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, number: int) -> Row:
        i = range(len(self))[number]
        part = bisect_right(self.starts, i) - 1
        return self.parts[part][i - self.starts[part]]

    def __iter__(self) -> Iterator[Row]:
        return chain.from_iterable(self.parts)
