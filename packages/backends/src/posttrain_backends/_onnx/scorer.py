"""A model that ONNX Runtime scores tokens with: the `Scorer` of the backend `onnx`. Knows graphs and sessions by name,
and no configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import final

import ml_dtypes  # noqa: F401  # NumPy learns what bfloat16 is, which files may hold
import numpy as np
from posttrain.data import Array, Rollouts, TokenOutputs
from posttrain.errors import ConfigError
from posttrain.protocols import Output
from safetensors.numpy import load_file

from posttrain_backends._onnx.decoder import head, scoring, weights_of
from posttrain_backends._onnx.session import Bound, Weights
from posttrain_backends.families.described import shape_in
from posttrain_backends.families.files import DERIVED, EMBEDDING, OUTPUT, drop_tied, weight_files
from posttrain_backends.families.shape import Shape
from posttrain_backends.ragged import padded, similar_lengths

PROVIDED = frozenset({Output.LOGPROBS, Output.ENTROPY})
_HEAD_CELLS = 2**23
"""Logits of one chunk, as in the torch learner."""
_TOKENS = 2**14
"""Tokens of one call, padding included: a longer sequence is one alone."""


def read_scorer(folder: Path, vocab_size: int, *, threads: int = 0, device: str = "cpu",
                head_chunk: int = 0) -> OnnxScorer:
    """The scorer of a folder's model. Raises `ConfigError` where it has no graph, or another vocabulary."""
    shape = shape_in(folder, vocab_size, "onnx")
    return OnnxScorer(shape, read_weights(folder, shape), threads=threads, device=device, head_chunk=head_chunk,
                      what=f"the folder {folder}")


def read_weights(folder: Path, shape: Shape) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters in a folder's files, in whatever type they are. Raises `ConfigError` where an output matrix stands
    there that should be the embedding and is not."""
    found: dict[str, Array] = {name: x for path in weight_files(folder) for name, x in load_file(path).items()
                               if not name.endswith(DERIVED)}
    if shape.tie_word_embeddings:
        drop_tied(found, OUTPUT, EMBEDDING, folder)
    yield from found.items()


@final
class OnnxScorer:
    """See `posttrain.protocols.Scorer`. Its weights are bound to its sessions, so that other ones cost a copy."""

    def __init__(self, shape: Shape, weights: Iterable[tuple[str, Array]], *, threads: int = 0, device: str = "cpu",
                 head_chunk: int = 0, what: str = "the given set of weights") -> None:
        graphs = scoring(shape), head(shape, entropy=False), head(shape, entropy=True)
        self.shape, self.version = shape, 0
        self._weights = Weights(weights, weights_of(graphs), what, device)
        self._trunk, *heads = (Bound(graph, self._weights, threads) for graph in graphs)
        self._logprobs, self._with_entropy = heads
        self._head_rows = head_chunk or max(1, _HEAD_CELLS // shape.vocab_size)

    @property
    def provides(self) -> frozenset[Output]:
        return PROVIDED

    def params(self) -> Iterator[tuple[str, np.ndarray]]:
        """Live NumPy arrays: what is written into them is scored with."""
        return iter(self._weights)

    def load_params(self, items: Iterable[tuple[str, Array]], version: int) -> None:
        """Replace all weights, in place. Raises `ConfigError` where names or shapes do not fit."""
        self._weights.take(items)
        self.version = version

    def score(self, rollouts: Rollouts, outputs: frozenset[Output], temperature: float) -> TokenOutputs:
        """Outputs of all actions, as NumPy; columns that nobody asked for are None, and log-probs NaN. Raises
        `ConfigError` beyond `max_position_embeddings`, `MemoryExhausted`."""
        if missing := outputs - PROVIDED:
            raise ConfigError([f"the onnx backend gives no {', '.join(sorted(missing))}"])
        with_entropy = Output.ENTROPY in outputs
        found = np.full((2, len(rollouts.source)), np.nan, np.float32)
        for actions, hidden in self._states(rollouts) if outputs else ():
            chosen = rollouts.tokens[rollouts.source[actions]].astype(np.int64)
            for part in self._chunks(len(actions)):
                said = (self._with_entropy if with_entropy else self._logprobs)(
                    hidden=hidden[part], chosen=chosen[part], temperature=np.array(temperature, np.float32))
                found[:len(said), actions[part]] = said
        return TokenOutputs(logprobs=found[0], entropy=found[1] if with_entropy else None)

    def _states(self, rollouts: Rollouts) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Some actions [n] and the states before them [n, H], of one call after the other."""
        source, starts = rollouts.source, rollouts.offsets[:-1]
        sequence = np.searchsorted(rollouts.offsets, source, side="right") - 1
        read = np.zeros(len(starts), np.int64)  # tokens behind the last state that is asked for are not computed
        np.maximum.at(read, sequence, source - starts[sequence])
        self._check_length(int(read.max(initial=0)))
        for rows in self._calls(read):
            actions, T = np.flatnonzero(np.isin(sequence, rows)), int(read[rows].max())
            row = np.searchsorted(rows, sequence[actions])
            (hidden,) = self._trunk(
                tokens=rollouts.tokens[padded(starts[rows], read[rows])[0]].astype(np.int64),
                asked=row * T + source[actions] - 1 - starts[rows[row]], seqlens_k=(read[rows] - 1).astype(np.int32),
                total_sequence_length=np.array(T, np.int32))
            yield actions, hidden

    def _chunks(self, n: int) -> Iterator[slice]:
        return (slice(i, i + self._head_rows) for i in range(0, n, self._head_rows))

    def _check_length(self, longest: int) -> None:
        if longest > (most := self.shape.max_position_embeddings):
            raise ConfigError([f"a sequence of {longest} tokens does not fit the model's {most} positions"],
                              next_step="Lower rollout.max_new_tokens or the prompts.")

    def _calls(self, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """Sequences of similar length, as many in one call as it may have tokens."""
        for group in similar_lengths(lengths):
            rows = max(1, _TOKENS // int(lengths[group].max()))
            yield from (group[i:i + rows] for i in range(0, len(group), rows))
