"""The reward `onnx`: the same numbers as `reward_model`, from safetensors and from an exported graph, and what is
refused.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from judges import COMPLETIONS, GROUPED, PROMPTS, chats, written  # after the check that the libraries are there
from posttrain.errors import ConfigError, DataError, MemoryExhausted, PluginError
from posttrain.protocols import LoadRequest, Optimization, RewardSource
from posttrain_backends._onnx import decoder
from posttrain_backends._onnx.export import with_external
from posttrain_backends.families.config import read_shape
from posttrain_backends.onnx_reward import OnnxReward
from posttrain_backends.reward_models import RewardModel
from posttrain_backends.torch_native import Torch
from safetensors.numpy import load_file

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the libraries' own

NATIVE = ("llama", "llama, padding named", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """name -> a folder of random weights and a tokenizer of characters, made once."""
    return cache(lambda name: written(tmp_path_factory.mktemp("model"), name))


def load(path: Path, **fields: Any) -> Any:
    return OnnxReward(weights=str(path), **fields).load(1)


def scores(reward: Any, prompts: Any = PROMPTS, completions: Any = COMPLETIONS) -> list[float]:
    found: list[float] = reward(prompts=list(prompts), completions=list(completions), answer=[None] * len(prompts))
    return found


def in_torch(path: Path, **fields: Any) -> Any:
    return RewardModel(weights=str(path), device="cpu", **fields).load(1)


@pytest.mark.oracle
@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_scores_equal_those_of_reward_model(name, batch_tokens, folder):
    expected = scores(in_torch(folder(name)))
    assert scores(load(folder(name), batch_tokens=batch_tokens)) == pytest.approx(expected, abs=1e-4)
    assert np.ptp(expected) > 1e-2
    messages = [scores(made(folder(name)), chats()) for made in (load, in_torch)]
    assert messages[0] == pytest.approx(messages[1], abs=1e-4)


def test_a_text_that_ends_with_the_id_for_padding_is_read_before_it(folder):
    """As in transformers: the template ends a message with the token that pads."""
    ends = [scores(made(folder("llama"), until=until), chats()) for made in (load, in_torch)
            for until in ("template", "answer")]
    assert ends[0] == pytest.approx(ends[2], abs=1e-4) and ends[1] == pytest.approx(ends[3], abs=1e-4)


def test_a_run_with_a_value_head_is_read_as_it_was_trained(folder, tmp_path):
    """Up to the answer's end, by the head that a learner saved beside its model."""
    learner = Torch(hidden_size=32, layers=2, heads=2, kv_heads=1, max_positions=64, family="qwen3", device="cpu").load(
        LoadRequest(46, value_heads=1, optimization=Optimization()))
    with torch.no_grad():
        learner.value_head.weight.normal_()
        learner.value_head.bias.fill_(0.5)
    learner.save(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(folder("llama") / file, tmp_path / file)
    for prompts in (PROMPTS, chats()):
        expected = scores(in_torch(tmp_path), prompts)
        assert scores(load(tmp_path), prompts) == pytest.approx(expected, abs=1e-4) and np.ptp(expected) > 1e-2


def exported(source: Path, target: Path, **changes: Any) -> Path:
    """The folder's model as `model.onnx` with its tokenizer, and nothing else."""
    target.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(source / file, target / file)
    shape = read_shape(source)
    graph = decoder.judging(shape, "score", 1, 0)
    weights = decoder.weights_of((graph,))
    with (target / "model.onnx_data").open("wb") as file:
        given = {**load_file(source / "model.safetensors"), **changes}
        model = with_external(graph, {name: given[name] for name in weights}, weights, file)
    onnx.save_model(model, target / "model.onnx")
    return target


def test_a_graph_in_the_folder_is_what_is_computed(folder, tmp_path):
    expected = scores(in_torch(folder("qwen3")))
    assert scores(load(exported(folder("qwen3"), tmp_path / "graph"))) == pytest.approx(expected, abs=1e-4)


def test_a_graph_of_another_architecture_is_computed_with_what_it_asks_for(folder, tmp_path):
    """Here: how many real tokens there are, and as many again for each position that is not 0."""
    from onnx import TensorProto, helper

    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder("llama") / file, tmp_path / file)
    ints = [helper.make_tensor_value_info(name, TensorProto.INT64, ["B", "T"])
            for name in ("attention_mask", "position_ids", "token_type_ids")]
    nodes = [helper.make_node("Sign", ["position_ids"], ["later"]),
             helper.make_node("Sum", ["mask", "behind", "types"], ["all"]),
             *(helper.make_node("Cast", [a], [b], to=TensorProto.FLOAT) for a, b in (
                 ("attention_mask", "mask"), ("later", "behind"), ("token_type_ids", "types"))),
             helper.make_node("ReduceSum", ["all", "axis"], ["logits"], keepdims=0)]
    graph = helper.make_graph(
        [nodes[0], *nodes[2:5], nodes[1], nodes[5]], "count", ints,
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B"])],
        [helper.make_tensor("axis", TensorProto.INT64, [1], [1])])
    onnx.save_model(helper.make_model(graph, ir_version=11, opset_imports=[helper.make_opsetid("", 20)]),
                    tmp_path / "model.onnx")
    lengths = [len(p + c) for p, c in zip(PROMPTS, COMPLETIONS)]
    widest = max(lengths)
    # padding is read at the position of the row's last token, which is behind the first one wherever there is one
    assert scores(load(tmp_path)) == pytest.approx([n + (n - 1) + (widest - n) * (n > 1) for n in lengths])


def test_memory_that_runs_out_halves_the_batch_once_and_for_all(folder, monkeypatch, caplog):
    reward, tried = load(folder("llama")), []
    prompts, completions = ["ab"] * 8, ["cdefgh"] * 8
    before = scores(reward, prompts, completions)
    session = reward._session

    class Small:
        def run(self, outputs, given):
            tried.append(given["input_ids"].size)
            if given["input_ids"].size > 20:
                raise RuntimeError("Failed to allocate memory for requested buffer of size 1")
            return session.run(outputs, given)
    monkeypatch.setattr(reward, "_session", Small())
    with caplog.at_level(logging.WARNING):
        assert scores(reward, prompts, completions) == pytest.approx(before, abs=1e-5)
    assert tried == [64, 32, 16, 16, 16, 16] and "batch_tokens" in caplog.text
    with pytest.raises(MemoryExhausted):
        scores(reward, ["a" * 30], ["b"])


# ---- what is refused


def test_rows_that_cannot_be_read(folder):
    reward = load(folder("llama"))
    with pytest.raises(DataError, match="65 tokens for the reward model, which reads 64"):
        scores(reward, ["a" * 60], ["b" * 5])
    with pytest.raises(DataError, match="token ids"):
        scores(reward, [[1, 2]], ["b"])


def test_models_that_are_refused_by_name(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"has 2 labels(.|\n)*use: reward_model.*label: "):
        load(folder("qwen3, two labels"))
    with pytest.raises(ConfigError, match=r"is LlamaForTokenClassification(.|\n)*use: reward_model for token"):
        load(folder("llama, tokens"))
    with pytest.raises(ConfigError, match=r"model_type is 'gpt2'(.|\n)*use: reward_model"):
        load(folder("gpt2"))
    lost = shutil.copytree(folder("llama"), tmp_path / "lost")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)).save_pretrained(lost)
    with pytest.raises(ConfigError, match=r"is LlamaForCausalLM; reward 'onnx' is \.\.\.ForSequenceClassification"):
        load(lost)
    config = json.loads((lost / "config.json").read_text())
    (lost / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(ConfigError, match=r"lack score\.weight, so its scores would be random"):
        load(lost)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty cannot be loaded: it holds no tokenizer(.|\n)*posttrain export RUN"):
        load(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"max_tokens is 65, and the model in .* has 64 positions\n.*lower it"):
        load(folder("llama"), max_tokens=65)


def test_a_graph_that_answers_is_no_reward_model(folder, tmp_path):
    path = exported(folder("qwen3"), tmp_path / "graph")
    graph = decoder.exported(read_shape(folder("qwen3")))
    onnx.save_model(graph, path / "model.onnx")
    with pytest.raises(ConfigError, match=r"asks for past_key_values\.0\.key(.|\n)*one that answers is no reward"):
        load(path)
    (path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ConfigError, match=r"model\.onnx cannot be loaded"):
        load(path)


def test_what_is_refused_before_anything_is_loaded(monkeypatch):
    for given, said in (({}, "give weights"), ({"weights": "a", "batch_tokens": 0}, "batch_tokens"),
                        ({"weights": "a", "max_tokens": -1}, "max_tokens")):
        with pytest.raises(ValueError, match=said):
            OnnxReward(**given)
    for missing, said in (("onnxruntime", r"\[onnx\]"), ("transformers", r"\[hf-tokenizer\]")):
        monkeypatch.setattr("posttrain_backends.installed.find_spec", lambda name, no=missing: name != no or None)
        with pytest.raises(PluginError, match=rf"reward 'onnx' needs {missing}.*posttrain-backends{said}"):
            OnnxReward(weights="a").load(0)


def test_the_component_is_light_and_needs_no_torch(folder):
    spec = OnnxReward(weights="a")
    assert pickle.loads(pickle.dumps(spec)) == spec and isinstance(spec, RewardSource) and not callable(spec)
    code = ("import sys\nsys.modules['torch'] = None\n"
            "from posttrain_backends.onnx_reward import OnnxReward\n"
            "assert not {'onnx', 'onnxruntime', 'transformers'} & set(sys.modules)\n"
            f"reward = OnnxReward(weights={str(folder('llama'))!r}).load(1)\n"
            "print(reward(prompts=['a'], completions=['b'])[0])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == pytest.approx(scores(in_torch(folder("llama")), ["a"], ["b"])[0], abs=1e-4)
