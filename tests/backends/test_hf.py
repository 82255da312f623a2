"""The backend `hf`: equal to transformers' own logits, cached drawing equal to reading, adapters, what is refused."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from likelihood import Likelihood
from ragged import answers_to_one_prompt

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers")

from posttrain.batching import StepData, cut  # after the check that the library is there
from posttrain.data import Prompt, Rollouts, Sampling, Weights
from posttrain.errors import ConfigError, DataError, PluginError
from posttrain.protocols import LoadRequest, Optimization, Output
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models.hf import CachedHFModel, HFModel, cache_error, merged, packing_error
from posttrain_backends.engines import Batched
from posttrain_backends.hf import HF, HFTokenizer, Lora

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the libraries' own

V = 61
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}
KINDS = {
    "llama": ("llama", SIZES), "llama, tied": ("llama", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**SIZES, "head_dim": 8}),
    "mistral, window": ("mistral", {**SIZES, "sliding_window": 16}),
    "gpt2": ("gpt2", {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "bloom": ("bloom", {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mamba": ("mamba", {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "experts": ("qwen3_moe", {**SIZES, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                              "moe_intermediate_size": 16}),
}
CACHED = ("llama", "llama, tied", "qwen3", "gpt2", "experts")
LOGPROBS = frozenset({Output.LOGPROBS})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """name -> a folder of random weights, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            kind, sizes = KINDS[name]
            torch.manual_seed(3)
            made[name] = tmp_path_factory.mktemp("model")
            config = transformers.AutoConfig.for_model(kind, **sizes)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
        return made[name]
    return make


def load(path: Path, request: LoadRequest | None = None, **fields):
    return HF(weights=str(path), device="cpu", **fields).load(request or LoadRequest(V))


def plain(path: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def rollouts(seed: int = 0, prompt: int = 4, answers=(3, 9, 1, 14)) -> Rollouts:
    return answers_to_one_prompt(prompt, answers, low=0, high=V, seed=seed)


def own_logprobs(causal, given: Rollouts) -> np.ndarray:
    """Log-probs of the actions by the library's logits, a sequence at a time."""
    found = []
    for a, b in zip(given.offsets[:-1], given.offsets[1:], strict=True):
        ids = torch.from_numpy(given.tokens[a:b].astype(np.int64))
        with torch.no_grad():
            table = causal(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        found.append(table[:-1].gather(1, ids[1:, None])[:, 0].numpy()[given.is_action[a + 1:b]])
    return np.concatenate(found)


@pytest.mark.oracle
@pytest.mark.parametrize("name", KINDS)
def test_log_probs_equal_those_of_the_library(name, folder):
    given = rollouts()
    found = load(folder(name)).score(given, LOGPROBS, 1.0).logprobs
    np.testing.assert_allclose(found, own_logprobs(plain(folder(name)), given), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", KINDS)
def test_a_cache_is_used_where_drawing_with_it_is_exact(name, folder, caplog):
    with caplog.at_level(logging.WARNING):
        model = load(folder(name)).model
    assert isinstance(model, CachedHFModel) == (name in CACHED)
    assert (type(model) is HFModel) == bool([r for r in caplog.records if "without a cache" in r.message])
    if isinstance(model, CachedHFModel):
        assert cache_error(model) < 1e-5


class Letters:
    """A tokenizer of one letter per id."""

    vocab_size, bos, eos, pad = V, None, 0, 0

    def encode(self, text):
        return [ord(c) - 60 for c in text]

    def decode(self, tokens):
        return "".join(chr(int(t) + 60) for t in tokens if t)

    def chat(self, messages):
        raise AssertionError("no conversation is asked for")


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral, window"])
@pytest.mark.parametrize("adapter", [None, Lora(rank=4)])
def test_recorded_log_probs_of_drawn_tokens_equal_scored_ones(name, adapter, folder):
    learner = load(folder(name), adapter=adapter)
    shake(learner)
    sampler = Batched(slots=3).start(learner, Letters(), shared=True)
    prompts = [Prompt(text=t, group=g) for g, t in enumerate(["abc", "abc", "hello", "b", "abc"])]
    drawn = sampler.rollout(prompts, Sampling(max_new_tokens=7), (0, 1))
    scored = learner.score(drawn, LOGPROBS, 1.0).logprobs
    np.testing.assert_allclose(drawn.behavior_logprobs, scored, rtol=0, atol=1e-4)
    again = Batched().start(learner, Letters(), shared=False).rollout(prompts, Sampling(max_new_tokens=7), (0, 1))
    assert again.tokens.tolist() == drawn.tokens.tolist()


def shake(learner) -> None:
    """Move every trained weight, so that an adapter is no longer zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, p in learner.model.named_parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))


def accumulated(learner, given: Rollouts, parts) -> dict[str, torch.Tensor]:
    keep = np.ones(int(given.is_action.sum()), bool)
    step = StepData(given, keep, Weights(weight=np.linspace(-1, 1, len(keep))))
    for part in parts:
        learner.accumulate(cut(step, np.array(part)), Likelihood(), {})
    found = {name: g.clone() for name, g in learner._gradients["main"].items()}
    learner.discard()
    return found


@pytest.mark.parametrize("name", ["llama, tied", "gpt2", "experts"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_do_not_depend_on_the_split_and_equal_the_library_s(name, checkpointing, folder):
    given = rollouts(prompt=12)
    learner = load(folder(name), LoadRequest(V, optimization=Optimization()), gradient_checkpointing=checkpointing)
    assert learner.model.shares_prompts
    whole = accumulated(learner, given, [[0, 1, 2, 3]])
    split = accumulated(learner, given, [[0], [3, 1], [2]])
    causal = plain(folder(name))
    weights, done = np.linspace(-1, 1, int(given.is_action.sum())), 0
    for a, b in zip(given.offsets[:-1], given.offsets[1:], strict=True):
        ids, acts = torch.from_numpy(given.tokens[a:b].astype(np.int64)), torch.from_numpy(given.is_action[a + 1:b])
        n = int(acts.sum())
        table = causal(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0][acts]
        (-(torch.from_numpy(weights[done:done + n]).float() * table).sum()).backward()
        done += n
    largest = max(float(g.abs().max()) for g in whole.values())
    for name, p in causal.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(whole[name], p.grad, rtol=0, atol=3e-6 * largest)
        torch.testing.assert_close(split[name], whole[name], rtol=0, atol=3e-6 * largest)


def test_tied_weights_have_one_name_and_stay_tied(folder, tmp_path):
    learner = load(folder("llama, tied"), LoadRequest(V, optimization=Optimization()))
    assert "lm_head.weight" not in learner.model.state_dict()
    shake(learner)
    learner.save(tmp_path)
    again = load(tmp_path)
    for (name, a), (other, b) in zip(learner.params(), again.params(), strict=True):
        assert name == other and torch.equal(a, b)


@pytest.mark.parametrize("adapter", [None, Lora(rank=4), Lora(rank=2, targets=("q_proj", "v_proj"))])
def test_a_saved_folder_gives_the_library_equal_logits(adapter, folder, tmp_path):
    learner = load(folder("llama, tied"), adapter=adapter)
    shake(learner)
    learner.save(tmp_path)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(tmp_path)(ids).logits, learner.model.causal(ids).logits, rtol=0, atol=2e-6)
    assert not list(tmp_path.glob("adapter*"))


def test_saving_copies_only_the_weights_that_the_adapter_changes(folder):
    causal = load(folder("llama, tied"), adapter=Lora(rank=2, targets=("q_proj", "v_proj"))).model.causal
    live = {t.data_ptr() for t in causal.state_dict().values()}
    copied = {name for name, t in merged(causal).items() if t.data_ptr() not in live}
    assert copied == {f"model.layers.{i}.self_attn.{x}_proj.weight" for i in (0, 1) for x in "qv"}


def test_an_adapter_alone_is_trained_and_kept_and_begins_as_the_model_itself(folder):
    request = LoadRequest(V, seed=5, optimization=Optimization(lr=0.01))
    learner, base = load(folder("llama"), request, adapter=Lora(rank=4)), plain(folder("llama"))
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(learner.model.causal(ids).logits, base(ids).logits)
    assert all(".lora_" in name for name in learner._parameters)
    state = learner.state()
    assert {n for n in state if n.startswith("weights.")} == {f"weights.{n}" for n, _ in learner.params()}
    assert not any(name.endswith("embed_tokens.weight") for name in state)
    accumulate_and_step(learner)
    assert learner.version == 1
    other = load(folder("llama"), request, adapter=Lora(rank=4))
    other.load_state(learner.state())
    given = rollouts()
    assert np.array_equal(other.score(given, LOGPROBS, 1.0).logprobs, learner.score(given, LOGPROBS, 1.0).logprobs)
    base_now = {n: p for n, p in learner.model.causal.named_parameters() if ".lora_" not in n}
    before = dict(base.named_parameters())
    assert all(torch.equal(p, before[n.replace(".base_layer.", ".")]) for n, p in base_now.items())


def accumulate_and_step(learner) -> None:
    given = rollouts()
    keep = np.ones(int(given.is_action.sum()), bool)
    step = StepData(given, keep, Weights(weight=np.ones(len(keep))))
    learner.accumulate(cut(step, np.arange(4)), Likelihood(), {})
    learner.apply()


TREES = ("llama", "llama, tied", "qwen3", "gpt2", "experts")


@pytest.mark.parametrize("name", KINDS)
def test_prompts_are_computed_once_where_that_is_proved_exact(name, folder):
    learner, given = load(folder(name)), rollouts(prompt=20, answers=(3, 2, 1, 4))
    assert learner.model.shares_prompts == (name in TREES)
    widths = []
    run = learner.model.run
    learner.model.run = lambda tokens, *rest, **named: widths.append(tokens.numel()) or run(tokens, *rest, **named)
    found = learner.score(given, LOGPROBS, 1.0).logprobs
    assert (sum(widths) == 20 + 10 - 4) == (name in TREES)
    np.testing.assert_allclose(found, own_logprobs(plain(folder(name)), given), rtol=0, atol=2e-5)


def test_packed_sequences_are_not_shared_and_bf16_follows_trees_too(folder):
    given = rollouts(prompt=20, answers=(3, 2, 1, 4))
    assert not load(folder("llama"), packing="always").model.shares_prompts
    exact, half = (load(folder("llama"), precision=p).score(given, LOGPROBS, 1.0).logprobs for p in ("float32", "bf16"))
    assert 0 < np.abs(exact - half).max() < 0.1


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_packed_equals_padded(name, folder):
    given = rollouts()
    padded, packed = load(folder(name)), load(folder(name), packing="always")
    assert packed.model.packed and not padded.model.packed
    found = (x.score(given, LOGPROBS, 1.0).logprobs for x in (padded, packed))
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mamba", "bloom"])
def test_packing_is_refused_where_the_probe_sees_a_leak(name, folder):
    assert packing_error(HFModel(plain(folder(name)), "float32")) > 1e-3
    with pytest.raises(ConfigError, match="not kept apart"):
        load(folder(name), packing="always")


def test_value_heads_and_bf16(folder):
    learner = load(folder("llama"), LoadRequest(V, value_heads=2))
    out = learner.score(rollouts(), frozenset({Output.LOGPROBS, Output.VALUES, Output.BOOTSTRAP_VALUES}), 1.0)
    assert out.values.shape == (2, 27) and out.bootstrap_values.shape == (2, 4) and (out.values == 0).all()
    half = load(folder("llama"), precision="bf16").score(rollouts(), LOGPROBS, 1.0).logprobs
    assert 0 < np.abs(half - out.logprobs).max() < 0.1


def test_a_cap_on_logits_is_refused_although_small_logits_do_not_show_it(tmp_path):
    config = transformers.AutoConfig.for_model("gemma2", **SIZES, head_dim=8)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="soft cap on logits"):
        load(tmp_path)


def test_what_is_refused_by_name(folder, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"100 tokens, the model 61 embeddings"):
        load(folder("llama"), LoadRequest(100))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="linear layers of this model are .*q_proj"):
        load(folder("llama"), adapter=Lora(targets=("query",)))
    with pytest.raises(ConfigError, match="an adapter on it would never be trained; leave it out"):
        load(folder("llama"), adapter=Lora(targets=("q_proj", "lm_head")))
    with pytest.raises(ConfigError, match="holds several matrices in one"):
        load(folder("experts"), adapter=Lora())
    with pytest.raises(ValueError, match="40 hexadecimal digits"):
        HF(model="org/name", revision="main")
    with pytest.raises(ValueError, match="give weights"):
        HF(weights="a", model="b/c")
    monkeypatch.setattr("posttrain_backends.installed.find_spec", lambda name: None)
    with pytest.raises(PluginError, match=r"pip install 'posttrain-backends\[hf\]'"):
        load(folder("llama"))


def test_layouts_without_tokens_and_of_several_blocks(folder):
    model = load(folder("llama")).model
    with torch.no_grad():
        assert model.hidden(torch.zeros(0, dtype=torch.long), Layout.from_offsets([0])).shape == (0, 32)
        layout = Layout.from_offsets([0, 30, 33, 40])
        assert len(layout.blocks) > 1
        tokens = torch.arange(40) % V
        whole, keys, _ = model.prefill(tokens, layout)
        torch.testing.assert_close(whole, model.hidden(tokens, layout), rtol=0, atol=1e-6)
        apart = model.prefill(tokens[30:33], Layout.from_offsets([0, 3]))[1]
        torch.testing.assert_close(keys[1][30:33], apart[1], rtol=0, atol=1e-6)


@pytest.fixture
def words(tmp_path) -> Path:
    """A tokenizer folder of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    library = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=library, unk_token="<unk>", eos_token="</s>").save_pretrained(
        tmp_path)
    return tmp_path


def test_tokenizer_ids_templates_and_files(words, tmp_path_factory):
    template = "{% for m in messages %}{{ m.content }} {% endfor %}<s>"
    tokenizer = HFTokenizer(weights=str(words), chat_template=template).load()
    assert (tokenizer.eos, tokenizer.pad, tokenizer.bos, tokenizer.vocab_size) == (2, 2, None, 5)
    assert tokenizer.encode("a b") == [3, 4] and tokenizer.decode([3, 4, 2]) == "a b"
    assert tokenizer.chat([{"role": "user", "content": "b a"}])[:2] == [4, 3]
    again = tmp_path_factory.mktemp("saved")
    tokenizer.save(again)
    assert HFTokenizer(weights=str(again)).load().chat([{"role": "user", "content": "b a"}]) == tokenizer.chat(
        [{"role": "user", "content": "b a"}])
    named = HFTokenizer(weights=str(words), eos="<s>", bos="</s>", pad="<unk>").load()
    assert (named.eos, named.bos, named.pad) == (1, 2, 0)


def test_tokenizer_errors(words, tmp_path_factory):
    with pytest.raises(ConfigError, match=r"tokenizer.eos is '</S>'.*did you mean '</s>'"):
        HFTokenizer(weights=str(words), eos="</S>").load()
    with pytest.raises(DataError, match="no chat template"):
        HFTokenizer(weights=str(words)).load().chat([{"role": "user", "content": "a"}])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        HFTokenizer(weights=str(tmp_path_factory.mktemp("empty"))).load()
