"""What every component owes, on fields of each type that a configuration can express, and on those that it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, Flag, IntEnum, StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol, final

import pytest
from posttrain.hookspecs import Component, hookimpl
from posttrain.testing import ComponentContract, failures
from posttrain.testing.contract import plain


class Mode(Enum):
    """Values that YAML holds, one that it does not, and a name that is another's value."""

    MEAN = "mean"
    SUM = "sum"
    BOTH = ("mean", "sum")
    sum = "total"


class Word(StrEnum):
    """Words that YAML takes for true and false."""

    ON = "on"
    NO = "no"


class Level(IntEnum):
    """Numbers."""

    LOW = 0
    HIGH = 1


class Parts(Flag):
    """Members that are added up: a configuration names one."""

    A = 1
    B = 2


@final
@dataclass(frozen=True, slots=True)
class Block:
    """A block of keys."""

    mode: Mode = Mode.MEAN
    """How."""
    tags: frozenset[str] = frozenset()
    """Which."""


@final
@dataclass(frozen=True, slots=True)
class Whole:
    """Every type that a configuration can express."""

    number: float = 0.5
    """A number."""
    path: Path = Path("a")
    """A path."""
    pair: tuple[int, str] = (1, "a")
    """Two values."""
    table: Mapping[str, float] = field(default_factory=dict)
    """A map."""
    choice: Literal["a", "b"] = "a"
    """One of two."""
    mode: Mode = Mode.MEAN
    """An enum."""
    maybe: Mode | None = None
    """An enum or nothing."""
    word: Word = Word.ON
    """Text as an enum."""
    level: Level = Level.LOW
    """A number as an enum."""
    modes: frozenset[Mode] = frozenset()
    """A set of an enum."""
    by_mode: Mapping[Mode, float] = field(default_factory=dict)
    """A map from an enum."""
    tags: frozenset[str] = frozenset()
    """A set."""
    pairs: frozenset[tuple[int, int]] = frozenset()
    """A set of pairs."""
    numbers: set[int] = field(default_factory=set)
    """A set that is no frozen one."""
    blocks: tuple[Block, ...] = ()
    """Blocks of keys."""
    parts: Parts = Parts.A
    """A flag."""
    function: Callable[[int], int] | None = None
    """What no configuration can say."""


class Anything(Protocol):
    """The protocol of everything."""


@hookimpl
def components() -> Iterable[Component]:
    """The one of this file."""
    yield Component("kl", "whole", f"{__name__}:Whole", "every type")


WHOLE = Whole(
    number=2.0, path=Path("b/c"), pair=(2, "b"), table={"x": 1.0}, choice="b", mode=Mode.BOTH, maybe=Mode.SUM,
    word=Word.NO, level=Level.HIGH, modes=frozenset({Mode.SUM, Mode.sum}), by_mode={Mode.SUM: 2.0, Mode.BOTH: 1.0},
    tags=frozenset({"on", "b", "a"}), pairs=frozenset({(1, 2), (3, 4)}), numbers={2, 1}, parts=Parts.B,
    blocks=(Block(Mode.sum, frozenset({"x"})), Block()))


class TestWhole(ComponentContract):
    """Any kind would do."""

    kind, protocol = "kl", Anything
    components = (Whole(), WHOLE)
    plugins = (Path(__file__),)


@pytest.mark.parametrize(("field_", "says"), [
    ({"function": abs}, "cannot represent an object"),
    ({"parts": Parts.A | Parts.B}, "parts must be one of 1, 2, got 3")])
def test_what_no_configuration_can_say_does_not_survive_one(field_: dict[str, Any], says: str) -> None:
    class Contract(ComponentContract):
        kind, protocol = "kl", Anything
        components = (Whole(**field_),)

    (_, message), = failures(Contract, only="test_survives_a_configuration_file")
    assert says in message


def test_what_is_written_is_the_same_in_every_process() -> None:
    assert plain(frozenset("hello")) == ["e", "h", "l", "o"] and plain(frozenset({Mode.SUM, Mode.sum})) == [
        "sum", "total"], "a member by its value, since a name may be another's value"
    assert plain(Mode.BOTH) == "BOTH"
