"""The task and the reward keep their contracts; every puzzle has a solution; expressions are worth what Python says."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from posttrain.protocols import RowRules
from posttrain.testing import Example, RewardContract, TaskContract
from posttrain.tokenizers import Bytes
from posttrain_countdown.expression import evaluated
from posttrain_countdown.reward import CountdownScore
from posttrain_countdown.task import Countdown

SOLVED = {"numbers": [2, 4, 5], "target": 12}


class TestCountdown(TaskContract):
    """All puzzles are learned from."""

    components = (Countdown(size=20), Countdown(size=7, numbers=4, seed=3))
    columns = ("numbers", "target")


class TestHeldOut(TaskContract):
    """Some are held out."""

    components = (Countdown(size=20, held_out_fraction=0.25),)
    columns = ("numbers", "target")
    has_held_out = True


class TestCountdownScore(RewardContract):
    """Hostile answers are the contract's; puzzles and their scores are ours."""

    components = (CountdownScore(), CountdownScore(form=0.0))

    def examples(self, component: CountdownScore) -> list[Example]:
        """Scores worked out by hand."""
        scores = {"(5-2)*4": 1.0, " 4 * (5 - 2) = 12 ": 1.0, "5+4": component.form, "5": component.form,
                  "2*2*3": 0.0, "4+4+4": 0.0, "(5-2)*4)": 0.0, "": 0.0, "twelve": 0.0, "5-(2*4": 0.0}
        return [*(Example(text, score, columns=SOLVED) for text, score in scores.items()),
                Example("3", None, columns={"numbers": None, "target": None})]


def test_every_puzzle_has_a_solution() -> None:
    source = Countdown(size=200, largest=12).load(Bytes().load(), RowRules())
    for prompt in source.take(0, 200, seed=0):
        numbers, target = prompt.extra["numbers"], prompt.extra["target"]
        assert target in reachable(tuple(map(Fraction, numbers))), f"{target} from {numbers}"
        assert target not in numbers


def reachable(numbers: tuple[Fraction, ...]) -> set[Fraction]:
    """All results from the numbers: join any two, and go on with the rest."""
    if len(numbers) == 1:
        return set(numbers)
    found: set[Fraction] = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = tuple(x for k, x in enumerate(numbers) if k not in (i, j))
        for value in (a + b, a - b, a * b, *([a / b] if b else [])):
            found |= reachable((*rest, value))
    return found


@given(st.recursive(st.integers(0, 99).map(str), lambda e: st.builds("({}{}{})".format, e, st.sampled_from("+-*/"), e),
                    max_leaves=8))
def test_expressions_are_worth_what_python_says(text: str) -> None:
    """Against Python's own parser, on expressions that are known to be harmless."""
    numbers = "".join(f"Fraction({part})" if part.isdigit() else part for part in split(text))
    try:
        expected = eval(numbers, {"Fraction": Fraction})
    except ZeroDivisionError:
        expected = None
    found = evaluated(text)
    assert (found and found.value) == expected


def split(text: str) -> list[str]:
    """Digits together, all else one by one."""
    return ["".join(part) for is_number, group in itertools.groupby(text, str.isdigit)
            for part in ([list(group)] if is_number else [[c] for c in group])]


@pytest.mark.parametrize(("text", "value"), [
    ("2+3*4", 14), ("8-3-2", 3), ("8/4/2", 1), ("2*(3+4)", 14), ("(((7)))", 7)])
def test_operators_bind_as_in_arithmetic(text: str, value: int) -> None:
    found = evaluated(text)
    assert found is not None and found.value == value


@pytest.mark.parametrize("text", [
    "1 2", "()", "1+", "-1", "1+*2", "(1", "1)", "1.5", "2**3", "1 if 1 else 2", "(" * 190, "1234567890",
    "1+" * 150 + "1", "٣+1", "__import__('os')"])
def test_what_is_no_expression(text: str) -> None:
    assert evaluated(text) is None
