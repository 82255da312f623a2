"""Archives of trade-offs and their indicators: what holds for every set of points, and known answers."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from posttrain.errors import DataError
from posttrain_objectives.pareto import (
    ParetoArchive,
    additive_epsilon,
    contributions,
    crowding,
    hypervolume,
    igd_plus,
    knee,
    nondominated,
)

COORDINATES = st.integers(-4, 12).map(lambda n: n / 8)


@st.composite
def sets(draw: st.DrawFn, most: int = 7, least: int = 1) -> np.ndarray:
    """[N, m] points that share coordinates often; every number is a sum of few powers of two."""
    m = draw(st.integers(1, 5))
    return np.array(draw(st.lists(st.tuples(*[COORDINATES] * m), min_size=least, max_size=most)))


def archive_of(points: np.ndarray, order: list[int] | None = None, **rules: object) -> ParetoArchive:
    archive = ParetoArchive([f"f{i}" for i in range(points.shape[1])], **rules)  # type: ignore[arg-type]  # of a test
    for i in range(len(points)) if order is None else order:
        archive.insert(points[i], tag=str(i))
    return archive


def values(archive: ParetoArchive) -> set[tuple[float, ...]]:
    return {point.values for point in archive.front()}


def by_inclusion_and_exclusion(F: np.ndarray, r: np.ndarray) -> float:
    """The union of boxes from r: the sum over subsets of the volume that all of them share, signs alternating."""
    return sum((-1) ** (n + 1) * float(np.prod(np.maximum(F[list(chosen)].min(axis=0) - r, 0.0)))
               for n in range(1, len(F) + 1) for chosen in combinations(range(len(F)), n))


@given(sets())
def test_hypervolume_is_the_union_of_boxes(F: np.ndarray) -> None:
    r = np.zeros(F.shape[1])
    assert hypervolume(F, r) == pytest.approx(by_inclusion_and_exclusion(F, r), rel=1e-12, abs=1e-12)


@given(sets(), st.randoms(use_true_random=False))
def test_order_and_copies_of_points_do_not_matter(F: np.ndarray, random: object) -> None:
    r, order = np.full(F.shape[1], -0.25), np.random.default_rng(random.getrandbits(32)).permutation(len(F))  # type: ignore[attr-defined]  # a Random
    shuffled = np.vstack([F[order], F])
    assert hypervolume(shuffled, r) == hypervolume(F, r)
    assert {tuple(y) for y in shuffled[nondominated(shuffled)]} == {tuple(y) for y in F[nondominated(F)]}
    assert nondominated(shuffled).sum() == nondominated(F).sum()
    assert values(archive_of(F, [*order, *order])) == values(archive_of(F))


@given(sets(least=2))
def test_a_further_point_never_costs_hypervolume_and_a_dominated_one_adds_none(F: np.ndarray) -> None:
    r = np.full(F.shape[1], -0.75)
    before, after = hypervolume(F[1:], r), hypervolume(F, r)
    assert after >= before
    dominated = bool((F[1:] >= F[0]).all(axis=1).any())
    assert (after == before) == dominated  # all points are better than r, so one that is not dominated adds


@given(sets())
def test_contributions_are_what_each_point_adds(F: np.ndarray) -> None:
    r = np.zeros(F.shape[1])
    found = contributions(F, r)
    assert (found >= 0).all() and found.sum() <= hypervolume(F, r) + 1e-12
    for i in range(len(F)):
        others = hypervolume(np.delete(F, i, axis=0), r)
        assert others + found[i] == pytest.approx(hypervolume(F, r), abs=1e-12)


@given(sets())
def test_the_front_is_what_no_point_dominates(F: np.ndarray) -> None:
    def dominates(x: np.ndarray, y: np.ndarray) -> bool:
        return bool((x >= y).all() and (x > y).any())
    kept = nondominated(F)
    first = [not any((F[i] == F[j]).all() for j in range(i)) for i in range(len(F))]
    expected = [first[i] and not any(dominates(x, F[i]) for x in F) for i in range(len(F))]
    assert kept.tolist() == expected
    assert values(archive_of(F)) == {tuple(y) for y in F[kept]}
    for y in F[~kept]:  # domination is transitive: whoever is out is out by somebody who is in
        assert any((x >= y).all() for x in F[kept])


@given(sets(), COORDINATES)
def test_distances_to_a_front(F: np.ndarray, shift: float) -> None:
    front = F[nondominated(F)]
    assert igd_plus(F, front) == 0.0 and additive_epsilon(F, front) <= 0.0
    assert additive_epsilon(F + shift, front) == additive_epsilon(F, front) - shift
    lower = igd_plus(front - 1.0, front)
    assert 0.0 < lower <= np.sqrt(F.shape[1]) * (1 + 1e-12)  # a mean of equal distances is rounded


@given(sets(most=12), st.randoms(use_true_random=False))
def test_boxes_keep_one_point_each_whatever_the_order(F: np.ndarray, random: object) -> None:
    """Every offered point is dominated by a kept one up to epsilon; which boxes are kept does not hang on the order."""
    order = list(np.random.default_rng(random.getrandbits(32)).permutation(len(F)))  # type: ignore[attr-defined]  # a Random
    epsilon = 0.5
    one, two = archive_of(F, epsilon=epsilon), archive_of(F, order, epsilon=epsilon)
    def cells(archive: ParetoArchive) -> list[tuple[float, ...]]:
        return sorted(tuple(np.floor(np.array(y) / epsilon)) for y in (p.values for p in archive.front()))
    assert cells(one) == cells(two) and len(set(cells(one))) == len(one)
    for y in F:
        assert any((np.array(p.values) + epsilon >= y).all() for p in one.front())


def test_of_two_points_in_a_box_the_one_nearer_to_its_best_corner_stays() -> None:
    archive = ParetoArchive(("a", "b"), epsilon=(1.0, 10.0))
    assert archive.insert((0.1, 8.0), tag="far") and archive.insert((0.8, 7.0), tag="near")
    assert not archive.insert((0.2, 8.5), tag="far as well")
    assert [point.tag for point in archive.front()] == ["near"]
    assert archive.insert((0.9, 7.5), tag="better") and len(archive) == 1


@given(sets(most=12), st.integers(1, 4))
def test_a_bounded_archive_holds_a_front_of_that_size(F: np.ndarray, capacity: int) -> None:
    archive = archive_of(F, capacity=capacity, reference=[-1.0] * F.shape[1])
    front = np.array([point.values for point in archive.front()])
    assert 1 <= len(archive) <= capacity and nondominated(front).all()
    if nondominated(F).sum() <= 1:
        assert len(archive) == 1


def test_the_point_that_adds_least_leaves_a_full_archive() -> None:
    archive = ParetoArchive(("a", "b"), capacity=3, reference=(0.0, 0.0))
    inserted = [archive.insert(y) for y in ((1.0, 4.0), (4.0, 1.0), (3.0, 3.0), (2.0, 3.1))]
    assert inserted == [True, True, True, False]
    assert archive.insert((2.0, 3.9)) and values(archive) == {(4.0, 1.0), (3.0, 3.0), (2.0, 3.9)}


def test_the_most_crowded_point_leaves_where_there_is_no_reference_point() -> None:
    archive = ParetoArchive(("a", "b"), capacity=3)
    assert [archive.insert(y) for y in ((0.0, 4.0), (4.0, 0.0), (2.0, 2.0), (2.1, 1.9))] == [True, True, True, False]
    assert values(archive) == {(0.0, 4.0), (2.0, 2.0), (4.0, 0.0)}


def test_many_objectives_are_bounded_by_crowding() -> None:
    archive = archive_of(np.eye(6), capacity=4, reference=[-1.0] * 6)
    assert len(archive) == 4


def test_a_noisy_point_stands_for_its_lower_bound() -> None:
    archive = ParetoArchive(("a", "b"), confidence=0.95)
    assert archive.insert((1.0, 1.0), tag="sure")
    assert not archive.insert((1.1, 1.1), tag="lucky", errors=(0.1, 0.1))
    assert archive.insert((1.1, 1.1), tag="measured well", errors=(0.01, 0.01))
    assert [point.tag for point in archive.front()] == ["measured well"]
    assert archive.front()[0].values == (1.1, 1.1)  # what was measured, not the bound
    even = ParetoArchive(("a", "b"), confidence=0.5)
    assert even.insert((1.0, 1.0)) and even.insert((1.1, 1.1), errors=(0.1, 0.1)) and len(even) == 1


def test_noise_can_not_raise_the_hypervolume() -> None:
    archive = ParetoArchive(("a", "b"), reference=(0.0, 0.0), confidence=0.975)
    archive.insert((1.0, 2.0), errors=(0.1, 0.0))
    assert archive.hypervolume() == pytest.approx((1.0 - 1.959963984540054 * 0.1) * 2.0)


@given(sets(most=12, least=0))
def test_an_archive_comes_back_from_json(F: np.ndarray) -> None:
    assume(F.ndim == 2)
    archive = archive_of(F / 3.0, epsilon=0.1, capacity=5, reference=[-1 / 3] * F.shape[1])
    again = ParetoArchive.from_json(archive.to_json())
    assert again == archive and again.to_json() == archive.to_json() and again.front() == archive.front()


def test_points_keep_what_made_them() -> None:
    archive = ParetoArchive(("a", "b"))
    archive.insert((0.1, 0.7), tag="käse", errors=(0.01, 0.02), checkpoint="runs/x/checkpoints/step-000004")
    (point,) = ParetoArchive.from_json(archive.to_json()).front()
    assert (point.tag, point.errors, point.checkpoint) == ("käse", (0.01, 0.02), "runs/x/checkpoints/step-000004")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "objectives": ["a"]}',
                                  ParetoArchive(("a",)).to_json().replace("[]\n}", '[{"values": [NaN]}]\n}')])
def test_a_text_that_is_no_archive_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"not an archive of points: .* \(pareto.json\)"):
        ParetoArchive.from_json(text, "pareto.json")


def test_the_knee_of_a_curve_is_where_it_bends() -> None:
    t = np.linspace(0.0, 1.0, 101)
    F = np.column_stack([t, (1.0 - t ** 4) ** 0.25])  # symmetric, so it bends most where both are equal
    assert F[knee(F)][0] == pytest.approx(2 ** -0.25, abs=0.01)
    assert knee(F * [1e6, 1e-6] + [3.0, -7.0]) == knee(F)


def test_the_knee_of_a_surface() -> None:
    F = np.vstack([np.eye(3), [[0.5, 0.5, 0.5], [0.6, 0.2, 0.2]]])
    assert knee(F) == 3
    assert knee([(2.0, 2.0, 1.0)]) == 0 and knee([(1.0, 5.0, 2.0), (3.0, 5.0, 0.0)]) == 0
    assert knee([(0.0, 1.0, 1.0), (1.0, 0.0, 0.9), (0.5, 0.9, 0.0)]) == 0  # the ends of two objectives are one point


def test_crowding_leaves_out_an_objective_without_range() -> None:
    assert crowding([(0.0, 1.0), (1.0, 1.0), (4.0, 1.0)]).tolist() == [np.inf, 1.0, np.inf]
    assert crowding([(1.0, 1.0)] * 3).tolist() == [0.0] * 3


def test_what_is_no_point_is_refused() -> None:
    archive = ParetoArchive(("accuracy", "brevity"))
    with pytest.raises(ValueError, match="one value for each of accuracy, brevity, got 1"):
        archive.insert((1.0,))
    with pytest.raises(ValueError, match="the value of brevity is nan"):
        archive.insert((1.0, float("nan")))
    with pytest.raises(ValueError, match=r"the standard error of accuracy is -0\.1"):
        archive.insert((1.0, 1.0), errors=(-0.1, 0.0))
    with pytest.raises(ValueError, match="needs a reference point"):
        archive.hypervolume()
    with pytest.raises(ValueError, match="no knee"):
        archive.knee()
    with pytest.raises(ValueError, match="points have 2 objectives and the reference has 3"):
        hypervolume([(1.0, 2.0)], (0.0, 0.0, 0.0))
    with pytest.raises(ValueError, match="points must be finite; point 1 is not"):
        hypervolume([(1.0, 2.0), (np.inf, 1.0)], (0.0, 0.0))
    with pytest.raises(ValueError, match=r"reference_front \(1, 1\) must hold points of as many objectives"):
        igd_plus([(1.0, 2.0)], [(1.0,)])


@pytest.mark.parametrize(("rules", "said"), [
    ({"objectives": ()}, "objectives must be different names"), ({"objectives": ("a", "a")}, "must be different names"),
    ({"reference": (1.0,)}, "reference needs 2 finite numbers"), ({"epsilon": 0.0}, "epsilon must be positive"),
    ({"epsilon": (0.1,)}, "epsilon needs 2 finite numbers"), ({"capacity": -1}, "capacity must not be negative"),
    ({"confidence": 1.0}, r"confidence lies in \[0\.5, 1\)")])
def test_rules_that_mean_nothing_are_refused(rules: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ParetoArchive(**{"objectives": ("a", "b"), **rules})  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.needs("moocore")
def test_moocore_and_slices_agree_on_five_objectives() -> None:
    from posttrain_objectives.pareto.indicators import _volume

    F = np.random.default_rng(3).uniform(size=(30, 5))
    assert hypervolume(F, np.zeros(5)) == pytest.approx(_volume(F), rel=1e-12)
