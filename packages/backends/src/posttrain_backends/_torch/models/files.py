"""Model folders read and written in torch: safetensors under Hugging Face names. Knows no model and no learner."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from posttrain.data import Array, to_numpy
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._guards import detect_fake_mode

from posttrain_backends.families.files import CONFIG, WEIGHTS, require_fitting, weight_files

_DTYPES: Mapping[str, torch.dtype] = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
                                      "BF16": torch.bfloat16}
"""As safetensors names the types that weights are in."""


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's model, from one file or from those its index names; other files are left alone."""
    if detect_fake_mode() is not None:
        return {name: tensor for path in weight_files(folder) for name, tensor in _described(path)}
    return {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}


def _described(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file without what they hold; see `_torch/imagined.py`."""
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  # it is no mapping
            part = file.get_slice(name)
            yield name, torch.empty(part.get_shape(), dtype=_DTYPES[part.get_dtype()])


def read_head(folder: Path, file: str) -> dict[str, Tensor]:
    """`weight` and `bias` of the head in the folder's `file`; nothing where it has none."""
    return load_file(folder / file) if (folder / file).is_file() else {}


def write_model(folder: Path, config: Mapping[str, object], weights: Mapping[str, Tensor]) -> None:
    """Write a folder that `weights:` of a config can load again."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(_plain(weights), folder / WEIGHTS, metadata={"format": "pt"})


def write_head(folder: Path, file: str, head: Mapping[str, Tensor]) -> None:
    """Write `weight` and `bias` beside a model."""
    save_file(_plain(head), folder / file, metadata={"format": "pt"})


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def tensor_of(x: Array) -> Tensor:
    """A tensor as it is; an array of NumPy or JAX, also in bfloat16, as a copy on the CPU."""
    return x if isinstance(x, Tensor) else torch.tensor(to_numpy(x))


def copy_named(source: Iterable[tuple[str, Array]], target: Mapping[str, Tensor], what: str) -> None:
    """Write every source array, of any framework, into the target of its name; all names and shapes must fit, or
    nothing is written.

    Raises `ConfigError` that lists what is missing, unknown or of another shape.
    """
    given = {name: tensor_of(x) for name, x in source}
    require_fitting({name: tuple(t.shape) for name, t in given.items()},
                    {name: tuple(t.shape) for name, t in target.items()}, what)
    with torch.no_grad():
        for name, t in target.items():
            t.copy_(given[name])
