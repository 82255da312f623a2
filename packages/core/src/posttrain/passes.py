"""The parts of one step as they go through a model: planned under a budget, and planned anew where the planner adapts.

What was learned from a part decides how large the next one is, also within a step: no pass is made only to measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import numpy as np

from posttrain.batching import plan_by_group, require_divisible, smaller_budget
from posttrain.comm import Comm, SingleProcess
from posttrain.data import Metric, Metrics, Prompt, Rollouts, Sampling
from posttrain.errors import MemoryExhausted
from posttrain.memory import memory_of
from posttrain.protocols import Adapting, Batching, Memory, Pass, Rationed, Sampler

ROLLOUT = "rollout"
"""Name of the budget of keys and values."""
Budget = Any
"""Tokens of one part; the state of a planner that adapts."""


def first_budget(batching: Batching) -> Budget:
    """The budget of a run that begins."""
    planner: object = batching
    return planner.init() if isinstance(planner, Adapting) else batching.tokens


def drawn(sampler: Sampler, prompts: Sequence[Prompt], sampling: Sampling, seed: Sequence[int], batching: Batching,
          budget: Budget, clock: Callable[[], float] = time.perf_counter) -> tuple[Rollouts, Budget]:
    """A rollout, with as much room for keys and values as a planner that adapts gives to it."""
    planner: object = batching
    rationed: object = sampler
    if not (isinstance(planner, Adapting) and isinstance(rationed, Rationed) and rationed.token_bytes):
        return sampler.rollout(prompts, sampling, seed), budget
    memory = memory_of(sampler)
    start, began = memory.start(), clock()
    budget = planner.prepared(budget, ROLLOUT, start, rationed.token_bytes)
    rationed.ration(planner.budget(budget, ROLLOUT))
    rollouts = sampler.rollout(prompts, sampling, seed)
    kept, seconds, peak = rationed.kept(), clock() - began, memory.peak(start)
    if kept.ran_out:
        budget = planner.observed(budget, ROLLOUT, Pass(kept.ran_out, seconds, start, failed=True))
        seconds = peak = 0  # they are those of the larger attempt, too
    if kept.tokens:
        seen = Pass(kept.tokens, seconds, start, peak, work=int(rollouts.is_action.sum()))
        budget = planner.observed(budget, ROLLOUT, seen)
    return rollouts, budget


@final
class Passes:
    """Goes through parts once, or again after memory ran out:

        for part in passes.parts(costs, groups):
            with passes.measured(tokens):
                ...
        if passes.failed:
            passes.shrink(costs)

    Every rank of `comm` is given the same number of parts, the last ones empty, under the smallest budget of all ranks.
    """

    def __init__(self, batching: Batching, budget: Budget, use: str, memory: Memory, comm: Comm = SingleProcess(),
                 clock: Callable[[], float] = time.perf_counter) -> None:
        planner: object = batching
        self._adapting: Adapting[Any] | None = planner if isinstance(planner, Adapting) else None
        self._batching, self._use, self._memory, self._comm, self._clock = batching, use, memory, comm, clock
        self.budget = budget
        """As it was learned until now."""
        self.count = 0
        """Parts with a unit, of the last time that all were gone through."""
        self.failed = False
        """Whether memory ran out on any rank; only `shrink` may follow."""
        self._failure: MemoryExhausted | None = None
        self._planned: Sequence[np.ndarray] = ()

    @property
    def metrics(self) -> Metrics:
        """How many parts there were, and of a planner that adapts, the budget that it has come to: a clock has a say in
        that, so it may differ between equal runs."""
        found = Metrics({"batch/parts": Metric(self.count, reduction="sum")})
        return found if self._adapting is None else found + {
            "timing/batch_tokens": Metric(self.tokens, reduction="last")}

    @property
    def tokens(self) -> int:
        """The budget of the next part."""
        return int(self.budget if self._adapting is None else self._adapting.budget(self.budget, self._use))

    def parts(self, costs: np.ndarray, groups: np.ndarray) -> Iterator[np.ndarray]:
        """Unit numbers of each part; ends early where memory ran out."""
        self._failure, self.failed, self.count = None, False, 0
        if self._adapting is not None:
            self.budget = self._adapting.prepared(self.budget, self._use, self._memory.start())
        left = np.arange(len(costs))
        while not self.failed:
            tokens, units = self.tokens, left
            common = tokens if self._adapting is None else -self._comm.max(-tokens)
            self._planned = [units[p] for p in plan_by_group(self._batching, costs[units], groups[units], common)]
            count, done = self._comm.max(len(self._planned)), 0
            while done < count and not self._ends_early(tokens):
                part = self._planned[done] if done < len(self._planned) else units[:0]
                done, self.count = done + 1, self.count + (len(part) > 0)
                yield part
            self.failed = self._comm.any(self._failure is not None)
            if done == count:
                return
            left = np.concatenate([units[:0], *self._planned[done:]])

    def _ends_early(self, tokens: int) -> bool:
        """Whether the rest of the plan is not carried out: memory ran out, or another budget was learned."""
        if self._adapting is None:
            return self._failure is not None
        return self._comm.any(self._failure is not None or self.tokens != tokens)

    @contextmanager
    def measured(self, tokens: int) -> Iterator[None]:
        """For the computing of one part; `MemoryExhausted` goes no further than this."""
        if self._adapting is None or not tokens:
            with self._caught():
                yield
            return
        start, began = self._memory.start(), self._clock()
        with self._caught():
            yield
        seen = Pass(tokens, self._clock() - began, start, self._memory.peak(start), self._failure is not None)
        self.budget = self._adapting.observed(self.budget, self._use, seen)

    @contextmanager
    def _caught(self) -> Iterator[None]:
        try:
            yield
        except MemoryExhausted as error:
            self._failure = error.with_traceback(None)  # its frames hold what no longer fits

    def shrink(self, costs: np.ndarray) -> None:
        """Take a smaller budget; raises `MemoryExhausted` with advice where parts cannot be made smaller."""
        error = self._failure or MemoryExhausted("another rank ran out of memory")
        if self._adapting is None:
            self.budget = smaller_budget(costs, self._planned, error)
        elif self._failure is not None:  # what was observed made the budget smaller already
            require_divisible(costs, self._planned, error)
