"""What output matrices say of hidden states, in chunks of rows, so that all logits never exist at once: log-probs and
entropies of chosen tokens, the KL to another model over the whole vocabulary, and action values.

A chunk's logits are computed anew in the backward pass, where there is more than one chunk. Knows no model and no loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
from posttrain.ops import selective_log_softmax

CHUNK_CELLS = 2**23
"""Logits of one chunk where the user leaves them open."""


class Reading(NamedTuple):
    """Of N actions; differentiable."""

    logprobs: jax.Array
    entropy: jax.Array
    kl: jax.Array | None = None


@final
@dataclass(frozen=True, slots=True, eq=False)
class Readout:
    """What a model's logits are made of. Carries no gradient."""

    hidden: jax.Array
    """[N, H]; H is the model's own."""
    weight: jax.Array
    """[V, H]"""


def chunk_rows(V: int, asked: int) -> int:
    """Rows of one chunk, a power of two: at most as many as asked, where that is said."""
    return 1 << (asked or max(1, CHUNK_CELLS // V)).bit_length() - 1


def logits_of(hidden: jax.Array, weight: jax.Array, compute: Any) -> jax.Array:
    """[n, H], [V, H] -> [n, V] in the type of `weight`, multiplied in `compute`."""
    exact = jax.lax.Precision.HIGHEST if compute != jnp.bfloat16 else None
    return jnp.matmul(hidden.astype(compute), weight.astype(compute).T, precision=exact,
                      preferred_element_type=weight.dtype)


def read(hidden: jax.Array, weight: jax.Array, chosen: jax.Array, temperature: jax.Array | float, *, compute: Any,
         rows: int = 0, reference: Readout | None = None, reference_compute: Any = None) -> Reading:
    """log p(chosen), the entropy of p = softmax(hidden @ weight.T / temperature) and, given a reference's q, KL(p || q)
    = sum p (log p - log q). hidden [N, H], weight [V, H], chosen [N], N a power of two -> [N] each."""
    def of(part: dict[str, jax.Array]) -> Reading:
        z = logits_of(part["hidden"], weight, compute) / temperature
        logprobs, entropy = selective_log_softmax(z, part["chosen"])
        if reference is None:
            return Reading(logprobs, entropy)
        z_ref = logits_of(part["reference"], reference.weight, reference_compute).astype(z.dtype) / temperature
        log_p, log_q = jax.nn.log_softmax(z), jax.lax.stop_gradient(jax.nn.log_softmax(z_ref))
        return Reading(logprobs, entropy, jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))
    parts = {"hidden": hidden, "chosen": chosen}
    return _in_chunks(of, parts if reference is None else {**parts, "reference": reference.hidden},
                      chunk_rows(len(weight), rows))


def expected_values(hidden: jax.Array, weight: jax.Array, W: jax.Array, b: jax.Array, temperature: jax.Array | float,
                    *, compute: Any, rows: int = 0) -> jax.Array:
    """[k, N] sum_a p(a) Q(a) with p as above and Q = hidden @ W[k].T + b[k]; W [k, V, H], b [k, V]."""
    def of(part: dict[str, jax.Array]) -> jax.Array:
        p = jax.nn.softmax(logits_of(part["hidden"], weight, compute) / temperature)
        return jnp.stack([jnp.sum(p * _plain(part["hidden"], w, c), axis=-1) for w, c in zip(W, b)], axis=-1)
    return jax.lax.stop_gradient(_in_chunks(of, {"hidden": hidden}, chunk_rows(len(weight), rows)).T)


def chosen_values(hidden: jax.Array, W: jax.Array, b: jax.Array, chosen: jax.Array) -> jax.Array:
    """[k, N] Q of the chosen tokens alone; no other row of W [k, V, H] is read."""
    return jnp.einsum("nh,knh->kn", hidden.astype(W.dtype), W[:, chosen]) + b[:, chosen]


def _plain(hidden: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    return hidden.astype(weight.dtype) @ weight.T + bias


def _in_chunks(of: Callable[[dict[str, jax.Array]], Any], parts: dict[str, jax.Array], rows: int) -> Any:
    """`of` on rows of all parts, `rows` at a time, joined."""
    N = len(parts["hidden"])
    if rows >= N:
        return of(parts)
    pad = -N % rows
    chunked = {name: jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, rows, *x.shape[1:])
               for name, x in parts.items()}
    found = jax.lax.map(jax.checkpoint(of), chunked)
    return jax.tree.map(partial(_joined, N), found)


def _joined(N: int, x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])[:N]
