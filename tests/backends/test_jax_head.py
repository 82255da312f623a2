"""The head in chunks says what log_softmax of all logits says, values and gradients, and so do action values."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp
from posttrain_backends._jax.head import Readout, chosen_values, chunk_rows, expected_values, logits_of, read

N, H, V = 8, 5, 13


@pytest.fixture
def given() -> dict:
    rng = np.random.default_rng(0)
    made = {"hidden": (N, H), "weight": (V, H), "ref_hidden": (N, H), "ref_weight": (V, H), "by": (3, N)}
    return {**{name: rng.normal(size=size) for name, size in made.items()}, "chosen": rng.integers(0, V, N)}


def plain(hidden, weight, x, temperature):
    log_p = jax.nn.log_softmax(hidden @ weight.T / temperature)
    log_q = jax.nn.log_softmax(x["ref_hidden"] @ x["ref_weight"].T / temperature)
    p = jnp.exp(log_p)
    return jnp.stack([log_p[jnp.arange(N), x["chosen"]], -(p * log_p).sum(-1), (p * (log_p - log_q)).sum(-1)])


@pytest.mark.oracle
@pytest.mark.parametrize("rows", [0, 2, 3])
def test_equals_log_softmax_of_all_logits(given, rows):
    def ours(hidden, weight):
        found = read(hidden, weight, given["chosen"], 0.7, compute=jnp.float64, rows=rows,
                     reference=Readout(given["ref_hidden"], given["ref_weight"]), reference_compute=jnp.float64)
        return jnp.stack([found.logprobs, found.entropy, found.kl])
    with jax.enable_x64(True):
        x = {name: jnp.asarray(a) for name, a in given.items()}
        got, pull = jax.vjp(ours, x["hidden"], x["weight"])
        want, expected = jax.vjp(lambda h, w: plain(h, w, x, 0.7), x["hidden"], x["weight"])
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)
        for a, b in zip(pull(x["by"]), expected(x["by"]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.oracle
@pytest.mark.parametrize("rows", [0, 2])
def test_action_values_are_those_of_every_action(given, rows):
    rng = np.random.default_rng(1)
    W, b = rng.normal(size=(2, V, H)), rng.normal(size=(2, V))
    Q = np.einsum("nh,kvh->knv", given["hidden"], W) + b[:, None]
    z = given["hidden"] @ given["weight"].T / 0.7
    p = np.exp(z - np.logaddexp.reduce(z, axis=1, keepdims=True))
    with jax.enable_x64(True):
        x = {name: jnp.asarray(a) for name, a in given.items()}
        expected = expected_values(x["hidden"], x["weight"], jnp.asarray(W), jnp.asarray(b), 0.7, compute=jnp.float64,
                                   rows=rows)
        chosen = chosen_values(x["hidden"], jnp.asarray(W), jnp.asarray(b), x["chosen"])
    np.testing.assert_allclose(expected, (p * Q).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(chosen, Q[:, np.arange(N), given["chosen"]], rtol=1e-12)


def test_logits_of_all_rows_never_exist(given):
    """What is compiled holds no array of N x V numbers, forward or backward, where a chunk is smaller."""
    rows, n, v = 4, 64, 1024
    hidden, weight, chosen = jnp.ones((n, H)), jnp.ones((v, H)), jnp.zeros(n, jnp.int32)
    def loss(hidden, weight):
        return read(hidden, weight, chosen, 1.0, compute=jnp.float32, rows=rows).logprobs.sum()
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, weight).compile().as_text()
    assert f"[{rows},{v}]" in text
    assert not any(f"{a},{v}]" in text for a in (n, f"{n // rows},{rows}"))


def test_bfloat16_logits_are_summed_in_float32():
    hidden, weight = jnp.ones((1, 300)), jnp.ones((2, 300))
    assert logits_of(hidden, weight, jnp.bfloat16).tolist() == [[300.0, 300.0]]  # 300 is no sum of ones in bfloat16


def test_rows_of_a_chunk_are_a_power_of_two():
    assert [chunk_rows(100, n) for n in (1, 3, 8)] == [1, 2, 8]
    assert chunk_rows(2**23, 0) == 1 and chunk_rows(2**20, 0) == 8
