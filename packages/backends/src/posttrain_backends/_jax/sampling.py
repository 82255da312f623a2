"""From logits to tokens in JAX: the sampler's processing, and drawing by the inverse distribution function.

Rules, order and arithmetic are those of `_torch/sampling.py`, where the sources stand: equal logits and uniforms give
equal tokens. To be traced where 64-bit numbers are enabled, as sums of probabilities are exact in integers of 2^-52.
Knows nothing about models, prompts or episodes.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from posttrain.data import Sampling

_FIRST_WIDTH = 64
"""Tokens first tried as the nucleus."""
_UNIT = 2.0**52
"""Probability 1 as an integer."""


def sample(logits: jax.Array, sampling: Sampling, uniforms: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens [B] int32 drawn from logits [B, V] by uniforms [B] float64, and their log-probs [B] after the processing.

    Greedy (temperature 0) records log-prob 0: its distribution has one token. Where the logits are NaN, so is the
    log-prob, and the token is a valid but meaningless id.
    """
    if sampling.temperature == 0:
        best = logits.max(axis=-1)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), (best - best).astype(jnp.float32)
    logprobs = process(logits, sampling)
    tokens = draw(logprobs, uniforms)
    return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]


def process(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Log-probs [B, V] of the sampler's distribution, -inf where a token is truncated; float32, or float64 as given.

    Temperature 0 is the limit: all mass on the first of the largest logits.

    >>> jnp.exp(process(jnp.array([[2.0, 1.0, 0.0]]), Sampling(top_k=2))).round(4).tolist()
    [[0.7310..., 0.2689..., 0.0]]
    """
    scores = logits if logits.dtype == jnp.float64 else logits.astype(jnp.float32)
    V = scores.shape[1]
    if sampling.temperature == 0:
        chosen = jnp.arange(V) == jnp.argmax(scores, axis=-1)[:, None]
        return jnp.where(chosen, 0.0, -jnp.inf).astype(scores.dtype)
    if sampling.temperature != 1:
        scores = scores / sampling.temperature
    if 0 < sampling.top_k < V:
        scores = _kept(scores, jax.lax.top_k(scores, sampling.top_k)[0][:, -1:])
    if sampling.top_p < 1:
        scores = _kept(scores, _nucleus_threshold(scores, sampling.top_p))
    if sampling.min_p > 0:
        scores = _kept(scores, scores.max(axis=-1, keepdims=True) + math.log(sampling.min_p))
    return jax.nn.log_softmax(scores, axis=-1)


def _kept(scores: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.where(scores < threshold, -jnp.inf, scores)


def _nucleus_threshold(scores: jax.Array, top_p: float) -> jax.Array:
    """[B, 1] the score of the token with which the most probable tokens first hold the mass `top_p`.

    Looks at the few largest scores, and sorts the vocabulary only where those do not hold the mass.
    """
    V = scores.shape[1]
    normaliser = jax.nn.logsumexp(scores, axis=-1, keepdims=True)

    def masses(width: int) -> tuple[jax.Array, jax.Array]:
        largest = jax.lax.top_k(scores, width)[0]
        return largest, jnp.cumsum(jnp.exp(largest - normaliser), axis=-1, dtype=jnp.float64)

    def threshold(largest: jax.Array, mass: jax.Array) -> jax.Array:
        last = (mass < top_p).sum(axis=-1, keepdims=True)
        return jnp.take_along_axis(largest, jnp.minimum(last, largest.shape[1] - 1), axis=-1)

    largest, mass = masses(min(_FIRST_WIDTH, V))
    if largest.shape[1] == V:
        return threshold(largest, mass)
    found: jax.Array = jax.lax.cond(
        (mass[:, -1] >= top_p).all(), lambda: threshold(largest, mass), lambda: threshold(*masses(V)))
    return found


def draw(logprobs: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Tokens [B] int32 from log-probs [B, V]: the first token at which the distribution function exceeds u [B].

    The distribution function is summed in integers of 2^-52, which is exact in any order; a token of probability 0 adds
    exactly nothing, so it is never drawn, not even at u = 1.

    >>> with jax.enable_x64(True):
    ...     draw(jnp.log(jnp.array([[0.25, 0.0, 0.75]] * 3)), jnp.array([0.2, 0.3, 1.0])).tolist()
    [0, 2, 2]
    """
    cdf = jnp.cumsum((jnp.exp(logprobs) * _UNIT).astype(jnp.int64), axis=-1)
    total = cdf[:, -1:]
    target = jnp.minimum((uniforms[:, None] * total).astype(jnp.int64), total - 1)
    return jnp.minimum((cdf <= target).sum(axis=-1), logprobs.shape[1] - 1).astype(jnp.int32)
