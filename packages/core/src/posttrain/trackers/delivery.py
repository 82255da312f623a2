"""Delivers a run to remote trackers from a thread of its own, with a circuit breaker; the loop does nothing for it.

The truth is the run directory. A courier reads what is new there and hands it to a sink, the connection to one remote
run, noting in the ledger what has arrived. A server that is down, slow or hanging costs the loop nothing and loses
nothing: what has not arrived is sent later, in the same run or by `posttrain sync`. Knows no single tracker.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, final, runtime_checkable

from posttrain.checkpoint import FOLDER as CHECKPOINTS
from posttrain.checkpoint import published
from posttrain.progress import doing
from posttrain.protocols import ObservedRun
from posttrain.rundir import CONFIG, MANIFEST, REPORT, SAMPLES
from posttrain.trackers.ledger import Ledger, Record, Status, ledger_path, read_records, waiting

logger = logging.getLogger(__name__)

BATCH = 50
"""Records of one call at most."""

FIRST_DELAY, LAST_DELAY = 1.0, 60.0
"""Seconds until a failed delivery is tried again; doubled each time."""

AT_ONCE = (CONFIG, MANIFEST)
"""Files attached as soon as there is a connection."""

LAST_TRY = 1.5
"""Seconds of a last attempt at the end of a run, where the server has not answered for long."""

LATER = (SAMPLES, REPORT)
"""Files attached with each checkpoint and at the end, where they are there."""


class Sink(Protocol):
    """A connection to one run of a remote tracker. Any call may raise, or hang; none is made from the loop's thread."""

    @property
    def remote(self) -> str:
        """Identity of the remote run."""
        ...
    def last_step(self) -> int | None:
        """The last step that the remote run has, -1 for none; None where only the ledger knows."""
        ...
    def deliver(self, records: Sequence[Record]) -> None:
        """After it returns, the records are there; if it raises, some may be, and all come again."""
        ...
    def attach(self, file: Path) -> None:
        """Keep a copy of a file of the run, in place of an earlier one of that name."""
        ...
    def checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint was published."""
        ...
    def close(self, status: Status, time: float) -> None:
        """The run ended, by its last record at `time` (seconds since 1970)."""
        ...


@runtime_checkable
class Remote(Protocol):
    """A tracker whose records are delivered."""

    @property
    def finish_timeout(self) -> float:
        """Seconds to wait at the end of a run."""
        ...
    def settled(self, directory: Path) -> Remote:
        """The tracker with the place filled in that applies now for a run in `directory`."""
        ...
    def place(self) -> str:
        """Where a settled tracker sends, in words; another place gets all records."""
        ...
    def fields(self) -> Mapping[str, object]:
        """What makes the same tracker again."""
        ...
    def connect(self, directory: Path, ledger: Ledger) -> Sink:
        """Find or make the remote run. Raises where it cannot."""
        ...


def require(tracker: str, *packages: str) -> None:
    """Raise `ValueError`, which names the extra of the tracker's name, where a package is missing; imports nothing."""
    for package in packages:
        if find_spec(package) is None:
            raise ValueError(f"tracker '{tracker}' needs {package}, which is not installed: "
                             f"pip install 'posttrain-core[{tracker}]'")


class Abandoned(Exception):
    """Nobody waits for this delivery any more."""


@final
class Courier:
    """Brings what is new of one run to one remote tracker, in order, at the pace of its caller."""

    def __init__(self, name: str, tracker: Remote, directory: Path) -> None:
        self._tracker, self.directory = tracker.settled(directory), directory
        place = self._tracker.place()
        path = ledger_path(directory, name, place)
        self.ledger = Ledger.load(path) if path.exists() else Ledger(
            name, self._tracker.fields(), place, uuid.uuid4().hex)
        self._sink: Sink | None = None
        self._lock, self._abandoned = threading.Lock(), False
        self._offset = 0
        self._time = 0.0
        self.arrived = time.monotonic()
        """When something last did, on the monotonic clock."""

    def bring(self, status: Status = "running") -> int:
        """Deliver everything that is not there yet, and end the remote run where `status` says that it ended.

        Returns how many records went. Raises whatever the tracker raises; what has arrived is noted all the same.
        """
        sink = self._connected()
        sent = 0
        while batch := self._unread():
            records, end = batch
            if new := [record for record in records if record.step > self.ledger.step]:
                sink.deliver(new)
                self._note(step=new[-1].step)
                sent += len(new)
            self._offset, self._time = end, records[-1].time
        published = self._checkpoints()
        for step, path in published.items():
            sink.checkpoint(step, path)
            self._note(checkpoints=(*self.ledger.checkpoints, step))
        for path, digest in self._files(AT_ONCE + (LATER if published or status != "running" else ())):
            sink.attach(path)
            self._note(files={**self.ledger.files, path.name: digest})
        if status not in ("running", self.ledger.closed):
            sink.close(status, self._time)
            self._note(closed=status)
        return sent

    def _connected(self) -> Sink:
        """The connection, made anew after every failure: the old one may be broken."""
        if self._sink is None:
            self._save(self.ledger)  # the key is known before a remote run can be made
            sink = self._tracker.connect(self.directory, self.ledger)
            known = sink.remote == self.ledger.remote
            fresh = replace(self.ledger, remote=sink.remote, step=-1, checkpoints=(), files={}, closed="running")
            there = sink.last_step()
            found = self.ledger if known else fresh
            found = replace(found, step=found.step if there is None else there)
            self._note_all(replace(found, closed="running") if found.status == "running" else found)
            self._offset, self._sink = 0, sink
        return self._sink

    def idle(self, status: Status) -> bool:
        """Whether everything is there already, so that no connection is needed."""
        return (self.ledger.closed == status and not self.left() and not self._checkpoints()
                and not self._files(AT_ONCE + LATER))

    def disconnect(self) -> None:
        """Forget a connection that failed."""
        self._sink = None

    def _unread(self) -> tuple[list[Record], int] | None:
        records, end = read_records(self.directory, self._offset, BATCH)
        return (records, end) if records else None

    def _checkpoints(self) -> dict[int, Path]:
        """Published checkpoints that are not announced, by step; those deleted in the meantime are gone."""
        return {step: path for step, path in published(self.directory / CHECKPOINTS)
                if step not in self.ledger.checkpoints}

    def _files(self, names: Sequence[str]) -> list[tuple[Path, str]]:
        """Files that are not attached as they are now, with their SHA-256."""
        found = []
        for path in [self.directory / name for name in names]:
            if path.is_file() and path.stat().st_size:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if self.ledger.files.get(path.name) != digest:
                    found.append((path, digest))
        return found

    def _note(self, **changes: object) -> None:
        self._note_all(replace(self.ledger, **changes))  # type: ignore[arg-type]  # fields of a ledger, by name

    def _note_all(self, ledger: Ledger) -> None:
        self._save(ledger)
        self.ledger, self.arrived = ledger, time.monotonic()

    def _save(self, ledger: Ledger) -> None:
        with self._lock:
            if self._abandoned:
                raise Abandoned
            ledger.save(self.directory)

    def abandon(self, status: Status) -> None:
        """Nobody waits any more: what is under way ends without a further trace in the run directory."""
        with self._lock:
            self._abandoned = True
            replace(self.ledger, status=status).save(self.directory)

    def told(self, status: Status) -> None:
        """Keep for `posttrain sync` how the run ended."""
        self.ledger = replace(self.ledger, status=status)

    def left(self) -> int:
        """Records that have not arrived."""
        return waiting(self.directory, self.ledger.step)


@final
class Delivery:
    """A tracker session: a thread that looks for new lines, with a courier; deliveries that fail break the circuit."""

    def __init__(self, name: str, tracker: Remote, run: ObservedRun, *, interval: float = 1.0,
                 give_up: Callable[[], None] = lambda: None) -> None:
        """`interval`: seconds between two looks, so that fast steps are gathered. `give_up`: ends what the tracker's
        client has under way that would hold up the end of the process."""
        self._give_up = give_up
        self._courier = Courier(name, tracker, run.directory)
        self._courier.told("running")
        self._name, self._timeout, self._interval = name, tracker.finish_timeout, interval
        self._ended = threading.Event()
        self._status: Status = "running"
        self._error = ""
        self._alive = time.monotonic()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def phase_started(self, phase: str) -> None:
        pass

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        """The record is in the run directory already; not even a lock is shared with the loop."""

    def finished(self, error: BaseException | None) -> None:
        """Waits for the rest to arrive, `finish_timeout` seconds after the last sign of life of the server, at least
        `LAST_TRY`; then the thread is left to itself."""
        self._status = status_of(error)
        wait = self._patience()
        self._ended.set()
        with doing(f"tracker '{self._name}': sending what has not arrived"):
            self._thread.join(wait)
        if self._thread.is_alive() or self._error:
            self._error = self._error or f"no answer for {time.monotonic() - self._alive:.1f} s"
            self._courier.abandon(self._status)
            self._tell_what_is_left()
            self._give_up()

    def _patience(self) -> float:
        """Seconds that the end of the run is held up at most: short for a server that does not answer for long."""
        silent = time.monotonic() - max(self._alive, self._courier.arrived)
        left = 0.0 if self._error else self._timeout - silent
        return min(max(left, LAST_TRY), self._timeout)

    def _tell_what_is_left(self) -> None:
        courier = self._courier
        logger.warning("tracker '%s': %d records did not arrive at %s (%s); they are in the run directory; send them: "
                       "posttrain sync %s", self._name, courier.left(), courier.ledger.place, self._error,
                       courier.directory)

    def _work(self) -> None:
        delay = 0.0
        while True:
            ended = self._ended.is_set()  # before reading: what is written before the end is read after it
            status = self._status if ended else "running"
            try:
                self._courier.told(status)
                self._courier.bring(status)
            except Abandoned:
                return
            except Exception as error:  # a client of a tracker may raise anything
                delay = self._broken(error, delay)
            else:
                delay = self._whole(delay)
            if ended:
                return
            self._ended.wait(delay or self._interval)

    def _broken(self, error: Exception, delay: float) -> float:
        """Log the first failure of a row of them; seconds until the next try."""
        self._courier.disconnect()
        self._error = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if not delay and not self._ended.is_set():
            logger.warning("tracker '%s' does not take records at %s; training goes on, they are kept and sent later "
                           "(%s)", self._name, self._courier.ledger.place, self._error)
        return min(2 * delay or FIRST_DELAY, LAST_DELAY)

    def _whole(self, delay: float) -> float:
        self._error, self._alive = "", time.monotonic()
        if delay:
            logger.warning("tracker '%s' takes records again; everything so far has arrived", self._name)
        return 0.0


def status_of(error: BaseException | None) -> Status:
    """How a run ended: a stop that was asked for is no failure."""
    from posttrain.run import Interrupted

    if error is None:
        return "finished"
    return "killed" if isinstance(error, KeyboardInterrupt | SystemExit | Interrupted) else "failed"
