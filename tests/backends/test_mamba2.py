"""The native Mamba-2 against the recurrence step by step, against transformers, and against itself in other layouts."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from posttrain.data import Prompt, Rollouts, Sampling
from posttrain.errors import ConfigError, MemoryExhausted
from posttrain.protocols import LoadRequest, Optimization, Output
from posttrain.tokenizers import Characters
from posttrain_backends._torch import drawn
from posttrain_backends._torch.generate import TorchSampler
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.learner import TorchLearner
from posttrain_backends._torch.models.decoder import Decoder
from posttrain_backends._torch.models.interface import CachedLanguageModel, RecurrentLanguageModel
from posttrain_backends._torch.models.mamba2 import Mamba2
from posttrain_backends._torch.models.ssd import Packing, ssd
from posttrain_backends._torch.rows import RecomputedRows
from posttrain_backends.engines import Batched
from posttrain_backends.families.mamba2 import Mamba2Shape, config_of, read_shape
from posttrain_backends.families.shape import Shape
from posttrain_backends.ssm import SSM
from posttrain_backends.torch_native import Torch

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
torch.set_num_threads(1)

TOKENIZER = Characters("abcdefgh01+").load()  # pad 0, eos 1, then the alphabet
V = TOKENIZER.vocab_size
SHAPE = Mamba2Shape(vocab_size=V, hidden_size=16, num_hidden_layers=2, num_heads=8, head_dim=4, state_size=6,
                    n_groups=2, chunk_size=5)
KINDS = {
    "plain": SHAPE,
    "one group, biases, tied": replace(SHAPE, n_groups=1, use_bias=True, tie_word_embeddings=True),
    "short kernel, no bias": replace(SHAPE, conv_kernel=2, use_conv_bias=False, chunk_size=256),
    "no window": replace(SHAPE, conv_kernel=1, n_groups=8),
    "bounded steps": replace(SHAPE, time_step_limit=(0.4, 1.5)),
}
LOGPROBS = frozenset({Output.LOGPROBS})


def mamba2(shape: Mamba2Shape = SHAPE, precision: str = "float64", **how) -> Mamba2:
    """A model whose every parameter is noise around what it begins with, large enough that answers differ."""
    model = Mamba2(shape, precision=precision, **how)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def ragged(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, Layout]:
    tokens = torch.from_numpy(np.random.default_rng(seed).integers(0, V, sum(lengths)))
    return tokens, Layout.from_offsets(np.concatenate([[0], np.cumsum(lengths)]))


# ---- the oracles


def literal_hidden(model: Mamba2, tokens: np.ndarray) -> np.ndarray:
    """One sequence, token by token, head by head and channel by channel, from the paper's equations, in float64."""
    w = {name: p.detach().numpy().astype(np.float64) for name, p in model.named_parameters()}
    s = model.shape
    P, N, K, G, I = s.head_dim, s.state_size, s.conv_kernel, s.n_groups, s.inner_size

    def norm(x, weight):
        return x / math.sqrt(np.mean(x * x) + s.layer_norm_epsilon) * weight

    def silu(x):
        return x / (1 + np.exp(-x))

    x = [w["backbone.embeddings.weight"][t] for t in tokens]
    for layer in range(s.num_hidden_layers):
        p = {name.split(f"layers.{layer}.")[1]: a for name, a in w.items() if f"layers.{layer}." in name}
        past = [np.zeros(s.conv_size)] * (K - 1)
        h = np.zeros((s.num_heads, P, N))
        for t, row in enumerate(x):
            projected = p["mixer.in_proj.weight"] @ norm(row, p["norm.weight"]) + p.get("mixer.in_proj.bias", 0)
            z, inputs, dt = projected[:I], projected[I:I + s.conv_size], projected[I + s.conv_size:]
            past = [*past, inputs]
            mixed = sum(p["mixer.conv1d.weight"][:, 0, k] * past[t + k] for k in range(K))
            mixed = silu(mixed + p.get("mixer.conv1d.bias", 0))
            u, B, C = mixed[:I].reshape(-1, P), mixed[I:I + G * N].reshape(G, N), mixed[I + G * N:].reshape(G, N)
            y = np.zeros((s.num_heads, P))
            for head in range(s.num_heads):
                group = head // (s.num_heads // G)
                step = min(max(math.log1p(math.exp(dt[head] + p["mixer.dt_bias"][head])), s.time_step_limit[0]),
                           s.time_step_limit[1])
                a = math.exp(-step * math.exp(p["mixer.A_log"][head]))
                h[head] = a * h[head] + step * np.outer(u[head], B[group])
                y[head] = h[head] @ C[group] + p["mixer.D"][head] * u[head]
            gated = (y.ravel() * silu(z)).reshape(G, -1)
            normed = np.concatenate([norm(part, 1.0) for part in gated]) * p["mixer.norm.weight"]
            x[t] = row + p["mixer.out_proj.weight"] @ normed + p.get("mixer.out_proj.bias", 0)
    return np.array([norm(row, w["backbone.norm_f.weight"]) for row in x])


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_equals_the_literal_reference(kind):
    model = mamba2(KINDS[kind])
    lengths = [7, 1, 12]
    tokens, layout = ragged(lengths)
    wanted = np.concatenate([literal_hidden(model, part.numpy()) for part in tokens.split(lengths)])
    np.testing.assert_allclose(model.hidden(tokens, layout).detach().numpy(), wanted, rtol=1e-11, atol=1e-11)


def literal_ssd(x, log_a, B, C, lengths):
    """y and the last states, a step at a time."""
    ys, states, R = [], [], x.shape[1] // B.shape[1]
    for part in torch.arange(len(x)).split(lengths):
        h = x.new_zeros(x.shape[1], x.shape[2], B.shape[2])
        for t in part:
            b, c = B[t].repeat_interleave(R, 0), C[t].repeat_interleave(R, 0)
            h = log_a[t].exp()[:, None, None] * h + x[t][:, :, None] * b[:, None, :]
            ys.append((h * c[:, None, :]).sum(-1))
        states.append(h)
    return torch.stack(ys), torch.stack(states)


@pytest.mark.oracle
@settings(max_examples=40)
@given(lengths=st.lists(st.integers(1, 15), min_size=1, max_size=6), chunk=st.integers(1, 20),
       heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)]))
def test_chunks_give_the_recurrence_its_last_states_and_its_gradients(lengths, chunk, heads):
    generator, M = torch.Generator().manual_seed(sum(lengths)), sum(lengths)
    def normal(*size):
        return torch.randn(M, *size, generator=generator, dtype=torch.float64)
    given_ = [normal(heads[0], 3), -normal(heads[0]).exp(), normal(heads[1], 5), normal(heads[1], 5)]
    packing = Packing.of(ragged(lengths)[1], chunk, 1, final=True)
    weight, found = normal(heads[0], 3), []
    for form, how in ((ssd, packing), (literal_ssd, lengths)):
        inputs = [v.clone().requires_grad_() for v in given_]
        y, states = form(*inputs, how)
        found.append((y, states, *torch.autograd.grad((y * weight).sum(), inputs)))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-11, atol=1e-11)


def test_decays_are_summed_exactly_where_their_sums_are_large():
    """In a chunk of 512 strong decays float32 would keep two digits of the products of the last few of them."""
    M, generator = 512, torch.Generator().manual_seed(0)
    x, B, C = (torch.randn(M, 1, 4, generator=generator) for _ in range(3))
    log_a = torch.full((M, 1), -0.01)
    log_a[:400] = -100.0
    exact = literal_ssd(*(v.double() for v in (x, log_a, B, C)), [M])[0]
    ours = ssd(x, log_a, B, C, Packing.of(ragged([M])[1], M, 1, final=False))[0]
    assert (ours - exact).abs().max() < 1e-6 * exact.abs().max()


# ---- transformers


def oracle_for(shape: Mamba2Shape):
    """The library, where its model of this shape is that of the paper's authors: old ones norm all groups as one."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

    if shape.n_groups > 1 and "group_size" not in inspect.signature(MambaRMSNormGated).parameters:
        pytest.skip(f"transformers {transformers.__version__} norms all groups of Mamba-2 as one")
    return transformers


def published(shape: Mamba2Shape, **config):
    transformers = oracle_for(shape)
    reference = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**{**config_of(shape), **config}))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return reference


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the library's own
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_transformers_has_equal_logits_and_gradients(kind, tmp_path):
    lengths = [9, 3]
    reference = published(KINDS[kind])
    reference.save_pretrained(tmp_path)
    learner = SSM(weights=str(tmp_path), device="cpu").load(LoadRequest(vocab_size=V, optimization=Optimization()))
    model = learner.model
    assert isinstance(model, Mamba2) and model.shape == KINDS[kind]
    tokens, layout = ragged(lengths)
    ours = model.hidden(tokens, layout) @ model.output_weight.t()
    wanted = torch.cat([reference(part[None]).logits[0] for part in tokens.split(lengths)])
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    for logits in (ours, wanted):
        (logits * weight).mean().backward()
    named = dict(reference.named_parameters())
    assert named.keys() == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, named[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the library's own
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_is_saved(kind, tmp_path):
    transformers = oracle_for(KINDS[kind])
    model = mamba2(KINDS[kind], "float32")
    model.save(tmp_path)
    assert read_shape(tmp_path) == KINDS[kind]
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens, layout = ragged([11])
    with torch.no_grad():
        ours = model.hidden(tokens, layout) @ model.output_weight.t()
        torch.testing.assert_close(ours, reference(tokens[None]).logits[0], rtol=0, atol=1e-5)
    assert reference.config.eos_token_id is None


# ---- packing


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(0, 14), min_size=1, max_size=6).filter(any))
def test_a_ragged_pass_equals_sequences_one_by_one(lengths):
    model = mamba2()
    tokens, layout = ragged(lengths)
    parts = [model.hidden(part, ragged([len(part)])[1]) for part in tokens.split(lengths) if len(part)]
    torch.testing.assert_close(model.hidden(tokens, layout), torch.cat(parts), rtol=0, atol=1e-12)


def test_gradients_of_a_ragged_pass_equal_those_of_sequences_one_by_one():
    lengths, model = [3, 9, 4, 17, 1], mamba2()
    tokens, layout = ragged(lengths)
    weights = [p for n, p in model.named_parameters() if n != "lm_head.weight"]
    whole = torch.autograd.grad(model.hidden(tokens, layout).sin().sum(), weights)
    apart = sum(model.hidden(part, ragged([len(part)])[1]).sin().sum() for part in tokens.split(lengths))
    for a, b in zip(whole, torch.autograd.grad(apart, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_tokens_that_sequences_share_are_computed_in_each():
    model, (tokens, _) = mamba2(), ragged([9])
    shared = Layout.from_offsets([0, 5, 9, 12], cells=np.array([0, 1, 2, 3, 4, 0, 1, 5, 6, 0, 7, 8]))
    apart, layout = tokens[shared.cells], Layout.from_offsets([0, 5, 9, 12])
    wanted = model.hidden(apart, layout)[[0, 1, 2, 3, 4, 7, 8, 10, 11]]
    torch.testing.assert_close(model.hidden(tokens, shared), wanted, rtol=0, atol=1e-12)


def test_nothing_is_read_of_no_tokens():
    assert mamba2().hidden(*ragged([0])).shape == (0, SHAPE.hidden_size)


# ---- decoding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[5, 5, 5], [3, 9, 1, 6]], ids=["equal", "uneven"])
def test_reading_then_steps_equal_hidden_of_the_whole(kind, lengths):
    model = mamba2(KINDS[kind])
    (tokens, layout), steps = ragged(lengths), 4
    new = torch.from_numpy(np.random.default_rng(5).integers(0, V, (steps, len(lengths))))
    with torch.no_grad():
        hidden, cache = model.read(tokens, layout)
        torch.testing.assert_close(hidden, model.hidden(tokens, layout), rtol=0, atol=1e-13)
        decoded = [model.step(row, cache) for row in new]
        rows = [torch.cat([part, new[:, b]]) for b, part in enumerate(tokens.split(lengths))]
        full = Layout.from_offsets(np.concatenate([[0], np.cumsum([len(r) for r in rows])]))
        wanted = model.hidden(torch.cat(rows), full)
    for t in range(steps):
        now = torch.from_numpy(full.offsets[:-1]) + torch.tensor(lengths) + t
        torch.testing.assert_close(decoded[t], wanted[now], rtol=0, atol=1e-12)


def test_steps_from_nothing_equal_hidden():
    model, (tokens, layout) = mamba2(), ragged([8])
    with torch.no_grad():
        cache = model.new_states(1)
        steps = torch.cat([model.step(token[None], cache) for token in tokens])
        torch.testing.assert_close(steps, model.hidden(tokens, layout), rtol=0, atol=1e-12)


def test_a_step_of_some_rows_leaves_the_others_alone():
    model, (tokens, layout) = mamba2(), ragged([4, 4, 4])
    with torch.no_grad():
        (_, some), (_, every) = (model.read(tokens, layout) for _ in range(2))
        kept = [x[2].clone() for x in some.tensors]
        a = model.step(torch.tensor([1, 2]), some, slice(0, 2))
        b = model.step(torch.tensor([1, 2, 3]), every)
    torch.testing.assert_close(a, b[:2], rtol=0, atol=1e-13)
    assert all(torch.equal(x[2], before) for x, before in zip(some.tensors, kept, strict=True))


def test_what_is_kept_of_a_text_has_one_size():
    """A transformer's grows with every token."""
    model = mamba2(precision="float32")
    decoder = Decoder(Shape(vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                            num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=512))
    kept, cached = [], []
    for T in (1, 32, 512):
        with torch.no_grad():
            kept.append(sum(x.nbytes for x in model.read(*ragged([T]))[1].tensors))
            _, keys, values = decoder.prefill(*ragged([T]))
            cached.append(sum(x.nbytes for x in (*keys, *values)))
    assert kept == [sum(x.nbytes for x in model.new_states(1).tensors)] * 3
    assert cached == [T * cached[0] for T in (1, 32, 512)]


# ---- the engine


def groups(texts: list[str], size: int) -> list[Prompt]:
    return [Prompt(text=t, group=i) for i, t in enumerate(texts) for _ in range(size)]


PROMPTS = groups(["a", "0+1", "abcdefgh", "hh", "1+0+1"], 4)
PLAIN = Sampling(max_new_tokens=20)


def rollout(model: Mamba2, engine: Batched, sampling: Sampling = PLAIN) -> Rollouts:
    return engine.start(TorchLearner(model), TOKENIZER, shared=True).rollout(PROMPTS, sampling, (0,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_generated_logprobs_equal_scored_ones(kind, temperature):
    model = mamba2(KINDS[kind], "float32")
    rollouts = rollout(model, Batched(slots=3), Sampling(temperature=temperature, max_new_tokens=20))
    scored = TorchLearner(model).score(rollouts, LOGPROBS, temperature)
    assert len(rollouts.source) > 100 and rollouts.behavior_logprobs.min() < -2
    np.testing.assert_allclose(rollouts.behavior_logprobs, scored.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", [Batched(slots=1), Batched(slots=3), Batched(slots=4, prefill_tokens=1),
                                    Batched(cache_tokens=1)], ids=str)
def test_states_give_the_answers_that_reading_all_anew_gives(engine, monkeypatch):
    model = mamba2()
    ours = rollout(model, engine)
    monkeypatch.setattr(drawn, "rows_for", RecomputedRows)
    wanted = rollout(model, Batched())
    np.testing.assert_array_equal(ours.tokens, wanted.tokens)
    np.testing.assert_allclose(ours.behavior_logprobs, wanted.behavior_logprobs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine, together", [(Batched(), 5), (Batched(slots=2), 2), (Batched(slots=1), 1)], ids=str)
def test_a_prompt_is_read_once_and_no_more_wait_than_there_are_rows(engine, together, monkeypatch):
    read, seen = Mamba2.read, []
    monkeypatch.setattr(Mamba2, "read", lambda *given: seen.append(len(given[2].last)) or read(*given))
    sampler = engine.start(TorchLearner(mamba2()), TOKENIZER, shared=True)
    sampler.rollout(PROMPTS, Sampling(max_new_tokens=4), (0,))
    assert sum(seen) == 5 and max(seen) == together
    assert isinstance(sampler, TorchSampler) and sampler.usage.prompt_tokens == sum(map(len, {p.text for p in PROMPTS}))


def test_the_limit_of_keys_and_values_limits_no_states():
    sampler = Batched(cache_tokens=1).start(TorchLearner(mamba2()), TOKENIZER, shared=True)
    sampler.rollout(PROMPTS, Sampling(max_new_tokens=4), (0,))
    assert isinstance(sampler, TorchSampler) and sampler.usage.slots == len(PROMPTS)


def test_fewer_rows_are_decoded_where_states_do_not_fit(monkeypatch):
    new_states, asked = Mamba2.new_states, []

    def scarce(self, rows):
        asked.append(rows)
        if rows > 4:
            raise MemoryExhausted("no room")
        return new_states(self, rows)
    monkeypatch.setattr(Mamba2, "new_states", scarce)
    found = rollout(mamba2(), Batched())
    monkeypatch.setattr(Mamba2, "new_states", new_states)
    np.testing.assert_array_equal(found.tokens, rollout(mamba2(), Batched()).tokens)
    assert asked == [20, 10, 5, 2]


# ---- the model


def test_it_is_recurrent_and_has_no_keys():
    assert isinstance(mamba2(), RecurrentLanguageModel) and not isinstance(mamba2(), CachedLanguageModel)
    assert not isinstance(Decoder(Shape(V, 8, 8, 1, 1, 1, 8, 8)), RecurrentLanguageModel)
    assert mamba2().max_positions is None and not mamba2().shares_prompts


def test_gradient_checkpointing_changes_no_gradient():
    found = []
    for on in (False, True):
        model = mamba2(gradient_checkpointing=on)
        model.hidden(*ragged([5, 9])).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) > 10 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bf16_keeps_parameters_and_states_in_float32_and_stays_near_it():
    exact, half = mamba2(precision="float32"), mamba2(precision="bf16")
    tokens, layout = ragged([6, 12])
    with torch.no_grad():
        a, (b, cache) = exact.hidden(tokens, layout), half.read(tokens, layout)
        step = half.step(torch.tensor([1, 2]), cache)
    assert {p.dtype for p in half.parameters()} | {x.dtype for x in cache.tensors} == {torch.float32}
    assert 0 < (a - b).abs().max() < 0.3 and step.dtype == b.dtype
    rollouts = rollout(half, Batched())
    scored = TorchLearner(half).score(rollouts, LOGPROBS, 1.0)
    assert np.abs(rollouts.behavior_logprobs - scored.logprobs).max() < 0.1


def test_a_new_model_begins_with_steps_and_decays_in_their_bounds():
    state = torch.get_rng_state()
    models = [Mamba2(SHAPE, seed=3, precision=p) for p in ("float32", "float64", "bf16")]
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a.double(), b) and torch.equal(a, c)
    assert not torch.equal(Mamba2(SHAPE, seed=4).lm_head.weight, models[0].lm_head.weight)
    for layer in models[1].backbone.layers:
        steps = torch.nn.functional.softplus(layer.mixer.dt_bias)
        assert steps.min() > 0.99e-3 and steps.max() < 0.101
        assert layer.mixer.A_log.exp().min() >= 1 and layer.mixer.A_log.exp().max() <= 16.001
        assert (layer.mixer.D == 1).all() and (layer.mixer.conv1d.bias == 0).all()


# ---- what is refused


@pytest.mark.parametrize("fields, says", [
    ({"layers": 0}, "layers must be at least 1, got 0"),
    ({"head_chunk": -1}, "head_chunk must not be negative"),
    ({"hidden_size": 10, "head_dim": 8}, "20, not a multiple of head_dim 8: take one of its divisors 1, 2, 4, 5, 10"),
    ({"groups": 3}, r"the 8 heads \(expand \* hidden_size / head_dim\) are not a multiple of groups 3")], ids=str)
def test_sizes_that_do_not_fit_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        SSM(**fields)


def load(folder: Path, vocab_size: int = V):
    return SSM(weights=str(folder), device="cpu").load(LoadRequest(vocab_size=vocab_size))


@pytest.mark.parametrize("said, says", [
    ({"model_type": "mamba"}, "model_type is 'mamba'; native is 'mamba2'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; native is 'silu'"),
    ({"quantization_config": {}}, "quantised"),
    ({"state_size": None}, "it does not say state_size"),
    ({"n_groups": 3}, "num_heads 8 is not a multiple of n_groups 3"),
    ({"head_dim": 5}, r"num_heads \* head_dim is 40, not a multiple of hidden_size 16")], ids=str)
def test_another_model_is_refused_by_what_it_says(said, says, tmp_path):
    mamba2().save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))
    with pytest.raises(ConfigError, match=says) as caught:
        load(tmp_path)
    assert f"{{use: hf, weights: {tmp_path}}}" in str(caught.value)


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def untied(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))


@pytest.mark.parametrize("spoil, vocab_size, says", [
    (without_config, V, r"holds no config.json\n.*Mamba-2 model \(use: ssm\)"),
    (untied, V, "lm_head.weight and backbone.embeddings.weight differ"),
    (lambda folder: None, V + 1, f"has a vocabulary of {V}, the tokenizer needs {V + 1}")])
def test_folders_that_do_not_fit_are_refused(spoil: Callable[[Path], None], vocab_size, says, tmp_path):
    mamba2().save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, vocab_size)


def test_a_new_model_needs_a_vocabulary():
    with pytest.raises(ConfigError, match="a new ssm model needs a tokenizer with a vocabulary"):
        SSM(device="cpu").load(LoadRequest(vocab_size=0))


def test_the_transformer_s_backend_points_here(tmp_path):
    mamba2().save(tmp_path)
    with pytest.raises(ConfigError, match=r"use: ssm, weights"):
        Torch(weights=str(tmp_path), device="cpu").load(LoadRequest(vocab_size=V))
