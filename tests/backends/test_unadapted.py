"""The model before its adapter, read from the adapted one: equal bit for bit to one that is loaded on its own."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from ragged import answers_to_one_prompt

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from posttrain.batching import StepData, cut  # after the check that the libraries are there
from posttrain.data import Counts, Loss, Rollouts, Term, Weights
from posttrain.errors import ConfigError, MemoryExhausted
from posttrain.protocols import Adapted, LoadRequest, Optimization, Output
from posttrain_backends.hf import HF, Lora
from posttrain_backends.torch_native import Torch

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the libraries' own

V = 61
LORA = Lora(rank=4)
LOGPROBS = frozenset({Output.LOGPROBS})
BOTH = frozenset({Output.LOGPROBS, Output.ENTROPY})
KINDS = {"plain": {}, "checkpointing": {"gradient_checkpointing": True}, "packed": {"packing": "always"},
         "bf16": {"precision": "bf16"}, "chunks of logits": {"head_chunk": 5}, "eager": {"attention": "eager"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small Llama whose output matrix is its embedding."""
    path: Path = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True)).save_pretrained(path)
    return path


def load(path: Path, adapter: Lora | None = LORA, *, value_heads: int = 0, train: bool = True, **fields):
    return HF(weights=str(path), device="cpu", adapter=adapter, **fields).load(LoadRequest(
        V, value_heads=value_heads, seed=5, optimization=Optimization(lr=0.05) if train else None))


def rollouts(prompt: int) -> Rollouts:
    """Behind a long prompt the answers are computed as a tree."""
    return answers_to_one_prompt(prompt, (3, 9, 1, 14), low=0, high=V)


class Likelihood:
    """The loss -sum(weight * logprob), and the values' sum where there are some."""

    needs, unit, slots = frozenset(), "episode", ("main",)

    def __init__(self, outputs: frozenset[Output]) -> None:
        self.outputs = outputs

    def weights(self, counts: Counts) -> Weights:
        return Weights(weight=np.ones(counts.actions))

    def __call__(self, ops, out, batch, coef):
        total = -ops.xp.sum(batch.weight * out.logprobs)
        return Loss({"policy": Term(total if out.values is None else total + ops.xp.sum(out.values))})


def step(learner, given: Rollouts) -> None:
    keep = np.ones(int(given.is_action.sum()), bool)
    data = StepData(given, keep, Weights(weight=np.ones(len(keep))))
    learner.accumulate(cut(data, np.arange(given.n_episodes)), Likelihood(learner.provides - BOTH | LOGPROBS), {})
    learner.apply()


@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_a_model_loaded_on_its_own_before_and_after_training(kind, folder):
    learner = load(folder, value_heads=2, **KINDS[kind])
    alone = [load(folder, adapter, train=False, **KINDS[kind]) for adapter in (None, Lora(rank=4))]
    base = learner.base()
    for steps in range(3):
        for given in (rollouts(prompt=4), rollouts(prompt=40)):
            found, changed = base.score(given, BOTH, 0.7), learner.score(given, LOGPROBS, 0.7).logprobs
            for expected in (other.score(given, BOTH, 0.7) for other in alone):
                np.testing.assert_array_equal(found.logprobs, expected.logprobs)
                np.testing.assert_array_equal(found.entropy, expected.entropy)
            assert (np.abs(changed - found.logprobs).max() > 0.01) == (steps > 0)
        step(learner, rollouts(prompt=4))


def test_training_is_the_same_with_and_without_it_between_the_steps(folder):
    given, ends = rollouts(4), []
    for asked in (False, True):
        learner = load(folder, value_heads=1)
        for _ in range(3):
            if asked:
                learner.base().score(given, LOGPROBS, 1.0)
            step(learner, given)
        ends.append(learner.state())
    assert ends[0].keys() == ends[1].keys()
    for name, expected in ends[0].items():
        np.testing.assert_array_equal(ends[1][name], expected)


@pytest.mark.parametrize("train", [False, True])
def test_the_adapter_is_on_again_and_trained_as_before_whatever_is_raised(train, folder, monkeypatch):
    given, learner = rollouts(4), load(folder, train=train)
    with torch.no_grad():
        for _, p in learner.model.named_parameters():
            p.add_(0.05)
    before, trained = learner.score(given, LOGPROBS, 1.0).logprobs, gradients(learner)
    assert any(trained.values()) == train
    seen = []

    def fails(*_: object) -> None:
        seen.append(gradients(learner))
        raise torch.OutOfMemoryError("no memory")
    with monkeypatch.context() as broken:
        broken.setattr(learner.model, "hidden", fails)
        with pytest.raises(MemoryExhausted):
            learner.base().score(given, LOGPROBS, 1.0)
    assert len(seen) == 1 and gradients(learner) == trained
    np.testing.assert_array_equal(learner.score(given, LOGPROBS, 1.0).logprobs, before)


def gradients(learner) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in learner.model.named_parameters()}


def test_its_weights_are_those_in_the_files_and_hold_no_copy(folder):
    learner = load(folder)
    step(learner, rollouts(4))
    expected, found = dict(load(folder, None).params()), dict(learner.base().params())
    assert expected.keys() == found.keys()
    own = {p.data_ptr() for _, p in learner.model.named_parameters()}
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]) and tensor.data_ptr() in own
    with pytest.raises(RuntimeError, match="reads the weights of the learner"):
        learner.base().load_params([], 0)


def test_it_gives_no_values_and_is_there_only_with_an_adapter(folder):
    learner = load(folder, value_heads=1)
    assert Output.VALUES in learner.provides and learner.base().provides == BOTH
    with pytest.raises(ConfigError, match="without its adapter gives no values"):
        learner.base().score(rollouts(4), frozenset({Output.VALUES}), 1.0)
    native = Torch(hidden_size=8, layers=1, heads=1, kv_heads=1, max_positions=8, device="cpu").load(LoadRequest(V))
    for other in (load(folder, None), native):
        assert isinstance(other, Adapted) and other.base() is None
