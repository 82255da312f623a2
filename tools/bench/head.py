"""The output head beside its peers: log-probs, entropies and the gradient of a clipped policy loss, mean over actions.

Two questions. `hidden`: from hidden states [N, H] and the output matrix [V, H], gradients in both. `logits`: from given
logits [N, V], gradient in them. Extra memory is the peak of resident memory during one call over what was resident
before it, at N = 4096 actions; time is CPU seconds on one thread at N = 1024; H = 896, V = 32768, float32. Each
candidate is a process of its own, twice: once for memory, with blocks that are given back at once, and once for time,
with freed pages kept. Its gradients are asserted equal to the naive form's before it is timed.

    python tools/bench/head.py [--questions hidden logits] [--rounds 3] [--calls 2]

Peers, none of them needed: `pip install trl==1.16.0 verl==0.9.1 liger-kernel==0.8.5 cut-cross-entropy==25.1.1`.

"ours, one pass" is what a training step does: the objective `ppo` and the measured entropy, chunk by chunk. "three
products" computes nothing but the three products of matrices that every way needs, in chunks of 512 rows.

Prediction, written before the first run. Hidden: the gradients are 126 MiB and one chunk of 256 rows is 32, so 165 MiB,
1/28 of TRL and 1/12 of naive; operations are 6NHV against TRL's 8NHV, and what is done to logits stays in the cache,
4 %, so 1.4x faster than TRL, 0.93 of the three products, whose chunks are twice as long. Logits: three blocks of 1 MiB,
so 1/200 of naive; two passes over the logits, each with one exponential, 0.75 of TRL's time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from processes import KEEP_FREED, ONE_THREAD, extra_peak, in_a_process, medians
from torch import Tensor

FOR_MEMORY, FOR_TIME = 4096, 1024
"""Actions."""
SEQUENCES, H, V, CLIP = 8, 896, 32768, 0.2
Question = Literal["hidden", "logits"]


@dataclass(frozen=True)
class Given:
    """Inputs of one call; sequences are of equal length, and an advantage belongs to a whole one."""

    hidden: Tensor
    weight: Tensor
    chosen: Tensor
    old: Tensor
    advantages: Tensor
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def N(self) -> int:
        return len(self.chosen)

    def rows(self, x: Tensor) -> Tensor:
        """[N, ...] -> [sequences, tokens, ...]."""
        return x.view(SEQUENCES, self.N // SEQUENCES, *x.shape[1:])

    def loss(self, logprobs: Tensor) -> Tensor:
        ratio = (logprobs - self.old).exp()
        return -torch.min(ratio * self.advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * self.advantages).sum() / self.N


def given(question: Question, N: int, vocabulary: int = V) -> Given:
    torch.manual_seed(0)
    chosen, advantages = torch.randint(vocabulary, (N,)), torch.randn(SEQUENCES).repeat_interleave(N // SEQUENCES)
    hidden, weight = torch.randn(N, H), torch.randn(vocabulary, H) / H**0.5
    # near the log-probs: the mean of exp of normal logits is known, and few actions must be outside the clip range,
    # since ours leaves those out
    old = (hidden * weight[chosen]).sum(-1) - hidden.square().sum(-1) / (2 * H) - torch.tensor(vocabulary).log()
    old += 0.05 * torch.randn(N)
    if question == "hidden":
        return Given(hidden.requires_grad_(), weight.requires_grad_(), chosen, old, advantages)
    return Given(hidden, weight, chosen, old, advantages, (hidden @ weight.t()).requires_grad_())


Candidate = Callable[[Given], Tensor | None]
"""Leaves gradients in the leaves -> entropies, if it says any."""


# ---- from hidden states


def one_pass(g: Given, **options: Any) -> Tensor | None:
    """`options` are those of `head.walk`."""
    from posttrain.data import MicroBatch
    from posttrain.loss import Measured, Sum
    from posttrain_backends._torch.head import walk
    from posttrain_backends._torch.one_pass import LossOfChunks
    from posttrain_objectives.policy_gradient import PolicyGradient

    N, weight = g.N, torch.full((g.N,), 1 / g.N)
    row = torch.arange(N)
    batch = MicroBatch(
        tokens=g.chosen, sequence=row, positions=row, token_weight=weight, source=row, episode=row, group=row,
        count=torch.ones(N), last=row, weight=weight, kl_weight=weight, value_weight=weight, advantages=g.advantages,
        old_logprobs=g.old)
    g.weight.grad = torch.zeros_like(g.weight)
    loss = LossOfChunks(Sum((PolicyGradient(clip_low=CLIP, clip_high=CLIP), Measured())), {}, batch)
    reading, g.hidden.grad = walk(g.hidden, g.weight, g.chosen, loss, d_weight=g.weight.grad, entropy=True, **options)
    return reading.entropy


def two_passes(g: Given, **options: Any) -> Tensor | None:
    """`options` are those of `head.chosen_logprobs`."""
    from posttrain_backends._torch.head import chosen_logprobs

    logprobs, entropies = chosen_logprobs(g.hidden, g.weight, g.chosen, entropy=True, **options)
    g.loss(logprobs).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped; so for all below
    return entropies


def naive(g: Given) -> Tensor | None:
    return naive_of(g.hidden @ g.weight.t(), g)


def three_products(g: Given, rows: int = 512) -> None:
    with torch.no_grad():
        d_hidden, d_weight = torch.empty_like(g.hidden), torch.zeros_like(g.weight)
        chunk = torch.empty(rows, len(g.weight))
        for start in range(0, g.N, rows):
            part = slice(start, start + rows)
            z = torch.mm(g.hidden[part], g.weight.t(), out=chunk[:len(g.hidden[part])])
            torch.mm(z, g.weight, out=d_hidden[part])
            d_weight.addmm_(z.t(), g.hidden[part])


def trl(g: Given) -> Tensor | None:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction  # type: ignore[import-not-found]  # peers are
    # no dependencies; so for all below

    logprobs, entropies, *_ = ChunkedLogProbFunction.apply(
        g.hidden, g.weight, None, g.chosen, 1.0, 32768, None, 1.0, ("entropy",))
    g.loss(logprobs).backward()  # type: ignore[no-untyped-call]
    return Tensor(entropies)


def verl(g: Given) -> Tensor | None:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO  # type: ignore[import-not-found]

    logprobs, entropies = FusedLinearForPPO()(g.rows(g.hidden), g.weight, g.rows(g.chosen))
    g.loss(logprobs.view(-1)).backward()  # type: ignore[no-untyped-call]
    return Tensor(entropies.reshape(-1))


def liger(g: Given) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # type: ignore[import-not-found]

    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="bnpo",
                                    epsilon_low=CLIP, epsilon_high=CLIP)
    loss(g.rows(g.hidden), g.weight, g.rows(g.chosen), torch.ones(SEQUENCES, g.N // SEQUENCES),
         g.rows(g.advantages)[:, 0].contiguous(), old_per_token_logps=g.rows(g.old))[0].backward()


def compiled_cce(g: Given) -> None:
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

    nll = linear_cross_entropy(g.hidden, g.weight, g.chosen, impl="torch_compile", reduction="none")
    g.loss(-nll).backward()  # type: ignore[no-untyped-call]


# ---- from logits


def in_place(g: Given, **options: Any) -> Tensor | None:
    """`options` are those of `logits.logprobs_of`."""
    from posttrain_backends._torch.logits import logprobs_of

    logprobs, entropies = logprobs_of(g.logits.view_as(g.logits), g.chosen, entropy=True, **options)
    g.loss(logprobs).backward()  # type: ignore[no-untyped-call]
    return entropies


def naive_of(logits: Tensor, g: Given) -> Tensor | None:
    log_p = logits.log_softmax(-1)
    entropies = -(log_p.exp() * log_p).sum(-1).detach()
    g.loss(log_p.gather(-1, g.chosen[:, None])[:, 0]).backward()  # type: ignore[no-untyped-call]
    return entropies


def trl_of(g: Given) -> Tensor | None:
    from trl.trainer.utils import selective_log_softmax_and_entropy  # type: ignore[import-not-found]

    logprobs, entropies = selective_log_softmax_and_entropy(
        g.rows(g.logits), g.rows(g.chosen), entropy_requires_grad=False)
    g.loss(logprobs.view(-1)).backward()  # type: ignore[no-untyped-call]
    return Tensor(entropies.reshape(-1))


def verl_of(g: Given) -> Tensor | None:
    from verl.utils.torch_functional import (  # type: ignore[import-not-found]
        entropy_from_logits_with_chunking,
        logprobs_from_logits,
    )

    g.loss(logprobs_from_logits(g.rows(g.logits), g.rows(g.chosen)).view(-1)).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return Tensor(entropy_from_logits_with_chunking(g.logits))


QUESTIONS: Mapping[Question, Mapping[str, Candidate]] = {
    "hidden": {"ours, one pass": one_pass, "ours, two passes": two_passes, "naive": naive, "TRL": trl, "verl": verl,
               "Liger, eager": liger, "compiled cut-cross-entropy": compiled_cce, "three products": three_products},
    "logits": {"ours, in place": in_place, "naive": lambda g: naive_of(g.logits, g), "TRL": trl_of, "verl": verl_of}}
NEEDS: Mapping[str, str] = {"TRL": "trl", "verl": "verl", "Liger, eager": "liger_kernel",
                            "compiled cut-cross-entropy": "cut_cross_entropy"}
WITHOUT_RESULTS = "three products"


# ---- what a process measures


@dataclass(frozen=True)
class Case:
    question: Question
    name: str

    @property
    def run(self) -> Candidate:
        return QUESTIONS[self.question][self.name]

    @property
    def absent(self) -> bool:
        return self.name in NEEDS and importlib.util.find_spec(NEEDS[self.name]) is None


def fresh(g: Given, logits: Tensor | None = None) -> None:
    """No gradients, and the logits that a call may have used up."""
    g.hidden.grad = g.weight.grad = g.logits.grad = None
    if logits is not None:
        g.logits.data.copy_(logits)


def results(g: Given, entropies: Tensor | None) -> dict[str, Tensor]:
    """Gradients, of the large ones some rows."""
    found = {"hidden": g.hidden.grad, "weight": None if g.weight.grad is None else g.weight.grad[:1024],
             "logits": None if g.logits.grad is None else g.logits.grad[::64], "entropy": entropies}
    return {name: x.detach().clone() for name, x in found.items() if x is not None}


def peak_of_one_call(case: Case) -> dict[str, list[float]]:
    """MiB; a call on small inputs comes before, so that nothing is imported in the one that counts."""
    case.run(given(case.question, 64, 512))
    g = given(case.question, FOR_MEMORY)
    return {"MiB": [extra_peak(lambda: case.run(g))]}


def seconds_of_calls(case: Case, expected: str, calls: int) -> dict[str, list[float]]:
    """CPU seconds of each call; the one before them is compared with `expected` and not counted."""
    g = given(case.question, FOR_TIME)
    logits = g.logits.detach().clone() if case.question == "logits" else None
    found = results(g, case.run(g))
    if case.name != WITHOUT_RESULTS:
        reference = torch.load(expected)
        assert found.keys() | {"entropy"} == reference.keys(), (case, sorted(found))
        for name, x in found.items():
            scale = float(reference[name].abs().max())
            torch.testing.assert_close(x, reference[name], rtol=0, atol=1e-4 * scale, msg=lambda m: f"{case}: {m}")
    taken = []
    for _ in range(calls):
        fresh(g, logits)
        start = time.process_time()
        entropies = case.run(g)
        taken.append(time.process_time() - start)
        del entropies
    return {"s": taken}


def measure(cases: list[Case], rounds: int, calls: int) -> dict[Case, dict[str, float]]:
    """Medians of each case; the cases take turns."""
    taken: dict[Case, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        expected = {case.question: f"{folder}/{case.question}.pt" for case in cases}
        for question, path in expected.items():
            g = given(question, FOR_TIME)
            torch.save(results(g, QUESTIONS[question]["naive"](g)), path)
            del g
        for _ in range(rounds):
            for case in cases:
                where = expected[case.question]
                arguments = ["--case", case.question, case.name]
                measured = {
                    **in_a_process(__file__, [*arguments, "--memory"], ONE_THREAD),
                    **in_a_process(__file__, [*arguments, "--expected", where, "--calls", str(calls)],
                                   {**ONE_THREAD, **KEEP_FREED})}
                for name, numbers in measured.items():
                    taken.setdefault(case, {}).setdefault(name, []).extend(numbers)
    return {case: medians(numbers) for case, numbers in taken.items()}


def table(cases: list[Case], medians: Mapping[Case, Mapping[str, float]]) -> Iterator[str]:
    """Rows of the table; ratios are a peer's over the first of ours."""
    yield f"{'question':9s} {'candidate':28s} {'extra MiB':>9s} {'CPU s':>7s}   over ours: {'MiB':>6s} {'CPU s':>6s}"
    for case in cases:
        head = f"{case.question:9s} {case.name:28s} "
        if case not in medians:
            yield head + "not measured"
            continue
        mine, ours = medians[case], medians[Case(case.question, next(iter(QUESTIONS[case.question])))]
        yield head + (f"{mine['MiB']:9.0f} {mine['s']:7.3f}              {mine['MiB'] / ours['MiB']:6.2f} "
                      f"{mine['s'] / ours['s']:6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=2)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--expected", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    given_ = parser.parse_args()
    torch.set_num_threads(1)
    if given_.case:
        case = Case(*given_.case)
        print(json.dumps(peak_of_one_call(case) if given_.memory
                         else seconds_of_calls(case, given_.expected, given_.calls)))
        return
    cases = [Case(question, name) for question in given_.questions for name in QUESTIONS[question]]
    medians = measure([case for case in cases if not case.absent], given_.rounds, given_.calls)
    print(f"H = {H}, V = {V}, float32, one thread; memory at N = {FOR_MEMORY}, time at N = {FOR_TIME}")
    print("\n".join(table(cases, medians)))


if __name__ == "__main__":
    main()
