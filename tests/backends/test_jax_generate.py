"""Answers drawn in JAX against those of torch from equal weights, and against what the model says of whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from posttrain.data import FINISH, Prompt, Rollouts, Sampling
from posttrain.errors import ConfigError
from posttrain.protocols import LoadRequest, Output
from posttrain.tokenizers import Characters

jax = pytest.importorskip("jax")
pytest.importorskip("flax")
torch = pytest.importorskip("torch")

from posttrain_backends._jax import generate
from posttrain_backends._jax.decoder import Decoder, multiplied
from posttrain_backends._jax.generate import JaxSampler, Room
from posttrain_backends._jax.model import Structure
from posttrain_backends._torch.learner import TorchLearner
from posttrain_backends._torch.models.decoder import Decoder as TorchDecoder
from posttrain_backends.engines import Batched
from posttrain_backends.families.shape import Shape
from posttrain_backends.flax import Flax

torch.set_num_threads(1)
ALL = Batched()
TOKENIZER = Characters("abcdef").load()
V = TOKENIZER.vocab_size
LLAMA = Shape(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, head_dim=4, max_position_embeddings=64)
QWEN3 = replace(LLAMA, model_type="qwen3", tie_word_embeddings=True)
SMOLLM3 = replace(LLAMA, model_type="smollm3", no_rope_layers=(1, 0))
PROMPTS = [Prompt(text=text) for text in ("ab", "ab", "fedcba" * 2, "a", "cd", "cd", "cd", "cafe", "e", "ab")]
GROUPED = [Prompt(text=text) for text in ("abc", "f", "deadbeef") for _ in range(4)]


@cache
def structure_of(shape: Shape) -> Structure:
    """One for each shape: what is compiled for it is compiled once."""
    return Structure.of(lambda: Decoder(shape))


def weights(shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """Large enough that the next token is not a matter of rounding."""
    rng = np.random.default_rng(seed)
    shapes = TorchDecoder(shape).state_dict()
    return {name: (rng.normal(0, 0.4, x.shape) + (x.ndim == 1)).astype(np.float32) for name, x in shapes.items()}


def sampler(shape: Shape, engine: Batched = ALL, *, seed: int = 0, shared: bool = True) -> JaxSampler:
    params = {name: jax.numpy.asarray(x) for name, x in weights(shape, seed).items()}
    return JaxSampler(structure_of(shape), lambda: params, 0, TOKENIZER, engine, shared=shared)


def torch_learner(shape: Shape) -> TorchLearner:
    learner = TorchLearner(TorchDecoder(shape))
    learner.load_params(weights(shape).items(), 0)
    return learner


def scored(shape: Shape, rollouts: Rollouts, temperature: float) -> np.ndarray:
    """Log-probs of all actions by whole texts, in a rectangle."""
    lengths, is_action = np.diff(rollouts.offsets), rollouts.is_action
    row = np.repeat(np.arange(len(lengths)), lengths)
    column = np.arange(len(row)) - rollouts.offsets[row]
    tokens = np.zeros((len(lengths), 32), np.int32)
    tokens[row, column] = rollouts.tokens

    @jax.jit
    def table(params: dict[str, np.ndarray]) -> jax.Array:
        model = structure_of(shape).bound(params)
        hidden = model.hidden(tokens, np.broadcast_to(np.arange(32), tokens.shape))
        return jax.nn.log_softmax(multiplied(hidden, model.output_weight, model.compute_dtype) / temperature)
    found = np.asarray(table(weights(shape)))
    return found[row[is_action], column[is_action] - 1, rollouts.tokens[is_action]]


def same(a: Rollouts, b: Rollouts, atol: float = 2e-5) -> None:
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.finish, b.finish)
    assert a.completions == b.completions
    np.testing.assert_allclose(a.behavior_logprobs, b.behavior_logprobs, rtol=0, atol=atol)


@pytest.mark.parametrize(("shape", "prompts"), [
    (LLAMA, PROMPTS), (LLAMA, GROUPED), (QWEN3, GROUPED), (SMOLLM3, PROMPTS)],
    ids=["llama", "llama, grouped", "qwen3, grouped", "smollm3"])
def test_answers_equal_those_of_torch_from_equal_weights(shape: Shape, prompts: Sequence[Prompt]) -> None:
    for sampling in (Sampling(temperature=0.0, max_new_tokens=9), Sampling(temperature=0.8, max_new_tokens=9)):
        theirs = Batched().start(torch_learner(shape), TOKENIZER, shared=True).rollout(prompts, sampling, (3, 1))
        ours = sampler(shape).rollout(prompts, sampling, (3, 1))
        same(ours, theirs)
        if sampling.temperature:
            assert set(ours.finish.tolist()) == {FINISH.index("eos"), FINISH.index("budget")}
            want = scored(shape, ours, sampling.temperature)
            np.testing.assert_allclose(ours.behavior_logprobs, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("engine", [Batched(slots=3, prefill_tokens=5), Batched(cache_tokens=40)],
                         ids=["slots", "cells"])
def test_rows_that_are_given_to_the_next_episode_change_no_answer(engine: Batched) -> None:
    sampling = Sampling(max_new_tokens=7)
    for prompts in (PROMPTS, GROUPED):
        part = sampler(LLAMA, engine)
        same(part.rollout(prompts, sampling, (5,)), sampler(LLAMA).rollout(prompts, sampling, (5,)))
        assert part.usage is not None and part.usage.room.rows <= 3
        assert part.usage.prompts == len({p.text for p in prompts})


def test_each_prompt_is_read_once_and_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[np.ndarray] = []
    compiled = generate._read
    monkeypatch.setattr(generate, "_read", lambda structure, params, tokens: (
        read.append(np.array(tokens)), compiled(structure, params, tokens))[1])
    sampler(LLAMA, Batched(slots=2, prefill_tokens=32)).rollout(PROMPTS, Sampling(max_new_tokens=3), (1,))
    assert [len(tokens) for tokens in read] == [2, 2, 2]  # five prompts of up to 16 tokens, the last row is of none
    assert sum((row > 0).any() for tokens in read for row in tokens) == 4  # of "a" and "e" the only token is the last


def test_a_group_holds_its_prompt_once() -> None:
    together = sampler(LLAMA)
    together.rollout(GROUPED, Sampling(max_new_tokens=4), (1,))
    assert together.usage is not None and together.usage.room == Room(rows=16, group=4, longest=8, new=4)


def test_stop_strings_cut_what_was_drawn_behind_them() -> None:
    sampling = Sampling(max_new_tokens=20, stop=("b", "fa"))
    prompts = [Prompt(text="ab")] * 24
    for engine in (Batched(), Batched(slots=5)):
        theirs = engine.start(torch_learner(LLAMA), TOKENIZER, shared=True).rollout(prompts, sampling, (2,))
        same(sampler(LLAMA, engine).rollout(prompts, sampling, (2,)), theirs)
        assert FINISH.index("stop") in theirs.finish


def test_the_share_of_busy_rows_is_told() -> None:
    started = sampler(LLAMA, Batched(slots=4))
    found = started.rollout(PROMPTS, Sampling(max_new_tokens=7), (5,))
    assert started.usage is not None
    assert started.usage.places % 4 == 0
    share = len(found.source) / started.usage.places
    assert started.metrics().values_by_name() == {"busy": pytest.approx(share)} and 0.5 < share <= 1


@pytest.mark.parametrize("engine", [ALL, Batched(slots=5)], ids=["all", "slots"])
@pytest.mark.parametrize("prompts", [PROMPTS, GROUPED], ids=["mixed", "grouped"])
def test_where_most_rows_have_ended_the_others_go_on_in_fewer(
        engine: Batched, prompts: Sequence[Prompt], monkeypatch: pytest.MonkeyPatch) -> None:
    sampling, whole = Sampling(max_new_tokens=24), sampler(LLAMA, engine)
    want, sizes, compiled = whole.rollout(prompts, sampling, (4,)), [], generate._kept
    monkeypatch.setattr(generate, "_FEWEST", 1)
    monkeypatch.setattr(generate, "_kept", lambda past, rows, places: (
        sizes.append(len(rows)), compiled(past, rows, places))[1])
    fewer = sampler(LLAMA, engine)
    same(fewer.rollout(prompts, sampling, (4,)), want)
    assert sizes[0] == (1 if engine.slots else 4)  # of 5 rows and of 16
    assert fewer.usage is not None and whole.usage is not None and fewer.usage.places < whole.usage.places


def test_a_copy_keeps_its_weights_until_it_is_given_others() -> None:
    sampling, other = Sampling(temperature=0.0, max_new_tokens=6), weights(LLAMA, seed=1)
    copy = sampler(LLAMA, shared=False)
    before = copy.rollout(PROMPTS, sampling, (1,))
    copy.sync(((name, torch.from_numpy(x)) for name, x in other.items()), 4)
    after = copy.rollout(PROMPTS, sampling, (1,))
    same(after, sampler(LLAMA, seed=1).rollout(PROMPTS, sampling, (1,)))
    assert not np.array_equal(before.tokens, after.tokens) and set(after.policy_version.tolist()) == {4}
    with pytest.raises(ConfigError, match=r"model.norm.weight"):
        copy.sync(((name, x) for name, x in other.items() if name != "model.norm.weight"), 5)


def test_where_memory_runs_out_half_of_the_rows_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    compiled = generate._empty

    def scarce(structure: Structure, params: object, room: Room) -> object:
        tried.append(room.rows)
        if room.rows > most:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")
        return compiled(structure, params, room)
    monkeypatch.setattr(generate, "_empty", scarce)
    most, sampling = 4, Sampling(max_new_tokens=5)
    started = sampler(LLAMA)
    found = started.rollout(PROMPTS, sampling, (5,))
    started.rollout(PROMPTS, sampling, (5,))
    assert tried == [16, 8, 4, 4]
    monkeypatch.undo()
    same(found, sampler(LLAMA).rollout(PROMPTS, sampling, (5,)))


def test_quantised_weights_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"rollout.engine.quantize: int8_dynamic"):
        sampler(LLAMA, Batched(quantize="int8_dynamic"))


OWN = """
import jax.numpy as jnp
from flax import nnx

class Own(nnx.Module):
    'The mean of the embeddings so far, and where it ends.'
    def __init__(self, vocab_size, rngs):
        self.embed, self.place = nnx.Embed(vocab_size, 8, rngs=rngs), nnx.Embed(64, 8, rngs=rngs)
        self.lm_head = nnx.Linear(8, vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, tokens, positions):
        x = jnp.cumsum(self.embed(tokens), axis=1) / (positions[..., None] + 1)
        return 4 * jnp.tanh(x + self.embed(tokens) + self.place(positions))

def build(vocab_size, rngs):
    return Own(vocab_size, rngs)
"""


def test_a_module_of_the_users_own_reads_every_text_anew(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    learner = Flax(file=f"{tmp_path / 'own.py'}:build", device="cpu").load(LoadRequest(V, seed=3))
    for engine, prompts in ((Batched(slots=3), PROMPTS), (ALL, GROUPED)):
        found = engine.start(learner, TOKENIZER, shared=True).rollout(prompts, Sampling(max_new_tokens=6), (1,))
        want = learner.score(found, frozenset({Output.LOGPROBS}), 1.0).logprobs
        np.testing.assert_allclose(found.behavior_logprobs, want, rtol=0, atol=2e-5)
        assert len(set(found.completions)) > 3


def test_bfloat16_rows_say_what_the_model_says() -> None:
    structure = Structure.of(lambda: Decoder(LLAMA, precision="bf16"))
    params = {name: jax.numpy.asarray(x) for name, x in weights(LLAMA).items()}
    started = JaxSampler(structure, lambda: params, 0, TOKENIZER, Batched(), shared=True)
    found = started.rollout(PROMPTS, Sampling(max_new_tokens=6), (1,))
    assert np.abs(found.behavior_logprobs - scored(LLAMA, found, 1.0)).max() < 0.2
