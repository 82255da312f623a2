"""The native decoder against a literal slow reference, against itself in other layouts, and user modules."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from posttrain.errors import ConfigError
from posttrain.protocols import LoadRequest
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models.decoder import Decoder
from posttrain_backends._torch.models.interface import CachedLanguageModel, LanguageModel
from posttrain_backends._torch.models.user import load_user_model
from posttrain_backends.families.config import config_of
from posttrain_backends.families.shape import Shape
from posttrain_backends.ragged import offsets_of_tokens
from posttrain_backends.torch_native import Torch

torch.set_num_threads(1)


def shape(heads: int = 4, kv_heads: int = 2, tied: bool = False, positions: int = 64) -> Shape:
    return Shape(vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=heads,
                 num_key_value_heads=kv_heads, head_dim=16 // heads, max_position_embeddings=positions,
                 tie_word_embeddings=tied)


def decoder(seed: int = 0, precision: str = "float64", **sizes) -> Decoder:
    """A decoder whose every parameter is random, norms too, and large enough that attention is not uniform."""
    model = Decoder(shape(**sizes), seed=seed, precision=precision)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64) + (p.ndim == 1))
    return model


def ragged(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, Layout]:
    tokens = torch.from_numpy(np.random.default_rng(seed).integers(0, 23, sum(lengths)))
    return tokens, Layout.from_offsets(np.concatenate([[0], np.cumsum(lengths)]))


def literal_hidden(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    """One sequence, token by token and head by head, from the papers' equations, in NumPy float64."""
    w = {name: p.detach().numpy().astype(np.float64) for name, p in model.named_parameters()}
    s = model.shape
    D, rep = s.head_dim, s.num_attention_heads // s.num_key_value_heads

    def norm(x, weight):
        return x / math.sqrt(np.mean(x * x) + s.rms_norm_eps) * weight

    def turned(x, position):  # RoPE: pair (i, i + D/2) turned by position * theta^(-2i/D)
        y = np.empty(D)
        for i in range(D // 2):
            angle = position * s.rope_theta ** (-2 * i / D)
            y[i] = x[i] * math.cos(angle) - x[i + D // 2] * math.sin(angle)
            y[i + D // 2] = x[i + D // 2] * math.cos(angle) + x[i] * math.sin(angle)
        return y

    x = [w["model.embed_tokens.weight"][t] for t in tokens]
    for layer in range(s.num_hidden_layers):
        p = {name.split(f"layers.{layer}.")[1]: a for name, a in w.items() if f"layers.{layer}." in name}
        h = [norm(row, p["input_layernorm.weight"]) for row in x]
        q = [[turned(v, t) for v in (p["self_attn.q_proj.weight"] @ row).reshape(-1, D)] for t, row in enumerate(h)]
        k = [[turned(v, t) for v in (p["self_attn.k_proj.weight"] @ row).reshape(-1, D)] for t, row in enumerate(h)]
        v = [(p["self_attn.v_proj.weight"] @ row).reshape(-1, D) for row in h]
        for t in range(len(x)):
            heads = []
            for a in range(s.num_attention_heads):
                score = np.array([q[t][a] @ k[u][a // rep] / math.sqrt(D) for u in range(t + 1)])
                weight = np.exp(score - score.max())
                heads.append(sum(weight[u] * v[u][a // rep] for u in range(t + 1)) / weight.sum())
            x[t] = x[t] + p["self_attn.o_proj.weight"] @ np.concatenate(heads)
        for t, row in enumerate(x):
            h_t = norm(row, p["post_attention_layernorm.weight"])
            gate = p["mlp.gate_proj.weight"] @ h_t
            x[t] = row + p["mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * (p["mlp.up_proj.weight"] @ h_t))
    return np.array([norm(row, w["model.norm.weight"]) for row in x])


@pytest.mark.oracle
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (4, 4), (2, 1)])
def test_hidden_equals_the_literal_reference(heads, kv_heads):
    model = decoder(heads=heads, kv_heads=kv_heads)
    tokens, layout = ragged([7])
    ours = model.hidden(tokens, layout).detach().numpy()
    np.testing.assert_allclose(ours, literal_hidden(model, tokens.numpy()), rtol=1e-12, atol=1e-12)


@pytest.mark.oracle
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_transformers(tied):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, s = decoder(tied=tied), shape(tied=tied)
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config_of(s))).double()
    missing, unexpected = reference.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and (not missing or (tied and missing == ["lm_head.weight"]))
    tokens, layout = ragged([11])
    logits = model.hidden(tokens, layout) @ model.output_weight.t()
    # transformers computes norms and angles in float32 whatever the model's type
    torch.testing.assert_close(logits, reference(tokens[None]).logits[0], rtol=0, atol=1e-5)


def test_parameters_have_the_names_of_hugging_face():
    names = set(decoder().state_dict())
    assert {"model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight",
            "model.layers.0.mlp.down_proj.weight", "model.layers.0.post_attention_layernorm.weight",
            "model.norm.weight"} <= names
    assert len(names) == 2 * 9 + 3
    tied = decoder(tied=True)
    assert "lm_head.weight" not in tied.state_dict()
    assert tied.output_weight is tied.model.embed_tokens.weight


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=7).filter(any))
def test_a_ragged_pass_equals_sequences_one_by_one(lengths):
    model = decoder()
    tokens, layout = ragged(lengths)
    together = model.hidden(tokens, layout)
    parts = [model.hidden(part, ragged([len(part)])[1]) for part in tokens.split(lengths) if len(part)]
    torch.testing.assert_close(together, torch.cat(parts), rtol=0, atol=1e-12)


def test_gradients_of_a_ragged_pass_equal_those_of_sequences_one_by_one():
    lengths = [3, 9, 4, 17, 1]
    def gradients(passes):
        model = decoder()
        weight = torch.from_numpy(np.random.default_rng(1).normal(size=(sum(lengths), 16)))
        for rows, (tokens, layout) in passes:
            (model.hidden(tokens, layout) * weight[rows]).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    tokens, layout = ragged(lengths)
    ends = np.cumsum(lengths)
    singles = [(slice(e - n, e), (tokens[e - n:e], ragged([n])[1])) for n, e in zip(lengths, ends)]
    whole, parts = gradients([(slice(None), (tokens, layout))]), gradients(singles)
    assert len(layout.blocks) > 1 and whole.keys() == parts.keys()
    for name, g in whole.items():
        torch.testing.assert_close(g, parts[name], rtol=0, atol=1e-12 * float(g.abs().max()) + 1e-13)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_blocks_hold_every_token_once_and_waste_less_than_half(lengths):
    _, layout = ragged(lengths)
    x = torch.arange(sum(lengths))
    parts = [block.unpad(block.pad(x)) for block in layout.blocks]
    assert sorted(torch.cat([*parts, x[:0]]).tolist()) == x.tolist()
    joined = torch.cat(parts)[layout.inverse] if layout.inverse is not None else torch.cat([*parts, x[:0]])
    assert joined.tolist() == x.tolist()
    assert sum(b.rows * b.columns for b in layout.blocks) <= 2 * sum(lengths)
    assert layout.longest == max(lengths)


def test_offsets_of_tokens_refuses_disorder():
    layout = Layout.from_offsets(offsets_of_tokens([0, 0, 1, 2, 2], [0, 1, 0, 0, 1]))
    assert layout.offsets.tolist() == [0, 2, 3, 5] and layout.rows.tolist() == [0, 0, 1, 2, 2]
    assert layout.last.tolist() == [1, 2, 4]
    with pytest.raises(ValueError, match="contiguous"):
        offsets_of_tokens([0, 1, 0], [0, 0, 1])
    with pytest.raises(ValueError, match="count 0, 1, 2"):
        offsets_of_tokens([0, 0], [1, 2])


@pytest.mark.parametrize("lengths", [[5, 5, 5], [3, 9, 1, 6]], ids=["equal", "uneven"])
@pytest.mark.parametrize("heads, kv_heads, tied", [(4, 2, False), (4, 4, True)])
def test_prefill_then_decode_equals_hidden_of_the_whole(lengths, heads, kv_heads, tied):
    model = decoder(heads=heads, kv_heads=kv_heads, tied=tied)
    B, steps = len(lengths), 4
    tokens, layout = ragged(lengths)
    new = torch.from_numpy(np.random.default_rng(5).integers(0, 23, (steps, B)))
    with torch.no_grad():
        hidden, keys, values = model.prefill(tokens, layout)
        assert torch.equal(hidden, model.hidden(tokens, layout))
        cache = model.new_cache(B, max(lengths) + steps)
        cache.write(layout.rows, layout.positions, keys, values)
        positions = torch.tensor(lengths)
        decoded = [model.decode(new[t], positions + t, cache) for t in range(steps)]
        rows = [torch.cat([part, new[:, b]]) for b, part in enumerate(tokens.split(lengths))]
        whole, full = torch.cat(rows), Layout.from_offsets(np.concatenate([[0], np.cumsum([len(r) for r in rows])]))
        expected = model.hidden(whole, full)
        for t in range(steps):
            now = torch.from_numpy(full.offsets[:-1]) + positions + t
            torch.testing.assert_close(decoded[t], expected[now], rtol=0, atol=1e-12)


def first_step(model):
    """Decode one token after an empty row, beside the hidden state of that token alone."""
    with torch.no_grad():
        decoded = model.decode(torch.tensor([7]), torch.tensor([0]), model.new_cache(1, 2))
        return decoded, model.hidden(torch.tensor([7]), Layout.from_offsets([0, 1]))


def test_joined_matrices_are_the_parameters_themselves():
    """Joining moves the weights once, keeps every parameter object, and follows updates in place, also in a copy."""
    model = decoder()
    before, parameters = {n: p.clone() for n, p in model.named_parameters()}, dict(model.named_parameters())
    with torch.inference_mode():
        model.new_cache(1, 2)
    assert all(p is parameters[n] and torch.equal(p, before[n]) for n, p in model.named_parameters())
    places = [p.data_ptr() for p in model.parameters()]
    copied = copy.deepcopy(model)
    for changed in (model, copied):
        with torch.no_grad():
            for p in changed.parameters():
                p.add_(0.1)
        decoded, expected = first_step(changed)
        torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-12)
    assert [p.data_ptr() for p in model.parameters()] == places, "joining again copies nothing"
    hidden = model.hidden(torch.tensor([1, 2]), Layout.from_offsets([0, 2]))
    hidden.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n != "lm_head.weight")


def test_decode_on_some_rows_leaves_the_others_alone():
    model = decoder()
    tokens, layout = ragged([4, 4, 4])
    with torch.no_grad():
        _, keys, values = model.prefill(tokens, layout)
        caches = [model.new_cache(3, 8) for _ in range(2)]
        for cache in caches:
            cache.write(layout.rows, layout.positions, keys, values)
        before = caches[0].keys[0][2].clone()
        all_rows = model.decode(torch.tensor([1, 2, 3]), torch.tensor([4, 4, 4]), caches[1])
        some = model.decode(torch.tensor([1, 2]), torch.tensor([4, 4]), caches[0], rows=slice(0, 2))
    torch.testing.assert_close(some, all_rows[:2], rtol=0, atol=1e-13)
    assert torch.equal(caches[0].keys[0][2], before)


def test_what_a_reused_cache_row_held_before_does_not_matter():
    model = decoder()
    tokens, layout = ragged([3, 6])
    with torch.no_grad():
        _, keys, values = model.prefill(tokens, layout)
        clean, dirty = model.new_cache(2, 10), model.new_cache(2, 10)
        for k, v in zip(dirty.keys, dirty.values):
            k.fill_(7.0)
            v.fill_(-9.0)
        for cache in (clean, dirty):
            cache.write(layout.rows, layout.positions, keys, values)
        a, b = (model.decode(torch.tensor([1, 2]), torch.tensor([3, 6]), cache) for cache in (clean, dirty))
    assert torch.equal(a, b)


def test_gradient_checkpointing_changes_no_gradient():
    tokens, layout = ragged([5, 9])
    found = []
    for on in (False, True):
        model = decoder()
        model.gradient_checkpointing = on
        model.hidden(tokens, layout).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bf16_keeps_parameters_and_angles_exact_and_stays_near_float32():
    exact, half = decoder(precision="float32", positions=4096), decoder(precision="bf16", positions=4096)
    assert {p.dtype for p in half.parameters()} == {torch.float32} and torch.equal(exact._cos, half._cos)
    assert half._cos[4000].ne(half._cos[4001]).all(), "in bfloat16 these positions would coincide"
    tokens, layout = ragged([6, 12])
    with torch.no_grad():
        a, b = exact.hidden(tokens, layout), half.hidden(tokens, layout)
        _, keys, values = half.prefill(tokens, layout)
        cache = half.new_cache(2, 16)
        cache.write(layout.rows, layout.positions, keys, values)
        half.decode(torch.tensor([1, 2]), torch.tensor([6, 12]), cache)
    assert cache.keys[0].dtype == torch.bfloat16
    assert 0 < (a - b).abs().max() < 0.3


def test_a_seed_gives_the_same_weights_in_every_precision_and_touches_no_global_generator():
    state = torch.get_rng_state()
    models = [Decoder(shape(), seed=3, precision=p) for p in ("float32", "float64", "bf16")]
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a.double(), b) and torch.equal(a, c)
    assert not torch.equal(Decoder(shape(), seed=4).lm_head.weight, models[0].lm_head.weight)


def test_too_long_a_sequence_is_refused_by_name():
    tokens, layout = ragged([9])
    with pytest.raises(ConfigError, match=r"9 tokens does not fit the model's 8 positions\n.*policy.max_positions"):
        decoder(positions=8).hidden(tokens, layout)


def test_the_decoder_is_a_cached_language_model():
    assert isinstance(decoder(), CachedLanguageModel)


# ---- a module of the user's own

USER = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self, vocab_size, causal, bias=False, width=8):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab_size, 8), nn.Embedding(32, 8)
        self.rnn = nn.GRU(8, 8, batch_first=True, bidirectional=not causal)
        self.lm_head = nn.Linear(width, vocab_size, bias=bias)

    def forward(self, tokens, positions):
        return self.rnn(self.embed(tokens) + self.place(positions))[0][..., -8:]

def build(vocab_size): return Small(vocab_size, True)
def sees_ahead(vocab_size): return Small(vocab_size, False)
def biased(vocab_size): return Small(vocab_size, True, bias=True)
def too_wide(vocab_size): return Small(vocab_size, True, width=9)
def headless(vocab_size): return nn.Linear(3, 3)
def fails(vocab_size):
    module = Small(vocab_size, True)
    module.place = nn.Embedding(2, 8)
    return module
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text(USER)
    return path


def user_model(file: str):
    return load_user_model(file, 11, seed=1, precision="float32", device=torch.device("cpu"))


def test_a_user_module_gives_hidden_states_of_ragged_tokens(user_file):
    model = user_model(f"{user_file}:build")
    assert isinstance(model, LanguageModel) and not isinstance(model, CachedLanguageModel)
    tokens, layout = torch.arange(9), Layout.from_offsets([0, 4, 4, 9])
    together = model.hidden(tokens, layout)
    parts = [model.module(t[None], torch.arange(len(t))[None])[0] for t in tokens.split([4, 5])]
    torch.testing.assert_close(together, torch.cat(parts), rtol=0, atol=1e-6)
    assert torch.equal(user_model(f"{user_file}:build").output_weight, model.output_weight)


@pytest.mark.parametrize("name, message", [
    ("sees_ahead", "not causal"), ("biased", "with a bias"), ("too_wide", r"width \(8,\), lm_head takes 9"),
    ("headless", "returned Linear with lm_head NoneType"), ("fails", "failed on two short sequences"),
    ("biuld", "no function 'biuld'; did you mean 'build'")])
def test_a_user_module_that_does_not_fit_is_refused(user_file, name, message):
    with pytest.raises(ConfigError, match=message):
        user_model(f"{user_file}:{name}")


def test_a_missing_user_file_is_refused():
    with pytest.raises(ConfigError, match="not FILE.py:NAME of an existing file"):
        user_model("nowhere.py:build")


# ---- the component

def test_derived_sizes():
    model = Torch(hidden_size=128, heads=4, kv_heads=2).load(LoadRequest(vocab_size=512)).model
    assert (model.shape.intermediate_size, model.shape.head_dim) == (352, 32)
    assert model.output_weight.shape == (512, 128)


@pytest.mark.parametrize("fields, message", [
    ({"heads": 3}, "not a multiple of heads 3"), ({"heads": 4, "kv_heads": 3}, "not a multiple of kv_heads 3"),
    ({"layers": 0}, "layers must be at least 1"), ({"hidden_size": 12, "heads": 4, "kv_heads": 4}, "need it even"),
    ({"file": "m.py:build", "gradient_checkpointing": True}, "native transformer")])
def test_impossible_sizes_are_refused_before_anything_is_loaded(fields, message):
    with pytest.raises(ValueError, match=message):
        Torch(**fields)


def test_no_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        Torch().load(LoadRequest(vocab_size=0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(ConfigError, match="finds no CUDA device"):
        Torch(device="cuda").load(LoadRequest(vocab_size=8))
