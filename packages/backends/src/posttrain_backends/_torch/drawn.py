"""What the decoding loop draws from: the model's rows and logits, and how it takes other weights.

A torch model, or one of another runtime whose hidden states reach the loop as tensors. Knows no sampling and no queue.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Protocol, final

import torch
import torch.nn.functional as F
from posttrain.data import Array, Metrics
from posttrain.errors import ConfigError
from torch import Tensor

from posttrain_backends._torch.learner import TorchLearner
from posttrain_backends._torch.models.files import copy_named
from posttrain_backends._torch.models.interface import (
    CachedLanguageModel,
    GroupedLanguageModel,
    LanguageModel,
    RecurrentLanguageModel,
    Refusing,
)
from posttrain_backends._torch.quantised_copy import QuantisedCopy
from posttrain_backends._torch.rows import Room, Rows, rows_for
from posttrain_backends.quantization import Quantizer


class Drawn(Protocol):
    """A model as the decoding loop sees it."""

    @property
    def device(self) -> torch.device:
        """Where its hidden states are, and tokens are drawn."""
        ...

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_positions(self) -> int | None:
        """Longest prompt and answer; None where the model sets no limit."""
        ...

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values; 0 where none are kept, or nobody knows."""
        ...

    def load(self, params: Iterable[tuple[str, Array]]) -> None:
        """Take the weights `params`, all of them. Raises `ConfigError` where names or shapes do not fit."""
        ...

    def room(self, prompts: Sequence[tuple[int, ...]], new: int, most: int, tokens: int) -> Room:
        """Room for answers of up to `new` tokens to `prompts`; see `Room.most`."""
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """The precision to compute in, held open for a whole rollout."""
        ...

    def rows(self, room: Room) -> Rows:
        """Empty rows, of the weights as they are now."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """What `Rows` give for the next token [n, H] -> [n, V]."""
        ...

    def metrics(self) -> Metrics:
        """Of the last rollout, beside those of the loop; see `posttrain.protocols.Reporting`."""
        ...


@final
class DrawnModel:
    """A torch model as it is (`shared`), or a copy of it that takes other weights by `load`, quantised where asked."""

    def __init__(self, model: LanguageModel, *, shared: bool, quantize: Quantizer | None = None) -> None:
        self._shared = shared
        self._quantised = None if shared or quantize is None else QuantisedCopy(model, quantize)
        self.model = model if shared else self._quantised.model if self._quantised else deepcopy(model)
        """What computes."""

    @property
    def device(self) -> torch.device:
        return self.model.output_weight.device

    @property
    def vocab_size(self) -> int:
        return len(self.model.output_weight)

    @property
    def max_positions(self) -> int | None:
        return self.model.max_positions

    @property
    def token_bytes(self) -> int:
        if not isinstance(self.model, CachedLanguageModel):
            return 0
        cache = self.model.new_cache(1, 1)
        return sum(x.nbytes for x in (*cache.keys, *cache.values))

    def load(self, params: Iterable[tuple[str, Array]]) -> None:
        """See `Drawn`; a shared model has them already."""
        if self._quantised is not None:
            self._quantised.load(params)
        elif not self._shared:
            copy_named(params, self.model.state_dict(), "the weights given to the sampler")

    def room(self, prompts: Sequence[tuple[int, ...]], new: int, most: int, tokens: int) -> Room:
        limit = 0 if isinstance(self.model, RecurrentLanguageModel) else tokens
        return Room.most(prompts, new, most, limit, shares=isinstance(self.model, GroupedLanguageModel))

    def autocast(self) -> AbstractContextManager[object]:
        return self.model.autocast()

    def rows(self, room: Room) -> Rows:
        return rows_for(self.model, room)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.output_weight)

    def metrics(self) -> Metrics:
        return Metrics()


def drawn_from(learner: TorchLearner, quantize: Quantizer | None = None, *, shared: bool) -> DrawnModel:
    """The learner's model to draw from. Raises `ConfigError` where it says that nothing should be drawn from it."""
    if isinstance(learner.model, Refusing) and learner.model.refusal:
        raise ConfigError(
            [f"engine 'batched' does not draw from this policy: {learner.model.refusal}"],
            next_step="Set policy.cache: never, which reads an answer anew for each of its tokens: slow, and what "
                      "is trained is what was drawn.")
    return DrawnModel(learner.model, shared=shared, quantize=quantize)
