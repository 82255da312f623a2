"""Diagnostics of a loss as detached (total, count) pairs, so that they add without bias. Knows no objective."""

from __future__ import annotations

from posttrain.data import Array
from posttrain.ops import Ops


def mean_over_actions(ops: Ops, x: Array, weight: Array) -> tuple[Array, Array]:
    """`(total, count)` of `x` [..., N] over the actions with `weight` [N] > 0, each action counting the same.

    A weight is positive exactly on the kept actions of a batch, so what a backend appends to fill a bucket does not
    count. `total / count`, each summed over parts and ranks, is the mean over all actions of the step. Booleans give
    a fraction.
    """
    xp = ops.xp
    x = xp.astype(ops.stop_gradient(x), weight.dtype)
    counted = xp.broadcast_to(xp.astype(weight > 0, weight.dtype), x.shape)
    return xp.sum(counted * x), xp.sum(counted)
