"""A correct searcher, as an author would write it: random search that comes back to the neighbourhood of the best."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from posttrain.hookspecs import Component, hookimpl


@hookimpl
def components() -> Iterable[Component]:
    """All of this file."""
    yield Component("searcher", "random_walk", f"{__name__}:RandomWalk", "random search around the best trial")


@final
@dataclass(slots=True)
class Learned:
    """What one search has seen."""

    asked: int = 0
    best: float = -math.inf
    lr: float = 0.0
    """Learning rate of the best trial; 0 before there is one."""


@final
@dataclass(frozen=True, slots=True)
class RandomWalk:
    """Draws a learning rate log-uniformly, every other time near the best one so far."""

    low: float = 1e-6
    """Smallest learning rate."""
    high: float = 1e-2
    """Largest learning rate."""
    seed: int = 0
    """Of all draws."""
    learned: Learned = field(default_factory=Learned, init=False, repr=False, compare=False)

    def ask(self) -> Mapping[str, Any]:
        rng = random.Random(f"{self.seed} {self.learned.asked}")
        self.learned.asked += 1
        lr = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        if self.learned.lr and self.learned.asked % 2 == 0:
            lr = min(self.high, max(self.low, self.learned.lr * rng.uniform(0.5, 2.0)))
        return {"optimizer.lr": lr}

    def tell(self, trial: Mapping[str, Any], values: Mapping[str, float]) -> None:
        value = values.get("reward", -math.inf)
        if math.isfinite(value) and value > self.learned.best:
            self.learned.best, self.learned.lr = value, trial["optimizer.lr"]
