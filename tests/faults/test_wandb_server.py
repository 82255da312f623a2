"""A Weights & Biases server that hangs: the process ends soon after the training, and `sync` is told what is missing.

The test runs this file as a program: a run of a few seconds that is observed by the wandb tracker.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from posttrain import trackers
from posttrain.rundir import RunDirectory
from posttrain.trackers.ledger import ledgers, waiting
from posttrain.trackers.wandb import Wandb

STEPS = 30


@dataclass
class Run:
    directory: Path
    steps: int = STEPS
    loop: str = "rl"
    output: str = "quiet"


def train(directory: Path) -> None:
    """Steps for longer than the server may be silent. Prints when the last one ended, and when the run did."""
    config = f"steps: {STEPS}\ntask: {{use: rows}}\n"
    with RunDirectory.create(directory, config=config, manifest={"started": "2026-01-02T03:04:05+00:00"}) as files:
        session = trackers.start({"wandb": Wandb(finish_timeout=1.0)}, Run(directory))
        for step in range(1, STEPS + 1):
            files.append_metrics(step, {"x": step / 3, "timing/seconds": 0.1, "timing/unix_time": time.time()})
            time.sleep(0.15)
        trained = time.time()
        session.finished(None)
        print(json.dumps({"trained": trained, "finished": time.time()}), flush=True)


def test_a_hanging_server_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """wandb waits 12 s for its own service, and 20 s for its telemetry, when the process ends."""
    pytest.importorskip("wandb")
    directory, held = tmp_path / "run", list[socket.socket]()
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:

        def take() -> None:
            try:
                while True:
                    held.append(server.accept()[0])
            except OSError:
                pass  # closed below

        threading.Thread(target=take, daemon=True).start()
        own = {name: str(tmp_path / "cache") for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")}
        others = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        done = subprocess.run(
            [sys.executable, __file__, str(directory)], capture_output=True, text=True, timeout=60, check=False,
            env={**others, **own, "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}",
                 "WANDB_API_KEY": 40 * "x"})
        ended = time.time()
        server.shutdown(socket.SHUT_RDWR)
    for connection in held:
        connection.close()
    assert held and done.returncode == 0, done.stderr
    took = json.loads(done.stdout.splitlines()[-1])
    assert took["finished"] - took["trained"] < 3.5 and ended - took["finished"] < 3.0
    assert f"{STEPS} records did not arrive" in done.stderr and f"posttrain sync {directory}" in done.stderr
    (ledger,) = ledgers(directory)
    assert (ledger.status, ledger.closed, waiting(directory, ledger.step)) == ("finished", "running", STEPS)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
