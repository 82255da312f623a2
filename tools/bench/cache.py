"""What is kept of a text while an answer to it is drawn: bytes per sequence of Mamba-2, native and of transformers, and
of the native transformer.

The two Mamba-2 have equal weights, the transformer has the same width and about as many parameters. What is counted are
the tensors that they give back for a text of each length, and that the engine `batched` copies for every answer.
Predicted: the transformer's grow by 2 * layers * kv_heads * head_dim * 4 bytes a token; those of Mamba-2 are the same
at all lengths, and the library's larger by one input of each convolution: it keeps the newest one too.

    python tools/bench/cache.py [--lengths 256 512 1024 2048 4096 8192]

`hf` needs transformers 5.23 or later, and is left out without it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from posttrain.errors import PosttrainError
from posttrain.protocols import LoadRequest
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models.interface import CachedLanguageModel, LanguageModel, RecurrentLanguageModel
from posttrain_backends.hf import HF
from posttrain_backends.ssm import SSM
from posttrain_backends.torch_native import Torch

VOCABULARY = 512
REQUEST = LoadRequest(vocab_size=VOCABULARY)


def text_of(length: int) -> tuple[torch.Tensor, Layout]:
    tokens = np.random.default_rng(length).integers(0, VOCABULARY, length)
    return torch.from_numpy(tokens), Layout.from_offsets([0, length])


def kept(model: LanguageModel, length: int) -> int:
    """Bytes of what a model keeps of a text."""
    if isinstance(model, RecurrentLanguageModel):
        return bytes_of(model.read(*text_of(length))[1].tensors)
    assert isinstance(model, CachedLanguageModel)
    _, keys, values = model.prefill(*text_of(length))
    return bytes_of([*keys, *values])


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def parameters(model: LanguageModel) -> int:
    return sum(p.numel() for _, p in model.named_parameters())


def in_transformers(model: LanguageModel) -> LanguageModel | None:
    """The same weights in the model of transformers, where it is installed."""
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder))
        try:
            theirs = HF(weights=folder, device="cpu").load(REQUEST).model
        except PosttrainError as error:
            print(f"hf: not measured ({error})")
            return None
    tokens, layout = text_of(32)
    difference = (theirs.hidden(tokens, layout) - model.hidden(tokens, layout)).abs().max()
    assert difference < 1e-4, f"hidden states differ by {difference:.1e}"
    return theirs if isinstance(theirs, RecurrentLanguageModel) else None


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    lengths = parser.parse_args().lengths
    torch.set_num_threads(1)
    ssm = SSM(hidden_size=128, layers=6, state_size=64, head_dim=32, device="cpu").load(REQUEST).model
    torch_ = Torch(hidden_size=128, layers=4, heads=4, kv_heads=2, max_positions=max(lengths), device="cpu")
    models = {"ssm": ssm, "hf": in_transformers(ssm), "torch": torch_.load(REQUEST).model}
    found = {name: model for name, model in models.items() if model is not None}
    print(f"parameters: {', '.join(f'{name} {parameters(model):,}' for name, model in found.items())}")
    heads = "".join(f"{name + ', bytes':>16}" for name in found)
    print(f"{'tokens':>8}{heads}{'torch / ssm':>14}")
    for length in lengths:
        size = {name: kept(model, length) for name, model in found.items()}
        print(f"{length:>8,}{''.join(f'{n:>16,}' for n in size.values())}{size['torch'] / size['ssm']:>14.2f}")


if __name__ == "__main__":
    main()
