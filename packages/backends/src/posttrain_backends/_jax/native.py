"""From a shape, or a folder of weights, to the learner of the native decoder in flax."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import jax
from posttrain.protocols import LoadRequest

from posttrain_backends._jax.decoder import Decoder, Precision
from posttrain_backends._jax.learner import JaxLearner
from posttrain_backends._jax.loading import fitted, read_weights
from posttrain_backends._jax.mesh import placement_on, require_divisible
from posttrain_backends._jax.model import Structure
from posttrain_backends._jax.placement import Device, device_of
from posttrain_backends.families.config import config_of
from posttrain_backends.families.files import DERIVED, EMBEDDING, OUTPUT, drop_tied
from posttrain_backends.families.initial import initial
from posttrain_backends.families.shape import Shape


def decoder_learner(request: LoadRequest, shape: Shape, *, weights: str, device: Device, precision: Precision,
                    gradient_checkpointing: bool, head_chunk: int, data_parallel: int,
                    tensor_parallel: int) -> JaxLearner:
    """The learner of a decoder with the weights and heads of the folder `weights`, or with first weights. Raises
    `ConfigError` where they, or the sizes and the devices, do not fit."""
    require_divisible(shape, tensor_parallel)
    placement = placement_on(device_of(device), data_parallel, tensor_parallel)
    with jax.enable_x64(precision == "float64"):
        structure = decoder_structure(shape, precision, gradient_checkpointing)
        source: Iterable[tuple[str, Any]] = _folder(Path(weights), shape) if weights else initial(
            {name: x.shape for name, x in structure.shapes.items()}, request.seed)
        params = fitted(source, structure.shapes, placement.weight, f"policy.weights {weights}")
    learner = JaxLearner(structure, params, config_of(shape), placement, optimization=request.optimization,
                         value_heads=request.value_heads, action_value_heads=request.action_value_heads,
                         head_rows=head_chunk, comm=request.comm)
    if weights:
        learner.load_heads(Path(weights))
    return learner


@cache
def decoder_structure(shape: Shape, precision: Precision, gradient_checkpointing: bool) -> Structure:
    """One for equal models, so that what is compiled for one learner serves the others."""
    with jax.enable_x64(precision == "float64"):
        return Structure.of(lambda: Decoder(shape, precision=precision, gradient_checkpointing=gradient_checkpointing))


def _folder(folder: Path, shape: Shape) -> Iterable[tuple[str, Any]]:
    found = {name: x for name, x in read_weights(folder).items() if not name.endswith(DERIVED)}
    if shape.tie_word_embeddings:
        drop_tied(found, OUTPUT, EMBEDDING, folder)
    return found.items()
