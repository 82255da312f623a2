"""The decoder-only transformer of Llama and its kin in flax.nnx, under Hugging Face's names and in torch's layout.

Its parameters, named by their dotted paths, are those of the files, so weights are exchanged without a table. Sources
as in `_torch/models/decoder.py`. Sequences are rows of a rectangle, padded on the right, where causal attention never
looks. Layers come in two halves, so that what decodes brings its own attention. Knows no losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, cast, final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from posttrain.errors import ConfigError

from posttrain_backends.families.shape import Shape

Precision = Literal["float32", "bf16", "float64"]
PARAMETER_DTYPE: Mapping[Precision, type] = {"float32": jnp.float32, "bf16": jnp.float32, "float64": jnp.float64}
"""What weights, gradients and moments are kept in."""
COMPUTE_DTYPE: Mapping[Precision, type] = {"float32": jnp.float32, "bf16": jnp.bfloat16, "float64": jnp.float64}
"""What matrices are multiplied in; norms, rotations and softmax stay in float32 or better."""
Rope = tuple[jax.Array, jax.Array]
"""cos and sin of each token, [..., 1, D/2]."""


class Linear(nnx.Module):
    """x W^T + b, W [out, in] as torch keeps it, multiplied in `compute`."""

    def __init__(self, inputs: int, outputs: int, bias: bool, precision: Precision) -> None:
        dtype = PARAMETER_DTYPE[precision]
        self.weight = nnx.Param(jnp.zeros((outputs, inputs), dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None
        self.compute = COMPUTE_DTYPE[precision]

    def __call__(self, x: jax.Array) -> jax.Array:
        y = multiplied(x, self.weight[...], self.compute)
        return y if self.bias is None else y + self.bias[...].astype(self.compute)


def multiplied(x: jax.Array, weight: jax.Array, compute: type) -> jax.Array:
    """x [..., I] times weight [O, I] -> [..., O] in `compute`: float32 is float32, and not what an accelerator would
    make of it."""
    exact = jax.lax.Precision.HIGHEST if compute != jnp.bfloat16 else None
    return jnp.matmul(x.astype(compute), weight.astype(compute).T, precision=exact)


class Norm(nnx.Module):
    """RMSNorm (1910.07467), in the type of its weight."""

    def __init__(self, size: int, eps: float, precision: Precision) -> None:
        self.weight = nnx.Param(jnp.ones(size, PARAMETER_DTYPE[precision]))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.weight[...].dtype)
        return cast(jax.Array, x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * self.weight[...])


class Embedding(nnx.Module):
    """[V, H]"""

    def __init__(self, shape: Shape, precision: Precision) -> None:
        self.weight = nnx.Param(jnp.zeros((shape.vocab_size, shape.hidden_size), PARAMETER_DTYPE[precision]))


class Attention(nnx.Module):
    """Projections and norms of grouped-query attention (2305.13245)."""

    def __init__(self, shape: Shape, precision: Precision) -> None:
        H, D = shape.hidden_size, shape.head_dim
        Q, KV = shape.num_attention_heads * D, shape.num_key_value_heads * D
        self.q_proj = Linear(H, Q, shape.qkv_bias, precision)
        self.k_proj = Linear(H, KV, shape.qkv_bias, precision)
        self.v_proj = Linear(H, KV, shape.qkv_bias, precision)
        self.o_proj = Linear(Q, H, shape.attention_bias, precision)
        self.q_norm = Norm(D, shape.rms_norm_eps, precision) if shape.qk_norm else None
        self.k_norm = Norm(D, shape.rms_norm_eps, precision) if shape.qk_norm else None


class MLP(nnx.Module):
    """SwiGLU (2002.05202)."""

    def __init__(self, shape: Shape, precision: Precision) -> None:
        H, inner, bias = shape.hidden_size, shape.intermediate_size, shape.mlp_bias
        self.gate_proj, self.up_proj = Linear(H, inner, bias, precision), Linear(H, inner, bias, precision)
        self.down_proj = Linear(inner, H, bias, precision)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """Attention and MLP, each behind its norm and beside a residual path; [..., H] tokens on any leading axes."""

    def __init__(self, shape: Shape, layer: int, precision: Precision) -> None:
        self.self_attn, self.mlp = Attention(shape, precision), MLP(shape, precision)
        self.input_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps, precision)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps, precision)
        self.head_dim, self.has_rope = shape.head_dim, shape.has_rope(layer)

    def project(self, x: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [..., H] -> q [..., heads, D], k and v [..., kv_heads, D], turned to their positions."""
        attention, read = self.self_attn, self.input_layernorm(x)
        q, k, v = (linear(read).reshape(*x.shape[:-1], -1, self.head_dim)
                   for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
        q = attention.q_norm(q) if attention.q_norm is not None else q
        k = attention.k_norm(k) if attention.k_norm is not None else k
        if self.has_rope:
            q, k = rotated(q, rope), rotated(k, rope)
        return q.astype(v.dtype), k.astype(v.dtype), v

    def attended(self, x: jax.Array, out: jax.Array) -> jax.Array:
        """The layer's output of its input x [..., H] and what attention made of it, [..., heads, D]."""
        x = x + self.self_attn.o_proj(out.reshape(*x.shape[:-1], -1))
        return x + self.mlp(self.post_attention_layernorm(x))

    def __call__(self, x: jax.Array, rope: Rope) -> jax.Array:
        """Rows of whole sequences [B, T, H]."""
        q, k, v = self.project(x, rope)
        return self.attended(x, attention(q, k, v))


class Trunk(nnx.Module):
    """Embedding, layers and the final norm, under the names of the files."""

    def __init__(self, shape: Shape, precision: Precision) -> None:
        self.embed_tokens = Embedding(shape, precision)
        self.layers = nnx.List(DecoderLayer(shape, layer, precision) for layer in range(shape.num_hidden_layers))
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps, precision)


@final
class Decoder(nnx.Module):
    """A decoder-only transformer on right-padded rows. Parameters are zeros and ones until weights are given; made
    within `nnx.eval_shape` it holds none. Raises `ConfigError` for a shape with experts."""

    def __init__(self, shape: Shape, *, precision: Precision = "float32", gradient_checkpointing: bool = False) -> None:
        require_dense(shape)
        self.shape, self.precision, self.gradient_checkpointing = shape, precision, gradient_checkpointing
        self.model = Trunk(shape, precision)
        if not shape.tie_word_embeddings:
            self.lm_head = Linear(shape.hidden_size, shape.vocab_size, False, precision)

    @property
    def output_weight(self) -> jax.Array:
        """[V, H]"""
        weight = self.model.embed_tokens.weight if self.shape.tie_word_embeddings else self.lm_head.weight
        return cast(jax.Array, weight[...])

    @property
    def compute_dtype(self) -> type:
        return COMPUTE_DTYPE[self.precision]

    @property
    def max_positions(self) -> int:
        return self.shape.max_position_embeddings

    @property
    def layers(self) -> Sequence[DecoderLayer]:
        return cast(Sequence[DecoderLayer], self.model.layers)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """[...] ids -> [..., H]"""
        return cast(jax.Array, self.model.embed_tokens.weight[...][tokens])

    def rope(self, positions: jax.Array) -> Rope:
        """The turns of tokens at `positions` [...]."""
        dtype = PARAMETER_DTYPE[self.precision]
        angle = positions[..., None, None].astype(dtype) * frequencies(self.shape, dtype)
        return jnp.cos(angle), jnp.sin(angle)

    def norm(self, x: jax.Array) -> jax.Array:
        """The final norm of [..., H]."""
        return self.model.norm(x)

    def hidden(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """[B, T] ids and positions -> [B, T, H] after the final norm; what is behind a row's end means nothing."""
        x, rope = self.embed(tokens), self.rope(positions)
        for layer in self.layers:
            read = partial(_through, layer)
            x = (jax.checkpoint(read) if self.gradient_checkpointing else read)(x, rope)
        return self.norm(x)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(D) + causal mask) v: q [B, T, heads, D], k and v [B, T, kv_heads, D]. JAX's own computes the
    softmax in float32, also of float64."""
    (B, T, _, D), kv = q.shape, k.shape[2]
    grouped = q.reshape(B, T, kv, -1, D)  # the queries of one kv head side by side: k, v are not repeated
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    later = jnp.triu(jnp.ones((T, T), bool), 1)
    shares = jax.nn.softmax(jnp.where(later, -jnp.inf, scores * D**-0.5), axis=-1)
    return jnp.einsum("bkgts,bskd->btkgd", shares.astype(v.dtype), v).reshape(q.shape)


def _through(layer: DecoderLayer, x: jax.Array, rope: Rope) -> jax.Array:
    return layer(x, rope)


def frequencies(shape: Shape, dtype: type) -> np.ndarray:
    """[D/2] radians by which a pair turns with each position (2104.09864, section 3.2.2), stretched as the shape
    says; on the host, in float32 or better: in bfloat16 neighbouring positions would coincide."""
    D, kind = shape.head_dim, np.dtype(dtype)
    frequency = 1 / np.asarray(shape.rope_theta, kind) ** (np.arange(0, D, 2, dtype=kind) / kind.type(D))
    return np.asarray(frequency if shape.rope_scaling is None else shape.rope_scaling(frequency), kind)


def rotated(x: jax.Array, rope: Rope) -> jax.Array:
    """Each pair (x[i], x[i + D/2]) of [..., heads, D] turned by its position's angle (2104.09864, eq. 34), in float32
    or better."""
    cos, sin = rope
    a, b = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def require_dense(shape: Shape) -> None:
    """Raise `ConfigError` for a model with experts."""
    if shape.num_experts:
        raise ConfigError([f"a {shape.model_type} has experts, which the flax backend does not compute yet"],
                          next_step="Use policy.use=torch for it.")
