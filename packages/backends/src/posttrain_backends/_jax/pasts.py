"""What the rows that are decoded together remember of their texts in JAX: keys and values, or all tokens.

Arrays keep their sizes from the first step to the last, so that one compiled loop serves a rollout. A prompt is read
once, up to its last token, and its rows begin by reading that one: so the first token of an answer is drawn like all
others. Knows no sampling and no queue.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import jax
import jax.numpy as jnp

from posttrain_backends._jax.decoder import Decoder
from posttrain_backends._jax.model import JaxModel


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Place:
    """Where the rows of a step stand."""

    lengths: jax.Array
    """[B] tokens of each row's prompt, the last one among them."""
    count: jax.Array
    """[B] tokens drawn behind it."""
    clock: jax.Array
    """Steps since the rows were made."""


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Keys:
    """Keys and values of all layers, [rows, kv_heads, tokens, D] each."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of B rows: those of a prompt once for all rows of its group, and what stands behind it.

    A step writes one column of all rows, the clock modulo their number. A row that begins later begins in a later
    column, and none takes more steps than there are columns, so it never overwrites its own; attention does not ask in
    what order keys stand, as they are turned by their positions before.
    """

    prompts: Keys
    """[S, kv_heads, P, D], S times the rows of a group being B."""
    answers: Keys
    """[B, kv_heads, new, D]"""


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Texts:
    """All tokens of B rows, for a model that keeps nothing: every step reads all of them anew."""

    prompts: jax.Array
    """[S, P] int32"""
    answers: jax.Array
    """[B, new] int32, from the last token of the prompt on."""


Past = Cache | Texts


def empty(model: JaxModel, prompts: int, longest: int, rows: int, new: int) -> Past:
    """Room for `rows` answers of `new` tokens, behind `prompts` prompts of up to `longest` tokens."""
    if not isinstance(model, Decoder):
        return Texts(jnp.zeros((prompts, longest), jnp.int32), jnp.zeros((rows, new), jnp.int32))
    shape = model.shape

    def zeros(count: int, columns: int) -> Keys:  # not empty: what a masked cell holds must be finite
        size = (count, shape.num_key_value_heads, columns, shape.head_dim)
        layers = [tuple(jnp.zeros(size, model.compute_dtype) for _ in model.layers) for _ in range(2)]
        return Keys(*layers)
    return Cache(zeros(prompts, longest), zeros(rows, new))


def read(model: JaxModel, tokens: jax.Array) -> Keys | jax.Array:
    """What is remembered of prompts [n, P], padded on the right."""
    if not isinstance(model, Decoder):
        return tokens
    x, rope, kept = model.embed(tokens), model.rope(jnp.arange(tokens.shape[1])), []
    for layer in model.layers:
        q, k, v = layer.project(x, rope)
        kept.append((k.swapaxes(1, 2), v.swapaxes(1, 2)))
        x = layer.attended(x, jax.nn.dot_product_attention(q, k, v, is_causal=True))
    return Keys(*(tuple(layers) for layers in zip(*kept)))


def begun(past: Past, prompts: Keys | jax.Array, which: jax.Array) -> Past:
    """The rows behind other prompts: place s gets number `which[s]` of `prompts`, and keeps its own where that is
    negative."""
    def placed(old: jax.Array, new: jax.Array) -> jax.Array:
        taken = jnp.expand_dims(which >= 0, tuple(range(1, old.ndim)))
        return jnp.where(taken, new[jnp.maximum(which, 0)], old)
    return replace(past, prompts=jax.tree.map(placed, past.prompts, prompts))


def kept(past: Past, rows: jax.Array, prompts: jax.Array) -> Past:
    """Some of the rows, each behind a copy of its prompt."""
    return replace(past, prompts=jax.tree.map(lambda x: x[prompts], past.prompts),
                   answers=jax.tree.map(lambda x: x[rows], past.answers))


def extended(model: JaxModel, past: Past, tokens: jax.Array, place: Place) -> tuple[jax.Array, Past]:
    """One more token [B] of each row -> hidden [B, H], and what is remembered then."""
    if isinstance(past, Texts):
        return _reread(model, past, tokens, place)
    assert isinstance(model, Decoder)
    new, (S, _, P, _) = past.answers.keys[0].shape[2], past.prompts.keys[0].shape
    column = place.clock % new
    age = (column - jnp.arange(new)) % new  # of each column, in steps
    mask = (_grouped(jnp.arange(P) < place.lengths[:, None] - 1, S),
            age <= place.count[:, None])
    x, rope, kept = model.embed(tokens), model.rope(place.lengths - 1 + place.count), []
    for layer, *held in zip(model.layers, past.prompts.keys, past.prompts.values, past.answers.keys,
                            past.answers.values):
        q, k, v = layer.project(x, rope)
        answers = [jax.lax.dynamic_update_slice_in_dim(old, y[:, :, None], column, axis=2)
                   for old, y in zip(held[2:], (k, v))]
        kept.append(answers)
        x = layer.attended(x, _attention(q, (held[0], answers[0]), (held[1], answers[1]), mask))
    return model.norm(x), Cache(past.prompts, Keys(*(tuple(layers) for layers in zip(*kept))))


def _grouped(x: jax.Array, groups: int) -> jax.Array:
    """[B, ...] -> [S, B / S, ...]"""
    return x.reshape(groups, -1, *x.shape[1:])


def _attention(q: jax.Array, keys: tuple[jax.Array, jax.Array], values: tuple[jax.Array, jax.Array],
               mask: tuple[jax.Array, jax.Array]) -> jax.Array:
    """q [B, heads, D] over what its prompt [S, kv_heads, P, D] and its own row [B, kv_heads, new, D] hold where the
    masks [S, B / S, P] and [B, new] say so -> [B, heads, D]. Softmax in float32 or better."""
    (B, heads, D), (S, kv, P, _) = q.shape, keys[0].shape
    exact = jax.lax.Precision.HIGHEST if q.dtype != jnp.bfloat16 else None
    soft = jnp.promote_types(q.dtype, jnp.float32)
    own = q.reshape(B, kv, heads // kv, D)
    shared = _grouped(own, S)
    z = [jnp.einsum("sgkhd,skpd->sgkhp", shared, keys[0], precision=exact, preferred_element_type=soft),
         jnp.einsum("bkhd,bknd->bkhn", own, keys[1], precision=exact, preferred_element_type=soft)]
    z = [jnp.where(mask[0][:, :, None, None], z[0], -jnp.inf).reshape(B, kv, heads // kv, P),
         jnp.where(mask[1][:, None, None], z[1], -jnp.inf)]
    p = jax.nn.softmax(jnp.concatenate(z, axis=-1) * D**-0.5, axis=-1).astype(q.dtype)
    out = jnp.einsum("sgkhp,skpd->sgkhd", _grouped(p[..., :P], S), values[0], precision=exact).reshape(own.shape)
    return (out + jnp.einsum("bkhn,bknd->bkhd", p[..., P:], values[1], precision=exact)).reshape(B, heads, D)


def _reread(model: JaxModel, past: Texts, tokens: jax.Array, place: Place) -> tuple[jax.Array, Past]:
    """`extended` by the whole texts."""
    B, new = past.answers.shape
    rows = jnp.arange(B)
    answers = past.answers.at[rows, place.count].set(tokens)
    prompts = jnp.repeat(past.prompts, B // len(past.prompts), axis=0)
    columns = jnp.arange(prompts.shape[1] + new)
    behind = columns - (place.lengths - 1)[:, None]
    whole = jnp.where(behind < 0, jnp.pad(prompts, ((0, 0), (0, new)))[:, columns],
                      jnp.take_along_axis(answers, jnp.clip(behind, 0, new - 1), axis=1))
    hidden = model.hidden(whole, jnp.broadcast_to(columns, whole.shape))
    return hidden[rows, place.lengths - 1 + place.count], Texts(past.prompts, answers)
