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
from operator import itemgetter
from typing import Any, BinaryIO, NamedTuple, final

import numpy as np

from posttrain.errors import DataError, Problem
from posttrain.progress import shown
from posttrain.tasks.formats import Row, row_of
from posttrain.tasks.storage import Storage, stored

LONGEST = 64 << 20
"""Bytes of the longest row; more is a file that is not one row per line."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

BLOCK = 1 << 20
"""Bytes that are searched for line ends at once."""
AT_ONCE = 1 << 14
"""Rows whose places are looked up at once."""

_NEWLINE = ord("\n")
_IS_SPACE = np.array([bytes([byte]).isspace() for byte in range(256)])
_DECODER = json.JSONDecoder()


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
        raw = self.storage.read(int(self.starts[i]), int(self.starts[i + 1]))
        return self.parse(raw, f"{self.name}:{self._lines(np.array(i))}")

    def __iter__(self) -> Iterator[Row]:
        """All rows in order, read in large blocks."""
        with self.storage.open() as file:
            file.read(int(self.starts[0]))
            for first in range(0, len(self), AT_ONCE):
                numbers = np.arange(first, min(first + AT_ONCE, len(self)))
                sizes = np.diff(self.starts[first:first + len(numbers) + 1])
                for line, size in zip(self._lines(numbers).tolist(), sizes.tolist()):
                    yield self.parse(file.read(size), f"{self.name}:{line}")

    def _lines(self, numbers: np.ndarray) -> np.ndarray:
        """The lines on which rows begin, counted from 1."""
        return numbers + 1 + np.searchsorted(self.passed, numbers, side="right")


def read_jsonl(path: str, limit: int = 0, *, name: str = "", own: bool = False) -> Records:
    """The rows of a JSONL file; blank lines are passed over, what is no JSON object is kept as a problem.

    `name` is what errors call it; `own`: nobody else writes it, and it may lose its name."""
    name, found = name or path, stored(path, own)
    begins, spaced = _line_begins(found, name, limit)
    starts, passed = _without_blank(found, begins, spaced)
    if limit:
        starts = starts[:limit + 1]
    return Records(name, found, starts, passed, _from_json)


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
    starts, passed = _csv_index(found, name, limit)
    return Records(name, found, starts, passed, partial(_from_csv, tuple(header)))


def _line_begins(found: Storage, name: str, limit: int) -> tuple[np.ndarray, list[int]]:
    """Bytes where lines begin, and where the last ends; and the numbers of those that begin with white space.

    At least one line more than `limit` rows, where that is not 0 and there are so many. A line begins behind a line
    end, which is found for a whole block at once: to read line by line takes ten times as long.
    """
    pieces, spaced, lines, last, end, before = list[np.ndarray](), list[int](), 0, 0, 0, b"\n"
    with found.open() as file:
        for block, end in shown(_blocks(file), f"{name}: found the rows of", found.size, "bytes", itemgetter(1)):
            data = np.frombuffer(before + block, np.uint8)
            inside = np.flatnonzero(data[:-1] == _NEWLINE)
            begins, before = inside + end - len(block), block[-1:]
            _refuse_longest(np.concatenate([[last], begins, [end]]), lines, name)
            spaced += (lines + np.flatnonzero(_IS_SPACE[data[1:][inside]])).tolist()
            pieces.append(begins)
            lines, last = lines + len(begins), int(begins[-1]) if len(begins) else last
            if limit and lines - len(spaced) > limit + 1:  # the first line may hold nothing but a byte order mark
                break
    return np.concatenate([*pieces, [end]]), spaced


def _blocks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Blocks of a file, each with the place where it ends."""
    end = 0
    for block in iter(partial(file.read, BLOCK), b""):
        end += len(block)
        yield block, end


def _refuse_longest(edges: np.ndarray, lines: int, name: str) -> None:
    """Raise `DataError` where two edges lie `LONGEST` or more apart; `lines` have begun up to the first."""
    sizes = np.diff(edges)
    if sizes.max() >= LONGEST:
        raise DataError([Problem(f"the line is longer than {LONGEST >> 20} MiB; JSONL has one row per line",
                                 f"{name}:{lines + int(sizes.argmax())}")])


def _without_blank(found: Storage, begins: np.ndarray, spaced: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """`Records.starts` and `passed`: the lines that are not blank, the first without a byte order mark."""
    if found.read(0, len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK:
        begins[0] = len(BYTE_ORDER_MARK)
        spaced = [0, *spaced]
    blank = [i for i in spaced if not found.read(int(begins[i]), int(begins[i + 1])).strip()]
    if not blank:
        return begins, np.zeros(0, np.int64)
    kept = np.ones(len(begins), bool)
    kept[blank] = False
    return begins[kept], np.cumsum(kept)[blank]


def _csv_index(found: Storage, name: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """`Records.starts` and `passed` of the rows below the header, or of the first `limit`."""
    starts, passed, end, line = array("q"), array("q"), 0, 1
    with found.open() as file:
        records = shown(islice(_csv_records(file, name), 1, None), f"{name}: found the rows of", found.size, "bytes",
                        lambda record: record.end)
        for i, record in enumerate(islice(records, limit or None)):
            starts.append(record.start)
            passed.extend([i] * (record.line - line))
            end, line = record.end, record.line + 1
    starts.append(end)
    return np.frombuffer(starts, np.int64), np.frombuffer(passed, np.int64)


def _from_json(raw: bytes, where: str) -> Row:
    try:
        columns = _parsed(raw.partition(b"\n")[0].decode())
    except UnicodeDecodeError as error:
        return Row(where, problem=f"byte {error.start + 1} of the line is not UTF-8 ({error.reason}); save the file as "
                                  "UTF-8")
    except json.JSONDecodeError as error:
        return Row(where, problem=f"not JSON: {error.msg} at character {error.pos + 1}")
    except RecursionError:
        return Row(where, problem="not usable JSON: nested too deeply")
    return row_of(where, columns)


def _parsed(text: str) -> Any:
    """`json.loads`, which looks for white space around the object for longer than it parses a short one."""
    if text.startswith("{"):
        columns, end = _DECODER.raw_decode(text)
        if end == len(text):
            return columns
    return json.loads(text)


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
