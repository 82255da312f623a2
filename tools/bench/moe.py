"""Time of a mixture of experts beside a dense model of equal active size, forward and backward, by both products.

The best of several runs: CPU seconds of the process on one thread, or milliseconds on a GPU where there is one.

    python tools/bench/moe.py [--device cpu] [--repeats 5]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import torch
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models import mixture
from posttrain_backends._torch.models.decoder import Decoder
from posttrain_backends._torch.models.interface import Precision
from posttrain_backends.families.shape import Shape

EXPERTS = (8, 32)


@dataclass(frozen=True)
class Case:
    """Sizes that keep a device busy for a moment, in sequences of 512 tokens."""

    dense: Shape
    per_token: int
    tokens: int
    precision: Precision

    def mixture_of(self, experts: int) -> Shape:
        """The experts of a token are together as wide as the dense model's MLP."""
        return replace(self.dense, model_type="qwen3_moe", num_experts=experts, num_experts_per_tok=self.per_token,
                       moe_intermediate_size=self.dense.intermediate_size // self.per_token, norm_topk_prob=True)


def sizes(hidden: int, layers: int) -> Shape:
    return Shape(vocab_size=64, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
                 num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64,
                 max_position_embeddings=512, model_type="qwen3")


CASES = {"cpu": Case(sizes(256, 4), 2, 1024, "float32"), "cuda": Case(sizes(2048, 4), 4, 16384, "bf16")}


def cpu_clock() -> float:
    return 1e3 * time.process_time()


def cuda_clock() -> float:
    torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


CLOCKS: dict[str, Callable[[], float]] = {"cpu": cpu_clock, "cuda": cuda_clock}


def timed(shape: Shape, case: Case, device: str, repeats: int) -> tuple[float, float]:
    """Milliseconds of a forward pass, and of one with its gradients."""
    model, clock = Decoder(shape, device=device, precision=case.precision), CLOCKS[device]
    layout = Layout.from_offsets(np.arange(0, case.tokens + 1, 512), device)
    tokens = torch.randint(0, 64, (case.tokens,), device=device)
    times = []
    for _ in range(repeats + 1):  # the first is slower
        start = clock()
        hidden = model.hidden(tokens, layout)
        middle = clock()
        hidden.float().square().mean().backward()
        times.append((middle - start, clock() - start))
        model.zero_grad()
    return min(t for t, _ in times[1:]), min(t for _, t in times[1:])


def line(name: str, found: tuple[float, float], dense: tuple[float, float]) -> str:
    return f"| {name} | {found[0]:.1f} | {found[1]:.1f} | {found[0] / dense[0]:.2f} | {found[1] / dense[1]:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=sorted(CASES), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("not measured: there is no CUDA device")
        return
    torch.set_num_threads(1)
    case = CASES[given.device]
    dense = timed(case.dense, case, given.device, given.repeats)
    print("| model | forward, ms | with gradients, ms | forward / dense | with gradients / dense |")
    print("|---|---|---|---|---|")
    print(line("dense", dense, dense))
    for experts in EXPERTS:
        shape = case.mixture_of(experts)
        print(line(f"{experts} experts, in groups", timed(shape, case, given.device, given.repeats), dense))
        with patch.object(mixture, "multiplies_in_groups", lambda x, weight: False):
            print(line(f"{experts} experts, one by one", timed(shape, case, given.device, given.repeats), dense))


if __name__ == "__main__":
    main()
