"""The reward `reward_model`: equal to transformers' own logits, padded or not, what is read, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers")

from judges import COMPLETIONS, GROUPED, PROMPTS, SEQUENCE, TOKEN, V, chats, written  # after the check
from posttrain.errors import ConfigError, DataError, MemoryExhausted, PluginError
from posttrain.protocols import RewardSource
from posttrain_backends._torch.hf_classifier import fault_of
from posttrain_backends.reward_models import RewardModel

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the libraries' own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """name -> a folder of random weights and a tokenizer of characters, made once."""
    return cache(lambda name: written(tmp_path_factory.mktemp("model"), name))


def load(path: Path, **fields):
    return RewardModel(weights=str(path), device="cpu", **fields).load(1)


def library(path: Path):
    """Module and tokenizer as the library's user has them."""
    config = transformers.AutoConfig.from_pretrained(path)
    auto = (transformers.AutoModelForTokenClassification if "Token" in config.architectures[0]
            else transformers.AutoModelForSequenceClassification)
    return auto.from_pretrained(path).eval(), transformers.AutoTokenizer.from_pretrained(path)


def alone(path: Path, prompts, completions, special: bool = False) -> list[torch.Tensor]:
    """Logits of each row in a forward pass of its own, its text made as TRL makes it for a reward model."""
    module, tokenizer = library(path)
    if module.config.pad_token_id is None:  # TRL's own choice; texts that end with it are read before it
        module.config.pad_token_id = tokenizer.eos_token_id
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        chat = isinstance(prompt, list)
        text = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": completion}],
                                             tokenize=False) if chat else prompt + completion
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=special and not chat)["input_ids"]
        with torch.no_grad():
            found.append(module(input_ids=ids).logits[0])
    return found


@pytest.mark.oracle
@pytest.mark.parametrize("name", SEQUENCE)
@pytest.mark.parametrize("batch_tokens", [1, 60, 16384])
def test_scores_are_the_library_s_logits_of_every_row_alone(name, batch_tokens, folder):
    label = 1 if "two" in name else 0
    reward = load(folder(name), batch_tokens=batch_tokens, label=label)
    assert not reward.rows_alone
    expected = [float(x[label]) for x in alone(folder(name), PROMPTS, COMPLETIONS, special=name == "bert")]
    found = reward(prompts=list(PROMPTS), completions=list(COMPLETIONS), answer=[None] * 5)
    assert found == pytest.approx(expected, abs=2e-5) and max(expected) - min(expected) > 1e-2


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["qwen3, two labels", "gpt2", "bert"])
def test_messages_go_through_the_model_s_own_template(name, folder):
    label = "good" if "two" in name else ""
    expected = [float(x[-1]) for x in alone(folder(name), chats(), COMPLETIONS)]
    found = load(folder(name), label=label)(prompts=chats(), completions=list(COMPLETIONS))
    assert found == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(("output", "expected"), [
    ("logit", lambda x: x[1]), ("logprob", lambda x: x.log_softmax(-1)[1]),
    ("probability", lambda x: x.softmax(-1)[1])])
def test_outputs_of_several_labels(output, expected, folder):
    path = folder("qwen3, two labels")
    found = load(path, label="good", output=output)(prompts=list(PROMPTS), completions=list(COMPLETIONS))
    assert found == pytest.approx([float(expected(x)) for x in alone(path, PROMPTS, COMPLETIONS)], abs=2e-5)


def test_outputs_of_one_label_are_those_of_the_logistic_function(folder):
    logits = [float(x[0]) for x in alone(folder("llama"), PROMPTS, COMPLETIONS)]
    found = {o: load(folder("llama"), output=o)(prompts=list(PROMPTS), completions=list(COMPLETIONS))
             for o in ("logprob", "probability")}
    assert found["probability"] == pytest.approx([1 / (1 + math.exp(-x)) for x in logits], abs=2e-5)
    assert found["logprob"] == pytest.approx([-math.log1p(math.exp(-x)) for x in logits], abs=2e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("name", TOKEN)
@pytest.mark.parametrize(("tokens", "reduced"), [
    ("last", lambda x: x[-1]), ("mean", lambda x: sum(x) / len(x)), ("min", min)])
def test_token_scores_are_those_of_the_answer_s_characters(name, tokens, reduced, folder):
    """One token is one character here, so the places of the answer are counted by hand."""
    label = 0 if name == "llama, tokens" else 1
    special = name == "bert, tokens"
    reward = load(folder(name), tokens=tokens, label=label, batch_tokens=50)
    found = reward(prompts=list(PROMPTS), completions=list(COMPLETIONS))
    expected = []
    for x, p, c in zip(alone(folder(name), PROMPTS, COMPLETIONS, special), PROMPTS, COMPLETIONS, strict=True):
        first = len(p) + special
        expected.append(reduced(x[first:first + len(c), label].tolist()) if c else None)
    assert found == pytest.approx(expected, abs=2e-5) and found[3] is None
    chat = reward(prompts=chats(), completions=list(COMPLETIONS))
    for x, p, c, score in zip(alone(folder(name), chats(), COMPLETIONS), PROMPTS, COMPLETIONS, chat, strict=True):
        first = len("[s]s") + 1 + len("[u]") + len(p) + 1 + len("[a]")  # <eos> is one token; the template strips
        n = len(c.strip())
        assert score == pytest.approx(reduced(x[first:first + n, label].tolist()) if n else None, abs=2e-5)


def test_special_tokens_can_be_asked_for_and_refused(folder):
    for choice, special in (("add", True), ("none", False)):
        found = load(folder("bert"), special_tokens=choice)(prompts=list(PROMPTS), completions=list(COMPLETIONS))
        expected = [float(x[0]) for x in alone(folder("bert"), PROMPTS, COMPLETIONS, special)]
        assert found == pytest.approx(expected, abs=2e-5)


def test_rows_of_equal_length_share_forward_passes_up_to_the_budget(folder, monkeypatch):
    reward, widths = load(folder("llama"), batch_tokens=40), []
    run = reward.logits
    monkeypatch.setattr(reward, "logits", lambda ids: widths.append([len(row) for row in ids]) or run(ids))
    reward(prompts=["a"] * 6, completions=["b" * n for n in (4, 9, 9, 29, 9, 4)])
    assert widths == [[30], [10, 10, 10, 5], [5]]


def out_of_memory_beyond(reward, cells: int, monkeypatch) -> list[int]:
    """Make the module raise what CUDA raises where a batch has more cells; the cells of every attempt."""
    tried: list[int] = []
    forward = reward.module.forward

    def limited(input_ids, **named):
        tried.append(input_ids.numel())
        if input_ids.numel() > cells:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(input_ids=input_ids, **named)
    monkeypatch.setattr(reward.module, "forward", limited)
    return tried


def test_memory_that_runs_out_halves_the_batch_once_and_for_all(folder, monkeypatch, caplog):
    reward = load(folder("llama"))
    prompts, completions = ["ab"] * 8, ["cdefgh"] * 8
    before = reward(prompts=prompts, completions=completions)
    tried = out_of_memory_beyond(reward, 20, monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert reward(prompts=prompts, completions=completions) == pytest.approx(before, abs=2e-5)
        assert tried == [64, 32, 16, 16, 16, 16]
        reward(prompts=prompts, completions=completions)
    assert tried[6:] == [16, 16, 16, 16] and len([r for r in caplog.records if "batch_tokens" in r.message]) == 1
    out_of_memory_beyond(reward, 7, monkeypatch)
    with pytest.raises(MemoryExhausted):
        reward(prompts=prompts, completions=completions)


def test_rows_are_scored_alone_where_padding_changes_scores(folder, monkeypatch, caplog):
    from posttrain_backends._torch import hf_classifier

    read = hf_classifier.read_classifier

    def leaking(*given):
        """A module whose scores tell how wide the batch is."""
        task, module = read(*given)
        def add(_, args, named, out):
            out.logits = out.logits + named["input_ids"].shape[1]
            return out
        module.register_forward_hook(add, with_kwargs=True)
        return task, module
    monkeypatch.setattr(hf_classifier, "read_classifier", leaking)
    with caplog.at_level(logging.WARNING):
        reward = load(folder("llama"))
    assert reward.rows_alone and "one by one" in caplog.text
    expected = [float(x[0]) + len(p + c) for x, p, c in zip(
        alone(folder("llama"), PROMPTS, COMPLETIONS), PROMPTS, COMPLETIONS, strict=True)]
    assert reward(prompts=list(PROMPTS), completions=list(COMPLETIONS)) == pytest.approx(expected, abs=2e-5)


def test_a_pad_id_that_is_chosen_for_the_model_is_told(folder, caplog):
    with caplog.at_level(logging.WARNING):
        assert load(folder("bert")) and not caplog.records
        load(folder("llama"))
    assert "names no token for padding; '<eos>' is taken, as TRL does" in caplog.text


def test_eager_attention_and_bf16_are_near(folder):
    rewards = [load(folder("llama"), **given) for given in ({}, {"attention": "eager"}, {"precision": "bf16"})]
    exact, eager, half = (r(prompts=list(PROMPTS), completions=list(COMPLETIONS)) for r in rewards)
    assert {r.module.dtype for r in rewards[:2]} == {torch.float32} and rewards[2].module.dtype == torch.bfloat16
    assert eager == pytest.approx(exact, abs=2e-5)
    assert half != exact and half == pytest.approx(exact, abs=0.1)


def test_rows_that_cannot_be_read(folder, tmp_path):
    reward = load(folder("llama"))
    with pytest.raises(DataError, match="65 tokens for the reward model, which reads 64"):
        reward(prompts=["a" * 60], completions=["b" * 5])
    assert len(reward(prompts=["a" * 60], completions=["b" * 4])) == 1
    with pytest.raises(DataError, match="which reads 9"):
        load(folder("llama"), max_tokens=9)(prompts=["a" * 6], completions=["b" * 4])
    with pytest.raises(DataError, match="token ids"):
        reward(prompts=[[1, 2]], completions=["b"])
    with pytest.raises(DataError, match="are empty"):
        reward(prompts=[""], completions=[""])
    reward.tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        reward(prompts=chats()[:1], completions=["b"])
    reward.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match="refuses the messages: no system role"):
        reward(prompts=chats()[:1], completions=["b"])


def test_models_that_are_refused_by_name(folder, tmp_path):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)).save_pretrained(tmp_path / "lm")
    with pytest.raises(ConfigError, match=r"is LlamaForCausalLM; a reward model is one of \.\.\.ForSequenceClassif"):
        load(tmp_path / "lm")
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    (tmp_path / "lm" / "config.json").write_text(json.dumps({
        **config, "architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(ConfigError, match=r"lack score\.weight, so its scores would be random"):
        load(tmp_path / "lm")
    transformers.BartForSequenceClassification(transformers.BartConfig(
        vocab_size=V, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)).save_pretrained(tmp_path / "bart")
    with pytest.raises(ConfigError, match="an encoder and a decoder"):
        load(tmp_path / "bart")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(tmp_path / "empty")
    two = folder("qwen3, two labels")
    with pytest.raises(ConfigError, match=r"several labels; which is the reward\? Set label to one of: bad, good"):
        load(two)
    with pytest.raises(ConfigError, match=r"label 'goood' is none of the model's; did you mean 'good'"):
        load(two, label="goood")
    with pytest.raises(ConfigError, match="label 2 is none"):
        load(two, label=2)


def test_an_attention_whose_scores_are_not_eager_s_is_refused_by_name(folder, monkeypatch):
    from transformers import AttentionInterface

    def sees_itself(module, query, key, value, attention_mask, **named):
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None

    reward = load(folder("llama"))
    assert fault_of(reward, "sdpa") == "" and "it raises ValueError" in fault_of(reward, "flash_attention_2")
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sees_itself)
    with pytest.raises(ConfigError, match="attention sdpa cannot be used here: its scores differ from those of eager"):
        load(folder("llama"), attention="sdpa")


def test_what_is_refused_before_anything_is_loaded(monkeypatch):
    for given, said in (({}, "give weights"), ({"weights": "a", "model": "b"}, "give weights"),
                        ({"model": "b", "revision": "main"}, "40 hexadecimal digits"),
                        ({"weights": "a.gguf"}, "GGUF"), ({"weights": "a", "batch_tokens": 0}, "batch_tokens")):
        with pytest.raises(ValueError, match=said):
            RewardModel(**given)
    monkeypatch.setattr("posttrain_backends.installed.find_spec", lambda name: None)
    with pytest.raises(PluginError, match=r"'reward_model' needs torch and .*pip install 'posttrain-backends\[hf\]'"):
        RewardModel(weights="a").load(0)


def test_the_component_is_light(folder):
    spec = RewardModel(weights="a")
    assert pickle.loads(pickle.dumps(spec)) == spec and hash(spec) == hash(RewardModel(weights="a"))
    assert isinstance(spec, RewardSource) and not callable(spec)
    code = ("import sys, posttrain_backends.reward_models as m; m.RewardModel(weights='a'); "
            "print([n for n in ('torch', 'transformers', 'tokenizers') if n in sys.modules])")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
