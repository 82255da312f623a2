"""A model as it was before its adapter, read from the adapted one's own weights. Knows no loss and no optimiser."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, final

import numpy as np
from posttrain.data import Array, Rollouts, TokenOutputs
from posttrain.errors import ConfigError
from posttrain.protocols import Memory, Output
from torch import Tensor, nn

from posttrain_backends._torch.head import Readout
from posttrain_backends._torch.models.interface import AdaptedLanguageModel

if TYPE_CHECKING:
    from posttrain_backends._torch.learner import TorchLearner

PROVIDES = frozenset({Output.LOGPROBS, Output.ENTROPY})
"""Heads of values and action values are trained with the adapter, so without it there are none."""


class Switch(Protocol):
    """A layer with an adapter, as peft has it."""

    def enable_adapters(self, enabled: bool) -> None: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


@final
@dataclass(frozen=True, slots=True, eq=False)
class Unadapted:
    """A `Scorer` that turns the learner's adapter off while it scores: no second load and no second copy.

    What scores at the same time, or draws, would see the adapter turned off too: the training loop does one after the
    other, and a sampler that lags behind has a copy of its own.
    """

    learner: TorchLearner
    model: AdaptedLanguageModel
    """The learner's."""

    @property
    def provides(self) -> frozenset[Output]:
        return PROVIDES

    def score(self, rollouts: Rollouts, outputs: frozenset[Output], temperature: float) -> TokenOutputs:
        """See `TorchLearner.score`. Raises `ConfigError` where values are asked for, `MemoryExhausted`."""
        if missing := outputs - PROVIDES:
            raise ConfigError([f"the model without its adapter gives no {', '.join(sorted(missing))}"])
        with self.model.without_adapter():
            return self.learner.score(rollouts, outputs, temperature)

    def memory(self) -> Memory:
        """The learner's device's."""
        return self.learner.memory()

    @property
    def output_weight(self) -> Tensor:
        """[V, H]; no adapter changes it."""
        return self.model.output_weight

    def readout(self, tokens: Array, offsets: np.ndarray, source: Array) -> Readout:
        """See `TorchLearner.readout`."""
        with self.model.without_adapter():
            return self.learner.readout(tokens, offsets, source)

    def params(self) -> Iterator[tuple[str, Array]]:
        """The weights under the adapter, by the names they have without one; live."""
        yield from self.model.weights_under_adapter().items()

    def load_params(self, items: Iterable[tuple[str, Array]], version: int) -> None:
        """Raises `RuntimeError`: these weights are the learner's."""
        raise RuntimeError("the model without its adapter reads the weights of the learner; load a model of its own")


@contextmanager
def switched_off(layers: Sequence[Switch]) -> Iterator[None]:
    """Compute without the adapters of the layers; what was trained is trained again afterwards, whatever is raised."""
    gradients = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for p, requires_grad in gradients:  # the switch of the library sets it: off, and then on even where it was off
            p.requires_grad_(requires_grad)
