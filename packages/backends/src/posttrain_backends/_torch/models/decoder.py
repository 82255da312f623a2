"""The native decoder-only transformer of the Llama family: rotary positions, RMSNorm, SwiGLU, grouped-query attention.

Sources: Touvron et al. 2023 (2302.13971), Su et al. 2021 (2104.09864), Zhang & Sennrich 2019 (1910.07467), Shazeer 2020
(2002.05202), Ainslie et al. 2023 (2305.13245). Parameters carry the names of Hugging Face's Llama files, so weights are
exchanged without a table. Linear layers run on flat [M, H] tokens; only attention sees rectangles. Knows no losses.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import cast, final

import torch
import torch.nn.functional as F
from posttrain.errors import ConfigError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models.files import write_model
from posttrain_backends._torch.models.interface import COMPUTE_DTYPE, PARAMETER_DTYPE, KVCache, Precision, autocast_to
from posttrain_backends._torch.models.lean import Norm, swiglu
from posttrain_backends._torch.models.shape import Shape, llama_config

Rope = tuple[Tensor, Tensor]
"""cos and sin of each token, [M, 1, D]; sin is negative in the first half, the sign of the rotation."""


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        H, Q, KV = shape.hidden_size, shape.num_attention_heads * shape.head_dim, \
            shape.num_key_value_heads * shape.head_dim
        self.q_proj, self.o_proj = nn.Linear(H, Q, bias=False), nn.Linear(Q, H, bias=False)
        self.k_proj, self.v_proj = nn.Linear(H, KV, bias=False), nn.Linear(H, KV, bias=False)

    def forward(self, x: Tensor, norm: Norm, rope: Rope, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """[M, H] -> [M, H], keys and values [M, kv_heads, D]; reads `norm` of x."""
        projected = norm.linears(x, self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        q, k, v = (y.view(len(x), -1, self.head_dim) for y in projected)
        q, k = rotate(q, rope), rotate(k, rope)
        return self.o_proj(causal_attention(q, k, v, layout).flatten(1)), k, v


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        H, I = shape.hidden_size, shape.intermediate_size
        self.gate_proj, self.up_proj = nn.Linear(H, I, bias=False), nn.Linear(H, I, bias=False)
        self.down_proj = nn.Linear(I, H, bias=False)

    def forward(self, x: Tensor, norm: Norm) -> Tensor:
        """[M, H] -> [M, H]; reads `norm` of x."""
        gate, up = norm.linears(x, self.gate_proj.weight, self.up_proj.weight)
        return swiglu(gate, up, self.down_proj.weight)


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind its norm and beside a residual path."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(shape), MLP(shape)
        self.input_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, x: Tensor, rope: Rope, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        attended, k, v = self.self_attn(x, self.input_layernorm, rope, layout)
        x = x + attended
        return x + self.mlp(x, self.post_attention_layernorm), k, v

    def for_decoding(self, dtype: torch.dtype) -> LayerWeights:
        """The layer's weights for `decode_layer`; joined matrices in the type they are multiplied in."""
        attention, mlp = self.self_attn, self.mlp
        return LayerWeights(
            self.input_layernorm.weight, side_by_side(attention.q_proj, attention.k_proj, attention.v_proj).to(dtype),
            attention.o_proj.weight, self.post_attention_layernorm.weight,
            side_by_side(mlp.gate_proj, mlp.up_proj).to(dtype), mlp.down_proj.weight)


class Trunk(nn.Module):
    """Embedding, layers and the final norm, under the names of the files."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)


@final
class Decoder(nn.Module):
    """A decoder-only transformer on flat ragged tokens; see `CachedLanguageModel` for its interface.

    Parameters are float32 (float64 where `precision` says so); `bf16` computes the matrices in bfloat16 by autocast.
    `gradient_checkpointing` keeps only the layers' inputs and computes the rest anew in the backward pass.
    """

    def __init__(self, shape: Shape, *, seed: int = 0, device: torch.device | str = "cpu",
                 precision: Precision = "float32", gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.shape, self.precision, self.gradient_checkpointing = shape, precision, gradient_checkpointing
        dtype = PARAMETER_DTYPE[precision]
        with torch.device("meta"):  # nothing is allocated or drawn twice
            self.model = Trunk(shape)
            if not shape.tie_word_embeddings:
                self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.to(dtype).to_empty(device=device)
        self._initialise(seed)
        self._cos, self._sin = rope_table(shape, dtype, torch.device(device))

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Norms to 1 and matrices to N(0, 0.02^2), drawn in float32 on the host: equal on all devices and types."""
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.copy_(torch.ones(p.shape) if p.ndim == 1 else torch.empty(p.shape).normal_(0, 0.02, generator=generator))

    @property
    def output_weight(self) -> Tensor:
        return self.model.embed_tokens.weight if self.shape.tie_word_embeddings else self.lm_head.weight

    @property
    def compute_dtype(self) -> torch.dtype:
        return COMPUTE_DTYPE[self.precision]

    @property
    def max_positions(self) -> int:
        return len(self._cos)

    @property
    def shares_prompts(self) -> bool:
        return True

    def autocast(self) -> AbstractContextManager[object]:
        return autocast_to(self.precision, self._cos.device)

    def hidden(self, tokens: Tensor, layout: Layout) -> Tensor:
        """[M] token ids -> [M, H] after the final norm. Raises `ConfigError` beyond `max_position_embeddings`."""
        with self.autocast():
            x, rope = self._embed(tokens, layout.positions, layout.longest)
            for layer in self.model.layers:
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    x, _, _ = checkpoint(layer, x, rope, layout, use_reentrant=False, preserve_rng_state=False)
                else:
                    x, _, _ = layer(x, rope, layout)
            return cast(Tensor, self.model.norm(x))

    def save(self, folder: Path) -> None:
        """Write a Hugging Face Llama folder."""
        write_model(folder, llama_config(self.shape), self.state_dict())

    def prefill(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """[M] -> hidden [M, H], and the keys and values of each layer, [M, kv_heads, D]."""
        keys, values = [], []
        with self.autocast():
            x, rope = self._embed(tokens, layout.positions, layout.longest)
            for layer in self.model.layers:
                x, k, v = layer(x, rope, layout)
                keys.append(k)
                values.append(v)
            return self.model.norm(x), keys, values

    def new_cache(self, rows: int, columns: int) -> KVCache:
        size = (rows, self.shape.num_key_value_heads, columns, self.shape.head_dim)
        def zeros() -> list[Tensor]:  # not empty: what a masked cell holds must be finite
            return [torch.zeros(size, dtype=self.compute_dtype, device=self._cos.device) for _ in self.model.layers]
        layers = (cast(DecoderLayer, layer) for layer in self.model.layers)
        return KVCache(zeros(), zeros(), [layer.for_decoding(self.compute_dtype) for layer in layers])

    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache, rows: slice | None = None) -> Tensor:
        """One token [B] per cache row -> hidden [B, H]; see `CachedLanguageModel.decode`."""
        step = _Step.at(positions, cache.keys[0])
        with self.autocast():
            x, rope = self._embed(tokens, positions, step.columns)
            for weights, keys, values in zip(cache.weights, cache.keys, cache.values):
                if rows is not None:
                    keys, values = keys[rows], values[rows]
                x = decode_layer(x, cast(LayerWeights, weights), self.shape, rope, step, keys, values)
            return cast(Tensor, self.model.norm(x))

    def _embed(self, tokens: Tensor, positions: Tensor, longest: int) -> tuple[Tensor, Rope]:
        if longest > len(self._cos):
            raise ConfigError([f"a sequence of {longest} tokens does not fit the model's {len(self._cos)} positions"],
                              next_step="Raise policy.max_positions, or lower rollout.max_new_tokens or the prompts.")
        rope = self._cos[positions], self._sin[positions]
        return F.embedding(tokens, self.model.embed_tokens.weight), rope


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """What all layers of one decoding step share."""

    columns: int
    """Cache columns in use."""
    cells: tuple[Tensor | slice | int, ...]
    """Where the step's keys and values go in [B, kv_heads, T, D]."""
    mask: Tensor
    """[B * kv_heads, 1, columns], -inf at positions a row has not reached; one 0 where all rows are equally long."""

    @classmethod
    def at(cls, positions: Tensor, like: Tensor) -> _Step:
        """The step at `positions` [B] of a cache whose keys are `like`."""
        low, high = (int(p) for p in positions.aminmax())
        if low == high:
            return cls(high + 1, (slice(None), slice(None), high), like.new_zeros(1, 1, 1))
        rows, columns = (torch.arange(n, device=like.device) for n in (len(positions), high + 1))
        beyond = (columns > positions[:, None]).repeat_interleave(like.shape[1], 0)[:, None, :]
        mask = like.new_zeros(beyond.shape).masked_fill_(beyond, float("-inf"))
        return cls(high + 1, (rows, slice(None), positions), mask)


@final
@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """A layer as `decode_layer` takes it: the matrices that read the same input are one, as few rows are bound by
    calls and not by arithmetic."""

    input_norm: Tensor
    qkv: Tensor
    """[(heads + 2 kv_heads) D, H]"""
    o: Tensor
    post_attention_norm: Tensor
    gate_up: Tensor
    """[2 I, H]"""
    down: Tensor


def decode_layer(x: Tensor, weights: LayerWeights, shape: Shape, rope: Rope, step: _Step, keys: Tensor,
                 values: Tensor) -> Tensor:
    """`DecoderLayer` for one token [B, H] per cache row; writes `keys` and `values` [B, kv_heads, T, D] in place."""
    (B, H), kv, D = x.shape, shape.num_key_value_heads, shape.head_dim
    normed = F.rms_norm(x, (H,), weights.input_norm, shape.rms_norm_eps)
    heads = F.linear(normed, weights.qkv).view(B, -1, D)
    turned = rotate(heads[:, :-kv], rope)
    q, k = turned[:, :-kv], turned[:, -kv:]
    keys[step.cells], values[step.cells] = k, heads[:, -kv:]
    keys, values = keys[:, :, :step.columns].flatten(0, 1), values[:, :, :step.columns].flatten(0, 1)
    q = q.reshape(B * kv, -1, D)  # the queries of one kv head side by side: k, v are not repeated
    scores = torch.baddbmm(step.mask, q, keys.transpose(1, 2), alpha=D**-0.5)
    attended = torch.bmm(torch.softmax(scores, dim=-1), values).view(B, -1)
    x = x + F.linear(attended, weights.o)
    normed = F.rms_norm(x, (H,), weights.post_attention_norm, shape.rms_norm_eps)
    gate, up = F.linear(normed, weights.gate_up).chunk(2, dim=-1)
    return x + swiglu(gate, up, weights.down)


@torch.inference_mode(False)  # samplers run in inference mode, and what is made there could not be trained
@torch.no_grad()
def side_by_side(*linears: nn.Linear) -> Tensor:
    """Their matrices one below the other, without a second copy: where they do not lie so already, they are moved.

    The parameters stay the same objects and become views of the whole, so what updates them in place updates it.
    """
    weights = [linear.weight for linear in linears]
    first, rows = weights[0], sum(len(w) for w in weights)
    starts = [first.data_ptr() + first.element_size() * first.shape[1] * sum(len(w) for w in weights[:i])
              for i in range(len(weights))]
    same = {w.untyped_storage().data_ptr() for w in weights} == {first.untyped_storage().data_ptr()}
    if same and [w.data_ptr() for w in weights] == starts:
        return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))
    whole = torch.cat([w.detach() for w in weights])
    for w, part in zip(weights, torch.split(whole, [len(w) for w in weights])):
        w.data = part
    return whole


def rope_table(shape: Shape, dtype: torch.dtype, device: torch.device) -> Rope:
    """cos and signed sin of position * theta^(-2i/D), each [max_positions, 1, D], repeated for both halves.

    Computed in float64 and kept in float32 or better: in bfloat16 neighbouring positions would coincide.
    """
    D = shape.head_dim
    frequency = shape.rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = torch.arange(shape.max_position_embeddings, dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos()[:, None, :], angle.sin()[:, None, :]
    return torch.cat([cos, cos], -1).to(device, dtype), torch.cat([-sin, sin], -1).to(device, dtype)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of [M, heads, D] by its position's angle (2104.09864, eq. 34), in float32."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([b, a], dim=-1), sin).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """q [M, heads, D], k and v [M, kv_heads, D] -> [M, heads, D], block by block."""
    grouped = q.shape[1] != k.shape[1]
    parts = []
    for block in layout.blocks:
        qb, kb, vb = (block.pad(x).transpose(1, 2) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(qb, kb, vb, is_causal=True, enable_gqa=grouped)
        parts.append(block.unpad(attended.transpose(1, 2)))
    if layout.inverse is None:
        return parts[0] if parts else q
    return torch.cat(parts).index_select(0, layout.inverse)
