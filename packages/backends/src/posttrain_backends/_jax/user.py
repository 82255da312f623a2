"""A module of the user's own in flax as a language model: `build(vocab_size, rngs)` from a Python file. Knows no
learner.

The module's `__call__(tokens[S, T], positions[S, T])` gives hidden states [S, T, H] of right-padded rows, causally, and
its `lm_head` has no bias. What it returns is probed once at load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from posttrain_backends._jax.model import Params, Structure
from posttrain_backends.user_file import built, misfit

CONTRACT = ("build(vocab_size, rngs) returns a flax.nnx.Module with __call__(tokens[S, T], positions[S, T]) -> "
            "hidden [S, T, H] and lm_head = nnx.Linear(H, vocab_size, use_bias=False, rngs=rngs), whose state is "
            "parameters alone (no dropout, no batch statistics)")


@final
@dataclass(frozen=True, slots=True, eq=False)
class UserModel:
    """Gives a user's module the interface of `JaxModel`; it has no cache, so engines compute anew."""

    module: Any

    @property
    def output_weight(self) -> jax.Array:
        """[V, H], of torch's layout or of flax's."""
        head = self.module.lm_head
        return head.weight[...] if hasattr(head, "weight") else head.kernel[...].T

    @property
    def compute_dtype(self) -> Any:
        return self.output_weight.dtype

    @property
    def max_positions(self) -> None:
        return None

    def hidden(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """[B, T] -> [B, T, H]"""
        return self.module(tokens, positions)


def user_model(file: str, vocab_size: int, seed: int, dtype: Any) -> tuple[Structure, Params]:
    """The module that `path.py:name` builds, probed, with its parameters in `dtype`; raises `ConfigError` where it does
    not fit."""
    module = built(file, vocab_size, nnx.Rngs(seed))
    if not isinstance(module, nnx.Module) or not hasattr(module, "lm_head"):
        raise misfit(file, f"returned {type(module).__name__}, without an lm_head or no nnx.Module", CONTRACT)
    if others := sorted({type(x).__name__ for _, x in nnx.to_flat_state(nnx.state(module))
                         if not isinstance(x, nnx.Param)}):
        raise misfit(file, f"keeps {', '.join(others)} beside its parameters", CONTRACT)
    nnx.update(module, jax.tree.map(lambda x: jnp.asarray(x, dtype), nnx.state(module)))
    structure, params = Structure.taken(module, UserModel)
    _probe(structure, params, file, vocab_size)
    return structure, params


def _probe(structure: Structure, params: Params, file: str, vocab_size: int) -> None:
    """Two short rows: the shape must be [S, T, H], and a changed last token must change no earlier hidden state."""
    model = structure.bound(params)
    head = model.output_weight.shape
    if getattr(model.module.lm_head, "bias", None) is not None or head[0] != vocab_size:
        raise misfit(file, f"made an lm_head of {head[0]} tokens, or one with a bias; expected {vocab_size} without",
                     CONTRACT)
    tokens, positions = np.arange(8).reshape(2, 4) % vocab_size, np.tile(np.arange(4), (2, 1))
    other = tokens.copy()
    other[0, 3] = (other[0, 3] + 1) % vocab_size
    try:
        first, second = (np.asarray(model.hidden(jnp.asarray(x), jnp.asarray(positions))) for x in (tokens, other))
    except (TypeError, ValueError, IndexError) as error:
        raise misfit(file, f"failed on two short sequences: {error}", CONTRACT) from error
    if first.shape != (2, 4, head[1]):
        raise misfit(file, f"gave hidden states of shape {first.shape}, expected {(2, 4, head[1])}", CONTRACT)
    if not np.allclose(first[0, :3], second[0, :3], atol=1e-5) or not np.allclose(first[1], second[1], atol=1e-5):
        raise misfit(file, "is not causal: a later token changed an earlier hidden state", CONTRACT)
