"""Recurrent and hybrid models of transformers: drawn from by their states, padded, and refused where that is wrong."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers", minversion="5.23")

from posttrain.data import Prompt, Rollouts, Sampling  # after the check that the library is there
from posttrain.errors import ConfigError
from posttrain.protocols import LoadRequest, Output
from posttrain.registry import import_file
from posttrain_backends._torch.generate import TorchSampler
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models import hf_states
from posttrain_backends._torch.models.hf import HFModel, packing_error
from posttrain_backends._torch.models.hf_states import HybridHFModel, RecurrentHFModel, state_error
from posttrain_backends._torch.models.interface import CachedLanguageModel, HybridLanguageModel, RecurrentLanguageModel
from posttrain_backends.engines import Batched
from posttrain_backends.hf import HF, Lora

PARITY = import_file(Path(__file__).parents[2] / "tools" / "parity.py")
TOKENIZER, V = PARITY.TOKENIZER, PARITY.V
RECURRENT = ("mamba", "mamba2", "falcon_mamba")
HYBRID = ("jamba", "qwen3_next", "bamba", "granitemoehybrid", "falcon_h1", "lfm2")
LIMITED = ("mamba2, time_step_limit", "nemotron_h", "zamba2")
PROMPTS = [Prompt(text=text, group=i) for i, text in enumerate(["a", "0+1", "abcdefgh", "hh"]) for _ in range(3)]
SAMPLING = Sampling(max_new_tokens=12)
THREE = Batched(slots=3)
LOGPROBS = frozenset({Output.LOGPROBS})

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]  # the libraries' own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Architecture -> a folder of random weights, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("model")
            PARITY.written(PARITY.Case("hf", name, *PARITY.LIBRARY[name]), made[name])
        return made[name]
    return make


def load(path: Path, **fields):
    """Without a replay of experts: those of hybrids have routers that are not known."""
    return HF(weights=str(path), device="cpu", **{"router_replay": False, **fields}).load(LoadRequest(V))


def rollout(learner, engine: Batched = THREE, sampling: Sampling = SAMPLING) -> Rollouts:
    return engine.start(learner, TOKENIZER, shared=True).rollout(PROMPTS, sampling, (0,))


def ragged(lengths: list[int]) -> tuple[torch.Tensor, Layout]:
    tokens = torch.from_numpy(np.random.default_rng(0).integers(1, V, sum(lengths)))
    return tokens, Layout.from_offsets(np.concatenate([[0], np.cumsum(lengths)]))


# ---- drawing


@pytest.mark.parametrize("name", [*RECURRENT, *HYBRID])
def test_steps_from_states_equal_whole_sequences(name, folder):
    model = load(folder(name)).model
    assert isinstance(model, RecurrentHFModel if name in RECURRENT else HybridHFModel)
    assert isinstance(model, RecurrentLanguageModel) == (name in RECURRENT)
    assert isinstance(model, HybridLanguageModel) == (name in HYBRID)
    assert not isinstance(model, CachedLanguageModel)
    assert state_error(model) < 1e-5 and model.refusal == ""


@pytest.mark.parametrize("name", [*RECURRENT, *HYBRID])
def test_recorded_log_probs_equal_scored_ones_and_the_answers_those_read_anew(name, folder):
    """Five rows for twelve answers of uneven length: finished ones are replaced, and rows close at the end."""
    learner = load(folder(name))
    found = rollout(learner, Batched(slots=5, prefill_tokens=8))
    scored = learner.score(found, LOGPROBS, 1.0).logprobs
    np.testing.assert_allclose(found.behavior_logprobs, scored, rtol=0, atol=2e-5)
    anew = rollout(load(folder(name), cache="never"), Batched())
    np.testing.assert_array_equal(found.tokens, anew.tokens)
    assert len({int(n) for n in found.episode_tokens}) > 3


@pytest.mark.parametrize("name", ["mamba2", "jamba"])
def test_a_prompt_is_read_once_for_all_its_answers(name, folder):
    sampler = Batched(slots=2).start(load(folder(name)), TOKENIZER, shared=True)
    sampler.rollout(PROMPTS, SAMPLING, (0,))
    assert isinstance(sampler, TorchSampler) and sampler.usage.prompt_tokens == sum(map(len, {p.text for p in PROMPTS}))


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next"])
def test_rows_padded_on_the_left_end_with_the_states_of_each_alone(name, folder):
    model, lengths = load(folder(name)).model, [7, 2, 5, 12]
    tokens, layout = ragged(lengths)
    with torch.no_grad():
        together = model._whole(tokens, layout)
        apart = [model._whole(part, ragged([len(part)])[1]) for part in torch.split(tokens, lengths)]
    torch.testing.assert_close(together.hidden, torch.cat([read.hidden for read in apart]), rtol=0, atol=1e-5)
    for i, found in enumerate(together.recurrent.tensors):
        wanted = torch.cat([read.recurrent.tensors[i] for read in apart])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    for i, found in enumerate(together.keys):
        torch.testing.assert_close(found, torch.cat([read.keys[i] for read in apart]), rtol=0, atol=1e-5)


def test_a_step_of_some_rows_leaves_the_others_alone(folder):
    model, (tokens, layout) = load(folder("mamba2")).model, ragged([4, 4, 4])
    with torch.no_grad():
        _, cache = model.read(tokens, layout)
        before = [x.clone() for x in cache.tensors]
        model.step(torch.tensor([1, 2]), cache, slice(0, 2))
    assert all(torch.equal(x[2], y[2]) for x, y in zip(cache.tensors, before, strict=True))
    assert all(not torch.equal(x[:2], y[:2]) for x, y in zip(cache.tensors, before, strict=True))


def test_bf16_states_stay_near_what_is_scored(folder):
    learner = load(folder("jamba"), precision="bf16")
    found = rollout(learner)
    scored = learner.score(found, LOGPROBS, 1.0).logprobs
    assert 0 < np.abs(found.behavior_logprobs - scored).max() < 0.1


def test_what_mamba2_keeps_has_one_size_and_what_a_hybrid_keeps_grows(folder):
    kept: dict[str, list[int]] = {"mamba2": [], "jamba": []}
    for name, sizes in kept.items():
        model = load(folder(name)).model
        for length in (8, 32):
            with torch.no_grad():
                read = model._whole(*ragged([length]))
            sizes.append(sum(x.nbytes for x in (*read.keys, *read.values, *read.recurrent.tensors)))
    assert kept["mamba2"][0] == kept["mamba2"][1]
    assert kept["jamba"][0] < kept["jamba"][1]


# ---- what is refused


@pytest.mark.parametrize("name", LIMITED)
def test_steps_kept_in_a_limit_by_whole_sequences_alone_are_refused_with_the_size(name, folder):
    learner = load(folder(name))
    with pytest.raises(ConfigError, match=r"ForCausalLM of transformers .*differ by \d\.\de-0\d of the largest"
                                          r"[^$]*Set policy.cache: never"):
        Batched().start(learner, TOKENIZER, shared=True)


def test_a_limit_that_no_probe_meets_by_chance_is_found(folder):
    """Whatever steps the probe's tokens take, all of them meet the limit that is set for it."""
    model = load(folder("mamba2")).model
    for module in hf_states._limited(model):
        module.time_step_limit = (0.0, 1e6)
    assert state_error(model) < 1e-5
    assert "time_step_limit" in hf_states._refusal(model)
    assert {module.time_step_limit for module in hf_states._limited(model)} == {(0.0, 1e6)}


@pytest.mark.parametrize("name", ["mamba2, time_step_limit", "zamba2"])
def test_what_is_refused_is_drawn_from_without_a_cache(name, folder):
    learner = load(folder(name), cache="never")
    assert type(learner.model) is HFModel
    found = rollout(learner)
    np.testing.assert_allclose(found.behavior_logprobs, learner.score(found, LOGPROBS, 1.0).logprobs, rtol=0, atol=2e-5)


def test_steps_that_compute_something_else_are_refused_with_the_size(folder):
    causal = transformers.AutoModelForCausalLM.from_pretrained(folder("jamba")).eval()
    mixer = next(module for module in causal.modules() if hasattr(module, "A_log"))
    mixer.register_forward_hook(lambda module, given, out: out * 1.01 if out.shape[1] == 1 else out)
    model = hf_states.drawable(causal, "float32", gradient_checkpointing=False, cache="auto")
    assert "JambaForCausalLM" in model.refusal and "token by token than of whole sequences" in model.refusal


def test_bamba_steps_are_right_where_positions_are_given(folder):
    """A decoding loop that gives none counts from 0 at every step; the library's `generate` gives them."""
    causal = transformers.AutoModelForCausalLM.from_pretrained(folder("bamba")).eval()
    tokens = ragged([9])[0][None]
    with torch.no_grad():
        whole = causal(tokens).logits[0, -1]
        for given, wrong in (({}, True), ({"position_ids": torch.tensor([[8]])}, False)):
            past = causal(tokens[:, :8], use_cache=True).past_key_values
            step = causal(tokens[:, 8:], past_key_values=past, use_cache=True, **given).logits[0, -1]
            assert (float((step - whole).abs().max() / whole.abs().max()) > 1e-4) == wrong


@pytest.mark.parametrize("name", ["mamba2", "jamba"])
def test_recurrent_layers_are_padded_unless_asked_and_then_refused(name, folder):
    model = load(folder(name)).model
    assert not model.packed and packing_error(model) > 1e-2
    with pytest.raises(ConfigError, match=r"packed sequences of \w+ are not kept apart \(hidden states differ by"):
        load(folder(name), packing="always")


def test_a_cache_of_its_own_is_said_and_answers_are_read_anew(tmp_path, caplog):
    sizes = {**PARITY.ATTENTION, "head_dim": 8, "num_local_experts": 2, "block_size": 4,
             "layer_types": ["linear_attention", "full_attention"]}
    PARITY.written(PARITY.Case("hf", "minimax", "minimax", sizes), tmp_path)
    with caplog.at_level(logging.WARNING):
        learner = load(tmp_path)
    assert type(learner.model) is HFModel
    assert "drawn from without a cache of states" in caplog.text and "MiniMax uses cache of its own" in caplog.text
    found = rollout(learner, sampling=Sampling(max_new_tokens=4))
    np.testing.assert_allclose(found.behavior_logprobs, learner.score(found, LOGPROBS, 1.0).logprobs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name, says", [
    ("mamba2", r"'out_proj' is incompatible with Mamba-based models.*linear layers of this model are in_proj, lm_head, "
               "out_proj"),
    ("jamba", "JambaForCausalLM reads the weights of dt_proj itself.*name the other layers: down_proj, gate_proj, "
              "in_proj")])
def test_an_adapter_that_would_never_be_trained_is_refused(name, says, folder):
    pytest.importorskip("peft")
    with pytest.raises(ConfigError, match=says):
        load(folder(name), adapter=Lora(rank=2))


@pytest.mark.parametrize("name", ["mamba2", "jamba"])
def test_with_an_adapter_recorded_log_probs_equal_scored_ones(name, folder):
    pytest.importorskip("peft")
    learner = load(folder(name), adapter=Lora(rank=2, targets=("in_proj",)))
    with torch.no_grad():
        for _, p in learner.model.named_parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    found = rollout(learner)
    np.testing.assert_allclose(found.behavior_logprobs, learner.score(found, LOGPROBS, 1.0).logprobs, rtol=0, atol=2e-5)


def test_a_hybrid_some_of_whose_layers_see_a_window_is_read_anew(folder, monkeypatch, caplog):
    monkeypatch.setattr(transformers.cache_utils.DynamicLayer, "is_sliding", True)
    with caplog.at_level(logging.WARNING):
        assert type(load(folder("jamba")).model) is HFModel
    assert "some of its layers see a window of tokens" in caplog.text


class OneGroup(torch.nn.Module):
    """Mamba-2's norm as old versions of the library have it: over all heads at once."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight

    def forward(self, x, gate):
        return torch.nn.functional.rms_norm(x * torch.nn.functional.silu(gate), x.shape[-1:], self.weight)


def test_a_norm_that_mixes_groups_is_refused(folder):
    causal = transformers.AutoModelForCausalLM.from_pretrained(folder("mamba2")).eval()
    hf_states.require_grouped_norm(causal)
    for block in causal.backbone.layers:
        block.mixer.norm = OneGroup(block.mixer.norm)
    with pytest.raises(ConfigError, match=r"norms the 2 groups of its heads as one[^$]*use: ssm"):
        hf_states.require_grouped_norm(causal)
    causal.config.n_groups = 1
    hf_states.require_grouped_norm(causal)


def test_what_has_no_layers_with_states_is_not_recurrent():
    assert not hf_states.is_recurrent(transformers.LlamaConfig(num_hidden_layers=1))
    assert not hf_states.is_recurrent(SimpleNamespace())
