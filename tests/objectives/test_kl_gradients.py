"""What training with a KL does: the expected gradient of every combination that is allowed, by full enumeration of a
tabular autoregressive policy in float64, and of those that are refused, why.

Three tokens, the first of which ends an episode, and at most three actions: 15 episodes of 1 to 3 actions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from posttrain.ops import ops_of
from posttrain.protocols import Compared
from posttrain_objectives.kl import FixedKL
from posttrain_objectives.kl_estimators import ESTIMATORS, FORBIDDEN, divergence

torch = pytest.importorskip("torch")

V, T, END = 3, 3, 0
EPISODES = [y for n in range(1, T + 1) for y in itertools.product(range(V), repeat=n)
            if END not in y[:-1] and (y[-1] == END or n == T)]
PREFIXES = {y: i for i, y in enumerate(y for n in range(T) for y in itertools.product(range(1, V), repeat=n))}
LENGTHS = np.array([len(y) for y in EPISODES])
EPISODE = np.repeat(np.arange(len(EPISODES)), LENGTHS)
PREFIX = np.array([PREFIXES[y[:t]] for y in EPISODES for t in range(len(y))])
ACTION = np.array([a for y in EPISODES for a in y])
SEEDS = range(3)

Tensor = Any


@dataclass(frozen=True, eq=False)
class Tables:
    """Logits [prefixes, V]: of the policy (a leaf), the reference, and the policy that drew the episodes."""

    theta: Tensor
    ref: Tensor
    old: Tensor


def tables(seed: int) -> Tables:
    theta, ref, old = np.random.default_rng(seed).normal(size=(3, len(PREFIXES), V))
    return Tables(torch.tensor(theta, requires_grad=True), torch.tensor(ref), torch.tensor(old))


def of_actions(logits: Tensor) -> Tensor:
    """[N] log-prob of each action of all episodes."""
    return torch.log_softmax(logits, -1)[PREFIX, ACTION]


def summed(x: Tensor) -> Tensor:
    """[N] -> [E]"""
    return torch.zeros(len(EPISODES), dtype=x.dtype).index_add(0, torch.tensor(EPISODE), x)


def probability(logits: Tensor) -> Tensor:
    """[E] of each episode."""
    return summed(of_actions(logits)).exp().detach()


def reach(logits: Tensor) -> Tensor:
    """[prefixes] probability to come by each."""
    x = torch.zeros(len(PREFIXES), dtype=torch.float64)
    logp = torch.log_softmax(logits, -1).detach()
    for y, i in PREFIXES.items():
        x[i] = np.exp(sum(float(logp[PREFIXES[y[:t]], a]) for t, a in enumerate(y)))
    return x


def gradient(loss: Tensor, theta: Tensor) -> np.ndarray:
    found: np.ndarray = torch.autograd.grad(loss, theta, retain_graph=True)[0].numpy().ravel()
    return found


def exact(t: Tables) -> np.ndarray:
    """Of KL(pi || pi_ref) over whole episodes."""
    logp, logq = summed(of_actions(t.theta)), summed(of_actions(t.ref))
    return gradient((logp.exp() * (logp - logq)).sum(), t.theta)


def partial(t: Tables, drawn_by: Tensor) -> np.ndarray:
    """Of KL(pi || pi_ref) at each prefix, weighted by how often it comes about, which is not differentiated."""
    logp, logq = torch.log_softmax(t.theta, -1), torch.log_softmax(t.ref, -1)
    return gradient((reach(drawn_by) * (logp.exp() * (logp - logq)).sum(-1)).sum(), t.theta)


def partial_forward(t: Tables) -> np.ndarray:
    """The same of KL(pi_ref || pi)."""
    logp, logq = torch.log_softmax(t.theta, -1), torch.log_softmax(t.ref, -1)
    return gradient((reach(t.theta) * (logq.exp() * (logq - logp)).sum(-1)).sum(), t.theta)


def compared(t: Tables, old: Tensor | None = None) -> Compared:
    return Compared(of_actions(t.ref), torch.tensor(EPISODE), torch.tensor(LENGTHS),
                    None if old is None else of_actions(old), over_vocabulary(t))


def over_vocabulary(t: Tables) -> Tensor:
    """[N] the KL at the prefix of each action, differentiable."""
    logp, logq = torch.log_softmax(t.theta, -1), torch.log_softmax(t.ref, -1)
    return (logp.exp() * (logp - logq)).sum(-1)[PREFIX]


def in_the_loss(kl: FixedKL, t: Tables, old: Tensor | None = None) -> np.ndarray:
    """Expected gradient of the sum over an episode's actions, as a learner differentiates it."""
    logp = of_actions(t.theta)
    k = kl.divergence(ops_of(logp), logp, compared(t, old))
    return gradient((probability(t.theta if old is None else old)[EPISODE] * k).sum(), t.theta)


def cost(kl: FixedKL, t: Tables) -> Tensor:
    """[N] what is taken from each action, before the update."""
    logp = of_actions(t.theta).detach()
    return kl.divergence(ops_of(logp), logp, compared(t))


def policy_gradient(t: Tables, of_each_action: Tensor) -> np.ndarray:
    """Expected gradient of log pi times a cost of each action."""
    return gradient((probability(t.theta)[EPISODE] * of_actions(t.theta) * of_each_action).sum(), t.theta)


def to_go(x: Tensor) -> Tensor:
    """[N] sums over the later actions of the same episode, the action's own included."""
    ends = np.cumsum(LENGTHS)[EPISODE]
    return torch.stack([x[i:end].sum() for i, end in enumerate(ends)])


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def loss_kl(estimator: Any, off_policy: Any = "none") -> FixedKL:
    return FixedKL(placement="loss", estimator=estimator, off_policy=off_policy)


def test_the_enumeration_is_complete() -> None:
    t = tables(0)
    assert len(EPISODES) == 15 and float(probability(t.theta).sum()) == pytest.approx(1.0, rel=1e-14)
    assert relative_error(partial(t, t.theta), exact(t)) > 0.1, "the two must differ for the tests to tell them apart"


ON_POLICY: dict[str, tuple[FixedKL, Callable[[Tables], np.ndarray]]] = {
    "k2": (loss_kl("k2"), lambda t: partial(t, t.theta)),
    "k3+": (loss_kl("k3+"), lambda t: partial(t, t.theta)),
    "seq_k2": (loss_kl("seq_k2"), exact),
    "k3": (loss_kl("k3"), partial_forward),
    "exact": (loss_kl("exact"), lambda t: partial(t, t.theta)),
    **{f"{name} ratio": (loss_kl(name, "ratio"), lambda t: partial(t, t.theta)) for name in ("k1", "k2", "k3", "k3+")},
    "seq_k2 ratio": (loss_kl("seq_k2", "ratio"), exact)}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ON_POLICY)
def test_gradient_in_the_loss_on_policy(name: str, seed: int) -> None:
    kl, expected = ON_POLICY[name]
    t = tables(seed)
    assert relative_error(in_the_loss(kl, t), expected(t)) < 1e-13


OFF_POLICY: dict[str, Callable[[Tables], np.ndarray]] = {
    **{name: lambda t: partial(t, t.old) for name in ("k1", "k2", "k3", "k3+")}, "seq_k2": exact}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", OFF_POLICY)
def test_gradient_in_the_loss_off_policy(name: str, seed: int) -> None:
    """Episodes are drawn by pi_old: each action's own KL under pi, at prefixes as pi_old came by them, or whole
    episodes."""
    t = tables(seed)
    expected = OFF_POLICY[name](t)
    assert relative_error(in_the_loss(loss_kl(name, "ratio"), t, t.old), expected) < 1e-13
    if name != "k1":
        assert relative_error(in_the_loss(loss_kl(name), t, t.old), expected) > 0.1, "without the ratio it is another"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_kl_over_the_vocabulary_needs_no_ratio(seed: int) -> None:
    """Episodes drawn by pi_old, and no ratio of actions: each prefix has its own KL already. A ratio, differentiated or
    not, is the same in expectation."""
    t = tables(seed)
    assert relative_error(in_the_loss(loss_kl("exact"), t, t.old), partial(t, t.old)) < 1e-13
    rho = (of_actions(t.theta) - of_actions(t.old)).exp()
    for ratio in (rho, rho.detach()):
        weighed = gradient((probability(t.old)[EPISODE] * ratio * over_vocabulary(t)).sum(), t.theta)
        assert relative_error(weighed, partial(t, t.old)) < 1e-13


@pytest.mark.parametrize("seed", SEEDS)
def test_the_kl_over_the_vocabulary_does_not_depend_on_the_action_drawn(seed: int) -> None:
    """Its gradient at a prefix is what k2 has on average over actions, without the scatter of it."""
    t = tables(seed)
    for name, scatters in (("exact", False), ("k2", True)):
        logp = of_actions(t.theta)
        k = loss_kl(name).divergence(ops_of(logp), logp, compared(t))
        first = [gradient(k[i], t.theta) for i in np.flatnonzero(PREFIX == 0)]
        assert (max(np.abs(g - first[0]).max() for g in first) > 1e-3) == scatters


@pytest.mark.parametrize("seed", SEEDS)
def test_the_kl_over_the_vocabulary_as_a_cost_misses_each_actions_own(seed: int) -> None:
    """As an advantage it does nothing at all; as a reward, what is left is the effect on later actions."""
    t = tables(seed)
    k = over_vocabulary(t).detach()
    assert np.abs(policy_gradient(t, k)).max() < 1e-14
    left = policy_gradient(t, to_go(k))
    assert relative_error(left, exact(t)) > 0.3
    assert relative_error(left + partial(t, t.theta), exact(t)) < 1e-13


@pytest.mark.parametrize("seed", SEEDS)
def test_k1_in_the_reward_has_the_exact_gradient(seed: int) -> None:
    t = tables(seed)
    assert relative_error(policy_gradient(t, to_go(cost(FixedKL(), t))), exact(t)) < 1e-13


@pytest.mark.parametrize("seed", SEEDS)
def test_k1_in_the_advantage_has_the_partial_gradient_and_equals_k2_in_the_loss(seed: int) -> None:
    t = tables(seed)
    found = policy_gradient(t, cost(FixedKL(placement="advantage"), t))
    assert relative_error(found, partial(t, t.theta)) < 1e-13
    assert relative_error(found, in_the_loss(loss_kl("k2"), t)) < 1e-13


def test_every_allowed_combination_is_tested_here() -> None:
    tested = {("loss", name.split()[0], "ratio" if " " in name else "none") for name in ON_POLICY}
    tested |= {("reward", "k1", "none"), ("advantage", "k1", "none")}
    allowed = {("loss", name, "ratio") for name in ESTIMATORS} | {
        (placement, name, "none") for placement in ("loss", "reward", "advantage") for name in ESTIMATORS
        if (placement, name) not in FORBIDDEN} | {("loss", "exact", "none")}
    assert tested == allowed


def raw(name: Any, t: Tables, logp: Tensor) -> Tensor:
    """An estimator in a place where components refuse it."""
    return divergence(ops_of(logp), name, logp, compared(t))


@pytest.mark.parametrize("seed", SEEDS)
def test_k1_in_the_loss_does_nothing(seed: int) -> None:
    t = tables(seed)
    loss = (probability(t.theta)[EPISODE] * raw("k1", t, of_actions(t.theta))).sum()
    assert np.abs(gradient(loss, t.theta)).max() < 1e-14


@pytest.mark.parametrize("placement", ["reward", "advantage"])
@pytest.mark.parametrize("name", ["k2", "k3", "k3+", "seq_k2"])
def test_estimators_whose_value_says_nothing_of_the_side_are_wrong_as_a_cost(name: str, placement: str) -> None:
    """None of them has the gradient that k1 has there, and for one action each points the other way."""
    t = tables(1)
    k = raw(name, t, of_actions(t.theta).detach())
    found = policy_gradient(t, to_go(k) if placement == "reward" else k)
    assert relative_error(found, exact(t) if placement == "reward" else partial(t, t.theta)) > 0.5
    theta = torch.log(torch.tensor([0.2, 0.8], dtype=torch.float64)).requires_grad_()
    logp, logq = torch.log_softmax(theta, -1), torch.log(torch.tensor([0.5, 0.5], dtype=torch.float64))
    two = Compared(logq, torch.arange(2), torch.ones(2, dtype=torch.int64))
    k = divergence(ops_of(logp), name, logp.detach(), two)
    away = gradient((logp.exp().detach() * k * logp).sum(), theta)
    assert cosine(away, gradient((logp.exp() * (logp - logq)).sum(), theta)) == pytest.approx(-1.0)


def test_the_ratio_form_of_k3_is_the_one_that_autograd_finds() -> None:
    """Its derivative is written down, since a clamp would turn it around; where nothing is clamped both are one."""
    t = tables(2)
    logp = of_actions(t.theta)
    d, log_rho = of_actions(t.ref) - logp, logp - of_actions(t.old)
    literal = (log_rho.exp() * (torch.expm1(d) - d)).sum()
    k = divergence(ops_of(logp), "k3", logp, compared(t, t.old), "ratio").sum()
    assert float(k.detach()) == pytest.approx(float(literal.detach()), rel=1e-13)
    assert relative_error(gradient(k, t.theta), gradient(literal, t.theta)) < 1e-12


def test_k3_plus_has_the_value_of_k3() -> None:
    t = tables(0)
    logp = of_actions(t.theta)
    torch.testing.assert_close(raw("k3+", t, logp), raw("k3", t, logp), rtol=1e-14, atol=1e-15)
