"""Per-action policy losses from ratio and advantage, to be minimised. Knows neither batches nor averaging.

Letters: r ratio, A advantage (detached), eps_l and eps_h the clip range, c the bound of dual clipping, sg stops the
gradient, sigma is the logistic function and tau its temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from posttrain.data import Array
from posttrain.ops import Ops

Surrogate = Literal["clip", "reinforce", "cispo", "sapo"]


class Bounds(NamedTuple):
    """The numbers of the surrogates; each reads its own."""

    low: float
    """eps_l"""
    high: float
    """eps_h"""
    dual: float
    """c, 0 where there is no dual clipping."""
    cap: float
    """The largest weight of CISPO."""
    tau_positive: float
    """tau of SAPO where A > 0."""
    tau_negative: float
    """tau of SAPO elsewhere."""


class Surrogated(NamedTuple):
    """What a surrogate says of each action."""

    loss: Array
    """[m, N]"""
    events: Mapping[str, Array]
    """name -> [m, N] or [N] bool, where the gradient was cut, and by which bound."""


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


def cispo(ops: Ops, r: Array, A: Array, logprobs: Array, bounds: Bounds) -> Surrogated:
    """-sg(min(r, cap)) A log pi: the weight of an action is bounded, its gradient is never zero.

    MiniMax 2025, arXiv 2506.13585, section 3.1, without a lower bound, as there. The cap is a ratio and not a distance
    from 1. At r = 1 the gradient is the plain policy gradient.
    """
    weight = ops.xp.clip(ops.stop_gradient(r), None, bounds.cap)
    return Surrogated(-weight * A * logprobs, {"capped": r > bounds.cap})


def sapo(ops: Ops, r: Array, A: Array, logprobs: Array, bounds: Bounds) -> Surrogated:
    """-(4 / tau) sigma(tau (r - 1)) A, with one tau where A > 0 and another elsewhere: a gate in place of a clip.

    Gao et al. 2025, arXiv 2511.20347. The gradient is that of -r A, times 4 sigma (1 - sigma), which is 1 at r = 1 and
    falls on both sides. The value at r = 1 is -2 A / tau, so loss curves of different tau cannot be compared.
    """
    tau = ops.xp.where(A > 0, bounds.tau_positive * ops.xp.ones_like(A), bounds.tau_negative * ops.xp.ones_like(A))
    return Surrogated(-(4.0 / tau) * ops.sigmoid(tau * (r - 1.0)) * A, {})


SURROGATES: Mapping[Surrogate, Callable[[Ops, Array, Array, Array, Bounds], Surrogated]] = {
    "clip": clip,
    "reinforce": reinforce,
    "cispo": cispo,
    "sapo": sapo,
}
