"""TensorBoard: metrics and configuration as event files, by TensorBoard's own writer, without torch or TensorFlow.

Through `delivery.py` like every other: a file system that hangs is a server that hangs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from posttrain.protocols import ObservedRun, TrackerSession
from posttrain.rundir import CONFIG
from posttrain.trackers.delivery import Delivery, require
from posttrain.trackers.ledger import Ledger, Record, Status

if TYPE_CHECKING:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

NAME = "tensorboard"


@final
@dataclass(frozen=True, slots=True)
class TensorBoard:
    """Writes event files that `tensorboard --logdir RUNS` shows.

    >>> TensorBoard(path="logs").path
    'logs'
    """

    path: str = ""
    """Folder of the event files; empty takes `tensorboard` in the run directory."""
    finish_timeout: float = 10.0
    """Seconds to wait at the end of the run for what is not written."""

    def __post_init__(self) -> None:
        require(NAME, "tensorboard")
        if self.finish_timeout < 0:
            raise ValueError(f"finish_timeout must not be negative, got {self.finish_timeout}")

    def start(self, run: ObservedRun) -> TrackerSession:
        """Starts the thread that delivers."""
        return Delivery(NAME, self, run)

    def settled(self, directory: Path) -> TensorBoard:
        return replace(self, path=str((Path(self.path) if self.path else directory / "tensorboard").resolve()))

    def place(self) -> str:
        return self.path

    def fields(self) -> Mapping[str, object]:
        return asdict(self)

    def connect(self, directory: Path, ledger: Ledger) -> _EventFiles:
        return _EventFiles(Path(self.path, directory.resolve().name))


@final
class _EventFiles:
    """The sink: a folder of event files, one for each connection."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last = max((event.step for event in events(folder) if event.HasField("summary")), default=-1)
        self._open: EventFileWriter | None = None

    @property
    def remote(self) -> str:
        return str(self._folder)

    def last_step(self) -> int | None:
        return self._last

    def deliver(self, records: Sequence[Record]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for record in records:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in record.metrics.items()]
            self._writer().add_event(Event(wall_time=record.time, step=record.step, summary=Summary(value=values)))
        self._writer().flush()

    def attach(self, file: Path) -> None:
        """The configuration is shown as text; other files stay in the run directory."""
        if file.name == CONFIG:
            self._writer().add_event(_text_event("config", "\n".join(
                f"    {line}" for line in file.read_text("utf-8").splitlines())))
            self._writer().flush()

    def checkpoint(self, step: int, path: Path) -> None:
        """TensorBoard has no place for it."""

    def close(self, status: Status, time: float) -> None:
        self._writer().close()
        self._open = None

    def _writer(self) -> EventFileWriter:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._open is None:
            self._open = EventFileWriter(str(self._folder))
        return self._open


def events(folder: Path) -> Iterator[Any]:
    """All events in the files of a folder; a file torn by a kill ends there."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for path in sorted(folder.glob("events.out.tfevents.*")):
        yield from EventFileLoader(str(path)).Load()


def _text_event(tag: str, text: str) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.text.metadata import create_summary_metadata

    tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=TensorShapeProto(
        dim=[TensorShapeProto.Dim(size=1)]))
    value = Summary.Value(tag=tag, tensor=tensor, metadata=create_summary_metadata(display_name=tag, description=""))
    return Event(step=0, summary=Summary(value=[value]))
