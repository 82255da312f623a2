"""Plain values (of a YAML file, a dict) into dataclasses, as their annotations ask; every misfit is reported.

Knows types and what keys are called elsewhere, and nothing of components or of where values come from.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from posttrain.errors import InputError, did_you_mean
from posttrain.synonyms import called_here

Key = tuple[str | int, ...]
"""A path in a tree of values: `("rollout", "engine")`."""
Report = Callable[[Key, str], None]
"""Takes a problem: the key it concerns, and what to say of it."""


def dotted(key: Key) -> str:
    """`rollout.engine`."""
    return ".".join(map(str, key))


def construct(cls: Any, values: Mapping[str, Any], key: Key, report: Report, what: str = "a key",
              special: Callable[[Field[Any], Any, Key], Any] | None = None) -> Any:
    """The dataclass `cls` from `values`, or None after a report. `what` its fields are called in reports;
    `special` converts those fields, also of nested dataclasses, that have metadata of `kind`.

    >>> from posttrain.data import Sampling
    >>> construct(Sampling, {"top_kk": 3}, ("rollout",), lambda key, message: print(message))
    rollout.top_kk is not a key; did you mean 'top_k'?
    """
    known, hints = {f.name: f for f in fields(cls) if f.init}, hints_of(cls)
    noted: list[Key] = []

    def note(at: Key, message: str) -> None:
        noted.append(at)
        report(at, message)

    found = {}
    for name, value in values.items():
        at = (*key, name)
        if name not in known:
            hint = called_here(name, dotted(key)) or did_you_mean(name, known)
            hint = hint or f"; known: {', '.join(known) or 'none'}"
            note(at, f"{dotted(at)} is not {what}{hint}")
        elif special is not None and "kind" in known[name].metadata:
            found[name] = special(known[name], value, at)
        elif is_dataclass(hints.get(name)) and isinstance(value, Mapping):
            found[name] = construct(hints[name], value, at, note, special=special)
        else:
            found[name] = convert(hints.get(name, Any), value, at, note)
    missing = [name for name, f in known.items() if f.default is MISSING is f.default_factory and name not in values]
    for name in missing:
        note(key, f"{dotted(key)}: field '{name}' of {cls.__name__} needs a default, or a value in the configuration "
                  f"({dotted((*key, name))})".removeprefix(": "))
    if missing:
        return None
    try:
        made = cls(**found)
        return None if noted else made
    except (ValueError, TypeError, InputError) as error:
        blamed = [(*key, word) for word in re.findall(r"\w+", str(error)) if word in found]
        if blamed or not noted:  # else it may come of the values left out
            report(blamed[0] if blamed else key, f"{dotted(key)}: {error}".lstrip(": "))
    except Exception:
        if not noted:  # else it may stumble over a value that was told already
            raise
    return None


def convert(hint: Any, value: Any, key: Key, report: Report) -> Any:
    """`value` as the annotation `hint` asks, or None after a report. An annotation that a configuration cannot
    express (a callable, an array) takes what it is given. Sets are written as lists, members of an `Enum` by their
    value or their name.

    >>> convert(tuple[float, float], [0.9, 1], ("optimizer", "betas"), print)
    (0.9, 1.0)
    """
    shape = _enum if _is_enum(hint) else next(
        (shape for origin, shape in _SHAPES if (get_origin(hint) or hint) in origin), _opaque)
    fits, made = shape(hint, value, key, report)
    if not fits:
        word = isinstance(value, bool) and (hint is str or any(isinstance(choice, str) for choice in _choices(hint)))
        said = "; YAML reads on, off, yes and no as true and false: quote the word" if word else ""
        near = did_you_mean(str(value), map(str, _choices(hint)))
        report(key, f"{dotted(key)} must be {_phrase(hint)}, got {value!r}{said}{near}")
    return made


Converted = tuple[bool, Any]
"""Whether the value has the annotation's shape, and the value converted."""


def _literal(hint: Any, value: Any, key: Key, report: Report) -> Converted:
    return any(value == a and type(value) is type(a) for a in get_args(hint)), value


def _enum(hint: Any, value: Any, key: Key, report: Report) -> Converted:
    """A member by its value, else by its name."""
    if isinstance(value, hint):
        return True, value
    same = [m for m in hint if m.value == value and isinstance(m.value, bool) == isinstance(value, bool)]
    found = same or [m for name, m in hint.__members__.items() if name == value]
    return bool(found), next(iter(found), None)


def _union(hint: Any, value: Any, key: Key, report: Report) -> Converted:
    options, missed = sorted(get_args(hint), key=lambda option: type(value) is not option), []
    for option in options:
        if is_dataclass(option) and isinstance(value, Mapping):
            return True, construct(option, value, key, report)  # reports what is wrong inside
        made = convert(option, value, key, lambda at, message: missed.append(at))
        if not missed:
            return True, made
        missed.clear()
    return False, None


def _sequence(hint: Any, value: Any, key: Key, report: Report) -> Converted:
    if not isinstance(value, list | tuple):
        return False, None
    kind, arguments = get_origin(hint) or hint, get_args(hint) or (Any, ...)
    many = kind is not tuple or arguments[-1] is ...
    if not many and len(arguments) != len(value):
        return False, None
    items = [convert(arguments[0] if many else arguments[i], v, key, report) for i, v in enumerate(value)]
    return True, items if kind is list else tuple(items)


def _set(hint: Any, value: Any, key: Key, report: Report) -> Converted:
    if not isinstance(value, list | tuple | set | frozenset):
        return False, None
    of, *_ = get_args(hint) or (Any,)
    items = [convert(of, item, key, report) for item in value]
    try:
        return True, set(items) if (get_origin(hint) or hint) is set else frozenset(items)
    except TypeError:  # of what cannot be in a set
        return False, None


def _mapping(hint: Any, value: Any, key: Key, report: Report) -> Converted:
    if not isinstance(value, Mapping):
        return False, None
    names, values = get_args(hint) or (Any, Any)
    return True, {convert(names, k, key, report): convert(values, v, (*key, k), report) for k, v in value.items()}


def _opaque(hint: Any, value: Any, key: Key, report: Report) -> Converted:
    if is_dataclass(hint) and isinstance(value, Mapping):
        return True, construct(hint, value, key, report)
    return not isinstance(hint, type) or isinstance(value, hint), value


def _plain(fits: Callable[[Any], bool], made: Callable[[Any], Any]) -> Callable[..., Converted]:
    def shape(hint: Any, value: Any, key: Key, report: Report) -> Converted:
        return (True, made(value)) if fits(value) else (False, None)
    return shape


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_SHAPES: tuple[tuple[tuple[Any, ...], Callable[..., Converted]], ...] = (
    ((Any, object), _plain(lambda v: True, lambda v: v)),
    ((int,), _plain(lambda v: _number(v) and float(v).is_integer(), int)),
    ((float,), _plain(_number, float)),
    ((Path,), _plain(lambda v: isinstance(v, str | Path), Path)),
    ((Literal,), _literal),
    ((Union, types.UnionType), _union),
    ((list, tuple, Sequence), _sequence),
    ((set, frozenset, Set), _set),
    ((dict, Mapping), _mapping),
)
_PHRASES: Mapping[Any, str] = {
    type(None): "null", bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path",
    **dict.fromkeys((list, tuple, Sequence, set, frozenset, Set), "a list"), dict: "a map", Mapping: "a map"}


def _phrase(hint: Any) -> str:
    """An annotation in words: `one of 'group', 'batch' or null`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal or _is_enum(hint):
        return "one of " + ", ".join(f"'{a}'" if isinstance(a, str) else str(a) for a in _choices(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(_phrase(a) for a in arguments)
    if origin is tuple and arguments[-1] is not ...:
        return f"a list of {len(arguments)} values"
    if is_dataclass(hint):
        return "a block of keys"
    return _PHRASES.get(origin or hint, "") or getattr(hint, "__name__", str(hint))


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values that a configuration can write, where they can be counted."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(choice for option in get_args(hint) for choice in _choices(option))
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(written(member) for member in hint) if _is_enum(hint) else ()


def written(member: Enum) -> Any:
    """A member of an `Enum` as a configuration writes it: its value where YAML can hold it, else its name.

    >>> from http import HTTPStatus
    >>> written(HTTPStatus.OK)
    200
    """
    value = member.value
    return value if type(value) in (str, int, float, bool) else member.name


def hints_of(cls: Any) -> Mapping[str, Any]:
    """Annotations by field, evaluated; none where they cannot be."""
    try:
        return get_type_hints(cls)
    except NameError:
        return {}  # it names what is imported for type checkers only: values are taken as they are
