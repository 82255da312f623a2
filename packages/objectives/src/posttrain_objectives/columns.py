"""Columns that an objective cannot do without, refused by name where they are missing. Knows no objective."""

from __future__ import annotations

from posttrain.data import Array, MicroBatch, TokenOutputs


def required(holder: MicroBatch | TokenOutputs, name: str) -> Array:
    """The column `name` of a batch, or of what the model said; raises `ValueError` where there is none."""
    column = getattr(holder, name)
    if column is None:
        raise ValueError(f"{type(holder).__name__}.{name} is missing: the objective names it in `needs` or `outputs`, "
                         "and whoever calls it provides it")
    return column
