"""The rollout engine `onnx` beside torch: equal tokens and log-probs, also after updates; rounded weights; refusals."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from posttrain.data import Prompt, Rollouts, Sampling
from posttrain.errors import ConfigError, DataError, MemoryExhausted
from posttrain.protocols import LoadRequest, Optimization, Output
from posttrain.testing.tiny_models import TRAINING, Probe, accumulate, random_rollouts, step_data
from posttrain.tokenizers import Characters
from posttrain_backends._onnx import generate
from posttrain_backends._onnx.generate import Packed, Refreshed
from posttrain_backends._onnx.quantised import pack, unpack
from posttrain_backends._torch.generate import TorchSampler
from posttrain_backends._torch.learner import TorchLearner
from posttrain_backends._torch.models.decoder import Decoder
from posttrain_backends.engines import Batched
from posttrain_backends.families.rope import Llama3
from posttrain_backends.families.shape import Shape, no_rope_layers
from posttrain_backends.onnx_engine import OnnxEngine
from posttrain_backends.ssm import SSM
from posttrain_backends.torch_native import Torch

torch.set_num_threads(1)

TOKENIZER = Characters("abcdefgh01+").load()
LOGPROBS = frozenset({Output.LOGPROBS})
LLAMA = Shape(vocab_size=TOKENIZER.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64)
SHAPES = {
    "llama": LLAMA, "llama, narrow heads, tied": replace(LLAMA, head_dim=8, tie_word_embeddings=True),
    "llama, biases": replace(LLAMA, attention_bias=True, mlp_bias=True), "qwen2": replace(LLAMA, model_type="qwen2"),
    "qwen3": replace(LLAMA, model_type="qwen3", tie_word_embeddings=True),
    "smollm3": replace(LLAMA, model_type="smollm3", num_hidden_layers=4, no_rope_layers=no_rope_layers(4))}
PROMPTS = [Prompt(text=text, group=i) for i, text in enumerate(["ab", "f", "abcdefgh", "ca01", "ab"]) for _ in range(3)]


def policy(shape: Shape = LLAMA, **options: Any) -> TorchLearner:
    """Distributions far from uniform; no norm is 1 and no bias 0."""
    model = Decoder(shape)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.ndim > 1 else 1).add_(0.2 * torch.randn(p.shape, generator=generator) * (p.ndim == 1))
    return TorchLearner(model, **options)


def drawn(learner: TorchLearner, engine: OnnxEngine | Batched, sampling: Sampling) -> Rollouts:
    return engine.start(learner, TOKENIZER, shared=True).rollout(PROMPTS, sampling, (3, 1))


def equal(ours: Rollouts, theirs: Rollouts, atol: float = 1e-4) -> None:
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    assert ours.completions == theirs.completions
    np.testing.assert_allclose(ours.behavior_logprobs, theirs.behavior_logprobs, rtol=0, atol=atol)


def updated(learner: TorchLearner, steps: int) -> None:
    """Optimiser steps of a made-up loss."""
    for step in range(steps):
        accumulate(learner, step_data(random_rollouts(TOKENIZER.vocab_size, seed=step)), Probe())
        learner.apply()


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(temperature=1.3, top_k=5, stop=("ab",))],
                         ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", SHAPES)
def test_answers_equal_torchs_in_every_family(name: str, sampling: Sampling) -> None:
    learner, sampling = policy(SHAPES[name]), replace(sampling, max_new_tokens=16)
    found = drawn(learner, OnnxEngine(), sampling)
    equal(found, drawn(learner, Batched(), sampling), atol=2e-5)
    assert len(set(found.completions)) > 1 and len(found.source) > 20


def test_positions_stretched_as_in_llama_3() -> None:
    scaling = Llama3(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
    learner, sampling = policy(replace(LLAMA, rope_scaling=scaling)), Sampling(max_new_tokens=30)
    equal(drawn(learner, OnnxEngine(), sampling), drawn(learner, Batched(), sampling), atol=2e-5)


@pytest.mark.parametrize("engine", [
    OnnxEngine(slots=1), OnnxEngine(slots=4), OnnxEngine(slots=4, prefill_tokens=1), OnnxEngine(cache_tokens=50),
    OnnxEngine(weights="inputs"), OnnxEngine(threads=2)], ids=str)
def test_how_many_rows_are_decoded_and_where_weights_stand_changes_nothing(engine: OnnxEngine) -> None:
    learner, sampling = policy(), Sampling(max_new_tokens=12, top_p=0.9)
    equal(drawn(learner, engine, sampling), drawn(learner, Batched(), sampling), atol=2e-5)


@pytest.mark.parametrize("weights", ["constants", "inputs"])
@pytest.mark.parametrize("shared", [True, False])
def test_answers_equal_torchs_after_updates(weights: Any, shared: bool) -> None:
    """Three optimiser steps, and a sync after each; and they moved the log-probs."""
    learner = policy(optimization=Optimization(lr=3e-2))
    ours = OnnxEngine(weights=weights).start(learner, TOKENIZER, shared=shared)
    theirs = Batched().start(learner, TOKENIZER, shared=True)
    before = ours.rollout(PROMPTS, Sampling(max_new_tokens=12), (0,))
    for _ in range(3):
        updated(learner, 1)
        ours.sync(learner.params(), learner.version)
        for temperature in (0.0, 1.0):
            sampling = Sampling(temperature=temperature, max_new_tokens=12)
            found = ours.rollout(PROMPTS, sampling, (0,))
            equal(found, theirs.rollout(PROMPTS, sampling, (0,)))
    assert set(found.policy_version) == {learner.version}
    scored = learner.score(found, LOGPROBS, 1.0).logprobs
    np.testing.assert_allclose(found.behavior_logprobs, scored, rtol=0, atol=1e-4)
    assert found.completions != before.completions


@pytest.mark.parametrize("made", [Packed, Refreshed])
def test_a_refresh_is_what_a_graph_of_the_new_weights_is(made: Any) -> None:
    """To the last bit, and without a new session where weights are inputs."""
    old, new = policy(), policy(replace(LLAMA), optimization=TRAINING)
    updated(new, 2)
    graph, fresh = made(LLAMA, old.params(), 1), made(LLAMA, new.params(), 1)
    session, given = graph.session, {name: x.detach().numpy() for name, x in new.params()}
    assert not graph.holds(given)
    graph.take(given)
    assert graph.holds(given) and (graph.session is session) == (made is Refreshed)
    answers = [TorchSampler(generate.OnnxModel(g, None), TOKENIZER, OnnxEngine(), 0).rollout(
        PROMPTS, Sampling(max_new_tokens=9), (1,)) for g in (graph, fresh)]
    equal(*answers, atol=0)


def test_equal_weights_make_no_session_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared sampler looks at the policy's weights before each rollout, and `sync` gives them once more."""
    made, packed = [], generate.packed
    monkeypatch.setattr(generate, "packed", lambda *given: made.append(1) or packed(*given))
    learner = policy(optimization=TRAINING)
    started = OnnxEngine().start(learner, TOKENIZER, shared=True)
    for steps, wanted in ((0, 1), (1, 2), (0, 2)):
        updated(learner, steps)
        started.sync(learner.params(), learner.version)
        started.rollout(PROMPTS, Sampling(max_new_tokens=2), (0,))
        assert len(made) == wanted


def test_where_memory_runs_out_fewer_rows_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, sampling = policy(), Sampling(max_new_tokens=9)
    wanted, run = drawn(learner, Batched(), sampling), generate.run
    def scarce(session: Any, binding: Any) -> None:
        if binding.get_outputs()[0].shape()[0] > 5:
            raise MemoryExhausted("Failed to allocate memory for requested buffer of size 99")
        run(session, binding)
    monkeypatch.setattr(generate, "run", scarce)
    started = OnnxEngine().start(learner, TOKENIZER, shared=True)
    equal(started.rollout(PROMPTS, sampling, (3, 1)), wanted)
    assert isinstance(started, TorchSampler) and started.usage.slots == 3  # 15, 7, 3


def test_a_prompt_that_does_not_fit_is_named() -> None:
    with pytest.raises(DataError, match="64 positions"):
        OnnxEngine().start(policy(), TOKENIZER, shared=True).check([Prompt(text="a" * 60)], Sampling(max_new_tokens=9))


# ---- weights in few bits


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [32, 96])
def test_packing_is_that_of_onnx_runtimes_own_tools(bits: int, columns: int) -> None:
    from onnxruntime.capi import _pybind_state as tools

    matrix = np.random.default_rng(bits).standard_normal((24, columns)).astype(np.float32)
    matrix[0, :32] = 0
    blocks = columns // 32
    packed = np.zeros((24, blocks, 4 * bits), np.uint8)
    scales, zeros = np.zeros(24 * blocks, np.float32), np.zeros(24 * blocks, np.uint8)
    quantize = {4: tools.quantize_matmul_4bits, 8: tools.quantize_matmul_8bits}[bits]
    quantize(packed, np.ascontiguousarray(matrix.T), scales, zeros, 32, 24, columns, True)
    found, found_scales = pack(matrix, bits)
    np.testing.assert_array_equal(found, packed)
    np.testing.assert_array_equal(found_scales.ravel(), scales)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_entry_is_off_by_half_a_scale_at_most_and_the_largest_not_at_all(bits: int) -> None:
    """But for those next to the largest with the other sign, which are clipped to the last integer: one scale."""
    matrix = np.random.default_rng(bits).standard_normal((16, 40)).astype(np.float32)
    packed, scales = pack(matrix, bits)
    off = np.abs(unpack(packed, scales, bits, 40) - matrix)
    each = np.abs(scales).repeat(32, axis=1)[:, :40]
    top = np.abs(matrix) > (2 ** (bits - 1) - 1) * each
    assert (off[~top] <= 0.5001 * each[~top]).all() and (off[top] <= 1.0001 * each[top]).all()
    for row in range(16):
        assert off[row, :32][np.abs(matrix[row, :32]).argmax()] < 1e-6


@pytest.mark.parametrize("quantize, low, high", [("int8", 1e-5, 0.2), ("int4", 1e-2, 2.0)])
def test_what_a_rounded_sampler_records_is_near_the_policy_and_evaluation_is_the_policy(
        quantize: Any, low: float, high: float) -> None:
    learner, sampling = policy(replace(LLAMA, hidden_size=64, intermediate_size=80)), Sampling(max_new_tokens=12)
    engine = OnnxEngine(quantize=quantize)
    assert engine.approximates and not OnnxEngine().approximates
    training, evaluating = (engine.start(learner, TOKENIZER, shared=shared) for shared in (False, True))
    off = []
    for sampler in (training, evaluating):
        found = sampler.rollout(PROMPTS, sampling, (1,))
        off.append(np.abs(found.behavior_logprobs - learner.score(found, LOGPROBS, 1.0).logprobs).mean())
    assert low < off[0] < high and off[1] < 1e-5


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_rounded_sampler_draws_from_the_rounded_matrices(quantize: Any) -> None:
    """Against torch with the same ones, but for the rounding of inputs; also after a sync."""
    shape = replace(LLAMA, hidden_size=64, intermediate_size=80, mlp_bias=True)
    learner, bits = policy(shape, optimization=TRAINING), {"int8": 8, "int4": 4}[quantize]
    sampler = OnnxEngine(quantize=quantize).start(learner, TOKENIZER, shared=False)
    for _ in range(2):
        found = sampler.rollout(PROMPTS, Sampling(max_new_tokens=12), (1,))
        rounded = policy(shape)
        rounded.load_params(((name, unpack(*pack(x.numpy(), bits), bits, x.shape[1]) if "_proj.weight" in name else x)
                             for name, x in ((n, x.detach()) for n, x in learner.params())), 0)
        scored = rounded.score(found, LOGPROBS, 1.0).logprobs
        assert np.abs(found.behavior_logprobs - scored).mean() < 0.05
        updated(learner, 2)
        sampler.sync(learner.params(), learner.version)


# ---- refusals


def refused(learner: Any, engine: OnnxEngine, pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern):
        engine.start(learner, TOKENIZER, shared=True)


def request(**options: Any) -> LoadRequest:
    return LoadRequest(TOKENIZER.vocab_size, **options)


def test_policies_without_a_graph_are_refused_by_name_with_the_engine_that_draws_them(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(USER)
    small = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "device": "cpu"}
    cases = ((Torch(family="qwen3_moe", experts=2, **small), "qwen3_moe with experts"),
             (SSM(hidden_size=8, layers=1, state_size=4, head_dim=8, device="cpu"), "Mamba2"),
             (Torch(file=f"{tmp_path}/model.py:build", device="cpu"), "UserModel"),
             (Torch(precision="bf16", **small), "bfloat16"))
    for backend, name in cases:
        refused(backend.load(request()), OnnxEngine(), rf"{name}(.|\n)*batched")


USER = """
import torch
class Model(torch.nn.Module):
    def __init__(self, V):
        super().__init__()
        self.embed, self.lm_head = torch.nn.Embedding(V, 8), torch.nn.Linear(8, V, bias=False)
    def forward(self, tokens, positions):
        return self.embed(tokens)
build = Model
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny Qwen3 of transformers."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("qwen3")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
            vocab_size=TOKENIZER.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
            initializer_range=0.2, tie_word_embeddings=True)).save_pretrained(path)
    yield path


def test_a_policy_of_transformers_is_drawn_from_and_one_with_an_adapter_is_refused(folder: Path) -> None:
    from posttrain_backends.hf import HF, Lora

    learner = HF(weights=str(folder), device="cpu").load(request(optimization=TRAINING))
    updated(learner, 2)
    sampling = Sampling(max_new_tokens=12)
    equal(drawn(learner, OnnxEngine(), sampling), drawn(learner, Batched(), sampling))
    pytest.importorskip("peft")
    refused(HF(weights=str(folder), device="cpu", adapter=Lora(rank=2)).load(request()), OnnxEngine(),
            r"adapter(.|\n)*batched")


def test_impossible_fields_are_refused() -> None:
    for fields in ({"slots": -1}, {"cache_tokens": -1}, {"threads": -2}, {"prefill_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            OnnxEngine(**fields)
    with pytest.raises(ValueError, match="constants"):
        OnnxEngine(weights="inputs", quantize="int8")
