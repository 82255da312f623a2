"""The process of a trial: `python -m posttrain_tuning.search.worker LEASE RUNG ARGUMENTS...` is `posttrain
ARGUMENTS...` under a lease.

A lease is a file that says which process has the trial, and later how it ended; its lock says whether that process
lives, also to a study that did not start it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import final

TAKEN = 75
"""Exit code where another process has the lease."""
PATIENCE = 10.0
"""Seconds to wait for a lease whose holder is dead."""
MEMORY = 5
"""Exit code where memory ran out, as of `posttrain.errors.MemoryExhausted`."""


@final
@dataclass(frozen=True, slots=True)
class Lease:
    """Who has a trial."""

    pid: int
    started: float
    """Time at which the process was made, by which it is told from a later one of the same number."""
    host: str
    rung: int
    """Number of the rung, or the end behind all of them, that it is to reach."""
    exit: int | None = None
    """How it ended; None while it lives, or where it was killed."""

    @property
    def alive(self) -> bool:
        """Whether the process lives; one of another machine is taken to live until it says that it ended."""
        import psutil

        if self.exit is not None:
            return False
        if self.host != socket.gethostname():
            return True
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def read(path: Path) -> Lease | None:
    """The lease in a file; None where there is none."""
    try:
        return Lease(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write(path: Path, lease: Lease) -> None:
    """Whole or not at all."""
    whole = path.with_name(f".{path.name}-{os.getpid()}")
    whole.write_text(json.dumps(asdict(lease)), "utf-8")
    os.replace(whole, path)


def main(arguments: Sequence[str]) -> int:
    """Take the lease, run the command, say how it ended."""
    import psutil
    from filelock import FileLock, Timeout

    path = Path(arguments[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, before = FileLock(path.with_suffix(".lock")), read(path)
    try:  # what a process that was killed has forked may hold the lock a moment longer
        lock.acquire(timeout=0 if before is not None and before.alive else PATIENCE)
    except Timeout:
        return TAKEN
    lease = Lease(os.getpid(), psutil.Process().create_time(), socket.gethostname(), int(arguments[1]))
    write(path, lease)
    code = 1
    try:
        code = _command(arguments[2:])
    finally:
        write(path, replace(lease, exit=code))
    return code


def _command(arguments: Sequence[str]) -> int:
    from posttrain import cli

    try:
        return cli.main(arguments)
    except MemoryError:
        return MEMORY
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # of torch, outside of what a backend guards
            print(error, file=sys.stderr)
            return MEMORY
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
