"""Whole runs that learn from a reward model, with a critic that begins as that reward model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers")

import posttrain  # after the check that the library is there
from posttrain.errors import ConfigError, RewardError

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the libraries' own

SIZES = {"vocab_size": 15, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 13}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Folders `policy` and `judge`: tiny Llamas with one tokenizer of characters. The judge likes the digit 7: its
    score counts, in the text's last token, nothing but that."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("base")
    ids = {"<eos>": 0, **{c: i for i, c in enumerate("0123456789+=", 1)}, "<pad>": 13, "<unk>": 14}
    library = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}={% endif %}{% endfor %}"
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**SIZES, num_labels=1)
    judge = transformers.LlamaForSequenceClassification(config)
    with torch.no_grad():  # read straight from the last token: attention and feed-forward add nothing
        for layer in judge.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        direction = torch.nn.functional.normalize(judge.model.embed_tokens.weight[8], dim=0)
        judge.score.weight.copy_(direction[None])
    for name, model in (("policy", transformers.LlamaForCausalLM(config)), ("judge", judge)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def settings(base: Path, run: Path, **changes) -> dict:
    rows = [{"messages": [{"role": "user", "content": f"{a}+{b}"}]} for a in (1, 2) for b in (3, 4)]
    return {
        "recipe": "ppo", "steps": 4, "run": str(run), "threads": 1, "seed": 3, "optimizer": {"lr": 0.02},
        "policy": {"use": "hf", "weights": str(base / "policy"), "device": "cpu"},
        "critic": {"use": "hf", "weights": str(base / "judge"), "device": "cpu"},
        "tokenizer": {"use": "hf", "weights": str(base / "policy")}, "task": {"use": "rows", "rows": rows},
        "rewards": {"judge": {"use": "reward_model", "weights": str(base / "judge"), "device": "cpu"},
                    "length": {"use": "length", "soft_limit": 2, "hard_limit": 40, "weight": 0.0}},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 4},
        "checkpoint": {"every": 2, "keep": 5}, "trackers": {"console": None, "jsonl": None}, **changes,
    }


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "timing"} for row in rows]


def test_a_run_with_reward_model_and_critic_learns_and_resumes_bit_for_bit(base, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    posttrain.train(settings(base, whole), output="quiet")
    posttrain.train(settings(base, cut, steps=2), output="quiet")
    posttrain.resume(cut, ["steps=4"], output="quiet")
    assert metrics(cut) == metrics(whole) and len(metrics(whole)) == 4
    folders = [transformers.AutoModelForCausalLM.from_pretrained(run / "policy") for run in (whole, cut)]
    for a, b in zip(*(m.state_dict().values() for m in folders), strict=True):
        assert torch.equal(a, b)


def test_rewards_in_samples_are_the_judge_s_own_scores_and_learning_raises_them(base, tmp_path):
    posttrain.train(settings(base, tmp_path / "run", steps=25), output="quiet")
    rows = metrics(tmp_path / "run")
    first, last = ([row["reward/judge/mean"] for row in part] for part in (rows[:3], rows[-3:]))
    assert sum(last) / 3 > sum(first) / 3 + 1.0
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(base / "judge").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base / "judge")
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert samples
    for sample in samples[:6]:
        text = sample["prompt"][0]["content"] + "=" + sample["completion"]
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            assert sample["reward"] == pytest.approx(float(judge(input_ids=ids).logits[0, 0]), abs=1e-5)


def test_a_row_too_long_for_the_judge_is_named_or_left_out_by_its_rule(base, tmp_path):
    judge = {"use": "reward_model", "weights": str(base / "judge"), "device": "cpu", "max_tokens": 7}
    with pytest.raises(RewardError, match=r"reward 'judge' raised DataError: the row has 8 tokens.* on row "):
        posttrain.train(settings(base, tmp_path / "a", rewards={"judge": judge}), output="quiet")
    run = posttrain.train(settings(base, tmp_path / "b", rewards={"judge": {**judge, "on_error": "drop_sample"}},
                                   reward_workers={"max_error_rate": 1.0}, steps=1), output="quiet")
    assert metrics(run.directory)[0]["reward/dropped"] > 0


def test_what_is_refused_by_name(base, tmp_path):
    rules = {**settings(base, tmp_path)["rewards"]["judge"], "timeout": 3.0, "on_timeout": "zero"}
    with pytest.raises(ConfigError, match=r"rewards\.judge\.timeout: a reward that is a model is called in the "
                                          r"training process(.|\n)*rewards\.judge\.on_timeout"):
        posttrain.train(settings(base, tmp_path / "a", rewards={"judge": rules}), output="quiet")
    judge = settings(base, tmp_path)["critic"]
    with pytest.raises(ConfigError, match="gives no log-probs; it can be a critic"):
        posttrain.train(settings(base, tmp_path / "b", policy=judge), output="quiet")
    with pytest.raises(ConfigError, match="policy: backend 'hf' loaded a model that gives .*values and no log-probs"):
        posttrain.train(settings(base, tmp_path / "c", policy=judge, critic="policy"), output="quiet")
