"""The contracts of estimators and corrections catch wrong ones: a bug each, and the test that must find it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import pytest
from posttrain.data import Array, Episodes, Estimate, Metric, Metrics, to_numpy
from posttrain.hookspecs import Component, hookimpl
from posttrain.ops import like, ops_of, reverse_recurrence, segment_mean, segment_std, whiten, widen
from posttrain.protocols import Corrected, Need
from posttrain.testing import ComponentContract, CorrectionContract, EstimatorContract, failures


def returns(gamma: float, episodes: Episodes) -> Array:
    """G_t = r_t + gamma G_{t+1}, ending in the bootstrap value where the episode was truncated."""
    ops = ops_of(episodes.values)
    r = ops.stop_gradient(widen(episodes.rewards))
    last = ops.xp.where(like(episodes.terminated, r), 0.0, ops.stop_gradient(widen(episodes.bootstrap_values)))
    ends = like(np.isin(np.arange(len(r)), episodes.offsets[1:] - 1), r)
    return reverse_recurrence(gamma, ops.xp.where(ends, r + gamma * last[episodes.episode], r), episodes.offsets)


def require_values(episodes: Episodes) -> None:
    for name in ("values", "bootstrap_values"):
        if getattr(episodes, name) is None:
            raise ValueError(f"Episodes.{name} is missing")


@final
@dataclass(frozen=True)
class Right:
    """A = G - v, the Monte Carlo advantage; keeps the contract."""

    gamma: float = 0.9
    """Discount."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.VALUES})

    def __call__(self, episodes: Episodes, /) -> Estimate:
        require_values(episodes)
        G = returns(self.gamma, episodes)
        return Estimate(G - widen(episodes.values), targets=G)


@hookimpl
def components() -> Iterable[Component]:
    """This module is a plugin that declares what is right in it."""
    return [Component("estimator", "right", f"{__name__}:Right", "Monte Carlo advantage"),
            Component("correction", "right", f"{__name__}:RightWeights", "importance weights up to a bound")]


class OracleOfReturns:
    """Plain loops."""

    def oracle(self, component: Any, episodes: Episodes) -> Sequence[float]:
        advantages: list[float] = []
        for e, (a, b) in enumerate(zip(episodes.offsets, episodes.offsets[1:])):
            following = 0.0 if episodes.terminated[e] else float(episodes.bootstrap_values[e])
            found = []
            for t in range(b - 1, a - 1, -1):
                following = float(episodes.rewards[t]) + 0.9 * following
                found.append(following - float(episodes.values[t]))
            advantages += found[::-1]
        return advantages


class TestRight(OracleOfReturns, EstimatorContract):
    components = (Right(), Right(gamma=0.9))
    plugins = (sys.modules[__name__],)


class Wrong:
    """Everything of `Right` but one thing."""

    gamma: ClassVar[float] = 0.9
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VALUES})

    def __call__(self, episodes: Episodes, /) -> Estimate:
        require_values(episodes)
        G = returns(0.9, episodes)
        return self.changed(Estimate(G - widen(episodes.values), targets=G), episodes)

    def changed(self, estimate: Estimate, episodes: Episodes) -> Estimate:
        raise AssertionError("each wrong estimator has its own")


def wrong(name: str, **members: Any) -> Any:
    """An estimator called `name` that differs from the right one by `members` alone."""
    cls = type(name, (Wrong,), {"__doc__": name, "__module__": __name__, **members})
    return final(dataclass(frozen=True)(cls))()


def shifted(self: Any, estimate: Estimate, episodes: Episodes) -> Estimate:
    """Truncation bootstraps the next trajectory's value (pytorch/rl 4209)."""
    neighbour = replace(episodes, bootstrap_values=np.roll(to_numpy(episodes.bootstrap_values), -1))
    return Estimate(like(to_numpy(returns(0.9, neighbour)), estimate.advantages) - episodes.values, estimate.targets)


def always_bootstrapped(self: Any, estimate: Estimate, episodes: Episodes) -> Estimate:
    """Bootstraps behind an episode that terminated."""
    G = returns(0.9, replace(episodes, terminated=np.zeros(episodes.n_episodes, bool)))
    return replace(estimate, advantages=G - episodes.values)


def leaking(self: Any, estimate: Estimate, episodes: Episodes) -> Estimate:
    """One recurrence over the whole batch: the value at a slot outside the episode reaches it (ROLL 447, verl 50)."""
    G = reverse_recurrence(0.9, episodes.rewards, np.array([0, len(episodes.rewards)]))
    return replace(estimate, advantages=G - episodes.values)


def nan_in_groups_of_one(self: Any, estimate: Estimate, episodes: Episodes) -> Estimate:
    """Standard deviation with divisor n - 1 of one answer (RL2 16; rllm 916)."""
    s = np.array([float(to_numpy(episodes.rewards)[a:b].sum())
                  for a, b in zip(episodes.offsets, episodes.offsets[1:])])
    with np.errstate(all="ignore"):
        A = np.array([(s[e] - s[g == episodes.group].mean()) / np.float64(np.sqrt(
            ((s[g == episodes.group] - s[g == episodes.group].mean()) ** 2).sum()
            / np.float64((g == episodes.group).sum() - 1))) for e, g in enumerate(episodes.group)])
    return replace(estimate, advantages=like(A[episodes.episode], estimate.advantages))


def exploding(self: Any, estimate: Estimate, episodes: Episodes) -> Estimate:
    """Divided by a standard deviation without an epsilon: equal rewards become NaN (RL2 16)."""
    group = np.unique(episodes.group, return_inverse=True)[1]
    r, n = episodes.rewards, int(group.max()) + 1
    ids = group[episodes.episode]
    with np.errstate(all="ignore"):
        return replace(estimate, advantages=(r - segment_mean(r, ids, n)[ids]) / segment_std(r, ids, n, 0)[ids])


def by_neighbours_in_the_batch(self: Any, estimate: Estimate, episodes: Episodes) -> Estimate:
    """Groups are taken to be neighbours in the batch, whatever `group` says."""
    pair = (np.arange(episodes.n_episodes) // 2)[episodes.episode]
    mean = segment_mean(episodes.rewards, pair, int(pair.max()) + 1)
    return replace(estimate, advantages=episodes.rewards - mean[pair])


def indexed_by_group(self: Any, estimate: Estimate, episodes: Episodes) -> Estimate:
    """Takes group numbers for indices from 0."""
    ids = (episodes.group % episodes.n_episodes)[episodes.episode] + 0
    weight = like(episodes.group[episodes.episode].astype(np.float64), estimate.advantages)
    return replace(estimate, advantages=estimate.advantages + weight + 0 * ids[0])


def in_place(self: Any, estimate: Estimate, episodes: Episodes) -> Estimate:
    """Writes into what it was given."""
    if isinstance(episodes.rewards, np.ndarray):
        episodes.rewards[:] = episodes.rewards - 1.0
    return estimate


class Counter:
    """State outside the component."""

    calls = 0


def remembering(self: Any, estimate: Estimate, episodes: Episodes) -> Estimate:
    """Has a memory: a running baseline over calls."""
    Counter.calls += 1
    return replace(estimate, advantages=estimate.advantages - 0.1 * Counter.calls)


def in_float64(self: Any, estimate: Estimate, episodes: Episodes) -> Estimate:
    """A NumPy float64 constant widens everything."""
    if isinstance(estimate.advantages, np.ndarray):
        return replace(estimate, advantages=estimate.advantages * np.float64(1.0) + np.zeros(1))
    return estimate


def in_numpy(self: Any, estimate: Estimate, episodes: Episodes) -> Estimate:
    """Returns NumPy whatever came in."""
    return replace(estimate, advantages=to_numpy(estimate.advantages))


def one_per_episode(self: Any, estimate: Estimate, episodes: Episodes) -> Estimate:
    """One number per episode instead of per action."""
    return replace(estimate, advantages=estimate.advantages[episodes.offsets[:-1]])


def keep_as_numbers(self: Any, estimate: Estimate, episodes: Episodes) -> Estimate:
    """`keep` as floats: a mask that is multiplied instead of selected."""
    return replace(estimate, keep=estimate.advantages * 0.0 + 1.0)


def mean_of_means(self: Any, estimate: Estimate, episodes: Episodes) -> Estimate:
    """A metric without its weight."""
    mean: Any = float(np.mean(to_numpy(estimate.advantages)))
    return replace(estimate, metrics=Metrics({"mean": mean}))


def undeclared(self: Any, estimate: Estimate, episodes: Episodes) -> Estimate:
    """Reads a column that `needs` does not name."""
    extra = episodes.ref_logprobs
    return estimate if extra is None else replace(estimate, advantages=estimate.advantages - extra)


def without_targets(self: Any, estimate: Estimate, episodes: Episodes) -> Estimate:
    """Reads values and leaves the critic without a target."""
    return Estimate(estimate.advantages)


def by_position(self: Any, estimate: Estimate, episodes: Episodes) -> Estimate:
    """Favours the first answer of a group."""
    first = like(np.isin(episodes.episode, np.unique(episodes.group, return_index=True)[1]), estimate.advantages)
    return replace(estimate, advantages=estimate.advantages + ops_of(estimate.advantages).xp.where(first, 1.0, 0.0))


def whitened(self: Any, estimate: Estimate, episodes: Episodes) -> Estimate:
    """Standardised over the batch without saying so."""
    return replace(estimate, advantages=whiten(estimate.advantages))


def without_a_check(self: Any, episodes: Episodes, /) -> Estimate:
    """Fails on a missing column with whatever error comes."""
    return Estimate(returns(0.9, episodes) - episodes.values, targets=returns(0.9, episodes))


def two_arguments(self: Any, episodes: Episodes, gamma: float, /) -> Estimate:
    """Another signature."""
    return Right(gamma)(episodes)


@final
@dataclass
class Thawed:
    """Can be changed after it was made."""

    gamma: float = 0.9
    """Discount."""
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VALUES})
    __call__ = Right.__call__


@final
@dataclass(frozen=True)
class Undocumented:
    """A field that nobody can look up."""

    gamma: float = 0.9
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VALUES})
    __call__ = Right.__call__


@final
@dataclass(frozen=True)
class Callback:
    """A field that no configuration file can hold."""

    discount: Any = lambda: 0.9
    """Discount, as a function."""
    gamma: ClassVar[float] = 0.9
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VALUES})
    __call__ = Right.__call__


def changed(method: Any) -> Any:
    return wrong(method.__name__, changed=method)


class Contract(OracleOfReturns, EstimatorContract):
    """Of the toy, for any instance."""


class GroupContract(OracleOfReturns, EstimatorContract):
    """The same, where the author says that it looks at groups."""

    scope = "group"


CAUGHT: list[tuple[Any, str, type[ComponentContract]]] = [
    (changed(shifted), "test_reaches_no_further_than_it_says", Contract),
    (changed(always_bootstrapped), "test_equals_its_oracle", Contract),
    (changed(leaking), "test_reaches_no_further_than_it_says", Contract),
    (changed(nan_in_groups_of_one), "test_survives_extreme_batches", GroupContract),
    (changed(exploding), "test_survives_extreme_batches", GroupContract),
    (changed(by_neighbours_in_the_batch), "test_order_of_episodes_does_not_matter", GroupContract),
    (changed(indexed_by_group), "test_group_numbers_are_only_names", GroupContract),
    (changed(in_place), "test_is_pure", Contract),
    (changed(remembering), "test_is_pure", Contract),
    (changed(in_float64), "test_float32_stays_float32", Contract),
    (changed(in_numpy), "test_equal_in_every_framework", Contract),
    (changed(one_per_episode), "test_has_one_number_per_action", Contract),
    (changed(keep_as_numbers), "test_has_one_number_per_action", Contract),
    (changed(mean_of_means), "test_has_one_number_per_action", Contract),
    (changed(undeclared), "test_needs_what_it_says_and_nothing_else", Contract),
    (changed(without_targets), "test_targets_are_there_where_values_are", Contract),
    (changed(by_position), "test_equal_answers_are_equally_good", GroupContract),
    (changed(whitened), "test_reaches_no_further_than_it_says", Contract),
    (wrong("without_a_check", __call__=without_a_check), "test_needs_what_it_says_and_nothing_else", Contract),
    (wrong("two_arguments", __call__=two_arguments), "test_has_the_members_of_its_protocol", Contract),
    (Right(), "test_reaches_as_far_as_it_says", GroupContract),
    (Thawed(), "test_is_a_final_frozen_dataclass", Contract),
    (Undocumented(), "test_every_field_is_typed_defaulted_and_documented", Contract),
    (Callback(), "test_survives_a_configuration_file", Contract),
    (Callback(), "test_can_be_sent_to_another_process", Contract),
    (Undocumented(), "test_is_found_by_its_name", Contract),
]


@pytest.mark.parametrize(("component", "test", "contract"), CAUGHT, ids=[f"{type(c).__name__}" for c, _, _ in CAUGHT])
def test_a_wrong_estimator_is_caught(component: Any, test: str, contract: type[ComponentContract]) -> None:
    assert dict(failures(contract, component, only=test)), f"{type(component).__name__} passes {test}"


# ---- corrections


@final
@dataclass(frozen=True)
class RightWeights:
    """min(pi_old / mu, bound) per action (truncated importance sampling); keeps the contract."""

    bound: float = 2.0
    """Largest weight."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.LOGPROBS, Need.BEHAVIOR_LOGPROBS})

    def __call__(self, episodes: Episodes, /) -> Corrected:
        for name in ("logprobs", "behavior_logprobs"):
            if getattr(episodes, name) is None:
                raise ValueError(f"Episodes.{name} is missing")
        xp = ops_of(episodes.logprobs).xp
        log_ratio = widen(episodes.logprobs) - widen(episodes.behavior_logprobs)
        weight = xp.clip(xp.exp(xp.clip(log_ratio, -50.0, 50.0)), 0.0, self.bound)
        return Corrected(weight, weight > 1e-6, Metrics(clipped=Metric(0.0)))


class OracleOfWeights:
    def oracle(self, component: Any, episodes: Episodes) -> Sequence[float]:
        return [min(float(np.exp(a - b)), 2.0) for a, b in zip(episodes.logprobs, episodes.behavior_logprobs)]


class TestRightWeights(OracleOfWeights, CorrectionContract):
    components = (RightWeights(),)
    plugins = (sys.modules[__name__],)


class WeightContract(OracleOfWeights, CorrectionContract):
    """Of the toy, for any instance."""


def wrong_weights(name: str, formula: Any) -> Any:
    """A correction whose weights are `formula(xp, policy, sampler)`."""
    def called(self: Any, episodes: Episodes, /) -> Corrected:
        for column in ("logprobs", "behavior_logprobs"):
            if getattr(episodes, column) is None:
                raise ValueError(f"Episodes.{column} is missing")
        xp = ops_of(episodes.logprobs).xp
        weight = formula(xp, widen(episodes.logprobs), widen(episodes.behavior_logprobs), episodes)
        return Corrected(weight, weight == weight, Metrics())
    members = {"__doc__": name, "__module__": __name__, "__call__": called, "needs": RightWeights().needs}
    return final(dataclass(frozen=True)(type(name, (), members)))()


WEIGHTS_CAUGHT: list[tuple[Any, str]] = [
    (wrong_weights("upside_down", lambda xp, pi, mu, e: xp.clip(xp.exp(mu - pi), 0.0, 2.0)), "test_equals_its_oracle"),
    (wrong_weights("overflowing", lambda xp, pi, mu, e: xp.exp(30 * (pi - mu))), "test_survives_extreme_batches"),
    (wrong_weights("half", lambda xp, pi, mu, e: 0.5 * xp.clip(xp.exp(pi - mu), 0.0, 2.0)),
     "test_does_nothing_on_policy"),
    (wrong_weights("first_order", lambda xp, pi, mu, e: xp.clip(1 + pi - mu, -9.0, 2.0)),
     "test_weights_are_not_negative"),
    (wrong_weights("normalised", lambda xp, pi, mu, e: xp.exp(pi - mu) / xp.mean(xp.exp(pi - mu))),
     "test_reaches_no_further_than_it_says"),
]
"""`half` and `first_order` stand for RL2 9 (weights by another ratio); `normalised` divides by the batch's mean."""


@pytest.mark.parametrize(("component", "test"), WEIGHTS_CAUGHT, ids=[type(c).__name__ for c, _ in WEIGHTS_CAUGHT])
def test_a_wrong_correction_is_caught(component: Any, test: str) -> None:
    assert dict(failures(WeightContract, component, only=test)), f"{type(component).__name__} passes {test}"


# ---- the kit itself


def test_a_contract_cannot_be_weakened_in_silence() -> None:
    with pytest.raises(TypeError, match="replaces a test of the contract"):
        type("Tried", (Contract,), {"test_is_pure": lambda self, component: None})
    with pytest.raises(TypeError, match="replaces a test of the contract"):
        type("Tried", (Contract,), {"test_is_pure": None})
    with pytest.raises(TypeError, match="no test of the contract"):
        type("Tried", (Contract,), {"waived": {"test_is_pur": "a reason"}})
    with pytest.raises(TypeError, match="no reason"):
        type("Tried", (Contract,), {"waived": {"test_is_pure": " "}})


def test_an_oracle_is_asked_for() -> None:
    (_, message), = failures(EstimatorContract, Right(), only="test_equals_its_oracle")
    assert "write one as plain loops" in message


WAIVED = """
from test_meta_estimators import Contract, Right, changed, remembering

class TestNeeded(Contract):
    components = (changed(remembering),)
    waived = {"test_is_pure": "it keeps a running baseline"}

class TestNotNeeded(Contract):
    components = (Right(),)
    waived = {"test_is_pure": "it does not need this"}
"""


def test_a_waived_test_must_fail(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    pytester.makepyfile(WAIVED)
    result = pytester.runpytest_inprocess("-k", "Needed and test_is_pure", "-p", "no:cacheprovider")
    result.assert_outcomes(xfailed=1, failed=1, deselected=result.parseoutcomes()["deselected"])


def test_a_contract_without_components_is_an_error(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        from posttrain.testing import EstimatorContract

        class TestEmpty(EstimatorContract):
            pass
        """)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*TestEmpty.components is empty: list the instances to be tested*"])
