"""Tokens computed once: hidden states, gradients and scores equal those of every sequence on its own."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from posttrain.data import Prompt, Rollouts, Sampling, offsets_of
from posttrain.protocols import LoadRequest, Output
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models.decoder import Decoder
from posttrain_backends._torch.sharing import computed
from posttrain_backends._torch.trees import forest
from posttrain_backends.torch_native import Torch

torch.set_num_threads(1)


@st.composite
def batches(draw):
    """Sequences that are prompts of a small set and answers, and tokens of them that are read."""
    prompts = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=3))
    sequences, read, offset = [], [], 0
    for _ in range(draw(st.integers(0, 7))):
        prompt = draw(st.sampled_from(prompts))
        answer = draw(st.lists(st.integers(0, 2), max_size=6))
        sequences.append(prompt + answer)
        at = sorted(draw(st.sets(st.integers(len(prompt) - 1, len(sequences[-1]) - 1), max_size=4)))
        read += [offset + i for i in at]
        offset += len(sequences[-1])
    tokens = [token for sequence in sequences for token in sequence]
    lengths = np.array([len(sequence) for sequence in sequences], int)
    return np.array(tokens, np.int64), offsets_of(lengths), np.array(read, np.int64)


def past(tokens, offsets, i):
    """The token i and all before it in its sequence."""
    start = offsets[np.searchsorted(offsets, i, side="right") - 1]
    return tokens[start:i + 1].tolist()


@settings(deadline=None, max_examples=200)
@given(batch=batches(), shared=st.booleans())
def test_every_token_read_stands_in_a_row_with_its_own_past(batch, shared):
    tokens, offsets, read = batch
    found = computed(tokens, offsets, read, shared=shared)
    cells, bounds = found.layout.cells, found.layout.offsets
    for i in read:
        s = np.searchsorted(offsets, i, side="right") - 1
        row = cells[bounds[s]:bounds[s + 1]]
        at = i - offsets[s]
        assert tokens[found.kept[row[:at + 1]]].tolist() == past(tokens, offsets, i)
        assert row[at] == found.place[i]
    assert found.layout.positions.tolist() == [len(past(tokens, offsets, i)) - 1 for i in found.kept]


@settings(deadline=None, max_examples=100)
@given(batch=batches())
def test_blocks_of_shared_tokens_give_each_of_them_once(batch):
    layout = computed(*batch).layout
    x = torch.arange(len(layout.rows))
    parts = [block.unpad(block.pad(x)) for block in (*layout.blocks,)]
    joined = torch.cat([*parts, x[:0]])
    assert (joined if layout.inverse is None else joined[layout.inverse]).tolist() == x.tolist()
    whole = layout.rectangle()
    assert whole.unpad(whole.pad(x)).tolist() == x.tolist() if len(x) else whole.rows == 0


def test_a_prompt_is_computed_once_and_nothing_behind_the_last_token_read():
    tokens, offsets = np.array([5, 6, 7, 1, 2, 5, 6, 7, 3, 4, 5, 6, 8, 1]), np.array([0, 5, 10, 14])
    read = np.array([2, 3, 7, 8, 12])
    found = computed(tokens, offsets, read)
    assert found.kept.tolist() == [0, 1, 2, 3, 8, 10, 11, 12]
    assert len(computed(tokens, offsets, read, shared=False).kept) == 11


def model(kv_heads: int = 2, checkpointing: bool = False) -> Decoder:
    return Torch(hidden_size=16, layers=2, heads=4, kv_heads=kv_heads, max_positions=64, device="cpu",
                 precision="float64", gradient_checkpointing=checkpointing).load(LoadRequest(23, seed=3)).model


@pytest.mark.parametrize("lengths", [[4, 4, 4], [2, 9, 30, 1]], ids=["one block", "several blocks"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_hidden_states_and_gradients_equal_those_of_sequences_one_by_one(lengths, checkpointing):
    r, P = np.random.default_rng(0), 7
    prompt = r.integers(0, 23, P)
    tokens = np.concatenate([np.concatenate([prompt, r.integers(0, 23, n)]) for n in lengths])
    offsets = offsets_of(P + np.array(lengths))
    read = np.concatenate([np.arange(a + P - 1, b) for a, b in pairwise(offsets)])
    weight = torch.from_numpy(r.normal(size=(len(read), 16)))

    def run(shared: bool):
        decoder, need = model(checkpointing=checkpointing), computed(tokens, offsets, read, shared=shared)
        decoder.requires_grad_(True)
        hidden = decoder.hidden(torch.from_numpy(tokens[need.kept]), need.layout)[torch.from_numpy(need.place[read])]
        (hidden * weight).sum().backward()
        return len(need.kept), hidden.detach(), {n: p.grad for n, p in decoder.named_parameters() if p.grad is not None}

    (fewer, a, found), (more, b, wanted) = run(True), run(False)
    assert more - fewer == P * (len(lengths) - 1)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert found.keys() == wanted.keys() and len(found) > 10
    for name, g in wanted.items():
        torch.testing.assert_close(found[name], g, rtol=0, atol=1e-12 * float(g.abs().max()))


def group(answers: list[list[int]], prompt: list[int]) -> Rollouts:
    """One group: answers to one prompt."""
    E, P = len(answers), len(prompt)
    lengths = np.array([P + len(a) for a in answers])
    n = int((lengths - P).sum())
    return Rollouts(
        tokens=np.concatenate([np.array(prompt + a, np.int32) for a in answers]), offsets=offsets_of(lengths),
        episode=np.arange(E), is_action=np.concatenate([np.arange(m) >= P for m in lengths]),
        group=np.zeros(E, np.int64), finish=np.zeros(E, np.int8), terminated=np.ones(E, bool),
        prompts=tuple(Prompt(tokens=tuple(prompt)) for _ in answers),
        completions=("",) * E, behavior_logprobs=np.zeros(n, np.float32), policy_version=np.zeros(n, np.int32),
        turn=np.zeros(n, np.int32), sampling=Sampling())


def test_scores_of_a_group_equal_those_of_its_answers_alone():
    learner = Torch(hidden_size=16, layers=2, heads=4, max_positions=64, device="cpu", precision="float64").load(
        LoadRequest(23, seed=1, value_heads=1))
    r = np.random.default_rng(2)
    answers = [r.integers(0, 23, n).tolist() for n in (3, 8, 1, 20)]
    outputs = frozenset({Output.LOGPROBS, Output.ENTROPY, Output.VALUES, Output.BOOTSTRAP_VALUES})
    torch.nn.init.normal_(learner.value_head.weight)
    whole = learner.score(group(answers, [4, 9, 1]), outputs, 1.0)
    alone = [learner.score(group([a], [4, 9, 1]), outputs, 1.0) for a in answers]
    for name in ("logprobs", "entropy", "values", "bootstrap_values"):
        expected = np.concatenate([getattr(x, name) for x in alone], axis=-1)
        np.testing.assert_allclose(getattr(whole, name), expected, rtol=0, atol=1e-12)


def test_a_layout_without_sharing_is_the_plain_one():
    a, b = Layout.from_offsets([0, 3, 5]), Layout.from_offsets([0, 3, 5], cells=np.arange(5))
    assert replace(a, blocks=(), inverse=None).positions.tolist() == b.positions.tolist() == [0, 1, 2, 0, 1]
    assert [x.scatter.tolist() for x in a.blocks] == [x.scatter.tolist() for x in b.blocks]


@settings(deadline=None, max_examples=150)
@given(batch=batches())
def test_a_token_of_a_tree_sees_its_own_past_alone(batch):
    tokens, offsets, read = batch
    found = computed(tokens, offsets, read)
    trees = forest(found.layout, 10**6)
    if trees is None:
        assert len(found.layout.cells) == len(found.kept)
        return
    joined, M = [], len(found.kept)
    for block, mask in zip(trees.blocks, trees.masks, strict=True):
        ids = block.pad(torch.arange(M)).numpy()
        for cell in block.scatter.tolist():
            row, column = divmod(cell, block.columns)
            seen = ids[row][mask[row, 0, column].numpy()]
            token = found.kept[ids[row][column]]
            assert sorted(tokens[found.kept[seen]]) == sorted(past(tokens, offsets, token))
            assert len(set(seen)) == len(seen), "padding repeats a token and must not be seen"
        assert mask.any(-1).all(), "a cell that sees nothing would give NaN"
        joined.append(block.unpad(block.pad(torch.arange(M))))
    assert torch.cat(joined)[trees.inverse].tolist() == list(range(M))


def test_no_tree_where_a_row_per_sequence_costs_less():
    tokens = np.concatenate([np.concatenate([[1, 2], np.full(50, i)]) for i in range(8)])
    offsets = np.arange(9) * 52
    layout = computed(tokens, offsets, np.concatenate([np.arange(a + 1, a + 52) for a in offsets[:-1]])).layout
    assert forest(layout, hidden_size=16) is None and forest(layout, hidden_size=10**6) is not None
