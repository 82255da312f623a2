"""The run directory, the truth of a run: configuration, manifest, metrics, samples, checkpoints; held by one process.

Metrics are appended here before any tracker sees them. What may differ between two equal runs (seconds, memory, tokens
per second, the time of day) stands under `timing`, so runs of one seed give equal lines apart from that field.
Knows files alone: neither the configuration's meaning nor the loop.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

import numpy as np

from posttrain.checkpoint import FOLDER as CHECKPOINTS
from posttrain.checkpoint import JSON, installed_version
from posttrain.errors import DataError, InputError, PosttrainError, Problem, RunInUse, did_you_mean

if TYPE_CHECKING:
    from filelock import BaseFileLock

CONFIG, MANIFEST, METRICS, SAMPLES = "config.yaml", "manifest.json", "metrics.jsonl", "samples.jsonl"
REPORT = "report.html"

TIMING = "timing/"
"""Prefix of metrics that may differ between two equal runs."""

__all__ = ["TIMING", "RunDirectory", "read_metrics"]
"""What authors of trackers may import; the rest is for the loop."""

_RESERVED = frozenset({"step", "timing", "nonfinite"})
_OWNER = ".owner.json"

_BITWISE = ("threads", "frameworks", "cpu", "accelerators", "python", "posttrain", "plugins", "user_files")
"""Entries of the manifest on which the last bits of a result depend."""

logger = logging.getLogger(__name__)


class JsonLines:
    """An append-only file of one JSON object a line, each with its `step`; a line is there whole or not at all.

    A last line torn by a kill is dropped on opening.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.touch()
            _drop_torn_line(path)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            _unusable(path, error)

    def append(self, records: Iterable[Mapping[str, JSON]]) -> None:
        """Write the records in one go. Raises `PosttrainError` where the disk is full; no part of a line stays."""
        data = b"".join(_encode(record) for record in records)
        before = os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[self._file.write(data):]
        except OSError as error:
            os.ftruncate(self._file.fileno(), before)
            raise PosttrainError(f"cannot write {self.path}: {error.strerror or error}\n"
                                 "its earlier lines are whole; make room and continue: posttrain resume") from error

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps by rewriting the file and renaming it into place.

        Raises `DataError` where a line that belongs to the kept history is not a JSON object with a step.
        """
        rewritten = self.path.with_name(f".{self.path.name}-{os.getpid()}")
        try:
            with rewritten.open("wb") as file:
                file.writelines(_lines_up_to(self.path, step))
                file.flush()
                os.fsync(file.fileno())
            os.replace(rewritten, self.path)
            self._file.close()
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            _unusable(self.path, error)
        finally:
            rewritten.unlink(missing_ok=True)

    def sync(self) -> None:
        """Write through to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class RunDirectory:
    """An opened run directory, locked against other processes until `close`; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._there_before: frozenset[Path] | None = None
        self.checkpoints = path / CHECKPOINTS
        """Given to `checkpoint.save`, `newest` and `tidy`."""
        with ExitStack() as undo:
            self._lock = _locked(path)
            undo.callback(self._let_go)
            try:
                self.checkpoints.mkdir(exist_ok=True)
            except OSError as error:
                _unusable(self.checkpoints, error)
            self.metrics = JsonLines(path / METRICS)
            undo.callback(self.metrics.close)
            self.samples = JsonLines(path / SAMPLES)
            undo.pop_all()

    @classmethod
    def create(cls, path: Path, *, config: str, manifest: Mapping[str, JSON]) -> Self:
        """A new run with its configuration (YAML text) and manifest (see `describe`).

        As a context manager it leaves nothing behind where an error ends it before a step was recorded, so that the
        same directory is free for the next try.

        Raises `InputError` where the directory cannot be made or already holds a run, `RunInUse` where it is held.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            _unusable(path, error)
        if (path / CONFIG).exists():
            raise InputError([Problem("this directory already holds a run", str(path))],
                             next_step=f"continue it: posttrain resume '{path}', or choose another: run=PATH")
        there = frozenset(path.iterdir())
        run = cls(path)
        run._there_before = there
        try:
            replace_text(path / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
            replace_text(path / CONFIG, config)  # last: its presence says that this is a run
        except OSError as error:
            run.close()
            _unusable(path, error)
        return run

    @classmethod
    def open(cls, path: Path) -> Self:
        """An existing run. Raises `InputError` where there is none, `RunInUse` where another process holds it."""
        require_run(path)
        return cls(path)

    @property
    def manifest(self) -> dict[str, JSON]:
        """What `describe` said when the run was started."""
        return dict(json.loads((self.path / MANIFEST).read_text("utf-8")))

    def differences(self, now: Mapping[str, JSON]) -> list[str]:
        """What, by the manifest of `now`, makes a resumed run no longer bitwise the uninterrupted one; also logged."""
        try:
            then = self.manifest
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s), so nothing says whether the resumed run is bitwise equal to an "
                           "uninterrupted one", self.path / MANIFEST, error)
            return []
        found = [f"{change(name, then.get(name), now.get(name))}: "
                 "the resumed run is no longer bitwise equal to an uninterrupted one"
                 for name in _BITWISE if then.get(name) != now.get(name)]
        for text in found:
            logger.warning("%s", text)
        return found

    def append_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line; see `metric_record`."""
        self.metrics.append([metric_record(step, metrics)])

    def append_samples(self, step: int, samples: Iterable[Mapping[str, JSON]]) -> None:
        """A line for each sample (prompt, completion, rewards, ...)."""
        self.samples.append({"step": step, **sample} for sample in samples)

    def sync(self) -> None:
        """Write metrics and samples through to the disk; called before a checkpoint, whose history they are."""
        self.metrics.sync()
        self.samples.sync()

    def truncate_after(self, step: int) -> None:
        """Drop metrics and samples of steps after `step`, the checkpoint from which the run goes on."""
        self.metrics.truncate_after(step)
        self.samples.truncate_after(step)

    def close(self) -> None:
        """Close the files and let others in."""
        self.metrics.close()
        self.samples.close()
        self._let_go()

    def _let_go(self) -> None:
        if self._lock.is_locked:
            (self.path / _OWNER).unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            if error is not None and self._there_before is not None and not self._has_steps():
                self._withdraw(self._there_before)
        finally:
            self.close()

    def _has_steps(self) -> bool:
        return any(record["step"] > 0 for record in read_metrics(self.path))

    def _withdraw(self, there_before: frozenset[Path]) -> None:
        """Remove what this run put into the directory, and the directory where nothing else is in it."""
        for path in sorted(set(self.path.iterdir()) - there_before):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if not there_before:
            with suppress(OSError):  # another process may have put something there
                self.path.rmdir()


def require_run(path: Path) -> None:
    """Raise `InputError` where `path` holds no run."""
    if not (path / CONFIG).is_file():
        what = f"has no {CONFIG}" if path.is_dir() else "does not exist"
        known = [p.parent.name for p in path.parent.glob(f"*/{CONFIG}")] if path.parent.is_dir() else []
        raise InputError([Problem(f"{path} is not a run directory: it {what}{did_you_mean(path.name, known)}")],
                         next_step="start a run: posttrain train CONFIG")


def metric_record(step: int, metrics: Mapping[str, float]) -> dict[str, JSON]:
    """The line of a step: metrics by name, those under `timing/` apart, NaN and infinity as null and counted.

    >>> metric_record(3, {"loss": float("nan"), "reward/mean": 0.5, "timing/seconds": 1.25})
    {'step': 3, 'loss': None, 'reward/mean': 0.5, 'nonfinite': 1, 'timing': {'seconds': 1.25}}
    """
    if taken := _RESERVED & metrics.keys():
        raise ValueError(f"metrics cannot be called {sorted(taken)}: these are fields of the line itself")
    steady = {name: _strict(metrics[name]) for name in sorted(metrics) if not name.startswith(TIMING)}
    timing = {name.removeprefix(TIMING): _strict(metrics[name]) for name in sorted(metrics) if name.startswith(TIMING)}
    nonfinite = sum(value is None for value in steady.values())
    return {"step": step, **steady, **({"nonfinite": nonfinite} if nonfinite else {}), "timing": timing}


def read_metrics(path: Path) -> list[dict[str, JSON]]:
    """Lines of a run's `metrics.jsonl` (a run directory, or the file), as `metric_record` made them.

    Needs no lock, so a living run can be read; a last line not yet whole is left out.
    Raises `InputError` where there is no such file and `DataError` naming a line that is not JSON.
    """
    file = path / METRICS if path.is_dir() else path
    try:
        lines = file.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise InputError([Problem(f"cannot read the metrics: {error.strerror}", str(file))],
                         next_step="give a run directory, such as runs/NAME") from error
    records = [_decode(line) for line in lines]
    bad = [n for n, record in enumerate(records, 1) if record is None]
    if bad:
        raise DataError([Problem("not a JSON object with a step", f"{file}:{n}") for n in bad])
    return [record for record in records if record is not None]


def describe(*, seed: int, threads: int, plugins: Sequence[str], user_files: Sequence[Path],
             started: str) -> dict[str, JSON]:
    """The manifest of a run that starts now: what a repetition must have equal, and what the machine was.

    `threads` are those the framework uses, `plugins` the distributions in use, `started` the time of day. Imports no
    framework: versions are those installed. Raises `InputError` where a user file cannot be read.
    """
    import psutil

    return {
        "posttrain": installed_version("posttrain-core"), "started": started, "seed": seed, "threads": threads,
        "plugins": {name: installed_version(name) for name in sorted(plugins)},
        "frameworks": {name: installed_version(name) for name in ("numpy", "torch", "jax", "transformers", "peft")},
        "python": platform.python_version(), "platform": platform.platform(), "host": socket.gethostname(),
        "cpu": _cpu_model(), "cpus": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total,
        "accelerators": accelerators(), "user_files": {str(path): _hash_of(path) for path in user_files},
    }


def change(name: str, then: JSON, now: JSON) -> str:
    """How something is another than it was, in words; of a map only the entries that are.

    >>> change("threads", 2, 1)
    'threads was 2 and is now 1'
    >>> change("plugins", {"a": "1.0", "b": "1.0"}, {"b": "1.1", "c": "0.1"})
    "plugins: a was '1.0' and is gone; b was '1.0' and is now '1.1'; c was added as '0.1'"
    """
    if not isinstance(then, Mapping) or not isinstance(now, Mapping):
        return f"{name} was {then!r} and is now {now!r}"
    entries = [entry for entry in sorted(then.keys() | now.keys()) if then.get(entry) != now.get(entry)]
    return f"{name}: " + "; ".join(
        f"{entry} was added as {now[entry]!r}" if entry not in then else
        f"{entry} was {then[entry]!r} and is gone" if entry not in now else
        change(entry, then[entry], now[entry]) for entry in entries)


def _locked(path: Path) -> BaseFileLock:
    """The directory's lock. The system lets go of it when its holder dies, so a stale one is simply taken."""
    from filelock import FileLock, Timeout

    lock = FileLock(path / ".lock", thread_local=False)
    owner = path / _OWNER
    try:
        lock.acquire(timeout=0)
        if owner.exists():
            logger.info("%s was left by %s without being closed", path, _owner_text(owner))
        owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), "utf-8")
    except Timeout:
        raise RunInUse(f"run directory {path} is in use by {_owner_text(owner)}\n"
                       "wait for that process, stop it, or choose another directory: run=PATH") from None
    except OSError as error:
        lock.release()
        _unusable(path, error)
    return lock


def _owner_text(owner: Path) -> str:
    try:
        held = json.loads(owner.read_text("utf-8"))
        return f"process {held['pid']} on {held['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"


def _lines_up_to(path: Path, step: int) -> Iterator[bytes]:
    """Lines of steps up to `step`. A machine that lost power may leave garbage behind what was written through."""
    bad = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            record = _decode(line)
            if record is None:
                bad = bad or number
            elif record["step"] <= step:
                if bad:
                    raise DataError([Problem("not a JSON object with a step", f"{path}:{bad}")],
                                    title="the history before the checkpoint is damaged",
                                    next_step="delete that line, or the file, and resume again")
                yield line


def _drop_torn_line(path: Path) -> None:
    with path.open("rb+") as file:
        end = position = file.seek(0, os.SEEK_END)
        while position:
            start = max(position - 65536, 0)
            file.seek(start)
            if (last := file.read(position - start).rfind(b"\n")) >= 0:
                position = start + last + 1
                break
            position = start
        if position < end:
            file.truncate(position)


def _encode(record: Mapping[str, JSON]) -> bytes:
    text = json.dumps(_strict(record), ensure_ascii=False, allow_nan=False, separators=(", ", ": "))
    return text.encode("utf-8", "backslashreplace") + b"\n"  # a lone surrogate becomes a JSON escape


def _decode(line: bytes) -> dict[str, JSON] | None:
    """The record of a line, or None where it is not one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _strict(value: JSON) -> JSON:
    """Strict JSON: NaN and infinity become null, NumPy scalars and arrays plain numbers and lists."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _strict(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value


def replace_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    whole = path.with_name(f".{path.name}-{os.getpid()}")
    with whole.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(whole, path)


def _unusable(path: Path, error: OSError) -> NoReturn:
    raise InputError([Problem(f"cannot write: {error.strerror or error}", str(path))],
                     next_step="make room or give the rights, or choose another directory: run=PATH") from error


def _hash_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError([Problem(f"cannot read: {error.strerror}", str(path))]) from error


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def accelerators() -> list[str]:
    """Names of the NVIDIA devices the driver shows."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        shown = subprocess.run([program, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True,
                               timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("nvidia-smi did not answer: %s", error)
        return []
    return shown.stdout.split("\n")[:-1]
