"""Reads what independent libraries answered: batches of ragged episodes, settings of a function, and its results.

`tools/oracles` wrote the files and says what they hold. Knows no component.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from posttrain.data import Episodes, offsets_of

FIXTURES = Path(__file__).parent / "fixtures"
LIBRARIES = ("rlax", "torchrl", "stable_baselines3", "verl")
_NUMBERS = ("rewards", "values", "logprobs", "behavior_logprobs", "action_values", "expected_action_values",
            "bootstrap_values", "expected_bootstrap_values", "greedy_rewards")
_OF_EPISODES = ("bootstrap_values", "expected_bootstrap_values", "greedy_rewards", "terminated", "group")


@dataclass(frozen=True, eq=False)
class Case:
    """One function of a library, called with some settings on one batch."""

    library: str
    function: str
    settings: Mapping[str, Any]
    lengths: np.ndarray
    """[E] actions of each episode."""
    columns: Mapping[str, np.ndarray]
    """[N] or [E], as in `Episodes`; `expected_bootstrap_values` is its `bootstrap_values` for a critic of actions."""
    results: Mapping[str, np.ndarray]

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{self.library}: {self.function}({settings}), episodes of {self.lengths.tolist()} actions"

    def episodes(self, array: Callable[[np.ndarray], Any], bootstrap_values: str) -> Episodes:
        """As arrays of one framework and dtype; `bootstrap_values` names the column of the values behind the ends."""
        columns: dict[str, Any] = {name: array(self.columns[name]) for name in _NUMBERS}
        columns["bootstrap_values"] = columns[bootstrap_values]
        del columns["expected_bootstrap_values"]
        return Episodes(offsets=offsets_of(self.lengths), terminated=self.columns["terminated"],
                        group=self.columns["group"], turn=self.columns["turn"], **columns)


def about(library: str) -> dict[str, Any]:
    """Seed, and the versions of the library and of what it ran on."""
    with np.load(FIXTURES / f"{library}.npz", allow_pickle=False) as file:
        return dict(_read(file["about"]))


@cache
def answers(library: str) -> tuple[Case, ...]:
    """All cases of a library."""
    with np.load(FIXTURES / f"{library}.npz", allow_pickle=False) as stored:
        file = dict(stored)
    of_episodes = offsets_of(file["episodes"])
    of_actions = offsets_of(file["lengths"])[of_episodes]
    starts = {name: of_episodes if name in _OF_EPISODES else of_actions for name in (*_NUMBERS, *_OF_EPISODES, "turn")}
    found, at = [], 0
    for case in _read(file["cases"]):
        b, results = case["batch"], {}
        for name, length in case["results"].items():
            results[name], at = file["results"][at:at + length], at + length
        found.append(Case(library, case["function"], case["settings"],
                          file["lengths"][of_episodes[b]:of_episodes[b + 1]],
                          {name: file[name][start[b]:start[b + 1]] for name, start in starts.items()}, results))
    assert at == len(file["results"])
    return tuple(found)


def _read(text: np.ndarray) -> Any:
    return json.loads(text.tobytes())
