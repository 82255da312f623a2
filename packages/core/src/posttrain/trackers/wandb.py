"""Weights & Biases: metrics, configuration and files of a run, online or into a folder to be uploaded later.

Through `delivery.py` like every other. wandb itself is imported in the thread that delivers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

import yaml

from posttrain.protocols import ObservedRun, TrackerSession
from posttrain.rundir import CONFIG, MANIFEST
from posttrain.trackers import Silent
from posttrain.trackers.delivery import Delivery, require
from posttrain.trackers.ledger import Ledger, Record, Status

if TYPE_CHECKING:
    from wandb import Settings
    from wandb.sdk.wandb_run import Run

NAME = "wandb"

SERVICE = "WANDB_SERVICE"
"""Variable by which wandb finds its service process, where this process has one already."""
PROGRAM = "wandb-core"
"""That process. wandb waits for it at the end of the Python process, for a hanging server ten seconds and more."""

NO_TELEMETRY = ("WANDB_ERROR_REPORTING", "false")
"""wandb's own reports go by way of the same server, and it waits for them at the end of the process, too."""

EXIT_CODE: Mapping[Status, int] = {"running": 0, "finished": 0, "failed": 1, "killed": 143}


@final
@dataclass(frozen=True, slots=True)
class Wandb:
    """Sends the run to Weights & Biases. The key is read from `WANDB_API_KEY` or from `wandb login`.

    >>> Wandb(mode="offline").project
    'posttrain'
    """

    project: str = "posttrain"
    """Where the run is filed."""
    entity: str = ""
    """User or team; empty takes the account's own."""
    run_name: str = ""
    """Empty takes the name of the run directory."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """`offline` writes into the run directory alone, to be uploaded by `wandb sync`."""
    tags: tuple[str, ...] = ()
    """Words to find the run by."""
    finish_timeout: float = 10.0
    """Seconds to wait at the end of the run for what has not arrived, and for wandb's own connections."""

    def __post_init__(self) -> None:
        require(NAME, "wandb")
        if self.finish_timeout < 0:
            raise ValueError(f"finish_timeout must not be negative, got {self.finish_timeout}")

    def start(self, run: ObservedRun) -> TrackerSession:
        """Starts the thread that delivers; connects to nothing by itself."""
        if self.mode == "disabled":
            return Silent()
        ours = self.mode == "online" and SERVICE not in os.environ
        return Delivery(NAME, self, run, give_up=_end_service if ours else _leave_service)

    def settled(self, directory: Path) -> Wandb:
        return replace(self, run_name=self.run_name or directory.resolve().name)

    def place(self) -> str:
        return f"{self.entity}/{self.project} ({self.mode})".removeprefix("/")

    def fields(self) -> Mapping[str, object]:
        return {**asdict(self), "tags": list(self.tags)}

    def connect(self, directory: Path, ledger: Ledger) -> _WandbRun:
        """Begins the run of the ledger's key, or goes on with it."""
        os.environ.setdefault(*NO_TELEMETRY)
        import wandb

        patience = max(self.finish_timeout, 1.0)
        settings = wandb.Settings(
            console="off", silent=True, save_code=False, disable_git=True, init_timeout=patience,
            login_timeout=patience, finish_timeout=patience,
            finish_timeout_raises=True,  # else a run that was not uploaded would count as closed
            x_graphql_timeout_seconds=patience)
        try:
            return _WandbRun(self._begun(directory, ledger, settings))
        except Exception:
            wandb.teardown()  # else the run counts as in use, and the process waits for it at its end
            raise

    def _begun(self, directory: Path, ledger: Ledger, settings: Settings) -> Run:
        import wandb

        return wandb.init(
            project=self.project, entity=self.entity or None, name=self.run_name, mode=self.mode, tags=self.tags,
            id=ledger.key, resume="allow", dir=str(directory), reinit="create_new",
            config={**yaml.safe_load((directory / CONFIG).read_text("utf-8")),
                    "manifest": json.loads((directory / MANIFEST).read_text("utf-8"))},
            settings=settings)


@final
class _WandbRun:
    """The sink: one run. wandb keeps what it was given in files of its own and drops a step that it has."""

    def __init__(self, run: Run) -> None:
        self._run = run

    @property
    def remote(self) -> str:
        return str(self._run.id)

    def last_step(self) -> int | None:
        """Only online does wandb know what an earlier process sent."""
        return None if self._run.offline else self._run.step - 1

    def deliver(self, records: Sequence[Record]) -> None:
        for record in records:
            self._run.log({**record.metrics, "_timestamp": record.time}, step=record.step, commit=True)

    def attach(self, file: Path) -> None:
        copy = Path(shutil.copy(file, self._run.dir))  # wandb would link to the file, which may still grow
        self._run.save(str(copy), base_path=str(copy.parent), policy="now")

    def checkpoint(self, step: int, path: Path) -> None:
        """The newest one, in the run's summary; weights are not uploaded."""
        self._run.summary.update({"checkpoint/step": step, "checkpoint/path": str(path.resolve())})

    def close(self, status: Status, time: float) -> None:
        self._run.finish(exit_code=EXIT_CODE[status])


def _leave_service() -> None:
    """It belongs to others in this process, or writes to the disk alone."""


def _end_service() -> None:
    """Kill wandb's service process, so that the end of this process does not wait for it. What it had not uploaded is
    sent by `posttrain sync`, which asks the server for the last step that it has."""
    import psutil
    import wandb

    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name() == PROGRAM:
                child.kill()
                child.wait(1.0)
    with suppress(ConnectionError):  # wandb says goodbye to it; a later run in this process starts another one
        wandb.teardown()
