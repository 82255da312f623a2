"""Answers to groups of equal prompts: the engine `batched` beside transformers' `generate`, with the same weights.

`group`: 4 prompts of 512 tokens, 8 answers of 32 tokens to each, all at once. `refill`: 128 prompts of 64 tokens, 8
answers to each, 16 at a time, lognormal lengths of sigma 0.9 cut at nine medians, as answers of language models are.
`short`: 32 different prompts of 8 tokens, answers of 64, a smaller model. Llama-shaped, float32, temperature 1.

Ours decodes a native model, and the transformers module itself as the `hf` policy. Lengths follow a plan: for ours the
plan is in the random numbers of the episodes, which draw eos when their time has come (its logit is 0, so nothing else
does); a batch of `generate` runs to its longest answer and no further, as with eos, and spares itself to look for it.
Answers of `generate` are cut to the plan afterwards. Ours records log-probs too, `generate` does not.

Each candidate is a process of its own and candidates take turns; shown are medians over all calls of all rounds. Before
anything is timed its greedy answers are asserted equal to those of `generate` to the same prompts, and the lengths of
the drawn ones equal to the plan. Extra memory is the peak of resident memory in one call over what was resident before.
Busy is the share of rows x steps that decode a token which stays, the metric `rollout/busy` of a run.

    python tools/bench/rollout.py [--workloads group refill short] [--rounds 3] [--calls 3] [--parts]

`--parts` measures the parts of our decoding in `group` by themselves instead: CPU ms on one thread, best of all calls.

Prediction, written before the first run: `generate` reads the prompt 8 times, 0.2 s each; with that once, and 31 steps
of 32 rows of which each reads 2 MB of keys and values, ours takes 0.75 s of its 2.4: 3.2x, and a third of its memory,
as keys and values of a prompt are copied for each answer. One copy for 8 answers saves 60 of the 70 MB that a step
reads, 6 ms of perhaps 14: 4.5x, and 0.15 of the memory. `refill`: static batches are 30 % busy, ours 97 %: 3x by that
alone, 4x with it. The `hf` policy: 2.5x, as it keeps a copy for each answer and calls more.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from posttrain.data import Prompt, Sampling
from posttrain_backends._torch import generate
from posttrain_backends._torch.drawn import drawn_from
from posttrain_backends._torch.generate import TorchSampler
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.learner import TorchLearner
from posttrain_backends._torch.models.decoder import Decoder
from posttrain_backends._torch.models.interface import LanguageModel
from posttrain_backends._torch.sampling import sample
from posttrain_backends.engines import Batched, uniforms
from posttrain_backends.families.shape import Shape
from processes import ONE_THREAD, extra_peak, in_a_process, medians

MEDIUM = Shape(vocab_size=8192, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
               num_key_value_heads=4, head_dim=32, max_position_embeddings=4096)
SMALL = Shape(vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
              num_key_value_heads=4, head_dim=32, max_position_embeddings=4096)
EOS = 0


@dataclass(frozen=True)
class Workload:
    """What is asked of whom."""

    prompts: int
    answers: int
    """To each prompt."""
    prompt: int
    """Tokens of one."""
    new: int
    """Tokens of an answer, or their median where they are lognormal."""
    shape: Shape = MEDIUM
    slots: int = 0
    """Answers decoded at once; 0 is all."""
    lognormal: bool = False

    def plan(self) -> np.ndarray:
        """[E] tokens of each answer, eos included."""
        E = self.prompts * self.answers
        if not self.lognormal:
            return np.full(E, self.new)
        shape = np.minimum(np.random.default_rng(0).lognormal(sigma=0.9, size=E), 9.0)
        return np.asarray(np.maximum(1, np.rint(self.new * shape)), int)

    def ids(self) -> np.ndarray:
        """[E, prompt] the prompt of each answer; those of one prompt side by side."""
        ids = np.random.default_rng(0).integers(1, self.shape.vocab_size, (self.prompts, self.prompt))
        return ids.repeat(self.answers, axis=0)

    def batches(self, answers: int) -> list[slice]:
        """What `generate` is given one after the other."""
        return [slice(a, a + (self.slots or answers)) for a in range(0, answers, self.slots or answers)]


WORKLOADS: Mapping[str, Workload] = {
    "group": Workload(4, 8, 512, 32),
    "refill": Workload(128, 8, 64, 12, slots=16, lognormal=True),
    "short": Workload(32, 1, 8, 64, SMALL)}


def decoder(shape: Shape) -> Decoder:
    """Weights large enough that the likeliest token is so by far; the logit of eos is 0, far below it."""
    model = Decoder(shape, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.ndim == 2 else 1)
        model.output_weight[EOS] = 0
    return model


def llama(model: Decoder) -> Any:
    """The same weights in transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    s = model.shape
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=s.vocab_size, hidden_size=s.hidden_size, intermediate_size=s.intermediate_size,
        num_hidden_layers=s.num_hidden_layers, num_attention_heads=s.num_attention_heads,
        num_key_value_heads=s.num_key_value_heads, max_position_embeddings=s.max_position_embeddings,
        rms_norm_eps=s.rms_norm_eps, bos_token_id=None, eos_token_id=None, pad_token_id=0)).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    return theirs


# ---- candidates


@dataclass(frozen=True)
class Answered:
    """The tokens of each answer, and the share of rows x steps that decoded one of them."""

    tokens: Sequence[np.ndarray]
    busy: float


Candidate = Callable[[Workload, Decoder], Callable[[np.ndarray, np.ndarray, bool], Answered]]
"""Made ready with a model: prompts [E, P], lengths [E], whether to take the likeliest tokens -> answers."""


@dataclass(frozen=True)
class Ids:
    """A tokenizer for prompts that are ids already."""

    vocab_size: int
    bos: int | None = None
    eos: int = EOS
    pad: int = 0

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self.encode(messages[-1]["content"])


def ours(policy: Callable[[Decoder], LanguageModel], work: Workload,
         model: Decoder) -> Callable[[np.ndarray, np.ndarray, bool], Answered]:
    learner = TorchLearner(policy(model))
    sampler = TorchSampler(drawn_from(learner, shared=True), Ids(work.shape.vocab_size), Batched(slots=work.slots),
                           learner.version)

    def answers(ids: np.ndarray, lengths: np.ndarray, greedy: bool) -> Answered:
        def planned(seed: Sequence[int], episode: int, count: int) -> np.ndarray:
            """What draws any token but eos, which comes first in the vocabulary, and in the end that."""
            u = 0.01 + 0.99 * uniforms(seed, episode, count)
            u[lengths[episode] - 1] = 0
            return u

        prompts = [Prompt(tokens=tuple(row)) for row in ids.tolist()]
        sampling = Sampling(temperature=0.0 if greedy else 1.0, max_new_tokens=int(lengths.max()))
        with mock.patch.object(generate, "uniforms", planned):
            found = sampler.rollout(prompts, sampling, (0,))
        used = sampler.usage
        return Answered(np.split(found.tokens[found.source], np.cumsum(found.episode_actions)[:-1]),
                        used.decoded / max(1, used.slots * used.steps))

    return answers


def as_hf_policy(model: Decoder) -> LanguageModel:
    from posttrain_backends._torch.models.hf import cached_or_not

    return cached_or_not(llama(model), "float32", gradient_checkpointing=False)


def transformers(copies: bool, work: Workload,
                 model: Decoder) -> Callable[[np.ndarray, np.ndarray, bool], Answered]:
    """`generate` on a row for each answer, or told the number of answers to each prompt."""
    theirs = llama(model)

    def answers(ids: np.ndarray, lengths: np.ndarray, greedy: bool) -> Answered:
        tokens: list[np.ndarray] = []
        for batch in work.batches(len(ids)):
            rows, own = torch.from_numpy(ids[batch]), lengths[batch]
            rows = rows if copies else rows[::work.answers]
            drawn: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0}
            n = 1 if copies else work.answers
            rows = rows.repeat_interleave(n, 0) if greedy and not copies else rows  # several greedy answers are refused
            made = theirs.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=int(own.max()),
                                   num_return_sequences=1 if greedy else n, **drawn)
            tokens += [row[:length] for row, length in zip(made[:, ids.shape[1]:].numpy(), own, strict=True)]
        steps = sum((int(lengths[batch].max()) - 1) * len(lengths[batch]) for batch in work.batches(len(ids)))
        return Answered(tokens, float((lengths - 1).sum() / max(1, steps)))

    return answers


CANDIDATES: Mapping[str, Candidate] = {
    "ours, native": partial(ours, lambda model: model), "ours, hf policy": partial(ours, as_hf_policy),
    "transformers, a row an answer": partial(transformers, True),
    "transformers, n answers a row": partial(transformers, False)}
PEER = "transformers, a row an answer"


# ---- what a process measures


@dataclass(frozen=True)
class Case:
    """One candidate at one workload."""

    workload: str
    name: str

    def ready(self) -> tuple[Workload, Callable[[bool], Answered]]:
        """A call that answers greedily or not. Its first greedy answers are compared with transformers', and its drawn
        ones with the plan, before it is returned."""
        work = WORKLOADS[self.workload]
        model, ids, plan = decoder(work.shape), work.ids(), work.plan()
        answer = CANDIDATES[self.name](work, model)
        some = slice(0, 2 * (work.slots or len(ids)))
        expected = transformers(True, work, model)(ids[some], np.full_like(plan[some], 24), True).tokens
        greedy = answer(ids[some], np.full_like(plan[some], 24), True).tokens
        np.testing.assert_array_equal(np.stack(greedy), np.stack(expected), err_msg=str(self))
        drawn = answer(ids, plan, False).tokens
        np.testing.assert_array_equal([len(x) for x in drawn], plan, err_msg=str(self))
        return work, lambda greedy: answer(ids, plan, greedy)


def seconds_of_calls(case: Case, calls: int) -> dict[str, list[float]]:
    """Of the process on one thread, wall seconds on more."""
    _, answer = case.ready()
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    taken = []
    for _ in range(calls):
        start = clock()
        answer(False)
        taken.append(clock() - start)
    return {"cpu" if torch.get_num_threads() == 1 else "wall": taken}


def peak_of_one_call(case: Case) -> dict[str, list[float]]:
    """MiB and the busy share; short answers to a short prompt come before, so that nothing is imported in the call that
    counts."""
    work = WORKLOADS[case.workload]
    answer, ids, plan = CANDIDATES[case.name](work, decoder(work.shape)), work.ids(), work.plan()
    answer(ids[:, :4], np.full_like(plan, 2), False)
    busy: list[float] = []
    return {"MiB": [extra_peak(lambda: busy.append(answer(ids, plan, False).busy))], "busy": busy}


def measure(cases: Sequence[Case], rounds: int, calls: int) -> dict[Case, dict[str, float]]:
    """Medians of each case; the cases take turns."""
    taken: dict[Case, dict[str, list[float]]] = {case: {} for case in cases}
    for _ in range(rounds):
        for case in cases:
            for threads in ("0", "1", "2"):
                measured = in_a_process(
                    __file__, ["--case", case.workload, case.name, "--threads", threads, "--calls", str(calls)],
                    {**ONE_THREAD, "OMP_NUM_THREADS": threads} if threads != "0" else ONE_THREAD)
                print(case, measured, file=sys.stderr, flush=True)
                for name, numbers in measured.items():
                    taken[case].setdefault(name, []).extend(numbers)
    return {case: medians(numbers) for case, numbers in taken.items()}


def table(cases: Sequence[Case], found: Mapping[Case, Mapping[str, float]]) -> Iterator[str]:
    """Rows of the table; ratios are the peer's numbers over the row's."""
    columns = ("cpu", "wall", "MiB")
    yield (f"{'workload':9s} {'candidate':30s} {'CPU s, 1':>9s} {'wall s, 2':>9s} {'extra MiB':>9s} {'busy':>6s}"
           f"   {PEER!r} over it: {'CPU':>5s} {'wall':>5s} {'MiB':>5s}")
    for case in cases:
        head = f"{case.workload:9s} {case.name:30s} "
        if case not in found:
            yield head + "not measured"
            continue
        mine, peer = found[case], found.get(Case(case.workload, PEER))
        row = head + f"{mine['cpu']:9.3f} {mine['wall']:9.3f} {mine['MiB']:9.0f} {mine['busy']:6.1%}"
        if peer is not None and case.name != PEER:
            row += f"{'':{len(repr(PEER)) + 12}s}" + " ".join(f"{peer[name] / mine[name]:5.2f}" for name in columns)
        yield row


# ---- parts


@torch.inference_mode()
def parts(calls: int) -> Iterator[str]:
    """CPU ms on one thread of what a rollout of `group` is made of, each alone."""
    work = WORKLOADS["group"]
    model, ids, E = decoder(work.shape), work.ids(), work.prompts * work.answers
    flat = torch.from_numpy(ids[::work.answers]).flatten()
    layout = Layout.from_offsets(np.arange(0, len(flat) + 1, work.prompt))
    hidden = torch.randn(E, work.shape.hidden_size)
    logits, u = F.linear(hidden, model.output_weight), torch.from_numpy(np.random.default_rng(0).random(E))
    settings = {"sampling": Sampling(), "sampling, top_p 0.9": Sampling(top_p=0.9),
                "sampling, top_k 50": Sampling(top_k=50), "sampling, min_p 0.05": Sampling(min_p=0.05)}
    done: dict[str, tuple[int, Callable[[], object]]] = {
        "prompts": (1, lambda: model.prefill(flat, layout)),
        "output matrix": (work.new, lambda: F.linear(hidden, model.output_weight)),
        **{name: (work.new, partial(sample, logits, setting, u)) for name, setting in settings.items()}}
    for name, (times, call) in done.items():
        yield f"{name:24s} {1e3 * times * best_of(call, calls):8.1f}"


def best_of(call: Callable[[], object], calls: int) -> float:
    """CPU seconds."""
    taken = []
    for _ in range(calls + 1):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return min(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(max(1, given.threads))
    if given.parts:
        print("\n".join(parts(given.calls)))
        return
    if given.case:
        case = Case(*given.case)
        print(json.dumps(seconds_of_calls(case, given.calls) if given.threads else peak_of_one_call(case)))
        return
    cases = [Case(workload, name) for workload in given.workloads for name in given.candidates]
    here = [case for case in cases if case.name == "ours, native" or importlib.util.find_spec("transformers")]
    print("\n".join(table(cases, measure(here, given.rounds, given.calls))))


if __name__ == "__main__":
    main()
