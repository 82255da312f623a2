"""The estimator keeps the contract of estimators, equals its formula, and is robust."""

from __future__ import annotations

from statistics import fmean, median

import numpy as np
from posttrain.data import Episodes
from posttrain.testing import EstimatorContract
from posttrain_robust.estimator import Robust


class TestRobust(EstimatorContract):
    """An advantage depends on the other answers to the same prompt."""

    components = (Robust(), Robust(bound=1.0))
    scope = "group"

    def oracle(self, component: Robust, episodes: Episodes) -> list[float]:
        """The formula as plain loops."""
        rows = np.split(episodes.rewards, episodes.offsets[1:-1])
        s = [float(sum(row)) for row in rows]
        advantages = []
        for row, outcome, group in zip(rows, s, episodes.group, strict=True):
            others = [x for x, g in zip(s, episodes.group, strict=True) if g == group]
            distances = [abs(x - median(others)) for x in others]
            scale = 1.482602 * median(distances) or 1.253314 * fmean(distances)
            z = (outcome - median(others)) / scale if scale else 0.0
            advantages += [min(max(z, -component.bound), component.bound)] * len(row)
        return advantages


def test_one_outlier_leaves_the_others_as_they_were() -> None:
    calm = Episodes.from_rows(rewards=[[0.0], [1.0], [2.0], [3.0], [4.0]])
    wild = Episodes.from_rows(rewards=[[0.0], [1.0], [2.0], [3.0], [1e6]])
    np.testing.assert_allclose(Robust()(wild).advantages[:4], Robust()(calm).advantages[:4])


def test_a_rare_success_counts() -> None:
    """The median absolute deviation is 0 where most answers fail alike: the mean takes its place."""
    A = Robust()(Episodes.from_rows(rewards=[[0.0]] * 7 + [[1.0]])).advantages
    np.testing.assert_allclose(A, [0.0] * 7 + [3.5])
