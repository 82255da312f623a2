"""Processes killed at the worst moment and disks that are full: nothing that was saved is ever lost.

The tests run this file as a program, whose forked children are the victims.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from posttrain import checkpoint
from posttrain.errors import PosttrainError, RunInUse
from posttrain.rundir import METRICS, RunDirectory, read_metrics
from safetensors.numpy import save as serialized

BIG = 40_000
MUTATIONS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


def save(root: Path, step: int, keep: int = 0) -> Path:
    arrays = {"policy": {"w": np.random.default_rng(step).normal(size=BIG // 8)}}
    return checkpoint.save(root, step, arrays, {"state": {"step": step}}, keep=keep)


def assert_intact(path: Path) -> None:
    loaded = checkpoint.load(path)
    assert path.name == f"step-{loaded.step:06d}" and loaded.values["state"] == {"step": loaded.step}
    expected = np.random.default_rng(loaded.step).normal(size=BIG // 8)
    np.testing.assert_array_equal(loaded.arrays["policy"]["w"], expected, strict=True)


def run_here(name: str, *arguments: object) -> list[object]:
    """Run one of the programs below in an interpreter of its own; the JSON lines it printed."""
    done = subprocess.run([sys.executable, __file__, name, *map(str, arguments)], capture_output=True, text=True,
                          timeout=60, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


# Programs --------------------------------------------------------------------------------------------------------


def forked(victim: Callable[[], None]) -> int:
    """Exit code of a forked child, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        try:
            victim()
        except PosttrainError as error:
            print(json.dumps(str(error)), flush=True)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_before_call(n: int) -> None:
    """SIGKILL this process just before its n-th change of a directory or flush to the disk."""
    calls = itertools.count(1)

    def count(*_: object) -> None:
        if next(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    flush = os.fsync
    os.fsync = lambda handle: (count(), flush(handle))[1]
    sys.addaudithook(lambda event, _: count() if event in MUTATIONS else None)


def killed_at_every_call(root: str) -> None:
    """Save step 30 with keep=2 beside 10 and 20, killed before call 1, 2, 3, ... until it gets through."""
    for n in itertools.count(1):
        here = Path(root) / f"{n:03d}"
        for step in (10, 20):
            save(here, step)

        def victim(n: int = n, here: Path = here) -> None:
            kill_before_call(n)
            save(here, 30, keep=2)

        code = forked(victim)
        print(json.dumps([here.name, code]), flush=True)
        if code == 0:
            return


def killed_at_bytes(root: str, *offsets: str) -> None:
    """SIGKILL the saver when that many bytes of its arrays are in the file."""
    for offset in offsets:
        here = Path(root) / offset
        save(here, 10)

        def victim(here: Path = here, size: int = int(offset)) -> None:
            def torn(arrays: dict[str, np.ndarray], path: Path) -> None:
                path.write_bytes(serialized(arrays)[:size])
                os.kill(os.getpid(), signal.SIGKILL)

            checkpoint.save_file = torn
            save(here, 20, keep=1)

        print(json.dumps([offset, forked(victim)]), flush=True)


def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def disk_full(root: str) -> None:
    """Writing beyond the limit fails with EFBIG, as a full disk does with ENOSPC."""
    save(Path(root), 10)

    def victim() -> None:
        limit_file_size(BIG // 2)
        save(Path(root), 20, keep=1)

    print(json.dumps(forked(victim)), flush=True)


def metrics_full(root: str) -> None:
    run = RunDirectory.create(Path(root), config="", manifest={})
    limit_file_size(1000)
    try:
        for step in itertools.count(1):
            run.append_metrics(step, {"reward/mean": 0.5, "timing/seconds": 1.0})
    except PosttrainError as error:
        print(json.dumps([step, str(error)]))


def hold(root: str) -> None:
    """Hold a run directory and append metrics until killed."""
    with RunDirectory.open(Path(root)) as run:
        for step in itertools.count():
            run.append_metrics(step, {f"metric/{i}": float(i) for i in range(50)})
            if step == 100:
                print("held", flush=True)


# Tests -----------------------------------------------------------------------------------------------------------


def test_killed_at_every_call_of_saving_and_pruning(tmp_path: Path) -> None:
    outcomes = dict(run_here("killed_at_every_call", tmp_path))
    chosen, leftovers = [], set()
    for name, code in outcomes.items():
        here = tmp_path / name
        assert code in (0, -signal.SIGKILL)
        newest = checkpoint.newest(here, fallback=False)
        assert newest is not None
        assert_intact(newest)
        chosen.append(newest.name)
        for path in here.glob("step-*"):
            assert_intact(path)
        leftovers |= {path.name.split("-")[0] for path in here.glob(".*")}
        checkpoint.tidy(here)
        assert not list(here.glob(".*"))
        save(here, 30, keep=2)
        assert sorted(path.name for path in here.iterdir()) == ["step-000020", "step-000030"]
    assert chosen == sorted(chosen) and set(chosen) == {"step-000020", "step-000030"}
    assert leftovers == {".stage", ".deleting"}  # the kills did meet both


def test_killed_at_five_byte_offsets(tmp_path: Path) -> None:
    offsets = (0, 5, 60, BIG // 2, BIG - 1)  # nothing, within the header's length, the header, the data
    for offset, code in run_here("killed_at_bytes", tmp_path, *offsets):
        here = tmp_path / str(offset)
        assert code == -signal.SIGKILL
        stage, = here.glob(".stage-000020-*")
        assert (stage / "policy.safetensors").stat().st_size == int(offset)
        newest = checkpoint.newest(here, fallback=False)
        assert newest == here / "step-000010"
        assert_intact(newest)
        checkpoint.tidy(here)
        assert [path.name for path in here.iterdir()] == ["step-000010"]


def test_disk_full_leaves_the_previous_checkpoint_and_no_stage(tmp_path: Path) -> None:
    message, code = run_here("disk_full", tmp_path)
    assert code == 0
    assert f"checkpoint of step 20 was not saved in {tmp_path}: File too large" in str(message)
    assert f"need {BIG} bytes" in str(message) and "bytes free" in str(message)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]
    assert_intact(tmp_path / "step-000010")


def test_metrics_on_a_full_disk_stay_whole(tmp_path: Path) -> None:
    (step, message), = run_here("metrics_full", tmp_path / "run")
    assert f"cannot write {tmp_path / 'run' / METRICS}: File too large" in message
    assert (tmp_path / "run" / METRICS).read_bytes().endswith(b"\n")
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == list(range(1, step))


def test_lock_names_its_holder_and_dies_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    RunDirectory.create(tmp_path / "run", config="steps: 1\n", manifest={}).close()
    with subprocess.Popen([sys.executable, __file__, "hold", tmp_path / "run"], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
            with pytest.raises(RunInUse, match=rf"in use by process {holder.pid} on {os.uname().nodename}") as caught:
                RunDirectory.open(tmp_path / "run")
            assert caught.value.exit_code == 2
            assert len(read_metrics(tmp_path / "run")) > 100  # a living run can be read
        finally:
            holder.kill()
    caplog.set_level("INFO")
    with RunDirectory.open(tmp_path / "run") as run:
        assert f"left by process {holder.pid} on" in caplog.text
        run.truncate_after(50)
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == list(range(51))


PROGRAMS = {program.__name__: program
            for program in (killed_at_every_call, killed_at_bytes, disk_full, metrics_full, hold)}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
