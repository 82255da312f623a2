"""What learners of every framework refuse, and in which words. Imports no framework."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from posttrain.errors import ConfigError, Diverged
from posttrain.protocols import Objective, Output

_MADE_WITH: Mapping[Output, str] = {
    Output.VALUES: "value head", Output.ACTION_VALUES: "action-value head",
    Output.EXPECTED_ACTION_VALUES: "action-value head", Output.REFERENCE_KL: "comparison with a reference",
    Output.EXPERT_LOAD: "load of a mixture of experts"}
"""Outputs that a model gives only where something was asked for, and that in words."""
_SCORING_ONLY = frozenset({Output.EXPECTED_ACTION_VALUES})
"""Outputs without a gradient."""
AT_THE_END = frozenset({Output.BOOTSTRAP_VALUES, Output.EXPECTED_ACTION_VALUES})
"""Outputs that say something of the state after each episode's last token."""


def require_outputs(backend: str, asked: frozenset[Output], provides: frozenset[Output], hint: str = "") -> None:
    """Raise `ConfigError` that names the outputs which a model does not give."""
    if missing := asked - provides:
        parts = sorted({_MADE_WITH[output] for output in missing if output in _MADE_WITH})
        why = hint or (f" (no {' and no '.join(parts)} was asked for)" if parts else "")
        raise ConfigError([f"the {backend} backend gives no {', '.join(sorted(missing))}{why}"])


def require_differentiable(objective: Objective) -> None:
    """Raise `ConfigError` where an objective asks for outputs that carry no gradient."""
    if constant := objective.outputs & _SCORING_ONLY:
        raise ConfigError([f"{', '.join(sorted(constant))} carry no gradient; they come from scoring alone, and no "
                           f"objective can ask for them ({type(objective).__name__} does)"])


def require_weights_of_slots(slots: Collection[str], weights: Mapping[str, float]) -> None:
    """Raise `ValueError` for slots with gradients that are given no weight."""
    if unnamed := sorted(set(slots) - set(weights)):
        raise ValueError(f"slots {unnamed} have gradients but no weight; weights were given for {sorted(weights)}")


def incomparable(why: str) -> ConfigError:
    """A model that no KL over the whole vocabulary can be had to."""
    return ConfigError([f"a KL over the whole vocabulary cannot be had: {why}"],
                       next_step="Take a reference of the policy's backend, vocabulary and device, or a KL that looks "
                                 "at sampled actions alone: kl.estimator=k2.")


def diverged(bad_steps: int, broken: Sequence[str], parameters: int) -> Diverged:
    """Too many steps whose gradient was not finite; `broken` are the parameters whose own is not."""
    where = f"first in {', '.join(broken[:3])}" if broken else "each is finite, but not the norm of all"
    return Diverged(
        f"the gradient was not finite in {bad_steps} consecutive steps ({where}; {len(broken)} of {parameters} "
        "parameters). Lower optimizer.lr, look at the rewards' scale, or go on from an earlier checkpoint.")
