"""Contract of KL control: the estimator per action, what its gradient is where it is placed, and the controller."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from importlib import import_module
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data import Array, to_numpy
from posttrain.ops import framework_of, ops_of
from posttrain.protocols import KL, Compared
from posttrain.testing.contract import EXAMPLES, ComponentContract, assert_close, named
from posttrain.testing.random_data import in_float64, installed_frameworks

EPISODES = 64
"""Episodes of a rollout that a controller is told of."""
UPDATES = 400


class KLContract(ComponentContract):
    """Contract of KL components (`posttrain.protocols.KL`).

    An author supplies `oracle`, and where the coefficient is no constant, `target` (a KL that it holds), `schedule` (it
    is known beforehand) or `driven` (by something else that is measured); `unbiased`, `non_negative` and `gradient` say
    what the estimator is, and are tested both ways. Each action is an episode of its own but where a test says more.
    """

    kind = "kl"
    protocol = KL
    unbiased: ClassVar[bool] = True
    """Whether the mean over actions drawn from the policy is KL(policy || reference)."""
    non_negative: ClassVar[bool] = False
    """Whether no single estimate is below 0."""
    gradient: ClassVar[Literal["reverse", "forward"]] = "reverse"
    """Whose expected gradient the estimator has where it is placed: that of KL(policy || reference), or, as GRPO's k3
    in the loss, that of KL(reference || policy)."""
    tolerance: ClassVar[float] = 1e-10
    """Relative and absolute, in float64."""

    def oracle(self, component: Any, logprob: float, ref_logprob: float) -> float:
        """The divergence of one action, written as plainly as possible."""
        pytest.fail(f"{type(self).__name__} has no oracle; write the estimate of one action: "
                    "def oracle(self, component, logprob, ref_logprob) -> float: ...", pytrace=False)

    def target(self, component: Any) -> float | None:
        """The KL per action that the controller holds; None where the KL does not move the coefficient."""
        return None

    def schedule(self, component: Any, k: int) -> float | None:
        """The coefficient after `k` rollouts, where that is known beforehand."""
        return None

    def driven(self, component: Any) -> tuple[Mapping[str, float], Mapping[str, float]] | None:
        """Other measurements after which the coefficient is higher, and after which it is lower, where such move it."""
        return None

    # ---- the estimator

    def test_equals_its_oracle(self, component: KL[Any]) -> None:
        """The estimate of each action, against the slow form that the author supplies."""
        @EXAMPLES
        @given(st.lists(st.tuples(st.floats(-8, 0), st.floats(-8, 0)), min_size=1, max_size=9))
        def holds(pairs: list[tuple[float, float]]) -> None:
            got = divergence(component, *(np.array(column) for column in zip(*pairs, strict=True)))
            expected = [self.oracle(component, *pair) for pair in pairs]
            assert got.shape == (len(pairs),), f"divergence of {len(pairs)} actions has shape {got.shape}"
            assert_close(got, expected, self.tolerance, "the divergence and its oracle differ")
        holds()

    def test_is_zero_where_policies_agree(self, component: KL[Any]) -> None:
        """The reference itself costs nothing."""
        same = np.array([-0.1, -3.0, -40.0])
        assert not divergence(component, same, same).any(), f"{named(component)} is not 0 at the reference"

    def test_is_what_it_claims(self, component: KL[Any]) -> None:
        """Unbiased, never negative: by summing over all actions of small distributions."""
        if component.placement == "none":
            return
        bias, lowest = 0.0, math.inf
        for logp, logq in distributions():
            k = divergence(component, logp, logq)
            bias = max(bias, abs(float(np.exp(logp) @ (k - (logp - logq)))))
            lowest = min(lowest, float(k.min()))
        unbiased, non_negative = bias < 1e-9, lowest >= 0.0
        assert unbiased == self.unbiased, \
            f"the mean over actions is off KL(policy || reference) by up to {bias:.3g}; the contract says " \
            f"unbiased = {self.unbiased}"
        assert non_negative == self.non_negative, \
            f"the lowest estimate is {lowest:.3g}; the contract says non_negative = {self.non_negative}"

    def test_survives_extreme_log_ratios(self, component: KL[Any]) -> None:
        """Log-ratios of ±100: finite in float32 and float64, with a gradient that pulls towards the reference.

        Where the policy likes an action that the reference does not, which is what drift looks like in samples, the
        gradient must not vanish: clamping both sides of a log-ratio lets go of the policy where it is furthest off.
        """
        logp, logq = np.array([-0.5, -100.5, -0.5]), np.array([-100.5, -0.5, -0.5])
        for framework in ("numpy", *installed_frameworks()):
            for dtype in (np.float64, np.float32):
                with np.errstate(over="ignore", under="ignore"):
                    k, slope = _differentiated(component, framework, logp.astype(dtype), logq.astype(dtype))
                where = f"at log-ratios of 100, -100 and 0 ({framework}, {np.dtype(dtype)})"
                assert k.dtype == dtype, f"divergence of {np.dtype(dtype)} is {k.dtype} in {framework}"
                assert np.isfinite(k).all() and np.isfinite(slope).all(), f"divergence {k}, gradient {slope} {where}"
                if component.placement == "loss" and framework != "numpy":
                    assert slope[0] > 0 and slope[1] <= 0, \
                        f"the gradient is {slope} {where}: it must be positive where the policy is above the " \
                        "reference, not positive below"

    def test_equal_in_every_framework(self, component: KL[Any]) -> None:
        """float64 in NumPy, torch and JAX; the result is an array of the framework that came in."""
        logp, logq = next(iter(distributions()))
        expected = divergence(component, logp, logq)
        if not installed_frameworks():
            pytest.skip("not measured: neither torch nor JAX is installed")
        for framework, make in installed_frameworks().items():
            with in_float64(framework):
                x = make(logp)
                found = component.divergence(ops_of(x), x, one_action_each(make, make(logq)))
                assert framework_of(found) == framework, f"in {framework} it is an array of {framework_of(found)}"
                assert_close(to_numpy(found), expected, 1e-12, f"divergence in {framework} and NumPy differ")

    def test_has_the_gradient_that_it_claims(self, component: KL[Any]) -> None:
        """What training with it does, summed over all actions of small distributions.

        In the loss, the estimate is differentiated; in the reward, it is a cost of the action. Either way the expected
        gradient must be the one that `gradient` names: an estimate may be right and push nowhere, or away.
        """
        if component.placement == "none":
            return
        frameworks = list(installed_frameworks())
        if component.placement == "loss" and not frameworks:
            pytest.skip("not measured: neither torch nor JAX is installed")
        for logp, logq in distributions():
            p, q = np.exp(logp), np.exp(logq)
            exact = p * (logp - logq - p @ (logp - logq)) if self.gradient == "reverse" else p - q
            for framework in frameworks if component.placement == "loss" else ["numpy"]:
                k, slope = _differentiated(component, framework, logp, logq)
                per_action = slope if component.placement == "loss" else k
                found = p * (per_action - p @ per_action)  # through log-softmax: d log p_a / d z_b = [a = b] - p_b
                assert_close(found, exact, 1e-9, f"in the {component.placement}, the expected gradient in the logits "
                                                  f"is not that of the {self.gradient} KL")

    def test_is_pure(self, component: KL[Any]) -> None:
        """It changes neither log-probs nor a state, and says the same when asked again."""
        logp, logq = next(iter(distributions()))
        before = logp.copy(), logq.copy()
        first, second = divergence(component, logp, logq), divergence(component, logp, logq)
        assert np.array_equal(first, second) and np.array_equal(logp, before[0]) and np.array_equal(logq, before[1]), \
            f"{named(component)}.divergence changes its inputs, or differs when asked again"
        state = component.init()
        saved = asdict(state)
        once = component.update(state, kl=0.3, n=EPISODES)
        for _ in range(3):
            component.update(component.init(), kl=9.0, n=EPISODES)
        assert asdict(state) == saved, f"{named(component)}.update changes the state it is given: return a new one"
        assert component.update(state, kl=0.3, n=EPISODES) == once, \
            f"{named(component)}.update remembers earlier calls: everything it knows belongs into the state"

    def test_unit_is_what_it_needs_whole(self, component: KL[Any]) -> None:
        """Two episodes of several actions, at once and apart, and with unit action, however actions are numbered."""
        logp, logq = (np.concatenate([pair[i] for pair in distributions()[:2]]) for i in (0, 1))
        def of(logp: np.ndarray, logq: np.ndarray, *lengths: int) -> np.ndarray:
            compared = Compared(logq, np.repeat(np.arange(len(lengths)), lengths), np.array(lengths))
            return np.asarray(component.divergence(ops_of(logp), logp, compared))
        whole = of(logp, logq, 5, 5)
        apart = np.concatenate([of(logp[:5], logq[:5], 5), of(logp[5:], logq[5:], 5)])
        assert_close(whole, apart, 1e-12, "two episodes at once and one after the other differ")
        if component.unit == "action":
            assert_close(of(logp, logq, *[1] * 10), whole, 1e-12,
                         f"{named(component)} says unit action, and its estimates change with the episode")

    def test_no_old_logprobs_mean_the_policy_itself(self, component: KL[Any]) -> None:
        """With one optimiser step per rollout they are not there: value and gradient as if the policy's were given."""
        logp, logq = next(iter(distributions()))
        for framework in ("numpy", *installed_frameworks()):
            absent = _differentiated(component, framework, logp, logq)
            given = _differentiated(component, framework, logp, logq, logp)
            assert_close(given, absent, 1e-12, f"old_logprobs absent or equal to the policy's differ in {framework}")

    # ---- the controller

    def test_begins_with_a_usable_coefficient(self, component: KL[Any]) -> None:
        """Finite, not negative, and 0 exactly where no KL is used."""
        state = component.init()
        assert component.placement in ("none", "loss", "reward", "advantage", "constraint"), \
            f"placement is {component.placement!r}"
        assert math.isfinite(state.coef) and state.coef >= 0, f"the first coefficient is {state.coef}"
        if component.placement == "none":
            assert state.coef == 0 and not divergence(component, np.zeros(2), -np.ones(2)).any(), \
                "placement none adds nothing: a coefficient of 0, and a divergence of 0"

    def test_moves_the_coefficient_the_right_way(self, component: KL[Any]) -> None:
        """Above the target the KL must cost more, below it less; where there is none the KL moves nothing."""
        state, target = component.init(), self.target(component)
        if target is None:
            still = state.coef if (later := self.schedule(component, 1)) is None else later
            for kl in (0.0, 0.01, 1.0, 1e6):
                assert math.isclose(component.update(state, kl=kl, n=EPISODES).coef, still), \
                    f"the coefficient moves at a KL of {kl}: say which it holds: def target(self, component)"
            return
        above, at, below = (component.update(state, kl=kl, n=EPISODES).coef for kl in
                            (2 * target, target, 0.5 * target))
        assert below < state.coef < above, \
            f"from {state.coef}: {above} after a KL above the target, which must rise, {below} after one below"
        assert math.isclose(at, state.coef), f"at its target the coefficient moves from {state.coef} to {at}"
        assert component.update(state, kl=1.5 * target, n=EPISODES).coef <= above, "more excess must not move it less"

    def test_follows_its_schedule(self, component: KL[Any]) -> None:
        """The coefficient after each of hundreds of rollouts, where the author says it is known."""
        if self.schedule(component, 0) is None:
            return
        state = component.init()
        for k in range(UPDATES):
            expected = self.schedule(component, k)
            assert expected is not None and math.isclose(state.coef, expected, rel_tol=1e-12, abs_tol=1e-15), \
                f"after {k} rollouts the coefficient is {state.coef}, and its schedule {expected}"
            state = component.update(state, kl=0.05, n=EPISODES)

    def test_is_driven_by_what_its_author_names(self, component: KL[Any]) -> None:
        """Other measurements move the coefficient, to a bound and back; without them it holds."""
        if (driven := self.driven(component)) is None:
            return
        state = component.update(component.init(), kl=0.05, n=EPISODES)
        assert state == component.init(), f"without its measurement the state goes from {component.init()} to {state}"
        for measured in driven * 2:
            before = state
            for _ in range(UPDATES):
                state = component.update(state, kl=0.05, n=EPISODES, **measured)
                assert math.isfinite(state.coef) and state.coef >= 0, f"{measured} leads to {state.coef}"
            assert (state.coef > before.coef) == (measured is driven[0]) and state.coef != before.coef, \
                f"{UPDATES} rollouts with {measured} take the coefficient from {before.coef} to {state.coef}"

    def test_stays_bounded(self, component: KL[Any]) -> None:
        """Hundreds of rollouts with a KL of 0, of 1e30, or negative as estimates are: finite, not negative, and it
        comes back."""
        for kl in (0.0, 1e30, -1.0):
            state = component.init()
            for _ in range(UPDATES):
                state = component.update(state, kl=kl, n=EPISODES)
                assert math.isfinite(state.coef) and state.coef >= 0, f"a KL of {kl:g} leads to {state.coef}"
            if (target := self.target(component)) is not None:
                back = 2 * target if kl <= 0 else 0.5 * target
                for _ in range(UPDATES):
                    returned = component.update(state, kl=back, n=EPISODES)
                    if returned.coef != state.coef:
                        break
                assert (returned.coef > state.coef) == (kl <= 0) and returned.coef != state.coef, \
                    f"after {UPDATES} rollouts with a KL of {kl:g} the coefficient {state.coef} does not move again"

    def test_refuses_what_was_not_measured(self, component: KL[Any]) -> None:
        """A KL that is NaN or infinite leaves the state as it is, or is a `ValueError`: one bad rollout must not
        spoil the coefficient for the rest of the run."""
        state = component.update(component.init(), kl=0.05, n=EPISODES)
        for kl in (math.nan, math.inf, -math.inf):
            try:
                after = component.update(state, kl=kl, n=EPISODES)
            except ValueError:
                continue
            assert after == state, f"a KL of {kl} turns {state} into {after}"

    def test_state_survives_a_checkpoint(self, component: KL[Any]) -> None:
        """Saved as JSON and read again, the run goes on as if it had not stopped (verl/issues/2653)."""
        state: Any = component.init()
        made: Any = type(state)
        assert is_dataclass(state), f"{made.__name__} must be a dataclass of numbers"
        assert made.__dataclass_params__.frozen, f"{made.__name__} must be frozen: @dataclass(frozen=True)"
        for step in range(5):
            state = component.update(state, kl=0.01 * 3**step, n=EPISODES + step)
        try:
            stored = json.loads(json.dumps(asdict(state), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise AssertionError(f"{state} cannot be written as JSON: {error}") from error
        again = type(component.init())(**stored)
        assert again == state, f"{state} became {again} in a checkpoint"
        for kl in (0.4, 0.001):
            state, again = (component.update(s, kl=kl, n=EPISODES) for s in (state, again))
            assert again == state, f"after a checkpoint the controller goes on with {again}, without one with {state}"

    def test_accepts_what_else_is_measured(self, component: KL[Any]) -> None:
        """The loop tells what it knows; a controller takes what it uses."""
        state = component.init()
        try:
            component.update(state, kl=0.1, n=EPISODES, entropy=1.0, something_later=2.0)
        except TypeError as error:
            raise AssertionError(f"{named(component)}.update must take **measured, whatever else is known: {error}"
                                 ) from error


def divergence(component: KL[Any], logprobs: np.ndarray, ref_logprobs: np.ndarray) -> np.ndarray:
    """[N] in NumPy."""
    return np.asarray(component.divergence(ops_of(logprobs), logprobs, one_action_each(np.asarray, ref_logprobs)))


def one_action_each(make: Callable[[np.ndarray], Array], ref_logprobs: Array, old: Array | None = None) -> Compared:
    """What a KL compares with, every action an episode of its own."""
    N = ref_logprobs.shape[0]
    return Compared(ref_logprobs, make(np.arange(N)), make(np.ones(N, int)), old)


def distributions() -> Sequence[tuple[np.ndarray, np.ndarray]]:
    """Log-probs [5] of policies and references over five actions."""
    def normalised(z: np.ndarray) -> np.ndarray:
        logp: np.ndarray = z - np.log(np.exp(z).sum())
        return logp
    rng = np.random.default_rng(0)
    return [(normalised(rng.normal(size=5)), normalised(rng.normal(size=5))) for _ in range(4)]


def _differentiated(component: KL[Any], framework: str, logp: np.ndarray, logq: np.ndarray,
                    old: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Divergence [N] and its derivative [N] in each log-prob; zeros where the framework does not differentiate."""
    makers: Mapping[str, Callable[[np.ndarray], Array]] = {"numpy": np.asarray, **installed_frameworks()}
    make = makers[framework]
    with in_float64(framework):
        compared = one_action_each(make, make(logq), None if old is None else make(old))
        if framework == "numpy":
            return np.asarray(component.divergence(ops_of(logp), logp, compared)), np.zeros(len(logp))
        return _DERIVATIVE[framework](lambda x: component.divergence(ops_of(x), x, compared), make(logp))


def _torch_derivative(f: Callable[[Array], Array], x: Array) -> tuple[np.ndarray, np.ndarray]:
    torch = import_module("torch")
    k = f(x.requires_grad_())
    slope = torch.autograd.grad(k.sum(), x)[0] if k.requires_grad else torch.zeros_like(x)
    return to_numpy(k), to_numpy(slope)


def _jax_derivative(f: Callable[[Array], Array], x: Array) -> tuple[np.ndarray, np.ndarray]:
    jax = import_module("jax")
    k, pull = jax.vjp(f, x)
    return np.asarray(k), np.asarray(pull(jax.numpy.ones_like(k))[0])


_DERIVATIVE: Mapping[str, Callable[[Callable[[Array], Array], Array], tuple[np.ndarray, np.ndarray]]] = {
    "torch": _torch_derivative, "jax": _jax_derivative}
