"""The planner `adaptive`: how large micro-batches become under memory, failures and speed, in steps that stay exact."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from core.test_update import Adder, TokenMean
from posttrain.comm import SingleProcess
from posttrain.data import Metrics, MicroBatch
from posttrain.errors import MemoryExhausted
from posttrain.loss import Sum
from posttrain.passes import Passes
from posttrain.protocols import Adapting, Memory, Pass, Usage
from posttrain.testing import BatchingContract
from posttrain.update import Trained, optimiser_step
from posttrain_tuning.batching import Adaptive, Budgets
from ragged import rollouts

MiB = 2**20


class TestAdaptive(BatchingContract):
    components = (Adaptive(), Adaptive(tokens=1), Adaptive(tokens=64, knee=0.0, largest=100))


@dataclass
class Device:
    """A device whose passes take `fixed + each * tokens` bytes above what is `used`, and time by its pace."""

    limit: int
    each: int = MiB
    fixed: int = 0
    used: int = 100 * MiB
    tells: bool = True
    """Whether it says how much memory there is and was taken."""
    pace: Callable[[int], float] = lambda tokens: float(tokens)
    """Tokens per second."""
    taken: list[int] = field(default_factory=list)
    """Tokens of the passes that fitted."""
    failures: int = 0
    now: float = 0.0
    _peak: int = 0

    def memory(self) -> Memory:
        return self

    def start(self) -> Usage:
        self._peak = self.used
        return Usage(self.used, self.limit, self.used) if self.tells else Usage()

    def peak(self, since: Usage) -> int:
        return self._peak if self.tells else 0

    def clock(self) -> float:
        return self.now

    @property
    def most(self) -> int:
        """Tokens that fit."""
        return (self.limit - self.used - self.fixed) // self.each

    def run(self, tokens: int) -> None:
        if not tokens:
            return
        if tokens > self.most:
            self.failures += 1
            raise MemoryExhausted("too many tokens")
        self._peak = self.used + self.fixed + self.each * tokens
        self.now += tokens / self.pace(tokens)
        self.taken.append(tokens)


def steps(component: Adaptive, device: Device, n: int, *, state: Any = None, costs: np.ndarray | None = None) -> Any:
    """What is known after n steps over units of these costs."""
    costs = np.full(4000, 1) if costs is None else costs
    state = component.init() if state is None else state
    for _ in range(n):
        passes = Passes(component, state, "update", device, clock=device.clock)
        while True:
            for part in passes.parts(costs, np.arange(len(costs))):
                with passes.measured(int(costs[part].sum())):
                    device.run(int(costs[part].sum()))
            if not passes.failed:
                break
            passes.shrink(costs)
        state = passes.budget
    return state


MEMORY = Adaptive(tokens=16, knee=0.0)
"""Grows as far as memory goes."""


@pytest.mark.parametrize("most", [90, 333, 1000, 2777])
@pytest.mark.parametrize("fixed", [0, 50 * MiB])
def test_memory_is_used_and_never_runs_out(most: int, fixed: int) -> None:
    device = Device(limit=100 * MiB + fixed + most * MiB, fixed=fixed)
    state = steps(MEMORY, device, 2)
    assert device.failures == 0
    assert 0.95 * most <= MEMORY.budget(state, "update") <= most


def test_every_unit_of_a_step_is_computed_once_however_budgets_change() -> None:
    device = Device(limit=800 * MiB)
    component = MEMORY
    passes = Passes(component, component.init(), "update", device, clock=device.clock)
    costs = np.random.default_rng(0).integers(1, 30, 500)
    units = np.concatenate([part for part in passes.parts(costs, np.arange(500)) if _run(passes, device, costs[part])])
    assert sorted(units.tolist()) == list(range(500))
    assert passes.count == len(device.taken) > 5


def _run(passes: Passes, device: Device, costs: np.ndarray) -> bool:
    with passes.measured(int(costs.sum())):
        device.run(int(costs.sum()))
    return True


@pytest.mark.parametrize("most", [50, 500, 1500])
def test_a_device_that_says_nothing_is_found_out_by_failures(most: int) -> None:
    """Doubling meets the limit; from then on little is risked, and less each time."""
    device = Device(limit=100 * MiB + most * MiB, tells=False)
    state = steps(MEMORY, device, 2)
    assert device.failures <= 2
    assert 0.5 * most <= MEMORY.budget(state, "update") <= most
    steps(MEMORY, device, 200, state=state)
    assert device.failures <= 8


def test_follows_a_limit_that_moves() -> None:
    device = Device(limit=1100 * MiB)
    state = steps(MEMORY, device, 2)
    for most in (400, 1000, 1900, 100):
        before = device.failures
        device.limit = (100 + most) * MiB
        state = steps(MEMORY, device, 3, state=state)
        assert device.failures == before, "the limit is looked at before the parts are planned"
        assert 0.95 * most <= MEMORY.budget(state, "update") <= most


def test_shrinks_in_the_middle_of_a_step_where_the_limit_moved_unseen() -> None:
    """Another process took memory after the plan was made: one failure, and the step is done again."""
    device = Device(limit=1100 * MiB)
    state = steps(MEMORY, device, 2)
    passes = Passes(MEMORY, state, "update", device, clock=device.clock)
    costs = np.ones(4000, int)
    for i, part in enumerate(passes.parts(costs, np.arange(4000))):
        device.limit = (1100 if i < 2 else 500) * MiB
        with passes.measured(len(part)):
            device.run(len(part))
    assert passes.failed and device.failures == 1
    passes.shrink(costs)
    assert 0.95 * 400 <= MEMORY.budget(passes.budget, "update") <= 400


def test_makes_room_for_the_upper_end_of_what_tokens_take() -> None:
    """Every tenth part takes a third more than the others."""
    rng = np.random.default_rng(0)
    device = Device(limit=1100 * MiB)
    state = steps(MEMORY, device, 2)
    for _ in range(100):
        tokens = MEMORY.budget(state, "update")
        taken = int(tokens * MiB * (4 / 3 if rng.random() < 0.1 else 1))
        start = Usage(device.used, device.limit, device.used)
        state = MEMORY.observed(state, "update", Pass(tokens, 1.0, start, device.used + taken))
    assert 0.9 * 750 <= MEMORY.budget(state, "update") <= 750


@pytest.mark.parametrize(("knee", "largest"), [(64, 128), (512, 1024)])
def test_stops_growing_where_a_doubling_no_longer_pays(knee: int, largest: int) -> None:
    device = Device(limit=10**6 * MiB, pace=lambda tokens: float(min(tokens, knee)))
    component = Adaptive(tokens=16)
    state = steps(component, device, 4)
    assert component.budget(state, "update") == largest
    assert component.budget(steps(component, device, 4, state=state), "update") == largest


def test_a_clock_that_is_disturbed_does_not_move_a_budget_at_rest() -> None:
    rng = np.random.default_rng(0)
    device = Device(limit=10**6 * MiB, pace=lambda tokens: min(tokens, 256) * (1 - 0.5 * rng.random()))
    component = Adaptive(tokens=16)
    state = steps(component, device, 6)
    rest = component.budget(state, "update")
    assert component.budget(steps(component, device, 20, state=state), "update") == rest


def test_each_use_has_a_budget_of_its_own() -> None:
    component, start = MEMORY, Usage(0, 1000 * MiB, 0)
    state = component.observed(component.init(), "update", Pass(16, 1.0, start, 160 * MiB))
    assert component.budget(state, "update") == 32 and component.budget(state, "score/policy") == 16


def test_what_a_token_takes_at_least_predicts_the_first_budget() -> None:
    """Only the first: what was seen is known better."""
    component, memory = Adaptive(), Usage(100 * MiB, 1124 * MiB, 100 * MiB)
    state = component.prepared(component.init(), "rollout", memory, token_bytes=MiB)
    assert component.budget(state, "rollout") == 512
    state = component.observed(state, "rollout", Pass(512, 1.0, memory, 1100 * MiB))
    state = component.prepared(state, "rollout", memory, token_bytes=MiB)
    assert 500 <= component.budget(state, "rollout") <= 513


def test_a_resumed_run_goes_on_with_the_same_plan() -> None:
    def device() -> Device:
        return Device(limit=900 * MiB, pace=lambda tokens: tokens ** 0.5)
    component, whole, first, second = Adaptive(tokens=16), device(), device(), device()
    expected = steps(component, whole, 6)
    state = steps(component, first, 3)
    stored = json.loads(json.dumps(asdict(state)))
    assert steps(component, second, 3, state=Budgets(**stored)) == expected
    assert first.taken + second.taken == whole.taken


# ---- in an optimiser step


@dataclass
class Metered(Adder):
    """A learner on a device; its gradient is `sum(weight * advantage)`."""

    device: Device = field(default_factory=lambda: Device(limit=10**9 * MiB))

    def memory(self) -> Memory:
        return self.device

    def accumulate(self, batch: MicroBatch, objective: Sum, coef: Mapping[str, float]) -> Metrics:
        self.device.run(len(batch.tokens))
        return super().accumulate(batch, objective, coef)


def test_the_gradient_is_that_of_one_part_and_the_budget_is_returned() -> None:
    r = rollouts([(2, 3)] * 400)
    N = int(r.is_action.sum())
    for tells in (True, False):
        learner = Metered(device=Device(limit=300 * MiB, tells=tells))
        assert isinstance(MEMORY, Adapting)
        metrics, state, _ = optimiser_step(
            [Trained(learner, Sum((TokenMean(),)))], r, np.ones(N, bool), np.ones(N),
            {"advantages": np.arange(1.0, N + 1)}, {}, batching=MEMORY, budget=MEMORY.init(), comm=SingleProcess())
        assert learner.applied == [(pytest.approx((N + 1) / 2), None)]
        assert metrics["batch/memory_retries"].value == learner.device.failures == (not tells)
        assert 100 <= MEMORY.budget(state, "update") <= 200


def test_a_unit_that_does_not_fit_ends_with_advice() -> None:
    r = rollouts([(2, 3), (1, 2)])
    learner = Metered(device=Device(limit=104 * MiB))
    with pytest.raises(MemoryExhausted, match="gradient_checkpointing"):
        optimiser_step([Trained(learner, Sum((TokenMean(),)))], r, np.ones(5, bool), np.ones(5),
                       {"advantages": np.ones(5)}, {}, batching=MEMORY, budget=MEMORY.init(), comm=SingleProcess())
    assert learner.applied == []


@dataclass(frozen=True)
class Ranks:
    """Two ranks in one process, in threads; every method waits for the other."""

    rank: int
    meeting: Any
    board: list[Any]
    size: int = 2

    def _all(self, mine: Any) -> list[Any]:
        self.board[self.rank] = mine
        self.meeting.wait(10)
        found = list(self.board)
        self.meeting.wait(10)
        return found

    def sum(self, x: np.ndarray) -> np.ndarray:
        return np.sum(self._all(x), axis=0)

    def max(self, n: int) -> int:
        return max(self._all(n))

    def any(self, flag: bool) -> bool:
        return any(self._all(flag))


@pytest.mark.parametrize("tells", [True, False])
def test_ranks_take_the_smallest_budget_and_equally_many_parts(tells: bool) -> None:
    """One rank has less memory, the other has more to do; one that runs out makes both do the step again."""
    board: list[Any] = [None, None]
    meeting = threading.Barrier(2)
    work = [rollouts([(2, 3)] * 300), rollouts([(2, 3)] * 100)]
    learners = [Metered(device=Device(limit=(100 + most) * MiB, tells=tells)) for most in (900, 150)]

    def step(rank: int) -> Metrics:
        N = int(work[rank].is_action.sum())
        return optimiser_step(
            [Trained(learners[rank], Sum((TokenMean(),)))], work[rank], np.ones(N, bool), np.ones(N),
            {"advantages": np.ones(N)}, {}, batching=MEMORY, budget=MEMORY.init(), comm=Ranks(rank, meeting, board))[0]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(step, range(2)))
    assert sum(learner.applied[0][0] for learner in learners) == pytest.approx(1.0)
    retries = [m["batch/memory_retries"].value for m in found]
    assert retries[0] == retries[1] == learners[1].device.failures <= 2 * (not tells)
    passed = [learner.parts for learner in learners]
    assert len(passed[0]) >= len(passed[1]) > 0 and max(passed[0][-5:]) <= 150


def test_fields_are_checked() -> None:
    for wrong in ({"tokens": 0}, {"margin": 1.0}, {"quantile": 0.0}, {"knee": -0.1}, {"patience": 0}):
        with pytest.raises(ValueError):
            replace(Adaptive(), **wrong)
