"""A model folder as ONNX: `model.onnx` with its parameters in one file beside it, under the names of Hugging Face's
exporters, so that other programs load it. Compared, once it is written, with the model it was written from.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto
from posttrain.data import Prompt, Rollouts, offsets_of
from posttrain.errors import ConfigError
from posttrain.protocols import Backend, Exported, LoadRequest, Output, Scorer

from posttrain_backends._onnx.decoder import (
    IDS,
    LOGITS,
    MASK,
    POSITIONS,
    exported,
    past_names,
    present_names,
    weights_of,
)
from posttrain_backends._onnx.scorer import read_weights
from posttrain_backends._onnx.session import options
from posttrain_backends.families.config import read_shape
from posttrain_backends.families.files import CONFIG, require_fitting
from posttrain_backends.families.shape import FAMILIES, Shape

MODEL, DATA = "model.onnx", "model.onnx_data"
LARGEST = 1e-4
"""Nats by which log-probs and entropies of the written model may differ from those of the saved one."""
_PAGE = 4096
"""Parameters begin at multiples of it, so that runtimes can map the file into memory."""
_TOKENS = 16
"""Of the longest sequence that is compared."""
_USAGE = """```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
ids = np.array([[1, 2, 3]])
past = {x.name: np.zeros((1, x.shape[1], 0, x.shape[3]), np.float32)
        for x in session.get_inputs() if x.name.startswith("past_key_values")}
logits, *present = session.run(None, {
    "input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(3)[None], **past})
```"""


def write(saved: Path, folder: Path, reader: Backend) -> Exported:
    """See `posttrain_backends.exports.write`."""
    shape = _shape(saved)
    graph = exported(shape)
    with (folder / DATA).open("wb") as file:
        model = with_external(graph, dict(read_weights(saved, shape)), weights_of((graph,), shape), file)
    onnx.save_model(model, folder / MODEL)
    onnx.checker.check_model(str(folder / MODEL))
    shutil.copyfile(saved / CONFIG, folder / CONFIG)
    difference = largest_difference(folder, shape, reader.load(LoadRequest(0)))
    said = (f"ONNX Runtime's log-probs and entropies differ from those of '{reader.framework}' by at most "
            f"{difference:.1e} nats, on rows padded on the left, read at once and in parts through the cache.")
    if not difference <= LARGEST:
        raise ConfigError([f"the written {MODEL} is another model than the saved one. {said}"],
                          next_step=f"At most {LARGEST:g} is allowed, so nothing was written. Leave --format out, and "
                                    "report this with the run's configuration.")
    return Exported(said, _USAGE)


def _shape(saved: Path) -> Shape:
    """Raises `ConfigError` where the folder's model is none of the native families."""
    try:
        return read_shape(saved)
    except ConfigError as error:
        dense = [name for name, family in FAMILIES.items() if "num_experts" not in family.traits]
        raise ConfigError(error.problems, title=f"--format onnx writes models of {', '.join(dense)} alone:",
                          next_step="Leave --format out for a Hugging Face folder.") from error


# ---- the files


def with_external(graph: ModelProto, weights: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]],
                  file: BinaryIO) -> ModelProto:
    """The graph with those of its inputs that are parameters as initialisers in float32, whose numbers stand in `file`,
    however small they are: so all can be replaced in one way. Raises `ConfigError` where names or shapes do not fit."""
    require_fitting({name: x.shape for name, x in weights.items()}, expected, "the saved model")
    model = ModelProto()
    model.CopyFrom(graph)
    kept = [value for value in graph.graph.input if value.name not in expected]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for name, size in expected.items():
        file.write(b"\0" * (-file.tell() % _PAGE))
        offset, numbers = file.tell(), np.ascontiguousarray(weights[name], "<f4").tobytes()
        file.write(numbers)
        tensor = model.graph.initializer.add(name=name, data_type=TensorProto.FLOAT, dims=size,
                                             data_location=TensorProto.EXTERNAL)
        for key, value in (("location", DATA), ("offset", offset), ("length", len(numbers))):
            tensor.external_data.add(key=key, value=str(value))
    return model


# ---- the comparison


def largest_difference(folder: Path, shape: Shape, scorer: Scorer) -> float:
    """Between log-probs and entropies of the folder's graph and of the scorer, in nats."""
    longest = max(2, min(_TOKENS, shape.max_position_embeddings))
    lengths = [longest, longest - longest // 4, longest // 2, 2]
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, shape.vocab_size, max(2, n)) for n in lengths]
    said = scorer.score(_all_actions(rows), frozenset({Output.LOGPROBS, Output.ENTROPY}), 1.0)
    expected = np.stack([np.asarray(said.logprobs), np.asarray(said.entropy)])
    session = ort.InferenceSession(folder / MODEL, options(), providers=["CPUExecutionProvider"])
    ids, mask = _padded_on_the_left(rows)
    found = [_said(_logits(session, shape, ids, mask, ends), ids, mask)
             for ends in ([longest], [longest - 1, longest], [*range(1, longest + 1)])]
    return float(np.abs(np.stack(found) - expected).max())


def _all_actions(rows: Sequence[np.ndarray]) -> Rollouts:
    """An episode of each row, of whose tokens all but the first are actions."""
    lengths, E = np.array([len(row) for row in rows]), len(rows)
    return Rollouts(
        tokens=np.concatenate(rows).astype(np.int32), offsets=offsets_of(lengths), episode=np.arange(E),
        is_action=np.concatenate([np.arange(n) > 0 for n in lengths]), group=np.arange(E),
        finish=np.zeros(E, np.int8), terminated=np.ones(E, bool), prompts=(Prompt(text=""),) * E,
        completions=("",) * E)


def _padded_on_the_left(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """[B, T] ids and mask."""
    T = max(len(row) for row in rows)
    ids, mask = np.zeros((2, len(rows), T), np.int64)
    for b, row in enumerate(rows):
        ids[b, T - len(row):], mask[b, T - len(row):] = row, 1
    return ids, mask


def _logits(session: ort.InferenceSession, shape: Shape, ids: np.ndarray, mask: np.ndarray,
            ends: Iterable[int]) -> np.ndarray:
    """[B, T, V] of a graph that reads up to each of the columns `ends` in turn, what came before through its cache."""
    positions, found, begin = np.maximum(mask.cumsum(1) - 1, 0), [], 0
    pasts, presents = ([name for pair in names(shape.num_hidden_layers) for name in pair]
                       for names in (past_names, present_names))
    empty = np.zeros((len(ids), shape.num_key_value_heads, 0, shape.head_dim), np.float32)
    past = dict.fromkeys(pasts, empty)
    for end in ends:
        logits, *present = session.run([LOGITS, *presents], {
            IDS: ids[:, begin:end], MASK: mask[:, :end], POSITIONS: positions[:, begin:end], **past})
        past, begin = dict(zip(pasts, present)), end
        found.append(logits)
    return np.concatenate(found, axis=1)


def _said(logits: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[2, N] log-probs of all tokens that have one before them, and entropies, row by row."""
    z = logits[:, :-1].astype(np.float64)
    with np.errstate(invalid="ignore"):  # what is not finite is refused by the comparison
        logp = z - np.logaddexp.reduce(z, axis=-1, keepdims=True)
    chosen = np.take_along_axis(logp, ids[:, 1:, None], -1)[..., 0]
    entropy = -(np.exp(logp) * logp).sum(-1)
    return np.stack([chosen, entropy])[:, mask[:, :-1] > 0]
