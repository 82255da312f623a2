"""A model over several devices: rows of a batch along the mesh's axis `data`, matrices along its axis `tensor`.

Each matrix is cut as in Shoeybi et al. 2019 (1909.08053, section 3): what reads the hidden states by its rows, what
writes them by its columns, embedding and output matrix by tokens. What is computed of them, and where sums over devices
are needed, XLA derives; n devices compute what one does, in another order of sums.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, final

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from posttrain.errors import ConfigError

from posttrain_backends._jax.placement import OneDevice, Placement
from posttrain_backends.families.shape import Shape

_BY_ROWS = re.compile(r"\.(q_proj|k_proj|v_proj|gate_proj|up_proj|embed_tokens)\.|^lm_head\.")
_BY_COLUMNS = re.compile(r"\.(o_proj|down_proj)\.weight$")


_DATA, _WHOLE = P("data"), P()
_ROWS, _COLUMNS = P("tensor"), P(None, "tensor")


@final
class OnMesh:
    """A `Placement` on `data` x `tensor` devices."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.rows: int = mesh.shape["data"]

    def weight(self, name: str, x: Any) -> jax.Array:
        return self._put(x, spec_of(name))

    def sequences(self, x: Any) -> jax.Array:
        return self._put(x, _DATA)

    def column(self, x: Any) -> jax.Array:
        return self._put(x, _WHOLE)

    def _put(self, x: Any, spec: P) -> jax.Array:
        placed: jax.Array = jax.device_put(x, NamedSharding(self._mesh, spec))
        return placed


def spec_of(name: str) -> P:
    """How a parameter is cut, by its name; whole on every device where it is neither kind of matrix.

    >>> spec_of("model.layers.0.self_attn.k_proj.weight"), spec_of("model.layers.0.mlp.down_proj.weight")
    (P('tensor',), P(None, 'tensor'))
    >>> spec_of("model.norm.weight")
    P()
    """
    if _BY_ROWS.search(name):
        return _ROWS
    return _COLUMNS if _BY_COLUMNS.search(name) else _WHOLE


def placement_on(first: jax.Device, data: int, tensor: int) -> Placement:
    """`data` x `tensor` devices of the kind of `first`, or that alone. Raises `ConfigError` where there are fewer."""
    if data == tensor == 1:
        return OneDevice(first)
    return OnMesh(mesh_of(jax.devices(first.platform), data, tensor))


def mesh_of(devices: Sequence[jax.Device], data: int, tensor: int) -> Mesh:
    """The first `data` x `tensor` devices. Raises `ConfigError` where there are fewer."""
    if data * tensor > len(devices):
        kind = devices[0].platform
        way = " For a trial on a CPU set XLA_FLAGS=--xla_force_host_platform_device_count=" \
              f"{data * tensor} in the environment." if kind == "cpu" else ""
        raise ConfigError([f"policy.data_parallel {data} x policy.tensor_parallel {tensor} needs {data * tensor} "
                           f"devices, JAX finds {len(devices)} of kind {kind}"],
                          next_step=f"Lower policy.data_parallel or policy.tensor_parallel.{way}")
    return Mesh(np.array(devices[:data * tensor]).reshape(data, tensor), ("data", "tensor"))


def require_divisible(shape: Shape, tensor: int) -> None:
    """Raise one `ConfigError` that names every size of the model which `tensor` devices cannot share evenly."""
    sizes = {"attention heads": shape.num_attention_heads, "key and value heads": shape.num_key_value_heads,
             "columns of the MLP": shape.intermediate_size, "tokens of the vocabulary": shape.vocab_size}
    odd = [f"{size} {what}" for what, size in sizes.items() if size % tensor]
    if odd:
        fitting = [str(n) for n in range(1, tensor) if not any(size % n for size in sizes.values())]
        raise ConfigError([f"policy.tensor_parallel {tensor} does not divide {', '.join(odd)}"],
                          next_step=f"Take a policy.tensor_parallel of {' or '.join(fitting)}.")
