"""Checkpoints: staged, hashed, published by one rename; a published step is never rewritten.

`step-000040/` holds `<name>.safetensors` for arrays, `<name>.json` for values and `manifest.json` with the size and
sha256 of each. Nothing on the load path executes what it reads. The hashes detect damage, not tampering.
Knows nothing about what the arrays and values mean.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from posttrain.errors import CheckpointDamaged, ConfigError, PosttrainError

JSON = Any
"""What JSON can hold. Typed as `Any`: readers know the shape of what they wrote."""

FORMAT = 1
"""Version of the layout; a newer one is refused by name."""

MANIFEST = "manifest.json"
FOLDER = "checkpoints"
"""Of a run directory."""

_STEP = re.compile(r"step-(\d{6,})")
_LEFTOVER = re.compile(r"\.(?:stage|deleting)-\d+-(\d{1,9})")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """What `save` was given."""

    step: int
    arrays: Mapping[str, Mapping[str, np.ndarray]]
    """group -> name -> array, writable, C order, native byte order."""
    values: Mapping[str, JSON]
    """name -> value; tuples came back as lists."""


def found_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None where there is none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def installed_version(distribution: str) -> str:
    """The same in words: `unknown` where it is not there, or runs from its source alone."""
    return found_version(distribution) or "unknown"


def save(root: Path, step: int, arrays: Mapping[str, Mapping[str, np.ndarray]], values: Mapping[str, JSON], *,
         keep: int) -> Path:
    """Publish `root/step-<step>` and delete the oldest beyond `keep` (0 keeps all); returns its path.

    A process killed at any point leaves every earlier checkpoint intact and never a half-written one under a published
    name. Saving equal content again is no error. Steps after this one (an abandoned history) are not counted and not
    deleted. Raises `PosttrainError` where the disk is full or cannot be written, or where the step is already
    published with other content, and `TypeError` or `ValueError` for what the formats cannot hold.
    """
    stage = root / f".stage-{step:06d}-{os.getpid()}"
    published = root / f"step-{step:06d}"
    try:
        try:
            root.mkdir(parents=True, exist_ok=True)
            _write_stage(stage, step, arrays, values)
            _publish(stage, published)
        finally:
            shutil.rmtree(stage, ignore_errors=True)  # nothing is there after it was published
    except OSError as error:
        raise PosttrainError(_not_saved(error, root, step, arrays)) from error
    _prune(root, step, keep)
    return published


def load(path: Path) -> Checkpoint:
    """Read a published checkpoint, after comparing every file with its manifest.

    Raises `CheckpointDamaged` naming the first file that differs.
    """
    manifest = verify(path)
    names = [Path(name) for name in manifest["files"]]
    return Checkpoint(
        manifest["step"],
        {name.stem: load_file(path / name) for name in names if name.suffix == ".safetensors"},
        {name.stem: json.loads((path / name).read_text("utf-8")) for name in names if name.suffix == ".json"})


def newest(root: Path, *, fallback: bool) -> Path | None:
    """The published checkpoint of the highest step, or None where there is none.

    A directory without a manifest was never published and is passed over. Raises `CheckpointDamaged` where the newest
    one is damaged; with `fallback` the newest intact one is taken, and only if none is intact it raises.
    """
    damage: CheckpointDamaged | None = None
    for _, path in reversed(_steps(root)):
        if not (path / MANIFEST).exists():
            logger.info("%s has no %s: it was never completed and is not used", path, MANIFEST)
            continue
        try:
            verify(path)
        except CheckpointDamaged as error:
            if not fallback:
                raise
            logger.warning("%s", error)
            damage = damage or error
        else:
            return path
    if damage is not None:
        raise damage
    return None


def require_newest(run: Path, *, fallback: bool) -> Path:
    """`newest` of a run's checkpoints. Raises `ConfigError` where it has none."""
    found = newest(run / FOLDER, fallback=fallback)
    if found is None:
        raise ConfigError([f"{run} has no checkpoint yet"], next_step=f"go on with it: posttrain resume {run}")
    return found


def tidy(root: Path) -> None:
    """Remove what processes that no longer live left half-written or half-deleted. Called once when a run starts."""
    import psutil

    for path in sorted(root.glob(".*")) if root.is_dir() else ():
        match = _LEFTOVER.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not psutil.pid_exists(int(match[1]))):
            shutil.rmtree(path, ignore_errors=True)
            logger.info("removed %s, left by a process that was killed", path)


def verify(path: Path) -> dict[str, JSON]:
    """The manifest of a published checkpoint whose files all have the size and sha256 it states.

    Raises `CheckpointDamaged` naming the first file that does not.
    """
    manifest = _read_manifest(path)
    for name, stated in manifest["files"].items():
        try:
            size = (path / name).stat().st_size
            digest = _sha256(path / name) if size == stated["bytes"] else ""
        except OSError as error:
            _damaged(path, name, f"cannot be read: {error.strerror}", error)
        if size != stated["bytes"]:
            _damaged(path, name, f"has {size} bytes, its manifest states {stated['bytes']}")
        if digest != stated["sha256"]:
            _damaged(path, name, f"has sha256 {digest[:12]}..., its manifest states {stated['sha256'][:12]}...")
    return manifest


def published(root: Path) -> list[tuple[int, Path]]:
    """Published steps and their directories, rising. Ordered by step, never by time stamps."""
    return [(step, path) for step, path in _steps(root) if (path / MANIFEST).exists()]


def _steps(root: Path) -> list[tuple[int, Path]]:
    """All directories of steps, also those that were never completed."""
    found = [(_STEP.fullmatch(path.name), path) for path in (root.iterdir() if root.is_dir() else ())]
    return sorted((int(match[1]), path) for match, path in found if match)


def _write_stage(stage: Path, step: int, arrays: Mapping[str, Mapping[str, np.ndarray]],
                 values: Mapping[str, JSON]) -> None:
    """All files, each flushed to the disk, the manifest last."""
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    writers: dict[str, Callable[[Path], None]] = {}
    for name, group in arrays.items():
        writers[f"{name}.safetensors"] = partial(_write_arrays, group)
    for name, value in values.items():
        writers[f"{name}.json"] = partial(_write_value, value)
    files = {}
    for name, write in sorted(writers.items()):
        if name == MANIFEST or not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be the name of a file in a checkpoint")
        write(stage / name)
        _flush(stage / name)
        files[name] = {"sha256": _sha256(stage / name), "bytes": (stage / name).stat().st_size}
    manifest = {"format": FORMAT, "posttrain": installed_version("posttrain-core"), "step": step, "files": files}
    (stage / MANIFEST).write_text(_sealed(manifest), "utf-8")
    _flush(stage / MANIFEST)
    _flush(stage)


def _write_arrays(group: Mapping[str, np.ndarray], path: Path) -> None:
    # safetensors copies memory as it lies, so strided or transposed arrays would be stored wrong without a word.
    laid_out = {name: np.asarray(x, order="C") for name, x in group.items()}
    try:
        save_file(laid_out, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            types = {name: str(x.dtype) for name, x in laid_out.items()}
            raise TypeError(f"{path.name} cannot hold arrays of these types: {types}; {error}") from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors shuts out the group, whatever the umask says


def _write_value(value: JSON, path: Path) -> None:
    _refuse_other_keys(value, path.name)
    path.write_text(json.dumps(value, ensure_ascii=True), "utf-8")  # ASCII, so that lone surrogates survive


def _refuse_other_keys(value: JSON, where: str) -> None:
    """JSON turns keys that are not strings into strings, so they would not come back as they were."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: the key {key!r} is not a string and would not survive JSON")
            _refuse_other_keys(item, f"{where}/{key}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            _refuse_other_keys(item, where)


def _publish(stage: Path, published: Path) -> None:
    if (published / MANIFEST).exists():
        try:
            files = verify(published)["files"]
        except CheckpointDamaged as damage:
            logger.warning("%s\nit is replaced", damage)
        else:
            if files == _read_manifest(stage)["files"]:
                return
            raise PosttrainError(
                f"{published} already holds other content; a published checkpoint is never rewritten\n"
                "continue in another run directory: run=PATH, or delete that checkpoint")
    if published.exists():
        _delete(published)
    os.rename(stage, published)
    _flush(published.parent)


def _prune(root: Path, step: int, keep: int) -> None:
    """Delete the oldest before `step`, so that `keep` remain with it."""
    older = [path for number, path in published(root) if number < step]
    for path in older[:max(len(older) - (keep - 1), 0)] if keep else ():
        try:
            _delete(path)
        except OSError as error:
            logger.warning("cannot delete the old checkpoint %s: %s", path, error.strerror)


def _delete(path: Path) -> None:
    """Rename to a name that is never chosen, then delete, so that a half-deleted checkpoint is never loaded."""
    match = _STEP.fullmatch(path.name)
    assert match is not None, path
    doomed = path.with_name(f".deleting-{match[1]}-{os.getpid()}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _sealed(manifest: Mapping[str, JSON]) -> str:
    """The manifest's text, with its own sha256 as last entry."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1)


def _read_manifest(path: Path) -> dict[str, JSON]:
    try:
        text = (path / MANIFEST).read_bytes()
        manifest = json.loads(text)
        sealed = _sealed({key: value for key, value in manifest.items() if key != "sha256"})
    except OSError as error:
        _damaged(path, MANIFEST, f"cannot be read: {error.strerror}", error)
    except (ValueError, AttributeError) as error:
        _damaged(path, MANIFEST, f"is not JSON: {error}", error)
    if sealed.encode() != text:
        _damaged(path, MANIFEST, "does not match its own sha256")
    if manifest["format"] != FORMAT:
        raise PosttrainError(f"{path} has checkpoint format {manifest['format']}, written by posttrain "
                             f"{manifest['posttrain']}; this posttrain reads format {FORMAT}: install that version")
    return dict(manifest)


def _damaged(path: Path, name: str, what: str, cause: Exception | None = None) -> NoReturn:
    raise CheckpointDamaged(f"checkpoint {path} is damaged: {name} {what}\n"
                            "to continue from the newest intact checkpoint: resume.fallback=true") from cause


def _not_saved(error: OSError, root: Path, step: int, arrays: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """What to tell where a checkpoint could not be written."""
    text = f"checkpoint of step {step} was not saved in {root}: {error.strerror or error}"
    if error.errno in _NO_SPACE:
        needed = sum(np.asarray(x).nbytes for group in arrays.values() for x in group.values())
        there = next(path for path in (root, *root.absolute().parents) if path.exists())
        text += (f"\nits arrays need {needed} bytes, the disk has {shutil.disk_usage(there).free} bytes free; "
                 "make room, raise the limit on file sizes, or keep fewer: checkpoint.keep=1")
    return text + "\nearlier checkpoints are intact"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Write a file, or a directory's entries, through to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
