"""Prompts held once for all rows that continue them: against attention row by row, and against copies for each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from posttrain.data import Prompt, Rollouts, Sampling
from posttrain.protocols import Output
from posttrain.tokenizers import Characters
from posttrain_backends._torch import rows as pasts
from posttrain_backends._torch.generate import TorchSampler
from posttrain_backends._torch.held_prompts import HeldPrompts
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.learner import TorchLearner
from posttrain_backends._torch.models.decoder import Decoder
from posttrain_backends._torch.models.grouped import Groups, SharedPrompts, attention
from posttrain_backends._torch.models.interface import KVCache, Precision
from posttrain_backends._torch.rows import Room
from posttrain_backends.engines import Batched
from posttrain_backends.families.shape import Shape
from torch import Tensor

torch.set_num_threads(1)

TOKENIZER = Characters("abcdefgh01+").load()
DENSE = Shape(vocab_size=TOKENIZER.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
MIXTURE = replace(DENSE, model_type="mixtral", num_experts=5, num_experts_per_tok=2)
PLACES = st.lists(st.integers(0, 4), min_size=1, max_size=9).map(np.array)
"""The prompt that each row continues; some prompts may have no row."""


# ---- one step


@given(PLACES, st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_what_is_gathered_stands_with_its_prompt_and_comes_back(place: np.ndarray, heads: int, q: int) -> None:
    x = torch.randn(len(place) * heads, q, 2)
    groups = Groups.of(place)
    together = groups.gather(x, heads)
    assert together.shape == (groups.prompts * heads, groups.size * q, 2)
    assert torch.equal(groups.scatter(together, heads), x)
    of_prompts = together.view(groups.prompts, heads, groups.size, q, 2)
    for prompt in np.unique(place):
        rows = x.view(len(place), heads, q, 2)[place == prompt]
        assert torch.equal(of_prompts[prompt, :, :len(rows)].transpose(0, 1), rows)


@pytest.mark.parametrize("place", [[0], [0, 0, 0, 1, 1, 1], [1, 0, 1, 1, 3], [2, 0, 1]], ids=str)
def test_attention_is_that_to_prompt_and_answer(place: Sequence[int]) -> None:
    """Against a loop over rows and heads, float64."""
    generator = torch.Generator().manual_seed(0)
    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)
    B, S, kv, rep, P, T, D = len(place), max(place) + 1, 2, 3, 7, 4, 5
    prompt, own = [[7, 3, 5, 1][s] for s in range(S)], [1 + i % T for i in range(B)]
    q, keys, values = drawn(B * kv, rep, D), drawn(B * kv, T, D), drawn(B * kv, T, D)
    of_prompts = drawn(S, kv, P, D), drawn(S, kv, P, D)
    def mask(lengths: Sequence[int], columns: int) -> Tensor:
        beyond = torch.arange(columns) >= torch.tensor(lengths)[:, None, None]
        return torch.zeros(beyond.shape, dtype=torch.float64).masked_fill(beyond, -torch.inf).repeat_interleave(kv, 0)
    shared = SharedPrompts([of_prompts[0]], [of_prompts[1]], mask(prompt, P), torch.tensor(prompt)[list(place)],
                           Groups.of(np.array(place)))
    found = attention(q, keys, values, mask(own, T), shared, 0)
    for b, s in enumerate(place):
        for h in range(kv):
            k, v = (torch.cat([whole[s, h, :prompt[s]], mine[b * kv + h, :own[b]]])
                    for whole, mine in zip(of_prompts, (keys, values), strict=True))
            for r in range(rep):
                scores = (k @ q[b * kv + h, r]) / D**0.5
                expected = (scores - scores.max()).exp() @ v / (scores - scores.max()).exp().sum()
                torch.testing.assert_close(found[b * kv + h, r], expected, rtol=0, atol=1e-13)


def test_a_step_behind_shared_prompts_equals_reading_all() -> None:
    """Ragged prompts, rows of one prompt apart from each other, answers of different lengths."""
    model, place, prompts = Decoder(DENSE, precision="float64"), [1, 0, 1], [[3, 4, 5, 6], [7, 8]]
    written = [[9], [2, 3], []]
    with torch.no_grad():
        cache = model.new_cache(3, 5)
        held = HeldPrompts(cache.room(2, 4), 3, torch.device("cpu"))
        for s, ids in enumerate(prompts):
            _, keys, values = model.prefill(torch.tensor(ids), Layout.from_offsets([0, len(ids)]))
            held.start(np.flatnonzero(np.array(place) == s), np.array(ids), [*keys, *values])
        for t in range(2):  # a row that has nothing more to write repeats its token, which the next step overwrites
            tokens = torch.tensor([row[min(t, len(row) - 1)] if row else 0 for row in written])
            own = torch.tensor([min(t, max(0, len(row) - 1)) for row in written])
            model.decode_grouped(tokens, own + held.of(3).lengths, cache, held.of(3))
        own = torch.tensor([len(row) for row in written])
        found = model.decode_grouped(torch.tensor([10, 11, 12]), own + held.of(3).lengths, cache, held.of(3))
        for b, last in enumerate((10, 11, 12)):
            ids = [*prompts[place[b]], *written[b], last]
            whole = model.hidden(torch.tensor(ids), Layout.from_offsets([0, len(ids)]))
            torch.testing.assert_close(found[b], whole[-1], rtol=0, atol=1e-12)


# ---- what is held


def room(prompts: int, columns: int) -> KVCache:
    return KVCache([torch.zeros(prompts, 1, columns, 1)], [torch.zeros(prompts, 1, columns, 1)])


def past(tokens: np.ndarray) -> list[Tensor]:
    """Keys are the tokens, values their negatives."""
    keys = torch.from_numpy(tokens).float()[:, None, None]
    return [keys, -keys]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_row_finds_its_prompt_whatever_began_and_moved_before(data: st.DataObject) -> None:
    """As a rollout uses it: free rows begin what waits, then rows close and the last ones move into their places."""
    rows = data.draw(st.integers(1, 5))
    prompts = [np.arange(1, 2 + n) + 10 * n for n in data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=6))]
    held, expected = HeldPrompts(room(min(rows, len(prompts)), 4), rows, torch.device("cpu")), {}
    free = list(range(rows))
    for tokens in prompts:
        n = data.draw(st.integers(1, len(free)))
        held.start(np.array(free[:n]), tokens, past(tokens))
        expected |= dict.fromkeys(free[:n], tokens)
        free = free[n:] or sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1)))
    active = len(expected)
    while active:
        shared = held.of(active)
        where = np.array(held._place[:active])
        for row in range(active):
            length = int(shared.lengths[row])
            assert shared.keys[0][where[row], 0, :length, 0].tolist() == expected[row].tolist()
            assert shared.values[0][where[row], 0, :length, 0].tolist() == (-expected[row]).tolist()
            assert (shared.mask[where[row], 0] == 0).tolist() == [i < length for i in range(shared.mask.shape[-1])]
        active -= 1
        target = data.draw(st.integers(0, active))
        if target < active:
            held.move(np.array([active]), np.array([target]))
            expected[target] = expected[active]


def test_a_prompt_that_comes_again_is_not_copied_twice() -> None:
    a, b = np.array([1, 2]), np.array([3])
    held = HeldPrompts(room(2, 2), 2, torch.device("cpu"))
    for row, tokens in ((0, a), (1, b), (0, b)):
        held.start(np.array([row]), tokens, past(tokens))
    held.start(np.array([1]), a, [])  # no row continues it, and it is there still
    assert held.of(2).lengths.tolist() == [1, 2]


@given(st.lists(st.sampled_from([(1,), (1, 2, 3), (4,) * 7]), min_size=1, max_size=12), st.integers(1, 5),
       st.integers(1, 15), st.integers(0, 90), st.booleans())
@settings(max_examples=200, deadline=None)
def test_room_keeps_to_the_cells_that_are_allowed(prompts: list[tuple[int, ...]], new: int, rows: int, tokens: int,
                                                  shares: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pasts, "SPARED", 1)
        found, alone = (Room.most(prompts, new, rows, tokens, shares=s) for s in (shares, False))
    cells = found.prompts * (found.columns - new) + found.rows * (new if found.prompts else found.columns)
    assert 1 <= found.rows <= min(rows, len(prompts))
    assert not tokens or cells <= tokens or found.rows == 1
    assert found.rows >= alone.rows and found.columns == max(map(len, prompts)) + new
    assert found.prompts in (0, min(found.rows, len(set(prompts))))


# ---- whole rollouts


PROMPTS = [Prompt(text=t, group=i) for i, t in enumerate(["a", "0+1", "abcdefgh", "hh", "1+0+1", "a"])
           for _ in range(1 + i % 4)]
"""Ragged, in groups of different sizes, the first again at the end."""


def decoder(shape: Shape, precision: Precision = "float32") -> Decoder:
    """Distributions far from uniform."""
    model = Decoder(shape, precision=precision)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.ndim > 1 else 1)
    return model


def drawn(model: Decoder, engine: Batched, sampling: Sampling) -> tuple[Rollouts, TorchSampler]:
    started = engine.start(TorchLearner(model), TOKENIZER, shared=True)
    assert isinstance(started, TorchSampler)
    return started.rollout(PROMPTS, sampling, (3, 1)), started


@pytest.mark.parametrize("engine", [Batched(), Batched(slots=1), Batched(slots=3), Batched(slots=7),
                                    Batched(slots=4, prefill_tokens=1), Batched(cache_tokens=60)], ids=str)
@pytest.mark.parametrize("shape", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_holding_prompts_once_changes_no_answer(engine: Batched, shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampling, found = decoder(shape), Sampling(max_new_tokens=12), []
    for spared in (0, 10**9):
        monkeypatch.setattr(pasts, "SPARED", spared)
        found.append(drawn(model, engine, sampling)[0])
    a, b = found
    assert len(set(a.episode_actions.tolist())) > 3
    for name in ("tokens", "offsets", "finish"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    np.testing.assert_allclose(a.behavior_logprobs, b.behavior_logprobs, rtol=0, atol=1e-5)
    assert (a.routes is None) == (shape is DENSE)
    if a.routes is not None:
        np.testing.assert_array_equal(a.routes, b.routes)


def test_bfloat16_draws_near_what_it_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pasts, "SPARED", 0)
    model = decoder(DENSE, "bf16")
    rollouts, _ = drawn(model, Batched(), Sampling(max_new_tokens=12))
    scored = TorchLearner(model).score(rollouts, frozenset({Output.LOGPROBS}), 1.0)
    assert np.abs(rollouts.behavior_logprobs - scored.logprobs).mean() < 0.05


def test_prompts_are_held_once_where_that_spares_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    grouped = Decoder.decode_grouped
    def spy(self: Decoder, tokens: Tensor, positions: Tensor, cache: KVCache, prompts: SharedPrompts,
            *rest: object) -> Tensor:
        used.append(prompts.groups.prompts)
        return grouped(self, tokens, positions, cache, prompts, *rest)  # type: ignore[arg-type]  # as it was called
    monkeypatch.setattr(Decoder, "decode_grouped", spy)
    drawn(decoder(DENSE), Batched(), Sampling(max_new_tokens=4))
    assert not used  # short prompts are copied
    monkeypatch.setattr(pasts, "SPARED", 1)
    drawn(decoder(DENSE), Batched(), Sampling(max_new_tokens=4))
    assert max(used) == 5
