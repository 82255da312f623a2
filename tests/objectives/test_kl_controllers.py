"""Controllers of the KL coefficient: the published rules, bounds, hold rules, and closed loops on known plants."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from posttrain_objectives.kl import MAX_LOG_ERROR, PIDKL, AdaptiveKL, BandKL, DualKL, EntropyKL, FixedKL, KLState
from scipy.optimize import brentq

N = 64
"""Episodes of a rollout."""
UPDATES = 6000
CLOSED = {"adaptive": AdaptiveKL(), "pi": PIDKL(kd=0.0), "pid": PIDKL(), "dual": DualKL()}
"""With their default gains."""
EVERY = {**CLOSED, "band": BandKL()}
SLOPES = (0.3, 0.5, 0.8, 1.25, 2.0, 3.0)
ROOTS = (1e-6, 1e-4, 1e-2, 0.5, 20.0, 100.0)
PAGE = Path(__file__).parents[2] / "docs" / "kl.md"
Plant = Callable[[float], float]


def started(kl: Any, coef: float) -> Any:
    """The first state, at another coefficient."""
    state = kl.init()
    return type(state)(**{**asdict(state), "coef": coef})


def closed_loop(kl: Any, plant: Plant, start: float, n: int = N, updates: int = UPDATES,
                noise: np.ndarray | None = None) -> list[float]:
    """Coefficients, the first one included; without noise a state that has come to rest stays."""
    state = started(kl, start)
    found = [state.coef]
    for k in range(updates):
        after = kl.update(state, kl=plant(state.coef) * (1.0 if noise is None else noise[k]), n=n)
        found.append(after.coef)
        if after == state and noise is None:
            return found + [after.coef] * (updates - k - 1)
        state = after
    return found


def power(kl: Any, slope: float, root: float) -> Plant:
    """KL = target (coef / root)^-slope."""
    return lambda coef: kl.target * (coef / root) ** -slope


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("slope", SLOPES)
def test_default_gains_reach_the_target_of_every_log_log_plant(name: str, slope: float) -> None:
    kl = CLOSED[name]
    for root in ROOTS:
        for start in (kl.coef_min, kl.coef_max):
            plant = power(kl, slope, root)
            last = closed_loop(kl, plant, start)[-100:]
            assert all(abs(plant(coef) / kl.target - 1) < 0.05 for coef in last), (root, start, last[-1])


@pytest.mark.parametrize("slope", SLOPES)
def test_the_band_is_reached_and_not_left(slope: float) -> None:
    kl = BandKL()
    for root in ROOTS:
        for start in (kl.coef_min, kl.coef_max):
            plant = power(kl, slope, root)
            found = closed_loop(kl, plant, start)
            assert len(set(found[-100:])) == 1, "it comes to rest"
            assert 1 / kl.band <= plant(found[-1]) / kl.target <= kl.band


def test_a_factor_too_large_for_the_band_jumps_over_it_for_ever() -> None:
    """As the paper's doubling does where KL ~ coef^-2 (factor^2 > band^2), which is why the default is smaller."""
    kl = BandKL(target=0.1, factor=2.0)
    last = closed_loop(kl, power(kl, 2.0, 1.4), 1.0)[-4:]
    assert last[0] == last[2] != last[1] == last[3]
    settled = BandKL(target=0.1, factor=1.5)
    assert len(set(closed_loop(settled, power(settled, 2.0, 1.4), 1.0)[20:])) == 1


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("slope", [0.3, 1.0, 3.0])
def test_under_noise_the_mean_kl_is_held(name: str, slope: float) -> None:
    """Each measurement is off by a factor of standard deviation 0.2 and mean 1, normal or log-normal."""
    kl = EVERY[name]
    rng = np.random.default_rng(5)
    normal = np.maximum(1.0 + 0.2 * rng.normal(size=UPDATES), 0.0)
    sigma = math.sqrt(math.log(1.04))
    log_normal = np.exp(sigma * rng.normal(size=UPDATES) - sigma**2 / 2)
    for noise in (normal, log_normal):
        for root, start in ((1e-4, kl.coef_max), (20.0, kl.coef_min)):
            plant = power(kl, slope, root)
            mean = np.mean([plant(coef) for coef in closed_loop(kl, plant, start, noise=noise)[-3000:]]) / kl.target
            allowed = 0.05 if name != "band" else kl.band - 1
            assert abs(mean - 1) < allowed, (root, mean)


@pytest.mark.parametrize("n", [8, 512, 100_000])
@pytest.mark.parametrize("slope", [0.3, 3.0])
def test_the_adaptive_one_is_stable_whatever_the_number_of_episodes(n: int, slope: float) -> None:
    kl = AdaptiveKL()
    plant = power(kl, slope, 0.2)
    for start in (1e-3, 5.0):
        last = closed_loop(kl, plant, start, n, UPDATES if n >= 64 else 40_000)[-100:]
        assert all(abs(plant(coef) / kl.target - 1) < 0.05 for coef in last)


@pytest.mark.parametrize("name", CLOSED)
def test_small_runs_are_controlled_within_a_few_hundred_steps(name: str) -> None:
    kl = CLOSED[name]
    plant = lambda coef: 0.02 / coef
    assert plant(closed_loop(kl, plant, kl.coef, updates=300)[-1]) == pytest.approx(kl.target, rel=0.05)


def speeds_of_the_page() -> dict[str, list[str]]:
    """Numbers of each controller in the table that says how fast they are; a row may be of two."""
    _, _, below = PAGE.read_text().partition("| rollouts from a tenth or ten times the right weight, ")
    rows = [line.split("|")[1:-1] for line in below.partition("\n\n")[0].splitlines()[2:]]
    return {name: re.findall(r"\d+", " ".join(said)) for first, *said in rows for name in re.findall(r"`(\w+)`", first)}


def settled_after(kl: Any, start: float) -> int:
    """Rollouts until the KL stays within 5 % of its target, or within the band, where KL ~ 1 / weight; `start` is the
    first weight over the right one."""
    plant = power(kl, 1.0, kl.coef)
    least, most = (1 / kl.band, kl.band) if isinstance(kl, BandKL) else (0.95, 1.05)
    ratios = [plant(coef) / kl.target for coef in closed_loop(kl, plant, start * kl.coef, updates=500)]
    return 1 + max(k for k, ratio in enumerate(ratios) if not least <= ratio <= most)


def test_the_page_says_how_fast_every_controller_is() -> None:
    assert list(speeds_of_the_page()) == list(EVERY)


@pytest.mark.parametrize("name", EVERY)
def test_the_page_has_the_numbers_of_its_table(name: str) -> None:
    """How long it takes from the slower side, and how much of the weight, in %, 20 rollouts with a KL of 0 leave."""
    kl = EVERY[name]
    last = closed_loop(kl, lambda coef: 0.0, kl.coef, updates=20)[-1]
    rollouts, left = max(settled_after(kl, start) for start in (0.1, 10.0)), round(100 * last / kl.coef)
    assert speeds_of_the_page()[name] == [str(rollouts), str(left)]


def bandit(seed: int) -> Plant:
    """argmax E[r] - beta KL(p || q) is p ~ q e^(r / beta): its KL as a function of beta."""
    rng = np.random.default_rng(seed)
    q, r = rng.dirichlet(np.ones(6)), rng.normal(size=6)
    def plant(beta: float) -> float:
        logits = np.log(q) + (r - r.max()) / beta
        logp = logits - logits.max()
        logp -= np.log(np.exp(logp).sum())
        return float(np.exp(logp) @ (logp - np.log(q)))
    return plant


@pytest.mark.parametrize("name", EVERY)
def test_finds_the_dual_optimum_of_the_closed_form_bandit(name: str) -> None:
    kl = type(EVERY[name])(target=0.1, **({"kd": 0.0} if name == "pi" else {}))
    plant = bandit(1)
    root = brentq(lambda beta: plant(beta) - 0.1, 1e-2, 1e2)
    for start in (0.05, 20.0):
        last = closed_loop(kl, plant, start, updates=3000)[-1]
        if name == "band":
            assert 0.1 / 1.5 <= plant(last) <= 0.15
        else:
            assert last == pytest.approx(root, rel=1e-6)


def test_a_constraint_that_does_not_bind_costs_next_to_nothing() -> None:
    kl = DualKL(target=0.1)
    assert closed_loop(kl, lambda coef: 0.02, 1.0)[-1] == kl.coef_min


def test_the_adaptive_rule_is_the_published_one() -> None:
    """Ziegler et al. 2019, section 2.2, written out."""
    rng = np.random.default_rng(0)
    controller = AdaptiveKL(target=0.05, horizon=10_000.0)
    beta, state = controller.coef, controller.init()
    for kl in rng.exponential(0.05, size=200):
        n = int(rng.integers(1, 2000))
        error = kl / 0.05 - 1
        error = -0.2 if error < -0.2 else 0.2 if error > 0.2 else error
        beta = beta * (1 + error * n / 10_000)
        state = controller.update(state, kl=float(kl), n=n)
        assert state.coef == pytest.approx(beta, rel=1e-12)


def test_the_velocity_form_is_the_position_form() -> None:
    """log beta = log beta_0 + kp e + ki (e_1 + ... + e_k) + kd (e_k - e_k-1), while nothing is clamped."""
    rng = np.random.default_rng(2)
    controller = PIDKL(coef_min=1e-30, coef_max=1e30)
    state, errors = controller.init(), [0.0]
    for kl in rng.exponential(0.05, size=200):
        errors.append(min(max(math.log(kl / 0.05), -MAX_LOG_ERROR), MAX_LOG_ERROR))
        state = controller.update(state, kl=float(kl), n=N)
        u = math.log(0.05) + 0.1 * errors[-1] + 0.1 * sum(errors) + 0.02 * (errors[-1] - errors[-2])
        assert math.log(state.coef) == pytest.approx(u, abs=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_bounds_hold_and_are_left_as_soon_as_the_kl_asks_for_it(name: str) -> None:
    """A controller that sums up its error while it is clamped would stay for as long again."""
    kl = type(EVERY[name])(target=0.1, coef=0.1, coef_min=0.05, coef_max=0.2)
    state = kl.init()
    for measured, bound in ((0.0, 0.05), (9.0, 0.2), (0.0, 0.05), (9.0, 0.2)):
        for k in range(300):
            before, state = state, kl.update(state, kl=measured, n=500)
            assert k > 0 or state.coef != before.coef, "the first measurement on the other side moves it"
        assert state.coef == bound


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("kl, n", [(math.nan, 64), (math.inf, 64), (-math.inf, 64), (0.3, 0), (math.nan, 0)])
def test_holds_without_a_usable_measurement(name: str, kl: float, n: int) -> None:
    state = EVERY[name].update(EVERY[name].init(), kl=0.3, n=64)
    assert EVERY[name].update(state, kl=kl, n=n) is state


@pytest.mark.parametrize("name", EVERY)
def test_a_negative_kl_counts_as_zero(name: str) -> None:
    kl = EVERY[name]
    assert kl.update(kl.init(), kl=-5.0, n=N) == kl.update(kl.init(), kl=0.0, n=N)
    assert kl.update(kl.init(), kl=-5.0, n=N).coef < kl.coef


@pytest.mark.parametrize("name, most", [("adaptive", 1.1), ("pi", math.exp(0.2)), ("pid", math.exp(0.22)),
                                        ("dual", math.exp(0.1)), ("band", 1.25)])
def test_one_measurement_moves_the_coefficient_by_so_much_at_most(name: str, most: float) -> None:
    kl = EVERY[name]
    assert kl.update(kl.init(), kl=1e300, n=10**9).coef == pytest.approx(most * kl.coef)
    assert kl.update(kl.init(), kl=0.0, n=10**9).coef >= kl.coef / most * (1 - 1e-2)


def test_the_entropy_rule_switches_on_and_off_and_remembers_its_level() -> None:
    """H below the target, above, below again: level by delta each time, coefficient 0 while H is above."""
    kl = EntropyKL(target_entropy=0.3, delta=0.01, coef_max=0.03)
    state, seen = kl.init(), []
    for entropy in (0.2, 0.2, 0.2, 0.2, 0.4, 0.4, 0.3, 0.29, 0.5, 0.5, 0.5, 0.1):
        state = kl.update(state, kl=0.7, n=N, entropy=entropy)
        seen.append((round(state.level, 9), round(state.coef, 9)))
    assert seen == [(0.01, 0.01), (0.02, 0.02), (0.03, 0.03), (0.03, 0.03), (0.02, 0.0), (0.01, 0.0), (0.01, 0.01),
                    (0.02, 0.02), (0.01, 0.0), (0.0, 0.0), (0.0, 0.0), (0.01, 0.01)]


@pytest.mark.parametrize("measured", [{}, {"entropy": math.nan}, {"entropy": math.inf}])
def test_the_entropy_rule_holds_without_an_entropy(measured: dict[str, float]) -> None:
    kl = EntropyKL()
    state = kl.update(kl.init(), kl=0.1, n=N, entropy=0.1)
    assert kl.update(state, kl=0.1, n=N, **measured) is state
    assert kl.update(state, kl=0.1, n=0, entropy=0.1) is state


def test_further_measurements_change_nothing_and_fixed_stays() -> None:
    fixed = FixedKL(coef=0.04)
    assert fixed.update(fixed.init(), kl=9.0, n=64, entropy=1.0) == KLState(0.04)
    for kl in EVERY.values():
        assert kl.update(kl.init(), kl=0.1, n=64, entropy=1.0) == kl.update(kl.init(), kl=0.1, n=64)


@pytest.mark.parametrize("kl", [*EVERY.values(), EntropyKL()], ids=[*EVERY, "entropy"])
def test_state_survives_json_bit_for_bit(kl: Any) -> None:
    state = kl.init()
    for measured in (0.0731, 0.0011, 0.4):
        state = kl.update(state, kl=measured, n=37, entropy=measured)
    assert type(state)(**json.loads(json.dumps(asdict(state)))) == state


@pytest.mark.parametrize("component, fields, message", [
    (AdaptiveKL, {"target": 0.0}, "target"), (AdaptiveKL, {"target": math.nan}, "target"),
    (AdaptiveKL, {"horizon": 0.0}, "horizon"),
    (FixedKL, {"coef": -0.1}, "kl: none"), (FixedKL, {"coef": math.nan}, "coef"),
    (PIDKL, {"kp": -0.1}, "kp must be finite and not negative"), (PIDKL, {"kd": math.inf}, "kd"),
    (PIDKL, {"ki": 0.0}, "ki must be finite and positive"), (DualKL, {"ki": -1.0}, "ki"),
    (DualKL, {"target": -1.0}, "target"),
    (BandKL, {"band": 1.0}, "band must be finite and above 1"), (BandKL, {"factor": 0.5}, "factor"),
    (BandKL, {"target": 0.0}, "target"), (EntropyKL, {"delta": 0.0}, "delta"),
    (EntropyKL, {"target_entropy": 0.0}, "target_entropy"), (EntropyKL, {"coef": 2.0}, "coef must lie"),
    (EntropyKL, {"coef_min": -1.0}, "not negative"),
    *((component, fields, message) for component in (AdaptiveKL, PIDKL, BandKL, DualKL) for fields, message in (
        ({"coef_min": 0.0}, "coef_min positive"), ({"coef": 0.01, "coef_min": 0.02}, "coef must lie"),
        ({"coef": 200.0}, "coef must lie"), ({"coef_max": math.inf}, "coef_max finite"))),
])
def test_fields_without_meaning_are_refused(component: type, fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        component(**fields)
