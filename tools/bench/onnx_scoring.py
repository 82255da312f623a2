"""Log-probs of given answers by a reference in ONNX Runtime, beside one in torch, with the same weights.

16 answers of 192 tokens to prompts of 64, each its own or one for groups of 8; and one text of 4,096 tokens, of which
the last 64 are scored. A Llama of 7.1 M parameters in float32. Log-probs are asserted equal to 1e-4 first. Shown are
CPU milliseconds of the process on one thread, also those to read the model from its folder and to take other weights;
each candidate is a process of its own, candidates take turns, and numbers are medians over all calls of all rounds.

    python tools/bench/onnx_scoring.py [--rounds 3] [--calls 3]

Prediction, after one trial of the first case on another shape, where ONNX Runtime took 0.55 of torch's time: the same
here, 0.75 where prompts are shared, which torch computes once and ONNX Runtime for each answer, and 0.7 of the long
text. Other weights: 2 ms for both, a copy.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from posttrain.data import Prompt, Rollouts, offsets_of, to_numpy
from posttrain.protocols import LoadRequest, Output, Scorer
from posttrain_backends.onnx import Onnx
from posttrain_backends.torch_native import Torch
from processes import in_rounds
from rollout import MEDIUM, decoder

CASES: Mapping[str, tuple[int, int, int, int]] = {
    "own prompts": (16, 1, 64, 192), "shared prompts": (2, 8, 64, 192), "a long text": (1, 1, 4032, 64)}
"""Prompts, answers to each, tokens of a prompt and of an answer."""
CANDIDATES: Mapping[str, Callable[[str], Torch | Onnx]] = {
    "torch": lambda folder: Torch(weights=folder, device="cpu"), "onnx": lambda folder: Onnx(weights=folder)}


def rollouts(prompts: int, answers: int, asked: int, new: int) -> Rollouts:
    rng, E, T = np.random.default_rng(0), prompts * answers, asked + new
    texts = np.repeat(rng.integers(0, MEDIUM.vocab_size, (prompts, asked)), answers, axis=0)
    tokens = np.concatenate([texts, rng.integers(0, MEDIUM.vocab_size, (E, new))], axis=1)
    return Rollouts(
        tokens=tokens.ravel().astype(np.int32), offsets=offsets_of(np.full(E, T)), episode=np.arange(E),
        is_action=np.tile(np.arange(T) >= asked, E), group=np.arange(E) // answers, finish=np.zeros(E, np.int8),
        terminated=np.ones(E, bool), prompts=(Prompt(text="x"),) * E, completions=("",) * E)


def logprobs(model: Scorer, case: str) -> np.ndarray:
    found: np.ndarray = model.score(rollouts(*CASES[case]), frozenset({Output.LOGPROBS}), 1.0).logprobs
    return found


def milliseconds(call: Callable[[], object]) -> float:
    """CPU time of the process."""
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def measured(name: str, calls: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        decoder(MEDIUM).save(Path(folder))
        torch_model = CANDIDATES["torch"](folder).load(LoadRequest(0, threads=1))
        load = lambda: CANDIDATES[name](folder).load(LoadRequest(0, threads=1))
        model = load()
        taken = {"read": [milliseconds(load) for _ in range(calls)]}
    weights = [(n, np.array(to_numpy(x))) for n, x in torch_model.params()]
    for case in CASES:
        np.testing.assert_allclose(logprobs(model, case), logprobs(torch_model, case), rtol=0, atol=1e-4)
        taken[case] = [milliseconds(lambda case=case: logprobs(model, case)) for _ in range(calls)]
    taken["other weights"] = [milliseconds(lambda: model.load_params(weights, 1)) for _ in range(calls)]
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--case", choices=CANDIDATES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.case:
        print(json.dumps(measured(given.case, given.calls)))
        return
    found = in_rounds(__file__, CANDIDATES, given.rounds, given.calls)
    print(f"{'CPU ms':16s}" + "".join(f"{name:>10s}" for name in found) + f"{'ratio':>8s}")
    for key, of_torch in found["torch"].items():
        print(f"{key:16s}{of_torch:10.1f}{found['onnx'][key]:10.1f}{found['onnx'][key] / of_torch:8.2f}")


if __name__ == "__main__":
    main()
