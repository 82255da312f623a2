"""From the fields of a component to a `Shape`: checks of sizes, the shape of a new model, that of a folder's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

from posttrain.errors import ConfigError

from posttrain_backends.families.config import read_shape
from posttrain_backends.families.files import check_vocabulary
from posttrain_backends.families.shape import ModelType, Shape, no_rope_layers


class Described(Protocol):
    """The sizes of a new model in a configuration; 0 leaves `intermediate_size` open."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def tied_embeddings(self) -> bool: ...
    @property
    def head_chunk(self) -> int: ...
    @property
    def family(self) -> ModelType: ...


def check_sizes(said: Described) -> None:
    """Raise `ValueError` for sizes that no model has."""
    for name in ("hidden_size", "layers", "heads", "kv_heads", "max_positions"):
        if getattr(said, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(said, name)}")
    if said.intermediate_size < 0 or said.head_chunk < 0 or said.rope_theta <= 0:
        raise ValueError("intermediate_size and head_chunk must not be negative, rope_theta must be positive")
    if said.hidden_size % said.heads:
        divisors = [str(n) for n in range(1, 17) if said.hidden_size % n == 0]
        raise ValueError(f"hidden_size {said.hidden_size} is not a multiple of heads {said.heads}: take one of "
                         f"the divisors {', '.join(divisors)}")
    if said.heads % said.kv_heads:
        raise ValueError(f"heads {said.heads} is not a multiple of kv_heads {said.kv_heads}")
    if said.hidden_size // said.heads % 2:
        raise ValueError(f"hidden_size / heads is {said.hidden_size // said.heads}, rotary positions need it even")


def new_shape(said: Described, vocab_size: int, backend: str) -> Shape:
    """Of a new model, without experts. Raises `ConfigError` where there is no vocabulary."""
    if not vocab_size:
        raise ConfigError([f"a new {backend} model needs a tokenizer with a vocabulary, to size its embedding"])
    return Shape(
        vocab_size=vocab_size, hidden_size=said.hidden_size, num_hidden_layers=said.layers,
        intermediate_size=said.intermediate_size or rounded_up(said.hidden_size * 8 / 3, 32),
        num_attention_heads=said.heads, num_key_value_heads=said.kv_heads, head_dim=said.hidden_size // said.heads,
        max_position_embeddings=said.max_positions, rope_theta=said.rope_theta,
        tie_word_embeddings=said.tied_embeddings, model_type=said.family,
        no_rope_layers=no_rope_layers(said.layers) if said.family == "smollm3" else ())


def shape_in(folder: Path, vocab_size: int, backend: str) -> Shape:
    """That of the model in a folder. Raises `ConfigError` where it is none of the native ones, or has another
    vocabulary."""
    shape = read_shape(folder, backend)
    check_vocabulary(folder, shape.vocab_size, vocab_size)
    return shape


def rounded_up(size: float, multiple: int) -> int:
    """The smallest multiple that is not below `size`."""
    return multiple * math.ceil(size / multiple)
