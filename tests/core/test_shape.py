"""Components that are not what their kind asks for are told at once, with the line of their source."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from needed import first_party
from posttrain import cli
from posttrain.data import Episodes, Estimate
from posttrain.errors import Problem
from posttrain.hookspecs import KINDS
from posttrain.protocols import Estimator, Need, Objective
from posttrain.shape import PROTOCOLS, misshapen


@dataclass(frozen=True)
class Whole:
    """An estimator as it should be."""

    needs: Any = frozenset({Need.VALUES})

    def __call__(self, episodes: Episodes, /) -> Estimate:
        return Estimate(episodes.rewards)


@dataclass(frozen=True)
class Bare:
    """Has neither needs nor a call."""


class Greedy(Whole):
    """Asks for more than core gives."""

    def __call__(self, episodes: Episodes, rewards: Any) -> Estimate:  # type: ignore[override]  # wrong on purpose
        return Estimate(rewards)


class Method:
    """Forgot the decorator."""

    def needs(self) -> frozenset[Need]:
        return frozenset()

    def __call__(self, episodes: Episodes, /) -> Estimate:
        return Estimate(episodes.rewards)


class Raising:
    """A property that fails."""

    @property
    def needs(self) -> frozenset[Need]:
        raise KeyError("gone")

    def __call__(self, episodes: Episodes, /) -> Estimate:
        return Estimate(episodes.rewards)


@dataclass(frozen=True)
class Loss:
    """An objective in which three things are wrong, and one is missing."""

    needs: frozenset[Need] = frozenset()
    outputs: tuple[str, ...] = ("logprobs",)
    unit: str = "token"
    slots: str = "main"

    def __call__(self, ops: Any, out: Any, batch: Any, coef: Any) -> Any:
        return None


def faults(component: Any, protocol: type) -> list[str]:
    found = list(misshapen(component, protocol))
    assert all(re.fullmatch(r"test_shape\.py:\d+", problem.where) for problem in found)
    return [problem.message for problem in found]


def test_a_component_as_it_should_be_has_no_fault() -> None:
    assert faults(Whole(), Estimator) == faults(Whole({"values", "logprobs"}), Estimator) == []


@pytest.mark.parametrize(("component", "expected"), [
    (Bare(), ["Bare has no needs, which Estimator asks for", "Bare has no __call__, which Estimator asks for"]),
    (Greedy(), ["Greedy.__call__(episodes: 'Episodes', rewards: 'Any') -> 'Estimate' cannot be called as the protocol "
                "has it, (self, episodes: 'Episodes', /) -> 'Estimate': missing a required argument: 'rewards'"]),
    (Method(), ["Method.needs must be a property (or a field), not a method"]),
    (Raising(), ["Raising.needs raised KeyError: 'gone'"]),
    (Whole("values"), ["Whole.needs must be a frozenset of Need, got 'values'"]),
    (Whole(frozenset({"value"})), ["Whole.needs names 'value', which is no Need; did you mean 'values'?"]),
])
def test_what_is_wrong_with_an_estimator(component: Any, expected: list[str]) -> None:
    assert faults(component, Estimator) == expected


def test_everything_wrong_is_told_at_once() -> None:
    assert faults(Loss(), Objective) == [
        "Loss.outputs must be a frozenset of Output, got ('logprobs',)",
        "Loss.unit must be one of 'action', 'episode', 'group', got 'token'",
        "Loss.slots must be a tuple, got 'main'", "Loss has no weights, which Objective asks for"]


def test_the_line_is_that_of_the_class_or_of_the_method() -> None:
    lines = Path(__file__).read_text().splitlines()
    missing, *_ = misshapen(Bare(), Estimator)
    assert missing.where == f"test_shape.py:{lines.index('class Bare:')}"  # its decorator stands a line above
    wrong, = misshapen(Greedy(), Estimator)
    line = next(i for i, text in enumerate(lines, 1) if "def __call__(self, episodes: Episodes, rewards" in text)
    assert wrong == Problem(wrong.message, f"test_shape.py:{line}")


def test_every_kind_has_its_protocol() -> None:
    assert tuple(PROTOCOLS) == KINDS


PLUGIN = """from dataclasses import dataclass
from posttrain.hookspecs import Component, hookimpl

@dataclass(frozen=True)
class Part:
    needs: frozenset = frozenset()
    def __call__(self, episodes, rewards):
        return None

@dataclass(frozen=True)
class Loss:
    def __call__(self, ops, out, batch, coef):
        return None

@hookimpl
def components():
    return [Component("estimator", "part", "bad:Part", "x"), Component("objective", "mine", "bad:Loss", "x")]
"""


@first_party
@pytest.mark.needs("posttrain_objectives", "posttrain_estimators")
def test_check_tells_all_of_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.py").write_text(PLUGIN)
    Path("data.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    Path("train.yaml").write_text(
        "plugins: [./bad.py, posttrain.toy]\ntask: {use: rows, path: data.jsonl}\nestimator: part\nobjective: mine\n"
        "policy: toy\nkl: none\ntokenizer: bytes\nrollout: {engine: toy}\nrewards: {right: exact_match}\n")
    assert cli.main(["check", "train.yaml"]) == 2
    err = capsys.readouterr().err
    assert "estimator 'part' is no estimator: Part.__call__(episodes, rewards) cannot be called" in err
    assert "missing a required argument: 'rewards' (bad.py:7)" in err
    for name in ("needs", "outputs", "unit", "slots", "weights"):
        assert f"objective 'mine' is no objective: Loss has no {name}, which Objective asks for (bad.py:10)" in err
    assert "Traceback" not in err
