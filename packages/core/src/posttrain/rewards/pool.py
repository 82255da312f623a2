"""Reward workers: warm processes that are given calls, killed at a deadline, replaced when they die.

Two kinds of process, one loop:

- *fresh* ones hold every reward that a configuration names (a component, `file: path.py:name`); they import what these
  need and no framework, and share the work;
- a *forked* one holds one function handed over from Python, with all that it refers to. Forking copies the memory but
  not the threads of the run, so such a reward must not use CUDA, and PyTorch only with one thread (which is set).
  What it remembers from call to call, it remembers in its worker, as long as that lives.

A reward that is a model (a `RewardSource`) has no worker: it is loaded into this process and called in it, without
deadline.

Where forking is not possible (not Linux, `reward_workers.fork: false`) a function from Python is called in process,
without deadline, after one warning. Knows calls and processes; what an outcome means is in `scoring.py`.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Any, Protocol, Self

from posttrain.errors import RewardError
from posttrain.hookspecs import IN_FILE
from posttrain.protocols import Reward, RewardSource
from posttrain.rewards.calls import Ended, Origin, Outcome, Overdue, outcome
from posttrain.rewards.worker import ONE_THREAD, isolate, serve

log = logging.getLogger(__name__)

MOST = 8
"""Workers that are started unless a configuration asks for more."""
START_SECONDS = 120.0
"""What a worker may take to load its rewards."""
GRACE_SECONDS = 0.5
"""What idle workers are given to end by themselves."""


class Called(Protocol):
    """A reward as the pool sees it."""

    @property
    def name(self) -> str: ...
    @property
    def call(self) -> Callable[..., Any] | RewardSource: ...
    @property
    def origin(self) -> Origin | None:
        """None where it was handed over from Python."""
        ...
    @property
    def timeout(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Job:
    """One call: a reward's number, the rows it is called on, and their columns."""

    reward: int
    rows: tuple[int, ...]
    columns: Mapping[str, Sequence[Any]]


@dataclass(slots=True)
class _Worker:
    """A process at the other end of a pipe."""

    connection: Connection
    pid: int
    reap: Callable[[], int]
    """Wait for its end; its exit status, negative for a signal."""
    due: float
    """When it must have answered, on the monotonic clock."""
    ready: bool = False
    job: Job | None = None

    def kill(self) -> int:
        """End it and all it started in its session."""
        self.connection.close()
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not made its session yet, or is gone
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        return self.reap()


@dataclass(slots=True)
class _Crew:
    """Workers that hold the same rewards, and the calls that wait for them."""

    rewards: tuple[int, ...]
    size: int
    start: Callable[[], _Worker]
    workers: list[_Worker] = field(default_factory=list)
    waiting: deque[Job] = field(default_factory=deque)


class Pool:
    """The workers of a run's rewards. A context: entering starts them, leaving ends them, whatever happened.

    Calls are run in any order and by any worker; what comes back is in the order of the calls, so results do not
    depend on the number of workers. To be used by the thread that entered it.
    """

    def __init__(self, rewards: Sequence[Called], count: int = 0, fork: bool = True, training_threads: int = 0) -> None:
        """`count` fresh workers; 0: one for each core at hand beyond `training_threads`, at least 1, at most `MOST`."""
        self.rewards = tuple(rewards)
        self.respawned = dict.fromkeys((r.name for r in rewards), 0)
        """Workers that were replaced, by the reward they were busy with."""
        self._crews: list[_Crew] = []
        self._crew_of: dict[int, _Crew] = {}
        self._models: dict[int, Reward] = {}
        self._threads = training_threads
        functions = [i for i, r in enumerate(rewards) if callable(r.call)]
        named = tuple(i for i in functions if _travels(rewards[i].origin))
        if named:
            self._add(_Crew(named, count or _workers_at_hand(training_threads), self._fresh))
        for i in sorted({*functions} - {*named}):
            if fork and sys.platform == "linux":
                self._add(_Crew((i,), 1, partial(self._forked, i)))
        self._named = named

    def __enter__(self) -> Self:
        local = [r.name for i, r in enumerate(self.rewards) if i not in self._crew_of and callable(r.call)]
        if local:
            log.warning("called in this process, without a deadline, since functions from Python need a fork: %s; name "
                        "them as file: path.py:name to have them in workers", ", ".join(local))
        self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all workers: idle ones by themselves, busy ones at once."""
        workers = [w for crew in self._crews for w in crew.workers]
        for crew in self._crews:
            crew.workers.clear()
            crew.waiting.clear()
        idle = [w for w in workers if w.ready and w.job is None]
        for worker in idle:
            with suppress(OSError):
                worker.connection.send_bytes(b"")  # no request: it ends as at the end of the pipe
        until = time.monotonic() + GRACE_SECONDS
        while idle and time.monotonic() < until:
            for connection in wait([w.connection for w in idle], max(0.0, until - time.monotonic())):
                idle = [w for w in idle if w.connection is not connection]
        for worker in workers:
            worker.kill()

    def shared(self, reward: int) -> bool:
        """Whether the reward's calls are shared out among workers; else one call holds all rows of a step."""
        return reward in self._named

    def load(self, reward: int) -> None:
        """Load a reward that is a model, unless it is loaded; one that is a function needs nothing here."""
        source = self.rewards[reward].call
        if not callable(source) and reward not in self._models:
            self._models[reward] = source.load(self._threads)

    def call(self, reward: int) -> Callable[..., Any]:
        """The function of a reward; a model is loaded for it."""
        function = self.rewards[reward].call
        if callable(function):
            return function
        self.load(reward)
        return self._models[reward]

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """The outcome of each job. Starts workers where none are there; an exception leaves none that is busy."""
        self._start()
        found: dict[int, Outcome] = {}
        number = {id(job): i for i, job in enumerate(jobs)}
        for job in jobs:
            if job.reward in self._crew_of:
                self._crew_of[job.reward].waiting.append(job)
        try:
            self._hand_out()
            for i, job in enumerate(jobs):  # while the workers are busy
                if job.reward not in self._crew_of:
                    found[i] = outcome(self.call(job.reward), job.columns, len(job.rows))
            while len(found) < len(jobs):
                for job, result in self._finished():
                    found[number[id(job)]] = result
                self._hand_out()
        except BaseException:
            self._abandon()
            raise
        return [found[i] for i in range(len(jobs))]

    def _add(self, crew: _Crew) -> None:
        self._crews.append(crew)
        self._crew_of |= dict.fromkeys(crew.rewards, crew)

    def _start(self) -> None:
        for crew in self._crews:
            while len(crew.workers) < crew.size:
                crew.workers.append(crew.start())

    def _hand_out(self) -> None:
        """Give each idle worker a job."""
        for crew in self._crews:
            for i, worker in enumerate(crew.workers):
                while crew.waiting and worker.ready and worker.job is None:
                    job = crew.waiting.popleft()
                    local = crew.rewards.index(job.reward)
                    try:
                        worker.connection.send_bytes(pickle.dumps((local, dict(job.columns), len(job.rows))))
                    except OSError:  # it died while it was idle; the job is not to blame
                        crew.waiting.appendleft(job)
                        worker = self._replaced(crew, i, job)[0]
                        continue
                    worker.job, worker.due = job, time.monotonic() + self.rewards[job.reward].timeout

    def _finished(self) -> Iterable[tuple[Job, Outcome]]:
        """What ended next: answers, deaths and deadlines."""
        places = [(crew, i, w) for crew in self._crews for i, w in enumerate(crew.workers)
                  if w.job is not None or (not w.ready and crew.waiting)]
        until = min(w.due for _, _, w in places)
        answered = wait([w.connection for _, _, w in places], max(0.0, until - time.monotonic()))
        for crew, i, worker in places:
            if worker.connection in answered:
                yield from self._answer(crew, i, worker)
            elif worker.due <= time.monotonic():
                if not (job := worker.job):
                    raise RewardError(f"reward worker {worker.pid} did not load its rewards "
                                      f"({self._names(crew)}) within {START_SECONDS:.0f} s")
                self._replaced(crew, i, job)
                yield job, Overdue(self.rewards[job.reward].timeout)

    def _answer(self, crew: _Crew, i: int, worker: _Worker) -> Iterable[tuple[Job, Outcome]]:
        job = worker.job
        try:
            answer = pickle.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            if job is None:
                code = worker.kill()
                raise RewardError(f"a reward worker ended ({ending(code)}) while it loaded {self._names(crew)}; "
                                  "its own output on stderr says more") from None
            yield job, Ended(self._replaced(crew, i, job)[1])
            return
        if job is not None:
            worker.job = None
            yield job, answer
            return
        for reward, failure in zip(crew.rewards, answer, strict=True):
            if failure is not None:
                raise RewardError(f"reward '{self.rewards[reward].name}' cannot be loaded in a worker: "
                                  f"{failure.error} at {failure.place}") from Traceback(failure.traceback)
        worker.ready = True

    def _replaced(self, crew: _Crew, i: int, job: Job) -> tuple[_Worker, int]:
        """A new worker in the place of a hanging or dead one, and how that one ended."""
        code = crew.workers[i].kill()
        self.respawned[self.rewards[job.reward].name] += 1
        crew.workers[i] = crew.start()
        return crew.workers[i], code

    def _abandon(self) -> None:
        """Forget the calls that are not done."""
        for crew in self._crews:
            crew.waiting.clear()
            for worker in [w for w in crew.workers if w.job is not None]:
                crew.workers.remove(worker)
                worker.kill()

    def _names(self, crew: _Crew) -> str:
        return ", ".join(self.rewards[i].name for i in crew.rewards)

    def _fresh(self) -> _Worker:
        """A new interpreter that makes the rewards from their origins."""
        ours, theirs = Pipe()
        fd = theirs.fileno()
        environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from posttrain.rewards.worker import main; main()", str(fd),
             str(os.getpid())], stdin=subprocess.DEVNULL, env=environment, pass_fds=[fd], start_new_session=True)
        theirs.close()
        modules = {name: module.__file__ for name, module in sys.modules.items() if name.startswith(IN_FILE)}
        ours.send_bytes(pickle.dumps((modules, [pickle.dumps(self.rewards[i].origin) for i in self._named])))
        return _Worker(ours, process.pid, process.wait, time.monotonic() + START_SECONDS)

    def _forked(self, reward: int) -> _Worker:
        """A copy of this process that calls one reward and nothing else."""
        ours, theirs = Pipe()
        parent = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JAX warns of every fork; the child never calls a framework by itself
            pid = os.fork()
        if pid == 0:
            self._in_fork(reward, ours, theirs, parent)
        theirs.close()
        return _Worker(ours, pid, partial(_reaped, pid), time.monotonic() + START_SECONDS)

    def _in_fork(self, reward: int, ours: Connection, theirs: Connection, parent: int) -> None:
        """The life of a forked worker; never returns to what the run was doing."""
        code = 1
        try:
            for connection in (ours, *(w.connection for crew in self._crews for w in crew.workers)):
                connection.close()
            isolate(parent)
            if (torch := sys.modules.get("torch")) is not None:
                torch.set_num_threads(1)  # the threads of its pool were not copied; a second one would wait for them
            with suppress(EOFError, OSError):
                serve(theirs, [self.call(reward)])
            code = 0
        except BaseException:  # nothing of the run may go on in this process
            traceback.print_exc()
        finally:
            os._exit(code)


class Traceback(Exception):
    """A reward's traceback from its worker, as the cause of an error."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _travels(origin: Origin | None) -> bool:
    """Whether a fresh process can make the reward: it has an origin, and its fields are plain data."""
    if origin is None or origin.location.startswith("__main__:"):  # there is another main module there
        return False
    try:
        pickle.dumps(origin)
    except Exception:  # a field holds an object from Python
        return False
    return True


def _workers_at_hand(training_threads: int) -> int:
    """Cores that training does not keep busy, one of them the run's own at least; between 1 and `MOST`."""
    return min(MOST, max(1, usable_cores() - max(1, training_threads)))


def usable_cores() -> int:
    """Cores that this process may use; all of them where the system does not tell."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _reaped(pid: int) -> int:
    """Exit status of a forked child; 0 where somebody else has asked for it, as `Popen.wait` has it."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return 0


def ending(code: int) -> str:
    """An exit status in words."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
