"""Every attention of the native models that runs here: peak extra memory and time of 4,096 tokens, both passes.

Two questions. `one`: a single sequence. `group`: a prompt of 2,048 tokens and 8 answers of 256 to it, which share it.
4 heads of 64 over 2 key and value heads; on a CPU float32, CPU seconds on one thread and the peak of resident memory
over what was resident before the call; on CUDA bfloat16, milliseconds between events and the peak of what torch
allocated over what it had. Each candidate is a process of its own, one for memory and one for time; before it is timed
its values and gradients are asserted equal to those of eager in float32. What is prepared for a layout once (a mask,
boundaries) counts, though all layers of a model share it.

    python tools/bench/attention.py [--questions one group] [--rounds 3] [--calls 2] [--tokens 4096]

Prediction for a CPU, written before the first run. `one`: a block of scores is 256 MiB, of which eager holds 3 going
forward and four going back, 0.8 and 1.0 GiB, sdpa none, 10 and 25 MiB; eager does all of the square and reads it ten
times, sdpa half of it once: 3 times the time. Flex does not go back on a CPU, and its form there holds the scores:
1 GiB, 2 times the time of eager. `group`: rectangles repeat the prompt 8 times, 648 MiB of scores and 2.5 times the
work, so eager takes 2.6 GiB; flex, which sees the prompt once, the same as for `one` and half of eager's time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models.attention import ATTENTION, BOUND, relative
from posttrain_backends.attention import KINDS, installed
from processes import KEEP_FREED, ONE_THREAD, extra_peak, in_a_process, medians
from torch import Tensor

HEADS, KV_HEADS, D, ANSWERS = 4, 2, 64, 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}[DEVICE]
Pass = Literal["forward", "both"]
PASSES: Mapping[Pass, str] = {"forward": "forward", "both": "forward and backward"}


def one(tokens: int) -> Layout:
    return Layout.from_offsets([0, tokens], DEVICE)


def group(tokens: int) -> Layout:
    """Half of the tokens are the prompt; it is the first answer's beginning, and the others share it."""
    prompt, answer = tokens // 2, tokens // 2 // ANSWERS
    cells = [np.r_[0:prompt, prompt + i * answer:prompt + (i + 1) * answer] for i in range(ANSWERS)]
    return Layout.from_offsets((prompt + answer) * np.arange(ANSWERS + 1), DEVICE, np.concatenate(cells))


QUESTIONS: Mapping[str, Callable[[int], Layout]] = {"one": one, "group": group}


@dataclass(frozen=True)
class Case:
    question: str
    name: str
    passes: Pass

    @property
    def absent(self) -> str:
        """Why it is not measured; empty where it is."""
        kind = KINDS[self.name]
        if not installed(self.name):
            return f"{kind.package} is not installed"
        if DEVICE == "cpu" and not kind.everywhere:
            return "runs on CUDA alone"
        backward = DEVICE == "cuda" or kind.trains_on_cpu or self.passes == "forward"
        return "" if backward else "no backward pass on a CPU"


class Given:
    """Queries, keys, values and the weight of the sum whose gradient is taken."""

    def __init__(self, question: str, tokens: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layout = QUESTIONS[question](tokens)
        self.q, self.k, self.v, self.weight = (
            torch.randn(tokens, n, D, generator=generator).to(DTYPE).to(DEVICE, dtype)
            for n in (HEADS, KV_HEADS, KV_HEADS, HEADS))

    def call(self, name: str, passes: Pass) -> tuple[Tensor, ...]:
        """Values, and the gradients where they are asked for."""
        qkv = [x.detach().requires_grad_(passes == "both") for x in (self.q, self.k, self.v)]
        with torch.set_grad_enabled(passes == "both"):
            out = ATTENTION[name](self.layout)(*qkv)
        gradients = torch.autograd.grad(out, qkv, self.weight) if passes == "both" else ()
        return (out.detach(), *gradients)


def extra_on_cuda(call: Callable[[], object]) -> float:
    """MiB."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def seconds_on_cuda(call: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
    torch.cuda.synchronize()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) * 1e-3


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


MEMORY = {"cpu": extra_peak, "cuda": extra_on_cuda}[DEVICE]
SECONDS = {"cpu": cpu_seconds, "cuda": seconds_on_cuda}[DEVICE]


def peak_of_one_call(case: Case, tokens: int) -> dict[str, list[float]]:
    """MiB; a call before it on few tokens, on CUDA on as many, so that nothing is imported or compiled in it."""
    Given(case.question, 64 if DEVICE == "cpu" else tokens, DTYPE).call(case.name, case.passes)
    given = Given(case.question, tokens, DTYPE)
    return {"MiB": [MEMORY(lambda: given.call(case.name, case.passes))]}


def seconds_of_calls(case: Case, tokens: int, expected: str, calls: int) -> dict[str, list[float]]:
    """Of each call; the one before them is compared with `expected` and not counted."""
    given = Given(case.question, tokens, DTYPE)
    found = given.call(case.name, case.passes)
    for x, exact in zip(found, torch.load(expected), strict=case.passes == "both"):
        assert (error := relative(x.cpu(), exact)) <= BOUND[DTYPE], f"{case} is {error} of the largest value off"
    return {"s": [SECONDS(lambda: given.call(case.name, case.passes)) for _ in range(calls)]}


def measure(cases: Sequence[Case], tokens: int, rounds: int, calls: int) -> dict[Case, dict[str, float]]:
    """Medians; the cases take turns."""
    taken: dict[Case, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for question in {case.question for case in cases}:
            exact = Given(question, tokens, torch.float32).call("eager", "both")
            torch.save([x.cpu() for x in exact], f"{folder}/{question}.pt")
            del exact
        for _ in range(rounds):
            for case in cases:
                of_case = ["--tokens", str(tokens), "--case", case.question, case.name, case.passes]
                expected = ["--calls", str(calls), "--expected", f"{folder}/{case.question}.pt"]
                measured = {**in_a_process(__file__, [*of_case, "--memory"], ONE_THREAD),
                            **in_a_process(__file__, [*of_case, *expected], {**ONE_THREAD, **KEEP_FREED})}
                for name, numbers in measured.items():
                    taken.setdefault(case, {}).setdefault(name, []).extend(numbers)
    return {case: medians(numbers) for case, numbers in taken.items()}


def table(questions: Sequence[str], found: Mapping[Case, Mapping[str, float]]) -> Iterator[str]:
    """Rows in Markdown; times in milliseconds."""
    columns = [f"{what}: {unit}" for what in PASSES.values() for unit in ("extra MiB", "ms")]
    yield f"| question | attention | {' | '.join(columns)} |\n|---|---|{'---:|' * len(columns)}"
    for question in questions:
        for name in ATTENTION:
            cells = [cell for passes in PASSES for cell in _cells(Case(question, name, passes), found)]
            yield f"| {question} | `{name}` | {' | '.join(cells)} |"


def _cells(case: Case, found: Mapping[Case, Mapping[str, float]]) -> tuple[str, str]:
    if case.absent:
        return f"not measured: {case.absent}", ""
    return f"{found[case]['MiB']:,.0f}", f"{1e3 * found[case]['s']:,.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=2)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--expected", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    if given.case:
        case = Case(*given.case)
        print(json.dumps(peak_of_one_call(case, given.tokens) if given.memory
                         else seconds_of_calls(case, given.tokens, given.expected, given.calls)))
        return
    cases = [Case(question, name, passes) for question in given.questions for name in ATTENTION for passes in PASSES]
    medians = measure([case for case in cases if not case.absent], given.tokens, given.rounds, given.calls)
    print(f"{DEVICE}, {given.tokens} tokens, {HEADS} heads of {D} over {KV_HEADS}, {DTYPE}")
    print("\n".join(table(given.questions, medians)))


if __name__ == "__main__":
    main()
