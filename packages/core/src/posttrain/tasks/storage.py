"""Bytes of a data file, read at any place: in memory where they are few, else from the file as rows are asked for.

Knows neither rows nor formats. A large file that is no longer what it was when it was opened is an error, never a
silently different row.
"""

from __future__ import annotations

import errno
import gzip
import io
import os
import tempfile
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol, final

from posttrain.errors import DataError, Problem

KEPT = 64 << 20
"""Files up to this many bytes are kept in memory, so that changing one does not disturb a run."""


class Storage(Protocol):
    """Bytes that are read by place; safe to share with forked processes, since there is no position."""

    @property
    def size(self) -> int: ...
    def read(self, start: int, end: int) -> bytes: ...
    def open(self) -> BinaryIO:
        """The bytes from the beginning."""
        ...


@final
@dataclass(frozen=True, slots=True)
class InMemory:
    """A small file, read whole."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, start: int, end: int) -> bytes:
        return self.data[start:end]

    def open(self) -> BinaryIO:
        return io.BytesIO(self.data)


@final
@dataclass(frozen=True, slots=True)
class Stamp:
    """By what a file is recognised: its identity, size and time of change."""

    path: str
    seen: tuple[int, int, int, int]

    @classmethod
    def of(cls, path: str) -> Stamp:
        return cls(path, _seen(path))

    def check(self) -> None:
        """Raise `DataError` where the file is not the one that was checked."""
        if _seen(self.path) != self.seen:
            raise DataError([Problem("the file was changed after its rows were checked; start again to read it anew, "
                                     "and write new rows to another file while a run reads this one", self.path)])


def _seen(path: str) -> tuple[int, int, int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from error
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@final
@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class OnDisk:
    """A file that stays where it is, by its descriptor; `stamp` is absent for a copy of our own that nobody changes."""

    descriptor: int
    size: int
    stamp: Stamp | None = None

    def __post_init__(self) -> None:
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, start: int, end: int) -> bytes:
        if self.stamp is not None:
            self.stamp.check()
        return os.pread(self.descriptor, end - start, start)

    def open(self) -> BinaryIO:
        return io.BufferedReader(_Sequential(self), 1 << 20)


class _Sequential(io.RawIOBase):
    """Reads a file from its beginning without moving the descriptor's own position."""

    def __init__(self, source: OnDisk) -> None:
        self.source, self.position = source, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self.source.read(self.position, self.position + len(buffer))
        buffer[: len(found)] = found
        self.position += len(found)
        return len(found)


def stored(path: str, own: bool = False) -> Storage:
    """The bytes of a file, those of a `.gz` unpacked (to a file without a name in the temporary directory where they
    are many). `own`: nobody else writes the file. Raises `DataError` where it cannot be read."""
    try:
        if path.endswith(".gz"):
            return _unpacked(path)
        if Path(path).stat().st_size <= KEPT:
            return InMemory(Path(path).read_bytes())
        stamp = Stamp.of(path)
        return OnDisk(os.open(path, os.O_RDONLY), stamp.seen[2], None if own else stamp)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from error


def _unpacked(path: str) -> Storage:
    with gzip.open(path) as packed:
        start = packed.read(KEPT + 1)
        if len(start) <= KEPT:
            return InMemory(start)
        with temporary(path, ".jsonl") as copy:
            copy.write(start)
            for block in iter(lambda: packed.read(1 << 20), b""):
                copy.write(block)
            copy.flush()
            return OnDisk(os.dup(copy.fileno()), copy.tell())


@contextmanager
def temporary(path: str, suffix: str) -> Iterator[IO[bytes]]:
    """A file of our own into which `path` is unpacked; it loses its name at the end, so that nothing is left behind."""
    with tempfile.NamedTemporaryFile(prefix="posttrain-", suffix=suffix) as copy:
        try:
            yield copy
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DataError([Problem(f"there is no room to unpack it into {tempfile.gettempdir()}: {error.strerror}; "
                                     "name a folder with room by the variable TMPDIR", path)]) from error


def unreadable(path: str, error: Exception) -> DataError:
    """The error of a file that the system or a library cannot read."""
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return DataError([Problem(f"the rows cannot be read: {why}; a path stands relative to the configuration file",
                              path)])
