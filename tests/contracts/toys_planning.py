"""A correct searcher, as an author would write it: random search that comes back to the best trial's options."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from posttrain.hookspecs import Component, hookimpl
from posttrain.search import Choice, Domain, Goal, Result, Space, Values


@hookimpl
def components() -> Iterable[Component]:
    """All of this file."""
    yield Component("searcher", "random_walk", f"{__name__}:RandomWalk", "random search near the best trial")


@final
@dataclass(frozen=True, slots=True)
class RandomWalk:
    """Draws uniformly, every other time with the options of the best trial so far."""

    seed: int = 0
    """Of all draws."""

    def problems(self, space: Space, goals: Sequence[Goal]) -> Iterable[str]:
        return ["it has one goal"] if len(goals) > 1 else []

    def start(self, space: Space, goals: Sequence[Goal], directory: Path) -> Walk:
        return Walk(self.seed, space, goals[0])


@final
class Walk:
    """What one study has seen. Whoever starts it again tells it all again, so it keeps nothing in the folder."""

    def __init__(self, seed: int, space: Space, goal: Goal) -> None:
        self.seed, self.space, self.sign = seed, space, 1 if goal.maximize else -1
        self.trials: dict[int, Values] = {}
        self.told: dict[int, float] = {}

    def ask(self, trial: int) -> Values | None:
        if trial not in self.trials:
            rng = random.Random(f"{self.seed} {trial}")
            best = max(self.told, key=lambda number: (self.told[number], -number)) if self.told else None
            near = self.trials[best] if best is not None and trial % 2 else {}
            self.trials[trial] = self.space.draw(
                lambda name, domain: near[name] if name in near and isinstance(domain, Choice) else drawn(rng, domain))
        return self.trials[trial]

    def tell(self, trial: int, result: Result) -> None:
        if result.status == "complete":
            self.told[trial] = self.sign * result.values[0]


def drawn(rng: random.Random, domain: Domain) -> Any:
    """Uniform, of a logarithm where it is asked for."""
    if isinstance(domain, Choice):
        return rng.choice(domain.options).label
    if domain.whole:
        return rng.randint(int(domain.low), int(domain.high))
    u = rng.random()
    value = domain.low * (domain.high / domain.low) ** u if domain.log else domain.low + u * (domain.high - domain.low)
    return min(domain.high, max(domain.low, value))
