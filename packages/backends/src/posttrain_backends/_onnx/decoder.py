"""The native decoder as ONNX graphs, written from a `Shape` in milliseconds: nothing is traced, so nothing is cached.

Parameters keep the names and the (out, in) layout of Hugging Face's files. Hidden states are flat [M, H], and only
attention sees rectangles [B, T]; the final norm and the output matrix are computed where they are asked for alone.
Numbers are float32. Knows no session.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, final

import numpy as np
from onnx import ModelProto, TensorProto
from posttrain.errors import ConfigError

from posttrain_backends._onnx.tape import ORT, Tape
from posttrain_backends.families.shape import Shape

EMBEDDING, OUTPUT, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
TOKENS, ASKED, LAST_TOKEN, LONGEST = "tokens", "asked", "seqlens_k", "total_sequence_length"
"""Inputs: [B, T] int64 ids; [N] int64 places among the B * T tokens; [B] int32 tokens of each row, cached ones among
them, less 1; and [] int32 the most of them."""
CHOSEN, TEMPERATURE, HIDDEN, LOGITS, LOGPROBS, ENTROPY = \
    "chosen", "temperature", "hidden", "logits", "logprobs", "entropy"
IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
"""Inputs of an exported graph, under the names of Hugging Face: [B, T] int64, [B, past + T] int64 with 0 at padding,
and [B, T] int64."""
_COS, _SIN = "rotary_cos", "rotary_sin"
_ATTENDED, _TURNED_IN_ATTENTION = 8, 16
"""GroupQueryAttention knows heads of a multiple of the first, and turns queries and keys by their positions where it is
one of the second; others are turned before it."""
_HIDDEN_BY_MASK = -1e9
"""Added to attention scores; finite, so that rows of padding alone are no NaN."""


def require_dense(shape: Shape) -> None:
    """Raise `ConfigError` for a model that has no graph here."""
    if shape.num_experts:
        raise ConfigError([f"a {shape.model_type} has experts; ONNX graphs are written for llama, qwen2, qwen3 and "
                           "smollm3"], next_step="Keep it on use: torch (or hf), or choose a model without experts.")


def past_names(layers: int) -> Iterator[tuple[str, str]]:
    """Inputs that hold each layer's keys and values, [B, kv_heads, columns, D]."""
    return ((f"past_key_values.{i}.key", f"past_key_values.{i}.value") for i in range(layers))


def present_names(layers: int) -> Iterator[tuple[str, str]]:
    """Outputs that hold them with the call's own."""
    return ((f"present.{i}.key", f"present.{i}.value") for i in range(layers))


# ---- graphs


def scoring(shape: Shape) -> ModelProto:
    """`TOKENS` padded on the right, `LAST_TOKEN`, `LONGEST` = T and `ASKED` -> `HIDDEN` [N, H] after the final norm."""
    require_dense(shape)
    tape = Tape()
    x = _body(tape, shape, tape.input(TOKENS, ["B", "T"], np.int64), tape.input(ASKED, ["N"], np.int64),
              Fused.at(tape, shape), Gemm())
    tape.output(HIDDEN, x, ["N", shape.hidden_size])
    return tape.model()


def head(shape: Shape, *, entropy: bool) -> ModelProto:
    """`HIDDEN` [N, H], `CHOSEN` [N] int64 ids and `TEMPERATURE` [] -> `LOGPROBS` [N] of the ids and, where it is asked,
    `ENTROPY` [N]. [N, V] exists twice, and does not leave the session."""
    tape = Tape()
    hidden, chosen = tape.input(HIDDEN, ["N", shape.hidden_size]), tape.input(CHOSEN, ["N"], np.int64)
    z = tape("Div", _logits(tape, shape, hidden, Gemm()), tape.input(TEMPERATURE, []))
    every = tape("LogSoftmax", z, axis=1)
    one = tape("GatherElements", every, tape("Unsqueeze", chosen, tape.ints(1)), axis=1)
    tape.output(LOGPROBS, tape("Squeeze", one, tape.ints(1)), ["N"])
    if entropy:
        products = tape("Mul", tape("Exp", every), every)
        tape.output(ENTROPY, tape("Neg", tape("ReduceSum", products, tape.ints(1), keepdims=0)), ["N"])
    return tape.model()


def decoding(shape: Shape, linear: Linear | None = None) -> ModelProto:
    """`TOKENS` behind what is cached, `LAST_TOKEN`, `LONGEST`, `ASKED` [N] and the past -> `LOGITS` [N, V] and the
    present.

    Past and present of a layer are meant to be one buffer of as many columns as the longest answer needs: keys and
    values are then written in place. It serves the prompts, padded on the right, in an empty cache; and then one token
    a row. `ASKED` are the places of the tokens whose logits are wanted, T b + t.
    """
    require_dense(shape)
    tape, linear = Tape(), linear or Gemm()
    tokens, asked = tape.input(TOKENS, ["B", "T"], np.int64), tape.input(ASKED, ["N"], np.int64)
    x = _body(tape, shape, tokens, asked, Fused.at(tape, shape, cached=True), linear)
    tape.output(LOGITS, _logits(tape, shape, x, linear), ["N", shape.vocab_size])
    _declare_present(tape, shape, "columns")
    return tape.model()


def exported(shape: Shape) -> ModelProto:
    """`IDS`, `MASK`, `POSITIONS` and the past -> `LOGITS` [B, T, V] and the present, in ONNX's own operators alone."""
    require_dense(shape)
    tape = Tape()
    ids, mask = tape.input(IDS, ["B", "T"], np.int64), tape.input(MASK, ["B", "past + T"], np.int64)
    positions = tape.input(POSITIONS, ["B", "T"], np.int64)
    x = _body(tape, shape, ids, "", Standard.at(tape, shape, ids, mask, positions), Gemm())
    size = tape("Concat", tape("Shape", ids), tape.ints(shape.vocab_size), axis=0)
    tape.output(LOGITS, tape("Reshape", _logits(tape, shape, x, Gemm()), size), ["B", "T", shape.vocab_size])
    _declare_present(tape, shape, "past + T")
    return tape.model()


def _declare_past(tape: Tape, shape: Shape, columns: str) -> None:
    for pair in past_names(shape.num_hidden_layers):
        for name in pair:
            tape.input(name, ["B", shape.num_key_value_heads, columns, shape.head_dim])


def _declare_present(tape: Tape, shape: Shape, columns: str) -> None:
    for pair in present_names(shape.num_hidden_layers):
        for name in pair:
            tape.output(name, name, ["B", shape.num_key_value_heads, columns, shape.head_dim])


# ---- what all of them are made of


class Linear(Protocol):
    """How x @ W.T + b is written."""

    def __call__(self, tape: Tape, x: str, name: str, rows: int, columns: int, *, bias: bool = False) -> str:
        """[M, columns] -> [M, rows] by the matrix NAME.weight [rows, columns] and NAME.bias [rows]."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Gemm:
    """In float32, from the matrix as it stands in files."""

    def __call__(self, tape: Tape, x: str, name: str, rows: int, columns: int, *, bias: bool = False) -> str:
        biases = [tape.weight(f"{name}.bias", [rows])] if bias else []
        return tape("Gemm", x, tape.weight(f"{name}.weight", [rows, columns]), *biases, transB=1)


class Operators(Protocol):
    """The parts of a layer that ONNX Runtime and ONNX itself write differently."""

    def norm(self, tape: Tape, x: str, weight: str) -> str:
        """RMSNorm over the last axis (1910.07467)."""
        ...
    def add_and_norm(self, tape: Tape, x: str, y: str, weight: str) -> tuple[str, str]:
        """norm(x + y), and x + y."""
        ...
    def silu(self, tape: Tape, x: str) -> str: ...
    def attend(self, tape: Tape, q: str, k: str, v: str, layer: int) -> str:
        """Turned by their positions where the layer has any: [M, heads D], [M, kv_heads D] twice -> [M, heads D]."""
        ...


def _body(tape: Tape, shape: Shape, tokens: str, asked: str, ops: Operators, linear: Linear) -> str:
    """[B, T] ids -> [N, H] behind the final norm, at the places `asked`; "" for all."""
    H = shape.hidden_size
    x = tape("Gather", tape.weight(EMBEDDING, [shape.vocab_size, H]), tape("Reshape", tokens, tape.ints(-1)))
    added = ""
    for layer in range(shape.num_hidden_layers):
        name = f"model.layers.{layer}"
        before = tape.weight(f"{name}.input_layernorm.weight", [H])
        normed, x = ops.add_and_norm(tape, x, added, before) if added else (ops.norm(tape, x, before), x)
        attended = _attention(tape, shape, normed, layer, ops, linear)
        normed, x = ops.add_and_norm(tape, x, attended, tape.weight(f"{name}.post_attention_layernorm.weight", [H]))
        added = _mlp(tape, shape, normed, f"{name}.mlp", ops, linear)
    if asked:
        x, added = tape("Gather", x, asked), tape("Gather", added, asked)
    return ops.add_and_norm(tape, x, added, tape.weight(NORM, [H]))[0]


def _attention(tape: Tape, shape: Shape, x: str, layer: int, ops: Operators, linear: Linear) -> str:
    """Grouped-query attention (2305.13245) of one layer: [M, H] -> [M, H]."""
    name, H, D = f"model.layers.{layer}.self_attn", shape.hidden_size, shape.head_dim
    Q, KV = shape.num_attention_heads * D, shape.num_key_value_heads * D
    q, k, v = (linear(tape, x, f"{name}.{part}_proj", rows, H, bias=shape.qkv_bias)
               for part, rows in (("q", Q), ("k", KV), ("v", KV)))
    if shape.qk_norm:
        q, k = (_head_norm(tape, y, f"{name}.{part}_norm.weight", rows, D, ops)
                for y, part, rows in ((q, "q", Q), (k, "k", KV)))
    return linear(tape, ops.attend(tape, q, k, v, layer), f"{name}.o_proj", H, Q, bias=shape.attention_bias)


def _head_norm(tape: Tape, x: str, weight: str, rows: int, D: int, ops: Operators) -> str:
    """The norm of each head of [M, heads D]."""
    normed = ops.norm(tape, tape("Reshape", x, tape.ints(-1, D)), tape.weight(weight, [D]))
    return tape("Reshape", normed, tape.ints(-1, rows))


def _mlp(tape: Tape, shape: Shape, x: str, name: str, ops: Operators, linear: Linear) -> str:
    """SwiGLU (2002.05202): [M, H] -> [M, H]."""
    H, F, bias = shape.hidden_size, shape.intermediate_size, shape.mlp_bias
    gate = ops.silu(tape, linear(tape, x, f"{name}.gate_proj", F, H, bias=bias))
    up = linear(tape, x, f"{name}.up_proj", F, H, bias=bias)
    return linear(tape, tape("Mul", gate, up), f"{name}.down_proj", H, F, bias=bias)


def _logits(tape: Tape, shape: Shape, hidden: str, linear: Linear) -> str:
    """[N, H] -> [N, V]"""
    output = EMBEDDING if shape.tie_word_embeddings else OUTPUT
    return linear(tape, hidden, output.removesuffix(".weight"), shape.vocab_size, shape.hidden_size)


def _rotary_table(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position's angles, [positions, D/2] (2104.09864), rounded as torch and transformers do."""
    D = shape.head_dim
    frequency = (1 / shape.rope_theta ** (np.arange(0, D, 2, dtype=np.float32) / np.float32(D))).astype(np.float32)
    scaled = frequency if shape.rope_scaling is None else np.asarray(shape.rope_scaling(frequency), np.float32)
    angle = np.arange(shape.max_position_embeddings, dtype=np.float32)[:, None] * scaled
    return np.cos(angle), np.sin(angle)


def _rotary(tape: Tape, shape: Shape) -> tuple[str, str]:
    cos, sin = _rotary_table(shape)
    return tape.constant(cos, _COS), tape.constant(sin, _SIN)


def _turned(tape: Tape, shape: Shape, q: str, k: str, rotary: tuple[str, str], positions: str) -> tuple[str, str]:
    """Queries and keys, [B, T, heads D] each, at their positions [B, T]."""
    return (tape("RotaryEmbedding", q, *rotary, positions, num_heads=shape.num_attention_heads),
            tape("RotaryEmbedding", k, *rotary, positions, num_heads=shape.num_key_value_heads))


def _positions(tape: Tape) -> str:
    """[B, T] those of `TOKENS`, the last ones of `LONGEST`; none beyond its row's last, which is a shorter row's own
    where a call brings one token of each."""
    total = tape("Cast", LONGEST, to=TensorProto.INT64)
    columns = tape("Range", tape("Sub", total, _length(tape, TOKENS)), total, _one(tape))
    return tape("Min", columns, tape("Unsqueeze", tape("Cast", LAST_TOKEN, to=TensorProto.INT64), tape.ints(1)))


@final
@dataclass(frozen=True, slots=True)
class Fused:
    """Those of ONNX Runtime: few nodes, and keys and values that are written where they stand."""

    shape: Shape
    rotary: tuple[str, str]
    rectangle: str
    """[3] shape of a flat array's rectangle, [B, T, -1]."""
    positions: str
    """[B, T], where they are needed."""
    past: tuple[tuple[str, str], ...]
    present: tuple[tuple[str, str], ...]

    @classmethod
    def at(cls, tape: Tape, shape: Shape, *, cached: bool = False) -> Fused:
        """Declares the inputs that tell the lengths, and the past where there is one. Raises `ConfigError` for heads
        that ONNX Runtime does not attend with."""
        if shape.head_dim % _ATTENDED:
            raise ConfigError([f"head_dim is {shape.head_dim}; attention of ONNX Runtime needs a multiple of "
                               f"{_ATTENDED}"],
                              next_step="Keep this model on use: torch (or hf).")
        tape.input(LAST_TOKEN, ["B"], np.int32)
        tape.input(LONGEST, [], np.int32)
        layers = shape.num_hidden_layers
        if cached:
            _declare_past(tape, shape, "columns")
        return cls(shape, _rotary(tape, shape), tape("Concat", tape("Shape", TOKENS), tape.ints(-1), axis=0),
                   _positions(tape) if shape.head_dim % _TURNED_IN_ATTENTION else "",
                   tuple(past_names(layers)) if cached else (("", ""),) * layers,
                   tuple(present_names(layers)) if cached else (("", ""),) * layers)

    def norm(self, tape: Tape, x: str, weight: str) -> str:
        return tape("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=self.shape.rms_norm_eps)

    def add_and_norm(self, tape: Tape, x: str, y: str, weight: str) -> tuple[str, str]:
        normed, _, _, added = tape.several("SkipSimplifiedLayerNormalization", x, y, weight, count=4, domain=ORT,
                                           epsilon=self.shape.rms_norm_eps)
        return normed, added

    def silu(self, tape: Tape, x: str) -> str:
        return tape("QuickGelu", x, domain=ORT, alpha=1.0)

    def attend(self, tape: Tape, q: str, k: str, v: str, layer: int) -> str:
        shape, turned = self.shape, self.shape.has_rope(layer) and not self.positions
        q, k, v = (tape("Reshape", y, self.rectangle) for y in (q, k, v))
        if shape.has_rope(layer) and self.positions:
            q, k = _turned(tape, shape, q, k, self.rotary, self.positions)
        inputs = [q, k, v, *self.past[layer], LAST_TOKEN, LONGEST, *(self.rotary if turned else ())]
        attended = f"attended_{layer}"
        present = [name or f"{part}_{layer}" for name, part in zip(self.present[layer], ("keys", "values"))]
        tape.write("GroupQueryAttention", inputs, [attended, *present], domain=ORT, do_rotary=int(turned),
                   num_heads=shape.num_attention_heads, kv_num_heads=shape.num_key_value_heads)
        return tape("Reshape", attended, tape.ints(-1, shape.num_attention_heads * shape.head_dim))


@final
@dataclass(frozen=True, slots=True)
class Standard:
    """ONNX's own, which every runtime of the operator set knows."""

    shape: Shape
    rotary: tuple[str, str]
    rectangle: str
    positions: str
    mask: str
    """[B, 1, T, past + T], added to scores."""
    past: tuple[tuple[str, str], ...]
    present: tuple[tuple[str, str], ...]

    @classmethod
    def at(cls, tape: Tape, shape: Shape, ids: str, mask: str, positions: str) -> Standard:
        _declare_past(tape, shape, "past")
        layers = shape.num_hidden_layers
        return cls(shape, _rotary(tape, shape), tape("Concat", tape("Shape", ids), tape.ints(-1), axis=0), positions,
                   _causal(tape, ids, mask), tuple(past_names(layers)), tuple(present_names(layers)))

    def norm(self, tape: Tape, x: str, weight: str) -> str:
        return tape("RMSNormalization", x, weight, axis=-1, epsilon=self.shape.rms_norm_eps)

    def add_and_norm(self, tape: Tape, x: str, y: str, weight: str) -> tuple[str, str]:
        added = tape("Add", x, y)
        return self.norm(tape, added, weight), added

    def silu(self, tape: Tape, x: str) -> str:
        return tape("Mul", x, tape("Sigmoid", x))

    def attend(self, tape: Tape, q: str, k: str, v: str, layer: int) -> str:
        heads, kv = self.shape.num_attention_heads, self.shape.num_key_value_heads
        q, k, v = (tape("Reshape", y, self.rectangle) for y in (q, k, v))
        if self.shape.has_rope(layer):
            q, k = _turned(tape, self.shape, q, k, self.rotary, self.positions)
        attended = f"attended_{layer}"
        tape.write("Attention", [q, k, v, self.mask, *self.past[layer]], [attended, *self.present[layer]],
                   q_num_heads=heads, kv_num_heads=kv)
        return tape("Reshape", attended, tape.ints(-1, heads * self.shape.head_dim))


def _causal(tape: Tape, ids: str, mask: str) -> str:
    """[B, 1, T, past + T]: 0 at the tokens that a token sees, itself and those before it that are no padding."""
    zero, one, total = tape.constant(np.array(0, np.int64), "zero"), _one(tape), _length(tape, mask)
    columns = tape("Range", zero, total, one)
    rows = tape("Unsqueeze", tape("Range", tape("Sub", total, _length(tape, ids)), total, one), tape.ints(1))
    seen = tape("And", tape("LessOrEqual", columns, rows),
                tape("Unsqueeze", tape("Greater", mask, zero), tape.ints(1, 2)))
    return tape("Where", seen, tape.constant(np.array(0, np.float32), "seen"),
                tape.constant(np.array(_HIDDEN_BY_MASK, np.float32), "unseen"))


def _length(tape: Tape, x: str) -> str:
    """[] the columns of a rectangle."""
    return tape("Squeeze", tape("Shape", x, start=1, end=2))


def _one(tape: Tape) -> str:
    return tape.constant(np.array(1, np.int64), "one")


def weights_of(graphs: Iterable[ModelProto], shape: Shape) -> dict[str, tuple[int, ...]]:
    """Parameter -> its shape, of graphs that `Tape` wrote: their inputs under names of Hugging Face's files."""
    return {value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
            for graph in graphs for value in graph.graph.input if value.name.endswith((".weight", ".bias"))}
