"""KL estimators: value and gradient by full enumeration of a tabular autoregressive policy, in float64.

The facts of Section B.2: which estimator, in which place, has the gradient of the KL of whole episodes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from posttrain.ops import ops_of
from posttrain_objectives.kl import AdaptiveKL, FixedKL, divergence, k1, k2, k3

torch = pytest.importorskip("torch")

V, T = 3, 3
"""Tokens of the vocabulary, and of an episode."""
SEQUENCES = list(itertools.product(range(V), repeat=T))
PREFIXES = {p: i for i, p in enumerate(p for n in range(T) for p in itertools.product(range(V), repeat=n))}
ROWS = np.array([[PREFIXES[y[:t]] for t in range(T)] for y in SEQUENCES])
ACTIONS = np.array(SEQUENCES)

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""log pi [27, T], log pi_ref [27, T] -> per-action divergence [27, T]."""


def tables(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of policy (a leaf) and reference, one row per prefix."""
    rng = np.random.default_rng(seed)
    shape = (len(PREFIXES), V)
    return torch.tensor(rng.normal(size=shape), requires_grad=True), torch.tensor(rng.normal(size=shape))


def token_logprobs(logits: torch.Tensor) -> torch.Tensor:
    """[27, T] log-prob of each token of each possible sequence."""
    return torch.log_softmax(logits, -1)[ROWS, ACTIONS]


def gradient(loss: torch.Tensor, theta: torch.Tensor) -> np.ndarray:
    return torch.autograd.grad(loss, theta, retain_graph=True)[0].numpy().ravel()


def exact_gradient(theta: torch.Tensor, ref: torch.Tensor) -> np.ndarray:
    """Of KL(pi || ref) over whole sequences."""
    logp, logq = token_logprobs(theta).sum(-1), token_logprobs(ref).sum(-1)
    return gradient((logp.exp() * (logp - logq)).sum(), theta)


def loss_gradient(k: Divergence, theta: torch.Tensor, ref: torch.Tensor) -> np.ndarray:
    """Expected gradient of the sampled sum of k, as a learner differentiates it: samples are constants."""
    logp = token_logprobs(theta)
    p = logp.sum(-1).exp().detach()
    return gradient((p * k(logp, token_logprobs(ref)).sum(-1)).sum(), theta)


def reward_gradient(k: Divergence, theta: torch.Tensor, ref: torch.Tensor) -> np.ndarray:
    """Expected policy gradient where k is a cost of each action, with costs-to-go."""
    logp = token_logprobs(theta)
    p = logp.sum(-1).exp().detach()
    cost = k(logp.detach(), token_logprobs(ref))
    to_go = cost.flip(-1).cumsum(-1).flip(-1)
    return gradient((p * (logp * to_go).sum(-1)).sum(), theta)


def raw(estimator: Callable[..., torch.Tensor]) -> Divergence:
    """An estimator of the module, in a place where components refuse it."""
    return lambda logp, logq: estimator(ops_of(logp), logq - logp)


def of(kl: FixedKL | AdaptiveKL) -> Divergence:
    return lambda logp, logq: kl.divergence(ops_of(logp), logp, logq)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    theta, ref = tables(0)
    logp, logq = torch.log_softmax(theta.detach(), -1), torch.log_softmax(ref, -1)
    exact = (logp.exp() * (logp - logq)).sum(-1)
    def mean(k: Divergence) -> torch.Tensor:
        return (logp.exp() * k(logp, logq)).sum(-1)
    torch.testing.assert_close(mean(raw(k1)), exact, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(mean(raw(k3)), exact, rtol=1e-12, atol=1e-15)
    assert (mean(raw(k2)) - exact).abs().max() > 0.05


@pytest.mark.parametrize("seed", range(3))
def test_k1_in_the_reward_has_the_exact_gradient(seed: int) -> None:
    theta, ref = tables(seed)
    assert relative_error(reward_gradient(of(FixedKL()), theta, ref), exact_gradient(theta, ref)) < 1e-13


@pytest.mark.parametrize("seed", range(3))
def test_k1_in_the_loss_has_an_expected_gradient_of_zero(seed: int) -> None:
    theta, ref = tables(seed)
    assert np.abs(loss_gradient(raw(k1), theta, ref)).max() < 1e-15


@pytest.mark.parametrize("seed", range(3))
def test_k2_in_the_loss_has_the_partial_gradient(seed: int) -> None:
    """That of each token's own KL at the prefixes as they are drawn; the effect on later tokens is missing."""
    theta, ref = tables(seed)
    logp, logq = torch.log_softmax(theta, -1), torch.log_softmax(ref, -1)
    per_prefix = (logp.exp() * (logp - logq)).sum(-1)
    p = token_logprobs(theta).sum(-1).exp().detach()
    partial = gradient((p * per_prefix[ROWS].sum(-1)).sum(), theta)
    found = loss_gradient(of(FixedKL(placement="loss")), theta, ref)
    assert relative_error(found, partial) < 1e-13
    assert relative_error(found, exact_gradient(theta, ref)) > 0.1
    assert cosine(found, exact_gradient(theta, ref)) > 0.5


def test_k3_in_the_loss_has_the_gradient_of_the_forward_kl_of_each_step() -> None:
    theta, ref = tables(0)
    logp, logq = torch.log_softmax(theta, -1), torch.log_softmax(ref, -1)
    forward = gradient((logq.exp() * (logq - logp)).sum(), theta)
    k = of(FixedKL(placement="loss", estimator="k3"))
    found = gradient((logp.exp().detach() * k(logp, logq)).sum(), theta)
    assert relative_error(found, forward) < 1e-13


@pytest.mark.parametrize("estimator", [k2, k3])
def test_k2_and_k3_in_the_reward_push_rare_actions_away_from_the_reference(
        estimator: Callable[..., torch.Tensor]) -> None:
    """One step, pi = (0.2, 0.8), reference (0.5, 0.5): descent must raise the probability of the first action."""
    theta = torch.log(torch.tensor([0.2, 0.8], dtype=torch.float64)).requires_grad_()
    logp, logq = torch.log_softmax(theta, -1), torch.log(torch.tensor([0.5, 0.5], dtype=torch.float64))
    def score_gradient(k: Divergence) -> np.ndarray:
        return gradient((logp.exp().detach() * k(logp.detach(), logq) * logp).sum(), theta)
    exact = gradient((logp.exp() * (logp - logq)).sum(), theta)
    assert cosine(score_gradient(raw(k1)), exact) == pytest.approx(1.0)
    assert cosine(score_gradient(raw(estimator)), exact) == pytest.approx(-1.0)


def test_half_precision_is_computed_in_float32() -> None:
    logp = torch.tensor([-1.0, -2.0], dtype=torch.bfloat16)
    found = divergence(ops_of(logp), "k3", logp, torch.tensor([-1.001, -2.5]))
    assert found.dtype == torch.float32
    d = np.array([-0.001, -0.5])
    np.testing.assert_allclose(found.numpy(), np.expm1(d) - d, rtol=1e-3)


def test_k3_gradient_vanishes_above_its_clamp_alone() -> None:
    logp = torch.tensor([-50.0, -1.0, 0.0], dtype=torch.float64, requires_grad=True)
    logq = torch.tensor([-1.0, -1.5, -90.0], dtype=torch.float64)
    divergence(ops_of(logp), "k3", logp, logq).sum().backward()
    np.testing.assert_allclose(logp.grad, [0.0, 1 - np.exp(-0.5), 1.0], rtol=1e-12)
