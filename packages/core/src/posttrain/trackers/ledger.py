"""What a remote tracker gets and what it already has: records read from `metrics.jsonl`, and the ledger beside them.

The ledger (`RUN/tracking/<tracker>-<hash>.json`) names the remote run and the last step that it has. Steps, not byte
offsets, are kept: resuming cuts `metrics.jsonl` back and writes the same steps again, equal but for their timing, so a
step that was delivered once is not sent a second time. Knows files alone, no tracker.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Self, final

from posttrain.errors import DataError, Problem
from posttrain.rundir import METRICS, TIMING, replace_text

FOLDER = "tracking"
"""Of a run directory: one ledger for each remote tracker and place."""

TIME = "unix_time"
"""Field of `timing`: when the record was written, in seconds since 1970. A replay sends the same time again."""

Status = Literal["running", "finished", "failed", "killed"]
"""`killed`: stopped by a signal, or gone without a word."""


@final
@dataclass(frozen=True, slots=True)
class Record:
    """One line of `metrics.jsonl`, as trackers take it."""

    step: int
    time: float
    """Seconds since 1970."""
    metrics: Mapping[str, float]
    """Finite numbers by name; `nonfinite/<name>` is 1 where the run measured NaN or infinity."""


def record_of(line: Mapping[str, object]) -> Record:
    """
    >>> record_of({"step": 3, "loss": None, "nonfinite": 1, "timing": {"seconds": 0.5, "unix_time": 9.0}})
    Record(step=3, time=9.0, metrics={'nonfinite/loss': 1.0, 'timing/seconds': 0.5})
    """
    timing = line.get("timing")
    timing = timing if isinstance(timing, dict) else {}
    values = {name: value for name, value in line.items() if name not in ("step", "timing", "nonfinite")}
    values |= {TIMING + name: value for name, value in timing.items() if name != TIME}
    metrics = {f"nonfinite/{name}" if value is None else name: 1.0 if value is None else float(value)
               for name, value in values.items() if value is None or isinstance(value, int | float)}
    step, time = line["step"], timing.get(TIME) or 0.0
    assert isinstance(step, int)
    return Record(step, float(time), metrics)


def read_records(directory: Path, offset: int, limit: int) -> tuple[list[Record], int]:
    """At most `limit` whole lines from byte `offset` on, and the offset behind them; a line not yet whole waits.

    Raises `DataError` where a line is not JSON with a step.
    """
    records = list[Record]()
    with (directory / METRICS).open("rb") as file:
        file.seek(offset)
        for line in file:
            if len(records) == limit or not line.endswith(b"\n"):
                break
            try:
                records.append(record_of(json.loads(line)))
            except (ValueError, KeyError, AssertionError) as error:
                raise DataError([Problem(f"not a JSON object with a step (byte {offset})",
                                         str(directory / METRICS))]) from error
            offset += len(line)
    return records, offset


def waiting(directory: Path, step: int) -> int:
    """How many records come after `step`."""
    return sum(record.step > step for record in read_records(directory, 0, -1)[0])


@final
@dataclass(frozen=True, slots=True)
class Ledger:
    """What one remote run has. Written anew after each thing that was delivered."""

    tracker: str
    """Name of the component."""
    fields: Mapping[str, object]
    """Its fields, with the place filled in, so that `posttrain sync` finds the same place from anywhere."""
    place: str
    """Where the records go, in words."""
    key: str
    """Of this run alone; a remote run that was made, but whose answer was lost, is found by it."""
    remote: str = ""
    """Identity of the remote run; empty as long as there is none."""
    step: int = -1
    """The last step delivered."""
    checkpoints: tuple[int, ...] = ()
    """Steps of the checkpoints that were announced."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Name -> SHA-256 of the attached files."""
    status: Status = "running"
    """How the run ended, as far as this tracker was told."""
    closed: Status = "running"
    """How the remote run was ended."""

    def path(self, directory: Path) -> Path:
        return ledger_path(directory, self.tracker, self.place)

    def save(self, directory: Path) -> None:
        """Whole or not at all."""
        path = self.path(directory)
        path.parent.mkdir(exist_ok=True)
        replace_text(path, json.dumps(asdict(self), indent=1, ensure_ascii=False))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises `DataError` where the file is no ledger."""
        try:
            found = json.loads(path.read_text("utf-8"))
            return cls(**{**found, "checkpoints": tuple(found["checkpoints"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError([Problem(f"is not a ledger of delivered records: {error}", str(path))],
                            next_step="delete it, and all records are sent to a new remote run") from error


def ledger_path(directory: Path, tracker: str, place: str) -> Path:
    """The ledger of a tracker at a place: another server or experiment has another one."""
    return directory / FOLDER / f"{tracker}-{hashlib.sha256(place.encode()).hexdigest()[:8]}.json"


def ledgers(directory: Path) -> list[Ledger]:
    """All of a run, by name of tracker and place."""
    found = [Ledger.load(path) for path in (directory / FOLDER).glob("*.json")]
    return sorted(found, key=lambda ledger: (ledger.tracker, ledger.place))
