"""Answers drawn by ONNX Runtime: the cached decoding graph on buffers of torch's, which the decoding loop reads.

Keys and values of a row are written where they stand: past and present of a layer are one buffer. Weights are constants
of a session that is made anew for other weights, or inputs that are refreshed in place. Knows no sampling and no queue.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, final

import numpy as np
import onnxruntime as ort
import torch
from posttrain.data import Array, Metric, Metrics, to_numpy
from torch import Tensor

from posttrain_backends._onnx.decoder import (
    ASKED,
    LAST_TOKEN,
    LOGITS,
    LONGEST,
    TOKENS,
    Gemm,
    decoding,
    past_names,
    present_names,
    weights_of,
)
from posttrain_backends._onnx.quantised import NBits
from posttrain_backends._onnx.session import Constants, Weights, options, packed, run
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.rows import Past, Prefix, Room, copy_tokens, move_rows
from posttrain_backends.families.shape import Shape
from posttrain_backends.ragged import padded, similar_lengths

_GIVEN = "the weights given to the sampler"
_NUMPY = {torch.float32: np.float32, torch.int64: np.int64, torch.int32: np.int32}


@final
@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """The tensors of a call of the decoding graph, bound once: what they hold is what the next run reads.

    ONNX Runtime keeps addresses alone, so they are kept here.
    """

    session: ort.InferenceSession
    binding: ort.IOBinding
    tensors: Sequence[Tensor]

    @classmethod
    def of(cls, session: ort.InferenceSession, weights: Mapping[str, ort.OrtValue], inputs: Mapping[str, Tensor],
           outputs: Mapping[str, Tensor]) -> Call:
        """`weights` are those that are inputs of the graph."""
        binding = session.io_binding()
        for name, value in weights.items():
            binding.bind_ortvalue_input(name, value)
        for given, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
            for name, x in given.items():
                bind(name, "cpu", 0, _NUMPY[x.dtype], tuple(x.shape), x.data_ptr())
        return cls(session, binding, [*inputs.values(), *outputs.values()])

    def __call__(self) -> None:
        """Raises `MemoryExhausted`."""
        run(self.session, self.binding)


class Weighted(Protocol):
    """The decoding graph with weights in it."""

    @property
    def shape(self) -> Shape: ...
    @property
    def session(self) -> ort.InferenceSession:
        """Of the weights as they are now."""
        ...

    @property
    def inputs(self) -> Mapping[str, ort.OrtValue]:
        """Weights that its graph is given in each call."""
        ...

    def holds(self, params: Mapping[str, np.ndarray]) -> bool:
        """Whether these are its weights, to the last bit of float32."""
        ...

    def take(self, params: Mapping[str, np.ndarray]) -> None:
        """Take the weights `params`. Raises `ConfigError` where names or shapes do not fit."""
        ...


@final
class Packed:
    """Weights as constants of a session, which is made anew for others; matrices in `bits` where asked."""

    def __init__(self, shape: Shape, params: Iterable[tuple[str, Array]], threads: int,
                 bits: int | None = None) -> None:
        self.shape, self.inputs, self._threads = shape, dict[str, ort.OrtValue](), threads
        self._rounded = None if bits is None else NBits(bits)
        self._graph = decoding(shape, self._rounded or Gemm())
        self._weights = _weights(shape, params)
        self._session: ort.InferenceSession | None = None

    @property
    def session(self) -> ort.InferenceSession:
        """Made where it is first asked for behind `take`: what is never drawn from costs nothing."""
        if self._session is None:
            weights = self._weights if self._rounded is None else \
                Constants(self._rounded.constants(self._weights.arrays))
            self._session = packed(self._graph, weights, self._threads)
        return self._session

    def holds(self, params: Mapping[str, np.ndarray]) -> bool:
        return _holds(self._weights, params)

    def take(self, params: Mapping[str, np.ndarray]) -> None:
        self._session = None  # it reads the arrays, in part
        self._weights.take(params.items(), _GIVEN)


@final
class Refreshed:
    """Weights as inputs of the graph, whose memory is written to for others: no session is made anew."""

    def __init__(self, shape: Shape, params: Iterable[tuple[str, Array]], threads: int) -> None:
        self.shape, self._weights = shape, _weights(shape, params)
        self.inputs = self._weights.values
        self.session = ort.InferenceSession(decoding(shape).SerializeToString(), options(threads),
                                            providers=["CPUExecutionProvider"])

    def holds(self, params: Mapping[str, np.ndarray]) -> bool:
        return _holds(self._weights, params)

    def take(self, params: Mapping[str, np.ndarray]) -> None:
        self._weights.take(params.items(), _GIVEN)


def _weights(shape: Shape, params: Iterable[tuple[str, Array]]) -> Weights:
    """A copy of the policy's."""
    return Weights(params, weights_of([decoding(shape)], shape), "the policy's weights")


def _holds(weights: Weights, params: Mapping[str, np.ndarray]) -> bool:
    return params.keys() == weights.arrays.keys() and all(
        np.array_equal(x.astype(np.float32, copy=False), weights.arrays[name]) for name, x in params.items())


@final
class OnnxRows:
    """Pasts as keys and values that the graph writes; a prompt's are copied for each answer.

    What the loop calls hidden states are logits here, as the output matrix belongs to the graph.
    """

    def __init__(self, graph: Weighted, session: ort.InferenceSession, room: Room) -> None:
        shape = graph.shape
        self._graph, self._session, self._past = graph, session, self._empty(graph, room.rows, room.columns)
        self._tokens, self._asked = (torch.zeros(room.rows, dtype=torch.int64) for _ in range(2))
        self._last, self._longest = torch.zeros(room.rows, dtype=torch.int32), torch.zeros((), dtype=torch.int32)
        self._logits = torch.empty(room.rows, shape.vocab_size)
        torch.arange(room.rows, out=self._asked)
        self._bound: Call | None = None
        self._rows = 0

    @staticmethod
    def _empty(graph: Weighted, rows: int, columns: int) -> list[Tensor]:
        """The keys and values of each layer in turn; zeros, as what a masked cell holds must be finite."""
        shape = graph.shape
        return [torch.zeros(rows, shape.num_key_value_heads, columns, shape.head_dim)
                for _ in range(2 * shape.num_hidden_layers)]

    def _call(self, tokens: Tensor, last: Tensor, longest: Tensor, asked: Tensor, past: Sequence[Tensor],
              logits: Tensor) -> Call:
        layers = self._graph.shape.num_hidden_layers
        pasts, presents = ([name for pair in names(layers) for name in pair] for names in (past_names, present_names))
        return Call.of(
            self._session, self._graph.inputs,
            {TOKENS: tokens, LAST_TOKEN: last, LONGEST: longest, ASKED: asked, **dict(zip(pasts, past, strict=True))},
            {LOGITS: logits, **dict(zip(presents, past, strict=True))})

    def read(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, list[Past], None]:
        """See `Rows.read`; prompts of similar length are read together."""
        starts, lengths = layout.offsets[:-1], np.diff(layout.offsets)
        ends = torch.empty(len(lengths), self._graph.shape.vocab_size)
        pasts: list[Past] = [()] * len(lengths)
        for same in similar_lengths(lengths):
            where, _ = padded(starts[same], lengths[same])
            T = where.shape[1]
            past, logits = self._empty(self._graph, len(same), T), torch.empty(len(same), ends.shape[1])
            last = torch.from_numpy(lengths[same].astype(np.int32) - 1)
            self._call(tokens[torch.from_numpy(where)], last, torch.tensor(T, dtype=torch.int32),
                       torch.arange(len(same)) * T + last, past, logits)()
            ends[torch.from_numpy(same)] = logits
            for row, i in enumerate(same):
                pasts[i] = [x[row, :, :lengths[i]].transpose(0, 1) for x in past]
        return ends, pasts, None

    def start(self, rows: np.ndarray, prefix: Prefix) -> None:
        copy_tokens(self._past, torch.from_numpy(rows), prefix.past)

    def extend(self, tokens: np.ndarray, positions: np.ndarray) -> Tensor:
        """See `Rows.extend`; the logits are overwritten by the next call."""
        n = len(tokens)
        if self._bound is None or n != self._rows:
            self._rows, self._bound = n, self._call(
                self._tokens[:n, None], self._last[:n], self._longest, self._asked[:n], [x[:n] for x in self._past],
                self._logits[:n])
        self._tokens[:n] = torch.from_numpy(tokens)
        self._last[:n] = torch.from_numpy(positions)
        self._longest.fill_(int(positions.max()) + 1)
        self._bound()
        return self._logits[:n]

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        move_rows(self._past, torch.from_numpy(source), torch.from_numpy(target))

    def routes(self, row: int, length: int) -> None:
        return None


@final
class OnnxModel:
    """`Drawn` in ONNX Runtime. `live` gives the policy's own arrays where it is shared: what they hold when a rollout
    begins is drawn from."""

    def __init__(self, graph: Weighted, live: Callable[[], Iterable[tuple[str, Array]]] | None) -> None:
        self._graph, self._live = graph, live
        self._taking = self._taken = 0.0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def vocab_size(self) -> int:
        return self._graph.shape.vocab_size

    @property
    def max_positions(self) -> int:
        return self._graph.shape.max_position_embeddings

    @property
    def token_bytes(self) -> int:
        shape = self._graph.shape
        return 4 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim

    def load(self, params: Iterable[tuple[str, Array]]) -> None:
        """See `Drawn`; a shared one looks at the policy's own when it begins to draw."""
        if self._live is None:
            self._take(params)

    def _take(self, params: Iterable[tuple[str, Array]]) -> None:
        start, given = time.perf_counter(), {name: to_numpy(x) for name, x in params}
        if not self._graph.holds(given):
            self._graph.take(given)
        self._taking += time.perf_counter() - start

    def room(self, prompts: Sequence[tuple[int, ...]], new: int, most: int, tokens: int) -> Room:
        return Room.most(prompts, new, most, tokens, shares=False)

    def autocast(self) -> AbstractContextManager[object]:
        return nullcontext()

    def rows(self, room: Room) -> OnnxRows:
        if self._live is not None:
            self._take(self._live())
        start = time.perf_counter()
        session = self._graph.session
        self._taken, self._taking = self._taking + time.perf_counter() - start, 0.0
        return OnnxRows(self._graph, session, room)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def metrics(self) -> Metrics:
        """Seconds that it took to take the weights that the last rollout was drawn with."""
        return Metrics({"timing/refresh_time": Metric(self._taken, reduction="sum")})
