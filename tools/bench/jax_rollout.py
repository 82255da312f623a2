"""Answers drawn in JAX beside those of our torch engine, with the same weights: the workloads of `rollout.py`.

Lengths follow the plan of `rollout.py`, by the random numbers of the episodes. Each candidate is a process of its own
and candidates take turns; shown are medians over all calls of all rounds, on one thread. Before anything is timed the
greedy answers of both are asserted equal, and the lengths of the drawn ones equal to the plan. `first` is the first
call less a later one: what compiling costs.

    python tools/bench/jax_rollout.py [--workloads group refill short] [--rounds 3] [--calls 3]

Prediction, written before the first run: one compiled step has none of torch's small operations, but goes through all
columns of the cache and not only those in use, and its matrix products are no better. `short`, where small operations
count most: 1.2x of torch. `group`: the prompt is held once on both sides, 0.9x. `refill`: the host takes over whenever
a row ends, with 16 rows nearly each step, and the keys of new prompts are put in place by a pass over all: 0.6x.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from unittest import mock

import jax
import numpy as np
import torch
from posttrain.data import Prompt, Sampling
from posttrain.protocols import Sampler
from posttrain_backends._jax import generate as in_jax
from posttrain_backends._jax.decoder import Decoder
from posttrain_backends._jax.generate import JaxSampler
from posttrain_backends._jax.model import Structure
from posttrain_backends._torch import generate as in_torch
from posttrain_backends._torch.generate import TorchSampler
from posttrain_backends._torch.learner import TorchLearner
from posttrain_backends.engines import Batched, uniforms
from processes import ONE_THREAD, in_a_process, medians
from rollout import WORKLOADS, Ids, Workload, decoder

XLA_ON_ONE_THREAD = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}
CANDIDATES = ("torch", "JAX")


def sampler(name: str, work: Workload) -> Sampler:
    model, engine, tokenizer = decoder(work.shape), Batched(slots=work.slots), Ids(work.shape.vocab_size)
    if name == "torch":
        return TorchSampler(TorchLearner(model), tokenizer, engine, shared=True)
    weights = {key: jax.numpy.asarray(x.numpy()) for key, x in model.state_dict().items()}
    return JaxSampler(Structure.of(lambda: Decoder(work.shape)), lambda: weights, 0, tokenizer, engine, shared=True)


def answers(started: Sampler, ids: np.ndarray, lengths: np.ndarray, *, greedy: bool) -> Sequence[np.ndarray]:
    """Tokens of each answer; drawn ones end at their length, by random numbers that draw eos there and only there."""
    def planned(seed: Sequence[int], episode: int, count: int) -> np.ndarray:
        u = 0.01 + 0.99 * uniforms(seed, episode, count)
        u[lengths[episode] - 1] = 0
        return u

    prompts = [Prompt(tokens=tuple(row)) for row in ids.tolist()]
    sampling = Sampling(temperature=0.0 if greedy else 1.0, max_new_tokens=int(lengths.max()))
    with mock.patch.object(in_torch, "uniforms", planned), mock.patch.object(in_jax, "uniforms", planned):
        found = started.rollout(prompts, sampling, (0,))
    return np.split(found.tokens[found.source], np.cumsum(found.episode_actions)[:-1])


def checked(name: str, work: Workload) -> Callable[[], object]:
    """A call that draws the workload, after the comparison."""
    started, ids, plan = sampler(name, work), work.ids(), work.plan()
    some = slice(0, 2 * (work.slots or len(ids)))
    short = np.full_like(plan[some], 24)
    greedy = [answers(x, ids[some], short, greedy=True) for x in (started, sampler("torch", work))]
    np.testing.assert_array_equal(np.stack(greedy[0]), np.stack(greedy[1]), err_msg=f"{name} is not torch")
    return lambda: np.testing.assert_array_equal([len(x) for x in answers(started, ids, plan, greedy=False)], plan)


def seconds_of(name: str, workload: str, calls: int) -> dict[str, list[float]]:
    call, taken = checked(name, WORKLOADS[workload]), []
    for _ in range(calls + 1):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return {"cpu": taken[1:], "first": [taken[0] - min(taken[1:])]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.case:
        print(json.dumps(seconds_of(*given.case, given.calls)))
        return
    print(f"{'workload':9s} {'candidate':9s} {'CPU s':>8s} {'first':>8s} {'tokens/CPU s':>13s} {'torch / it':>11s}")
    for workload in given.workloads:
        found: dict[str, dict[str, list[float]]] = {name: {} for name in CANDIDATES}
        for _ in range(given.rounds):
            for name in CANDIDATES:
                one = in_a_process(__file__, ["--case", name, workload, "--calls", str(given.calls)],
                                   {**ONE_THREAD, **XLA_ON_ONE_THREAD, "JAX_PLATFORMS": "cpu"})
                for key, numbers in one.items():
                    found[name].setdefault(key, []).extend(numbers)
        tokens, middle = int(WORKLOADS[workload].plan().sum()), {name: medians(x) for name, x in found.items()}
        for name, x in middle.items():
            print(f"{workload:9s} {name:9s} {x['cpu']:8.3f} {x['first']:8.2f} {tokens / x['cpu']:13.0f} "
                  f"{middle['torch']['cpu'] / x['cpu']:11.2f}")


if __name__ == "__main__":
    main()
