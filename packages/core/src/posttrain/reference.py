"""The model that the KL is taken to, where it moves after the policy: when it does, and how far.

A reference that moves lets the policy go on learning at the same KL, and no longer bounds how far it gets; so the KL to
the policy as it was before training is measured beside it. Knows weights as named arrays, and no loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from posttrain.data import Metric, to_numpy
from posttrain.protocols import KL, Restarting, Scorer
from posttrain.schema import ReferenceSettings
from posttrain.state import Snapshot


def due(settings: ReferenceSettings, step: int, kl: Metric | None) -> bool:
    """Whether the reference moves after iteration `step`, whose KL to it was `kl` (None: nothing was measured).

    >>> [due(ReferenceSettings(every=2), step, None) for step in (1, 2, 3, 4)]
    [False, True, False, True]
    >>> [due(ReferenceSettings(kl_above=0.1), 1, kl) for kl in (None, Metric(0.1), Metric(0.2))]
    [False, False, True]
    """
    by_count = settings.every > 0 and step % settings.every == 0
    return by_count or (settings.kl_above > 0 and kl is not None and kl.value > settings.kl_above)


def blended(reference: Mapping[str, np.ndarray], policy: Mapping[str, np.ndarray],
            rate: float) -> dict[str, np.ndarray]:
    """rate * policy + (1 - rate) * reference by name, in the reference's own precision; at rate 1 the policy's numbers.

    Gorbatovski et al. 2024, arXiv 2404.09656, equation 3 (soft update; rate 1 is the hard one of equation 4).
    Arrays of integers are the policy's.

    >>> blended({"w": np.array([0.0, 1.0])}, {"w": np.array([1.0, 3.0])}, 0.5)
    {'w': array([0.5, 2. ])}
    """
    def one(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        if rate == 1 or not np.issubdtype(new.dtype, np.floating):
            return new
        mixed: np.ndarray = rate * new.astype(old.dtype, copy=False) + (1.0 - rate) * old
        return mixed
    return {name: one(reference[name], new) for name, new in policy.items()}


def copied(model: Scorer) -> dict[str, np.ndarray]:
    """The weights of a model on the host; those of half precision in float32, which a slow average needs."""
    return {name: np.array(to_numpy(x)) for name, x in model.params()}


def follow(reference: Scorer, before: Snapshot | None, policy: Scorer, version: int, rate: float) -> Snapshot:
    """Move a reference towards the policy: what it holds then. `before` is what it held, None its weights as loaded."""
    if rate == 1:
        params = copied(policy)
    else:
        params = blended(copied(reference) if before is None else before.params, copied(policy), rate)
    reference.load_params(params.items(), version)
    return Snapshot(version, params)


def restarted(kl: KL[Any], state: Any) -> Any:
    """A controller's state without what it remembers of the KL to another reference."""
    controller: object = kl
    return controller.restarted(state) if isinstance(controller, Restarting) else state
