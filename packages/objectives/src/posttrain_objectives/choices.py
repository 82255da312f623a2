"""Refuses a name that a component's table does not hold, with the names it does. Knows no component."""

from __future__ import annotations

from collections.abc import Iterable

from posttrain.errors import did_you_mean


def require_choice(field: str, name: str, known: Iterable[str]) -> None:
    """Raise `ValueError` unless `name` is one of `known`.

    >>> require_choice("ratio", "tokn", ("token", "sequence"))
    Traceback (most recent call last):
    ...
    ValueError: ratio 'tokn' is not one of token, sequence; did you mean 'token'?
    """
    names = tuple(known)
    if name not in names:
        raise ValueError(f"{field} {name!r} is not one of {', '.join(names)}{did_you_mean(name, names)}")
