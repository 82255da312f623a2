"""Model folders read and written as JAX arrays: safetensors under Hugging Face's names. Knows no model and no
learner."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from posttrain.data import Array, to_numpy
from safetensors.flax import load_file
from safetensors.numpy import save_file

from posttrain_backends._jax.model import Params
from posttrain_backends.families.files import CONFIG, WEIGHTS, require_fitting, weight_files

Put = Callable[[str, Any], jax.Array]
"""A parameter's name and numbers -> the array where it belongs."""


def read_weights(folder: Path) -> dict[str, Array]:
    """All tensors of a folder's model, from one file or from those its index names; other files are left alone."""
    return {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}


def read_head(folder: Path, file: str) -> dict[str, Array]:
    """`weight` and `bias` of the head in the folder's `file`; nothing where it has none."""
    return dict(load_file(folder / file)) if (folder / file).is_file() else {}


def write_model(folder: Path, config: Mapping[str, object], weights: Params) -> None:
    """Write a folder that `weights:` of a config can load again."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tensors(folder / WEIGHTS, weights)


def write_tensors(file: Path, tensors: Params) -> None:
    """Write a file that torch and transformers read, too."""
    save_file({name: np.ascontiguousarray(to_numpy(x)) for name, x in tensors.items()}, file, metadata={"format": "pt"})


def fitted(source: Iterable[tuple[str, Array]], target: Mapping[str, Any], put: Put, what: str) -> dict[str, jax.Array]:
    """The source's numbers in the types and places of the target of equal names, as arrays of their own. Raises
    `ConfigError` that lists what is missing, unknown or of another shape."""
    given = dict(source)
    require_fitting({name: tuple(x.shape) for name, x in given.items()},
                    {name: tuple(x.shape) for name, x in target.items()}, what)
    return {name: put(name, np.array(to_numpy(given[name]), np.dtype(x.dtype))) for name, x in target.items()}
