"""What several components refuse of a field: a name that a table does not hold, a number that is not positive. Knows no
component.
"""

from __future__ import annotations

import math
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


def require_positive(**fields: float) -> None:
    """Raise `ValueError` for the first field that is not finite and positive.

    >>> require_positive(target=0.05, horizon=0.0)
    Traceback (most recent call last):
    ...
    ValueError: horizon must be finite and positive, got 0.0
    """
    for name, x in fields.items():
        if not (math.isfinite(x) and x > 0):
            raise ValueError(f"{name} must be finite and positive, got {x}")
