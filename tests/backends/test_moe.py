"""Mixtures of experts in the native decoder: equal to transformers and to a plain loop, drawn from and replayed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers")

import exchange  # after the check that the library is there
import posttrain
from exchange import (
    LENGTHS,
    SIZES,
    TOKENIZER,
    V,
    native,
    our_logits,
    ragged,
    randomise,
    require_equal_logits_and_gradients,
    their_logits,
    written,
)
from mixtures import LOGPROBS, PROMPTS, Ascent, balanced, chosen, elsewhere, recorded_by, step_of
from posttrain.data import Prompt, Rollouts, Sampling
from posttrain.errors import ConfigError
from posttrain.protocols import LoadRequest, Optimization, Output
from posttrain.replay import Replay, from_files, to_files
from posttrain.testing import BackendContract
from posttrain.testing.tiny_models import step_data
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models import mixture
from posttrain_backends._torch.models.mixture import MixtureWeights, Routes
from posttrain_backends.engines import Batched
from posttrain_backends.families.config import read_shape
from posttrain_backends.torch_native import Torch
from safetensors.torch import load_file

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the libraries' own

ROWS = Path(__file__).parents[1] / "integration" / "data" / "rows.jsonl"
TOP_2 = {"num_experts_per_tok": 2}
QWEN = {**TOP_2, "num_experts": 6, "moe_intermediate_size": 24}
KINDS = {
    "mixtral": ("mixtral", {**TOP_2, "num_local_experts": 5}),
    "mixtral, odd sizes": ("mixtral", {**TOP_2, "num_local_experts": 3, "intermediate_size": 19,
                                       "tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {**QWEN, "head_dim": 12, "norm_topk_prob": True}),
    "qwen3_moe, dense layers": ("qwen3_moe", {**QWEN, "num_hidden_layers": 4, "decoder_sparse_step": 2,
                                              "mlp_only_layers": [1], "num_experts_per_tok": 3}),
    "qwen2_moe": ("qwen2_moe", {**QWEN, "shared_expert_intermediate_size": 40}),
}
NEW = {"family": "qwen3_moe", "experts": 4, "hidden_size": 16, "layers": 2, "heads": 2, "kv_heads": 1,
       "max_positions": 64, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """name -> a folder that transformers wrote, made once."""
    return cache(lambda name: written(tmp_path_factory.mktemp("model"), *KINDS[name]))


def library(path: Path):
    """Its experts one after the other, as it has them without grouped products."""
    model = exchange.library(path)
    model.set_experts_implementation("eager")
    return model


# ---- exchanged with transformers


@pytest.mark.oracle
@pytest.mark.parametrize("name", KINDS)
def test_logits_and_gradients_equal_those_of_transformers(name, folder):
    require_equal_logits_and_gradients(native(folder(name)).model.requires_grad_(), library(folder(name)))


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_folder_is_the_same_family_with_equal_logits(name, folder, tmp_path):
    model = native(folder(name)).model
    model.save(tmp_path)
    first, second = (transformers.AutoConfig.from_pretrained(path).to_dict() for path in (folder(name), tmp_path))
    others = {"_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "head_dim", "decoder_sparse_step",
              "mlp_only_layers"}
    assert {key: second[key] for key in first.keys() - others} == {key: first[key] for key in first.keys() - others}
    assert read_shape(tmp_path) == read_shape(folder(name))
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folder(name) / "model.safetensors").keys()
    with torch.no_grad():
        torch.testing.assert_close(their_logits(library(tmp_path)), our_logits(model), rtol=0, atol=1e-5)


def test_weights_stream_under_the_names_of_files_and_are_live(folder):
    """Both experts' names and their joined storage: what is written into the stream's arrays is the model's."""
    learner, other = native(folder("mixtral")), native(folder("mixtral"))
    assert {name for name, _ in learner.params()} == load_file(folder("mixtral") / "model.safetensors").keys()
    before = our_logits(learner.model)
    with torch.no_grad():
        for _, x in learner.params():
            x.mul_(1.1)
    assert not torch.allclose(our_logits(learner.model), before)
    other.load_params(learner.params(), 1)
    assert torch.equal(our_logits(other.model), our_logits(learner.model))


@pytest.mark.parametrize("name", KINDS)
def test_recorded_log_probs_of_drawn_tokens_equal_scored_ones(name, folder):
    """With shared prompts, uneven rows, and again after the weights were changed in place."""
    learner = native(folder(name))
    sampler = Batched(slots=4).start(learner, TOKENIZER, shared=True)
    prompts = [Prompt(text=t, group=i) for i, t in enumerate(["abc", "0+1", "hgfedcba"]) for _ in range(3)]
    for i in range(2):
        drawn = sampler.rollout(prompts, Sampling(max_new_tokens=9), (0, i))
        scored = learner.score(drawn, LOGPROBS, 1.0).logprobs
        np.testing.assert_allclose(drawn.behavior_logprobs, scored, rtol=0, atol=1e-5)
        with torch.no_grad():
            for p in learner.model.parameters():
                p.mul_(0.9).add_(0.02)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_bf16_computes_near_float32_and_decodes_what_it_reads(name, folder):
    """Prefill and decoding route near ties apart: most tokens agree, and no loss of precision makes all differ."""
    exact, half = native(folder(name)).model, native(folder(name), precision="bf16").model
    tokens, layout = ragged()
    last = torch.from_numpy(layout.offsets[1:]) - 1
    with torch.no_grad():
        expected = exact.hidden(tokens, layout)
        hidden, keys, values = half.prefill(tokens, layout)
        cache = half.new_cache(len(LENGTHS), 64)
        cache.write(layout.rows, layout.positions, keys, values)
        decoded = half.decode(tokens[last], torch.tensor(LENGTHS) - 1, cache)
    for found, wanted in ((hidden, expected), (decoded, expected[last])):
        assert 0 < (found - wanted).abs().median() < 0.05 * wanted.abs().mean()


@pytest.mark.parametrize("name, changes, said", [
    ("mixtral", {**TOP_2, "router_jitter_noise": 0.1}, "router_jitter_noise is 0.1; native is 0.0"),
    ("mixtral", {**TOP_2, "sliding_window": 16}, "sliding_window is 16"),
    ("mixtral", {**TOP_2, "num_experts_per_tok": 6}, "num_experts_per_tok is 6, of 5 experts"),
    ("qwen2_moe", {"qkv_bias": False}, "qkv_bias is False; native is True"),
    ("qwen2_moe", {"layer_types": None, "use_sliding_window": True, "sliding_window": 16}, "sliding_window is 16"),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 16}, "sliding_window is 16")])
def test_another_mixture_is_refused(name, changes, said, folder, tmp_path):
    config = json.loads((folder(name) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ConfigError, match=rf"{said}(.|\n)*Take {{use: hf"):
        native(tmp_path)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_silence_means_what_it_means_to_transformers(kind, tmp_path):
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                         "num_attention_heads", "max_position_embeddings")}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **sizes}))
    shape, theirs = read_shape(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
    for name in ("num_key_value_heads", "tie_word_embeddings", "rms_norm_eps", "num_experts", "num_experts_per_tok"):
        assert getattr(shape, name) == getattr(theirs, name), name
    for name in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        assert getattr(shape, name) == getattr(theirs, name, 0), name
    assert shape.rope_theta == theirs.rope_parameters["rope_theta"] and shape.head_dim == 8
    assert shape.normalises_experts == getattr(theirs, "norm_topk_prob", True)


# ---- the sum over experts


def literal(x, router, gate_up, down, k, normalised, ids=None) -> torch.Tensor:
    """One token and one expert after the other (1701.06538, eq. 1)."""
    rows = []
    for m, token in enumerate(x):
        scores = (router @ token).softmax(0)
        chosen = scores.sort(descending=True, stable=True).indices[:k] if ids is None else ids[m]
        weights = scores[chosen] / (scores[chosen].sum() if normalised else 1)
        gates = [(gate_up[e] @ token).chunk(2) for e in chosen]
        rows.append(sum(w * (down[e] @ (F.silu(g) * u)) for w, e, (g, u) in zip(weights, chosen, gates, strict=True)))
    return torch.stack(rows)


def some_mixture(dtype=torch.float64, E=5, H=16, I=8, M=23) -> tuple[torch.Tensor, ...]:
    """x, router, gate_up, down; the last expert is chosen by no token."""
    generator = torch.Generator().manual_seed(3)
    x, router, gate_up, down = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in (
        (M, H), (E, H), (E, 2 * I, H), (E, H, I)))
    x[:, 0], router[-1] = 9.0, 0.0
    router[:-1, 0] = 5.0
    return tuple(t.requires_grad_() for t in (x, router, gate_up, down))


@pytest.mark.oracle
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_mixture_is_the_literal_sum(k, normalised):
    x, *weights = some_mixture()
    routes = Routes()
    found = MixtureWeights(0, *weights, k, normalised)(x, routes)
    expected = literal(x, *weights, k, normalised)
    assert not (routes.chosen[0] == 4).any()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    away = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    mine, theirs = (torch.autograd.grad((y * away).sum(), (x, *weights)) for y in (found, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_products_in_groups_equal_one_after_the_other(monkeypatch):
    x, *weights = some_mixture(torch.float32)
    assert mixture.multiplies_in_groups(x, weights[1]) and mixture.multiplies_in_groups(x, weights[2])
    found = []
    for grouped in (True, False):
        if not grouped:
            monkeypatch.setattr(mixture, "multiplies_in_groups", lambda x, weight: False)
        y = MixtureWeights(0, *weights, 2, True)(x, Routes())
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, *weights))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype, K, N, grouped", [
    (torch.float32, 8, 4, True), (torch.float32, 8, 6, False), (torch.float32, 6, 8, False),
    (torch.bfloat16, 8, 16, True), (torch.bfloat16, 8, 4, False), (torch.float64, 8, 8, False)])
def test_groups_are_used_where_torch_has_them(dtype, K, N, grouped):
    x, weight = torch.ones(5, K, dtype=dtype), torch.ones(2, N, K, dtype=dtype)
    assert mixture.multiplies_in_groups(x, weight) == grouped
    made = mixture.grouped_linear(x, weight, torch.tensor([2, 3]))
    assert made.dtype == dtype and torch.equal(made, torch.full((5, N), float(K), dtype=dtype))


@pytest.mark.oracle
def test_replayed_experts_are_weighed_by_the_router_of_now():
    """Ids are those given, the rest those of the router; the router of replayed experts has its whole gradient."""
    x, *weights = some_mixture()
    given = torch.tensor([[4, 0]]).repeat(len(x), 1)
    given[3:5] = -1
    routes = Routes({0: given})
    found = MixtureWeights(0, *weights, 2, True)(x, routes)
    free = Routes()
    MixtureWeights(0, *weights, 2, True)(x, free)
    assert torch.equal(routes.chosen[0][3:5], free.chosen[0][3:5])
    assert torch.equal(routes.chosen[0][5:], given[5:])
    expected = literal(x, *weights, 2, True, routes.chosen[0])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    mine, theirs = (torch.autograd.grad(y.sum(), weights[0])[0] for y in (found, expected))
    assert mine.abs().max() > 1e-3
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


# ---- routes from the sampler to the learner


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe, dense layers"])
def test_the_sampler_records_the_experts_of_every_token_but_the_last(name, folder):
    learner = native(folder(name))
    drawn = recorded_by(learner)
    last = drawn.offsets[1:] - 1
    shape = learner.model.shape
    assert len(set(np.diff(drawn.offsets))) > 3 and drawn.routes.dtype == np.uint8
    assert drawn.routes.shape == (len(drawn.tokens), len(learner.model.mixtures), shape.num_experts_per_tok)
    assert (drawn.routes[last] == 255).all()
    read = np.setdiff1d(np.arange(len(drawn.tokens)), last)
    assert drawn.routes[read].max() == shape.num_experts - 1
    np.testing.assert_array_equal(drawn.routes[read], chosen(learner, drawn)[read])
    for fields in ({"slots": 0}, {"slots": 1}, {"prefill_tokens": 8192}):
        np.testing.assert_array_equal(recorded_by(learner, **fields).routes, drawn.routes)


@pytest.mark.parametrize("experts, dtype, free", [
    (254, np.uint8, 255), (255, np.uint16, 65535), (300, np.uint16, 65535)])
def test_routes_are_stored_small_and_come_back(experts, dtype, free):
    ids = torch.tensor([[[0, experts - 1]], [[-1, -1]]])
    stored = mixture.recorded(ids.short(), experts)
    assert stored.dtype == dtype and stored.tolist() == [[[0, experts - 1]], [[free, free]]]
    scores = torch.linspace(0, 1, experts).repeat(2, 1)
    routes = Routes(mixture.replayed(stored, (3,), experts, 2, torch.device("cpu")))
    again = routes.of(3, scores, scores.topk(2).indices)
    assert again.tolist() == [[0, experts - 1], [experts - 1, experts - 2]]
    for other in ({"layers": (3, 4)}, {"k": 1}, {"experts": experts - 1}):
        given = {"layers": (3,), "experts": experts, "k": 2, "device": torch.device("cpu"), **other}
        with pytest.raises(ConfigError, match=r"hold 2 experts a token in 1 layers(.|\n)*policy's own model"):
            mixture.replayed(stored, **given)


def test_scoring_replays_what_was_recorded(folder):
    """Equal to the sampler with its routes, apart from it with others, and by its own router without."""
    learner = native(folder("mixtral"))
    drawn = recorded_by(learner)
    def logprobs(rollouts):
        return learner.score(rollouts, LOGPROBS, 1.0).logprobs
    np.testing.assert_allclose(logprobs(drawn), drawn.behavior_logprobs, rtol=0, atol=1e-5)
    moved = elsewhere(drawn, 5)
    assert np.abs(logprobs(moved) - drawn.behavior_logprobs).max() > 0.1
    np.testing.assert_allclose(logprobs(replace(drawn, routes=None)), logprobs(drawn), rtol=0, atol=1e-5)
    order = np.array([7, 0, 4])
    np.testing.assert_allclose(logprobs(moved.select(order)), np.concatenate([
        logprobs(moved)[moved.action_episode == e] for e in order]), rtol=0, atol=1e-5)
    assert (Rollouts.concat([moved.select(order), drawn]).routes[-len(drawn.tokens):] == drawn.routes).all()


def test_equal_prompts_with_other_routes_are_computed_apart(folder):
    learner = native(folder("mixtral"))
    drawn = recorded_by(learner)
    both = Rollouts.concat([drawn, elsewhere(drawn, 5)])
    apart = [learner.score(part, LOGPROBS, 1.0).logprobs for part in (drawn, elsewhere(drawn, 5))]
    np.testing.assert_allclose(learner.score(both, LOGPROBS, 1.0).logprobs, np.concatenate(apart), rtol=0, atol=1e-5)


TRAINED = {**NEW, "precision": "float64"}


def trained(**fields):
    learner = Torch(**{**TRAINED, **fields}).load(LoadRequest(V, seed=1, optimization=Optimization(lr=0.1)))
    randomise(learner.model)
    return learner


def test_training_replays_in_every_split_and_when_layers_are_computed_anew():
    drawn = recorded_by(trained())
    moved = elsewhere(drawn, 4)
    data = step_data(moved)
    whole, measured = step_of(trained(), data)
    free, _ = step_of(trained(), replace(data, rollouts=replace(drawn, routes=None)))
    router = "model.layers.1.mlp.gate.weight"
    assert np.abs(whole[router]).max() > 1e-6 and np.abs(whole[router] - free[router]).max() > 1e-3
    for fields, parts in (({}, [[0, 5], [1, 2, 3], [], [8, 7, 6, 4]]), ({"gradient_checkpointing": True}, None)):
        found, again = step_of(trained(**fields), data, parts)
        for name, g in found.items():
            np.testing.assert_allclose(g, whole[name], rtol=0, atol=1e-11, err_msg=name)
        assert {n: x for n, x in again.items() if "experts/" in n} == {
            n: x for n, x in measured.items() if "experts/" in n}


def test_a_step_reports_the_load_of_the_experts_that_were_used():
    """Counted by hand: every given token that is read, shared prompts once for each answer."""
    learner = trained()
    moved = elsewhere(recorded_by(learner), 4)
    data = replace(step_data(moved), keep=np.ones(int(moved.is_action.sum()), bool))
    measured = step_of(learner, data)[1]
    read = np.setdiff1d(np.arange(len(moved.tokens)), moved.offsets[1:] - 1)
    share = np.stack([np.bincount(moved.routes[read, i].ravel(), minlength=4) for i in range(2)]) / (2 * len(read))
    assert measured["experts/largest_share"] == pytest.approx(share.max(axis=1).mean())
    assert measured["experts/smallest_share"] == pytest.approx(share.min(axis=1).mean())
    assert measured["experts/entropy"] == pytest.approx(-(share * np.log(share)).sum(axis=1).mean())
    assert not any("experts/" in name for name in learner.apply().values_by_name())


# ---- an even load


@pytest.mark.oracle
def test_the_loss_is_that_of_the_switch_transformer(monkeypatch):
    """The literal formula over whole sequences, each computed alone: value, and the step of every parameter."""
    ours, theirs = trained(), trained()
    moved = elsewhere(recorded_by(ours), 4)
    keep = np.random.default_rng(0).random(int(moved.is_action.sum())) < 0.6
    monkeypatch.setattr(ours, "_optimizer", Ascent(ours._parameters))
    measured = balanced(moved, 10**6, ours, keep=keep)
    scores: list[torch.Tensor] = []
    real = mixture.router_scores
    monkeypatch.setattr(mixture, "router_scores", lambda x, router: scores.append(real(x, router)) or scores[-1])
    ids = torch.from_numpy(moved.routes.astype(np.int64))
    ids[ids == 255] = -1
    theirs.model.hidden(torch.from_numpy(moved.tokens).long(), Layout.from_offsets(moved.offsets),
                        Routes(dict(enumerate(ids.unbind(1)))))
    read, kept = np.zeros(len(moved.tokens), bool), moved.source[keep]
    for a, b in zip(moved.offsets[:-1], moved.offsets[1:], strict=True):
        last = max((s for s in kept if a <= s < b), default=a)
        read[a:last] = True
    total = sum(4 * sum((ids[read, layer] == e).double().mean() * p[read, e].mean() for e in range(4))
                for layer, p in enumerate(scores)) / 2
    (0.7 * total).backward()
    assert measured["loss/expert_balance"] == pytest.approx(total.item(), rel=1e-12) and abs(total - 1) > 0.01
    for name, p in theirs.model.named_parameters():
        expected = np.zeros(p.shape) if p.grad is None else p.grad.numpy()
        np.testing.assert_allclose(ours._optimizer.seen[name], expected, rtol=1e-9, atol=1e-12, err_msg=name)
    assert max(np.abs(x).max() for name, x in ours._optimizer.seen.items() if "gate.weight" in name) > 1e-3


@pytest.mark.oracle
def test_the_loss_equals_that_of_transformers():
    """Over one layer; theirs counts the k experts of a token k times."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    scores, k = logits.softmax(-1), 3
    chosen = scores.topk(k).indices
    load = torch.bincount(chosen.flatten(), minlength=6) / chosen.numel()
    routes = Routes(load={0: load})
    routes.of(0, scores, chosen)
    found, expected = 6 * routes.agreement[0].mean(), load_balancing_loss_func((logits,), 6, k) / k
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(x, logits, retain_graph=True) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fields", [{}, {"gradient_checkpointing": True}, {"family": "qwen2_moe"}])
def test_an_even_load_is_sought_alike_in_every_split(fields, monkeypatch):
    found = []
    for tokens in (10**6, 30, 1):
        learner = trained(**fields)
        moved = elsewhere(recorded_by(trained(**fields)), 4)
        monkeypatch.setattr(learner, "_optimizer", Ascent(learner._parameters))
        measured = balanced(moved, tokens, learner)
        found.append((measured["loss/expert_balance"], measured["batch/parts"], learner._optimizer.seen))
    (total, _, whole), *others = found
    assert found[0][1] == 1 and others[-1][1] == len(PROMPTS)
    for other, _, gradients in others:
        assert other == pytest.approx(total, rel=1e-12)
        for name, g in gradients.items():
            np.testing.assert_allclose(g, whole[name], rtol=0, atol=1e-12, err_msg=name)


def test_an_uneven_load_becomes_even():
    """By the loss alone, routes drawn anew for each step."""
    learner = Torch(**{**NEW, "layers": 1}).load(LoadRequest(V, seed=1, optimization=Optimization(lr=0.02)))
    with torch.no_grad():  # all tokens have a direction in common, along which the first expert looks
        learner.model.model.embed_tokens.weight.add_(0.02)
        learner.model.model.layers[0].mlp.gate.weight[0] = 0.1
    largest = [balanced(recorded_by(learner), 10**6, learner, 1.0)["experts/largest_share"] for _ in range(40)]
    assert largest[0] > 0.4 and np.mean(largest[-5:]) < largest[0] - 0.08


def test_what_has_no_load_is_refused(tmp_path):
    learner, dense = trained(), Torch(**{**NEW, "family": "llama", "experts": 0}).load(
        LoadRequest(V, optimization=Optimization()))
    drawn = recorded_by(learner)
    with pytest.raises(ConfigError, match=r"expert_balance_coef: the engine records no experts(.|\n)*engine: batched"):
        balanced(replace(drawn, routes=None), 100, learner)
    with pytest.raises(ConfigError, match="gives no expert_load .*no load of a mixture of experts"):
        balanced(drawn, 100, dense)
    with pytest.raises(ConfigError, match="gives no expert_load"):
        learner.score(drawn, frozenset({Output.EXPERT_LOAD}), 1.0)
    config = {"recipe": "grpo", "steps": 1, "policy": "torch", "rewards": {"length": lambda completions, **_: [
        float(len(c)) for c in completions]}, "update": {"expert_balance_coef": 0.1}, "run": str(tmp_path / "run"),
        "task": {"use": "rows", "path": str(ROWS)}, "tokenizer": {"use": "characters", "alphabet": "0123456789+="}}
    with pytest.raises(ConfigError, match="evens out the load of experts, of which backend 'torch' gives none; use "):
        posttrain.train(config)


def test_a_run_trains_a_mixture_from_a_configuration(tmp_path):
    def digits(completions, **_):
        return [sum(x.isdigit() for x in c) / 4 for c in completions]
    posttrain.train({
        "recipe": "grpo", "steps": 12, "threads": 1, "run": str(tmp_path / "run"), "seed": 7,
        "policy": {"use": "moe", "experts": 4, "hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1,
                   "max_positions": 32, "device": "cpu"},
        "tokenizer": {"use": "characters", "alphabet": "0123456789+="}, "task": {"use": "rows", "path": str(ROWS)},
        "rewards": {"digits": digits}, "update": {"expert_balance_coef": 0.01, "steps_per_rollout": 2},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 4}, "optimizer": {"lr": 1e-2},
        "trackers": {"console": None, "jsonl": None}})
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0.25 <= s["experts/largest_share"] <= 0.5 and 0.9 < s["loss/expert_balance"] < 4 for s in steps)
    assert all(s["sampler/gap_max"] < 1e-5 for s in steps)
    rewards = [s["reward/mean"] for s in steps]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1


def test_replayed_rollouts_go_to_disk_with_their_routes(folder):
    drawn = recorded_by(native(folder("mixtral")))
    arrays, values = to_files(Replay(drawn, np.zeros(drawn.n_episodes, np.int64)))
    again = from_files(arrays, json.loads(json.dumps(values))).rollouts
    assert again.routes.dtype == np.uint8 and np.array_equal(again.routes, drawn.routes)


def test_a_layer_that_is_computed_anew_keeps_its_experts():
    """Also where its input is rounded otherwise, as on a GPU."""
    routes, scores = Routes({1: torch.tensor([[-1], [0]])}), torch.tensor([[0.2, 0.8], [0.3, 0.7]])
    first, other = torch.tensor([[1], [1]]), torch.tensor([[0], [0]])
    assert routes.of(1, scores, first).tolist() == routes.of(1, 1 - scores, other).tolist() == [[1], [0]]
    assert routes.of(0, scores, first).tolist() == [[1], [1]]


# ---- new models


@pytest.mark.parametrize("fields", [{}, {"family": "qwen2_moe", "shared_expert_size": 8},
                                    {"normalise_experts": False, "experts_per_token": 3, "expert_size": 20}])
def test_a_new_mixture_loads_in_transformers(fields, tmp_path):
    model = Torch(**{**NEW, **fields}).load(LoadRequest(V, seed=1)).model
    randomise(model)
    model.save(tmp_path)
    theirs = library(tmp_path)
    assert theirs.config.model_type == fields.get("family", "qwen3_moe")
    with torch.no_grad():
        torch.testing.assert_close(their_logits(theirs), our_logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fields, said", [
    ({"experts": 0}, "experts_per_token is 2, of 0 experts"), ({"experts_per_token": 5}, "is 5, of 4 experts"),
    ({"experts": -1}, "must not be negative"), ({"family": "llama"}, "a llama has no experts; set family to qwen2_moe"),
    ({"shared_expert_size": 8}, "a qwen3_moe has no shared expert; set family to qwen2_moe")])
def test_sizes_that_make_no_mixture_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Torch(**{**NEW, **fields})


SMALL = {**NEW, "hidden_size": 8, "layers": 1, "intermediate_size": 8, "max_positions": 32}


class TestMoE(BackendContract):
    # In float32 all experts: over the steps of its differences a choice of some would change, and the loss jump.
    components = (Torch(**{**SMALL, "experts_per_token": 4}),
                  Torch(**{**SMALL, "family": "qwen2_moe", "precision": "float64", "gradient_checkpointing": True}))

    def reloaded(self, component: Torch, folder: Path) -> Torch:
        return Torch(weights=str(folder), device="cpu", precision=component.precision)
