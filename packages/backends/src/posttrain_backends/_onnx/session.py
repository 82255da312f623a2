"""ONNX Runtime sessions and their weights, which are NumPy arrays: bound once as inputs, or packed as constants.

A session of constants multiplies faster, since ONNX Runtime packs them when it is made, and it must be made again for
other weights. Bound inputs are read where they lie: what is written into the arrays is what the next call reads.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, final

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, TensorProto
from posttrain.data import Array, to_numpy
from posttrain.errors import MemoryExhausted
from posttrain.rewards.pool import usable_cores

from posttrain_backends.families.files import require_fitting

_PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
_SILENT = 4
"""Errors are raised, and need not be printed, too."""
_SIGNS_OF_FULL_MEMORY = ("Failed to allocate memory", "bad allocation", "bad_alloc", "CUDA out of memory")


def options(threads: int = 0) -> ort.SessionOptions:
    """Operators one after the other, each on `threads` threads; 0 takes OMP_NUM_THREADS, or the cores this process may
    use. ONNX Runtime's own default is every core of the machine, whoever else is promised them."""
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = threads or int(os.environ.get("OMP_NUM_THREADS") or 0) or usable_cores()
    chosen.inter_op_num_threads = 1
    chosen.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    chosen.log_severity_level = _SILENT
    return chosen


@final
class Weights:
    """A model's parameters as float32 NumPy arrays, and as what sessions read: on a CPU the same memory.

    Raises `ConfigError` where `given` are not those of `expected`.
    """

    def __init__(self, given: Iterable[tuple[str, Array]], expected: Mapping[str, tuple[int, ...]], what: str,
                 device: str = "cpu") -> None:
        arrays = {name: np.array(to_numpy(x), np.float32, order="C") for name, x in given}
        require_fitting({name: x.shape for name, x in arrays.items()}, expected, what)
        self.device = device
        self.arrays: dict[str, np.ndarray] = {name: arrays[name] for name in expected}
        """In the order of `expected`; live."""
        self.values: dict[str, ort.OrtValue] = {
            name: ort.OrtValue.ortvalue_from_numpy(x, device, 0) for name, x in self.arrays.items()}

    def take(self, items: Iterable[tuple[str, Array]], what: str = "the given set of weights") -> None:
        """Write other numbers in place. Raises `ConfigError` where names or shapes do not fit; nothing is written
        then."""
        given = {name: to_numpy(x) for name, x in items}
        require_fitting({name: x.shape for name, x in given.items()},
                        {name: x.shape for name, x in self.arrays.items()}, what)
        for name, x in given.items():
            np.copyto(self.arrays[name], x, casting="same_kind")
            if self.device != "cpu":
                self.values[name].update_inplace(self.arrays[name])

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        return iter(self.arrays.items())


@final
class Bound:
    """A graph whose weights are inputs, bound once to `weights`."""

    def __init__(self, graph: ModelProto, weights: Weights, threads: int = 0) -> None:
        self._session = ort.InferenceSession(graph.SerializeToString(), options(threads),
                                             providers=_PROVIDERS[weights.device])
        self._io, self._weights = self._session.io_binding(), weights
        for value in self._session.get_inputs():
            if value.name in weights.values:
                self._io.bind_ortvalue_input(value.name, weights.values[value.name])
        self._outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, **inputs: np.ndarray) -> list[np.ndarray]:
        """The graph's outputs on the host. Raises `MemoryExhausted`."""
        held = {name: np.ascontiguousarray(x) for name, x in inputs.items()}  # ONNX Runtime keeps addresses alone
        for name, x in held.items():
            self._io.bind_cpu_input(name, x)
        for name in self._outputs:
            self._io.bind_output(name)
        run(self._session, self._io)
        found: list[np.ndarray] = self._io.copy_outputs_to_cpu()
        return found


def run(session: ort.InferenceSession, binding: ort.IOBinding) -> None:
    """Compute what is bound. Raises `MemoryExhausted`, after the frames of the call are gone."""
    try:
        session.run_with_iobinding(binding)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _SIGNS_OF_FULL_MEMORY):
            raise
        message = str(error).partition("\n")[0]
    else:
        return
    raise MemoryExhausted(message)


class Held(Protocol):
    """What a session may read as constants: `Weights`, or `Constants` that were made of them."""

    @property
    def device(self) -> str: ...
    @property
    def values(self) -> Mapping[str, ort.OrtValue]: ...


@final
class Constants:
    """Arrays of any type under the names of a graph's inputs, for one session on a CPU."""

    device = "cpu"

    def __init__(self, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
        self._arrays = {name: np.ascontiguousarray(x) for name, x in arrays}  # ONNX Runtime keeps addresses alone
        self.values = {name: ort.OrtValue.ortvalue_from_numpy(x) for name, x in self._arrays.items()}


def packed(graph: ModelProto, weights: Held, threads: int = 0) -> ort.InferenceSession:
    """A session in which the graph's weights are constants, which it packs for its products as it is made: what is
    written into `weights` later is not read, or in part."""
    model, given = with_constants(graph, weights.values)
    chosen = options(threads)
    chosen.add_external_initializers(given, [weights.values[name] for name in given])
    return ort.InferenceSession(model.SerializeToString(), chosen, providers=_PROVIDERS[weights.device])


def with_constants(graph: ModelProto, weights: Mapping[str, object]) -> tuple[ModelProto, list[str]]:
    """The graph with those of its inputs that are weights as initialisers, whose numbers a session is given when it is
    made; and their names."""
    model = ModelProto()
    model.CopyFrom(graph)
    moved = [value for value in graph.graph.input if value.name in weights]
    kept = [value for value in graph.graph.input if value.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for value in moved:
        tensor = model.graph.initializer.add(
            name=value.name, data_type=value.type.tensor_type.elem_type, data_location=TensorProto.EXTERNAL,
            dims=[dim.dim_value for dim in value.type.tensor_type.shape.dim])
        tensor.external_data.add(key="location", value="given to the session")
    return model, [value.name for value in moved]
