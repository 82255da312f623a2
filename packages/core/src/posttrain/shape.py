"""Whether a component has the shape of its kind: the members of the protocol, callable as the protocol calls them.

Knows protocols, and nothing of what components compute. Imports no framework and no test tool.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from posttrain import protocols
from posttrain.errors import Problem, did_you_mean

PROTOCOLS: Mapping[str, type] = {
    "estimator": protocols.Estimator, "correction": protocols.Correction, "objective": protocols.Objective,
    "kl": protocols.KL, "constraint": protocols.Constraint, "combiner": protocols.Combiner,
    "gradient_combiner": protocols.GradientCombiner, "backend": protocols.Backend, "engine": protocols.Engine,
    "kernel": protocols.Kernel, "tokenizer": protocols.TokenizerSource, "batching": protocols.Batching,
    "searcher": protocols.Searcher, "task": protocols.Task, "reward": protocols.Reward, "tracker": protocols.Tracker}
"""What a component of each kind must be."""


_ABSENT = object()


def protocol_members(protocol: type) -> Iterator[tuple[str, Any]]:
    """Names a protocol asks for, with what it declares: a function or a property."""
    for base in reversed(protocol.__mro__):
        if base in (object,) or base.__module__ == "typing":
            continue
        for name, declared in vars(base).items():
            if name == "__call__" or not name.startswith("_"):
                yield name, declared


def misshapen(component: Any, protocol: type) -> Iterator[Problem]:
    """Everything in which a component is not what its protocol asks for, with the line of its source."""
    cls = type(component)
    for name, declared in protocol_members(protocol):
        where = f"{cls.__name__}.{name}"
        if inspect.getattr_static(component, name, _ABSENT) is _ABSENT:
            yield Problem(f"{cls.__name__} has no {name}, which {protocol.__name__} asks for", source_of(cls))
        elif inspect.isfunction(declared):
            given = getattr(component, name)
            if not callable(given):
                yield Problem(f"{where} must be a method", source_of(cls))
            elif fault := uncallable(declared, given, where):
                yield Problem(fault, source_of(given))
        else:
            yield from _property(component, name, declared, where)


def uncallable(declared: Callable[..., Any], given: Callable[..., Any], where: str) -> str:
    """Why a call that the protocol allows, by position or by name, is no call of `given`; empty where each is one."""
    parameters = list(inspect.signature(declared).parameters.values())[1:]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_name = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    required = {name: None for name, p in by_name.items() if p.default is p.empty}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        required["another_column"] = None  # the protocol sends names that nobody knows yet
    signature = inspect.signature(given)
    only_by_name = {name: None for name, p in by_name.items() if p.kind is p.KEYWORD_ONLY and name in required}
    only_by_name |= {n: None for n in required if n not in by_name}
    first = [p for p in positional if p.kind is p.POSITIONAL_ONLY]
    calls = [(len(positional), dict.fromkeys(by_name.keys() - {p.name for p in positional}) | only_by_name),
             (len(first), dict.fromkeys(by_name) | only_by_name)]
    for count, names in calls:
        try:
            signature.bind(*[None] * count, **names)
        except TypeError as error:
            return (f"{where}{signature} cannot be called as the protocol has it, {inspect.signature(declared)}: "
                    f"{error}")
    return ""


def _property(component: Any, name: str, declared: property, where: str) -> Iterator[Problem]:
    try:
        value = getattr(component, name)
    except Exception as error:  # the author's own code may raise anything
        yield Problem(f"{where} raised {type(error).__name__}: {error}", source_of(type(component)))
        return
    if inspect.ismethod(value):
        yield Problem(f"{where} must be a property (or a field), not a method", source_of(value))
    elif fault := _unlike(value, get_type_hints(declared.fget).get("return")):
        yield Problem(f"{where} {fault}", source_of(type(component)))


def _unlike(value: Any, hint: Any) -> str:
    """Why a property's value is not as declared; empty where it is, or where the declaration is of another sort."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is frozenset:
        if not isinstance(value, Set):
            return f"must be a frozenset of {arguments[0].__name__}, got {value!r}"
        known = [str(member) for member in arguments[0]]
        wrong = [str(item) for item in value if str(item) not in known]
        near = did_you_mean(wrong[0], known) or f"; known: {', '.join(known)}" if wrong else ""
        return f"names '{wrong[0]}', which is no {arguments[0].__name__}{near}" if wrong else ""
    if origin is tuple and not isinstance(value, tuple):
        return f"must be a tuple, got {value!r}"
    if origin is Literal and value not in arguments:
        return f"must be one of {', '.join(map(repr, arguments))}, got {value!r}"
    return ""


def source_of(thing: Any) -> str:
    """`part.py:12`, where a class, function or method is written; empty where no file says."""
    try:
        return f"{Path(str(inspect.getsourcefile(thing))).name}:{inspect.getsourcelines(thing)[1]}"
    except (OSError, TypeError):
        return ""
