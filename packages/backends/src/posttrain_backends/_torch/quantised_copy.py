"""A copy of a policy to draw from, whose linear layers are quantised anew whenever it is given weights.

Its log-probs are its own: a trainer that learns from its answers corrects for them. Knows no sampling.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any, final

import torch
from posttrain.data import Array
from torch import Tensor

from posttrain_backends._torch.models.files import copy_named, tensor_of
from posttrain_backends._torch.models.interface import LanguageModel
from posttrain_backends._torch.quantised_layers import put, quantise
from posttrain_backends.quantization import Quantizer


@final
class QuantisedCopy:
    """`model` draws; `load` gives it other weights. The output matrix, adapters and what is not linear stay as they
    are."""

    def __init__(self, model: LanguageModel, quantizer: Quantizer) -> None:
        self.model, self._quantizer = deepcopy(model), quantizer
        live = self.model.state_dict()
        self._places = {f"{name}.weight": name for name in quantise(self.model, quantizer)}
        self._rounded = live.keys() & self._places.keys()
        self._plain = {name: t for name, t in live.items() if name not in self._rounded}

    def load(self, items: Iterable[tuple[str, Array]]) -> None:
        """Take all the policy's weights. Raises `ConfigError` where names or shapes do not fit."""
        given = {name: tensor_of(x) for name, x in items}
        shapes: dict[str, Tensor] = {name: torch.empty_like(given[name]) for name in self._rounded & given.keys()}
        copy_named(given.items(), {**self._plain, **shapes}, "the weights given to the sampler")
        for name in sorted(shapes):
            layer: Any = self.model.module.get_submodule(self._places[name])
            put(self.model.module, self._places[name], self._quantizer, given[name], layer.bias)
