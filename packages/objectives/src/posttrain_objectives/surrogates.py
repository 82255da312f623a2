"""Per-action policy losses from ratio and advantage, to be minimised. Knows neither batches nor averaging.

Letters: r ratio, A advantage (detached), eps_l and eps_h the clip range, c the bound of dual clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from posttrain.data import Array
from posttrain.ops import Ops

Surrogate = Literal["clip", "reinforce"]


class Bounds(NamedTuple):
    """The numbers of the clipped surrogates."""

    low: float
    """eps_l"""
    high: float
    """eps_h"""
    dual: float
    """c, 0 where there is no dual clipping."""


class Surrogated(NamedTuple):
    """What a surrogate says of each action."""

    loss: Array
    """[m, N]"""
    events: Mapping[str, Array]
    """name -> [m, N] bool, where the gradient was cut, and by which bound."""


def clip(ops: Ops, r: Array, A: Array, logprobs: Array, bounds: Bounds) -> Surrogated:
    """-min(r A, clip(r, 1 - eps_l, 1 + eps_h) A), for A < 0 at most -c A. r is [N], A is [m, N].

    Schulman et al. 2017, arXiv 1707.06347, section 3; two bounds: Yu et al. 2025, arXiv 2503.14476 (clip-higher); dual
    clipping: Ye et al. 2019, arXiv 1912.09729. The gradient is zero for A > 0 where r > 1 + eps_h, and for A < 0 where
    r < 1 - eps_l or r > c.
    """
    xp = ops.xp
    low, high, c = 1.0 - bounds.low, 1.0 + bounds.high, bounds.dual
    loss = -xp.minimum(r * A, xp.clip(r, low, high) * A)
    events = {"clip_low": (A < 0) & (r < low), "clip_high": (A > 0) & (r > high)}
    if c > 0:
        loss = xp.where(A < 0, xp.minimum(loss, -c * A), loss)
        events["clip_dual"] = (A < 0) & (r > c)
    return Surrogated(loss, events)


def reinforce(ops: Ops, r: Array, A: Array, logprobs: Array, bounds: Bounds) -> Surrogated:
    """-A log pi (Williams 1992): no ratio and no clipping, so for one step on actions of the current policy."""
    return Surrogated(-A * logprobs, {})


SURROGATES: Mapping[Surrogate, Callable[[Ops, Array, Array, Array, Bounds], Surrogated]] = {
    "clip": clip,
    "reinforce": reinforce,
}
