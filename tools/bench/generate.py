"""Tokens per second of the engine `batched` on a small Llama-shaped model, where the time goes, and transformers.

Each case is the best of several runs: on one thread in CPU seconds of the process, which a busy machine disturbs least,
on several in wall seconds.

    python tools/bench/generate.py [--threads 1 2] [--prompt 8] [--new 64] [--repeats 5]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from posttrain.data import Prompt, Sampling
from posttrain_backends._torch.generate import TorchSampler
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.learner import TorchLearner
from posttrain_backends._torch.models.decoder import Decoder
from posttrain_backends._torch.models.shape import Shape
from posttrain_backends._torch.sampling import sample
from posttrain_backends.engines import Batched

ROWS = 32
SHAPE = Shape(vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
              num_key_value_heads=4, head_dim=32, max_position_embeddings=4096)


@dataclass(frozen=True)
class Ids:
    """A tokenizer for prompts that are ids already; its eos is outside the vocabulary, so every answer is full."""

    vocab_size: int = SHAPE.vocab_size
    bos: int | None = None
    eos: int = SHAPE.vocab_size
    pad: int = 0

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self.encode(messages[-1]["content"])


@dataclass(frozen=True)
class Bench:
    """ROWS answers of `new` tokens to prompts of `prompt` tokens."""

    prompt: int
    new: int
    repeats: int

    def prompts(self, distinct: int, answers: int = ROWS) -> list[Prompt]:
        """`answers` prompts, `distinct` of them different, equal ones side by side."""
        ids = np.random.default_rng(0).integers(0, SHAPE.vocab_size, (distinct, self.prompt)).tolist()
        return [Prompt(tokens=tuple(ids[i * distinct // answers]), group=i * distinct // answers)
                for i in range(answers)]

    def seconds(self, run: Callable[[], object]) -> float:
        """Best of `repeats` runs after one to warm up."""
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        run()
        times = []
        for _ in range(self.repeats):
            start = clock()
            run()
            times.append(clock() - start)
        return min(times)

    def engine(self, model: Decoder) -> dict[str, float]:
        """Seconds per generated token, by case."""
        learner, plain = TorchLearner(model), Sampling(max_new_tokens=self.new)
        whole = TorchSampler(learner, Ids(), Batched(), shared=True)
        refilled = TorchSampler(learner, Ids(), Batched(slots=ROWS), shared=True)
        shared = self.prompts(4)
        cases: dict[str, Callable[[], object]] = {
            "32 prompts": partial(whole.rollout, self.prompts(ROWS), plain, (0,)),
            "4 prompts x 8 answers": partial(whole.rollout, shared, plain, (0,)),
            "16 prompts x 8 answers, 32 slots": partial(refilled.rollout, self.prompts(16, 4 * ROWS), plain, (0,)),
            "4 x 8, top_p 0.9": partial(whole.rollout, shared, replace(plain, top_p=0.9), (0,)),
            "4 x 8, top_k 50": partial(whole.rollout, shared, replace(plain, top_k=50), (0,)),
            "4 x 8, min_p 0.05": partial(whole.rollout, shared, replace(plain, min_p=0.05), (0,)),
            "4 x 8, a stop string": partial(whole.rollout, shared, replace(plain, stop=("never",)), (0,)),
        }
        return {name: self.seconds(run) / self.new / (4 * ROWS if "slots" in name else ROWS)
                for name, run in cases.items()}

    def parts(self, model: Decoder) -> dict[str, float]:
        """Seconds of the parts of a run on 32 prompts, each alone."""
        hidden = torch.randn(ROWS, SHAPE.hidden_size)
        logits = (hidden @ model.output_weight.t()).detach()
        u = torch.from_numpy(np.random.default_rng(0).random(ROWS))
        ids = torch.tensor([p.tokens for p in self.prompts(ROWS)]).flatten()

        @torch.inference_mode()
        def decode() -> None:
            cache = model.new_cache(ROWS, self.prompt + self.new)
            for t in range(self.new - 1):
                model.decode(ids[:ROWS], torch.full((ROWS,), self.prompt + t), cache)

        @torch.inference_mode()
        def prefill() -> None:
            model.prefill(ids, Layout.from_offsets(np.arange(0, len(ids) + 1, self.prompt)))

        @torch.inference_mode()
        def head() -> None:
            for _ in range(self.new):
                F.linear(hidden, model.output_weight)

        @torch.inference_mode()
        def sampling() -> None:
            for _ in range(self.new):
                sample(logits, Sampling(), u)

        return {f.__name__: self.seconds(f) for f in (prefill, decode, head, sampling)}

    def transformers(self, model: Decoder) -> float:
        """Seconds per generated token of `.generate()` with the same weights and 32 prompts."""
        from transformers import LlamaConfig, LlamaForCausalLM

        theirs = LlamaForCausalLM(LlamaConfig(
            vocab_size=SHAPE.vocab_size, hidden_size=SHAPE.hidden_size, intermediate_size=SHAPE.intermediate_size,
            num_hidden_layers=SHAPE.num_hidden_layers, num_attention_heads=SHAPE.num_attention_heads,
            num_key_value_heads=SHAPE.num_key_value_heads, max_position_embeddings=SHAPE.max_position_embeddings,
            rms_norm_eps=SHAPE.rms_norm_eps, bos_token_id=None, eos_token_id=None, pad_token_id=0)).eval()
        theirs.load_state_dict(model.state_dict(), strict=False)
        ids = torch.tensor([p.tokens for p in self.prompts(ROWS)])
        layout = Layout.from_offsets(np.arange(0, ids.numel() + 1, self.prompt))
        with torch.no_grad():
            ours = F.linear(model.hidden(ids.flatten(), layout)[layout.last], model.output_weight)
            torch.testing.assert_close(theirs(ids).logits[:, -1], ours, rtol=0, atol=1e-4)
        run = partial(theirs.generate, ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                      max_new_tokens=self.new, min_new_tokens=self.new)
        return self.seconds(run) / ROWS / self.new


def measure(bench: Bench, threads: int) -> dict[str, object]:
    """Tokens per second by case, and the parts of the first in milliseconds."""
    torch.set_num_threads(threads)
    model = Decoder(SHAPE, seed=0)
    cases, parts = bench.engine(model), bench.parts(model)
    rest = cases["32 prompts"] * ROWS * bench.new - sum(parts.values())
    peer = f"{1 / bench.transformers(model):.0f}" if importlib.util.find_spec("transformers") else "not measured"
    return {"threads": threads, "tokens_per_s": {name: round(1 / s) for name, s in cases.items()},
            "transformers_generate_tokens_per_s": peer,
            "milliseconds": {name: round(1e3 * s, 1) for name, s in {**parts, "the rest": rest}.items()}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt", type=int, default=8, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    for count in options.threads:
        print(json.dumps(measure(Bench(options.prompt, options.new, options.repeats), count), indent=1))
