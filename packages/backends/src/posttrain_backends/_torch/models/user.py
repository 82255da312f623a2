"""A module of the user's own as a language model: `build(vocab_size)` from a Python file. Knows no learner.

The module's `forward(tokens[S, T], positions[S, T])` gives hidden states [S, T, H] of right-padded rows, causally, and
its `lm_head` is a `torch.nn.Linear` without bias. What it returns is probed once at load.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast, final

import torch
from torch import Tensor, nn

from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models.files import copy_named, read_weights, write_model
from posttrain_backends._torch.models.interface import COMPUTE_DTYPE, PARAMETER_DTYPE, Precision, autocast_to
from posttrain_backends._torch.models.projections import plain_state
from posttrain_backends.user_file import built, misfit

CONTRACT = ("build(vocab_size) returns a torch.nn.Module with forward(tokens[S, T], positions[S, T]) -> "
            "hidden [S, T, H] and lm_head = torch.nn.Linear(H, vocab_size, bias=False)")


@final
class UserModel:
    """Gives a user's module the interface of `LanguageModel`; it has no cache, so engines compute anew."""

    def __init__(self, module: nn.Module, file: str, precision: Precision, device: torch.device) -> None:
        self.file = file
        self.module = module.to(device=device, dtype=PARAMETER_DTYPE[precision])
        self.precision, self.device = precision, device

    @property
    def output_weight(self) -> Tensor:
        return cast(nn.Linear, self.module.lm_head).weight

    @property
    def compute_dtype(self) -> torch.dtype:
        return COMPUTE_DTYPE[self.precision]

    @property
    def max_positions(self) -> None:
        return None

    @property
    def shares_prompts(self) -> bool:
        """No: the module sees whole rows."""
        return False

    def autocast(self) -> AbstractContextManager[object]:
        return autocast_to(self.precision, self.device)

    def hidden(self, tokens: Tensor, layout: Layout) -> Tensor:
        """[M] token ids -> [M, H], by way of the rectangle [S, T]. Dropout works only where gradients are taken."""
        rectangle = layout.rectangle()
        if self.module.training != torch.is_grad_enabled():
            self.module.train(torch.is_grad_enabled())
        with self.autocast():
            return rectangle.unpad(self.module(rectangle.pad(tokens), rectangle.pad(layout.positions)))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters()

    def state_dict(self) -> Mapping[str, Tensor]:
        return self.module.state_dict()

    def requires_grad_(self, requires_grad: bool = True, /) -> UserModel:
        self.module.requires_grad_(requires_grad)
        return self

    def save(self, folder: Path) -> None:
        """Write the weights, and the name of the file that builds the module."""
        config = {"model_type": "user", "file": self.file, "vocab_size": len(self.output_weight)}
        write_model(folder, config, plain_state(self.module))

    def load(self, folder: Path) -> None:
        """Take the weights of a folder. Raises `ConfigError` where they do not fit."""
        copy_named(read_weights(folder).items(), self.state_dict(), f"policy.weights {folder}")


def load_user_model(file: str, vocab_size: int, *, seed: int, precision: Precision, device: torch.device) -> UserModel:
    """The module that `path.py:name` builds, probed; raises `ConfigError` where it does not fit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = built(file, vocab_size)
    head = getattr(module, "lm_head", None)
    if not isinstance(module, nn.Module) or not isinstance(head, nn.Linear):
        raise misfit(file, f"returned {type(module).__name__} with lm_head {type(head).__name__}", CONTRACT)
    if (biased := "bias" in head.state_dict()) or head.out_features != vocab_size:
        raise misfit(file, f"made an lm_head of {head.out_features} tokens{' with a bias' * biased}, expected "
                           f"{vocab_size} without a bias", CONTRACT)
    model = UserModel(module, file, precision, device)
    _probe(model, file, vocab_size, head.in_features)
    return model


@torch.no_grad()
def _probe(model: UserModel, file: str, vocab_size: int, width: int) -> None:
    """Two short sequences: the shape must be [M, H], and a changed last token must change no earlier hidden state."""
    layout = Layout.from_offsets([0, 4, 6], model.device)
    tokens = torch.arange(6, device=model.device) % vocab_size
    other = tokens.clone()
    other[3] = (other[3] + 1) % vocab_size
    try:
        first, second = model.hidden(tokens, layout), model.hidden(other, layout)
    except (TypeError, RuntimeError, IndexError) as error:
        raise misfit(file, f"failed on two short sequences: {error}", CONTRACT) from error
    if first.shape != (6, width):
        raise misfit(file, f"gave hidden states of width {tuple(first.shape[1:])}, lm_head takes {width}", CONTRACT)
    if not torch.allclose(first[:3], second[:3], atol=1e-5) or not torch.allclose(first[4:], second[4:], atol=1e-5):
        raise misfit(file, "is not causal: a later token changed an earlier hidden state", CONTRACT)
