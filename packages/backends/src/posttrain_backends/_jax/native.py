"""From a shape, a folder of weights or a user's file to the learner of the model in flax."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
from posttrain.protocols import LoadRequest

from posttrain_backends._jax.decoder import PARAMETER_DTYPE, Decoder, Precision
from posttrain_backends._jax.learner import JaxLearner
from posttrain_backends._jax.loading import fitted, read_weights
from posttrain_backends._jax.mesh import placement_on, require_divisible
from posttrain_backends._jax.model import Params, Structure
from posttrain_backends._jax.placement import Device, Placement, device_of
from posttrain_backends._jax.user import user_model
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
    return _learner(request, structure, params, config_of(shape), placement, weights, head_chunk)


def user_learner(request: LoadRequest, file: str, *, weights: str, device: Device, precision: Precision,
                 head_chunk: int, data_parallel: int) -> JaxLearner:
    """The learner of the module that `file` builds, with the weights and heads of the folder `weights`, where one is
    named. Raises `ConfigError` where something does not fit."""
    placement = placement_on(device_of(device), data_parallel, 1)
    with jax.enable_x64(precision == "float64"):
        structure, params = user_model(file, request.vocab_size, request.seed, PARAMETER_DTYPE[precision])
        if weights:
            params = fitted(read_weights(Path(weights)).items(), params, placement.weight, f"policy.weights {weights}")
    config = {"model_type": "user", "file": file, "vocab_size": request.vocab_size}
    return _learner(request, structure, params, config, placement, weights, head_chunk)


def _learner(request: LoadRequest, structure: Structure, params: Params, config: Mapping[str, object],
             placement: Placement, weights: str, head_chunk: int) -> JaxLearner:
    learner = JaxLearner(structure, params, config, placement, optimization=request.optimization,
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
