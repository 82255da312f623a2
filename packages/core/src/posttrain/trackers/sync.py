"""Sends what remote trackers lack of a run, from its directory alone: `posttrain sync`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from posttrain.errors import ConfigError, PosttrainError
from posttrain.registry import Registry
from posttrain.rundir import CONFIG, METRICS, RunDirectory
from posttrain.trackers.delivery import Courier, Remote
from posttrain.trackers.ledger import Ledger, Status, ledgers, read_records


class NotDelivered(PosttrainError):
    """Some tracker did not take everything."""


@dataclass(frozen=True, slots=True)
class Synced:
    """What one remote tracker was sent."""

    tracker: str
    place: str
    records: int
    error: str = ""
    """Why not everything went; empty where everything is there now."""


def sync(directory: Path, names: Sequence[str], settings: Mapping[str, object], registry: Registry) -> list[Synced]:
    """Deliver what is missing to the trackers that the run had, or to those named; `settings` are fields over theirs.

    A tracker that the run did not have is given everything, so a run may be sent to it afterwards. Raises `RunInUse`
    where the run still lives (it delivers by itself), `ConfigError` where there is nothing to send to.
    """
    with RunDirectory.open(directory) as files:
        chosen = _chosen(files.path, names)
        if not chosen:
            raise ConfigError([f"{directory} has no remote tracker; name one: posttrain sync {directory} mlflow"])
        found = [(name, _tracker(registry, name, {**fields, **settings}), ledger) for name, fields, ledger in chosen]
        once = {tracker.settled(files.path).place(): (name, tracker, ledger) for name, tracker, ledger in found}
        return [_sent(files.path, *each) for each in once.values()]


def _chosen(directory: Path, names: Sequence[str]) -> list[tuple[str, Mapping[str, object], Ledger | None]]:
    """Name, fields and ledger of each tracker: those of the run, or those named."""
    known = ledgers(directory)
    found: list[tuple[str, Mapping[str, object], Ledger | None]] = [
        (ledger.tracker, ledger.fields, ledger) for ledger in known if not names or ledger.tracker in names]
    return found + [(name, {}, None) for name in names if name not in {ledger.tracker for ledger in known}]


def _tracker(registry: Registry, name: str, fields: Mapping[str, object]) -> Remote:
    tracker = registry.create("tracker", name, **fields)
    if not isinstance(tracker, Remote):
        raise ConfigError([f"tracker '{name}' keeps nothing that could be sent; trackers with a place of their own: "
                           "mlflow, wandb, tensorboard"])
    return tracker


def _sent(directory: Path, name: str, tracker: Remote, ledger: Ledger | None) -> Synced:
    courier = Courier(name, tracker, directory)
    status = _status(directory, ledger)
    courier.told(status)
    before = courier.left()
    error = ""
    try:
        sent = 0 if courier.idle(status) else courier.bring(status)
    except Exception as raised:  # a client of a tracker may raise anything; the other trackers get theirs
        sent, error = before - courier.left(), f"{type(raised).__name__}: {' '.join(str(raised).split())[:300]}"
    return Synced(name, courier.ledger.place, sent, error)


def _status(directory: Path, ledger: Ledger | None) -> Status:
    """As the tracker was told; a run that went without a word was killed, unless it had done its last step."""
    if ledger is not None and ledger.status != "running":
        return ledger.status
    steps = (yaml.safe_load((directory / CONFIG).read_text("utf-8")) or {}).get("steps")
    records, _ = read_records(directory, 0, -1) if (directory / METRICS).exists() else ([], 0)
    done = bool(records) and isinstance(steps, int) and records[-1].step >= steps
    return "finished" if done else "killed"
