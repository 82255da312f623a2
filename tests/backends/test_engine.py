"""The engine `batched`: its log-probs against scoring, its rows against one another, and how answers end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from heapq import heapreplace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from posttrain.data import FINISH, Prompt, Rollouts, Sampling, TokenOutputs
from posttrain.errors import ConfigError, DataError, Diverged, MemoryExhausted
from posttrain.protocols import Kept, Optimization, Output, Scorer, Tokenizer
from posttrain.tokenizers import Bytes, Characters
from posttrain_backends._torch.generate import TorchSampler
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.learner import TorchLearner
from posttrain_backends._torch.models.decoder import Decoder
from posttrain_backends._torch.models.interface import CachedLanguageModel, Precision
from posttrain_backends.engines import Batched, StopStrings, uniforms
from posttrain_backends.families.shape import Shape
from scipy.stats import chisquare
from torch import Tensor, nn

torch.set_num_threads(1)

BATCHED = Batched()
TOKENIZER = Characters("abcdefgh01+").load()  # pad 0, eos 1, then the alphabet


def decoder(vocab_size: int = TOKENIZER.vocab_size, seed: int = 0, precision: Precision = "float32") -> Decoder:
    """Two tiny layers whose distributions are far from uniform."""
    model = Decoder(Shape(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                          num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64),
                    seed=seed, precision=precision)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(12 if p.ndim == 2 else 1)
        model.lm_head.weight.mul_(0.6)
    return model


def sampler(model: Decoder | Uncached, engine: Batched = BATCHED, tokenizer: Tokenizer = TOKENIZER,
            shared: bool = True) -> TorchSampler:
    started = engine.start(TorchLearner(model), tokenizer, shared=shared)
    assert isinstance(started, TorchSampler)
    return started


def groups(texts: Sequence[str], size: int) -> list[Prompt]:
    return [Prompt(text=t, group=i, where=f"rows.jsonl:{i + 1}") for i, t in enumerate(texts) for _ in range(size)]


PROMPTS = groups(["a", "0+1", "abcdefgh", "hh", "1+0+1"], 4)
"""Ragged, in groups."""


def same(a: Rollouts, b: Rollouts, atol: float = 1e-5) -> None:
    for name in ("tokens", "offsets", "episode", "is_action", "group", "finish", "terminated", "policy_version"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert a.completions == b.completions
    np.testing.assert_allclose(a.behavior_logprobs, b.behavior_logprobs, rtol=0, atol=atol)


def answers(rollouts: Rollouts) -> list[np.ndarray]:
    """The actions of each episode."""
    return np.split(rollouts.tokens[rollouts.source], np.cumsum(rollouts.episode_actions)[:-1])


def all_logprobs(model: Decoder, rollouts: Rollouts, temperature: float) -> np.ndarray:
    """[N, V] float64 log-probs of every token at each action, by one pass over the whole sequences."""
    with torch.no_grad():
        hidden = model.hidden(torch.from_numpy(rollouts.tokens.astype(np.int64)), Layout.from_offsets(rollouts.offsets))
        logits = hidden @ model.output_weight.t()
    z = logits.double().numpy()[rollouts.source - 1] / temperature
    return np.asarray(z - np.logaddexp.reduce(z, axis=1, keepdims=True))


# ---- what is recorded


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("slots", [0, 3])
def test_generated_logprobs_equal_scored_ones(temperature: float, slots: int) -> None:
    model = decoder()
    started = sampler(model, Batched(slots=slots))
    rollouts = started.rollout(PROMPTS, Sampling(temperature=temperature, max_new_tokens=20), (0,))
    scored = TorchLearner(model).score(rollouts, frozenset({Output.LOGPROBS}), temperature)
    assert len(rollouts.source) > 100
    np.testing.assert_allclose(rollouts.behavior_logprobs, scored.logprobs, rtol=0, atol=1e-4)
    assert rollouts.behavior_logprobs.min() < -2  # a distribution worth comparing


@pytest.mark.parametrize("sampling", [
    Sampling(top_k=4), Sampling(top_p=0.8, temperature=0.9), Sampling(min_p=0.15),
    Sampling(top_k=6, top_p=0.9, min_p=0.05, temperature=1.3)], ids=str)
def test_truncated_logprobs_are_those_of_what_was_kept(sampling: Sampling) -> None:
    sampling = replace(sampling, max_new_tokens=16)
    model = decoder()
    rollouts = sampler(model).rollout(PROMPTS, sampling, (1,))
    full = all_logprobs(model, rollouts, sampling.temperature)
    want, tokens = [], rollouts.tokens[rollouts.source]
    for row, token in zip(np.exp(full), tokens, strict=True):
        kept = list(np.argsort(-row))
        if sampling.top_k:
            kept = kept[:sampling.top_k]
        mass = np.cumsum(row[kept]) / row[kept].sum()
        kept = kept[:1 + int((mass < sampling.top_p).sum())]
        kept = [t for t in kept if row[t] >= sampling.min_p * row[kept[0]]]
        assert token in kept
        want.append(np.log(row[token] / row[kept].sum()))
    np.testing.assert_allclose(rollouts.behavior_logprobs, want, rtol=0, atol=1e-4)
    gap = rollouts.behavior_logprobs - full[np.arange(len(tokens)), tokens]
    assert gap.min() > -1e-4 and gap.max() > 0.05  # what a metric of the gap shows


def test_greedy_takes_the_largest_and_records_certainty() -> None:
    model = decoder()
    rollouts = sampler(model).rollout(PROMPTS, Sampling(temperature=0.0, max_new_tokens=10), (0,))
    np.testing.assert_array_equal(rollouts.tokens[rollouts.source], all_logprobs(model, rollouts, 1.0).argmax(axis=1))
    assert not rollouts.behavior_logprobs.any()


def test_first_tokens_are_distributed_as_the_model_says() -> None:
    model, n = decoder(), 4000
    rollouts = sampler(model).rollout(groups(["0+1"], n), Sampling(max_new_tokens=1), (5,))
    p = np.exp(all_logprobs(model, rollouts, 1.0)[0])
    counts = np.bincount(rollouts.tokens[rollouts.source], minlength=len(p))
    likely = n * p > 5
    observed = np.append(counts[likely], counts[~likely].sum() + 5)
    assert chisquare(observed, np.append(n * p[likely], n * p[~likely].sum() + 5)).pvalue > 1e-3


def test_every_column_is_filled() -> None:
    rollouts = sampler(decoder()).rollout(PROMPTS, Sampling(max_new_tokens=7), (0,))
    M, E, N = len(rollouts.tokens), len(PROMPTS), int(rollouts.is_action.sum())
    assert (rollouts.tokens.dtype, rollouts.tokens.shape) == (np.int32, (M,))
    assert (rollouts.behavior_logprobs.dtype, rollouts.behavior_logprobs.shape) == (np.float32, (N,))
    assert (rollouts.policy_version.dtype, rollouts.policy_version.shape) == (np.int32, (N,))
    assert rollouts.turn.dtype == np.int32 and rollouts.turn.shape == (N,) and not rollouts.turn.any()
    assert rollouts.prompts == tuple(PROMPTS) and rollouts.sampling == Sampling(max_new_tokens=7)
    np.testing.assert_array_equal(rollouts.episode, np.arange(E))
    np.testing.assert_array_equal(rollouts.group, [p.group for p in PROMPTS])
    for e, prompt in enumerate(PROMPTS):
        asked = rollouts.tokens[rollouts.offsets[e]:rollouts.offsets[e + 1]][:len(prompt.text or "")]
        assert asked.tolist() == TOKENIZER.encode(prompt.text or "")
        acted = rollouts.is_action[rollouts.offsets[e]:rollouts.offsets[e + 1]]
        assert not acted[:len(asked)].any() and acted[len(asked):].all()


def test_no_prompts_give_no_episodes() -> None:
    rollouts = sampler(decoder()).rollout([], Sampling(), (0,))
    assert rollouts.n_episodes == 0 and len(rollouts.tokens) == 0


# ---- how answers end


def test_every_way_of_ending_is_told_and_cut() -> None:
    sampling = Sampling(max_new_tokens=8, stop=("0", "ab", "+1"), temperature=1.2)
    rollouts = sampler(decoder(seed=3)).rollout(groups(["a", "0+", "hgf", "cde"], 30), sampling, (0,))
    assert {FINISH[f] for f in rollouts.finish} == {"eos", "stop", "budget"}
    for e, tokens in enumerate(answers(rollouts)):
        texts = [TOKENIZER.decode(tokens[:n].tolist()) for n in range(len(tokens) + 1)]
        stopped = [any(s in text for s in sampling.stop) for text in texts]
        finish, completion = FINISH[rollouts.finish[e]], rollouts.completions[e]
        assert (finish == "eos") == (tokens[-1] == TOKENIZER.eos)
        assert (finish == "stop") == stopped[-1] and not any(stopped[:-1])  # the token that completes it is the last
        assert TOKENIZER.eos not in tokens[:-1] and len(tokens) <= 8
        assert (finish == "budget") == (not stopped[-1] and tokens[-1] != TOKENIZER.eos) and (
            finish != "budget" or len(tokens) == 8)
        assert rollouts.terminated[e] == (finish != "budget")
        cut = min((texts[-1].find(s) for s in sampling.stop if s in texts[-1]), default=len(texts[-1]))
        assert completion == texts[-1][:cut]
    assert any(FINISH[f] == "stop" and rollouts.completions[e] for e, f in enumerate(rollouts.finish))


def test_an_end_at_the_last_allowed_token_is_no_budget_end() -> None:
    rollouts = sampler(decoder(seed=3)).rollout(groups(["a"], 200), Sampling(max_new_tokens=1, stop=("a",)), (0,))
    tokens = rollouts.tokens[rollouts.source]
    want = np.where(tokens == TOKENIZER.eos, "eos", np.where(tokens == TOKENIZER.encode("a")[0], "stop", "budget"))
    assert set(want) == {"eos", "stop", "budget"}
    np.testing.assert_array_equal([FINISH[f] for f in rollouts.finish], want)


PIECES = ["a", "b", "ab", "", "ba\n", "é", "\n\n", " x"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=40),
       st.lists(st.sampled_from(["\n\n", "aba", "bé", "x\n", "ab ab", "é"]), min_size=1, max_size=3, unique=True))
def test_stop_strings_are_found_across_tokens(tokens: list[int], strings: list[str]) -> None:
    def decode(ids: Sequence[int]) -> str:
        return "".join(PIECES[i] for i in ids)
    stops = StopStrings(tuple(strings), decode)
    for n in range(1, len(tokens) + 1):
        text = decode(tokens[:n])
        reached = any(s in text for s in strings)
        assert stops.reached(np.array(tokens[:n])) == reached
        assert (stops.cut(text) is not None) == reached
        if reached:
            break


@settings(max_examples=200, deadline=None)
@given(st.text("aé漢🙂\n", max_size=12), st.sampled_from(["é", "漢\n", "🙂🙂", "\n\n", "aé"]))
def test_stop_strings_are_found_across_the_bytes_of_a_character(text: str, stop: str) -> None:
    tokenizer = Bytes().load()
    stops, tokens = StopStrings((stop,), tokenizer.decode), np.array(tokenizer.encode(text))
    first = next((n for n in range(1, len(tokens) + 1) if stops.reached(tokens[:n])), None)
    assume(stop in text)
    assert first == len((text[:text.index(stop)] + stop).encode())


def test_a_long_answer_is_not_decoded_again_for_every_token() -> None:
    decoded = []
    def decode(ids: Sequence[int]) -> str:
        decoded.append(len(ids))
        return "".join(chr(97 + i) for i in ids)
    assert not StopStrings(("zz",), decode).reached(np.zeros(5000, np.int64))
    assert sum(decoded) < 30


# ---- rows and the queue


@pytest.mark.parametrize("engine", [Batched(slots=1), Batched(slots=3), Batched(slots=7), Batched(cache_tokens=40),
                                    Batched(slots=4, prefill_tokens=1)], ids=str)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.9, stop=("ab",))], ids=["plain", "top_p and stop"])
def test_how_many_rows_are_decoded_changes_nothing(engine: Batched, sampling: Sampling) -> None:
    model, sampling = decoder(), replace(sampling, max_new_tokens=12)
    same(sampler(model).rollout(PROMPTS, sampling, (3, 1)), sampler(model, engine).rollout(PROMPTS, sampling, (3, 1)))


def test_the_cache_budget_limits_the_rows() -> None:
    started = sampler(decoder(), Batched(cache_tokens=45))
    started.rollout(PROMPTS, Sampling(max_new_tokens=12), (0,))
    assert started.usage.slots == 45 // (len("abcdefgh") + 12)


def test_a_ration_limits_the_cache_and_changes_no_answer() -> None:
    """It is told in tokens, and their bytes are those of the keys and values of both layers."""
    started = sampler(decoder())
    assert started.token_bytes == 2 * 2 * 2 * 8 * 4
    whole = started.rollout(PROMPTS, Sampling(max_new_tokens=12), (3, 1))
    most = started.kept().tokens
    for tokens in (most, 100, 45, 1):
        started.ration(tokens)
        same(whole, started.rollout(PROMPTS, Sampling(max_new_tokens=12), (3, 1)))
        assert started.kept() == Kept(max(started.usage.slots * 20, 20)) and started.kept().tokens <= max(tokens, 20)


def test_a_ration_does_not_lift_the_engine_s_own_limit() -> None:
    started = sampler(decoder(), Batched(cache_tokens=45))
    started.ration(1000)
    started.rollout(PROMPTS, Sampling(max_new_tokens=12), (0,))
    assert started.kept().tokens == 40


def test_each_distinct_prompt_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[int]] = []
    prefill = Decoder.prefill
    def spy(self: Decoder, tokens: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        read.extend(row.tolist() for row in np.split(tokens.numpy(), layout.offsets[1:-1]))
        return prefill(self, tokens, layout)
    monkeypatch.setattr(Decoder, "prefill", spy)
    prompts = [*PROMPTS, replace(PROMPTS[0], group=9)]  # the first again, far from its like
    for engine in (Batched(), Batched(slots=2), Batched(slots=2, prefill_tokens=4)):
        read.clear()
        started = sampler(decoder(), engine)
        started.rollout(prompts, Sampling(max_new_tokens=6), (0,))
        assert read == [TOKENIZER.encode(p.text or "") for p in PROMPTS[::4]]
        assert (started.usage.prompts, started.usage.prompt_tokens) == (5, sum(map(len, read)))


@pytest.mark.parametrize("slots", [1, 2, 5, 20, 100])
def test_no_row_is_ever_idle(slots: int) -> None:
    started = sampler(decoder(seed=3), Batched(slots=slots))
    rollouts = started.rollout(PROMPTS, Sampling(max_new_tokens=15), (3,))
    steps = rollouts.episode_actions - 1  # the first token comes from the prompt
    assert len(set(steps.tolist())) > 5 and steps.min() == 0
    assert started.usage.decoded == steps.sum()
    busy = [0] * min(slots, len(PROMPTS))  # a free row takes the next episode at once
    for n in steps.tolist():
        heapreplace(busy, busy[0] + n)
    assert started.usage.steps == max(busy)
    assert started.metrics().values_by_name() == {"busy": pytest.approx(steps.sum() / (len(busy) * max(busy)))}


def test_where_prompts_give_all_tokens_no_share_of_rows_is_told() -> None:
    started = sampler(decoder())
    started.rollout(PROMPTS, Sampling(max_new_tokens=1), (0,))
    assert started.usage.steps == 0 and not started.metrics()


def test_a_seed_repeats_a_rollout_and_another_does_not() -> None:
    started, sampling = sampler(decoder()), Sampling(max_new_tokens=12)
    first = started.rollout(PROMPTS, sampling, (0, 4))
    same(first, started.rollout(PROMPTS, sampling, (0, 4)), atol=0)
    other = started.rollout(PROMPTS, sampling, (0, 5))
    assert first.completions != other.completions
    assert len(set(first.completions[:4])) > 1  # the answers to one prompt differ too


def test_an_answer_depends_neither_on_its_neighbours_nor_on_the_budget() -> None:
    started = sampler(decoder())
    long = answers(started.rollout(PROMPTS, Sampling(max_new_tokens=20), (0,)))
    short = answers(started.rollout([Prompt(text="b"), *PROMPTS[1:6]], Sampling(max_new_tokens=5), (0,)))
    for e in range(1, 6):
        np.testing.assert_array_equal(short[e], long[e][:5])


def test_the_random_numbers_of_episodes_differ() -> None:
    u = np.array([uniforms((1, 2), e, 500) for e in range(40)])
    assert len(np.unique(u)) == u.size and u.min() >= 0 and u.max() < 1
    assert abs(np.corrcoef(u) - np.eye(40)).max() < 0.25


# ---- other models


class Uncached:
    """The same weights through `hidden` alone, as a user's module has it."""

    def __init__(self, model: Decoder) -> None:
        self.model = model

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.model.compute_dtype

    @property
    def output_weight(self) -> Tensor:
        return self.model.output_weight

    @property
    def max_positions(self) -> None:
        return None

    def autocast(self) -> AbstractContextManager[object]:
        return self.model.autocast()

    def hidden(self, tokens: Tensor, layout: Layout) -> Tensor:
        return self.model.hidden(tokens, layout)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def state_dict(self) -> Mapping[str, Tensor]:
        return self.model.state_dict()

    def requires_grad_(self, requires_grad: bool = True, /) -> Uncached:
        self.model.requires_grad_(requires_grad)
        return self


@pytest.mark.parametrize("slots", [0, 1, 3])
def test_a_model_without_cache_draws_the_same(slots: int) -> None:
    model = decoder()
    uncached = Uncached(model)
    assert isinstance(model, CachedLanguageModel) and not isinstance(uncached, CachedLanguageModel)
    sampling = Sampling(max_new_tokens=12, temperature=1.2)
    started = sampler(uncached, Batched(slots=slots))
    same(sampler(model).rollout(PROMPTS, sampling, (0,)), started.rollout(PROMPTS, sampling, (0,)))
    assert started.usage.prompts == 5


def test_bfloat16_generates_near_what_it_scores() -> None:
    model = decoder(precision="bf16")
    rollouts = sampler(model).rollout(PROMPTS, Sampling(max_new_tokens=12), (0,))
    scored = TorchLearner(model).score(rollouts, frozenset({Output.LOGPROBS}), 1.0)
    assert np.abs(rollouts.behavior_logprobs - scored.logprobs).mean() < 0.05


# ---- weights


def test_a_stale_sampler_keeps_its_weights_until_sync() -> None:
    model, sampling = decoder(), Sampling(max_new_tokens=10)
    learner = TorchLearner(model)
    shared, stale = (Batched().start(learner, TOKENIZER, shared=s) for s in (True, False))
    before = stale.rollout(PROMPTS, sampling, (0,))
    same(before, shared.rollout(PROMPTS, sampling, (0,)), atol=0)
    learner.load_params(decoder(seed=7).state_dict().items(), version=4)
    shared.sync(learner.params(), learner.version)
    same(before, stale.rollout(PROMPTS, sampling, (0,)), atol=0)
    after = shared.rollout(PROMPTS, sampling, (0,))
    assert after.completions != before.completions
    assert set(before.policy_version) == {0} and set(after.policy_version) == {4}
    snapshot = {name: x.detach().numpy().copy() for name, x in learner.params()}
    stale.sync(snapshot.items(), 4)
    same(after, stale.rollout(PROMPTS, sampling, (0,)), atol=0)


def test_sampling_leaves_the_model_trainable() -> None:
    model = decoder()
    learner = TorchLearner(model, optimization=Optimization())
    Batched().start(learner, TOKENIZER, shared=True).rollout(PROMPTS[:2], Sampling(max_new_tokens=3), (0,))
    tokens = torch.tensor([2, 3, 4])
    (model.hidden(tokens, Layout.from_offsets(np.array([0, 3]))) @ model.output_weight.t()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.requires_grad and not p.is_inference() for p in model.parameters())


# ---- prompts


def test_texts_begin_with_bos_and_ids_are_taken_as_they_are() -> None:
    tokenizer = Characters("ab", bos=True).load()
    model = decoder(tokenizer.vocab_size)
    chat = ({"role": "user", "content": "b"},)
    prompts = [Prompt(text="ab"), Prompt(text=""), Prompt(tokens=(3, 3)), Prompt(messages=chat)]
    rollouts = sampler(model, tokenizer=tokenizer).rollout(prompts, Sampling(max_new_tokens=2), (0,))
    episode = rollouts.episode.repeat(np.diff(rollouts.offsets))
    asked = [rollouts.tokens[(episode == e) & ~rollouts.is_action].tolist() for e in range(4)]
    assert asked == [[1, 3, 4], [1], [3, 3], tokenizer.chat(chat)]


def test_all_unusable_prompts_are_named_at_once() -> None:
    started = sampler(decoder())
    with pytest.raises(DataError) as raised:
        started.rollout([Prompt(text="", where="a.jsonl:3"), Prompt(text="a"), Prompt(text="Z", where="a.jsonl:5")],
                        Sampling(), (0,))
    assert "empty" in str(raised.value) and "a.jsonl:3" in str(raised.value) and "a.jsonl:5" in str(raised.value)
    with pytest.raises(DataError) as raised:
        started.rollout([Prompt(text="a" * 55, where="a.jsonl:1"), Prompt(text="a"), Prompt(tokens=(99,))],
                        Sampling(max_new_tokens=10), (0,))
    message = str(raised.value)
    assert "55 prompt tokens" in message and "64 positions" in message and "a.jsonl:1" in message
    assert "vocabulary" in message and "prompt 2" in message and "prompt 1)" not in message


def test_a_prompt_and_answer_that_just_fit_are_answered() -> None:
    rollouts = sampler(decoder()).rollout(groups(["a" * 54], 8), Sampling(max_new_tokens=10), (0,))
    assert rollouts.episode_actions.max() == 10


# ---- what goes wrong


class Foreign:
    """A scorer of another framework."""

    provides: frozenset[Output] = frozenset()

    def score(self, rollouts: Rollouts, outputs: frozenset[Output], temperature: float) -> TokenOutputs:
        raise AssertionError("it is refused before anything is asked of it")

    def params(self) -> Iterator[tuple[str, object]]:
        yield from ()

    def load_params(self, items: object, version: int) -> None:
        raise AssertionError("it is refused before anything is asked of it")


def test_a_policy_of_another_framework_is_refused_by_name() -> None:
    policy: Scorer = Foreign()
    with pytest.raises(ConfigError, match=r"Foreign(.|\n)*policy: torch"):
        Batched().start(policy, TOKENIZER, shared=True)


@pytest.mark.parametrize("fields", [{"slots": -1}, {"cache_tokens": -1}, {"prefill_tokens": 0}], ids=str)
def test_impossible_sizes_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Batched(**fields)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match="stop"):
        sampler(decoder()).rollout(PROMPTS, Sampling(stop=("",)), (0,))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_without_numbers_is_told(temperature: float) -> None:
    model = decoder()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(Diverged, match="not finite"):
        sampler(model).rollout(PROMPTS, Sampling(temperature=temperature, max_new_tokens=3), (0,))


@dataclass(frozen=True)
class Scarce:
    """A model's `new_cache` where only so many rows fit."""

    rows: int

    def __call__(self, model: Decoder, rows: int, columns: int) -> object:
        if rows > self.rows:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you "
                               "tried to allocate 99 bytes.")
        return new_cache(model, rows, columns)


new_cache = Decoder.new_cache


def test_where_memory_runs_out_fewer_rows_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(max_new_tokens=9)
    want = sampler(decoder()).rollout(PROMPTS, sampling, (0,))
    scarce = Scarce(6)
    monkeypatch.setattr(Decoder, "new_cache", lambda *args: scarce(*args))
    started = sampler(decoder())
    same(want, started.rollout(PROMPTS, sampling, (0,)))
    assert started.usage.slots == 5  # 20, 10, 5
    assert started.kept().ran_out == 2 * started.kept().tokens
    monkeypatch.setattr(Decoder, "new_cache", new_cache)
    started.rollout(PROMPTS, sampling, (0,))
    assert started.usage.slots == 5  # and it does not try what failed again


def test_where_not_one_row_fits_the_error_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    scarce = Scarce(0)
    monkeypatch.setattr(Decoder, "new_cache", lambda *args: scarce(*args))
    with pytest.raises(MemoryExhausted, match="max_new_tokens"):
        sampler(decoder()).rollout(PROMPTS, Sampling(max_new_tokens=9), (0,))
