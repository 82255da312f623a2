"""Contexts that were stretched: what becomes of the frequencies of rotary positions, in arrays of any framework."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from posttrain.data import Array
from posttrain.ops import ops_of


@final
@dataclass(frozen=True, slots=True)
class Linear:
    """All frequencies divided by `factor`, as if positions were (2306.15595, eq. 4)."""

    factor: float
    rope_type: Literal["linear"] = "linear"

    def __call__(self, frequency: Array) -> Array:
        return frequency / self.factor


@final
@dataclass(frozen=True, slots=True)
class Llama3:
    """Frequencies that turn seldom in the original context divided by `factor`, those that turn often left alone, and
    those between interpolated, as Llama 3.1 does (2407.21783; the formula stands in its released code).

    >>> import numpy as np
    >>> often, between, seldom = 2 * math.pi * np.array([8.0, 2.5, 0.5]) / 8192
    >>> turns = Llama3(8.0, 1.0, 4.0, 8192)(np.array([often, between, seldom])) * 8192 / (2 * math.pi)
    >>> [round(float(n), 4) for n in turns]
    [8.0, 1.4062, 0.0625]
    """

    factor: float
    low_freq_factor: float
    """Turns in the original context up to which a frequency is divided."""
    high_freq_factor: float
    """Turns from which it is left alone."""
    original_max_position_embeddings: int
    rope_type: Literal["llama3"] = "llama3"

    def __call__(self, frequency: Array) -> Array:
        turns = self.original_max_position_embeddings / (2 * math.pi / frequency)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = ops_of(frequency).xp.clip(kept, 0.0, 1.0)
        return (1 - kept) * frequency / self.factor + kept * frequency


Scaling = Linear | Llama3
SCALINGS: Mapping[str, type[Linear] | type[Llama3]] = {"linear": Linear, "llama3": Llama3}
"""By Hugging Face's `rope_type`; their fields have the names of the file's keys."""
