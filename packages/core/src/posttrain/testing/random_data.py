"""Small random batches that hold every awkward shape; drawn by Hypothesis through a seed, so that examples shrink.

Knows the data of a run and NumPy; no component and no contract.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from hypothesis import strategies as st

from posttrain.data import Array, Episodes, offsets_of
from posttrain.protocols import Need

COLUMNS: Mapping[Need, tuple[str, ...]] = {
    Need.VALUES: ("values", "bootstrap_values"),
    Need.ACTION_VALUES: ("action_values", "expected_action_values", "bootstrap_values"),
    Need.FINAL_SCORES: ("final_scores",),
    Need.GREEDY_REWARDS: ("greedy_rewards",),
    Need.TURN: ("turn",),
    Need.LOGPROBS: ("logprobs",),
    Need.BEHAVIOR_LOGPROBS: ("behavior_logprobs",),
    Need.REF_LOGPROBS: ("ref_logprobs",),
}
"""Columns of `Episodes` that each need stands for."""
FLOATS = ("rewards", *dict.fromkeys(column for columns in COLUMNS.values() for column in columns if column != "turn"))
PER_EPISODE = ("bootstrap_values", "final_scores", "greedy_rewards")
"""Those of them with one number per episode; the others have one per action."""


def shapes() -> st.SearchStrategy[tuple[int, list[int], list[int]]]:
    """A seed, the actions of each episode, and the group of each: episodes of one action, groups of one episode."""
    def grouped(lengths: list[int]) -> st.SearchStrategy[tuple[int, list[int], list[int]]]:
        groups = st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths))
        return st.tuples(st.integers(0, 2**16), st.just(lengths), groups)
    return st.lists(st.integers(1, 6), min_size=1, max_size=8).flatmap(grouped)


def episodes_of(seed: int, lengths: Sequence[int], group: Sequence[int], needs: Collection[Need]) -> Episodes:
    """Random episodes with the columns of `needs`; log-probs are not positive, some episodes are truncated."""
    rng, E, N = np.random.default_rng(seed), len(lengths), int(sum(lengths))
    base = -rng.exponential(size=N)
    drawn: dict[str, Callable[[], np.ndarray]] = {
        **{name: lambda: rng.normal(size=N) for name in ("values", "action_values", "expected_action_values")},
        **{name: lambda: rng.normal(size=E) for name in PER_EPISODE},
        "turn": lambda: np.concatenate([np.sort(rng.integers(0, 3, length)) for length in lengths]),
        **{name: lambda: np.minimum(base + 0.3 * rng.normal(size=N), 0.0)
           for name in ("logprobs", "behavior_logprobs", "ref_logprobs")}}
    wanted = {column for need in needs for column in COLUMNS.get(need, ())}
    return Episodes(
        offsets=offsets_of(np.array(lengths)), rewards=rng.normal(size=N), terminated=rng.random(E) < 0.6,
        group=np.array(group, np.int64), **{name: draw() for name, draw in drawn.items() if name in wanted})


def chosen(episodes: Episodes, order: Sequence[int]) -> Episodes:
    """The given episodes in the given order."""
    of_action = [range(episodes.offsets[e], episodes.offsets[e + 1]) for e in order]
    actions = np.array([i for rows in of_action for i in rows], np.int64)
    index = np.array(order, np.int64)
    def picked(name: str) -> Array:
        column = getattr(episodes, name)
        return None if column is None else column[index if name in PER_EPISODE else actions]
    return replace(
        episodes, offsets=offsets_of(episodes.lengths[index]), terminated=episodes.terminated[index],
        group=episodes.group[index], **{name: picked(name) for name in (*FLOATS, "turn")})


def joined(first: Episodes, second: Episodes) -> Episodes:
    """The episodes of both, group numbers as they are."""
    def both(name: str) -> Array:
        a, b = getattr(first, name), getattr(second, name)
        return None if a is None else np.concatenate([a, b])
    return replace(
        first, offsets=offsets_of(np.concatenate([first.lengths, second.lengths])),
        **{name: both(name) for name in (*FLOATS, "turn", "terminated", "group")})


def in_framework(episodes: Episodes, make: Callable[[np.ndarray], Any]) -> Episodes:
    """The same numbers as arrays of another framework."""
    return replace(episodes, **{name: make(getattr(episodes, name)) for name in FLOATS
                                if getattr(episodes, name) is not None})


MAKERS: Mapping[str, tuple[str, str]] = {"torch": ("torch", "tensor"), "jax": ("jax.numpy", "asarray")}
"""Framework -> the module and the function that make one of its arrays of a NumPy array. Core names no framework in
an import: what is installed is used."""


def installed_frameworks() -> dict[str, Callable[[np.ndarray], Any]]:
    """Name -> how a NumPy array becomes one of its arrays, for those of torch and JAX that are installed."""
    return {name: getattr(import_module(module), function) for name, (module, function) in MAKERS.items()
            if find_spec(name) is not None}


@contextmanager
def in_float64(framework: str) -> Iterator[None]:
    """JAX computes in float32 unless told."""
    if framework != "jax":
        yield
        return
    with import_module("jax").enable_x64(True):
        yield
