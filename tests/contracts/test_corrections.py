"""The correction of posttrain-estimators keeps the contract of its kind, against an oracle written as loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

from posttrain.data import Episodes
from posttrain.testing import CorrectionContract
from posttrain_estimators.corrections import ImportanceCorrection


def ratio(episodes: Episodes, i: int, scope: str, geometric: bool) -> float:
    """pi/mu of the unit of action i: the product over its actions, or their geometric mean."""
    turn = [0] * len(episodes.rewards) if episodes.turn is None else episodes.turn
    key = {"none": lambda j: j, "token": lambda j: j, "sequence": lambda j: episodes.episode[j],
           "turn": lambda j: (episodes.episode[j], turn[j])}[scope]
    members = [j for j in range(len(episodes.rewards)) if key(j) == key(i)]
    product = 1.0
    for j in members:
        product *= math.exp(episodes.logprobs[j]) / math.exp(episodes.behavior_logprobs[j])
    return product ** (1 / len(members)) if geometric else product


def weights(component: ImportanceCorrection, episodes: Episodes) -> tuple[list[float], list[bool]]:
    """Before they are normalised; and what stays."""
    w, keep = [], []
    for i in range(len(episodes.rewards)):
        stays = component.reject == "none" or (
            component.low <= ratio(episodes, i, component.reject, True) <= component.high)
        counts = stays and component.weight != "none"
        w.append(min(ratio(episodes, i, component.weight, False), component.cap) if counts else 1.0)
        keep.append(stays)
    return w, keep


class TestImportanceCorrection(CorrectionContract):
    components = (
        ImportanceCorrection(), ImportanceCorrection(cap=1.0), ImportanceCorrection(weight="sequence"),
        ImportanceCorrection(weight="turn", cap=math.inf), ImportanceCorrection(weight="none"),
        ImportanceCorrection(cap=math.inf, reject="token", low=0.5, high=5.0),
        ImportanceCorrection(weight="none", reject="sequence", low=0.99, high=1.01),
        ImportanceCorrection(weight="sequence", cap=3.0, reject="turn", low=0.8),
        ImportanceCorrection(weight="turn", reject="token", high=1.3))

    def oracle(self, component: ImportanceCorrection, episodes: Episodes) -> Sequence[float]:
        return weights(component, episodes)[0]


class TestSelfNormalisedCorrection(CorrectionContract):
    scope = "batch"
    components = (
        ImportanceCorrection(self_normalise=True), ImportanceCorrection("sequence", math.inf, self_normalise=True),
        ImportanceCorrection("turn", self_normalise=True, reject="sequence", low=0.9, high=1.1),
        ImportanceCorrection(cap=math.inf, self_normalise=True, reject="token", low=0.8, high=1.3))

    def oracle(self, component: ImportanceCorrection, episodes: Episodes) -> Sequence[float]:
        w, keep = weights(component, episodes)
        kept = [x for x, stays in zip(w, keep) if stays]
        return [x * len(kept) / sum(kept) if stays else 1.0 for x, stays in zip(w, keep)]
