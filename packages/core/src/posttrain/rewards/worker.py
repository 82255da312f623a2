"""What runs inside a reward worker: load rewards once, then answer calls until the pipe closes.

A worker lives in a session of its own, with one thread per library, deaf to Ctrl-C, and dies with the process that
started it. Imports no framework. Knows nothing of runs: a request is a reward's number, its columns and their length.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from posttrain.rewards.calls import Origin, Raised, outcome, raised

OUT_OF_MEMORY = 70
"""Exit status after a `MemoryError`: what it left behind is not trusted, the process is replaced."""

ONE_THREAD = {name: "1" for name in (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
} | {"TOKENIZERS_PARALLELISM": "false"}
"""Environment of a worker: there are as many workers as cores."""

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """A fresh worker: `fd parent` are its arguments, the rewards' origins its first message."""
    connection, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    isolate(parent)
    calls: list[Callable[..., Any] | Raised] = []
    with suppress(EOFError, OSError):  # the run ended
        origins: Sequence[Origin] = pickle.loads(connection.recv_bytes())
        for origin in origins:
            try:
                calls.append(origin.load())
            except Exception as error:  # the user's own file may raise anything
                calls.append(raised(error))
        serve(connection, calls)


def isolate(parent: int) -> None:
    """Leave the terminal's signals to the run, print to stderr alone, and die with the process `parent`."""
    if os.getsid(0) != os.getpid():
        os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    die_with_parent(parent)
    sys.stdout = sys.stderr  # what a reward prints is no output of the run, which may be read by a program
    os.dup2(2, 1)


def die_with_parent(parent: int) -> None:
    """Be killed when `parent` ends, however it ends. Linux; elsewhere a worker ends when it next reads its pipe."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def serve(connection: Connection, calls: Sequence[Callable[..., Any] | Raised]) -> None:
    """Say which rewards could not be loaded, then answer one request at a time."""
    connection.send_bytes(pickle.dumps([call if isinstance(call, Raised) else None for call in calls]))
    while True:
        reward, columns, rows = pickle.loads(connection.recv_bytes())
        call = calls[reward]
        try:
            answer = pickle.dumps(call if isinstance(call, Raised) else outcome(call, columns, rows))
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        connection.send_bytes(answer)
