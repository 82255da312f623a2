"""A sequence- or token-classification model of transformers as a critic: its trunk, and its read-out as value head.

The value of a state is what the model's own logits say at the state's last token. Knows no learner and no reward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import final

import torch
from posttrain.errors import ConfigError
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain_backends._torch.models.hf import TOLERANCE, HFTrunk, exactly, probe_tokens
from posttrain_backends._torch.models.interface import Precision

HEADS = ("score", "classifier")
"""What transformers calls the linear read-out of a classification model."""


@final
class HFValueModel(HFTrunk):
    """See `ValueModel`. What `save` writes is a classification model again, of as many labels as there are values."""

    def __init__(self, causal: PreTrainedModel, precision: Precision, *, gradient_checkpointing: bool = False) -> None:
        self._name, self.value_head = head_of(causal)
        super().__init__(causal, self.value_head.weight, precision, gradient_checkpointing=gradient_checkpointing)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in super().named_parameters() if not self._in_head(name))

    def state_dict(self) -> Mapping[str, Tensor]:
        """See `HFTrunk.state_dict`; without the value head."""
        return {name: tensor for name, tensor in super().state_dict().items() if not self._in_head(name)}

    def _in_head(self, name: str) -> bool:
        return name.startswith(f"{self._name}.")


def head_of(causal: PreTrainedModel) -> tuple[str, nn.Linear]:
    """Name and module of the linear read-out. Raises `ConfigError` where there is none."""
    parts = dict(causal.named_children())
    for name in HEADS:
        if isinstance(head := parts.get(name), nn.Linear):
            return name, head
    raise ConfigError([f"{type(causal).__name__} cannot be a critic: it has no linear layer {' or '.join(HEADS)} that "
                       "reads its hidden states"])


def give_heads(causal: PreTrainedModel, values: int) -> None:
    """Make the read-out one of `values` labels: a single label's row is copied. Raises `ConfigError` for another number
    of labels."""
    name, head = head_of(causal)
    if head.out_features == values:
        return
    if head.out_features != 1:
        raise ConfigError(
            [f"the critic has {head.out_features} labels ({', '.join(causal.config.id2label.values())}), the run "
             f"estimates {values} reward column{'s' * (values != 1)}"],
            next_step="Take a model with one label, whose row is copied to every column, or with one label per column.")
    copied = nn.Linear(head.in_features, values, bias=head.bias is not None, device=head.weight.device,
                       dtype=head.weight.dtype)
    with torch.no_grad():
        for name_, tensor in head.state_dict().items():
            copied.state_dict()[name_].copy_(tensor.expand(values, *tensor.shape[1:]))
    setattr(causal, name, copied)
    causal.config.num_labels = causal.num_labels = values


@torch.no_grad()
def require_causal_head(model: HFValueModel, *, pooled: bool) -> None:
    """Raise `ConfigError` where a later token changes an earlier hidden state, or where the module's logits are not its
    hidden states through its read-out; `pooled`: its logits are those of the last token alone."""
    tokens, _ = probe_tokens(model, [6])
    other = tokens.clone()
    other[-1] = tokens[0]
    with exactly(model):
        hidden, changed = (model.run(ids[None]).last_hidden_state[0] for ids in (tokens, other))
        own, logits = model.value_head(hidden), model.causal(input_ids=tokens[None]).logits[0]
    kind = type(model.causal).__name__
    if (error := _relative(hidden[:-1], changed[:-1])) > TOLERANCE:
        raise ConfigError([f"{kind} cannot be a critic: it is not causal, a later token changed earlier hidden states "
                           f"by {error:.1e} of the largest"],
                          next_step="Take a model with a decoder's trunk; an encoder can be a reward (reward_model).")
    if own.shape[-1] != logits.shape[-1] or _relative(own[-1:] if pooled else own, logits) > TOLERANCE:
        raise ConfigError([f"{kind} cannot be a critic: its logits are not its hidden states through its linear layer"])


def _relative(expected: Tensor, found: Tensor) -> float:
    return float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-12))
