"""Score rollouts: call each reward once on all episodes of a step, check what it returns, place it on the last token.

A reward is any function with the TRL signature, plain or async. What it returns is never mended in silence. Knows
rollouts and functions: no configuration, no model.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np

from posttrain.data import Rollouts, offsets_of
from posttrain.errors import RewardError, did_you_mean

T = TypeVar("T")


class Entry(Protocol):
    """A reward of a configuration: its name, what is called, and its weight in the sum."""

    @property
    def name(self) -> str: ...
    @property
    def call(self) -> Callable[..., Any]: ...
    @property
    def weight(self) -> float: ...


def score(rollouts: Rollouts, rewards: Sequence[Entry]) -> Rollouts:
    """The rollouts with one reward column per entry; None from a reward excludes the episode from its column.

    A reward receives `prompts` (text, messages or token ids, as the rows hold them), `completions` (texts),
    `completion_ids` (the tokens that the policy chose) and every column of the rows as a list, None where a row lacks
    it; of these, what its signature accepts.

    Raises `RewardError` naming reward and row where a reward raises, or returns the wrong length, something that is
    neither a number nor None, or a number that is not finite.
    """
    columns = _columns(rollouts)
    for entry in rewards:
        if entry.name in rollouts.rewards:
            raise RewardError(f"two rewards are called '{entry.name}'; give each its own name")
        outcome, excluded = _outcomes(entry, columns, _labels(rollouts))
        rollouts = replace(rollouts, rewards={**rollouts.rewards, entry.name: _on_last_token(rollouts, outcome)},
                           excluded={**rollouts.excluded, entry.name: excluded})
    return rollouts


def summed(rollouts: Rollouts, rewards: Sequence[Entry], column: str = "reward") -> Rollouts:
    """The rollouts with the weighted sum of the rewards in `column`, over the rewards that apply to each episode.

    An episode to which no reward of nonzero weight applies is excluded. A reward of weight 0 is only measured.
    """
    names = [entry.name for entry in rewards]
    if column in names and any(entry.name != column or entry.weight != 1 for entry in rewards):
        raise RewardError(f"the sum of all rewards is called '{column}'; give the reward of that name another one")
    token_episode = np.repeat(rollouts.episode, np.diff(rollouts.offsets))
    total, excluded = np.zeros(len(rollouts.tokens)), np.ones(rollouts.n_episodes, bool)
    for entry in rewards:
        if entry.weight != 0:
            out = rollouts.excluded.get(entry.name, np.zeros(rollouts.n_episodes, bool))
            total += np.where(out[token_episode], 0.0, entry.weight * rollouts.rewards[entry.name])
            excluded &= out
    return replace(rollouts, rewards={**rollouts.rewards, column: total},
                   excluded={**rollouts.excluded, column: excluded})


def _columns(rollouts: Rollouts) -> dict[str, list[Any]]:
    """Everything that a reward may receive, one value per episode each."""
    names = dict.fromkeys(name for prompt in rollouts.prompts for name in prompt.extra)
    columns = {name: [prompt.extra.get(name) for prompt in rollouts.prompts] for name in names}
    actions = np.split(rollouts.tokens[rollouts.source], np.cumsum(rollouts.episode_actions)[:-1])
    return columns | {
        "prompts": [p.text if p.text is not None else list(p.messages or p.tokens or ()) for p in rollouts.prompts],
        "completions": list(rollouts.completions),
        "completion_ids": [ids.tolist() for ids in actions[: rollouts.n_episodes]]}


def _labels(rollouts: Rollouts) -> list[str]:
    """How each episode's row is called in an error."""
    return [prompt.where or f"number {e} of the step" for e, prompt in enumerate(rollouts.prompts)]


def _outcomes(entry: Entry, columns: Mapping[str, list[Any]], where: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """[E] outcome of each episode, 0 where the reward does not apply, and [E] bool where it does not."""
    if not where:
        return np.zeros(0), np.zeros(0, bool)
    accepted = _accepted(entry, columns)
    try:
        result = _called(entry.call, accepted)
    except Exception as error:  # whatever the author's code raises becomes an error that names the row
        row, cause = _first_failure(entry.call, accepted, error)
        raise RewardError(_raised(entry, cause, "" if row is None else where[row])) from cause
    _check_length(entry, result, len(where))
    numbers = [_number(entry, value, row) for value, row in zip(result, where, strict=True)]
    return (np.array([0.0 if x is None else x for x in numbers], np.float64),
            np.array([x is None for x in numbers], bool))


def _on_last_token(rollouts: Rollouts, outcome: np.ndarray) -> np.ndarray:
    """[E] -> [M], each outcome on the last token of its episode."""
    tokens = rollouts.episode_tokens
    if not tokens.all():
        raise ValueError(f"episode {np.flatnonzero(tokens == 0)[0]} has no token on which a reward could stand")
    placed = np.zeros(len(rollouts.tokens))
    placed[offsets_of(tokens)[1:] - 1] = outcome
    return placed


def _accepted(entry: Entry, columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The columns that the reward's signature accepts; all where it takes `**columns`."""
    try:
        parameters = inspect.signature(entry.call).parameters.values()
    except (TypeError, ValueError):  # some functions in C tell no signature
        return dict(columns)
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in columns:
            raise RewardError(f"reward '{entry.name}' asks for '{name}', which is no column of the rows"
                              f"{did_you_mean(name, columns)}; it can have: {', '.join(sorted(columns))}")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(columns)
    return {name: values for name, values in columns.items() if name in named}


def _called(call: Callable[..., Any], columns: Mapping[str, list[Any]]) -> Any:
    result = call(**columns)
    return _awaited(result) if inspect.isawaitable(result) else result


def _awaited(result: Awaitable[T]) -> T:
    """Run an async reward to its end, also where an event loop is already running (a notebook)."""
    async def run() -> T:
        return await result
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(run())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, run()).result()


def _first_failure(call: Callable[..., Any], columns: Mapping[str, list[Any]],
                   error: Exception) -> tuple[int | None, Exception]:
    """The first row on which the reward raises when it gets one row at a time; none where it then raises nowhere."""
    for row in range(len(columns.get("completions", next(iter(columns.values()), [])))):
        try:
            _called(call, {name: values[row: row + 1] for name, values in columns.items()})
        except Exception as alone:
            return row, alone
    return None, error


def _raised(entry: Entry, error: Exception, where: str) -> str:
    frame = next(reversed(traceback.extract_tb(error.__traceback__)), None)
    line = f" at {frame.filename}:{frame.lineno}" if frame is not None else ""
    row = f" on row {where}" if where else " on the rows of this step together, though on none of them alone,"
    return (f"reward '{entry.name}' raised {type(error).__name__}: {error}{row}{line}\n"
            "mend the function; for rows to which it does not apply, let it return None")


def _check_length(entry: Entry, result: Any, expected: int) -> None:
    if isinstance(result, str | bytes | Mapping) or not isinstance(result, Sequence | np.ndarray):
        raise RewardError(f"reward '{entry.name}' returned {_shown(result)}, expected a list of {expected} numbers, "
                          "one per completion (or None where the reward does not apply)")
    if len(result) != expected:
        raise RewardError(f"reward '{entry.name}' returned {len(result)} numbers for {expected} completions; return "
                          "one per completion, in order, and None where the reward does not apply")


def _number(entry: Entry, value: Any, where: str) -> float | None:
    """One outcome, checked."""
    if value is None:
        return None
    try:
        number = None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is not None and math.isfinite(number):
        return number
    said = (f"{_shown(value)}, which is no number" if number is None
            else f"{number}, which is not finite; guard the division or the logarithm that made it")
    raise RewardError(f"reward '{entry.name}' returned {said} (row {where}); return None where it does not apply")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:60] + '...'} ({type(value).__name__})"
