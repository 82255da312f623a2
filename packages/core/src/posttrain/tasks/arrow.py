"""Rows of Parquet, Arrow and Feather files: memory-mapped record batches, turned into Python values row by row.

Parquet and compressed Arrow can only be read in large pieces; they are unpacked once into a file without a name in the
temporary directory. Nested columns become lists and dicts as a JSONL file has them. Knows tables of pyarrow, which is
imported when a table is read; not what columns mean.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
from typing import Any, final

from posttrain.errors import DataError, PluginError, Problem
from posttrain.progress import shown
from posttrain.tasks.formats import Row, row_of
from posttrain.tasks.storage import Stamp, temporary, unreadable

log = logging.getLogger(__name__)

Arrow = Any
"""The module, a schema, a type, a record batch: pyarrow ships no types."""

BATCH = 1024
"""Rows that are turned into Python values at once."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class ArrowRows:
    """Rows of record batches; `starts[i]` is the number of the first row of batch `i`, the last the number of rows."""

    name: str
    batches: Sequence[Arrow]
    starts: Sequence[int]
    schema: Arrow
    """What rows are given as: the columns that JSON can hold, dates and decimals as text."""
    stamp: Stamp | None = None

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, number: int) -> Row:
        if self.stamp is not None:
            self.stamp.check()
        i = range(len(self))[number]
        batch = bisect_right(self.starts, i) - 1
        (row,) = self._rows(batch, i - self.starts[batch], 1)
        return row

    def __iter__(self) -> Iterator[Row]:
        for batch, start in enumerate(self.starts[:-1]):
            for first in range(0, self.starts[batch + 1] - start, BATCH):
                yield from self._rows(batch, first, BATCH)

    def _rows(self, batch: int, first: int, count: int) -> list[Row]:
        piece = self.batches[batch].select(self.schema.names).slice(first, count)
        number = self.starts[batch] + first + 1
        return [row_of(f"{self.name}:row {number + i}", columns)
                for i, columns in enumerate(piece.cast(self.schema).to_pylist())]


def read_arrow(name: str, limit: int = 0) -> ArrowRows:
    """The rows of an Arrow file (Feather version 2, IPC file or stream): mapped where it is, unpacked if compressed."""
    pa = _pyarrow(name)
    stamp = Stamp.of(name)
    try:
        with pa.memory_map(name) as source:
            whole = source.read_buffer()
        schema, batches = _opened(pa, whole)
        mapped = []
        for batch in batches:
            if not _inside(batch, whole):
                return _unpacked(pa, name, schema, _opened(pa, whole)[1], limit)
            mapped.append(batch)
        return _rows(name, mapped, as_json(name, schema), limit, stamp)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(name, error) from error


def read_parquet(name: str, limit: int = 0) -> ArrowRows:
    """The rows of a Parquet file, unpacked."""
    pa = _pyarrow(name)
    try:
        with pa.parquet.ParquetFile(name) as file:
            total = -(-file.metadata.num_rows // BATCH)
            batches = shown(file.iter_batches(BATCH), f"{name}: unpacked", total, f"batches of {BATCH} rows")
            return _unpacked(pa, name, file.schema_arrow, batches, limit)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(name, error) from error


def _pyarrow(name: str) -> Arrow:
    try:
        import_module("pyarrow.parquet")
        return import_module("pyarrow")
    except ImportError as error:
        raise PluginError([Problem("reading Parquet and Arrow needs pyarrow, which is not installed: "
                                   "pip install 'posttrain-core[data]'", name)]) from error


def _opened(pa: Arrow, whole: Arrow) -> tuple[Arrow, Iterator[Arrow]]:
    """Schema and batches of the bytes of an IPC file or, failing that, of a stream."""
    try:
        file = pa.ipc.open_file(pa.BufferReader(whole))
        return file.schema, map(file.get_batch, range(file.num_record_batches))
    except pa.ArrowInvalid:
        stream = pa.ipc.open_stream(pa.BufferReader(whole))
        return stream.schema, iter(stream)


def _inside(batch: Arrow, whole: Arrow) -> bool:
    """Whether a batch lies in the mapped bytes themselves, so that it takes no memory."""
    buffers = [b for column in batch.columns for b in column.buffers() if b is not None and b.size]
    return all(whole.address <= b.address < whole.address + whole.size for b in buffers)


def _rows(name: str, batches: Sequence[Arrow], schema: Arrow, limit: int, stamp: Stamp | None) -> ArrowRows:
    starts = [0, *accumulate(batch.num_rows for batch in batches)]
    if limit and starts[-1] > limit:
        starts = [min(start, limit) for start in starts]
    return ArrowRows(name, batches, starts, schema, stamp)


def _unpacked(pa: Arrow, name: str, schema: Arrow, batches: Iterable[Arrow], limit: int) -> ArrowRows:
    """The batches, mapped from a file of our own that loses its name at once and so goes with the process."""
    kept, rows = as_json(name, schema), 0
    with temporary(name, ".arrow") as copy:
        with pa.ipc.new_file(copy.name, kept) as writer:
            for batch in batches:
                writer.write_batch(batch.select(kept.names).cast(kept))
                rows += batch.num_rows
                if limit and rows >= limit:
                    break
        with pa.memory_map(copy.name) as source:
            _, mapped = _opened(pa, source.read_buffer())
    return _rows(name, list(mapped), kept, limit, None)


def as_json(name: str, schema: Arrow) -> Arrow:
    """The columns that JSON can hold, dates and decimals as text; what is left out is said."""
    pa = _pyarrow(name)
    kept = {field.name: _json_type(pa, field.type) for field in schema}
    if len(kept) < len(schema):
        raise DataError([Problem(f"two columns have one name: {', '.join(schema.names)}", name)])
    if left := [f"'{field.name}' ({field.type})" for field in schema if kept[field.name] is None]:
        log.warning("%s: left out %s: rewards receive texts, numbers, lists and objects", name, ", ".join(left))
    return pa.schema([(column, kind) for column, kind in kept.items() if kind is not None])


def _json_type(pa: Arrow, kind: Arrow) -> Arrow:
    """The type whose values JSON can hold, or None: `list<timestamp>` becomes `list<string>`."""
    is_ = pa.types
    if is_.is_list(kind) or is_.is_large_list(kind) or is_.is_fixed_size_list(kind):
        inner = _json_type(pa, kind.value_type)
        return None if inner is None else pa.large_list(inner)
    if is_.is_struct(kind):
        parts = [(part.name, _json_type(pa, part.type)) for part in kind]
        return None if any(inner is None for _, inner in parts) else pa.struct(parts)
    if is_.is_dictionary(kind):
        return _json_type(pa, kind.value_type)
    if is_.is_temporal(kind) or is_.is_decimal(kind):
        return pa.string()
    texts = (is_.is_string, is_.is_large_string, is_.is_string_view)
    plain = (*texts, is_.is_boolean, is_.is_integer, is_.is_floating, is_.is_null)
    return kind if any(fits(kind) for fits in plain) else None
