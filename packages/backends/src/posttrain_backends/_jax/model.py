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
    def max_positions(self) -> int:
        """Tokens of the longest sequence."""
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

    @classmethod
    def of(cls, make: Callable[[], nnx.Module]) -> Structure:
        """Of the module that `make` makes; nothing is allocated."""
        graph, state = nnx.split(nnx.eval_shape(make))
        found = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
        return cls(graph, {name: path for name, (path, _) in found.items()},
                   {name: x.get_value() for name, (_, x) in found.items()})

    def bound(self, params: Mapping[str, Any]) -> Any:
        """The module with these parameters, which may be tracers or mere shapes."""
        return nnx.merge(self.graph, nnx.from_flat_state(
            [(path, nnx.Param(params[name])) for name, path in self.paths.items()]))
