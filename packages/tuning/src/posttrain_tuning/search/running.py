"""Runs a study: asks for trials, keeps the workers busy, and writes down what becomes of each.

Killed at any point, it goes on from its record: finished trials stay, those under way are found by their leases, or go
on from their checkpoints. Draws nothing by itself.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import final

from posttrain.errors import ConfigError, PosttrainError, Problem, RunInUse
from posttrain.progress import OFTEN, doing
from posttrain.protocols import Search
from posttrain.run import Interrupted, StopRequest, stop_requests

from posttrain_tuning.search import jobs, study
from posttrain_tuning.search.halving import promoted
from posttrain_tuning.search.jobs import Job
from posttrain_tuning.search.plan import Plan
from posttrain_tuning.search.study import Record, Study, Trial

TICK = 0.1
"""Seconds between two looks at the workers."""
HOPELESS = 3
"""Trials that fail before one does not, after which the study ends: what fails is then not a trial."""

Tell = Callable[[str], None]
After = Callable[[Study], None]


def run(plan: Plan, *, tell: Tell = lambda text: None, after: After = lambda study: None) -> Study:
    """Run all trials that are not over yet; `tell` takes lines of progress, `after` the study after each change.

    Raises `ConfigError` where the folder holds a study of something else, `RunInUse` where another process runs it,
    `Interrupted` after SIGTERM or Ctrl-C, when trials under way are saved, and `PosttrainError` where every trial
    fails. Called again it goes on.
    """
    if plan.settings.population.every:
        from posttrain_tuning.search import population

        with _held(plan), doing("training the population"):
            return population.run(plan, tell)
    with _held(plan), stop_requests() as stop:
        study.require_same(plan.directory, plan.goals, plan.fingerprint())
        record = Record(plan.directory, plan.goals)
        try:
            search = plan.searcher.start(plan.space, plan.goals, plan.directory)
            for trial in record.study.trials:
                search.ask(trial.number)
                if trial.is_over:
                    search.tell(trial.number, trial.told())
            _Running(plan, search, record, tell, after, stop).all()
        finally:
            record.close()
    return record.study


@final
@dataclass(slots=True)
class _Running:
    """A study under way."""

    plan: Plan
    search: Search
    record: Record
    tell: Tell
    after: After
    stop: StopRequest
    jobs: dict[int, Job] = field(default_factory=dict)
    """By the number of the trial."""
    begun: float = field(default_factory=time.monotonic)
    exhausted: bool = False
    """Whether the searcher has nothing left to try."""

    def all(self) -> None:
        """Until nothing is left to do."""
        for trial in self.record.study.trials:
            if trial.status == "asked" and (job := jobs.adopted(self.plan, trial, self._slot())) is not None:
                self.jobs[trial.number] = job
                self.tell(f"{self._place(trial)}: found again")
        with doing("running trials") as say:
            self._rounds(say)
        if self.stop.requested:
            raise Interrupted("stopped by signal; trials under way are saved\ngo on with: " + shlex.join(
                ["posttrain", "tune", str(self.plan.file), *self.plan.overrides]))
        if not self._late:
            self._leave_waiting()

    def _rounds(self, say: Tell) -> None:
        """Start what can be started and look at what runs, again and again."""
        said = 0.0
        while True:
            while not self.stop.requested and len(self.jobs) < self.plan.settings.workers:
                following = self._next()
                if following is None:
                    break
                self.jobs[following.number] = jobs.start(self.plan, following, self._slot())
            if not self.jobs:
                return
            time.sleep(TICK)
            self._watch()
            if (now := time.monotonic()) >= said + OFTEN:
                say(self._under_way())
                said = now

    def _under_way(self) -> str:
        """`4 of 24 trials are over; trial-0004 at step 20 of 60`"""
        over = sum(t.is_over for t in self.record.study.trials)
        running = [f"{self.plan.run(n).name} at step {job.step} of {self.plan.ends(job.trial.values)[job.trial.end]}"
                   for n, job in sorted(self.jobs.items())]
        return f"{over} of {self.plan.settings.trials} trials are over; {', '.join(running)}"

    @property
    def _late(self) -> bool:
        hours = self.plan.settings.hours
        return 0 < 3600 * hours < time.monotonic() - self.begun

    def _next(self) -> Trial | None:
        """What a free worker does: a trial that was left, one that waits and is among the best, or a new one."""
        settings, found = self.plan.settings, self.record.study
        left = [t for t in found.trials if t.status == "asked" and t.number not in self.jobs]
        if left:
            return left[0]
        if self._late:
            return None
        fresh = len(found.trials) < settings.trials and not self.exhausted
        chosen = promoted(found, len(settings.halving.rungs), settings.halving.factor, last=not fresh)
        if chosen is not None:
            self.tell(f"{self._place(chosen)}: among the best at step {chosen.step}, goes on")
            return self.record.append(chosen.number, status="asked", end=chosen.end + 1)
        return self._asked() if fresh else None

    def _asked(self) -> Trial | None:
        number = len(self.record.study.trials)
        values = self.search.ask(number)
        if values is None:
            self.exhausted = True
            return self._next()
        trial = self.record.append(number, values=dict(values))
        self.tell(f"{self._place(trial)}: " + ", ".join(f"{name} {_short(x)}" for name, x in values.items()))
        return trial

    def _watch(self) -> None:
        """Look once at every trial that runs."""
        for number, job in list(self.jobs.items()):
            code = job.ended()
            if code is not None:
                del self.jobs[number]
                self._ended(job, code)
            elif self.stop.requested and not job.asked:
                job.stop("")
            elif not job.asked and (reason := job.look()):
                job.stop(reason)

    def _ended(self, job: Job, code: int) -> None:
        trial = self.record.append(job.trial.number, **jobs.outcome(self.plan, job, code))
        if trial.is_over:
            self.search.tell(trial.number, trial.told())
        self.tell(f"{self._place(trial)}: {self._said(trial, code)}")
        self.after(self.record.study)
        over = [t for t in self.record.study.trials if t.is_over]
        if len(over) >= HOPELESS and all(t.status == "failed" for t in over):
            for other in self.jobs.values():
                other.stop("")
            raise PosttrainError(f"all of the first {len(over)} trials failed: {trial.reason}\nwhat they said is in "
                                 f"{self.plan.directory / jobs.LOGS}; mend it, and choose another folder: "
                                 "tune.study=DIR")

    def _leave_waiting(self) -> None:
        """No trial comes any more that could change a rung: those that wait there are over."""
        for trial in self.record.study.trials:
            if trial.status == "waiting":
                over = self.record.append(trial.number, status="pruned",
                                          reason=f"not among the best at step {trial.step}")
                self.search.tell(over.number, over.told())
        self.after(self.record.study)

    def _said(self, trial: Trial, code: int) -> str:
        """What just became of it, in words."""
        measured = ", ".join(f"{goal.name} {x:.4g}" for goal, x in zip(self.plan.goals, trial.result))
        if trial.status == "asked":
            killed = f"was killed ({jobs.signal_name(-code)}), goes on from its checkpoint"
            return killed if code < 0 else "stopped, saved"
        if trial.status == "waiting":
            return f"{measured} at step {trial.step}"
        best = self.record.study.best()
        mark = " (best so far)" if any(t.number == trial.number for t in best) and len(best) == 1 else ""
        return f"{trial.status}{f', {trial.reason}' if trial.reason else ''}{f': {measured}' if measured else ''}{mark}"

    def _place(self, trial: Trial) -> str:
        return f"{self.plan.run(trial.number).name}, {trial.number + 1} of {self.plan.settings.trials}"

    def _slot(self) -> int:
        """The first worker that is free."""
        taken = {job.slot for job in self.jobs.values()}
        return next(slot for slot in range(len(taken) + 1) if slot not in taken)


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@contextmanager
def _held(plan: Plan) -> Iterator[None]:
    """The folder, made and locked; the system lets go of the lock of a process that dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(plan.directory / ".lock", timeout=0)
    try:
        plan.directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise RunInUse(f"another process runs the study in {plan.directory}\n"
                       "wait for it, stop it, or choose another folder: tune.study=DIR") from error
    except OSError as error:
        raise ConfigError([Problem(f"cannot be the folder of a study: {error.strerror or error}",
                                   str(plan.directory))], next_step="choose another folder: tune.study=DIR") from error
    try:
        yield
    finally:
        lock.release()
