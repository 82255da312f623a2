"""Rows of text files, JSONL and CSV: an index of where each row begins, and rows parsed when they are asked for.

The index takes 8 bytes per row and is made in one pass, so a file may be larger than memory. Knows bytes, lines and
columns; not what columns mean.
"""

from __future__ import annotations

import csv
import io
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import BinaryIO, NamedTuple, final

import numpy as np

from posttrain.errors import DataError, Problem
from posttrain.tasks.formats import Row, row_of
from posttrain.tasks.progress import shown
from posttrain.tasks.storage import Storage, stored

LONGEST = 64 << 20
"""Bytes of the longest row; more is a file that is not one row per line."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """Where a row stands in its file: bytes `start .. end`, from line `line` on."""

    start: int
    end: int
    line: int


@final
@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """The rows of a text file.

    `starts[n + 1]` are the bytes where rows begin, and where the last ends. `passed` names, for each line that begins
    no row, the row that comes after it: so a row's line is its number plus the lines passed until then.
    """

    name: str
    storage: Storage
    starts: np.ndarray
    passed: np.ndarray
    parse: Callable[[bytes, str], Row]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> Row:
        i = range(len(self))[number]
        return self._row(i, self.storage.read(int(self.starts[i]), int(self.starts[i + 1])))

    def __iter__(self) -> Iterator[Row]:
        """All rows in order, read in large blocks."""
        with self.storage.open() as file:
            file.read(int(self.starts[0]))
            for i in range(len(self)):
                yield self._row(i, file.read(int(self.starts[i + 1] - self.starts[i])))

    def _row(self, i: int, raw: bytes) -> Row:
        line = i + 1 + (int(np.searchsorted(self.passed, i, side="right")) if len(self.passed) else 0)
        return self.parse(raw, f"{self.name}:{line}")


def read_jsonl(path: str, limit: int = 0, *, name: str = "", own: bool = False) -> Records:
    """The rows of a JSONL file; blank lines are passed over, what is no JSON object is kept as a problem.

    `name` is what errors call it; `own`: nobody else writes it, and it may lose its name."""
    return _indexed(name or path, stored(path, own), _lines, _from_json, limit)


def read_csv(name: str, limit: int = 0) -> Records:
    """The rows of a CSV file, whose first one names the columns. Values are text. A row may span several lines."""
    found = stored(name)
    with found.open() as file:
        first = next(_csv_records(file, name), None)
    try:
        header = [] if first is None else _fields(found.read(first.start, first.end))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError([Problem(f"the first row, the names of the columns, is unreadable: {error}", name)]) from error
    if not all(header) or len(set(header)) < len(header):
        raise DataError([Problem(f"the first row should name every column, each once; found {', '.join(header)}",
                                 name)])
    return _indexed(name, found, lambda file, name: islice(_csv_records(file, name), 1, None),
                    partial(_from_csv, tuple(header)), limit)


def _indexed(name: str, found: Storage, scan: Callable[[BinaryIO, str], Iterator[Record]],
             parse: Callable[[bytes, str], Row], limit: int) -> Records:
    """The index of a file, or of its first `limit` rows."""
    starts, passed, end, line = array("q"), array("q"), 0, 1
    with found.open() as file:
        records = shown(scan(file, name), f"{name}: found the rows of", found.size, "bytes", lambda record: record.end)
        for i, record in enumerate(islice(records, limit or None)):
            starts.append(record.start)
            passed.extend([i] * (record.line - line))
            end, line = record.end, record.line + 1
    starts.append(end)
    return Records(name, found, np.frombuffer(starts, np.int64), np.frombuffer(passed, np.int64), parse)


def _lines(file: BinaryIO, name: str) -> Iterator[Record]:
    """The lines that are not blank."""
    start = end = 0
    for number, line in enumerate(iter(partial(file.readline, LONGEST), b""), start=1):
        start, end = end, end + len(line)
        if len(line) == LONGEST:
            raise DataError([Problem(f"the line is longer than {LONGEST >> 20} MiB; JSONL has one row per line",
                                     f"{name}:{number}")])
        if number == 1 and line.startswith(BYTE_ORDER_MARK):
            start, line = start + len(BYTE_ORDER_MARK), line.removeprefix(BYTE_ORDER_MARK)
        if line.strip():
            yield Record(start, end, number)


def _from_json(raw: bytes, where: str) -> Row:
    try:
        columns = json.loads(raw.partition(b"\n")[0].decode())
    except UnicodeDecodeError as error:
        return Row(where, problem=f"byte {error.start + 1} of the line is not UTF-8 ({error.reason}); save the file as "
                                  "UTF-8")
    except json.JSONDecodeError as error:
        return Row(where, problem=f"not JSON: {error.msg} at character {error.pos + 1}")
    except RecursionError:
        return Row(where, problem="not usable JSON: nested too deeply")
    return row_of(where, columns)


def _csv_records(file: BinaryIO, name: str) -> Iterator[Record]:
    """The rows of a CSV file, the header among them; blank lines are passed over."""
    end = number = 0

    def lines() -> Iterator[str]:
        nonlocal end, number
        for line in iter(partial(file.readline, LONGEST), b""):
            end, number = end + len(line), number + 1
            yield _text(line, "surrogateescape")  # what is no UTF-8 is reported with its row
    reader = csv.reader(lines(), strict=True)
    while True:
        start, line = end, number + 1
        try:
            fields = _next(reader)
        except StopIteration:
            return
        except csv.Error:  # found again, and reported, where the row is parsed
            fields = [""]
        if fields:
            yield Record(start, end, line)


def _from_csv(header: Sequence[str], raw: bytes, where: str) -> Row:
    try:
        fields = _fields(raw)
    except UnicodeDecodeError as error:
        return Row(where, problem=f"byte {error.start + 1} of the row is not UTF-8 ({error.reason}); save the file as "
                                  "UTF-8")
    except csv.Error as error:
        return Row(where, problem=f"not CSV: {error}")
    if len(fields) != len(header):
        return Row(where, problem=f"the row has {len(fields)} columns, but the first row names {len(header)}; put a "
                                  "text that holds a comma in double quotes")
    return row_of(where, dict(zip(header, fields)))


def _fields(raw: bytes) -> list[str]:
    return _next(csv.reader(io.StringIO(_text(raw, "strict"), newline=""), strict=True))


def _text(raw: bytes, errors: str) -> str:
    return raw.removeprefix(BYTE_ORDER_MARK).decode("utf-8", errors)


def _next(reader: Iterator[list[str]]) -> list[str]:
    """The next row, however long its fields are: the csv module's limit of 128 KiB holds for the whole process."""
    before = csv.field_size_limit(LONGEST)
    try:
        return next(reader)
    finally:
        csv.field_size_limit(before)
