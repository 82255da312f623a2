"""The sampler's processing against literal NumPy (and transformers where installed), and drawing by the inverse CDF."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from posttrain.data import Sampling
from posttrain_backends._torch import sampling as module
from posttrain_backends._torch.sampling import draw, process, sample
from scipy.stats import chisquare

torch.set_num_threads(1)

SAMPLINGS = [
    Sampling(), Sampling(temperature=0.7), Sampling(temperature=1.3), Sampling(top_k=1), Sampling(top_k=3),
    Sampling(top_p=0.5), Sampling(top_p=0.9, temperature=1.5), Sampling(min_p=0.1), Sampling(min_p=0.999),
    Sampling(top_k=7, top_p=0.8), Sampling(top_k=9, top_p=0.7, min_p=0.2, temperature=0.6), Sampling(top_k=10**6),
    Sampling(top_p=1e-9), Sampling(temperature=0.0),
]


def processed(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """One row, float64, token by token: keep whatever is as large as the last token that the rule keeps."""
    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp(z - z.max())
        return e / e.sum()

    if sampling.temperature == 0:
        return np.where(np.arange(len(logits)) == np.argmax(logits), 0.0, -np.inf)
    z = logits.astype(np.float64) / sampling.temperature
    if sampling.top_k:
        kth = sorted(z, reverse=True)[min(sampling.top_k, len(z)) - 1]
        z = np.where(z >= kth, z, -np.inf)
    if sampling.top_p < 1:
        p, mass, last = softmax(z), 0.0, np.inf
        for token in np.argsort(-z, kind="stable"):
            last, mass = z[token], mass + p[token]
            if mass >= sampling.top_p:
                break
        z = np.where(z >= last, z, -np.inf)
    if sampling.min_p:
        p = softmax(z)
        z = np.where(p >= sampling.min_p * p.max(), z, -np.inf)
    with np.errstate(divide="ignore"):
        return np.log(softmax(z))


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("V", [1, 2, 16, 700])
def test_process_equals_the_literal_rules(sampling: Sampling, V: int) -> None:
    logits = np.random.default_rng(V).normal(0, 3, (5, V))
    got = process(torch.from_numpy(logits), sampling).numpy()
    want = np.stack([processed(row, sampling) for row in logits])
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.integers(0, 13),
       st.sampled_from([1.0, 0.9, 0.4, 0.01]), st.sampled_from([0.0, 0.04, 0.9]))
def test_ties_stay_together_and_something_stays(row: list[int], top_k: int, top_p: float, min_p: float) -> None:
    got = process(torch.tensor([row], dtype=torch.float64), Sampling(top_k=top_k, top_p=top_p, min_p=min_p))[0].numpy()
    assert np.isclose(np.exp(got).sum(), 1, rtol=0, atol=1e-12)
    assert np.isfinite(got[np.argmax(row)])
    for value in set(row):
        assert len({float(x) for x in got[np.array(row) == value]}) == 1
    kept = np.array(row)[np.isfinite(got)]
    assert kept.min() > max((x for x in row if x not in kept), default=-99)  # always the largest


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_float32_and_bfloat16_logits_give_float32(sampling: Sampling) -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).mul(4).bfloat16()
    got = process(logits, sampling)
    assert got.dtype == torch.float32
    want = np.stack([processed(row, sampling) for row in logits.double().numpy()])
    np.testing.assert_array_equal(np.isneginf(got.numpy()), np.isneginf(want))
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-5)


def test_a_nucleus_wider_than_the_first_guess_is_found() -> None:
    logits = np.random.default_rng(0).normal(0, 0.01, (3, 5000))  # nearly uniform: about 4,750 tokens
    got = process(torch.from_numpy(logits), Sampling(top_p=0.95)).numpy()
    want = np.stack([processed(row, Sampling(top_p=0.95)) for row in logits])
    assert np.isfinite(want).sum(axis=1).min() > 4000
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("sampling", [s for s in SAMPLINGS if s.temperature > 0], ids=str)
def test_process_equals_transformers(sampling: Sampling) -> None:
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64).mul(3)
    scores = TemperatureLogitsWarper(float(sampling.temperature))(None, logits)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    torch.testing.assert_close(process(logits, sampling), scores.log_softmax(-1), rtol=0, atol=1e-12)


def test_draw_is_the_inverse_distribution_function() -> None:
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.full(40, 0.3), size=500)
    u = rng.random(500)
    want = [int(np.searchsorted(np.cumsum(row), x, side="right")) for row, x in zip(p, u, strict=True)]
    got = draw(torch.from_numpy(np.log(p)), torch.from_numpy(u))
    np.testing.assert_array_equal(got.numpy(), want)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.0, 1e-30, 1e-3, 0.5, 1.0]), min_size=1, max_size=9),
       st.sampled_from([0.0, 1e-300, 0.5, 1 - 2**-53, 1.0]))
def test_a_token_of_probability_zero_is_never_drawn(mass: list[float], u: float) -> None:
    assume(sum(mass) > 1e-4)
    for dtype in (torch.float32, torch.float64):
        logprobs = (torch.tensor([mass], dtype=dtype) / sum(mass)).log()
        token = int(draw(logprobs, torch.tensor([u], dtype=torch.float64)))
        assert mass[token] > 0


def test_truncated_tokens_are_not_drawn_at_the_edges() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.0, 0.0]])
    for u, token in ((0.0, 1), (1 - 2**-53, 2), (1.0, 2)):
        drawn, logprob = sample(logits, Sampling(top_k=2), torch.tensor([u], dtype=torch.float64))
        assert drawn.tolist() == [token]
        np.testing.assert_allclose(logprob, processed(logits[0].numpy(), Sampling(top_k=2))[token], atol=1e-6)


def test_frequencies_match_probabilities() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, 0.5, -3.0]])
    sampling = Sampling(temperature=0.8, top_k=5)
    n = 40_000
    u = torch.from_numpy(np.random.default_rng(7).random(n))
    tokens, _ = sample(logits.expand(n, -1), sampling, u)
    counts = np.bincount(tokens.numpy(), minlength=6)
    p = np.exp(processed(logits[0].numpy(), sampling))
    assert counts[5] == 0
    assert chisquare(counts[:5], n * p[:5]).pvalue > 1e-3
    assert chisquare(counts[:5], n * np.roll(p[:5], 1)).pvalue < 1e-6  # and the test can fail


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_sampling_in_chunks_changes_nothing(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(7, 30, generator=torch.Generator().manual_seed(2))
    u = torch.from_numpy(np.random.default_rng(2).random(7))
    whole = sample(logits, sampling, u)
    monkeypatch.setitem(module._CELLS, "cpu", 60)
    parts = sample(logits, sampling, u)
    assert torch.equal(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1], rtol=0, atol=1e-6)


def test_greedy_takes_the_first_of_the_largest_and_records_certainty() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, 2.0, 1.0]])
    u = torch.tensor([0.99, 0.0], dtype=torch.float64)
    tokens, logprobs = sample(logits, Sampling(temperature=0.0), u)
    assert tokens.tolist() == [1, 0] and logprobs.tolist() == [0.0, 0.0]
    assert draw(process(logits, Sampling(temperature=0.0)), u).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_give_a_valid_token_and_a_nan_logprob(temperature: float) -> None:
    logits = torch.tensor([[0.0, float("nan"), 1.0]])
    tokens, logprobs = sample(logits, Sampling(temperature=temperature), torch.tensor([0.5], dtype=torch.float64))
    assert 0 <= int(tokens) < 3 and bool(logprobs.isnan().all())
