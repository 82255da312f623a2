"""Running out of memory in JAX, on any device, as core's `MemoryExhausted`, where it happens and not where it is found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
from posttrain.errors import MemoryExhausted

_T = TypeVar("_T")
_SIGNS = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")


def translating_memory_errors(compute: Callable[[], _T]) -> _T:
    """Run `compute` and wait for its arrays; where memory runs out raise `MemoryExhausted`, after the frames that hold
    arrays are gone."""
    try:
        return jax.block_until_ready(compute())
    except MemoryError as error:
        message = str(error) or "the host's memory is used up"
    except RuntimeError as error:
        message = str(error)
        if not any(sign in message for sign in _SIGNS):
            raise
    raise MemoryExhausted(message.partition("\n")[0])
