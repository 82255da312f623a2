"""Mixtures of experts of transformers in the backend `hf`: recorded, replayed, balanced, and exchanged with ours."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers")

from exchange import (  # after the check that the library is there
    SIZES,
    TOKENIZER,
    V,
    library,
    native,
    our_logits,
    randomise,
    their_logits,
    written,
)
from mixtures import LOGPROBS, PROMPTS, Ascent, balanced, chosen, elsewhere, recorded_by, step_of
from posttrain.data import Sampling
from posttrain.errors import ConfigError
from posttrain.protocols import LoadRequest, Optimization, Output
from posttrain.testing import BackendContract
from posttrain.testing.tiny_models import step_data, unequal
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models import hf_mixture
from posttrain_backends._torch.models.hf_routers import BIAS, MIXTURES, parts_of_mixtures
from posttrain_backends._torch.models.mixture import Routes
from posttrain_backends.engines import Batched
from posttrain_backends.hf import HF, Lora
from safetensors.torch import load_file

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the libraries' own

E, TOP_2 = 6, {"num_experts_per_tok": 2}
GROUPS = {**TOP_2, "n_routed_experts": E, "n_group": 3, "topk_group": 2, "n_shared_experts": 1,
          "moe_intermediate_size": 24, "first_k_dense_replace": 1, "num_hidden_layers": 3,
          "routed_scaling_factor": 1.5, "norm_topk_prob": True}
"""Three groups of experts, of which a token is sent to two; the first layer has none."""
KINDS = {
    "mixtral": {**TOP_2, "num_local_experts": E},
    "qwen2_moe": {**TOP_2, "num_experts": E, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**TOP_2, "num_experts": E, "moe_intermediate_size": 24, "head_dim": 12, "norm_topk_prob": True},
    "glm4_moe": {**GROUPS, "head_dim": 8},
    "deepseek_v3": {**GROUPS, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
                    "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8},
}
BIASED = ("glm4_moe", "deepseek_v3")
"""Those whose routers have a bias; older versions of the library are refused for them."""
OURS = ("mixtral", "qwen2_moe", "qwen3_moe")
"""Those that the native decoder computes, too."""
ATTENTION = Lora(rank=2, targets=("q_proj", "o_proj"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """name -> a folder that transformers wrote, made once; biases of routers as uneven as weights."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name in BIASED and Version(transformers.__version__) < Version("5.23"):
            pytest.skip(f"transformers {transformers.__version__} has {name} with routers that give no weights and ids")
        if name not in made:
            made[name] = written(tmp_path_factory.mktemp("model"), name, KINDS[name])
            learner = load(made[name])
            for i, bias in enumerate(biases(learner).values()):
                bias.copy_(0.2 * torch.randn(E, generator=torch.Generator().manual_seed(i)))
            learner.save(made[name])
        return made[name]
    return make


def load(path: Path, lr: float | None = None, **fields):
    optimization = None if lr is None else Optimization(lr=lr)
    return HF(weights=str(path), device="cpu", **fields).load(LoadRequest(V, optimization=optimization))


def biases(learner) -> dict[str, torch.Tensor]:
    """Live, by name."""
    return {name: x for name, x in learner.params() if name.endswith(BIAS)}


def logprobs(learner, rollouts) -> np.ndarray:
    return learner.score(rollouts, LOGPROBS, 1.0).logprobs


# ---- drawn and replayed


@pytest.mark.parametrize("name", KINDS)
def test_drawn_tokens_are_scored_as_recorded_by_the_experts_that_were_recorded(name, folder):
    """With refilled rows and shared prompts; replayed through routers of now, and apart from it with other experts."""
    learner = load(folder(name))
    drawn = recorded_by(learner)
    read = np.setdiff1d(np.arange(len(drawn.tokens)), drawn.offsets[1:] - 1)
    layers = (1, 2) if name in BIASED else (0, 1)
    assert learner.model.mixtures == layers and drawn.routes.shape == (len(drawn.tokens), 2, 2)
    assert (drawn.routes[drawn.offsets[1:] - 1] == 255).all() and drawn.routes[read].max() == E - 1
    assert (np.sort(drawn.routes[read]) == np.sort(chosen(learner, drawn)[read])).all()
    np.testing.assert_allclose(logprobs(learner, drawn), drawn.behavior_logprobs, rtol=1e-5, atol=1e-5)
    assert np.array_equal(logprobs(learner, drawn), logprobs(learner, drawn))
    np.testing.assert_allclose(logprobs(learner, replace(drawn, routes=None)), logprobs(learner, drawn),
                               rtol=0, atol=1e-5)
    moved = elsewhere(drawn, E)
    assert np.abs(logprobs(learner, moved) - drawn.behavior_logprobs).max() > 0.1
    order = np.array([7, 0, 4])
    np.testing.assert_allclose(logprobs(learner, moved.select(order)), np.concatenate([
        logprobs(learner, moved)[moved.action_episode == e] for e in order]), rtol=0, atol=1e-5)
    again = recorded_by(learner, slots=1, prefill_tokens=8192)
    assert np.array_equal(again.tokens, drawn.tokens) and np.array_equal(again.routes, drawn.routes)


def seen_by(learner, name: str, routes: Routes) -> list[tuple[torch.Tensor, ...]]:
    """What the routers of a pass over a sequence gave, after the hooks that replay: logits, weights and ids."""
    found: list[tuple[torch.Tensor, ...]] = []
    routers = hf_mixture.routers_of(learner.model.causal, MIXTURES[name]).values()
    held = [router.register_forward_hook(lambda module, given, out: found.append(
        (given[0].reshape(7, -1) @ module.weight.t(), *out[1:]))) for router in routers]
    tokens = torch.arange(2, 9)
    learner.model.hidden(tokens, Layout.from_offsets([0, 7]), routes)
    for handle in held:
        handle.remove()
    return found


@pytest.mark.oracle
@pytest.mark.parametrize("name", KINDS)
def test_replayed_experts_are_weighed_by_the_scores_of_all(name, folder):
    """The papers' formulas, token by token; ids no router would choose, in groups that are closed to it."""
    learner = load(folder(name), lr=0.1)
    ids = torch.tensor([[5, 0]]).repeat(7, 1)
    ids[2] = -1
    free = seen_by(learner, name, Routes())
    replayed = seen_by(learner, name, Routes(dict.fromkeys(learner.model.mixtures, ids)))
    assert len(replayed) == 2
    for (logits, weights, taken), (_, _, liked) in zip(replayed[:1], free[:1], strict=True):
        assert taken[2].tolist() == liked[2].tolist() and (taken[[0, 1, 3, 4, 5, 6]] == torch.tensor([5, 0])).all()
        for row, (z, w, chosen_ids) in enumerate(zip(logits.detach(), weights.detach(), taken, strict=True)):
            z = z.double()
            scores = 1 / (1 + (-z).exp()) if name in BIASED else z.exp() / z.exp().sum()
            own = scores[chosen_ids]
            if name != "qwen2_moe":  # whose file says norm_topk_prob: false
                own = own / own.sum()
            expected = own * (1.5 if name in BIASED else 1.0)
            torch.testing.assert_close(w.double(), expected, rtol=1e-5, atol=1e-7, msg=f"row {row}")
    router = next(iter(hf_mixture.routers_of(learner.model.causal, MIXTURES[name]).values())).weight
    gradient, = torch.autograd.grad(replayed[0][1][:, 0].sum(), router)
    assert gradient.abs().max() > 1e-3


@pytest.mark.oracle
@pytest.mark.parametrize("name, fields", [
    *((name, {}) for name in OURS), ("mixtral", {"gradient_checkpointing": True}), ("mixtral", {"packing": "always"}),
    ("mixtral", {"experts": "batched_mm"})])
def test_a_replayed_step_is_that_of_the_native_mixture(name, fields, folder):
    """Log-probs, gradients of every weight and loads, with other experts than either would choose, however the step is
    cut in parts and the layers are computed."""
    theirs, ours = load(folder(name), lr=0.1, **fields), native_learner(folder(name))
    drawn = recorded_by(ours)
    data = step_data(elsewhere(drawn, E))
    np.testing.assert_allclose(logprobs(theirs, data.rollouts), logprobs(ours, data.rollouts), rtol=0, atol=2e-5)
    expected, loads = step_of(ours, data)
    assert np.abs(expected["model.layers.1.mlp.gate.weight"]).max() > 1e-5
    for parts in (None, [[0, 5], [1, 2, 3], [], [8, 7, 6, 4]]):
        learner = load(folder(name), lr=0.1, **fields)
        found, measured = step_of(learner, data, parts)
        require_equal_gradients(found, expected)
        assert {n: x for n, x in measured.items() if "experts/" in n} == {
            n: x for n, x in loads.items() if "experts/" in n}


def require_equal_gradients(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """But of the embedding of the pad token, which transformers does not train."""
    assert found.keys() == expected.keys()
    largest = max(float(np.abs(g).max()) for g in expected.values())
    for name, g in found.items():
        rows = slice(1 if "embed_tokens" in name else 0, None)
        np.testing.assert_allclose(g[rows], expected[name][rows], rtol=0, atol=1e-5 * largest, err_msg=name)


def native_learner(path: Path):
    from posttrain_backends.torch_native import Torch
    return Torch(weights=str(path), device="cpu").load(LoadRequest(V, optimization=Optimization(lr=0.1)))


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_replays_in_every_split(name, checkpointing, folder):
    learner = load(folder(name))
    drawn = recorded_by(learner)
    data = step_data(elsewhere(drawn, E))
    whole, measured = step_of(load(folder(name), lr=0.1, gradient_checkpointing=checkpointing), data)
    cut, again = step_of(load(folder(name), lr=0.1), data, [[0, 5], [1, 2, 3], [], [8, 7, 6, 4]])
    free, _ = step_of(load(folder(name), lr=0.1), replace(data, rollouts=replace(drawn, routes=None)))
    router = "model.layers.2.mlp.gate.weight"
    assert np.abs(whole[router]).max() > 1e-6 and np.abs(whole[router] - free[router]).max() > 1e-4
    require_equal_gradients(cut, whole)
    assert {n: x for n, x in again.items() if "experts/" in n} == {
        n: x for n, x in measured.items() if "experts/" in n}


def test_a_step_reports_the_load_of_the_experts_that_were_used(folder):
    learner = load(folder("glm4_moe"), lr=1e-9)
    moved = elsewhere(recorded_by(learner), E)
    data = replace(step_data(moved), keep=np.ones(int(moved.is_action.sum()), bool))
    measured = step_of(learner, data)[1]
    read = np.setdiff1d(np.arange(len(moved.tokens)), moved.offsets[1:] - 1)
    share = np.stack([np.bincount(moved.routes[read, i].ravel(), minlength=E) for i in range(2)]) / (2 * len(read))
    assert measured["experts/largest_share"] == pytest.approx(share.max(axis=1).mean())
    assert measured["experts/smallest_share"] == pytest.approx(share.min(axis=1).mean())


def test_a_model_without_replay_routes_anew_and_tells_nothing(folder):
    learner = load(folder("mixtral"), lr=0.1, router_replay=False)
    drawn = recorded_by(learner)
    assert drawn.routes is None and Output.EXPERT_LOAD not in HF(weights="x", router_replay=False).provides
    assert not any("experts/" in name for name in step_of(learner, step_data(drawn))[1])
    moved = elsewhere(recorded_by(load(folder("mixtral"))), E)
    np.testing.assert_allclose(logprobs(learner, moved), logprobs(learner, replace(moved, routes=None)), atol=1e-6)


# ---- an even load


@pytest.mark.oracle
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_for_an_even_load_is_that_of_the_native_mixture_in_every_split(checkpointing, folder, monkeypatch):
    drawn = elsewhere(recorded_by(native(folder("mixtral"))), E)
    learners = [native_learner(folder("mixtral")),
                *(load(folder("mixtral"), lr=0.1, gradient_checkpointing=checkpointing) for _ in range(2))]
    found = []
    for learner, budget in zip(learners, (10**6, 10**6, 1), strict=True):
        monkeypatch.setattr(learner, "_optimizer", Ascent(learner._parameters))
        found.append((balanced(drawn, budget, learner)["loss/expert_balance"], learner._optimizer.seen))
    (total, expected), *others = found
    assert np.abs(expected["model.layers.0.mlp.gate.weight"]).max() > 1e-3
    for other, gradients in others:
        assert other == pytest.approx(total, rel=1e-5)
        require_equal_gradients(gradients, expected)


def test_without_a_coefficient_no_loss_is_added(folder):
    """Neither ours nor the library's own."""
    learner = load(folder("mixtral"), lr=0.1)
    assert not learner.model.causal.config.output_router_logits
    measured = step_of(learner, step_data(recorded_by(learner)))[1]
    assert "loss/expert_balance" not in measured and "experts/entropy" in measured


@pytest.mark.parametrize("name", BIASED)
def test_a_bias_moves_by_the_sign_of_the_load_and_resumes_bit_for_bit(name, folder):
    learner, frozen = load(folder(name), lr=0.1, expert_bias_rate=0.03), load(folder(name), lr=0.1)
    moved = elsewhere(recorded_by(learner), E)
    data = replace(step_data(moved), keep=np.ones(int(moved.is_action.sum()), bool))
    before = {n: b.clone() for n, b in biases(learner).items()}
    step_of(learner, data)
    step_of(frozen, data)
    read = np.setdiff1d(np.arange(len(moved.tokens)), moved.offsets[1:] - 1)
    for i, (n, bias) in enumerate(biases(learner).items()):
        load_of = [sum(int(x == e) for x in moved.routes[read, i].ravel()) for e in range(E)]
        expected = before[n] + 0.03 * torch.tensor([np.sign(sum(load_of) / E - c) for c in load_of])
        torch.testing.assert_close(bias, expected.float(), rtol=0, atol=1e-7)
        assert not torch.equal(bias, before[n]) and torch.equal(biases(frozen)[n], before[n])
    again = load(folder(name), lr=0.1, expert_bias_rate=0.03)
    again.load_state(learner.state())
    for each in (learner, again):
        step_of(each, data)
    assert not unequal(learner.state(), again.state())
    assert not any(torch.equal(b, before[n]) for n, b in biases(again).items())


def test_a_step_that_is_skipped_leaves_the_bias(folder):
    learner = load(folder("glm4_moe"), lr=0.1, expert_bias_rate=0.03)
    before = {n: b.clone() for n, b in biases(learner).items()}
    data = step_data(recorded_by(learner))
    broken = replace(data, weights=replace(data.weights, weight=np.full(len(data.weights.weight), np.nan)))
    measured = step_of(learner, broken)[1]
    assert measured["skipped"] == 1 and all(torch.equal(b, before[n]) for n, b in biases(learner).items())


def test_a_bias_makes_an_uneven_load_even(folder):
    """By itself, with weights that stay: routes drawn anew for each step."""
    learner = load(folder("glm4_moe"), lr=1e-9, expert_bias_rate=0.05)
    for bias in biases(learner).values():
        bias.zero_()[0] = 0.5
    largest = [step_of(learner, step_data(recorded_by(learner)))[1]["experts/largest_share"] for _ in range(15)]
    assert largest[0] > 0.35 and np.mean(largest[-5:]) < largest[0] - 0.05


# ---- weights as files have them


@pytest.mark.parametrize("name", KINDS)
def test_weights_stream_under_the_names_of_files_and_are_live(name, folder):
    learner, other = load(folder(name)), load(folder(name))
    on_disk, stream = load_file(folder(name) / "model.safetensors"), dict(learner.params())
    assert stream.keys() == on_disk.keys()
    assert all(torch.equal(x, on_disk[n]) for n, x in stream.items())
    assert any(n.endswith(BIAS) for n in stream) == (name not in OURS)
    rollouts = recorded_by(learner)
    before = logprobs(learner, replace(rollouts, routes=None))
    with torch.no_grad():
        for x in stream.values():
            x.mul_(1.1)
    assert not np.allclose(logprobs(learner, replace(rollouts, routes=None)), before, atol=1e-3)
    other.load_params(learner.params(), 1)
    assert np.array_equal(logprobs(other, rollouts), logprobs(learner, rollouts))


@pytest.mark.parametrize("name, adapter", [
    *((name, None) for name in KINDS), ("mixtral", ATTENTION), ("glm4_moe", ATTENTION)])
def test_a_saved_folder_loads_in_transformers_and_in_the_native_decoder(name, adapter, folder, tmp_path):
    learner = load(folder(name), adapter=adapter)
    with torch.no_grad():
        for p_name, p in learner.model.named_parameters():
            if ".lora_" in p_name or adapter is None:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    learner.save(tmp_path)
    with torch.no_grad():
        expected = our_logits(learner.model)
        theirs = library(tmp_path)
        theirs.set_experts_implementation("eager")
        torch.testing.assert_close(their_logits(theirs), expected, rtol=1e-5, atol=1e-5)
        if name in OURS:
            torch.testing.assert_close(our_logits(native(tmp_path).model), expected, rtol=1e-5, atol=1e-5)
    if adapter is not None:
        assert {n for n, _ in learner.base().params()} == load_file(tmp_path / "model.safetensors").keys()


def test_an_adapter_is_trained_through_replayed_experts_and_its_base_stays(folder):
    learner = load(folder("mixtral"), lr=0.1, adapter=ATTENTION)
    first = recorded_by(learner)
    step_of(learner, step_data(elsewhere(first, E)))
    drawn = recorded_by(learner)
    np.testing.assert_allclose(logprobs(learner, drawn), drawn.behavior_logprobs, rtol=0, atol=1e-5)
    base, before = learner.base().score(drawn, LOGPROBS, 1.0).logprobs, logprobs(load(folder("mixtral")), drawn)
    np.testing.assert_allclose(base, before, rtol=0, atol=1e-5)
    assert np.abs(base - drawn.behavior_logprobs).max() > 1e-3


@pytest.mark.parametrize("name", OURS)
def test_weights_go_from_one_backend_to_the_other_and_routes_with_them(name, folder):
    ours, theirs = native(folder(name)), load(folder(name))
    randomise(ours.model)
    with torch.no_grad():
        for p in ours.model.parameters():
            p.mul_(0.9)
    theirs.load_params(ours.params(), 1)
    drawn = recorded_by(ours)
    np.testing.assert_allclose(logprobs(theirs, drawn), drawn.behavior_logprobs, rtol=0, atol=1e-5)
    assert np.array_equal(chosen(theirs, drawn), chosen(ours, drawn))


def test_a_copied_sampler_has_routers_of_its_own(folder):
    """It records while the policy moves on, bias and all, and follows when it is given the weights."""
    learner = load(folder("glm4_moe"), lr=0.1, expert_bias_rate=0.5)
    sampler = Batched().start(learner, TOKENIZER, shared=False)
    first = sampler.rollout(PROMPTS, Sampling(max_new_tokens=7), (0, 0))
    step_of(learner, step_data(elsewhere(first, E)))
    stale = sampler.rollout(PROMPTS, Sampling(max_new_tokens=7), (0, 0))
    assert np.array_equal(stale.routes, first.routes) and not np.array_equal(
        chosen(learner, first), chosen(load(folder("glm4_moe")), first))
    sampler.sync(learner.params(), learner.version)
    drawn = sampler.rollout(PROMPTS, Sampling(max_new_tokens=7), (0, 0))
    np.testing.assert_allclose(logprobs(learner, drawn), drawn.behavior_logprobs, rtol=0, atol=1e-5)
    assert np.array_equal(drawn.routes, recorded_by(learner).routes)


# ---- experts by name


@pytest.mark.parametrize("experts", ["auto", "eager", "grouped_mm", "batched_mm"])
def test_experts_are_multiplied_as_named_with_equal_results(experts, folder):
    learner, plain = load(folder("qwen3_moe"), experts=experts), load(folder("qwen3_moe"), experts="eager")
    assert learner.model.causal.config._experts_implementation == ("grouped_mm" if experts == "auto" else experts)
    drawn = recorded_by(plain)
    np.testing.assert_allclose(logprobs(learner, drawn), logprobs(plain, drawn), rtol=0, atol=1e-5)
    assert np.array_equal(recorded_by(learner).tokens, drawn.tokens)


def test_bf16_multiplies_experts_in_bf16_and_replays_what_it_drew(folder):
    """Recorded and scored log-probs differ by rounding; by other experts they would by far more."""
    half = load(folder("mixtral"), precision="bf16")
    assert half.model.causal.config._experts_implementation == "eager"
    drawn = recorded_by(half)
    gap = np.abs(logprobs(half, drawn) - drawn.behavior_logprobs)
    assert 0 < np.median(gap) < 0.05
    assert np.median(np.abs(logprobs(half, elsewhere(drawn, E)) - drawn.behavior_logprobs)) > 5 * np.median(gap)


# ---- what is refused



OTHERS = {
    "llama": {}, "olmoe": {**TOP_2, "num_experts": 4}, "granitemoe": {**TOP_2, "num_local_experts": 4},
    "jetmoe": {**TOP_2, "num_local_experts": 4, "kv_channels": 8},
}


@pytest.mark.parametrize("name, fields, said", [
    ("llama", {"experts": "eager"}, "policy.experts is eager, and LlamaForCausalLM has no experts"),
    ("llama", {"expert_bias_rate": 0.1}, "expert_bias_rate is 0.1, and LlamaForCausalLM has no experts"),
    ("mixtral", {"expert_bias_rate": 0.1}, "the routers of MixtralForCausalLM have no bias(.|\n)*expert_balance_coef"),
    ("glm4_moe", {"expert_bias_rate": 0.1, "router_replay": False}, "without policy.router_replay no load"),
    ("glm4_moe", {"expert_bias_rate": 0.1, "adapter": Lora(targets=("q_proj",))}, "the model stays as it is"),
    ("olmoe", {}, "OlmoeForCausalLM sends tokens to experts by a router that is not known(.|\n)*router_replay: false"),
    ("granitemoe", {}, "GraniteMoeForCausalLM sends tokens to experts by a router that is not known"),
    ("jetmoe", {}, "JetMoeForCausalLM sends tokens to experts by a router that is not known"),
    ("jetmoe", {"experts": "batched_mm"}, "JetMoeForCausalLM computes its experts in one way alone")])
def test_what_is_refused_by_name(name, fields, said, folder, tmp_path):
    path = folder(name) if name in KINDS else written(tmp_path, name, OTHERS[name])
    with pytest.raises(ConfigError, match=said):
        load(path, **fields)


def test_an_unknown_mixture_trains_where_no_replay_is_asked_for(tmp_path):
    learner = load(written(tmp_path, "olmoe", OTHERS["olmoe"]), lr=0.1, router_replay=False)
    assert parts_of_mixtures(learner.model.causal)
    drawn = recorded_by(learner)
    np.testing.assert_allclose(logprobs(learner, drawn), drawn.behavior_logprobs, rtol=0, atol=1e-5)


def test_a_mixture_that_no_cache_is_proved_for_is_refused(tmp_path):
    path = written(tmp_path, "mixtral", {**KINDS["mixtral"], "sliding_window": 16})
    with pytest.raises(ConfigError, match="drawn from without a cache, beside which alone they are recorded"):
        load(path)
    assert recorded_by(load(path, router_replay=False)).routes is None


def test_a_router_that_weighs_otherwise_is_refused(folder, monkeypatch):
    """As a version of transformers may that has changed it."""
    changed = replace(MIXTURES["mixtral"], weighing=lambda router: replace(
        MIXTURES["mixtral"].weighing(router), normalised=False))
    monkeypatch.setattr(hf_mixture, "MIXTURES", {**MIXTURES, "mixtral": changed})
    with pytest.raises(ConfigError, match="by a router that weighs them otherwise than is known here"):
        load(folder("mixtral"))


def test_a_router_that_gives_something_else_is_refused(folder, monkeypatch):
    from transformers.models.mixtral import modeling_mixtral

    class MixtralTopKRouter(modeling_mixtral.MixtralTopKRouter):
        def forward(self, hidden_states):
            return super().forward(hidden_states)[0]

    class Block(modeling_mixtral.MixtralSparseMoeBlock):
        def forward(self, hidden_states):
            self.gate(hidden_states)
            return hidden_states
    monkeypatch.setattr(modeling_mixtral, "MixtralTopKRouter", MixtralTopKRouter)
    monkeypatch.setattr(modeling_mixtral, "MixtralSparseMoeBlock", Block)
    with pytest.raises(ConfigError, match="gives no logits, weights and ids in this version of transformers"):
        load(folder("mixtral"))


def test_experts_that_compute_otherwise_are_refused(folder, monkeypatch):
    monkeypatch.setattr(hf_mixture, "experts_error", lambda causal, chosen: 0.5)
    with pytest.raises(ConfigError, match="batched_mm gives MixtralForCausalLM other hidden states than eager"):
        load(folder("mixtral"), experts="batched_mm")

    def missing(causal, chosen):
        raise RuntimeError("no kernel")
    monkeypatch.setattr(hf_mixture, "experts_error", missing)
    with pytest.raises(ConfigError, match=r"grouped_mm does not run on cpu: no kernel(.|\n)*experts: auto"):
        load(folder("mixtral"), experts="grouped_mm")


def test_rates_that_are_no_rates_are_refused():
    for rate in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="expert_bias_rate must be a number from 0"):
            HF(weights="x", expert_bias_rate=rate)


def test_noise_in_routers_is_switched_off(tmp_path):
    learner = load(written(tmp_path, "mixtral", {**KINDS["mixtral"], "router_jitter_noise": 0.5}),
                   gradient_checkpointing=True)
    assert json.loads((tmp_path / "config.json").read_text())["router_jitter_noise"] == 0.5
    assert {m.jitter_noise for m in learner.model.causal.modules() if hasattr(m, "jitter_noise")} == {0.0}


class TestMixture(BackendContract):
    # All experts: over the steps of its differences a choice of some would change, and the loss jump.
    components = (HF(weights="mixture", device="cpu", gradient_checkpointing=True),)
    seeded = False

    @pytest.fixture(scope="class", autouse=True)
    def tiny(self, tmp_path_factory):
        """Work beside a folder `mixture`, so that the component names it alike in every run."""
        here = Path.cwd()
        os.chdir(tmp_path_factory.mktemp("models"))
        sizes = {**SIZES, "pad_token_id": None, "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
                 "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
                 "num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.for_model("qwen3_moe", **sizes)).save_pretrained("mixture")
        yield
        os.chdir(here)

    def reloaded(self, component: HF, folder: Path) -> HF:
        return HF(weights=str(folder), device="cpu")
