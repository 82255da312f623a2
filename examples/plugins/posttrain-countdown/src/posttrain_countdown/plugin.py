"""What this package offers, as data; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable

from posttrain.hookspecs import Component, hookimpl

GAME = "the numbers round of Countdown (1982); as a task for policies: Gandhi et al. 2024, arXiv 2404.03683"


@hookimpl
def components() -> Iterable[Component]:
    """The task and its reward."""
    yield Component("task", "countdown", "posttrain_countdown.task:Countdown",
                    "puzzles: reach a number from others, each used once at most", source=GAME)
    yield Component("reward", "countdown", "posttrain_countdown.reward:CountdownScore",
                    "1 where the answer's expression reaches the target with the row's numbers", source=GAME)
