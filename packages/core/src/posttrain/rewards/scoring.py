"""Score rollouts: have each reward called, apply its rules where it fails, place its outcome on the last token.

A reward is any function with the TRL signature, plain or async. What it returns is never mended in silence, and where
it fails, its rules say what becomes of the row:

- `fail`: stop with reward, row and line (the default where it raises);
- `drop_sample`: the episode is left out of learning (the default where it hangs or its process dies);
- `drop_group`: all answers to its prompt are left out;
- `zero`: the outcome is 0.

An episode is left out by being excluded from every reward column, which is what None does for one column. All
failures are counted, and too many of them stop the run. Knows rollouts and outcomes: no configuration, no model.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np

from posttrain.constrained import Bound
from posttrain.data import Metric, Metrics, Rollouts, offsets_of
from posttrain.errors import RewardError, did_you_mean
from posttrain.protocols import RewardSource
from posttrain.rewards.calls import Failed, Origin, Outcome, Overdue, Raised, Returned, Wrong
from posttrain.rewards.pool import Job, Pool, Traceback, ending

log = logging.getLogger(__name__)

Rule = Literal["fail", "drop_sample", "drop_group", "zero"]

CALL_ROWS = 16
"""A reward in shared workers is called on whole groups, as many as make this number of rows."""
RETRIED_ROWS = 8
"""Rows that are called again one by one before failures are counted: a reward that always hangs is found out early."""


class Entry(Protocol):
    """A reward of a configuration: what is called, its weight in the sum, and its rules."""

    @property
    def name(self) -> str: ...
    @property
    def call(self) -> Callable[..., Any] | RewardSource: ...
    @property
    def weight(self) -> float: ...
    @property
    def timeout(self) -> float:
        """Seconds for one call."""
        ...
    @property
    def bootstrap(self) -> bool:
        """Whether it scores the states in which truncated episodes end, and is no part of the sum."""
        ...
    @property
    def bound(self) -> Bound | None:
        """What is asked of a cost, which is no part of the sum."""
        ...
    @property
    def on_error(self) -> Rule: ...
    @property
    def on_timeout(self) -> Rule:
        """Also where the process of the call dies."""
        ...
    @property
    def origin(self) -> Origin | None: ...


@dataclass(slots=True)
class _Scores:
    """Outcomes of one reward: the numbers, and the failure of each row that has none."""

    numbers: np.ndarray
    """[E] 0 where there is none"""
    excluded: np.ndarray
    """[E] bool, where the reward said None"""
    failures: dict[int, Failed] = field(default_factory=dict)


def score(rollouts: Rollouts, rewards: Sequence[Entry], pool: Pool,
          max_error_rate: float = 0.05) -> tuple[Rollouts, Metrics]:
    """The rollouts with one reward column per entry; None from a reward excludes the episode from its column.

    A reward receives `prompts` (text, messages or token ids, as the rows hold them), `completions` (texts),
    `completion_ids` (the tokens that the policy chose) and every column of the rows as a list, None where a row lacks
    it; of these, what its signature accepts. One from Python and one that is a model are called once on all episodes;
    one that a configuration names is called on whole groups, several at a time, which do not depend on the number of
    workers. Rows of a call that fails are called again one by one, so that a failure concerns its own row alone.

    `pool` holds the same rewards. Metrics: `NAME/errors`, `NAME/timeouts`, `NAME/respawned` (workers replaced),
    and `dropped` (episodes left out).

    Raises `RewardError` naming reward and row where a reward raises under `on_error: fail`, where more than
    `max_error_rate` of the rows fail, and wherever it returns the wrong length, something that is neither a number nor
    None, or a number that is not finite.
    """
    for i, entry in enumerate(rewards):
        if entry.name in rollouts.rewards or entry.name in [r.name for r in rewards[:i]]:
            raise RewardError(f"two rewards are called '{entry.name}'; give each its own name")
    before = dict(pool.respawned)
    found, where = _called(rollouts, rewards, pool, max_error_rate), _labels(rollouts)
    dropped = np.zeros(rollouts.n_episodes, bool)
    metrics, columns, excluded = Metrics(), {}, {}
    for entry, scores in zip(rewards, found, strict=True):
        dropped |= _dropped(entry, scores, rollouts.group, where)
        columns[entry.name] = _on_last_token(rollouts, scores.numbers)
        excluded[entry.name] = scores.excluded
        raised = sum(isinstance(f, Raised) for f in scores.failures.values())
        metrics += {f"{entry.name}/errors": Metric(raised, reduction="sum"),
                    f"{entry.name}/timeouts": Metric(len(scores.failures) - raised, reduction="sum"),
                    f"{entry.name}/respawned": Metric(pool.respawned[entry.name] - before[entry.name],
                                                      reduction="sum")}
    columns, excluded = {**rollouts.rewards, **columns}, {**rollouts.excluded, **excluded}
    nowhere = np.zeros(rollouts.n_episodes, bool)
    return replace(rollouts, rewards=columns, excluded={
        name: excluded.get(name, nowhere) | dropped for name in columns}), metrics + {
        "dropped": Metric(float(dropped.sum()), reduction="sum")}


def summed(rollouts: Rollouts, rewards: Sequence[Entry], column: str = "reward") -> Rollouts:
    """The rollouts with the weighted sum of the rewards in `column`, over the rewards that apply to each episode.

    An episode to which no reward of nonzero weight applies is excluded. A reward of weight 0 is only measured, one with
    `bootstrap` or a bound is not part of it.
    """
    names = [entry.name for entry in rewards]
    if column in names and any(entry.name != column or entry.weight != 1 for entry in rewards):
        raise RewardError(f"the sum of all rewards is called '{column}'; give the reward of that name another one")
    token_episode = np.repeat(rollouts.episode, np.diff(rollouts.offsets))
    total, excluded = np.zeros(len(rollouts.tokens)), np.ones(rollouts.n_episodes, bool)
    for entry in rewards:
        if entry.weight != 0 and not entry.bootstrap and entry.bound is None:
            out = rollouts.excluded.get(entry.name, np.zeros(rollouts.n_episodes, bool))
            total += np.where(out[token_episode], 0.0, entry.weight * rollouts.rewards[entry.name])
            excluded &= out
    return replace(rollouts, rewards={**rollouts.rewards, column: total},
                   excluded={**rollouts.excluded, column: excluded})


def columns_of(rollouts: Rollouts) -> dict[str, list[Any]]:
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


def _called(rollouts: Rollouts, rewards: Sequence[Entry], pool: Pool, max_error_rate: float) -> list[_Scores]:
    """Outcomes of all rewards: calls on many rows first, then one by one the rows of those that failed."""
    E = rollouts.n_episodes
    found = [_Scores(np.zeros(E), np.zeros(E, bool)) for _ in rewards]
    columns, where = columns_of(rollouts), _labels(rollouts)
    accepted = [accepted_by(entry, pool.call(i), columns) for i, entry in enumerate(rewards)] if E else []
    def job(reward: int, rows: tuple[int, ...]) -> Job:
        return Job(reward, rows, {n: [values[e] for e in rows] for n, values in accepted[reward].items()})
    whole = tuple(range(E))
    jobs = [job(i, rows) for i in range(len(accepted))
            for rows in (_calls(rollouts.group) if pool.shared(i) else [whole])]
    def run(jobs: Sequence[Job]) -> list[tuple[Job, Failed]]:
        """Note what is final; calls on several rows that failed are not."""
        failed = []
        for j, result in zip(jobs, pool.run(jobs), strict=True):
            if len(j.rows) > 1 and isinstance(result, Failed):
                failed.append((j, result))
            else:
                _note(rewards[j.reward], found[j.reward], j.rows, result, where)
        for entry, scores in zip(rewards, found, strict=True):
            _stop_if_too_many(entry, scores, where, max_error_rate)
        return failed
    failed = run(jobs)
    again = [job(j.reward, (row,)) for j, _ in failed for row in j.rows]
    for start in range(0, len(again), RETRIED_ROWS):
        run(again[start: start + RETRIED_ROWS])
    for j, result in failed:
        _together(rewards[j.reward], found[j.reward], j.rows, result)
    return found


def _calls(group: np.ndarray) -> Iterator[tuple[int, ...]]:
    """Rows of each call: consecutive whole groups until they are enough."""
    rows: list[int] = []
    for e in range(len(group)):
        if len(rows) >= CALL_ROWS and group[e] != group[e - 1]:
            yield tuple(rows)
            rows = []
        rows.append(e)
    yield tuple(rows)


def _note(entry: Entry, scores: _Scores, rows: Sequence[int], result: Outcome, where: Sequence[str]) -> None:
    """Write an outcome down; a wrong answer ends it all."""
    match result:
        case Wrong(what, row):
            blamed = "" if row is None else f" (row {where[rows[row]]}); return None where it does not apply"
            raise RewardError(f"reward '{entry.name}' returned {what}{blamed}")
        case Returned(numbers):
            scores.numbers[list(rows)] = [0.0 if x is None else x for x in numbers]
            scores.excluded[list(rows)] = [x is None for x in numbers]
        case _:
            scores.failures[rows[0]] = result


def _together(entry: Entry, scores: _Scores, rows: Sequence[int], result: Failed) -> None:
    """What a call on several rows failed of, where none of them fails alone."""
    if len(rows) == 1 or any(row in scores.failures for row in rows):
        return
    match result:
        case Raised():
            message = said(entry, result, " on the rows of this step together, though on none of them alone,")
            raise RewardError(message) from Traceback(result.traceback)
        case Overdue(seconds):
            log.warning("reward '%s' took more than %g s on %d rows, though it hangs on none of them; its process was "
                        "killed for it: raise rewards.%s.timeout", entry.name, seconds, len(rows), entry.name)
        case _:
            log.warning("reward '%s' lost its process on %d rows, though on none of them alone: %s", entry.name,
                        len(rows), ending(result.code))


def _stop_if_too_many(entry: Entry, scores: _Scores, where: Sequence[str], rate: float) -> None:
    """Raise for the first row that must not fail, or where failures are more than a few."""
    by_row = sorted(scores.failures.items())
    fatal = [(row, failure) for row, failure in by_row if _rule(entry, failure) == "fail"]
    share = len(by_row) / max(1, len(where))
    if not fatal and share <= rate:
        return
    row, failure = (fatal or by_row)[0]
    many = "" if fatal else (f"\n{len(by_row)} of {len(where)} rows failed, more than reward_workers.max_error_rate "
                             f"({rate:g}) allows; this is the first of them")
    cause = Traceback(failure.traceback) if isinstance(failure, Raised) else None
    raise RewardError(said(entry, failure, f" on row {where[row]}") + many) from cause


def _rule(entry: Entry, failure: Failed) -> Rule:
    return entry.on_error if isinstance(failure, Raised) else entry.on_timeout


def _dropped(entry: Entry, scores: _Scores, group: np.ndarray, where: Sequence[str]) -> np.ndarray:
    """[E] bool, episodes that the rules leave out of learning; every failure is told in the log."""
    dropped = np.zeros(len(group), bool)
    for row, failure in sorted(scores.failures.items()):
        rule = _rule(entry, failure)
        log.warning("%s", f"{said(entry, failure, f' on row {where[row]}').splitlines()[0]}: {rule}")
        if rule == "drop_sample":
            dropped[row] = True
        if rule == "drop_group":
            dropped |= group == group[row]
    return dropped


def said(entry: Entry, failure: Failed, row: str) -> str:
    """A failure in words, the first line what it is, the second how to mend it."""
    match failure:
        case Raised(error, place, _):
            return (f"reward '{entry.name}' raised {error}{row}{f' at {place}' if place else ''}\n"
                    + ("mend the function; for rows to which it does not apply, let it return None"
                       if callable(entry.call) else
                       f"to go on without such rows set rewards.{entry.name}.on_error: drop_sample"))
        case Overdue(seconds):
            return (f"reward '{entry.name}' did not answer within {seconds:g} s{row}\n"
                    f"mend the function, or raise rewards.{entry.name}.timeout")
        case _:
            return (f"reward '{entry.name}' ended its process ({ending(failure.code)}){row}\n"
                    "mend the function: it used too much memory, or C code that it calls has a fault")


def _on_last_token(rollouts: Rollouts, outcome: np.ndarray) -> np.ndarray:
    """[E] -> [M], each outcome on the last token of its episode."""
    tokens = rollouts.episode_tokens
    if not tokens.all():
        raise ValueError(f"episode {np.flatnonzero(tokens == 0)[0]} has no token on which a reward could stand")
    placed = np.zeros(len(rollouts.tokens))
    placed[offsets_of(tokens)[1:] - 1] = outcome
    return placed


def accepted_by(entry: Entry, call: Callable[..., Any], columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The columns that the reward's signature accepts; all where it takes `**columns`."""
    try:
        parameters = inspect.signature(call).parameters.values()
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
