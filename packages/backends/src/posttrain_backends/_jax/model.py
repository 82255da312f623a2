"""A flax module taken apart: its structure here, and its parameters beside it as one dictionary by canonical name.

A name is the dotted path of the module's attributes, which for the native decoder is that of Hugging Face's files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final

import jax
from flax import nnx

Params = Mapping[str, jax.Array]
"""Parameters by canonical name."""


class JaxModel(Protocol):
    """What a learner asks of a module that has its parameters."""

    @property
    def output_weight(self) -> jax.Array:
        """[V, H]"""
        ...

    @property
    def compute_dtype(self) -> type:
        """What matrices are multiplied in."""
        ...

    @property
    def max_positions(self) -> int | None:
        """Tokens of the longest sequence; None where any is read."""
        ...

    def hidden(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """[B, T] ids and positions of right-padded rows -> [B, T, H]."""
        ...


@final
@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """A module without its parameters.

    >>> from posttrain_backends._jax.decoder import Decoder
    >>> from posttrain_backends.families.shape import Shape
    >>> tiny = Structure.of(lambda: Decoder(Shape(10, 8, 16, 1, 2, 1, 4, 32)))
    >>> tiny.shapes["model.layers.0.mlp.up_proj.weight"].shape
    (16, 8)
    """

    graph: Any
    paths: Mapping[str, tuple[Any, ...]]
    """By name, the attributes that lead to each parameter."""
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    read: Callable[[Any], JaxModel]
    """From the module to what a learner asks of it, where it is not that itself."""

    @classmethod
    def of(cls, make: Callable[[], nnx.Module]) -> Structure:
        """Of the module that `make` makes, which is a `JaxModel`; nothing is allocated."""
        return cls.taken(nnx.eval_shape(make))[0]

    @classmethod
    def taken(cls, module: nnx.Module,
              read: Callable[[Any], JaxModel] = lambda module: module) -> tuple[Structure, Params]:
        """A module in its two halves."""
        graph, state = nnx.split(module)
        found = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
        values = {name: x.get_value() for name, (_, x) in found.items()}
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in values.items()}
        paths = {name: path for name, (path, _) in found.items()}
        return cls(graph, paths, shapes, read), values

    def bound(self, params: Mapping[str, Any]) -> Any:
        """The module with these parameters, which may be tracers or mere shapes."""
        return self.read(nnx.merge(self.graph, nnx.from_flat_state(
            [(path, nnx.Param(params[name])) for name, path in self.paths.items()])))
