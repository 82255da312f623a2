"""Rewarded soups: policies between policies of one start, by mixing their weights (Ramé et al. 2023, arXiv 2306.04488).

theta(w) = sum_i w_i theta_i, tensor by tensor, in float32 or the tensor's own precision where that is higher. Knows
folders of safetensors alone, as a run leaves them: the adapters of LoRA policies are products Delta W there, merged
into the weights, so theta(w) = theta_0 + sum_i w_i Delta W_i. Mixing factors A and B would give products of different
policies.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
from posttrain.errors import InputError, Problem

WEIGHTS = "*.safetensors"
EQUAL = ("config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model")
"""Files that say what the weights mean and what text is to the model: the same, byte for byte, in all folders."""
FLOATS: Mapping[str, str] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""Names of safetensors -> how NumPy reads them; bfloat16 as the upper halves of float32."""


@final
@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies in a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def bytes(self, mode: Literal["r", "r+"] = "r") -> np.memmap[Any, np.dtype[np.uint8]]:
        """[end - start] uint8 of the file itself; `r+` to change it."""
        return np.memmap(self.path, np.uint8, mode, self.start, (self.end - self.start,))


def soup(folders: Sequence[str | Path], weights: Sequence[float], output: str | Path) -> Path:
    """Write the policy between those in `folders` (as a run's `policy/`) to the new folder `output`; returns its path.

    `weights` sum to 1; with all of it on one folder the result is that policy, bit for bit. One tensor at a time is in
    memory. Raises `InputError` where the policies differ in tokenizer, architecture, names or shapes, where the weights
    do not fit and where `output` exists.
    """
    parents, w = [Path(folder) for folder in folders], [float(x) for x in weights]
    _check_weights(parents, w)
    tensors = [tensors_of(parent) for parent in parents]
    if problems := [p for parent, own in zip(parents[1:], tensors[1:])
                    for p in (*_of_files(parents[0], parent), *_of_tensors(tensors[0], own, parent))]:
        raise InputError(problems, title=f"these policies cannot be mixed with {parents[0]}:")
    target = Path(output)
    if target.exists():
        raise InputError([Problem("it exists already, and nothing is overwritten", str(target))])
    stage = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        shutil.copytree(parents[0], stage)
        for name, tensor in tensors_of(stage).items():
            _write_mixed(tensor, [own[name] for own in tensors], w)
        stage.rename(target)
    except OSError as error:
        raise InputError([Problem(f"cannot write: {error.strerror or error}", str(target))]) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # nothing is there after it was renamed
    return target


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, by `file of a head/name` or name: those of a model are one set however they are split.

    Raises `InputError` where there is none, or a file is damaged.
    """
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob(WEIGHTS)):
        prefix = f"{path.stem}/" if path.stem.endswith("_head") else ""
        found |= {prefix + tensor_name: tensor for tensor_name, tensor in _header(path)}
    if not found:
        raise InputError([Problem(f"holds no {WEIGHTS}", str(folder))],
                         next_step="a policy is the folder `policy` of a finished run, or one of posttrain export")
    return found


def _header(path: Path) -> Iterable[tuple[str, Tensor]]:
    """What a file says of itself: the length of a JSON text, the text, then the numbers."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length if length < path.stat().st_size else 0))
        for name, entry in entries.items():
            if name != "__metadata__":
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                yield name, Tensor(path, entry["dtype"], tuple(entry["shape"]), start, end)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError([Problem(f"not a file of safetensors: {error}", str(path))]) from error


def _check_weights(parents: Sequence[Path], w: Sequence[float]) -> None:
    if not parents or len(parents) != len(w):
        raise InputError([Problem(f"a soup needs one weight for each policy, got {len(w)} for {len(parents)}")])
    if not all(map(math.isfinite, w)) or abs(sum(w) - 1.0) > 1e-6:
        raise InputError([Problem(f"the weights of a soup must sum to 1, got {list(w)}")])


def _of_files(one: Path, other: Path) -> Iterable[Problem]:
    """What says that two folders do not hold the same kind of model."""
    names = {path.name for folder in (one, other) for path in folder.iterdir()
             if any(fnmatch(path.name, pattern) for pattern in EQUAL)}
    for name in sorted(names):
        texts = [(folder / name).read_bytes() if (folder / name).is_file() else None for folder in (one, other)]
        if texts[0] != texts[1]:
            what = "is missing in one of them" if None in texts else "differs"
            yield Problem(f"{name} {what}; only policies of one start and one tokenizer mix", str(other))


def _of_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor], folder: Path) -> Iterable[Problem]:
    different = sorted(one.keys() ^ other.keys())
    if different:
        yield Problem(f"only one of them has {', '.join(different[:5])}"
                      f"{f' and {len(different) - 5} more' if len(different) > 5 else ''}", str(folder))
    for name in sorted(one.keys() & other.keys()):
        a, b = one[name], other[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            yield Problem(f"{name} is {b.dtype} {b.shape}, in the first {a.dtype} {a.shape}", str(folder))
        elif a.dtype not in FLOATS and not np.array_equal(a.bytes(), b.bytes()):
            yield Problem(f"{name} holds other numbers, and {a.dtype} cannot be mixed", str(folder))


def _write_mixed(target: Tensor, parents: Sequence[Tensor], w: Sequence[float]) -> None:
    """Into a copy of the first parent. A weight of 0 is no term, and a single weight of 1 copies."""
    chosen = [(x, parent) for x, parent in zip(w, parents) if x]
    if target.start == target.end or target.dtype not in FLOATS:
        return
    data = target.bytes("r+")
    if len(chosen) == 1 and chosen[0][0] == 1.0:
        data[:] = chosen[0][1].bytes()
    else:
        total = sum(x * _widened(parent.bytes(), target.dtype) for x, parent in chosen)
        data[:] = _narrowed(np.asarray(total), target.dtype)
    data.flush()


def _widened(data: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """[n] float32, or float64 of float64."""
    x = np.frombuffer(data.tobytes(), FLOATS[dtype])
    if dtype == "BF16":
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.promote_types(x.dtype, np.float32))


def _narrowed(x: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """uint8 of the numbers in `dtype`, rounded to the nearest, of two equally near to the even one."""
    if dtype == "BF16":
        whole = x.astype("<f4").view(np.uint32)
        rounded = ((whole + 0x7FFF + ((whole >> 16) & 1)) >> 16).astype("<u2")
        return np.frombuffer(rounded.tobytes(), np.uint8)
    return np.frombuffer(x.astype(FLOATS[dtype]).tobytes(), np.uint8)
