"""Searcher `optuna` under its contract with every sampler, and what only Optuna could get wrong."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from posttrain.errors import ConfigError
from posttrain.search import Goal, Result, Space, read
from posttrain.testing import SearcherContract

pytest.importorskip("optuna")
pytest.importorskip("posttrain_tuning")
from posttrain_tuning.optuna import Optuna

GOAL = (Goal("reward"),)
TWO = (Goal("reward"), Goal("kl", maximize=False))
NUMBERS = {"lr": {"log_uniform": [1e-4, 1e-1]}, "kl.coef": {"uniform": [0.0, 1.0]}}


def space(tree: dict[str, object]) -> Space:
    return read(tree, (), lambda key, message: pytest.fail(message))


class TestOptuna(SearcherContract):
    components = (Optuna(startup=2), Optuna(sampler="random", seed=3), Optuna(sampler="nsga2", population=4))


class TestSeveralGoals(SearcherContract):
    components = (Optuna(startup=2), Optuna(sampler="nsga3", population=4))
    goals = TWO


@pytest.mark.slow
@pytest.mark.needs("torch", "scipy")
class TestGaussianProcess(SearcherContract):
    components = (Optuna(sampler="gp", startup=2),)


@pytest.mark.needs("cmaes")
class TestEvolution(SearcherContract):
    components = (Optuna(sampler="cmaes"),)


class TestGrid(SearcherContract):
    components = (Optuna(sampler="grid"),)
    space = read({"a": {"int": [1, 3]},
                  "b": {"choice": ["x", {"use": "y", "c": {"uniform": [0.0, 1.0], "step": 0.5}}]}},
                 (), lambda key, message: None)


def test_learns_where_the_good_trials_are(tmp_path: Path) -> None:
    """Drawn at random, -|u - 0.3| has the mean -(0.3^2 + 0.7^2) / 2 = -0.29; that of 20 trials differs by 0.05."""
    search = Optuna(seed=1, startup=5).start(space(NUMBERS), GOAL, tmp_path)
    values = []
    for number in range(30):
        trial = search.ask(number)
        assert trial is not None
        values.append(-abs(trial["kl.coef"] - 0.3))
        search.tell(number, Result("complete", (values[-1],)))
    assert sum(values[10:]) / 20 > -0.19


def test_stays_within_constraints_that_it_learned(tmp_path: Path) -> None:
    """Better values are those that break the constraint: without it most of the later trials would."""
    search = Optuna(seed=1, startup=5).start(space(NUMBERS), GOAL, tmp_path)
    broken = []
    for number in range(30):
        trial = search.ask(number)
        assert trial is not None
        broken.append(trial["kl.coef"] > 0.3)
        search.tell(number, Result("complete", (trial["kl.coef"],), violations={"kl": trial["kl.coef"] - 0.3}))
    assert sum(broken[10:]) < 10


def test_a_grid_ends(tmp_path: Path) -> None:
    search = Optuna(sampler="grid").start(TestGrid.space, GOAL, tmp_path)
    trials = []
    while (trial := search.ask(len(trials))) is not None:
        trials.append(trial)
        search.tell(len(trials) - 1, Result("failed"))
    assert trials == list(TestGrid.space.grid()) and len(trials) == 3 * (1 + 3)


@pytest.mark.parametrize(("searcher", "tree", "goals", "says"), [
    (Optuna(sampler="grid"), NUMBERS, GOAL, "grid needs a step for lr"),
    (Optuna(sampler="cmaes"), NUMBERS, TWO, "cmaes has one objective, got 2"),
    (Optuna(sampler="cmaes"), {"a": {"choice": ["x", "y"]}}, GOAL, "needs two numbers at least"),
])
def test_what_a_sampler_cannot_do_is_said_before(
        searcher: Optuna, tree: dict[str, object], goals: tuple[Goal, ...], says: str) -> None:
    assert any(says in problem for problem in searcher.problems(space(tree), goals))


def test_a_package_that_a_sampler_needs_is_asked_for_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain_tuning import optuna

    monkeypatch.setattr(optuna, "find_spec", lambda name: None if name == "torch" else find_spec("sys"))
    problem, = Optuna(sampler="gp").problems(space(NUMBERS), GOAL)
    assert problem == "sampler: gp needs torch: pip install torch; or use sampler: tpe"
    monkeypatch.setattr(optuna, "find_spec", lambda name: None)
    assert "pip install 'posttrain-tuning[optuna]'" in next(iter(Optuna().problems(space(NUMBERS), GOAL)))


def test_auto_takes_another_sampler_for_many_goals() -> None:
    assert Optuna().chosen(TWO) == "tpe" and Optuna().chosen(tuple(Goal(str(i)) for i in range(4))) == "nsga3"


@pytest.mark.slow
def test_two_studies_of_one_name_share_a_storage_and_keep_their_trials_apart(tmp_path: Path) -> None:
    """Two machines: what one was told the other learns, and numbers do not collide."""
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    searches = []
    for machine in ("a", "b"):
        (tmp_path / machine / "study").mkdir(parents=True)
        searches.append(Optuna(storage=storage, startup=1).start(space(NUMBERS), GOAL, tmp_path / machine / "study"))
    first, second = (search.ask(0) for search in searches)
    assert first == second, "of one seed and one number, both drawn at random"
    searches[0].tell(0, Result("complete", (1.0,)))
    assert searches[1].ask(0) == second
    searches[1].tell(0, Result("failed"))
    assert searches[0].ask(1) is not None


def test_a_storage_of_other_objectives_is_refused(tmp_path: Path) -> None:
    Optuna().start(space(NUMBERS), GOAL, tmp_path)
    with pytest.raises(ConfigError, match="of other objectives; choose another name: tune.study=DIR"):
        Optuna().start(space(NUMBERS), TWO, tmp_path)
    with pytest.raises(ConfigError, match="storage: "):
        Optuna(storage="nonsense://x").start(space(NUMBERS), GOAL, tmp_path)
