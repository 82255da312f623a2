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

from posttrain_backends._onnx.decoder import EMBEDDING, OUTPUT, head, scoring, weights_of
from posttrain_backends._onnx.session import Bound, Weights
from posttrain_backends.families.config import read_shape
from posttrain_backends.families.files import check_vocabulary, weight_files
from posttrain_backends.families.shape import Shape
from posttrain_backends.ragged import padded, similar_lengths

PROVIDED = frozenset({Output.LOGPROBS, Output.ENTROPY})
_HEAD_CELLS = 2**23
"""Logits of one chunk, as in the torch learner."""
_SCORES = 2**26
"""Attention scores that exist at a time: ONNX Runtime holds all heads x T x T of its rows on a CPU."""
_TOKENS = 2**14
"""Tokens of one call."""
_DERIVED = ".rotary_emb.inv_freq"
"""In names of what older files hold beside their weights, and the configuration says."""


def read_scorer(folder: Path, vocab_size: int, *, threads: int = 0, device: str = "cpu",
                head_chunk: int = 0) -> OnnxScorer:
    """The scorer of a folder's model. Raises `ConfigError` where it has no graph, or another vocabulary."""
    shape = read_shape(folder)
    check_vocabulary(folder, shape.vocab_size, vocab_size)
    return OnnxScorer(shape, read_weights(folder, shape), threads=threads, device=device, head_chunk=head_chunk,
                      what=f"policy.weights {folder}")


def read_weights(folder: Path, shape: Shape) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters in a folder's files, in whatever type they are. Raises `ConfigError` where an output matrix stands
    there that should be the embedding and is not."""
    found = {name: x for path in weight_files(folder) for name, x in load_file(path).items()
             if not name.endswith(_DERIVED)}
    if shape.tie_word_embeddings and (again := found.pop(OUTPUT, None)) is not None \
            and not np.array_equal(again, found.get(EMBEDDING, again)):
        raise ConfigError([f"{folder} ties the output matrix to the embedding (tie_word_embeddings), but {OUTPUT} and "
                           f"{EMBEDDING} differ"],
                          next_step="Set tie_word_embeddings to false in its config.json to take both.")
    yield from found.items()


@final
class OnnxScorer:
    """See `posttrain.protocols.Scorer`. Its weights are bound to its sessions, so that other ones cost a copy."""

    def __init__(self, shape: Shape, weights: Iterable[tuple[str, Array]], *, threads: int = 0, device: str = "cpu",
                 head_chunk: int = 0, what: str = "the given set of weights") -> None:
        graphs = scoring(shape), head(shape, entropy=False), head(shape, entropy=True)
        self.shape, self.version = shape, 0
        self._weights = Weights(weights, weights_of(graphs, shape), what, device)
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
        source, starts = rollouts.source, rollouts.offsets[:-1]
        found = np.full((2, len(source)), np.nan, np.float32)
        if outputs:
            sequence = np.searchsorted(rollouts.offsets, source, side="right") - 1
            read = np.zeros(len(starts), np.int64)  # tokens behind the last state that is asked for are not computed
            np.maximum.at(read, sequence, source - starts[sequence])
            self._check_length(int(read.max(initial=0)))
            for rows in self._calls(read):
                self._score_rows(rollouts, rows, read[rows], sequence, found, temperature,
                                 self._with_entropy if Output.ENTROPY in outputs else self._logprobs)
        return TokenOutputs(logprobs=found[0], entropy=found[1] if Output.ENTROPY in outputs else None)

    def _check_length(self, longest: int) -> None:
        if longest > (most := self.shape.max_position_embeddings):
            raise ConfigError([f"a sequence of {longest} tokens does not fit the model's {most} positions"],
                              next_step="Lower rollout.max_new_tokens or the prompts.")

    def _calls(self, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """Sequences of similar length, as many in one call as its memory allows."""
        for group in similar_lengths(lengths):
            T = int(lengths[group].max())
            rows = max(1, min(_TOKENS // T, _SCORES // (T * T * self.shape.num_attention_heads)))
            yield from (group[i:i + rows] for i in range(0, len(group), rows))

    def _score_rows(self, rollouts: Rollouts, rows: np.ndarray, lengths: np.ndarray, sequence: np.ndarray,
                    found: np.ndarray, temperature: float, head: Bound) -> None:
        """Write log-probs and, if `head` gives them, entropies of the actions of some sequences into `found` [2, N]."""
        starts, T = rollouts.offsets[rows], int(lengths.max())
        actions = np.flatnonzero(np.isin(sequence, rows))
        row = np.searchsorted(rows, sequence[actions])
        source = rollouts.source[actions]
        (hidden,) = self._trunk(
            tokens=rollouts.tokens[padded(starts, lengths)[0]].astype(np.int64),
            asked=row * T + source - 1 - starts[row], seqlens_k=(lengths - 1).astype(np.int32),
            total_sequence_length=np.array(T, np.int32))
        for begin in range(0, len(actions), self._head_rows):
            part = slice(begin, begin + self._head_rows)
            said = head(hidden=hidden[part], chosen=rollouts.tokens[source[part]].astype(np.int64),
                        temperature=np.array(temperature, np.float32))
            found[:len(said), actions[part]] = said
