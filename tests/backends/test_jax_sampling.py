"""The sampler's processing and drawing in JAX against those of torch, which are held to the literal rules elsewhere."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from posttrain.data import Sampling

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

from posttrain_backends._jax.sampling import draw, process, sample
from posttrain_backends._torch import sampling as on_torch

SAMPLINGS = [
    Sampling(), Sampling(temperature=0.7), Sampling(top_k=1), Sampling(top_k=3), Sampling(top_p=0.5),
    Sampling(top_p=0.9, temperature=1.5), Sampling(min_p=0.1), Sampling(min_p=0.999), Sampling(top_k=7, top_p=0.8),
    Sampling(top_k=9, top_p=0.7, min_p=0.2, temperature=0.6), Sampling(top_k=10**6), Sampling(top_p=1e-9),
    Sampling(temperature=0.0),
]


@pytest.fixture(autouse=True)
def wide() -> object:
    """64-bit numbers, as where tokens are drawn."""
    with jax.enable_x64(True):
        yield


def in_both(logits: np.ndarray, sampling: Sampling, uniforms: np.ndarray) -> tuple[np.ndarray, ...]:
    """Tokens and log-probs of JAX, and then of torch."""
    ours = jax.jit(partial(sample, sampling=sampling))(logits, uniforms=uniforms)
    theirs = on_torch.sample(torch.from_numpy(logits), sampling, torch.from_numpy(uniforms))
    return tuple(np.asarray(x) for x in (*ours, *theirs))


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("V", [1, 700])
def test_tokens_and_logprobs_equal_those_of_torch(sampling: Sampling, V: int) -> None:
    rng = np.random.default_rng(V)
    logits, uniforms = rng.normal(0, 3, (40, V)), rng.random(40)
    tokens, logprobs, wanted, theirs = in_both(logits, sampling, uniforms)
    np.testing.assert_array_equal(tokens, wanted)
    np.testing.assert_allclose(logprobs, theirs, rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.asarray(process(logits, sampling)),
                               on_torch.process(torch.from_numpy(logits), sampling).numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_float32_and_bfloat16_logits_give_float32(sampling: Sampling) -> None:
    logits = np.random.default_rng(0).normal(0, 4, (4, 50)).astype(np.float32)
    for dtype, given in ((jax.numpy.float32, torch.float32), (jax.numpy.bfloat16, torch.bfloat16)):
        got = process(jax.numpy.asarray(logits, dtype), sampling)
        assert got.dtype == jax.numpy.float32
        want = on_torch.process(torch.from_numpy(logits).to(given), sampling).numpy()
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
        tokens, logprobs = sample(jax.numpy.asarray(logits, dtype), sampling, np.full(4, 0.3))
        assert tokens.dtype == np.int32 and logprobs.dtype == np.float32


def test_a_nucleus_wider_than_the_first_guess_is_found() -> None:
    logits = np.random.default_rng(0).normal(0, 0.01, (3, 5000))  # nearly uniform: about 4,750 tokens
    got, want = (np.asarray(x) for x in (process(logits, Sampling(top_p=0.95)), on_torch.process(
        torch.from_numpy(logits), Sampling(top_p=0.95))))
    assert np.isfinite(want).sum(axis=1).min() > 4000
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))


def test_ties_stay_together() -> None:
    row = np.array([[2.0, 1.0, 1.0, 1.0, -1.0]])
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.6), Sampling(min_p=0.3)):
        assert np.isfinite(np.asarray(process(row, sampling)))[0].tolist() == [True, True, True, True, False]


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    mass = np.array([[0.0, 1e-30, 0.5, 0.0, 0.5, 0.0]])
    for u in (0.0, 1e-300, 0.5, 1 - 2**-53, 1.0):
        with np.errstate(divide="ignore"):
            assert int(draw(np.log(mass), np.array([u]))[0]) in (2, 4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_give_a_valid_token_and_a_nan_logprob(temperature: float) -> None:
    logits = np.array([[0.0, np.nan, 1.0]])
    tokens, logprobs = sample(jax.numpy.asarray(logits), Sampling(temperature=temperature), np.array([0.5]))
    assert 0 <= int(tokens[0]) < 3 and np.isnan(logprobs).all()
