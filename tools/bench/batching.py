"""`batching: adaptive` beside what others do: micro-batches under a memory limit, the speed of sizes, their plan.

`memory`: training passes of a torch policy (4 layers of 64, 64 tokens a row) in a process whose `RLIMIT_DATA` leaves so
many MiB beside what the model holds. The yardstick is bisection; peers are halving, and accelerate's
`find_executable_batch_size`, both from 2,048 rows. Counted are rows found, passes that ran out of memory, and rows that
went through the model until then, failed passes included. Growth is not ended by speed here (`knee: 0`). Blocks above
64 KiB go back to the system at once (`MALLOC_MMAP_THRESHOLD_`), as under a GPU's allocator; `fragmented` is the same
with malloc as it is, which keeps them, so that what fits depends on what came before.
`moving`: the same, where the limit is halved and then quadrupled while the planner works.
`speed`: tokens per CPU second of every power of two, and where the planner comes to rest (`knee: 0.03`), without a
limit; the planner's clock is the CPU's here, as other jobs disturb it least.
`planning`: 4,096 sequences under 16,384 tokens, beside verl's partition (Karmarkar-Karp, after `seqlen_balancing.py` of
verl 0.9; verl itself is not run) into as few parts as fit.

    python tools/bench/batching.py [memory fragmented moving speed planning]

The peer of `memory` needs accelerate. One thread.

Prediction, written before the first run: the peaks of passes are a line in rows but for some MiB that malloc holds, so
95 % of bisection's rows at each limit and no failed pass; its work is a geometric sum, some twice the rows found,
against sixteen times and more for halving from far above. A moved limit is seen before the next step and costs
no failure. On a CPU the speed is flat from 1,000 tokens on, so that growth ends there, at 97 % of the best. Planning is
a tree against a heap of sets, grown five times: 1,000x.
"""

from __future__ import annotations

import heapq
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import posttrain
from posttrain.batching import StepData, counts_of, cut, first_fit
from posttrain.data import FINISH, Prompt, Rollouts, offsets_of
from posttrain.errors import MemoryExhausted
from posttrain.loss import Sum
from posttrain.memory import HostMemory
from posttrain.passes import Passes
from posttrain.protocols import Learner, LoadRequest, Optimization
from posttrain_tuning.batching import Adaptive
from processes import ONE_THREAD, in_a_process

T, VOCAB, START = 64, 512, 2048
LIMITS = (60, 120, 240, 480)
"""MiB."""
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
GRID = tuple(2**e for e in range(7, 15))
"""Tokens."""


# ---- training passes of a chosen number of rows


@dataclass
class Work:
    """A learner, and what went through it."""

    learner: Learner
    objective: Sum
    rows: int = 0
    failures: int = 0
    sizes: list[int] = field(default_factory=list)
    """Rows of each pass."""

    def run(self, rows: int) -> None:
        """Forward and backward pass; raises `MemoryExhausted`."""
        self.rows += rows
        self.sizes.append(rows)
        r = texts(rows)
        keep = np.ones(int(r.is_action.sum()), bool)
        n = len(keep)
        columns = {"advantages": np.ones(n), "old_logprobs": np.full(n, -7.0), "behavior_logprobs": np.full(n, -7.0)}
        step = StepData(r, keep, self.objective.weights(counts_of(r, keep)), columns)
        try:
            self.learner.accumulate(cut(step, np.arange(rows)), self.objective, {})
        except MemoryExhausted:
            self.failures += 1
            self.learner.discard()
            raise

    def fits(self, rows: int) -> bool:
        try:
            self.run(rows)
        except MemoryExhausted:
            return False
        return True


def texts(rows: int) -> Rollouts:
    """Rows of T tokens, a prompt of one token and an answer."""
    return Rollouts(
        tokens=np.random.default_rng(rows).integers(0, VOCAB, rows * T).astype(np.int32),
        offsets=offsets_of(np.full(rows, T)), episode=np.arange(rows), is_action=np.tile(np.arange(T) > 0, rows),
        group=np.arange(rows), finish=np.full(rows, FINISH.index("eos"), np.int8), terminated=np.ones(rows, bool),
        prompts=tuple(Prompt(text="x") for _ in range(rows)), completions=("",) * rows)


def work() -> Work:
    """Everything is imported and made that a pass needs."""
    registry = posttrain.discover()
    backend = registry.create("backend", "torch", hidden_size=64, layers=4, heads=4, kv_heads=2, max_positions=T,
                              device="cpu")
    done = Work(backend.load(LoadRequest(VOCAB, threads=1, optimization=Optimization())),
                Sum((registry.create("objective", "grpo"),)))
    done.run(1)
    done.rows, done.sizes = 0, []
    return done


def leave(mib: int) -> None:
    """Let this process ask for so many MiB more than it holds now, and no more."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (HostMemory().start().used + mib * 2**20, hard))


# ---- ways to a number of rows


def bisection(w: Work) -> int:
    low, high = 1, START + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if w.fits(middle) else (low, middle)
    return low


def halving(w: Work) -> int:
    rows = START
    while not w.fits(rows):
        rows //= 2
    return rows


def accelerate(w: Work) -> int:
    from accelerate.utils import find_executable_batch_size

    def attempt(batch_size: int) -> int:
        try:
            w.run(batch_size)
        except MemoryExhausted as error:
            raise RuntimeError("CUDA out of memory.") from error
        return batch_size
    return int(find_executable_batch_size(starting_batch_size=START)(attempt)())


def adaptive(w: Work) -> int:
    *_, (found, _) = states(Adaptive(tokens=T, knee=0.0), w)
    last = next(i for i, rows in enumerate(w.sizes) if rows == found)  # the first pass that was as large
    w.rows = sum(w.sizes[:last + 1])
    return found


def states(component: Adaptive, w: Work, state: Any = None, rows: int = 2 * START,
           rest: int = 6) -> Iterator[tuple[int, Any]]:
    """The budget in rows and the state after each pass, until `rest` passes did not move it."""
    state, same, costs = component.init() if state is None else state, 0, np.full(rows, T)
    passes = Passes(component, state, "update", HostMemory(), clock=time.process_time)
    while same < rest:
        for part in passes.parts(costs, np.arange(rows)):
            before = passes.tokens
            with passes.measured(T * len(part)):
                w.run(len(part))
            same = same + 1 if passes.tokens == before else 0
            yield passes.tokens // T, passes.budget
            if same == rest:
                return
        if passes.failed:
            passes.shrink(costs)


WAYS: dict[str, Callable[[Work], int]] = {f.__name__: f for f in (bisection, halving, accelerate, adaptive)}


# ---- what a process measures


def one_way(name: str, mib: str) -> dict[str, Any]:
    w = work()
    leave(int(mib))
    began = time.perf_counter()
    return {"found": WAYS[name](w), "failures": w.failures, "rows": w.rows, "seconds": time.perf_counter() - began}


def one_moving(*mibs: str) -> dict[str, Any]:
    """One planner under limits that follow one another; each measured from what was held at the start."""
    w = work()
    hard, base = resource.getrlimit(resource.RLIMIT_DATA)[1], HostMemory().start().used
    state, found, failures = None, [], []
    for mib in mibs:
        resource.setrlimit(resource.RLIMIT_DATA, (base + int(mib) * 2**20, hard))
        w.failures = 0
        *_, (rows, state) = states(Adaptive(tokens=T, knee=0.0), w, state)
        found.append(rows)
        failures.append(w.failures)
    return {"found": found, "failures": failures}


def one_grid() -> dict[str, Any]:
    """Tokens per second of each size, the best of some passes, and the planner's budget."""
    w, best = work(), dict[int, float]()
    for _ in range(4):
        for tokens in GRID:
            began = time.process_time()
            w.run(tokens // T)
            best[tokens] = max(best.get(tokens, 0.0), tokens / (time.process_time() - began))
    *_, (rows, _) = states(Adaptive(tokens=T), w, rest=20)
    return {"sizes": list(best), "speeds": list(best.values()), "found": rows * T}


# ---- plans


def karmarkar_karp(lengths: Sequence[int], k: int) -> list[list[int]]:
    """verl's `karmarkar_karp(lengths, k, equal_size=False)`: the differencing method (Karmarkar and Karp 1982), on k
    sets at a time."""
    class Set:
        def __init__(self) -> None:
            self.sum, self.items = 0, list[tuple[int, int]]()

        def add(self, i: int, length: int) -> None:
            self.items.append((i, length))
            self.sum += length

        def merge(self, other: Set) -> None:
            for i, length in other.items:
                self.add(i, length)

        def __lt__(self, other: Set) -> bool:
            if self.sum != other.sum:
                return self.sum < other.sum
            if len(self.items) != len(other.items):
                return len(self.items) < len(other.items)
            return self.items < other.items

    class State:
        def __init__(self, items: list[tuple[int, int]]) -> None:
            self.sets = [Set() for _ in range(k)]
            for target, (i, length) in zip(self.sets, items, strict=False):
                target.add(i, length)
            self.sets.sort(reverse=True)

        @property
        def spread(self) -> int:
            return self.sets[0].sum - self.sets[-1].sum

        def merge(self, other: State) -> None:
            for i in range(k):
                self.sets[i].merge(other.sets[k - 1 - i])
            self.sets.sort(reverse=True)

        def __lt__(self, other: State) -> bool:
            if self.spread != other.spread:
                return self.spread > other.spread
            return self.sets[0] > other.sets[0]  # type: ignore[operator]  # the reflected __lt__

    queue = [State([(i, length)]) for length, i in sorted((length, i) for i, length in enumerate(lengths))]
    heapq.heapify(queue)
    while len(queue) > 1:
        first, second = heapq.heappop(queue), heapq.heappop(queue)
        first.merge(second)
        heapq.heappush(queue, first)
    return [[i for i, _ in s.items] for s in queue[0].sets]


def grown_until_it_fits(lengths: np.ndarray, budget: int) -> list[list[int]]:
    """As few parts as the partition gives with none over the budget."""
    given, k = lengths.tolist(), -(-int(lengths.sum()) // budget)
    while True:
        parts = karmarkar_karp(given, k)
        if max(int(lengths[p].sum()) for p in parts) <= budget:
            return parts
        k += 1


def skewed(n: int, seed: int = 0) -> np.ndarray:
    """Prompts of 64 to 512 tokens with answers of 900 in the middle, 7,680 at most."""
    r = np.random.default_rng(seed)
    return (r.integers(64, 513, n) + np.minimum(np.exp(r.normal(np.log(900), 0.9, n)), 8192 - 512)).astype(int)


# ---- tables


def table(*columns: str) -> None:
    print("", *columns, "", sep=" | ")
    print("|", " --- |" * len(columns), sep="", flush=True)


def row(*cells: object) -> None:
    print("", *cells, "", sep=" | ", flush=True)


def memory(variables: Mapping[str, str] = GIVEN_BACK) -> None:
    table("MiB", "way", "rows found", "of bisection", "out of memory", "rows computed", "seconds")
    for mib in LIMITS:
        done = {name: child("one_way", name, str(mib), **variables) for name in WAYS
                if name != "accelerate" or (installed(name) and mib == LIMITS[-1])}  # a tenth less each time: long
        best = done["bisection"]["found"]
        for name, d in done.items():
            row(mib, name, d["found"], f"{d['found'] / best:.0%}", d["failures"], d["rows"], f"{d['seconds']:.0f}")


def fragmented() -> None:
    memory({})


def moving() -> None:
    mibs = [str(mib) for mib in (240, 120, 480)]
    found = child("one_moving", *mibs, **GIVEN_BACK)
    table("MiB", "rows found", "out of memory")
    for mib, rows, failures in zip(mibs, found["found"], found["failures"], strict=True):
        row(mib, rows, failures)


def speed() -> None:
    found = child("one_grid")
    table("tokens", "tokens/s", "of the best")
    best = max(found["speeds"])
    for tokens, pace in zip(found["sizes"], found["speeds"], strict=True):
        row(tokens, f"{pace:.0f}", f"{pace / best:.0%}")
    print(f"the planner comes to rest at {found['found']} tokens", flush=True)


def planning() -> None:
    lengths, budget = skewed(4096), 16384
    took = []
    for _ in range(5):
        began = time.process_time()
        order = np.argsort(-lengths, kind="stable")
        ours = first_fit(lengths[order], budget)
        took.append(time.process_time() - began)
    began = time.process_time()
    theirs = grown_until_it_fits(lengths, budget)
    peer = time.process_time() - began
    assert sorted(i for p in theirs for i in p) == sorted(np.concatenate(ours).tolist()) == list(range(4096))
    table("planner", "micro-batches", "seconds")
    row("the least there can be", -(-int(lengths.sum()) // budget), "")
    row("ours", len(ours), f"{statistics.median(took):.4f}")
    row("verl's partition, grown until it fits", len(theirs), f"{peer:.2f}")
    print(f"{peer / statistics.median(took):.0f}x", flush=True)


def child(name: str, *arguments: str, **variables: str) -> Any:
    return in_a_process(__file__, [name, *arguments], {**ONE_THREAD, **variables})


def installed(package: str) -> bool:
    from importlib.util import find_spec
    return find_spec(package) is not None


if __name__ == "__main__":
    asked = sys.argv[1:] or ["memory", "fragmented", "moving", "speed", "planning"]
    if asked[0].startswith("one_"):
        print(json.dumps(globals()[asked[0]](*asked[1:])))
    else:
        for part in asked:
            print(f"\n{part}", flush=True)
            globals()[part]()
