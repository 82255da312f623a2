"""A trial's process as the study sees it: started, watched, stopped, and what its end means.

Each is an ordinary run, `posttrain train` or `posttrain resume`, in a session of its own, so that it outlives a study
that is killed and is found again by its lease.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from posttrain.errors import Diverged, InputError, MemoryExhausted
from posttrain.run import Interrupted
from posttrain.rundir import CONFIG, METRICS, read_metrics

from posttrain_tuning.search import worker
from posttrain_tuning.search.plan import Plan
from posttrain_tuning.search.study import Trial

LOGS, LEASES = "logs", "leases"
"""Folders in that of a study: what trials wrote to the terminal, and who has them."""
TAIL = 65536
"""Bytes at the end of a file of metrics that hold its last line."""
LINES = 3
"""Of a log that say why a trial failed: the end of a traceback, or an error with what to do."""
GIVEN_UP: Mapping[int, str] = {Diverged.exit_code: "diverged", MemoryExhausted.exit_code: "memory ran out"}
"""Exit codes of runs that are hopeless."""


@final
@dataclass(slots=True)
class Job:
    """A trial that runs."""

    trial: Trial
    plan: Plan
    slot: int
    """Which of the workers it is."""
    process: subprocess.Popen[bytes] | None
    """None where another study started it."""
    begun: float = field(default_factory=time.monotonic)
    asked: bool = False
    """Whether it was asked to stop."""
    reason: str = ""
    """Why it is given up; empty where it goes on later."""
    read: int = 0
    """Bytes of metrics that were looked at."""

    @property
    def lease(self) -> worker.Lease | None:
        return worker.read(lease_of(self.plan, self.trial.number))

    @property
    def step(self) -> int:
        """The last step that it wrote down; 0 before the first."""
        path = self.plan.run(self.trial.number) / METRICS
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - TAIL))
                last = file.read().split(b"\n")[-2]
            return int(json.loads(last)["step"])
        except (OSError, ValueError, LookupError):
            return 0

    def ended(self) -> int | None:
        """Exit code, minus a signal's number where it was killed; None while it lives."""
        if self.process is not None and (code := self.process.poll()) != worker.TAKEN:
            return code
        self.process, lease = None, self.lease
        if lease is None:
            return -signal.SIGKILL
        return None if lease.alive else -signal.SIGKILL if lease.exit is None else lease.exit

    def look(self) -> str:
        """Why the trial is to be given up, by its metrics so far; empty where it is not, or nothing is new."""
        path = self.plan.run(self.trial.number) / METRICS
        size = path.stat().st_size if path.is_file() else 0
        if size == self.read or not self.plan.settings.prune:
            return ""
        self.read = size
        records = records_of(self.plan, self.trial.number)
        return next((why for rule in self.plan.settings.prune if (why := rule.reason(records))), "")

    def stop(self, reason: str) -> None:
        """Ask it to end after its step, saved; without a reason it goes on later."""
        self.asked, self.reason = True, reason
        lease = self.lease
        pid = self.process.pid if self.process is not None else lease.pid if lease is not None else 0
        if pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def start(plan: Plan, trial: Trial, slot: int) -> Job:
    """Begin a trial's run, or go on with it, up to the end that it is to reach."""
    directory, ends = plan.run(trial.number), plan.ends(trial.values)
    after = f"stop.after={ends[trial.end] if trial.end < len(ends) - 1 else 0}"
    if (directory / CONFIG).is_file():
        command = ["resume", str(directory), after, "resume.fallback=true"]
    else:
        command = ["train", str(plan.file), *plan.of_run(trial.number, trial.values), after]
    log = plan.directory / LOGS / f"{directory.name}.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", worker.__name__, str(lease_of(plan, trial.number)), str(trial.end), *command,
             "--quiet"],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, env=environment(plan, slot))
    return Job(trial, plan, slot, process)


def adopted(plan: Plan, trial: Trial, slot: int) -> Job | None:
    """The process that another study started for a trial, if it lives or came to an end that nobody has seen."""
    lease = worker.read(lease_of(plan, trial.number))
    if lease is None or lease.rung != trial.end or not (lease.alive or lease.exit is not None):
        return None
    return Job(trial, plan, slot, None)


def environment(plan: Plan, slot: int) -> dict[str, str]:
    """Of a worker: its share of the cores where the configuration and the user leave threads open, and its device."""
    own = dict(os.environ)
    if not plan.loaded.settings.threads:
        own.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // plan.settings.workers)))
    if plan.settings.devices:
        own["CUDA_VISIBLE_DEVICES"] = plan.settings.devices[slot]
    return own


def lease_of(plan: Plan, trial: int) -> Path:
    return plan.directory.resolve() / LEASES / f"trial-{trial:04d}.json"


def records_of(plan: Plan, trial: int) -> Sequence[Mapping[str, Any]]:
    """Lines of a trial's metrics; none where there are none."""
    try:
        return read_metrics(plan.run(trial))
    except InputError:
        return ()


def outcome(plan: Plan, job: Job, code: int) -> dict[str, Any]:
    """What the end of a process means for its trial: changes for the record. Nothing where it was killed or stopped
    without a reason of its own, and goes on."""
    trial, records = job.trial, records_of(plan, job.trial.number)
    taken = {"seconds": round(trial.seconds + time.monotonic() - job.begun, 3)}
    if code == Interrupted.exit_code and not job.reason:
        return taken
    if code < 0:
        if trial.deaths < plan.settings.retries:
            return {**taken, "deaths": trial.deaths + 1}
        return {**taken, "status": "failed", "deaths": trial.deaths + 1,
                "reason": f"its process was killed {trial.deaths + 1} times, last by {signal_name(-code)}"}
    measured = _measured(plan, records)
    if job.reason:
        return {**taken, **measured, "status": "pruned", "reason": job.reason}
    if code in GIVEN_UP:
        return {**taken, "result": [], "status": "pruned", "reason": GIVEN_UP[code]}
    if code > 0:
        return {**taken, "status": "failed", "reason": f"{_last_lines(plan, trial)} (exit code {code})"}
    if missing := _missing(plan, records):
        return {**taken, **measured, "status": "failed", "reason": f"no finite {missing} was measured"}
    ends, step = plan.ends(trial.values), measured["step"]
    if step < ends[trial.end]:
        return {**taken, **measured, "status": "pruned", "reason": f"its run ended by itself at step {step}"}
    if trial.end == len(ends) - 1:
        return {**taken, **measured, "status": "complete"}
    return {**taken, **measured, "status": "waiting", "rungs": [*trial.rungs, measured["result"][0]]}


def _measured(plan: Plan, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Values and violations as far as they were measured."""
    found = [objective.value(records) for objective in plan.settings.objectives]
    broken = {c.name: c.violation(records) for c in plan.settings.constraints}
    return {"result": [] if None in found else found,
            "violations": {name: v for name, v in broken.items() if v is not None},
            "step": max((record["step"] for record in records), default=0)}


def _missing(plan: Plan, records: Sequence[Mapping[str, Any]]) -> str:
    """The first metric that is asked for and has no number; empty where there is none."""
    found = (*(o.value(records) for o in plan.settings.objectives),
             *(c.violation(records) for c in plan.settings.constraints))
    return next((name for name, value in zip(plan.metrics, found) if value is None), "")


def _last_lines(plan: Plan, trial: Trial) -> str:
    log = plan.directory / LOGS / f"{plan.run(trial.number).name}.txt"
    lines = log.read_text("utf-8", "replace").splitlines() if log.is_file() else []
    said = [line.strip() for line in lines if line.strip()][-LINES:]
    return "; ".join(said) or "it said nothing"


def signal_name(number: int) -> str:
    """`SIGKILL`."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
