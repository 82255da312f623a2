"""The output head on a GPU beside its peers and the least that it can take: milliseconds and extra MiB.

`hidden`: from hidden states [N, H] and the output matrix [V, H], both bf16, log-probs, entropies and the gradient of a
clipped policy loss in both; the floor is the three products of matrices that every way needs, 6NHV operations, with
all logits in memory. `logits`: from given logits [N, V] in bf16, the gradient written over them; the floor is reading
them twice and writing them once, at the bandwidth of a large copy measured in the same run. Each result is asserted
equal to the naive form in float32 first, at a few rows. Device time between two CUDA events, median over repeats in
turns; "extra MiB" is the peak over what was allocated before the call, gradients included.

    python tools/bench/head_gpu.py [--rows 8192] [--hidden-size 4096] [--vocabulary 151936] [--repeats 11]

Peers, none of them needed: `pip install trl==1.16.0 liger-kernel==0.8.5`; torch's own chunked `linear_cross_entropy`,
which says no entropies, from torch 2.13. "a learner's types" holds the output matrix and its gradient in float32, as
training does, and multiplies in bf16.

Predicted for an H200, before any run (790 TFLOP/s and 4.3 TB/s, both reported for that card): the three products take
39 ms. In one pass the kernels move 7.5 GB, 1.7 ms, the gradient of the output matrix is read and written once more for
each of 5 chunks, 2.9 ms in bf16 and 5.8 in float32, if nothing overlaps, and the host waits a few times per chunk: 44
ms, 0.88 of the floor, and 48 in a learner's types, where the matrix is also copied to bf16. Two passes: 13 ms more. In
torch's operations alone 25 ms more. Extra memory: gradients of 1251 MiB (2438 in float32) and a chunk of 512. Logits:
1.9 ms where the floor is 1.7; reading alone 0.65 ms, floor 0.58.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from head import SEQUENCES, Candidate, Given, Question, in_place, naive_of, one_pass, results, trl, trl_of, two_passes
from kernels import bandwidth, missing, seconds
from posttrain_backends.kernels.head import TritonHead
from torch import Tensor

CHECKED = 512
"""Rows at which results are compared."""
TOLERANCE = 2e-2
"""Of the norm of what is compared: logits are rounded to bf16, 2^-8, wherever they are in memory."""
MiB = 2**20


def given(N: int, H: int, V: int, device: str = "cuda") -> Given:
    """In bf16; old log-probs near the new ones, so that few actions are outside the clip range."""
    generator = torch.Generator(device).manual_seed(0)
    hidden, weight = (torch.randn(n, H, generator=generator, device=device) for n in (N, V))
    weight /= H**0.5
    chosen = torch.randint(V, (N,), generator=generator, device=device)
    old = (hidden * weight[chosen]).sum(-1) - hidden.square().sum(-1) / (2 * H) - torch.tensor(V).log()
    old += 0.05 * torch.randn(N, generator=generator, device=device)
    advantages = torch.randn(SEQUENCES, generator=generator, device=device).repeat_interleave(N // SEQUENCES)
    return Given(hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_(), chosen, old, advantages)


def from_logits(g: Given) -> Given:
    return replace(g, logits=(g.hidden @ g.weight.t()).detach().requires_grad_())


def in_float32(g: Given) -> Given:
    """The same numbers, as leaves of their own."""
    hidden, weight, logits = (x.detach().float().requires_grad_() for x in (g.hidden, g.weight, g.logits))
    return Given(hidden, weight, g.chosen, g.old, g.advantages, logits)


# ---- what is compared


def naive(g: Given) -> Tensor | None:
    return naive_of((g.hidden @ g.weight.t()).float(), g)


def three_products(g: Given) -> None:
    with torch.no_grad():
        z = g.hidden @ g.weight.t()
        torch.mm(z, g.weight)
        torch.mm(z.t(), g.hidden)


def learners_types(g: Given) -> Tensor | None:
    """The output matrix and its gradient in float32."""
    own = replace(g, weight=g.weight.detach().float().requires_grad_())
    entropies = one_pass(own, form=TritonHead(), compute=torch.bfloat16)
    g.weight.grad = None if own.weight.grad is None else own.weight.grad.to(g.weight.dtype)
    return entropies


def torchs(g: Given) -> None:
    options = torch.nn.LinearCrossEntropyOptions()
    nll = torch.nn.functional.linear_cross_entropy(g.hidden, g.weight, g.chosen, reduction="none", options=options)
    g.loss(-nll.float()).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped; so for all below


def liger(g: Given) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # type: ignore[import-not-found]  # peers are
    # no dependencies

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo", epsilon_low=0.2, epsilon_high=0.2)
    mask = torch.ones(SEQUENCES, g.N // SEQUENCES, device=g.hidden.device)
    loss(g.rows(g.hidden), g.weight, g.rows(g.chosen), mask, g.rows(g.advantages)[:, 0].contiguous(),
         old_per_token_logps=g.rows(g.old))[0].backward()


def read_alone(g: Given) -> Tensor | None:
    with torch.no_grad():
        return TritonHead().read(g.logits, g.chosen, entropy=True).entropy


QUESTIONS: Mapping[Question, Mapping[str, Candidate]] = {
    "hidden": {
        "three products (floor)": three_products, "ours, one pass": partial(one_pass, form=TritonHead()),
        "ours, two passes": partial(two_passes, form=TritonHead()), "ours, a learner's types": learners_types,
        "ours, torch's operations": one_pass, "naive": naive, "TRL": trl, "Liger": liger,
        "torch linear_cross_entropy": torchs},
    "logits": {
        "ours": partial(in_place, form=TritonHead()), "ours, reading alone": read_alone,
        "ours, torch's operations": in_place, "naive": lambda g: naive_of(g.logits.float(), g), "TRL": trl_of}}
FLOOR = "three products (floor)"
WITHOUT_GRADIENTS = frozenset({FLOOR, "ours, reading alone"})


def absent(name: str) -> str:
    """Why a candidate cannot be measured; empty where it can."""
    module = {"TRL": "trl", "Liger": "liger_kernel"}.get(name)
    if module is not None and importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    if name == "torch linear_cross_entropy" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has it not"
    return ""


def assert_equal(name: str, run: Candidate, g: Given) -> None:
    """Gradients and entropies are those of the naive form in float32, relative to the norm of each."""
    exact = in_float32(g)
    reference = results(exact, naive_of(exact.logits, exact) if len(g.logits) else naive(exact))
    found = results(g, run(g))
    lacking = set() if name in WITHOUT_GRADIENTS else reference.keys() - {"entropy"} - found.keys()
    assert not lacking, f"{name} gives no gradient of {', '.join(sorted(lacking))}"
    for what, x in found.items():
        error = float((x.float() - reference[what]).norm() / reference[what].norm())
        assert error <= TOLERANCE, f"{what} of {name} is {error} of its norm off"


# ---- measuring


@dataclass(frozen=True)
class Measured:
    seconds: float
    MiB: float


def fresh(g: Given) -> None:
    """No gradients; what a call wrote over given logits stays, since time does not depend on it."""
    g.hidden.grad = g.weight.grad = g.logits.grad = None


def extra(run: Candidate, g: Given) -> float:
    """MiB at the peak of one call over what was allocated before."""
    fresh(g)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(g)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MiB


def measured(candidates: Mapping[str, Candidate], g: Given, repeats: int) -> dict[str, Measured]:
    peaks = {name: extra(run, g) for name, run in candidates.items()}  # the first call, which compiles
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):  # in turns, so that a busy machine is busy for all
        for name, run in candidates.items():
            fresh(g)
            taken[name].append(seconds(run, g))
    return {name: Measured(statistics.median(times), peaks[name]) for name, times in taken.items()}


def refusal(name: str, run: Candidate, check: Callable[[], Given]) -> str:
    """Why a candidate is not measured. Ours must be right; a peer that is not there or fails is left out."""
    if reason := absent(name):
        return reason
    try:
        assert_equal(name, run, check())
    except Exception as error:  # a peer's own code may raise anything
        if name.startswith("ours"):
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def table(question: Question, refused: Mapping[str, str], found: Mapping[str, Measured],
          floor: float) -> Iterator[str]:
    yield f"{question:36s} {'ms':>8s} {'extra MiB':>10s}   floor / time, floor {floor * 1e3:.2f} ms"
    for name, reason in refused.items():
        if reason:
            yield f"  {name:34s} not measured: {reason}"
        else:
            mine = found[name]
            yield f"  {name:34s} {mine.seconds * 1e3:8.2f} {mine.MiB:10.0f}   {floor / mine.seconds:5.0%}"


def ask(question: Question, N: int, H: int, V: int, repeats: int) -> None:
    made = (lambda n: from_logits(given(n, H, V))) if question == "logits" else (lambda n: given(n, H, V))
    refused = {name: "" if name == FLOOR else refusal(name, run, lambda: made(min(CHECKED, N)))
               for name, run in QUESTIONS[question].items()}
    g = made(N)
    found = measured({name: run for name, run in QUESTIONS[question].items() if not refused[name]}, g, repeats)
    floor = found[FLOOR].seconds if question == "hidden" else 3 * 2 * N * V / bandwidth(repeats)
    print("\n".join(table(question, refused, found, floor)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--repeats", type=int, default=11)
    asked = parser.parse_args()
    if reason := missing():
        print(f"not measured: {reason}")
        return
    torch.set_default_device("cuda")  # what a candidate makes is beside what it is given
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, N = {asked.rows}, H = {asked.hidden_size}, V = "
          f"{asked.vocabulary}, bf16, median of {asked.repeats}")
    for question in QUESTIONS:
        ask(question, asked.rows, asked.hidden_size, asked.vocabulary, asked.repeats)


if __name__ == "__main__":
    main()
