"""State that the methods of `constraints.py` share, and the step that all of them take: measure, hold, cap, say where
each cost stands. Knows no method.

Costs have very different units (a length of 40, a rate of 0.02), so every method sees the violation relative to the
limit, v = (cost - limit) / |limit|. The other side of the loop has no unit either: a multiplier weighs advantages that
were normalised before they are mixed. Gains are therefore plain numbers, and one default fits all costs. A running
standard deviation would do that too, but its gain would grow without bound while the cost is still.

A cost that is not negative has v >= -1, but a small limit can be broken many times over. Dual variables are moved by v
`bounded` to [-1, 1], so that what they sum up comes down as fast as it went up; what is reported is v itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, final

from posttrain.errors import ConfigError, did_you_mean

Status = Literal["feasible", "converging", "infeasible"]
Memory = Mapping[str, float]
"""What a method remembers of one cost, numbers by name."""
Rule = Callable[[float, Memory], tuple[float, Memory]]
"""(v, memory) -> (multiplier, memory): a method, for one cost."""

MAX_VIOLATION = 1.0
"""What is bounded counts at most this much: one wild rollout must not send a multiplier to its cap."""
FAR = 1e6
"""A violation larger than this is reported as this: a running mean of infinity would never come down."""
PATIENCE = 20
"""Updates in a row with the multiplier at its cap and the running mean of v no lower, after which a constraint is
infeasible: one rollout that is far off is no proof, and a cost that still falls is none either."""
SMOOTHING = 0.9
"""Decay of the running mean of v that the status is read from; the noise of one rollout does not change it."""
TOLERANCE = 0.02
"""Largest running mean of v, relative to the limit, that counts as kept; and the share by which it must fall to count
as lower."""


@final
@dataclass(frozen=True, slots=True)
class Multipliers:
    """State of a constraint, maps by cost, saved as JSON."""

    limits: Mapping[str, float]
    """Each cost is to be at most this."""
    scales: Mapping[str, float]
    """Unit in which the violation of each cost is counted."""
    multipliers: Mapping[str, float]
    """lambda >= 0, the weight of each cost's advantages."""
    status: Mapping[str, str]
    """`feasible`: the running mean of the cost is within its limit. `converging`: it is over it, and the multiplier is
    at work. `infeasible`: it stays over it with the multiplier at its cap, and no longer falls."""
    violations: Mapping[str, float]
    """Running mean of v."""
    capped: Mapping[str, int]
    """Updates in a row that ended at the cap with the limit broken, from the last that made the running mean lower."""
    lowest: Mapping[str, float] = field(default_factory=dict)
    """Running mean of v at the first of these."""
    memory: Mapping[str, Memory] = field(default_factory=dict)
    """What the method remembers of each cost."""
    reward_weight: float = 1.0
    """Weight of the reward's advantages beside the multipliers; 0 while a method asks for the costs alone."""


def started(limits: Mapping[str, float], scale: Mapping[str, float], multiplier: float = 0.0) -> Multipliers:
    """The state before the first rollout.

    Raises `ConfigError` for a limit that is not finite, a limit of 0 without a `scale`, and a `scale` of no cost.
    """
    problems = [f"constraint.scale.{name} is no cost with a limit{did_you_mean(name, limits)}; costs are "
                f"{', '.join(limits)}" for name in scale if name not in limits]
    problems += [f"the limit of '{name}' must be finite, got {limit}" for name, limit in limits.items()
                 if not math.isfinite(limit)]
    problems += [f"the limit of '{name}' is 0, so a violation has no size relative to it; give its unit: "
                 f"constraint.scale.{name}: 1.0" for name, limit in limits.items() if limit == 0 and name not in scale]
    problems += [f"constraint.scale.{name} must be finite and positive, got {unit}" for name, unit in scale.items()
                 if not (math.isfinite(unit) and unit > 0)]
    if problems:
        raise ConfigError(problems)
    return Multipliers(limits=dict(limits), scales={name: scale.get(name, abs(d)) for name, d in limits.items()},
                       multipliers=dict.fromkeys(limits, multiplier), status=dict.fromkeys(limits, "converging"),
                       violations={}, capped=dict.fromkeys(limits, 0), memory={name: {} for name in limits})


def violations(state: Multipliers, costs: Mapping[str, float]) -> dict[str, float]:
    """v of the costs that were measured: a cost that is absent or no finite number has no signal.

    Raises `ValueError` for a cost without a limit.
    """
    if unknown := sorted(costs.keys() - state.limits.keys()):
        raise ValueError(f"cost '{unknown[0]}' has no limit{did_you_mean(unknown[0], state.limits)}; limits are "
                         f"{', '.join(state.limits)}")
    return {name: min(max((costs[name] - d) / state.scales[name], -FAR), FAR) for name, d in state.limits.items()
            if name in costs and math.isfinite(costs[name])}


def bounded(v: float) -> float:
    """v within [-`MAX_VIOLATION`, `MAX_VIOLATION`]: what a dual variable is moved by."""
    return min(max(v, -MAX_VIOLATION), MAX_VIOLATION)


def stepped(state: Multipliers, v: Mapping[str, float], rule: Rule, cap: float, tol: float = 0.0) -> Multipliers:
    """The state after one rollout whose violations are `v`; what is not in `v` is held. A running mean up to `tol`, and
    in any case up to `TOLERANCE`, counts as kept."""
    tol = max(tol, TOLERANCE)
    found = {name: rule(x, state.memory[name]) for name, x in v.items()}
    multipliers = {name: min(x, cap) for name, (x, _) in found.items()}
    means = {name: SMOOTHING * state.violations.get(name, x) + (1 - SMOOTHING) * x for name, x in v.items()}
    stuck = {name: _stuck(state, name, means[name], multipliers[name] >= cap and x > 0 and means[name] > tol)
             for name, x in v.items()}
    return replace(
        state, multipliers={**state.multipliers, **multipliers}, violations={**state.violations, **means},
        capped={**state.capped, **{name: n for name, (n, _) in stuck.items()}},
        lowest={**state.lowest, **{name: mean for name, (_, mean) in stuck.items()}},
        memory={**state.memory, **{name: kept for name, (_, kept) in found.items()}},
        status={**state.status, **{name: _status(means[name], n, tol) for name, (n, _) in stuck.items()}})


def _stuck(state: Multipliers, name: str, mean: float, at_cap: bool) -> tuple[int, float]:
    """(updates at the cap since the running mean was last lower than before, the running mean then)."""
    if not at_cap:
        return 0, mean
    lowest = state.lowest.get(name, mean)
    if state.capped[name] == 0 or mean < (1 - TOLERANCE) * lowest:
        return 1, mean
    return state.capped[name] + 1, lowest


def _status(mean: float, capped: int, tol: float) -> Status:
    if mean <= tol:
        return "feasible"
    return "infeasible" if capped >= PATIENCE else "converging"


def require_not_negative(component: object, *names: str) -> None:
    """Raise `ValueError` for the first of these fields that is negative or not finite."""
    for name in names:
        if not (math.isfinite(getattr(component, name)) and getattr(component, name) >= 0):
            raise ValueError(f"{name} must be finite and not negative, got {getattr(component, name)}")
