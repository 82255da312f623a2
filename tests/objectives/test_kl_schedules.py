"""KL schedules: end points, shapes, what stands behind the end, and fields without meaning."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from posttrain_objectives.kl_schedules import SHAPES, ScheduledKL, ScheduleState


def followed(kl: ScheduledKL, rollouts: int) -> list[float]:
    """The coefficient after 0, 1, ... rollouts."""
    state, found = kl.init(), [kl.init().coef]
    for _ in range(rollouts):
        state = kl.update(state, kl=0.1, n=8)
        found.append(state.coef)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coef, coef_end", [(0.1, 0.0), (0.0, 0.1), (0.2, 0.2)])
def test_begins_and_ends_where_it_says_and_stays_there(shape: Any, coef: float, coef_end: float) -> None:
    found = followed(ScheduledKL(coef=coef, coef_end=coef_end, steps=7, shape=shape), 12)
    assert found[0] == coef and found[7] == pytest.approx(coef_end, abs=1e-17)
    assert all(x == found[7] for x in found[7:])
    differences = [b - a for a, b in pairwise(found)]
    assert all(x >= 0 for x in differences) or all(x <= 0 for x in differences)


def test_shapes() -> None:
    assert followed(ScheduledKL(coef=0.8, coef_end=0.0, steps=4), 4) == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    half = math.sqrt(0.5)
    assert followed(ScheduledKL(coef=0.8, coef_end=0.0, steps=4, shape="cosine"), 4) == pytest.approx(
        [0.8, 0.4 * (1 + half), 0.4, 0.4 * (1 - half), 0.0])


@pytest.mark.parametrize("kl, n", [(math.nan, 8), (math.inf, 8), (0.1, 0)])
def test_a_rollout_without_a_measurement_does_not_count(kl: float, n: int) -> None:
    state = ScheduleState(0.04, 3)
    assert ScheduledKL().update(state, kl=kl, n=n) is state


@pytest.mark.parametrize("fields, message", [
    ({"steps": 0}, r"steps must be at least 1.*\$\{steps\}"), ({"coef": -1.0}, "coef must be finite and not negative"),
    ({"coef_end": math.nan}, "coef_end"), ({"shape": "linar"}, "did you mean 'linear'")])
def test_fields_without_meaning_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduledKL(**fields)
