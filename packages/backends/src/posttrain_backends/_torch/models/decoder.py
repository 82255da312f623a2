"""The native decoder-only transformer of Llama and its kin: rotary positions, RMSNorm, SwiGLU, grouped-query attention.

Sources: Touvron et al. 2023 (2302.13971), Su et al. 2021 (2104.09864), Zhang & Sennrich 2019 (1910.07467), Shazeer 2020
(2002.05202), Ainslie et al. 2023 (2305.13245); the families stand in `shape.py`. Parameters carry the names of Hugging
Face's files, so weights are exchanged without a table. Linear layers run on flat [M, H] tokens; only attention sees
rectangles. Knows no losses.
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
from posttrain_backends._torch.models.attention import ATTENTION, Attend
from posttrain_backends._torch.models.feedforward import MLP, DecodedMixture, DenseWeights, Mixture
from posttrain_backends._torch.models.files import copy_named, read_weights, write_model
from posttrain_backends._torch.models.grouped import SharedPrompts, attention
from posttrain_backends._torch.models.interface import COMPUTE_DTYPE, PARAMETER_DTYPE, KVCache, Precision, autocast_to
from posttrain_backends._torch.models.lean import Norm
from posttrain_backends._torch.models.mixture import Routes
from posttrain_backends._torch.models.projections import Projection, joined, normed, plain_state
from posttrain_backends._torch.models.rope import Rope, rope_table, rotate
from posttrain_backends.families.config import config_of
from posttrain_backends.families.files import DERIVED, EMBEDDING, OUTPUT, drop_tied
from posttrain_backends.families.shape import FAMILIES, Shape, name_in_files


class Attention(nn.Module):
    """Causal grouped-query attention of one layer."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.head_dim, self.has_rope = shape.head_dim, shape.has_rope(layer)
        H, Q, KV = shape.hidden_size, shape.num_attention_heads * shape.head_dim, \
            shape.num_key_value_heads * shape.head_dim
        self.q_proj, self.o_proj = nn.Linear(H, Q, shape.qkv_bias), nn.Linear(Q, H, shape.attention_bias)
        self.k_proj, self.v_proj = nn.Linear(H, KV, shape.qkv_bias), nn.Linear(H, KV, shape.qkv_bias)
        self.q_norm, self.k_norm = (
            Norm(shape.head_dim, shape.rms_norm_eps) if shape.qk_norm else None for _ in range(2))

    def head_norms(self) -> Tensor | None:
        """[heads + kv_heads, D] the weights of the norms of each head's query and key."""
        if self.q_norm is None or self.k_norm is None:
            return None
        return torch.cat([norm.weight.detach().expand(linear.out_features // self.head_dim, -1)
                          for norm, linear in ((self.q_norm, self.q_proj), (self.k_norm, self.k_proj))])

    def forward(self, x: Tensor, norm: Norm, rope: Rope, attend: Attend) -> tuple[Tensor, Tensor, Tensor]:
        """[M, H] -> [M, H], keys and values [M, kv_heads, D]; reads `norm` of x."""
        q, k, v = (y.view(len(x), -1, self.head_dim)
                   for y in normed(x, norm, self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = head_norm(q, self.q_norm), head_norm(k, self.k_norm)
        if self.has_rope:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k = q.to(v.dtype), k.to(v.dtype)
        return self.o_proj(attend(q, k, v).flatten(1)), k, v


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind its norm and beside a residual path."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(shape, layer)
        self.mlp = Mixture(shape, layer) if shape.has_experts(layer) else \
            MLP(shape.hidden_size, shape.intermediate_size, shape.mlp_bias)
        self.input_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, x: Tensor, rope: Rope, attend: Attend, routes: Routes) -> tuple[Tensor, Tensor, Tensor]:
        attended, k, v = self.self_attn(x, self.input_layernorm, rope, attend)
        x = x + attended
        return x + self.mlp(x, self.post_attention_layernorm, routes), k, v

    def for_decoding(self, dtype: torch.dtype) -> LayerWeights:
        """The layer's weights for `decode_layer`; what is joined in the type it is multiplied in."""
        attention = self.self_attn
        return LayerWeights(
            self.input_layernorm.weight, joined((attention.q_proj, attention.k_proj, attention.v_proj), dtype),
            attention.head_norms(), attention.has_rope, joined((attention.o_proj,), dtype),
            self.post_attention_layernorm.weight, self.mlp.for_decoding(dtype))


class Trunk(nn.Module):
    """Embedding, layers and the final norm, under the names of the files."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(shape, layer) for layer in range(shape.num_hidden_layers))
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)


@final
class Decoder(nn.Module):
    """A decoder-only transformer on flat ragged tokens; see `CachedLanguageModel` for its interface.

    Parameters are float32 (float64 where `precision` says so); `bf16` computes the matrices in bfloat16 by autocast.
    `gradient_checkpointing` keeps only the layers' inputs and computes the rest anew in the backward pass. `attention`
    is how whole sequences are read, by its name in `attention.py`; what is drawn token by token has one of its own.
    """

    def __init__(self, shape: Shape, *, seed: int = 0, device: torch.device | str = "cpu",
                 precision: Precision = "float32", gradient_checkpointing: bool = False,
                 attention: str = "sdpa") -> None:
        super().__init__()
        self.shape, self.precision, self.gradient_checkpointing = shape, precision, gradient_checkpointing
        self.attention = attention
        dtype = PARAMETER_DTYPE[precision]
        with torch.device("meta"):  # nothing is allocated or drawn twice
            self.model = Trunk(shape)
            if not shape.tie_word_embeddings:
                self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.to(dtype).to_empty(device=device)
        self.register_state_dict_post_hook(_name_as_in_files)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._initialise(seed)
        self._cos, self._sin = rope_table(shape.max_position_embeddings, shape.head_dim, shape.rope_theta,
                                          shape.rope_scaling, dtype, torch.device(device))

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Norms to 1, biases to 0 and matrices to N(0, 0.02^2), drawn in float32 on the host: equal on all devices and
        types."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            p.copy_(torch.empty(p.shape).normal_(0, 0.02, generator=generator) if p.ndim > 1
                    else torch.full(p.shape, float(not name.endswith("bias"))))

    @property
    def output_weight(self) -> Tensor:
        return self.model.embed_tokens.weight if self.shape.tie_word_embeddings else self.lm_head.weight

    @property
    def module(self) -> nn.Module:
        return self

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

    @property
    def mixtures(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.shape.num_hidden_layers) if self.shape.has_experts(i))

    @property
    def experts(self) -> int:
        return self.shape.num_experts

    @property
    def experts_per_token(self) -> int:
        return self.shape.num_experts_per_tok

    def hidden(self, tokens: Tensor, layout: Layout, routes: Routes | None = None) -> Tensor:
        """[M] token ids -> [M, H] after the final norm; see `Routed.hidden`. Raises `ConfigError` beyond
        `max_position_embeddings`."""
        routes, attend = routes or Routes(), ATTENTION[self.attention](layout)
        with self.autocast():
            x, rope = self._embed(tokens, layout.positions, layout.longest)
            for layer in self.model.layers:
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    x, _, _ = checkpoint(layer, x, rope, attend, routes, use_reentrant=False, preserve_rng_state=False)
                else:
                    x, _, _ = layer(x, rope, attend, routes)
            return cast(Tensor, self.model.norm(x))

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder of the model's family."""
        write_model(folder, config_of(self.shape), plain_state(self))

    def load(self, folder: Path) -> None:
        """Take the weights of a folder, in whatever type they are. Raises `ConfigError` where they do not fit."""
        weights = {name: tensor for name, tensor in read_weights(folder).items() if not name.endswith(DERIVED)}
        if self.shape.tie_word_embeddings:
            drop_tied(weights, OUTPUT, EMBEDDING, folder)
        copy_named(weights.items(), self.state_dict(), f"policy.weights {folder}")

    def prefill(self, tokens: Tensor, layout: Layout,
                routes: Routes | None = None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """[M] -> hidden [M, H], and the keys and values of each layer, [M, kv_heads, D]."""
        keys, values, routes, attend = [], [], routes or Routes(), ATTENTION[self.attention](layout)
        with self.autocast():
            x, rope = self._embed(tokens, layout.positions, layout.longest)
            for layer in self.model.layers:
                x, k, v = layer(x, rope, attend, routes)
                keys.append(k)
                values.append(v)
            return self.model.norm(x), keys, values

    def new_cache(self, rows: int, columns: int) -> KVCache:
        size = (rows, self.shape.num_key_value_heads, columns, self.shape.head_dim)
        def zeros() -> list[Tensor]:  # not empty: what a masked cell holds must be finite
            return [torch.zeros(size, dtype=self.compute_dtype, device=self._cos.device) for _ in self.model.layers]
        layers = (cast(DecoderLayer, layer) for layer in self.model.layers)
        return KVCache(zeros(), zeros(), [layer.for_decoding(self.compute_dtype) for layer in layers])

    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache, rows: slice | None = None,
               routes: Routes | None = None) -> Tensor:
        """One token [B] per cache row -> hidden [B, H]; see `CachedLanguageModel.decode`."""
        return self._decode(tokens, positions, _Step.at(positions, cache.keys[0]), cache, rows, routes or Routes())

    def decode_grouped(self, tokens: Tensor, positions: Tensor, cache: KVCache, prompts: SharedPrompts,
                       rows: slice | None = None, routes: Routes | None = None) -> Tensor:
        """The same behind shared prompts; see `GroupedLanguageModel.decode_grouped`."""
        step = _Step.at(positions - prompts.lengths, cache.keys[0], prompts)
        return self._decode(tokens, positions, step, cache, rows, routes or Routes())

    def _decode(self, tokens: Tensor, positions: Tensor, step: _Step, cache: KVCache, rows: slice | None,
                routes: Routes) -> Tensor:
        with self.autocast():
            x, rope = self._embed(tokens, positions, step.longest)
            for layer, (weights, keys, values) in enumerate(zip(cache.weights, cache.keys, cache.values)):
                if rows is not None:
                    keys, values = keys[rows], values[rows]
                x = decode_layer(x, cast(LayerWeights, weights), self.shape, rope, step, keys, values, routes, layer)
            return cast(Tensor, self.model.norm(x))

    def _embed(self, tokens: Tensor, positions: Tensor, longest: int) -> tuple[Tensor, Rope]:
        if longest > len(self._cos):
            raise ConfigError([f"a sequence of {longest} tokens does not fit the model's {len(self._cos)} positions"],
                              next_step="Raise policy.max_positions, or lower rollout.max_new_tokens or the prompts.")
        rope = self._cos[positions], self._sin[positions]
        return F.embedding(tokens, self.model.embed_tokens.weight), rope


def _name_as_in_files(model: Decoder, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """Give the tensors of `state`, in place, the names that they have in files of the model's family."""
    for name in list(state) if FAMILIES[model.shape.model_type].names else ():
        state[name_in_files(name, model.shape.model_type)] = state.pop(name)


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
    prompts: SharedPrompts | None
    """What stands before the cache."""

    @property
    def longest(self) -> int:
        """No row has more tokens."""
        return self.columns + (self.prompts.mask.shape[-1] if self.prompts else 0)

    @classmethod
    def at(cls, positions: Tensor, like: Tensor, prompts: SharedPrompts | None = None) -> _Step:
        """The step at the cache's `positions` [B], its keys being `like`."""
        low, high = (int(p) for p in positions.aminmax())
        if low == high:
            return cls(high + 1, (slice(None), slice(None), high), like.new_zeros(1, 1, 1), prompts)
        rows, columns = (torch.arange(n, device=like.device) for n in (len(positions), high + 1))
        beyond = (columns > positions[:, None]).repeat_interleave(like.shape[1], 0)[:, None, :]
        mask = like.new_zeros(beyond.shape).masked_fill_(beyond, float("-inf"))
        return cls(high + 1, (rows, slice(None), positions), mask, prompts)


@final
@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """A layer as `decode_layer` takes it: what reads the same input is one."""

    input_norm: Tensor
    qkv: Projection
    """H -> (heads + 2 kv_heads) D"""
    head_norms: Tensor | None
    """[heads + kv_heads, D]"""
    has_rope: bool
    o: Projection
    post_attention_norm: Tensor
    mlp: DenseWeights | DecodedMixture


def decode_layer(x: Tensor, weights: LayerWeights, shape: Shape, rope: Rope, step: _Step, keys: Tensor,
                 values: Tensor, routes: Routes, layer: int) -> Tensor:
    """`DecoderLayer` for one token [B, H] per cache row; writes `keys` and `values` [B, kv_heads, T, D] in place."""
    (B, H), kv, D = x.shape, shape.num_key_value_heads, shape.head_dim
    heads = weights.qkv(F.rms_norm(x, (H,), weights.input_norm, shape.rms_norm_eps)).view(B, -1, D)
    turned = heads[:, :-kv]
    if weights.head_norms is not None:
        turned = F.rms_norm(turned.to(weights.head_norms.dtype), (D,), None, shape.rms_norm_eps) * weights.head_norms
    turned = (rotate(turned, rope) if weights.has_rope else turned).to(heads.dtype)
    q, k = turned[:, :-kv], turned[:, -kv:]
    keys[step.cells], values[step.cells] = k, heads[:, -kv:]
    keys, values = keys[:, :, :step.columns].flatten(0, 1), values[:, :, :step.columns].flatten(0, 1)
    q = q.reshape(B * kv, -1, D)  # the queries of one kv head side by side: k, v are not repeated
    if step.prompts is None:
        scores = torch.baddbmm(step.mask, q, keys.transpose(1, 2), alpha=D**-0.5)
        attended = torch.bmm(torch.softmax(scores, dim=-1), values)
    else:
        attended = attention(q, keys, values, step.mask, step.prompts, layer)
    x = x + weights.o(attended.reshape(B, -1))
    return x + weights.mlp(F.rms_norm(x, (H,), weights.post_attention_norm, shape.rms_norm_eps), routes)


def head_norm(x: Tensor, norm: Norm) -> Tensor:
    """The norm of each head of [M, heads, D], in the type of its weight."""
    normed: Tensor = norm(x.flatten(0, 1).to(norm.weight.dtype))
    return normed.view_as(x)
