"""Answers drawn in ONNX Runtime beside the engine `batched` and transformers' `generate`, with the same weights.

1, 8 and 32 prompts of 8 tokens, 64 greedy tokens to each, by a Llama of 7.1 M parameters in float32; and what it takes
to give each engine other weights and draw a token from them. Greedy tokens are asserted equal to those of `generate`
first, but for engines whose weights are rounded; gap is how far the log-probs that an engine records of drawn tokens
are from the policy's, in the mean. Each candidate is a process of its own, on one thread, and candidates take turns;
shown are medians over all calls of all rounds, in CPU seconds of the process.

    python tools/bench/onnx_runtime.py [--rounds 3] [--calls 5] [--candidates "onnx" "batched" ...]

Prediction, written before the first run: `generate` spends most of a step at 1 row in Python, some 3.5 ms beside
0.7 ms of products; `onnx` takes 1.2 ms: 3x. At 32 rows products are most of it, 4 ms of 7, and ONNX Runtime's are no
faster than torch's: 1.7x. `batched` is between the two, 2x and 1.5x. Weights as inputs are packed in each call: half
the speed of constants at 1 row, 0.9 of it at 32. int8 reads a quarter of the layers' bytes and int4 an eighth, but the
output matrix, 40 % of the products here, stays in float32: 1.2x of `onnx`. Other weights: 5 ms for inputs, 40 ms for
constants, 60 ms rounded. (The output matrix was put in int8 after it: 1.3 to 1.4x at an equal gap.)
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from posttrain.data import Prompt, Sampling
from posttrain.protocols import Output, Sampler
from posttrain_backends._torch.learner import TorchLearner
from posttrain_backends._torch.models.decoder import Decoder
from posttrain_backends.engines import Batched
from posttrain_backends.onnx_engine import OnnxEngine
from processes import in_rounds
from rollout import MEDIUM, Ids, decoder, llama

PROMPT, NEW, BATCHES = 8, 64, (1, 8, 32)
PEER = "transformers"
ENGINES: Mapping[str, OnnxEngine | Batched] = {
    "batched": Batched(), "onnx": OnnxEngine(), "onnx, inputs": OnnxEngine(weights="inputs"),
    "onnx, int8": OnnxEngine(quantize="int8"), "onnx, int4": OnnxEngine(quantize="int4")}
CANDIDATES = (PEER, *ENGINES)
Answer = Callable[[np.ndarray], np.ndarray]
"""Prompts [B, P] -> greedy tokens [B, NEW]."""


@dataclass(frozen=True)
class Ours:
    """A started engine, not shared, so that it takes weights by `sync`."""

    learner: TorchLearner
    sampler: Sampler

    @classmethod
    def of(cls, name: str) -> Ours:
        learner = TorchLearner(decoder(MEDIUM))
        never = Ids(MEDIUM.vocab_size, eos=MEDIUM.vocab_size)
        return cls(learner, ENGINES[name].start(learner, never, shared=False))

    def answer(self, ids: np.ndarray) -> np.ndarray:
        prompts = [Prompt(tokens=tuple(row)) for row in ids.tolist()]
        found = self.sampler.rollout(prompts, Sampling(temperature=0.0, max_new_tokens=NEW), (0,))
        return found.tokens[found.source].reshape(len(ids), NEW)

    def gap(self) -> float:
        """In nats, at temperature 1."""
        found = self.sampler.rollout([Prompt(tokens=tuple(row)) for row in prompts(8).tolist()],
                                     Sampling(max_new_tokens=NEW), (0,))
        scored = self.learner.score(found, frozenset({Output.LOGPROBS}), 1.0)
        assert found.behavior_logprobs is not None and scored.logprobs is not None
        return float(np.abs(found.behavior_logprobs - scored.logprobs).mean())

    @torch.no_grad()
    def change(self) -> None:
        """Other weights by a hair, so that none of them is taken for the old ones."""
        for p in self.learner.model.module.parameters():
            p.mul_(1 + 2**-20)

    def refresh(self) -> None:
        """Take the policy's weights and draw one token: a session is made where it is first used."""
        self.sampler.sync(self.learner.params(), 1)
        self.sampler.rollout([Prompt(tokens=(1,))], Sampling(max_new_tokens=1), (0,))


def generate(model: Decoder) -> Answer:
    theirs: Any = llama(model)

    def answer(ids: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(ids)
        made: Any = theirs.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=NEW, do_sample=False)
        tokens: np.ndarray = made[:, ids.shape[1]:].numpy()
        return tokens

    return answer


def prompts(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(1, MEDIUM.vocab_size, (batch, PROMPT))


def measured(name: str, calls: int) -> dict[str, list[float]]:
    """CPU seconds of each call and of each refresh, and the gap."""
    expected = generate(decoder(MEDIUM))
    ours = None if name == PEER else Ours.of(name)
    answer = expected if ours is None else ours.answer
    taken: dict[str, list[float]] = {}
    for batch in BATCHES:
        ids = prompts(batch)
        found = answer(ids)
        if name == PEER or not ENGINES[name].approximates:
            np.testing.assert_array_equal(found, expected(ids), err_msg=f"{name} at {batch}")
        taken[f"cpu {batch}"] = [seconds(partial(answer, ids)) for _ in range(calls)]
    if ours is not None:
        taken["gap"], taken["refresh"] = [ours.gap()], []
        for _ in range(calls):
            ours.change()
            taken["refresh"].append(seconds(ours.refresh))
    return taken


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of the process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def table(found: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Tokens per CPU second, times those of `generate`; milliseconds for other weights; nats."""
    head = "".join(f"{f'tok/CPU-s, B={b}':>18s}{'x':>6s}" for b in BATCHES)
    yield f"{'candidate':16s}{head}{'refresh ms':>12s}{'gap':>10s}"
    for name, row in found.items():
        cells = ""
        for b in BATCHES:
            times = found[PEER][f"cpu {b}"] / row[f"cpu {b}"] if PEER in found else float("nan")
            cells += f"{b * NEW / row[f'cpu {b}']:18.0f}{times:6.2f}"
        yield f"{name:16s}{cells}" + (f"{1e3 * row['refresh']:12.1f}{row['gap']:10.1e}" if "gap" in row else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.case:
        print(json.dumps(measured(given.case, given.calls)))
        return
    print("\n".join(table(in_rounds(__file__, given.candidates, given.rounds, given.calls))))


if __name__ == "__main__":
    main()
