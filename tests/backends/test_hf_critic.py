"""Classification models of transformers as critics: values equal the library's logits, are trained, saved, resumed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from ragged import answers_to_one_prompt

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers")

from posttrain.batching import StepData, cut  # after the check that the library is there
from posttrain.data import Counts, Loss, Rollouts, Term, Weights
from posttrain.errors import ConfigError
from posttrain.protocols import LoadRequest, Optimization, Output
from posttrain_backends.hf import HF, Lora

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the libraries' own

V = 61
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64}
GROUPED = {**SIZES, "num_key_value_heads": 2}
KINDS = {
    "llama, tokens": (transformers.LlamaForTokenClassification, {**GROUPED, "classifier_dropout": 0.5}),
    "qwen3, tokens": (transformers.Qwen3ForTokenClassification, {**GROUPED, "head_dim": 8}),
    "gpt2, tokens": (transformers.GPT2ForTokenClassification,
                     {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama": (transformers.LlamaForSequenceClassification, {**GROUPED, "pad_token_id": 0}),
    "mistral, window": (transformers.MistralForSequenceClassification, {**GROUPED, "sliding_window": 8}),
    "bert, tokens": (transformers.BertForTokenClassification, SIZES),
    "bert": (transformers.BertForSequenceClassification, SIZES),
}
CRITICS = tuple(name for name in KINDS if "bert" not in name)
VALUES = frozenset({Output.VALUES, Output.BOOTSTRAP_VALUES})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """name, labels -> a folder of random weights, made once."""
    made: dict[tuple[str, int], Path] = {}

    def make(name: str, labels: int = 1) -> Path:
        if (name, labels) not in made:
            made[name, labels] = tmp_path_factory.mktemp("model")
            kind, sizes = KINDS[name]
            torch.manual_seed(3)
            kind(kind.config_class(**sizes, num_labels=labels)).save_pretrained(made[name, labels])
        return made[name, labels]
    return make


def load(path: Path, heads: int = 1, optimization: Optimization | None = None, **fields):
    return HF(weights=str(path), device="cpu", **fields).load(
        LoadRequest(V, value_heads=heads, seed=5, optimization=optimization))


def rollouts(prompt: int = 4) -> Rollouts:
    """They are cut off, so that a value after the last token counts."""
    return answers_to_one_prompt(prompt, (3, 9, 1, 14), low=1, high=V, terminated=False)


def plain(path: Path):
    """The library's own module; what it says at every position is `at_all`."""
    config = transformers.AutoConfig.from_pretrained(path)
    auto = (transformers.AutoModelForTokenClassification if "Token" in config.architectures[0]
            else transformers.AutoModelForSequenceClassification)
    return auto.from_pretrained(path, dtype=torch.float32).eval()


def at_all(module, ids: torch.Tensor) -> torch.Tensor:
    """[T] -> [T, labels]: the logits of every position, of a sequence-classification model those of every prefix."""
    if "Token" in type(module).__name__:
        return module(input_ids=ids[None]).logits[0]
    return torch.stack([module(input_ids=ids[None, :n + 1]).logits[0] for n in range(len(ids))])


def by_sequence(given: Rollouts):
    for a, b in zip(given.offsets[:-1], given.offsets[1:], strict=True):
        yield torch.from_numpy(given.tokens[a:b].astype(np.int64)), given.is_action[a:b]


@pytest.mark.oracle
@pytest.mark.parametrize("name", CRITICS)
@pytest.mark.parametrize("labels", [1, 2])
def test_values_are_the_library_s_logits_at_all_positions(name, labels, folder):
    given, learner = rollouts(), load(folder(name, labels), heads=2)
    assert learner.provides == VALUES
    out = learner.score(given, VALUES, 1.0)
    values, ends = [], []
    with torch.no_grad():
        for ids, action in by_sequence(given):
            found = at_all(plain(folder(name, labels)), ids).expand(-1, 2)  # one label is read by both columns
            values.append(found[:-1][torch.from_numpy(action[1:])])
            ends.append(found[-1])
    np.testing.assert_allclose(out.values, torch.cat(values).t(), rtol=0, atol=2e-6)
    np.testing.assert_allclose(out.bootstrap_values, torch.stack(ends).t(), rtol=0, atol=2e-6)
    assert np.abs(out.values).max() > 1e-2
    assert np.array_equal(out.values[0], out.values[1]) == (labels == 1)


class Squares:
    """The loss sum(weight * value^2) over all columns."""

    needs, outputs, unit, slots = frozenset(), frozenset({Output.VALUES}), "episode", ("main",)

    def weights(self, counts: Counts) -> Weights:
        return Weights(weight=np.ones(counts.actions))

    def __call__(self, ops, out, batch, coef):
        return Loss({"value": Term(ops.xp.sum(batch.weight * out.values ** 2))})


def step_of(given: Rollouts) -> StepData:
    n = int(given.is_action.sum())
    return StepData(given, np.ones(n, bool), Weights(weight=np.linspace(-1, 1, n)))


def accumulated(learner, given: Rollouts, parts) -> dict[str, torch.Tensor]:
    for part in parts:
        learner.accumulate(cut(step_of(given), np.array(part)), Squares(), {})
    found = {name: g.clone() for name, g in learner._gradients["main"].items()}
    learner.discard()
    return found


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["llama, tokens", "gpt2, tokens", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_library_s_and_do_not_depend_on_the_split(name, checkpointing, folder):
    given = rollouts(prompt=12)
    learner = load(folder(name), optimization=Optimization(), gradient_checkpointing=checkpointing)
    whole, split = accumulated(learner, given, [[0, 1, 2, 3]]), accumulated(learner, given, [[0], [3, 1], [2]])
    module, weight = plain(folder(name)), torch.linspace(-1, 1, int(given.is_action.sum()))
    values = torch.cat([at_all(module, ids)[:-1, 0][torch.from_numpy(action[1:])]
                        for ids, action in by_sequence(given)])
    (weight * values ** 2).sum().backward()
    head = learner.trunk._name
    expected = {n.replace(f"{head}.", "value_head."): p.grad for n, p in module.named_parameters()}
    assert set(expected) == set(whole)
    largest = max(float(g.abs().max()) for g in whole.values())
    for key, gradient in expected.items():
        torch.testing.assert_close(whole[key], gradient, rtol=0, atol=3e-6 * largest)
        torch.testing.assert_close(split[key], whole[key], rtol=0, atol=3e-6 * largest)


def trained(learner, steps: int = 2) -> None:
    for _ in range(steps):
        learner.accumulate(cut(step_of(rollouts()), np.arange(4)), Squares(), {})
        learner.apply()


FAST = Optimization(lr=0.01)


@pytest.mark.parametrize("name", ["llama, tokens", "gpt2, tokens", "llama"])
@pytest.mark.parametrize(("labels", "heads"), [(1, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("adapter", [None, Lora(rank=2)], ids=["all weights", "lora"])
def test_a_saved_critic_is_a_classification_model_with_equal_logits(name, labels, heads, adapter, folder, tmp_path):
    learner = load(folder(name, labels), heads, FAST, adapter=adapter)
    trained(learner)
    learner.save(tmp_path)
    assert not (tmp_path / "value_head.safetensors").exists()
    given, module = rollouts(), plain(tmp_path)
    assert module.config.num_labels == heads and type(module) is KINDS[name][0]
    with torch.no_grad():
        expected = torch.cat([at_all(module, ids)[:-1][torch.from_numpy(action[1:])]
                              for ids, action in by_sequence(given)])
    values = learner.score(given, VALUES, 1.0).values
    np.testing.assert_allclose(values, expected.t(), rtol=0, atol=3e-6)
    np.testing.assert_allclose(load(tmp_path, heads).score(given, VALUES, 1.0).values, values, rtol=0, atol=3e-6)
    before = load(folder(name, labels), heads).score(given, VALUES, 1.0).values
    assert np.abs(before - values).max() > 1e-3


@pytest.mark.parametrize("adapter", [None, Lora(rank=2)], ids=["all weights", "lora"])
def test_a_critic_goes_on_bit_for_bit_from_its_state(adapter, folder):
    whole = load(folder("llama"), 2, FAST, adapter=adapter)
    trained(whole, 4)
    first, second = (load(folder("llama"), 2, FAST, adapter=adapter) for _ in range(2))
    trained(first)
    second.load_state(first.state())
    trained(second)
    expected, found = whole.state(), second.state()
    assert set(expected) == set(found) and "weights.value_head.weight" in found
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_an_adapter_trains_itself_and_the_value_head_alone(folder):
    learner = load(folder("llama, tokens"), 1, FAST, adapter=Lora(rank=2))
    names = set(learner._parameters)
    assert {n for n in names if ".lora_" not in n} == {"value_head.weight", "value_head.bias"}
    assert any("q_proj.lora_A" in n for n in names) and learner.base() is None


def test_prompts_are_computed_once_for_all_their_answers_and_windows_keep_to_their_own(folder):
    assert load(folder("llama")).trunk.shares_prompts and not load(folder("mistral, window")).trunk.shares_prompts
    packed = load(folder("llama"), packing="always")
    np.testing.assert_allclose(packed.score(rollouts(), VALUES, 1.0).values,
                               load(folder("llama")).score(rollouts(), VALUES, 1.0).values, rtol=0, atol=2e-6)


def test_a_critic_is_no_policy_and_no_reference(folder):
    with pytest.raises(ConfigError, match=r"is a LlamaForSequenceClassification, which gives no log-probs.*a critic"):
        HF(weights=str(folder("llama")), device="cpu").load(LoadRequest(V))
    learner = load(folder("llama"))
    with pytest.raises(ConfigError, match=r"gives no entropy, logprobs from this model"):
        learner.score(rollouts(), frozenset({Output.LOGPROBS, Output.ENTROPY}), 1.0)
    with pytest.raises(ConfigError, match="a critic alone"):
        _ = learner.model


@pytest.mark.parametrize("name", ["bert", "bert, tokens"])
def test_encoders_are_refused_as_critics(name, folder):
    with pytest.raises(ConfigError, match=r"Bert.* cannot be a critic: it is not causal"):
        load(folder(name))


def test_other_models_that_are_refused_by_name(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"2 labels \(LABEL_0, LABEL_1\), the run estimates 3 reward columns"):
        load(folder("llama", 2), heads=3)
    with pytest.raises(ConfigError, match="100 tokens, the model 61 embeddings"):
        HF(weights=str(folder("llama")), device="cpu").load(LoadRequest(100, value_heads=1))
    roberta = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SIZES, num_labels=1))
    roberta.save_pretrained(tmp_path / "roberta")
    with pytest.raises(ConfigError, match="no linear layer score or classifier"):
        load(tmp_path / "roberta")


def test_a_head_that_reads_something_else_is_refused(folder, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaForSequenceClassification

    forward = LlamaForSequenceClassification.forward

    def capped(self, *args, **named):
        out = forward(self, *args, **named)
        out.logits = out.logits.sigmoid()
        return out
    monkeypatch.setattr(LlamaForSequenceClassification, "forward", capped)
    with pytest.raises(ConfigError, match="logits are not its hidden states through its linear layer"):
        load(folder("llama"))
