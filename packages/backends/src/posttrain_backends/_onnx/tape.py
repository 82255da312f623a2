"""Writes an ONNX graph node by node: calling an operator gives the name of its result. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

OPSET = 23
"""Of ONNX's own operators, the first with attention and rotary positions among them."""
ORT = "com.microsoft"
"""The operators that ONNX Runtime adds."""
_IR_VERSION = 11
"""That of ONNX 1.18, which brought `OPSET`."""
Size = int | str
"""A length, or the name of one that differs from call to call."""


@final
class Tape:
    """A graph that is being written. Its weights are inputs, under the names that they are given here; `session.py`
    can make constants of them.

    >>> tape = Tape()
    >>> x = tape.input("x", [2, 3])
    >>> tape.output("y", tape("Gemm", x, tape.weight("w", [4, 3]), transB=1), [2, 4])
    >>> [value.name for value in tape.model().graph.input]
    ['x', 'w']
    """

    def __init__(self) -> None:
        self.weights: dict[str, tuple[int, ...]] = {}
        """Name -> shape, in the order of use."""
        self._nodes: list[NodeProto] = []
        self._inputs: list[ValueInfoProto] = []
        self._outputs: list[ValueInfoProto] = []
        self._constants: dict[str, TensorProto] = {}

    def __call__(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """The first result of an operator; "" is an input that is left out."""
        return self.several(op, *inputs, count=1, domain=domain, **attributes)[0]

    def several(self, op: str, *inputs: str, count: int, domain: str = "", **attributes: Any) -> tuple[str, ...]:
        """The first `count` results."""
        number = len(self._nodes)
        results = tuple(f"{op}_{number}" if i == 0 else f"{op}_{number}_{i}" for i in range(count))
        self.write(op, inputs, results, domain=domain, **attributes)
        return results

    def write(self, op: str, inputs: Sequence[str], results: Sequence[str], *, domain: str = "",
              **attributes: Any) -> None:
        """An operator whose results have given names; "" is a result that nobody reads."""
        self._nodes.append(helper.make_node(op, [*inputs], [*results], f"{op}_{len(self._nodes)}", domain=domain,
                                            **attributes))

    def input(self, name: str, size: Sequence[Size], dtype: type[np.generic] = np.float32) -> str:
        """An array that every call brings."""
        self._inputs.append(_described(name, size, dtype))
        return name

    def weight(self, name: str, size: Sequence[int]) -> str:
        """A parameter in float32; a name that was given before is the same one."""
        self.weights[name] = tuple(size)
        return name

    def constant(self, value: np.ndarray, name: str = "") -> str:
        """Numbers that belong to the graph; a name that was given before is the same array."""
        name = name or f"constant_{len(self._constants)}"
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def ints(self, *values: int) -> str:
        """[n] int64, once for equal ones; shapes and axes are given so."""
        return self.constant(np.array(values, np.int64), f"ints_{'_'.join(str(v) for v in values)}")

    def output(self, name: str, value: str, size: Sequence[Size], dtype: type[np.generic] = np.float32) -> None:
        """`value` is a result of the graph, under `name`."""
        if value != name:
            self.write("Identity", [value], [name])
        self._outputs.append(_described(name, size, dtype))

    def model(self, domains: Mapping[str, int] | None = None) -> ModelProto:
        """The graph, with its weights behind its other inputs."""
        weights = [_described(name, size, np.float32) for name, size in self.weights.items()]
        graph = helper.make_graph(self._nodes, "posttrain", [*self._inputs, *weights], self._outputs,
                                  [*self._constants.values()])
        versions = {"": OPSET, **({ORT: 1} if any(node.domain == ORT for node in self._nodes) else {}),
                    **(domains or {})}
        return helper.make_model(graph, producer_name="posttrain", ir_version=_IR_VERSION,
                                 opset_imports=[helper.make_opsetid(name, version)
                                                for name, version in versions.items()])


def _described(name: str, size: Sequence[Size], dtype: type[np.generic]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), [*size])
