"""What is tried under a key: how it is written, what it draws, and what is wrong with it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from posttrain.annotations import dotted
from posttrain.search import Choice, Domain, Goal, Range, Result, Space, dominates, read

TREE: dict[str, Any] = {
    "optimizer": {"lr": {"log_uniform": [1e-4, 1e-1]}}, "update.epochs": {"int": [1, 4]},
    "rollout.group_size": {"choice": [4, 8, 8.5, True, None, "8"]},
    "estimator": {"choice": ["grpo", {"use": "gae", "lam": {"uniform": [0.9, 1.0]},
                                      "inner": {"deep": {"choice": ["a", {"use": "b", "n": {"int": [1, 2]}}]}}},
                             {"use": "gae", "lam": 0.5}]}}


def made(tree: dict[str, Any]) -> Space:
    return read(tree, (), lambda key, message: pytest.fail(f"{dotted(key)}: {message}"))


@given(st.data())
def test_whatever_is_drawn_is_of_the_space_and_becomes_settings(data: st.DataObject) -> None:
    space = made(TREE)

    def choose(name: str, domain: Domain) -> Any:
        if isinstance(domain, Choice):
            return data.draw(st.sampled_from([option.label for option in domain.options]))
        if domain.whole:
            return data.draw(st.integers(int(domain.low), int(domain.high)))
        return data.draw(st.floats(domain.low, domain.high))

    values = space.draw(choose)
    assert space.contains(values) and not space.contains({**values, "more": 1})
    assert all(not space.contains({k: v for k, v in values.items() if k != name}) for name in values)
    settings = space.settings(values)
    assert settings.keys() == {"optimizer.lr", "update.epochs", "rollout.group_size", "estimator"}
    assert settings["optimizer.lr"] == values["optimizer.lr"]
    if values["estimator"] == "gae":
        assert settings["estimator"]["lam"] == values["estimator=gae.lam"]
        deep = settings["estimator"]["inner"]["deep"]
        assert deep == "a" or deep == {"use": "b", "n": values["estimator=gae.inner.deep=b.n"]}
    if values["estimator"] == "gae-2":
        assert settings["estimator"] == {"use": "gae", "lam": 0.5}


def test_options_are_told_apart_by_their_text() -> None:
    choice = made(TREE).domains["rollout.group_size"]
    assert isinstance(choice, Choice)
    assert [(o.label, o.value) for o in choice.options] == [
        ("4", 4), ("8", 8), ("8.5", 8.5), ("true", True), ("null", None), ("8-2", "8")]


def test_every_option_and_every_end_is_in_a_corner() -> None:
    space = made(TREE)
    corners = list(space.corners())
    assert all(map(space.contains, corners))
    for name, domain, _ in space.parameters():
        ends = [o.label for o in domain.options] if isinstance(domain, Choice) else [domain.low, domain.high]
        assert {c[name] for c in corners if name in c} >= set(ends)


def test_a_grid_has_every_combination_once() -> None:
    space = made({"a": {"int": [1, 5], "step": 2}, "b": {"choice": ["x", {"use": "y", "c": {"int": [0, 1]}}]}})
    assert [tuple(v.values()) for v in space.grid()] == [
        (a, *b) for a in (1, 3, 5) for b in (("x",), ("y", 0), ("y", 1))]
    with pytest.raises(ValueError, match=r"optimizer\.lr: a range without step"):
        list(made(TREE).grid())


@pytest.mark.parametrize(("node", "says"), [
    ({"log_uniform": [0, 1]}, "log_uniform needs positive numbers for its logarithm, got 0"),
    ({"uniform": [2, 1]}, "uniform needs two finite numbers, the smaller one first, got [2, 1]"),
    ({"uniform": [1]}, "uniform needs two finite numbers, the smaller one first"),
    ({"int": [1, 2.5]}, "int needs whole numbers, got [1, 2.5]"),
    ({"uniform": ["1e-3", 1]}, "uniform needs numbers, got '1e-3'"),
    ({"uniform": [0, 1], "step": 2}, "uniform needs a step above 0 and not above 1"),
    ({"log_int": [1, 8], "step": 1}, "and none with a logarithm"),
    ({"choice": [1]}, "choice needs a list of two options at least, got [1]"),
    ({"choice": [1, 1]}, "choice has the option 1 twice"),
    ({"choice": [1, 2], "step": 1}, "'step' cannot stand beside choice"),
    ({"uniform": [0, 1], "int": [0, 1]}, "cannot stand beside"),
    (3, "must say what is tried, as in {log_uniform: [1e-5, 1e-3]} or {choice: [a, b]}, got 3"),
    ({"choice": ["a", {"use": "b", "c": {"int": [2, 1]}}]}, "tune.space.x.choice.1.c: int needs two finite numbers"),
])
def test_what_is_wrong_is_said(node: Any, says: str) -> None:
    told: list[str] = []
    assert "x" not in read({"x": node}, ("tune", "space"), lambda key, text: told.append(text)).domains or "c:" in says
    assert len(told) == 1 and says in told[0] and told[0].startswith("tune.space.x")


def test_a_misspelt_range_is_met_by_its_name() -> None:
    told: list[str] = []
    read({"optimizer": {"lr": {"log_unifrom": [1, 2]}}}, (), lambda key, text: told.append(text))
    assert told[0].endswith("; did you mean 'log_uniform'?")


def test_results_and_dominance() -> None:
    goals = (Goal("reward"), Goal("kl", maximize=False))
    assert dominates((1.0, 0.5), (1.0, 0.6), goals) and not dominates((1.0, 0.5), (1.0, 0.5), goals)
    assert not dominates((2.0, 0.7), (1.0, 0.6), goals)
    for status, values in (("complete", ()), ("complete", (float("nan"),)), ("pruned", (float("inf"),))):
        with pytest.raises(ValueError):
            Result(status, values)  # type: ignore[arg-type]
    assert Range(0.0, 1.0, step=0.25).contains(0.75) and not Range(0.0, 1.0, step=0.25).contains(0.7)
    assert not Range(1, 3, whole=True).contains(1.5) and not Range(1, 3, whole=True).contains(True)
