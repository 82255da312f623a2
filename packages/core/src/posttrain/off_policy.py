"""Which parts of a configuration say that answers are not the policy's own of the moment, and which weigh them for it.

Reads components by their protocols; loads nothing.
"""

from __future__ import annotations

from posttrain.protocols import Approximating, Estimator, Objective, OffPolicy
from posttrain.schema import Settings

DEFAULT_CORRECTION = "tis"
"""For a sampler that approximates the policy: truncated importance weights."""


def weighs(part: Estimator | Objective) -> bool:
    """Whether its advantages, or its loss, carry the ratio to the sampler already."""
    return isinstance(part, OffPolicy) and part.corrects_for_sampler


def approximates(part: object) -> bool:
    """Whether an engine or a backend draws with other log-probs than the trainer's."""
    return isinstance(part, Approximating) and part.approximates


def needs_correction(settings: Settings) -> bool:
    """Whether answers come from a sampler that only approximates the policy, and no part corrects for it."""
    approximated = approximates(settings.policy) or approximates(settings.rollout.engine)
    corrected = settings.correction is not None or weighs(settings.estimator) or weighs(settings.objective)
    return settings.loop == "rl" and approximated and not corrected and settings.update.old_logprobs != "behavior"
