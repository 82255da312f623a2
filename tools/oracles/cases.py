"""Random ragged batches that oracles are asked about, and the file that keeps their answers. Knows no library, not even
ours: what is here can be wrong only in the same way for all, and is a list of random numbers.

Numbers are multiples of 2^-10, so float32 holds them exactly and both precisions are compared on one input; logarithms
of probabilities too, which is why these are below 1 and not 1 itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LENGTHS = (1, 1, 2, 3, 5, 8, 13, 21)
"""Actions of an episode: few different ones, since an oracle may be compiled for each."""
STEP = 2.0 ** -10
FIXTURES = Path(__file__).parents[2] / "tests" / "oracles" / "fixtures"
ACTIONS = 4
"""Of the vocabulary that action values are of."""


@dataclass(frozen=True)
class Episode:
    """One episode of T actions, in terms of a sequence of T + 1 states: all that one without others has."""

    rewards: np.ndarray
    """[T]"""
    values: np.ndarray
    """[T+1], that of the state after the last action too."""
    terminated: bool
    """Whether that last state is an end, of value 0, or the episode was only cut off there."""
    log_pi: np.ndarray
    """[T] of the action taken, under the policy that values are of."""
    log_mu: np.ndarray
    """[T] of the action taken, under the policy that took it."""
    turn: np.ndarray
    """[T] int, not falling."""
    actions: np.ndarray
    """[T+1] int; the last is of the last state, and no answer may depend on it."""
    q: np.ndarray
    """[T+1, ACTIONS] values of all actions."""
    pi: np.ndarray
    """[T+1, ACTIONS] their probabilities; exp(log_pi) for those taken."""

    def discounts(self, gamma: float) -> np.ndarray:
        """[T] factor of what follows each action: gamma, and 0 behind an end. A cut is not an end."""
        factors = np.full(len(self.rewards), gamma)
        factors[-1] *= not self.terminated
        return factors


@dataclass(frozen=True)
class Batch:
    """E episodes with N actions in all. `actions` and `episodes` are the columns that the fixture keeps."""

    sequences: tuple[Episode, ...]
    group: np.ndarray
    """[E] int, the prompt of each episode; every group has two or more."""
    greedy_rewards: np.ndarray
    """[E] reward of a greedy answer, one number for each group."""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(e.rewards) for e in self.sequences])

    @property
    def ends(self) -> np.ndarray:
        """[N] bool, whether an action is the last of its episode."""
        return np.concatenate([np.arange(len(e.rewards)) == len(e.rewards) - 1 for e in self.sequences])

    @property
    def terminated(self) -> np.ndarray:
        return np.array([e.terminated for e in self.sequences])

    def action_column(self, name: str) -> np.ndarray:
        """[N] from each episode's own column."""
        columns: list[np.ndarray] = [getattr(e, name)[:len(e.rewards)] for e in self.sequences]
        return np.concatenate(columns)

    def columns(self) -> dict[str, np.ndarray]:
        """By the name under which the fixture keeps them: [N], or [E] for those of `EPISODE_COLUMNS`."""
        expected = [(e.pi * e.q).sum(axis=1) for e in self.sequences]
        return {
            "rewards": self.action_column("rewards"), "values": self.action_column("values"),
            "logprobs": self.action_column("log_pi"), "behavior_logprobs": self.action_column("log_mu"),
            "turn": self.action_column("turn"),
            "action_values": np.concatenate([e.q[np.arange(len(e.rewards)), e.actions[:-1]] for e in self.sequences]),
            "expected_action_values": np.concatenate([x[:-1] for x in expected]),
            "bootstrap_values": np.array([e.values[-1] for e in self.sequences]),
            "expected_bootstrap_values": np.array([x[-1] for x in expected]),
            "terminated": self.terminated, "group": self.group, "greedy_rewards": self.greedy_rewards}


EPISODE_COLUMNS = ("bootstrap_values", "expected_bootstrap_values", "terminated", "group", "greedy_rewards")


def batches(seed: int, count: int, episodes: int = 10) -> list[Batch]:
    """`count` batches, of which some have no truncated episode, some no other, some both, and ratios mild or wild."""
    rng = np.random.default_rng(seed)
    return [_batch(rng, episodes, share_terminated=(0.5, 0.5, 0.8, 1.0, 0.0)[i % 5], spread=(0.02, 0.3, 1.0)[i % 3],
                   outcome=i % 2 == 1) for i in range(count)]


def _batch(rng: np.random.Generator, episodes: int, share_terminated: float, spread: float, outcome: bool) -> Batch:
    sequences = [_episode(rng, bool(rng.random() < share_terminated), spread, outcome) for _ in range(episodes)]
    group = rng.permutation(np.concatenate([[0, 0, 1, 1, 1], rng.integers(0, 2, max(episodes - 7, 0)), [2, 2]]))
    for e in np.flatnonzero(group == 2):  # the answers of one group are all worth the same
        sequences[e].rewards[:] = 0.0
        sequences[e].rewards[-1] = 0.75
    greedy = grid(rng.normal(size=3))
    return Batch(tuple(sequences), 7 * group + 3, greedy[group])


def _episode(rng: np.random.Generator, terminated: bool, spread: float, outcome: bool) -> Episode:
    T = int(rng.choice(LENGTHS))
    rewards = grid(rng.normal(size=T))
    if outcome:
        rewards[:-1] = 0.0
    log_pi = -STEP - grid(rng.exponential(1.0, T))
    actions = rng.integers(0, ACTIONS, T + 1)
    return Episode(
        rewards=rewards, values=grid(rng.normal(size=T + 1)), terminated=terminated, log_pi=log_pi,
        log_mu=np.minimum(log_pi - grid(rng.normal(0.0, spread, T)), -STEP), turn=np.cumsum(rng.random(T) < 0.3),
        actions=actions, q=grid(rng.normal(size=(T + 1, ACTIONS))), pi=_policy(rng, actions, log_pi))


def _policy(rng: np.random.Generator, actions: np.ndarray, log_pi: np.ndarray) -> np.ndarray:
    """Probabilities of all actions that give those taken what they have; the state after the last has any."""
    taken = np.exp(np.append(log_pi, -1.0))
    others = rng.random((len(actions), ACTIONS)) + 0.1
    rows = np.arange(len(actions))
    others[rows, actions] = 0.0
    pi: np.ndarray = others / others.sum(axis=1, keepdims=True) * (1.0 - taken)[:, None]
    pi[rows, actions] = taken
    return pi


def grid(x: np.ndarray) -> np.ndarray:
    """The nearest multiples of `STEP`."""
    return np.asarray(np.round(x / STEP) * STEP)


def by_unit(e: Episode, unit: str) -> np.ndarray:
    """[T] pi/mu: of each action, or the geometric mean over the actions of its turn or of the whole episode."""
    ids = {"token": np.arange(len(e.turn)), "turn": e.turn, "sequence": np.zeros(len(e.turn))}[unit]
    log = e.log_pi - e.log_mu
    return np.exp([log[ids == i].mean() for i in ids])


def drawn(rng: np.random.Generator, choices: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """One of the choices for each setting."""
    return {name: values[int(rng.integers(len(values)))] for name, values in choices.items()}


class Fixture:
    """Batches, and what one library answers for each. Arrays are flat: those of actions and episodes one after
    another, with the lengths to cut them by; there is nothing in the file but numbers and two texts of JSON."""

    def __init__(self, given: Sequence[Batch]) -> None:
        self.batches = given
        self.cases: list[dict[str, Any]] = []
        self.results: list[np.ndarray] = []

    def add(self, function: str, batch: int, settings: Mapping[str, Any], results: Mapping[str, Any]) -> None:
        """A case: the settings that `function` was called with on a batch, and its results, each a flat column."""
        arrays = {name: np.asarray(x, np.float64).reshape(-1) for name, x in results.items()}
        self.cases.append({"function": function, "batch": batch, "settings": dict(settings),
                           "results": {name: len(x) for name, x in arrays.items()}})
        self.results.extend(arrays.values())

    def save(self, library: str, seed: int, **versions: str) -> Path:
        """Write `library`.npz, the same bytes for the same answers; `versions` are those of what gave them."""
        columns = [batch.columns() for batch in self.batches]
        arrays: dict[str, Any] = {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}
        path = FIXTURES / f"{library}.npz"
        np.savez_compressed(
            path, about=_text({"seed": seed, "versions": versions}), cases=_text(self.cases),
            results=np.concatenate(self.results), episodes=np.array([len(b.sequences) for b in self.batches]),
            lengths=np.concatenate([b.lengths for b in self.batches]), **arrays)
        print(f"{path.name}: {len(self.cases)} cases, {path.stat().st_size} bytes")
        return path


def _text(content: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


def over_episodes(parts: Iterator[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The results of each episode, one after another."""
    found = list(parts)
    return {name: np.concatenate([np.asarray(part[name]) for part in found]) for name in found[0]}
