"""Whole runs of the backend `hf`: trained, resumed bit for bit, and left as a folder that loads anywhere."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers")

import posttrain  # after the check that the library is there

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the libraries' own


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny tied Llama and a tokenizer of characters with a chat template, as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("base")
    characters = "0123456789+="
    ids = {"<eos>": 0, **{c: i for i, c in enumerate(characters, 1)}}
    library = Tokenizer(models.WordLevel(ids, unk_token="<eos>"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}="
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=13, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True)).save_pretrained(folder)
    return folder


def digits(completions, **columns):
    """Fraction of digits among the characters."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def settings(base: Path, run: Path, **policy) -> dict:
    rows = [{"messages": [{"role": "user", "content": f"{a}+{b}"}], "answer": str(a + b)}
            for a in (1, 2) for b in (3, 4)]
    return {
        "recipe": "grpo", "steps": 4, "run": str(run), "threads": 1, "seed": 3, "optimizer": {"lr": 0.01},
        "policy": {"use": "hf", "weights": str(base), "device": "cpu", **policy},
        "tokenizer": {"use": "hf", "weights": str(base)}, "task": {"use": "rows", "rows": rows},
        "rewards": {"digits": digits}, "rollout": {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 6},
        "checkpoint": {"every": 2, "keep": 5}, "trackers": {"console": None, "jsonl": None},
    }


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "timing"} for row in rows]


@pytest.mark.parametrize("adapter", [None, {"use": "lora", "rank": 4}], ids=["all weights", "lora"])
def test_a_run_trains_resumes_bit_for_bit_and_leaves_a_folder_that_loads_anywhere(adapter, base, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    posttrain.train(settings(base, whole, adapter=adapter), output="quiet")
    posttrain.train({**settings(base, cut, adapter=adapter), "steps": 2}, output="quiet")
    posttrain.resume(cut, ["steps=4"], output="quiet")
    assert metrics(cut) == metrics(whole) and len(metrics(whole)) == 4
    assert all(0 < line["rollout/busy"] <= 1 for line in metrics(whole))
    folders = [transformers.AutoModelForCausalLM.from_pretrained(run / "policy") for run in (whole, cut)]
    for a, b in zip(*(m.state_dict().values() for m in folders), strict=True):
        assert torch.equal(a, b)
    before = transformers.AutoModelForCausalLM.from_pretrained(base).state_dict()
    changed = {n for n, t in folders[0].state_dict().items() if not torch.equal(t, before[n])}
    assert changed == ({n for n in before if "_proj" in n} if adapter else set(before))


def test_an_adapter_makes_small_checkpoints(base, tmp_path):
    sizes = {}
    for name, adapter in (("all", None), ("lora", {"use": "lora", "rank": 1, "targets": ["q_proj"]})):
        posttrain.train({**settings(base, tmp_path / name, adapter=adapter), "steps": 2}, output="quiet")
        files = (tmp_path / name / "checkpoints").rglob("*.safetensors")
        sizes[name] = sum(path.stat().st_size for path in files)
    assert sizes["lora"] < sizes["all"] / 5


def test_the_policy_s_log_probs_are_those_of_the_sampler(base, tmp_path):
    posttrain.train({**settings(base, tmp_path / "run"), "update": {"epochs": 2}}, output="quiet")
    gaps = [row["sampler/gap_max"] for row in metrics(tmp_path / "run")]
    assert np.max(gaps) < 1e-4


LORA = {"use": "lora", "rank": 4}
KL = {"use": "fixed", "placement": "reward", "coef": 0.1}


def test_the_kl_over_the_vocabulary_to_the_policy_without_its_adapter(base, tmp_path):
    """Resumed bit for bit; that it is the one with a reference of its own is tested where one step is."""
    whole, cut = ({**settings(base, tmp_path / name, adapter=LORA), "update": {"epochs": 2},
                   "kl": {**KL, "placement": "loss", "estimator": "exact"}} for name in ("whole", "cut"))
    posttrain.train(whole, output="quiet")
    posttrain.train({**cut, "steps": 2}, output="quiet")
    posttrain.resume(tmp_path / "cut", ["steps=4"], output="quiet")
    found = [metrics(tmp_path / name) for name in ("whole", "cut")]
    assert found[0] == found[1] and len(found[0]) == 4 and found[0][3]["kl/reference"] > 1e-6
    weights = [(tmp_path / name / "policy" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("critic", [False, True], ids=["no critic", "shared critic"])
def test_the_reference_of_an_adapter_is_the_policy_without_it_and_loads_nothing(critic, base, tmp_path, monkeypatch):
    from posttrain_backends._torch import hf_loading

    loads, read = [], hf_loading.read
    monkeypatch.setattr(hf_loading, "read", lambda spec: loads.append(spec.adapter) or read(spec))
    own, whole, cut = ({**settings(base, tmp_path / name, adapter=LORA), "kl": KL, "update": {"epochs": 2},
                        **({"estimator": "gae", "critic": "policy"} if critic else {})}
                       for name in ("own", "whole", "cut"))
    own["reference"] = {"use": "hf", "weights": str(base), "device": "cpu"}
    posttrain.train(own, output="quiet")
    assert len(loads) == 2
    posttrain.train(whole, output="quiet")
    assert len(loads) == 3
    posttrain.train({**cut, "steps": 2}, output="quiet")
    posttrain.resume(tmp_path / "cut", ["steps=4"], output="quiet")
    found = [metrics(tmp_path / name) for name in ("own", "whole", "cut")]
    assert found[0] == found[1] == found[2] and len(found[0]) == 4
    assert found[0][0]["kl/reference"] < 1e-9 < found[0][3]["kl/reference"]  # values and log-probs are asked together
    weights = [(tmp_path / name / "policy" / "model.safetensors").read_bytes() for name in ("own", "whole", "cut")]
    assert weights[0] == weights[1] == weights[2]


def test_the_reference_of_a_policy_whose_weights_are_all_trained_is_a_model_of_its_own(base, tmp_path):
    posttrain.train({**settings(base, tmp_path / "run"), "kl": KL}, output="quiet")
    kl = [row["kl/reference"] for row in metrics(tmp_path / "run")]
    assert kl[0] == 0 < kl[-1]


def test_the_reference_of_an_adapter_moves_too(base, tmp_path):
    """Before it moves it is the policy without its adapter."""
    run = tmp_path / "run"
    posttrain.train({**settings(base, run, adapter=LORA), "kl": {"use": "fixed", "placement": "loss", "coef": 0.05},
                     "reference_update": {"every": 2}}, output="quiet")
    kl, initial = ([row[name] for row in metrics(run)] for name in ("kl/reference", "kl/initial"))
    assert kl[1] == pytest.approx(initial[1], rel=1e-3, abs=1e-7) and initial[1] > 0
    assert abs(kl[2]) < 1e-9 < initial[2]
    with pytest.raises(posttrain.errors.ConfigError, match="a mean of two adapters' factors is no mean"):
        posttrain.train({**settings(base, tmp_path / "soft", adapter=LORA), "kl": {"use": "fixed"},
                         "reference_update": {"every": 2, "rate": 0.5}}, output="quiet")
