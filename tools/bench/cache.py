"""What is kept of a text while an answer to it is drawn: bytes per sequence of the native Mamba-2 and transformer.

Both models have the same width and about as many parameters; what is counted are the tensors that they give back for a
text of each length, and that the engine `batched` copies for every answer. Predicted: the transformer's grow by
2 * layers * kv_heads * head_dim * 4 bytes a token; those of Mamba-2 are the same at all lengths.

    python tools/bench/cache.py [--lengths 256 512 1024 2048 4096 8192]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import numpy as np
import torch
from posttrain.protocols import LoadRequest
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models.interface import CachedLanguageModel, LanguageModel, RecurrentLanguageModel
from posttrain_backends.ssm import SSM
from posttrain_backends.torch_native import Torch

VOCABULARY = 512
REQUEST = LoadRequest(vocab_size=VOCABULARY)


def text_of(length: int) -> tuple[torch.Tensor, Layout]:
    tokens = np.random.default_rng(length).integers(0, VOCABULARY, length)
    return torch.from_numpy(tokens), Layout.from_offsets([0, length])


def kept_by_ssm(model: RecurrentLanguageModel, length: int) -> int:
    _, cache = model.read(*text_of(length))
    return bytes_of(cache.tensors)


def kept_by_transformer(model: CachedLanguageModel, length: int) -> int:
    _, keys, values = model.prefill(*text_of(length))
    return bytes_of([*keys, *values])


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def parameters(model: LanguageModel) -> int:
    return sum(p.numel() for _, p in model.named_parameters())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    lengths = parser.parse_args().lengths
    torch.set_num_threads(1)
    ssm = SSM(hidden_size=128, layers=6, state_size=64, head_dim=32, device="cpu").load(REQUEST).model
    torch_ = Torch(hidden_size=128, layers=4, heads=4, kv_heads=2, max_positions=max(lengths), device="cpu")
    transformer = torch_.load(REQUEST).model
    assert isinstance(ssm, RecurrentLanguageModel) and isinstance(transformer, CachedLanguageModel)
    print(f"parameters: ssm {parameters(ssm):,}, torch {parameters(transformer):,}")
    print(f"{'tokens':>8}{'ssm, bytes':>16}{'torch, bytes':>16}{'torch / ssm':>14}")
    for length in lengths:
        ours, others = kept_by_ssm(ssm, length), kept_by_transformer(transformer, length)
        print(f"{length:>8,}{ours:>16,}{others:>16,}{others / ours:>14.2f}")


if __name__ == "__main__":
    main()
