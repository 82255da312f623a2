"""What components answer, looked at where core takes it: its type, its shapes, whether its numbers are finite.

A wrong answer is the fault of the component, so the error names it, what it gave and what is needed. Knows no framework
and not what is computed; every look is a pass over an array at most.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data import Estimate, Loss, Term, to_numpy
from posttrain.errors import PluginError
from posttrain.protocols import Corrected

Place = Callable[[int], str]
"""Where an action, by its number, comes from: `episode 4, row data.jsonl:7`."""

_NOUNS: Mapping[str, str] = {"weight": "weights", "keep": "values of keep"}


def title(kind: str, component: Any, names: Mapping[str, str]) -> str:
    """How a component is called in an error: `estimator 'grpo'` by the configuration's name, else by its class."""
    return f"{kind} '{names[kind]}'" if kind in names else f"{kind} {type(component).__name__}"


def asked(who: str, call: Callable[..., Any], arguments: tuple[Any, ...], declares: str, *given: Any) -> Any:
    """`call(*arguments)`. Raises `PluginError` where it fails on a column of `given` that is None: the component reads
    what `declares` (its needs) does not name. Any other exception of the component goes on as it is."""
    try:
        return call(*arguments)
    except (TypeError, AttributeError) as error:
        absent = [name for holder in given for name in holder.__dataclass_fields__ if getattr(holder, name) is None]
        text = " ".join(str(error).split())
        if not absent or ("None" not in text and "ufunc" not in text):
            raise
        frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is this function
        place = f" ({Path(frames[0].filename).name}:{frames[0].lineno})" if frames else ""
        single = ("; old_logprobs is also None where a rollout makes one optimiser step, and then equals "
                  "stop_gradient(logprobs)") if "old_logprobs" in absent else ""
        raise PluginError([f"{who} raised {type(error).__name__}: {text}{place}; columns that are None: "
                           f"{', '.join(absent)}; {declares} must name what is read{single}"]) from error


def estimate(who: str, given: Any, episodes: int, actions: int, place: Place, indexable: bool = True) -> Estimate:
    """The answer of an estimator or combiner. Raises `PluginError` with everything wrong in it.

    `indexable` where its author has `episodes.episode` at hand.
    """
    if not isinstance(given, Estimate):
        raise PluginError([f"{who} must return an Estimate, got {_named(given)}; return Estimate(advantages=...), of "
                           "posttrain.data"])
    _require(who, {"advantages": given.advantages, "targets": given.targets, "keep": given.keep}, episodes, actions,
             place, indexable)
    return given


def corrected(who: str, given: Any, episodes: int, actions: int, place: Place) -> Corrected:
    """The answer of a correction. Raises `PluginError` with everything wrong in it."""
    if not isinstance(given, Corrected):
        raise PluginError([f"{who} must return a Corrected, got {_named(given)}; return Corrected(weight, keep, "
                           "metrics), of posttrain.protocols"])
    _require(who, {"weight": given.weight, "keep": given.keep}, episodes, actions, place, True)
    return given


def loss(who: str, given: Any) -> Loss:
    """The answer of an objective. Raises `PluginError` where it is no `Loss` of `Term`s."""
    if not isinstance(given, Loss):
        raise PluginError([f"{who} must return a Loss, got {_named(given)}; return Loss({{'policy': Term(total)}}), of "
                           "posttrain.data"])
    terms: Any = given.terms
    if not isinstance(terms, Mapping):
        raise PluginError([f"{who} gave a Loss whose terms are {_named(terms)}; terms must map names to Term, as in "
                           "Loss({'policy': Term(total)})"])
    if wrong := [f"{who} gave a Loss whose term '{name}' is {_named(term)}; wrap it: Term(total, coef, slot)"
                 for name, term in terms.items() if not isinstance(term, Term)]:
        raise PluginError(wrong)
    return given


def _named(given: Any) -> str:
    return "None (is a return missing?)" if given is None else type(given).__name__


def _require(who: str, columns: Mapping[str, Any], episodes: int, actions: int, place: Place,
             indexable: bool) -> None:
    found = {name: to_numpy(column) for name, column in columns.items()
             if column is not None or name in ("advantages", "weight")}
    problems = [fault for name, column in found.items()
                if (fault := _misfit(name, column, episodes, actions, indexable))]
    if not problems:
        keep = found.pop("keep", np.ones((), bool))
        problems = [fault for name, column in found.items() if (fault := _not_finite(name, column, keep, place))]
    if problems:
        raise PluginError([f"{who} gave {fault}" for fault in problems])


def _misfit(name: str, column: np.ndarray, episodes: int, actions: int, indexable: bool) -> str:
    """What is wrong with the shape or type of a column; empty where nothing is."""
    noun = _NOUNS.get(name, name)
    many = f"{actions} actions ({episodes} episodes)"
    if column.shape == (episodes,) != (actions,) and indexable:
        return f"{episodes} {noun} for {many}; index what belongs to episodes with [episodes.episode]"
    if column.ndim == 1 and len(column) != actions:
        return f"{len(column)} {noun} for {many}; one for each action is needed"
    if column.shape != (actions,):
        return f"{noun} of shape {column.shape} for {many}; the shape must be ({actions},)"
    if name == "keep" and column.dtype.kind != "b":
        return f"{noun} of type {column.dtype}; they must be true or false"
    return "" if column.dtype.kind in "fiub" else f"{noun} of type {column.dtype}; they must be numbers"


def _not_finite(name: str, column: np.ndarray, keep: np.ndarray, place: Place) -> str:
    """How many kept actions have no finite number, and the first of them; empty where all have."""
    bad = ~np.isfinite(column)
    if not bad.any():  # the rule, and then it costs one pass
        return ""
    bad = np.flatnonzero(bad & keep)
    noun = _NOUNS.get(name, name)
    return f"{len(bad)} {noun} that are not finite (first: {place(int(bad[0]))})" if len(bad) else ""
