"""What runs inside a reward worker: load rewards once, then answer calls until the pipe closes.

A worker lives in a session of its own, with one thread per library, deaf to Ctrl-C, and dies with the process that
started it. Imports no framework. Knows nothing of runs: a request is a reward's number, its columns and their length.
"""

from __future__ import annotations

import ctypes
import io
import os
import pickle
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
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
    """A fresh worker: `fd parent` are its arguments, its first message the
    files of modules that only the run could import, and the rewards' origins."""
    connection, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    isolate(parent)
    calls: list[Callable[..., Any] | Raised] = []
    with suppress(EOFError, OSError):  # the run ended
        modules, origins = pickle.loads(connection.recv_bytes())
        read = partial(unpickled, modules)
        for sent in origins:
            try:
                origin: Origin = read(sent)
                calls.append(origin.load())
            except Exception as error:  # the user's own file may raise anything
                calls.append(raised(error))
        serve(connection, calls, read)


def unpickled(modules: Mapping[str, str], sent: bytes) -> Any:
    """What the run sent. Its plugins in single files have modules that can be imported by their files alone: `modules`
    says which those are."""
    return _Unpickler(io.BytesIO(sent), modules).load()


class _Unpickler(pickle.Unpickler):
    """Imports a module from its file where a class of it is met."""

    def __init__(self, file: io.BytesIO, modules: Mapping[str, str]) -> None:
        super().__init__(file)
        self._modules = modules

    def find_class(self, module: str, name: str, /) -> Any:
        if module in self._modules and module not in sys.modules:
            from posttrain.registry import import_file  # only here: most workers need no registry

            import_file(Path(self._modules[module]))
        return super().find_class(module, name)


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


def serve(connection: Connection, calls: Sequence[Callable[..., Any] | Raised],
          read: Callable[[bytes], Any] = pickle.loads) -> None:
    """Say which rewards could not be loaded, then answer one request at a time, as `read` understands it."""
    connection.send_bytes(pickle.dumps([call if isinstance(call, Raised) else None for call in calls]))
    while True:
        sent = connection.recv_bytes()
        try:
            reward, columns, rows = read(sent)
            call = calls[reward]
            answer = pickle.dumps(call if isinstance(call, Raised) else outcome(call, columns, rows))
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        except Exception as error:  # a column cannot be unpickled here
            answer = pickle.dumps(raised(error))
        connection.send_bytes(answer)
