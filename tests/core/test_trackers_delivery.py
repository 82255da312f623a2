"""Delivery to remote trackers: what arrives when a sink works, raises, hangs or died, by a sink that keeps a list."""

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from posttrain import checkpoint
from posttrain.errors import DataError
from posttrain.run import Interrupted
from posttrain.rundir import METRICS, RunDirectory
from posttrain.trackers import delivery
from posttrain.trackers.delivery import BATCH, Courier, Delivery, Remote, Sink, require, status_of
from posttrain.trackers.ledger import Ledger, Record, Status, ledgers, read_records, waiting


@dataclass
class Run:
    directory: Path
    steps: int = 100
    loop: str = "rl"
    output: str = "quiet"


@dataclass
class Server:
    """A tracker and its own sink: keeps what it is given; raises or hangs when told to."""

    finish_timeout: float = 5.0
    down: bool = False
    down_after: int = 10**9
    """Calls of `deliver` until it is down by itself, what it was given being kept."""
    hang: threading.Event | None = None
    knows: bool = True
    """Whether it can say which steps it has."""
    records: list[Record] = field(default_factory=list)
    told: list[object] = field(default_factory=list)
    connections: int = 0
    calls: int = 0
    remote: str = "r1"

    def settled(self, directory: Path) -> "Server":
        return self

    def place(self) -> str:
        return "here"

    def fields(self) -> Mapping[str, object]:
        return {"finish_timeout": self.finish_timeout}

    def connect(self, directory: Path, ledger: Ledger) -> Sink:
        self._answer()
        self.connections += 1
        return self

    def last_step(self) -> int | None:
        return max((r.step for r in self.records), default=-1) if self.knows else None

    def deliver(self, records: Sequence[Record]) -> None:
        assert len(records) <= BATCH
        self._answer()
        self.calls += 1
        self.records += records
        if self.calls > self.down_after:
            self.down = True
            raise ConnectionError("reset by peer")

    def attach(self, file: Path) -> None:
        self.told.append(file.name)

    def checkpoint(self, step: int, path: Path) -> None:
        self.told.append((step, path.name))

    def close(self, status: Status, time: float) -> None:
        self._answer()
        self.told.append((status, time))

    def _answer(self) -> None:
        if self.hang is not None:
            self.hang.wait()
        if self.down:
            raise ConnectionRefusedError("nobody listens")


@pytest.fixture
def files(tmp_path: Path) -> Iterator[RunDirectory]:
    with RunDirectory.create(tmp_path / "run", config="steps: 9\n", manifest={"seed": 1}) as opened:
        yield opened


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(delivery, "LAST_DELAY", 0.02)


def write(files: RunDirectory, steps: range, clock: float = 1000.0) -> None:
    for step in steps:
        files.append_metrics(step, {"x": step / 3, "timing/seconds": 0.5, "timing/unix_time": clock + step})


def steps(server: Server) -> list[int]:
    return [record.step for record in server.records]


def eventually(condition: object) -> None:
    end = time.monotonic() + 5
    while not condition():  # type: ignore[operator]  # a function without arguments
        assert time.monotonic() < end
        time.sleep(0.005)


def test_records_are_read_by_offset_and_a_torn_line_waits(files: RunDirectory) -> None:
    write(files, range(1, 4))
    first, offset = read_records(files.path, 0, 2)
    assert [r.step for r in first] == [1, 2]
    with (files.path / METRICS).open("ab") as torn:
        torn.write(b'{"step": 4, "tim')
    rest, end = read_records(files.path, offset, 50)
    assert rest == [Record(3, 1003.0, {"x": 1.0, "timing/seconds": 0.5})]
    assert read_records(files.path, end, 50) == ([], end) and waiting(files.path, 1) == 2
    with (files.path / METRICS).open("ab") as torn:
        torn.write(b"\n")
    with pytest.raises(DataError, match=r"not a JSON object with a step \(byte \d+\) \(.*metrics.jsonl\)"):
        read_records(files.path, end, 50)


def test_a_run_arrives_whole_and_in_order(files: RunDirectory) -> None:
    server = Server()
    assert isinstance(server, Remote)
    session = Delivery("server", server, Run(files.path), interval=0.005)
    for step in range(2 * BATCH + 7):
        write(files, range(step, step + 1))
        session.step_finished(step, {})
    checkpoint.save(files.checkpoints, 4, {"policy": {"w": np.ones(2)}}, {}, keep=0)
    files.append_samples(1, [{"prompt": "p"}])
    session.finished(None)
    assert steps(server) == list(range(2 * BATCH + 7)) and server.connections == 1
    assert {"config.yaml", "manifest.json", "samples.jsonl", (4, "step-000004")} <= set(server.told)
    assert server.told[-1] == ("finished", 1000.0 + 2 * BATCH + 6)
    (ledger,) = ledgers(files.path)
    assert (ledger.remote, ledger.step, ledger.checkpoints) == ("r1", 2 * BATCH + 6, (4,))
    assert ledger.closed == ledger.status == "finished" and set(ledger.files) == {
        "config.yaml", "manifest.json", "samples.jsonl"}


@pytest.mark.parametrize(("error", "status"), [
    (None, "finished"), (ValueError("x"), "failed"), (KeyboardInterrupt(), "killed"), (Interrupted("stop"), "killed")])
def test_the_end_is_told(files: RunDirectory, error: BaseException | None, status: Status) -> None:
    server = Server()
    Delivery("server", server, Run(files.path)).finished(error)
    assert server.told[-1] == (status, 0.0) and status_of(error) == status


@pytest.mark.parametrize("knows", [True, False])
def test_resumed_steps_are_not_sent_again(files: RunDirectory, knows: bool) -> None:
    """Steps behind the checkpoint are written again with other times; the remote run keeps the points it has."""
    server = Server(knows=knows)
    write(files, range(0, 8))
    Delivery("server", server, Run(files.path)).finished(KeyboardInterrupt())
    files.truncate_after(4)
    write(files, range(5, 12), clock=5000.0)
    session = Delivery("server", server, Run(files.path))
    session.finished(None)
    assert steps(server) == list(range(12))
    assert [r.time for r in server.records] == [1000.0 + s for s in range(8)] + [5000.0 + s for s in range(8, 12)]
    assert [told for told in server.told if isinstance(told, tuple)] == [("killed", 1007.0), ("finished", 5011.0)]


def test_a_kill_between_delivery_and_ledger_duplicates_nothing(files: RunDirectory) -> None:
    """The remote run knows better than the ledger; one that was reset gets everything."""
    server = Server()
    write(files, range(0, 6))
    courier = Courier("server", server, files.path)
    assert courier.bring() == 6
    replace(courier.ledger, step=2).save(files.path)
    assert Courier("server", server, files.path).bring() == 0
    server.records.clear()
    assert Courier("server", server, files.path).bring() == 6 and steps(server) == list(range(6))


def test_another_remote_run_gets_everything(files: RunDirectory) -> None:
    server = Server()
    write(files, range(0, 3))
    checkpoint.save(files.checkpoints, 2, {"policy": {"w": np.ones(2)}}, {}, keep=0)
    Courier("server", server, files.path).bring()
    told = list(server.told)
    server.remote, server.records, server.told = "r2", [], []  # the old one was deleted
    assert Courier("server", server, files.path).bring() == 3 and server.told == told


def test_a_failing_sink_is_probed_and_gets_everything(files: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    """It also fails once after it took the records: those are not sent twice."""
    caplog.set_level(logging.WARNING)
    server = Server(down=True)
    session = Delivery("server", server, Run(files.path), interval=0.005)
    for step in range(5):
        write(files, range(step, step + 1))
        session.step_finished(step, {})
        time.sleep(0.02)
    assert server.records == []
    server.down, server.down_after = False, 0
    eventually(lambda: server.down)
    server.down, server.down_after = False, 10**9
    eventually(lambda: "takes records again" in caplog.text)
    write(files, range(5, 7))
    session.step_finished(6, {})
    session.finished(None)
    assert steps(server) == list(range(7))
    warnings = [r.getMessage() for r in caplog.records]
    assert sum("does not take records" in w for w in warnings) == 1
    assert not any("did not arrive" in w for w in warnings)


def test_a_dead_sink_is_told_of_once_and_ends_at_once(files: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(down=True, finish_timeout=60.0)
    session = Delivery("server", server, Run(files.path), interval=0.005)
    write(files, range(0, 5))
    session.step_finished(4, {})
    time.sleep(0.1)
    start = time.monotonic()
    session.finished(ValueError("x"))
    assert time.monotonic() - start < 1
    first, last = [r.getMessage() for r in caplog.records]
    assert first == ("tracker 'server' does not take records at here; training goes on, they are kept and sent later "
                     "(ConnectionRefusedError: nobody listens)")
    assert last == ("tracker 'server': 5 records did not arrive at here (ConnectionRefusedError: nobody listens); they "
                    f"are in the run directory; send them: posttrain sync {files.path}")
    assert ledgers(files.path)[0].status == "failed"


def test_a_hanging_sink_is_left_behind(files: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(hang=threading.Event(), finish_timeout=0.2)
    session = Delivery("server", server, Run(files.path), interval=0.005)
    taken = []
    for step in range(200):
        write(files, range(step, step + 1))
        start = time.perf_counter()
        session.step_finished(step, {})
        taken.append(time.perf_counter() - start)
    start = time.monotonic()
    session.finished(None)
    assert 0.15 < time.monotonic() - start < 1 and sorted(taken)[100] < 1e-4
    assert "200 records did not arrive at here (no answer for 0.2 s)" in caplog.text
    before = (files.path / "tracking").glob("*.json")
    texts = [path.read_text() for path in before]
    server.hang.set()  # type: ignore[union-attr]  # given above
    session._thread.join(5)
    assert [path.read_text() for path in (files.path / "tracking").glob("*.json")] == texts  # it left no trace
    assert server.records == [] and json.loads(texts[0])["status"] == "finished"


@pytest.mark.parametrize("way", ["hanging", "down"])
def test_a_server_silent_for_long_is_not_waited_for(files: RunDirectory, way: str,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """A last attempt, however much longer a living server would be given; then what its client holds is let go."""
    monkeypatch.setattr(delivery, "LAST_TRY", 0.1)
    hang, given_up = threading.Event(), list[float]()
    server = Server(finish_timeout=0.5, hang=hang if way == "hanging" else None, down=way == "down")
    session = Delivery("kept", server, Run(files.path), interval=0.01,
                       give_up=lambda: given_up.append(time.monotonic()))
    write(files, range(1, 3))
    time.sleep(0.6)
    start = time.monotonic()
    session.finished(None)
    assert len(given_up) == 1 and given_up[0] - start < 0.4
    hang.set()


def test_a_server_that_only_begins_to_answer_is_waited_for(files: RunDirectory,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "LAST_TRY", 0.01)
    hang, given_up = threading.Event(), list[bool]()
    server = Server(finish_timeout=5.0, hang=hang)
    write(files, range(1, 3))
    session = Delivery("kept", server, Run(files.path), interval=0.01, give_up=lambda: given_up.append(True))
    threading.Timer(0.3, hang.set).start()
    session.finished(None)
    assert given_up == [] and [r.step for r in server.records] == [1, 2]


def test_a_broken_ledger_is_named(files: RunDirectory) -> None:
    Courier("server", Server(), files.path).bring()
    (path,) = (files.path / "tracking").glob("server-*.json")
    path.write_text('{"tracker": "server"')
    with pytest.raises(DataError, match=r"is not a ledger(.|\n)*delete it, and all records are sent to a new remote"):
        Courier("server", Server(), files.path)


def test_require() -> None:
    require("x", "json")
    with pytest.raises(ValueError, match="tracker 'x' needs nowhere_1, which is not installed: pip install '"):
        require("x", "json", "nowhere_1")
