"""A reward model in ONNX Runtime: texts in, one number per row out. Its graph is written from a Hugging Face folder, or
stands in the folder as `model.onnx`. Knows lists of prompts and answers; no rollouts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import onnxruntime as ort
from posttrain.errors import ConfigError
from safetensors.numpy import load_file

from posttrain_backends._onnx.decoder import IDS, MASK, POSITIONS, judging, weights_of
from posttrain_backends._onnx.scorer import read_weights
from posttrain_backends._onnx.session import PROVIDERS, Weights, options, packed, translating_memory_errors
from posttrain_backends._transformers.tokenizer import read
from posttrain_backends.families.config import read_shape
from posttrain_backends.families.files import CONFIG, VALUE_HEAD
from posttrain_backends.families.shape import Shape
from posttrain_backends.judging import Parts, Reader, Row, pad_of, padded

if TYPE_CHECKING:
    from posttrain_backends.onnx_reward import OnnxReward

GRAPH = "model.onnx"
_ARCHITECTURE = "ForSequenceClassification"
_SCORE, _VALUE = "score", "value_head"
"""Names of the read-out: of a classification model of transformers, and of a run's value head."""
_KNOWN = (IDS, MASK, POSITIONS, "token_type_ids")
"""What a graph may ask for, under the names of Hugging Face's exporters; the last is 0 for one text."""


@final
class Judge:
    """See `posttrain.protocols.Reward`."""

    def __init__(self, session: ort.InferenceSession, reader: Reader, pad: int, parts: Parts) -> None:
        self._session, self._reader, self._pad, self._parts = session, reader, pad, parts
        self._inputs = [x.name for x in session.get_inputs()]

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        """One score per row. Raises `DataError` for a row that cannot be read, `MemoryExhausted` where a single row
        does not fit."""
        return self._parts([self._reader(p, c) for p, c in zip(prompts, completions, strict=True)], self._scored)

    def _scored(self, rows: Sequence[Row]) -> list[float]:
        """Scores of rows in one call. Raises `MemoryExhausted`."""
        ids, real = padded([row.ids for row in rows], self._pad)
        mask = real.astype(np.int64)
        given = dict(zip(_KNOWN, (ids, mask, np.maximum(mask.cumsum(1) - 1, 0), np.zeros_like(ids))))
        (found, *_) = translating_memory_errors(
            lambda: self._session.run(None, {name: given[name] for name in self._inputs}))
        if found.size != len(rows):
            raise ConfigError([f"{GRAPH} gives {list(found.shape)} numbers for {len(rows)} rows; a reward is one "
                               "number a row"], next_step="Export a sequence-classification model with one label.")
        numbers: list[float] = np.asarray(found, np.float32).reshape(-1).tolist()
        return numbers


def load(spec: OnnxReward, threads: int) -> Judge:
    """See `OnnxReward.load`."""
    folder = Path(spec.weights)
    tokenizer = read(spec.weights)
    config = _config(folder)
    of_value_head = not (folder / GRAPH).is_file() and (folder / VALUE_HEAD).is_file()
    pad = config.get("pad_token_id")
    if pad is None:
        pad = pad_of(tokenizer, config.get("eos_token_id"), spec.weights, at_last=True)
    positions = config.get("max_position_embeddings")
    if positions is not None and spec.max_tokens > positions:
        raise ConfigError([f"max_tokens is {spec.max_tokens}, and the model in {folder} has {positions} positions"],
                          next_step="Leave max_tokens out, which takes all of them, or lower it.")
    session = _exported(folder / GRAPH, spec.device, threads) if (folder / GRAPH).is_file() else \
        _written(folder, config, pad, spec.device, threads)
    reader = Reader(tokenizer, spec.special_tokens == "add", finds_answers=False,
                    whole=spec.until == "template" or (spec.until == "auto" and not of_value_head),
                    limit=spec.max_tokens or positions)
    return Judge(session, reader, pad, Parts(spec.batch_tokens))


def _config(folder: Path) -> Mapping[str, Any]:
    """What the folder says of its model; nothing where a graph stands there alone."""
    path = folder / CONFIG
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}


def _exported(graph: Path, device: str, threads: int) -> ort.InferenceSession:
    """Raises `ConfigError` where the graph is no reward model's."""
    try:
        session = ort.InferenceSession(graph, options(threads), providers=PROVIDERS[device])
    except Exception as error:  # ONNX Runtime has a class of its own for every way in which a file can be wrong
        raise ConfigError([f"{graph} cannot be loaded: {str(error).splitlines()[0]}"]) from error
    asked = [x.name for x in session.get_inputs()]
    if unknown := [name for name in asked if name not in _KNOWN]:
        raise ConfigError([f"{graph} asks for {', '.join(unknown[:3])}; a reward model reads {', '.join(_KNOWN)}"],
                          next_step="Export a sequence-classification model with one label; one that answers is no "
                                    "reward model.")
    return session


def _written(folder: Path, config: Mapping[str, Any], pad: int, device: str, threads: int) -> ort.InferenceSession:
    """A graph of the folder's safetensors. Raises `ConfigError` where there is no trained read-out of one label."""
    shape = _shape(folder)
    weights = dict(read_weights(folder, shape))
    readout = _readout(folder, config, weights)
    (name,) = {key.partition(".")[0] for key in readout}
    labels = len(readout[f"{name}.weight"])
    if labels != 1:
        raise ConfigError([f"the read-out of {folder} has {labels} labels; reward 'onnx' reads models with one"],
                          next_step=f"Take rewards: {{judge: {{use: reward_model, weights: {folder}, label: ...}}}}.")
    graph = judging(shape, name, labels, pad, bias=f"{name}.bias" in readout)
    expected = weights_of((graph,))
    held = {key: x for key, x in {**weights, **readout}.items() if key in expected}  # others are those of its tokens
    return packed(graph, Weights(held.items(), expected, f"the reward model in {folder}", device), threads)


def _shape(folder: Path) -> Shape:
    """Raises `ConfigError` where no graph can be written of the folder's model."""
    try:
        return read_shape(folder)
    except ConfigError as error:
        raise ConfigError(error.problems, title=f"reward 'onnx' writes no graph of the model in {folder}:",
                          next_step=f"Export it as {GRAPH}, or take rewards: {{judge: {{use: reward_model, weights: "
                                    f"{folder}}}}}.") from error


def _readout(folder: Path, config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weight and, where there is one, the bias of the score, under their names."""
    names = config.get("architectures") or ["of no architecture"]
    if any(name.endswith(_ARCHITECTURE) for name in names):
        if found := {key: x for key, x in weights.items() if key.startswith(f"{_SCORE}.")}:
            return found
        raise ConfigError([f"the weights of {folder} lack {_SCORE}.weight, so its scores would be random"],
                          next_step="Name a model that was trained as a classifier, with its read-out saved.")
    if (folder / VALUE_HEAD).is_file():
        return {f"{_VALUE}.{key}": x for key, x in load_file(folder / VALUE_HEAD).items()}
    raise ConfigError([f"{folder} is {' or '.join(names)}; reward 'onnx' is ...{_ARCHITECTURE}, the folder of a run "
                       f"with recipe: reward_model, or one with {GRAPH}"],
                      next_step="Take use: reward_model for token-classification models.")
