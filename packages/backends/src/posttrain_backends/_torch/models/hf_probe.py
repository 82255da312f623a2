"""The attention of a module of transformers against eager, on a few tokens and the masks that are used, before it is.

A module that is trained is compared in its gradients, too. What raises and what is wrong is refused by name, or left
out where the choice is ours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import torch
from posttrain.errors import ConfigError
from torch import Tensor

from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models.attention import relative
from posttrain_backends._torch.models.hf import HFTrunk, exactly, packing_error, probe_tokens, tolerance
from posttrain_backends._torch.models.hf_attention import attending, switch
from posttrain_backends._torch.models.interface import CachedLanguageModel
from posttrain_backends._torch.trees import forest
from posttrain_backends.attention import FLASH, candidates, choose, differs, raised

if TYPE_CHECKING:
    from posttrain_backends.hf import HF

log = logging.getLogger(__name__)

_NUDGE, _ROUNDING = 1e-5, 4
"""An attention may be so many times as far from eager in float32 as eager itself is in the model's own precision and on
embeddings that much off: before what rounds to 16 or 8 bits, or chooses experts, a last bit moves a result far."""


@final
@dataclass(frozen=True, slots=True)
class Case:
    """One way in which the model is run."""

    what: str
    tokens: Tensor
    layout: Layout
    run: Callable[[HFTrunk, Tensor, Layout], Tensor]
    """-> hidden states [M, H]"""
    backward: bool = True


def attend_by(model: HFTrunk, spec: HF, *, trained: bool) -> None:
    """Give the model the attention of its configuration, or what `auto` chooses, and say whether sequences are packed.

    Raises `ConfigError` for an attention that is not eager's, and where `packing: always` is not exact.
    """
    own = model.causal.config._attn_implementation
    tried = tuple(own if name == "sdpa" else name for name in candidates(model.device.type, spec.precision))
    apart = keeps_apart(model, spec, (spec.attention, *tried))

    def packs(name: str) -> bool:
        return apart and (spec.packing == "always" or name in FLASH)

    def fault(name: str) -> str:
        model.packed = packs(name)
        return "" if name == "eager" else fault_of(model, name, trained=trained)

    name = choose(spec.attention, tried, fault)
    switch(model.causal, name)
    model.packed = packs(name)


def keeps_apart(model: HFTrunk, spec: HF, names: tuple[str, ...]) -> bool:
    """Whether packed sequences are told from each other, where one of these attentions might pack them."""
    if spec.packing == "never" or (spec.packing == "auto" and FLASH.isdisjoint(names)):
        return False
    error = packing_error(model)
    if error > tolerance(model.causal) and spec.packing == "always":
        raise ConfigError([f"policy.packing: packed sequences of {type(model.causal).__name__} are not kept apart "
                           f"(hidden states differ by {error:.1e} of the largest); set packing: never"])
    return error <= tolerance(model.causal)


def fault_of(model: HFTrunk, name: str, *, trained: bool) -> str:
    """What is wrong with the model's attention of that name; empty where nothing is."""
    for case in cases(model, name):
        backward = trained and case.backward
        with attending(model.causal, "eager"):
            with exactly(model):
                expected = values(model, case, apart, backward)
            nearby = values(model, case, apart, backward, _NUDGE)
        try:
            with attending(model.causal, name):
                found = values(model, case, case.run, backward)
        except Exception as error:  # whatever a kernel that is not ours raises, of whatever library
            return raised(error)
        for what, exact in expected.items():
            bound = max(tolerance(model.causal), _ROUNDING * relative(nearby[what], exact))
            if wrong := differs(relative(found[what], exact), f"{what} of {case.what}", bound):
                return wrong
    return ""


def cases(model: HFTrunk, name: str) -> Iterator[Case]:
    """The ways in which the model will be run with this attention."""
    tokens, layout = probe_tokens(model, [5, 3])
    yield Case("packed sequences" if model.packed else "padded rows", tokens, layout,
               lambda model, tokens, layout: model.hidden(tokens, layout))
    if isinstance(model, CachedLanguageModel):
        yield Case("rows that fill a cache", tokens, layout, _prefilled, backward=False)
    if name == "flex" and model.trees and not model.packed:  # the others leave trees to sdpa
        tokens, _ = probe_tokens(model, [7])
        yield Case("a shared prompt", tokens, Layout.from_offsets(
            [0, 5, 9], model.device, np.array([0, 1, 2, 3, 4, 0, 1, 5, 6])), _as_tree)


def _prefilled(model: HFTrunk, tokens: Tensor, layout: Layout) -> Tensor:
    assert isinstance(model, CachedLanguageModel)
    return model.prefill(tokens, layout)[0]


def _as_tree(model: HFTrunk, tokens: Tensor, layout: Layout) -> Tensor:
    trees = forest(layout, 2**20)
    assert trees is not None, "two continuations of two tokens are cheaper together"
    return model.over(trees, tokens, layout)


def apart(model: HFTrunk, tokens: Tensor, layout: Layout) -> Tensor:
    """[M, H] hidden states with each sequence in a row of its own."""
    cells = torch.from_numpy(layout.cells).to(model.device)
    sequences = torch.split(tokens[cells], np.diff(layout.offsets).tolist())
    with model.autocast():
        hidden = torch.cat([model.run(ids[None]).last_hidden_state[0] for ids in sequences])
    return hidden[torch.from_numpy(np.unique(layout.cells, return_index=True)[1]).to(model.device)]


def values(model: HFTrunk, case: Case, run: Callable[[HFTrunk, Tensor, Layout], Tensor], backward: bool,
           nudge: float = 0.0) -> dict[str, Tensor]:
    """Hidden states of a case, and where asked for the gradient by the embeddings of some sum of them."""
    with torch.set_grad_enabled(backward), _embedded_once(model, case.tokens, nudge) as embeddings:
        hidden = run(model, case.tokens, case.layout)
    if not backward:
        return {"hidden states": hidden}
    gradients, = torch.autograd.grad(hidden, embeddings, _noise(hidden))
    return {"hidden states": hidden.detach(), "gradients": gradients}


def _noise(like: Tensor) -> Tensor:
    """N(0, 1), the same each time."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)


@contextmanager
def _embedded_once(model: HFTrunk, tokens: Tensor, nudge: float) -> Iterator[Tensor]:
    """[M, H] embeddings of the tokens, which differ, off by `nudge` of each number; inside, every cell of a token reads
    that one, so that its gradient is told by token however rows are made."""
    layer = model.causal.get_input_embeddings()
    embeddings = layer(tokens).detach()
    embeddings = (embeddings * (1 + nudge * _noise(embeddings))).requires_grad_(torch.is_grad_enabled())
    hook = layer.register_forward_hook(
        lambda module, given, out: embeddings[(given[0][..., None] == tokens).int().argmax(-1)])
    try:
        yield embeddings
    finally:
        hook.remove()
