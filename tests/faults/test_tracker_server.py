"""Tracking servers that hang, refuse, answer 500 or are killed: the loop does not wait, no point is lost or doubled.

The tests run this file as a program: a loop that records steps and is observed by the MLflow tracker.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from posttrain import trackers
from posttrain.registry import discover
from posttrain.rundir import RunDirectory, read_metrics
from posttrain.trackers.ledger import ledgers
from posttrain.trackers.mlflow import ENVIRONMENT, Mlflow
from posttrain.trackers.sync import sync

METRICS = 40

# SQLAlchemy 2.1 deprecates a strategy that MLflow 3.17 uses in every query.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")


@dataclass
class Run:
    directory: Path
    steps: int
    loop: str = "rl"
    output: str = "quiet"


# Program ---------------------------------------------------------------------------------------------------------


def train(directory: Path, uri: str, steps: int, pause: float, timeout: float) -> None:
    """A loop of matrix products with a tracker; without a URI it has none. Prints what it took as JSON."""
    observers = {"mlflow": Mlflow(tracking_uri=uri, finish_timeout=timeout)} if uri else {}
    work = np.random.default_rng(0).normal(size=(256, 256))
    config = f"steps: {steps}\ntask: {{use: rows}}\n"
    with RunDirectory.create(directory, config=config, manifest={"started": "2026-01-02T03:04:05+00:00"}) as files:
        session = trackers.start(observers, Run(directory, steps))
        told, taken = [], []
        for step in range(1, steps + 1):
            start = time.perf_counter()
            for _ in range(8):
                work = np.tanh(work @ work.T / 256)
            metrics = {f"m/{i}": step + i / 7 for i in range(METRICS)}
            metrics |= {"timing/seconds": time.perf_counter() - start, "timing/unix_time": time.time()}
            files.append_metrics(step, metrics)
            before = time.perf_counter()
            session.step_finished(step, metrics)
            told.append(time.perf_counter() - before)
            taken.append(time.perf_counter() - start)
            time.sleep(pause)
        start = time.perf_counter()
        session.finished(None)
        print(json.dumps({"told": float(np.mean(told)), "step": float(np.mean(taken)),
                          "finish": time.perf_counter() - start, "ended": time.time()}), flush=True)


def trained(directory: Path, uri: str, *, steps: int = 300, pause: float = 0.0, timeout: float = 1.0,
            meanwhile: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """What the program above took, in a process of its own, and how long that needed to end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    process = subprocess.Popen([sys.executable, __file__, str(directory), uri, str(steps), str(pause), str(timeout)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**environment, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    try:
        meanwhile()
        out, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return {**found, "exit": time.time() - found["ended"], "errors": errors}


# Servers ---------------------------------------------------------------------------------------------------------


@contextmanager
def hanging(held: list[socket.socket] | None = None) -> Iterator[str]:
    """Takes connections, which `held` collects, and never says a word."""
    held = [] if held is None else held
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:

        def take() -> None:
            try:
                while True:
                    held.append(server.accept()[0])
            except OSError:
                pass  # closed below

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()
        assert held, "nobody came"


@contextmanager
def refusing() -> Iterator[str]:
    yield f"http://127.0.0.1:{free_port()}"


@contextmanager
def failing() -> Iterator[str]:
    """Answers every request with status 500."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(500)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# Tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_server_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    for name, value in ENVIRONMENT.items():  # so that what a connection sets is taken back
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database: making one takes seconds."""
    mlflow, _ = pytest.importorskip("mlflow"), pytest.importorskip("sqlalchemy")
    path = tmp_path_factory.mktemp("store") / "empty.db"
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{path}", registry_uri=f"sqlite:///{path}").search_experiments()
    return path


def history(client: Any, steps: int) -> None:
    """The only run there has every point of every step, once."""
    (run,) = client.search_runs([client.get_experiment_by_name("posttrain").experiment_id])
    assert run.info.status == "FINISHED"
    for i in (0, METRICS - 1):
        points = client.get_metric_history(run.info.run_id, f"m/{i}")
        assert sorted((p.step, p.value) for p in points) == [(step, step + i / 7) for step in range(1, steps + 1)]


@pytest.mark.parametrize("server", [hanging, refusing, failing])
def test_a_broken_server_costs_nothing_and_loses_nothing(
        server: Callable[[], Any], tmp_path: Path, empty_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    directory, steps = tmp_path / "run", 300
    with server() as uri:
        took = trained(directory, uri, steps=steps, pause=0.01)
    with capsys.disabled():
        print(f"\n{server.__name__}: {1e6 * took['told']:.0f} us of a step's {1e3 * took['step']:.1f} ms to tell the "
              f"tracker; {took['finish']:.2f} s at the end, {took['exit']:.2f} s to exit")
    assert took["told"] < 0.01 * took["step"]
    assert took["finish"] < 5 and took["exit"] < 10  # the timeout is 1 s, one attempt at a hanging server 30 s
    assert f"{steps} records did not arrive at {uri}" in took["errors"]
    assert f"posttrain sync {directory}" in took["errors"]
    assert [record["step"] for record in read_metrics(directory)] == list(range(1, steps + 1))
    place = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}"
    for sent in (steps, 0):
        (done,) = sync(directory, ["mlflow"], {"tracking_uri": place}, discover())[-1:]
        assert (done.records, done.error) == (sent, "") and done.place.startswith(place)
        history(MlflowClient(tracking_uri=place, registry_uri=place), steps)


def test_the_process_may_be_killed_while_it_waits(tmp_path: Path, empty_store: Path) -> None:
    """SIGKILL leaves a ledger from which everything is sent."""
    from mlflow import MlflowClient

    directory, steps, asked = tmp_path / "run", 40, list[socket.socket]()
    with hanging(asked) as uri:
        process = subprocess.Popen([sys.executable, __file__, str(directory), uri, str(steps), "0", "60"],
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while not asked or len(read_metrics(directory)) < steps:
            assert time.monotonic() < end
            time.sleep(0.05)
        process.kill()
        process.communicate()
    place = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}"
    (done,) = sync(directory, ["mlflow"], {"tracking_uri": place}, discover())[-1:]
    assert (done.records, done.error) == (steps, "")
    history(MlflowClient(tracking_uri=place, registry_uri=place), steps)


# A real server ---------------------------------------------------------------------------------------------------


class Server:
    """`mlflow server` on loopback, which can be killed and started again on its data."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PYTHON"))}
        self._process = subprocess.Popen(
            [*program(), "server", "--host", "127.0.0.1", "--port", str(self._port), "--workers", "1",
             "--backend-store-uri", f"sqlite:///{self._folder / 'server.db'}",
             "--artifacts-destination", str(self._folder / "artifacts")],
            cwd=self._folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env={**environment, "MLFLOW_DISABLE_TELEMETRY": "true"})
        end = time.monotonic() + 180
        while not self._answers():
            assert time.monotonic() < end and self._process.poll() is None, "mlflow server does not start"
            time.sleep(0.2)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def program() -> list[str]:
    """The full mlflow: that of an environment of its own (`POSTTRAIN_TEST_MLFLOW`), or the installed one."""
    if given := os.environ.get("POSTTRAIN_TEST_MLFLOW"):
        return [given]
    if find_spec("mlflow") is None or find_spec("flask") is None:
        pytest.skip("the full mlflow is not installed; POSTTRAIN_TEST_MLFLOW names its program in another environment")
    return [sys.executable, "-m", "mlflow"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    program()
    (folder := tmp_path / "server").mkdir()
    made = Server(folder)
    yield made
    made.kill()


def after(seconds: float, *actions: Callable[[], None]) -> None:
    time.sleep(seconds)
    for action in actions:
        action()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("when", ["start", "middle", "restarted", "end"])
def test_a_real_server_is_killed(when: str, server: Server, tmp_path: Path,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    """Equal history after `sync`, whenever the server was down."""
    from mlflow import MlflowClient

    directory, steps = tmp_path / "run", 150
    server.start()
    waits = {"start": lambda: server.kill(), "middle": lambda: after(9, server.kill),
             "restarted": lambda: after(9, server.kill, server.start), "end": lambda: after(14, server.kill)}
    took = trained(directory, server.uri, steps=steps, pause=0.3 if when == "restarted" else 0.1, timeout=3.0,
                   meanwhile=waits[when])
    server.kill()
    arrived = [ledger.step for ledger in ledgers(directory)]
    server.start()
    (done,) = sync(directory, [], {}, discover())
    with capsys.disabled():
        print(f"\nkilled at the {when}: {max(arrived)} of {steps} steps had arrived, {done.records} sent by sync; "
              f"{1e6 * took['told']:.0f} us of a step's {1e3 * took['step']:.1f} ms; finish {took['finish']:.2f} s, "
              f"exit {took['exit']:.2f} s")
    assert done.error == "" and took["told"] < 0.01 * took["step"] and took["finish"] < 4 and took["exit"] < 5
    history(MlflowClient(tracking_uri=server.uri, registry_uri=server.uri), steps)
    (again,) = sync(directory, [], {}, discover())
    assert (again.records, again.error) == (0, "")


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5]))
