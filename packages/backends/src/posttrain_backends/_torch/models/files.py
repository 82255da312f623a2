"""Model folders: safetensors under Hugging Face names, and `config.json`. Knows no model and no learner.

A folder of a native model is a Hugging Face folder of its family and the other way round. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from posttrain.errors import ConfigError
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
NO_FOLDER = ("policy.weights names a folder written by a run, or a Hugging Face folder with safetensors of a Llama, "
             "Mixtral, Qwen2, Qwen3 or SmolLM model (use: torch) or of a Mamba-2 model (use: ssm).")
_PADDED_TO = 64
"""Published models may have a few embeddings more than tokens, up to a multiple of this (Qwen: of 128)."""
VALUE_HEAD, ACTION_VALUE_HEAD = "value_head.safetensors", "action_value_head.safetensors"
"""Of a learner, beside the model's own files."""


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's model, from one file or from those its index names; other files are left alone."""
    paths = _weight_files(folder)
    if absent := [path.name for path in paths if not path.is_file()]:
        raise ConfigError([f"{folder} has no {name}, which its {INDEX} names" for name in absent],
                          next_step="Copy or download the folder again, with all its files.")
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}


def _weight_files(folder: Path) -> list[Path]:
    """One file before several, as in transformers."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ConfigError([f"{folder} holds neither {WEIGHTS} nor {INDEX}"], next_step=NO_FOLDER)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def drop_tied(weights: dict[str, Tensor], output: str, embedding: str, folder: Path) -> None:
    """Take the output matrix out of a folder's weights where it is the embedding. Raises `ConfigError` where it is
    not."""
    again = weights.pop(output, None)
    if again is not None and not torch.equal(again, weights.get(embedding, again)):
        raise ConfigError([f"{folder} ties the output matrix to the embedding (tie_word_embeddings), but {output} and "
                           f"{embedding} differ"],
                          next_step="Set tie_word_embeddings to false in its config.json to take both.")


def check_vocabulary(folder: Path, has: int, needs: int) -> None:
    """Raise `ConfigError` where a folder's model of `has` tokens is not one for a tokenizer of `needs`, 0 for any."""
    padded = has % _PADDED_TO == 0 and needs < has
    if needs and needs != has and not padded:
        raise ConfigError(
            [f"policy.weights {folder} has a vocabulary of {has}, the tokenizer needs {needs}"],
            next_step="Take the tokenizer the weights were trained with; token ids would mean something else.")


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


def copy_named(source: Iterable[tuple[str, Tensor]], target: Mapping[str, Tensor], what: str) -> None:
    """Write every source tensor into the target of its name; all names and shapes must fit, or nothing is written.

    Raises `ConfigError` that lists what is missing, unknown or of another shape.
    """
    given = dict(source)
    problems = [f"{name} is missing" for name in target if name not in given]
    problems += [f"{name} is unknown to the model" for name in given if name not in target]
    problems += [f"{name} has shape {tuple(given[name].shape)}, the model has {tuple(t.shape)}"
                 for name, t in target.items() if name in given and given[name].shape != t.shape]
    if problems:
        shown = [*problems[:5], *([f"and {len(problems) - 5} more"] if len(problems) > 5 else [])]
        raise ConfigError(shown, title=f"{what} does not fit the model:")
    with torch.no_grad():
        for name, t in target.items():
            t.copy_(given[name])
