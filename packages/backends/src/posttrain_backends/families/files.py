"""Model folders: the names of their files, and what must be true of them. Imports no framework.

A folder of a native model is a Hugging Face folder of its family and the other way round. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from posttrain.data import Array
from posttrain.errors import ConfigError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
NO_FOLDER = ("weights names a folder written by a run, or a Hugging Face folder with safetensors of a Llama, Mixtral, "
             "Qwen2, Qwen3 or SmolLM model (use: torch) or of a Mamba-2 model (use: ssm).")
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
"""Of a transformer of the native families."""
DERIVED = ".rotary_emb.inv_freq"
"""In names of what older files hold beside their weights, and the configuration says."""
_PADDED_TO = 64
"""Published models may have a few embeddings more than tokens, up to a multiple of this (Qwen: of 128)."""
VALUE_HEAD, ACTION_VALUE_HEAD = "value_head.safetensors", "action_value_head.safetensors"
HEAD_FILES: Mapping[str, str] = {"value_head": VALUE_HEAD, "action_value_head": ACTION_VALUE_HEAD}
"""A head's name, which stands before those of its parameters, and its file beside the model: heads belong to the
learner and not to the model."""


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's model: one before several, as in transformers. Raises `ConfigError` where one is
    absent."""
    paths = _named_files(folder)
    if absent := [path.name for path in paths if not path.is_file()]:
        raise ConfigError([f"{folder} has no {name}, which its {INDEX} names" for name in absent],
                          next_step="Copy or download the folder again, with all its files.")
    return paths


def _named_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ConfigError([f"{folder} holds neither {WEIGHTS} nor {INDEX}"], next_step=NO_FOLDER)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def check_vocabulary(folder: Path, has: int, needs: int) -> None:
    """Raise `ConfigError` where a folder's model of `has` tokens is not one for a tokenizer of `needs`, 0 for any."""
    padded = has % _PADDED_TO == 0 and needs < has
    if needs and needs != has and not padded:
        raise ConfigError(
            [f"the model in {folder} has a vocabulary of {has}, the tokenizer needs {needs}"],
            next_step="Take the tokenizer the weights were trained with; token ids would mean something else.")


def require_fitting(given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise `ConfigError` that lists the tensors of `what` which are missing, unknown or of another shape."""
    problems = [f"{name} is missing" for name in expected if name not in given]
    problems += [f"{name} is unknown to the model" for name in given if name not in expected]
    problems += [f"{name} has shape {given[name]}, the model has {shape}"
                 for name, shape in expected.items() if name in given and given[name] != shape]
    if problems:
        shown = [*problems[:5], *([f"and {len(problems) - 5} more"] if len(problems) > 5 else [])]
        raise ConfigError(shown, title=f"{what} does not fit the model:")


def drop_tied(weights: dict[str, Array], output: str, embedding: str, folder: Path) -> None:
    """Take the output matrix out of a folder's weights where it is the embedding. Raises `ConfigError` where it is
    not."""
    again = weights.pop(output, None)
    if again is None or embedding not in weights:
        return
    if again.shape != weights[embedding].shape or not bool((again == weights[embedding]).all()):
        raise ConfigError([f"{folder} ties the output matrix to the embedding (tie_word_embeddings), but {output} and "
                           f"{embedding} differ"],
                          next_step="Set tie_word_embeddings to false in its config.json to take both.")
