"""A model in float32, 8 and 4 bits: what it takes on disk and in memory, how fast it draws, and what it still knows.

Sizes and speed are of a random Llama (`--hidden`, 6 layers, a tied embedding of 2,048 tokens, which stays in float32;
16 answers of 64 tokens at once). Resident memory is what the process grows by where it loads that model from the folder
that this form of it was saved to, and by its first answers; a tiny model of the same form was loaded and drawn from
before, so that libraries are imported and set up; trimmed is what is left of it where the C library gives back what it
keeps of freed blocks. Log-prob error is that of answers which the demo's trained model
draws from its held-out problems, greedy accuracy is on the same problems. Each form has a process of its own for memory
and one for the rest. That it reads back bit for bit is asserted, and that it draws what it scores where layers do not
round what they read; where they do, the gap is told.

Predicted, on a CPU: on disk 0.3 of float32 in 8 bits and 0.2 in 4 (the embedding is what is left), as many tokens per
second with int8_weight_only, 0.85 with int8, 0.75 with nf4 and 0.6 with int8_dynamic (there is no arithmetic in 8 or 4
bits that eager torch would use for few rows); log-probs off by up to 0.05 in 8 bits and 0.5 in 4; accuracy the same
within a point in 8 bits, up to 10 points lost in 4.

    python tools/bench/quantised.py [--hidden 512] [--problems 2000] [--demo FOLDER]

Without `--demo`, a folder of weights, the demo is trained first (two minutes on an idle machine).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from addition_runs import ADDITION, ROOT, Task, train_all, write_data
from posttrain.data import Prompt, Sampling
from posttrain.protocols import LoadRequest, Output
from posttrain.tokenizers import Characters
from processes import resident

FORMS = (None, "int8", "int8_weight_only", "int8_dynamic", "nf4", "int4")
ROUNDS_WHAT_IT_READS = frozenset({"int8", "int8_dynamic"})
EXACT = 1e-3
"""Bound of log-probs drawn against scored, where layers do not."""
VOCABULARY = 2048
TOKENIZER = Characters("0123456789+=")
DRAWN, ANSWERS = 64, 16


class Row(NamedTuple):
    """What was measured of one form."""

    disk: int
    weights: int
    """Bytes of all tensors."""
    speed: float
    """Tokens per CPU second."""
    gap: float
    """Largest |log-prob drawn - scored|."""
    largest: float
    mean: float
    """Of |log-prob - that of float32|."""
    accuracy: float


class Ids:
    """Token ids as they are: a tokenizer for a random model."""

    vocab_size, bos, eos, pad = VOCABULARY, None, 0, 0

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, tokens: Any) -> str:
        return ""


def load(folder: Path, form: str | None, vocabulary: int) -> Any:
    from posttrain_backends.hf import HF

    return HF(weights=str(folder), quantize=form, device="cpu").load(LoadRequest(vocabulary, threads=1))  # type: ignore[arg-type]  # a name of one


def random_prompts() -> list[Prompt]:
    return [Prompt(text=chr(300 + i) * 16, group=i) for i in range(ANSWERS)]


def sizes(folder: Path, form: str | None, saved: Path) -> tuple[int, int, float, float]:
    """Disk, tensors, tokens per second and the gap between drawn and scored of the random model, which is left in
    `saved` in this form."""
    from posttrain_backends.engines import Batched

    learner = load(folder, form, VOCABULARY)
    sampler = Batched().start(learner, Ids(), shared=True)  # type: ignore[arg-type]  # it draws, and reads no chat
    times = []
    for k in range(4):
        clock = time.process_time()
        drawn = sampler.rollout(random_prompts(), Sampling(max_new_tokens=DRAWN), (0, k))
        times.append((time.process_time() - clock) / int(drawn.is_action.sum()))
    scored = learner.score(drawn, frozenset({Output.LOGPROBS}), 1.0).logprobs
    gap = float(np.abs(scored - drawn.behavior_logprobs).max())
    assert form in ROUNDS_WHAT_IT_READS or gap < EXACT
    learner.save(saved)
    again = load(saved, None, VOCABULARY).score(drawn, frozenset({Output.LOGPROBS}), 1.0).logprobs
    assert np.array_equal(again, scored)
    return (saved / "model.safetensors").stat().st_size, held(learner.trunk.causal), 1 / min(times[1:]), gap


def memory(tiny: Path, saved: Path, form: str | None) -> tuple[float, float]:
    """MiB by which resident memory grows with the model of `saved`, which has this form, and what is left of that where
    the allocator gives back what it keeps of freed blocks. In a process of its own, in which a tiny model of the form
    was loaded and drawn from first."""
    import torch
    from posttrain_backends.engines import Batched

    torch.set_num_threads(1)
    grown = given_back = 0.0
    for folder, given in ((tiny, form), (saved, None)):
        gc.collect()
        before = resident("VmRSS")
        learner = load(folder, given, VOCABULARY)
        sampler = Batched().start(learner, Ids(), shared=True)  # type: ignore[arg-type]  # as in `sizes`
        sampler.rollout(random_prompts(), Sampling(max_new_tokens=2), (0, 0))
        gc.collect()
        grown = resident("VmRSS") - before
        ctypes.CDLL(None).malloc_trim(0)
        given_back = resident("VmRSS") - before
        del sampler, learner
    return grown, given_back


def held(causal: Any) -> int:
    """Bytes of the module's parameters, as they are kept."""
    from posttrain_backends._torch.quantised import kept, quantised

    layers = quantised(causal)
    inside = {f"{name}.weight" for name in layers}
    plain = sum(p.nbytes for name, p in causal.named_parameters() if name not in inside)
    return plain + sum(x.nbytes for layer in layers.values() for x in kept(layer))


def knowledge(demo: Path, form: str | None, problems: int) -> tuple[float, float, float]:
    """Largest and mean log-prob error, and the share of problems that are answered right."""
    from posttrain_backends.engines import Batched

    tokenizer = TOKENIZER.load()
    rows = [json.loads(line) for line in (ADDITION / "data" / "held_out.jsonl").read_text().splitlines()][:problems]
    prompts = [Prompt(text=row["prompt"], group=i) for i, row in enumerate(rows)]
    plain, model = (load(demo, f, tokenizer.vocab_size) for f in (None, form))
    drawn = Batched().start(plain, tokenizer, shared=True).rollout(prompts, Sampling(max_new_tokens=4), (0, 0))
    a, b = (m.score(drawn, frozenset({Output.LOGPROBS}), 1.0).logprobs for m in (plain, model))
    greedy = Batched().start(model, tokenizer, shared=True).rollout(
        prompts, Sampling(temperature=0.0, max_new_tokens=4), (0, 0))
    right = [answer == row["answer"] for answer, row in zip(greedy.completions, rows, strict=True)]
    return float(np.abs(a - b).max()), float(np.abs(a - b).mean()), sum(right) / len(right)


def measured(form: str | None, large: Path, saved: Path, demo: Path, problems: int) -> Row:
    """In a process of its own."""
    import torch

    torch.set_num_threads(1)
    return Row(*sizes(large, form, saved), *knowledge(demo, form, problems))


def random_model(folder: Path, hidden: int, layers: int) -> None:
    import torch
    from posttrain_backends._torch.quiet import import_quietly

    import_quietly("torchao")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
        eos_token_id=None, initializer_range=0.04)).save_pretrained(folder)


def trained_demo(folder: Path) -> Path:
    """The weights that the demo ends with."""
    write_data()
    warm, learned = folder / "sft", folder / "rl"
    train_all(1, [Task("sft.yaml", warm, [])])
    train_all(1, [Task("rl.yaml", learned, [f"policy.weights={warm / 'policy'}"])])
    return learned / "policy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--problems", type=int, default=2000)
    parser.add_argument("--demo", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    demo = options.demo or trained_demo(ROOT / "runs" / "quantised")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        tiny, large = Path(folder) / "tiny", Path(folder) / "large"
        pool.submit(random_model, tiny, 64, 2).result()
        pool.submit(random_model, large, options.hidden, 6).result()
        print("| weights | disk MiB | tensors MiB | resident MiB (trimmed) | tokens / CPU s | drawn - scored | "
              "log-prob error, largest (mean) | demo accuracy |\n|---|---:|---:|---:|---:|---:|---:|---:|")
        for form in FORMS:
            if form == "int4":  # its kernels are for CUDA alone
                print("| int4 (torchao, CUDA) | not measured | | | | | | |")
                continue
            saved = Path(folder) / (form or "float32")
            row = pool.submit(measured, form, large, saved, demo, options.problems).result()
            assert form is not None or row.largest == 0.0
            grown, trimmed = pool.submit(memory, tiny, saved, form).result()
            print(f"| {form or 'float32'} | {row.disk / 2**20:.1f} | {row.weights / 2**20:.1f} | {grown:.0f} "
                  f"({trimmed:.0f}) | {row.speed:,.0f} | {row.gap:.1e} | {row.largest:.3f} ({row.mean:.4f}) "
                  f"| {row.accuracy:.1%} |", flush=True)


if __name__ == "__main__":
    main()
