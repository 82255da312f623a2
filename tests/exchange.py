"""Tiny models that transformers writes and the native decoder reads: their sizes, their texts, their logits side by
side. Needs transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from posttrain.data import offsets_of
from posttrain.protocols import LoadRequest
from posttrain.tokenizers import Characters
from posttrain_backends._torch.layout import Layout
from posttrain_backends.torch_native import Torch

TOKENIZER = Characters("abcdefgh01+").load()
"""pad 0, eos 1, then the alphabet."""
V = TOKENIZER.vocab_size
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 1,
         "pad_token_id": 0}
LENGTHS = [5, 40, 1, 11]


def randomise(model: torch.nn.Module) -> None:
    """Every weight random and large enough that neither attention nor routers are uniform: biases and norms, too."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator) + float("norm" in name))


def written(folder: Path, kind: str, traits: Mapping[str, Any]) -> Path:
    """The folder, with a model of `SIZES` and these traits that transformers wrote."""
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **{**SIZES, **traits}))
    randomise(model)
    model.save_pretrained(folder)
    return folder


def native(path: Path, vocab_size: int = V, **fields: Any) -> Any:
    return Torch(weights=str(path), device="cpu", **fields).load(LoadRequest(vocab_size))


def library(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def ragged() -> tuple[torch.Tensor, Layout]:
    """Without the pad token: transformers trains no embedding of it."""
    tokens = torch.from_numpy(np.random.default_rng(2).integers(1, V, sum(LENGTHS)))
    return tokens, Layout.from_offsets(offsets_of(np.array(LENGTHS)))


def our_logits(model: Any) -> torch.Tensor:
    tokens, layout = ragged()
    logits: torch.Tensor = model.hidden(tokens, layout) @ model.output_weight.t()
    return logits


def their_logits(model: Any) -> torch.Tensor:
    return torch.cat([model(input_ids=part[None]).logits[0] for part in ragged()[0].split(LENGTHS)])


def loss(logits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy to some other tokens."""
    return F.cross_entropy(logits, ragged()[0].flip(0))


def require_equal_logits_and_gradients(ours: Any, theirs: Any) -> None:
    """Of two models with equal weights: logits to 1e-5, and the gradient of every parameter."""
    found, expected = our_logits(ours), their_logits(theirs)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    loss(found).backward()
    loss(expected).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert {name for name, _ in ours.named_parameters()} == gradients.keys()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=f"{name}: {{}}".format)
