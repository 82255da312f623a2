"""What a searcher is told: the space of settings, the goals, and what became of a trial.

A space maps keys of a configuration to what is tried under them. An option of a choice may hold places that are
searched themselves: they exist only where it is chosen (`estimator: {choice: [grpo, {use: gae, lam: {uniform: [0.9,
1]}}]}`). A trial gives each parameter that exists a plain value, by name: `optimizer.lr`, `estimator`,
`estimator=gae.lam`. Knows neither what keys mean nor who searches.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal, final

from posttrain.annotations import Key, Report, dotted
from posttrain.errors import did_you_mean

Values = Mapping[str, Any]
"""Parameter -> value: a number of a range, the label of an option."""

SCALES: Mapping[str, tuple[bool, bool]] = {
    "uniform": (False, False), "log_uniform": (True, False), "int": (False, True), "log_int": (True, True)}
"""How a range is written -> whether its logarithm is uniform, whether its numbers are whole."""
CHOICE = "choice"


@final
@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both included.

    >>> Range(1, 9, whole=True, step=4).points()
    [1, 5, 9]
    """

    low: float
    high: float
    log: bool = False
    """Uniform in the logarithm."""
    whole: bool = False
    step: float = 0.0
    """Distance of the numbers from `low` on; 0 takes all between, whole ones where `whole`."""

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.low, self.high, self.step))) or self.low >= self.high:
            raise ValueError(f"needs two finite numbers, the smaller one first, got [{self.low}, {self.high}]")
        if self.log and self.low <= 0:
            raise ValueError(f"needs positive numbers for its logarithm, got {self.low}")
        if self.whole and not all(float(x).is_integer() for x in (self.low, self.high, self.step)):
            raise ValueError(f"needs whole numbers, got [{self.low}, {self.high}] and step {self.step}")
        if self.step < 0 or (self.step and self.log) or self.step > self.high - self.low:
            raise ValueError(f"needs a step above 0 and not above {self.high - self.low}, and none with a logarithm, "
                             f"got {self.step}")

    def contains(self, value: Any) -> bool:
        """Whether it is a number of the range, but for rounding."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        steps = (value - self.low) / self.step if self.step else 0.0
        return (not self.whole or float(value).is_integer()) and abs(steps - round(steps)) < 1e-6

    def points(self) -> list[float]:
        """All of its numbers. Raises `ValueError` where they cannot be counted."""
        step = self.step or (1.0 if self.whole else 0.0)
        if not step:
            raise ValueError("a range without step has no points that could be counted")
        numbers = [self.low + i * step for i in range(int((self.high - self.low) / step + 1e-9) + 1)]
        return [int(x) for x in numbers] if self.whole else numbers


@final
@dataclass(frozen=True, slots=True)
class Option:
    """One of what a key may hold."""

    label: str
    """What a trial says where it is chosen."""
    value: Any
    """Plain values; where something is searched below, it stands as the file wrote it."""
    below: Mapping[Key, Domain] = field(default_factory=dict)
    """Places inside `value` that are searched where this option is chosen."""


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """Options, of which a trial takes one by its label."""

    options: tuple[Option, ...]

    def option(self, label: Any) -> Option:
        """Raises `KeyError` for a label that there is not."""
        return {option.label: option for option in self.options}[label]


Domain = Range | Choice
Choose = Callable[[str, Domain], Any]
"""Takes a parameter and what it may be; returns a number of the range, or the label of an option."""


@final
@dataclass(frozen=True, slots=True)
class Space:
    """Keys of a configuration and what is tried under them.

    >>> space = read({"lr": {"log_uniform": [0.001, 0.1]}, "kl": {"choice": [{"use": "none"},
    ...               {"use": "fixed", "coef": {"uniform": [0, 1]}}]}}, (), print)
    >>> values = space.draw(lambda name, domain: 0.5 if name.endswith("coef") else
    ...                     domain.low if isinstance(domain, Range) else "fixed")
    >>> values, space.settings(values)
    ({'lr': 0.001, 'kl': 'fixed', 'kl=fixed.coef': 0.5}, {'lr': 0.001, 'kl': {'use': 'fixed', 'coef': 0.5}})
    >>> space.contains(values), space.contains({**values, "kl": "none"})
    (True, False)
    """

    domains: Mapping[str, Domain]
    """By key."""

    def draw(self, choose: Choose) -> dict[str, Any]:
        """The values of a trial, parameter by parameter as `choose` says; those of an option after its choice."""
        values: dict[str, Any] = {}
        for key, domain in self.domains.items():
            _draw(key, domain, choose, values)
        return values

    def contains(self, values: Values) -> bool:
        """Whether these are the values of a trial: every parameter that exists, each where it may be, and no other."""
        def checked(name: str, domain: Domain) -> Any:
            value = values[name]
            if isinstance(domain, Range) and not domain.contains(value):
                raise KeyError(name)
            return value
        try:
            return self.draw(checked).keys() == values.keys()
        except KeyError:
            return False

    def settings(self, values: Values) -> dict[str, Any]:
        """Key -> the plain value that a configuration is given under it."""
        return {key: _written(key, domain, values) for key, domain in self.domains.items()}

    def parameters(self) -> Iterator[tuple[str, Domain, bool]]:
        """All that may exist in a trial, with whether it exists in every one."""
        for key, domain in self.domains.items():
            yield from _parameters(key, domain, always=True)

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every trial of a space whose ranges can be counted. Raises `ValueError` where one cannot."""
        for parts in itertools.product(*(_grid(key, domain) for key, domain in self.domains.items())):
            yield {name: value for part in parts for name, value in part.items()}

    def corners(self) -> Iterator[dict[str, Any]]:
        """Trials of which each option and each end of a range is in one: what can be checked before a search."""
        seen = set[str]()
        for wanted, domain, _ in self.parameters():
            ends = [o.label for o in domain.options] if isinstance(domain, Choice) else [domain.low, domain.high]
            for end in ends:
                values = self.draw(lambda name, d, wanted=wanted, end=end: _leading(name, d, wanted, end))  # type: ignore[misc]  # its defaults are not part of `Choose`
                text = json.dumps(values)
                if wanted in values and text not in seen:
                    seen.add(text)
                    yield values


@final
@dataclass(frozen=True, slots=True)
class Goal:
    """A number of a trial that is to become as large, or as small, as can be."""

    name: str
    maximize: bool = True


@final
@dataclass(frozen=True, slots=True)
class Result:
    """What became of a trial."""

    status: Literal["complete", "pruned", "failed"]
    """It ended by itself; it was given up as hopeless, which says that its values are bad; or it says nothing."""
    values: tuple[float, ...] = ()
    """One finite number for each goal, in their order; empty where something was not measured."""
    step: int = 0
    """Of training, after which they were measured."""
    violations: Mapping[str, float] = field(default_factory=dict)
    """Constraint -> by how much it is broken; 0 or less where it is kept."""

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (*self.values, *self.violations.values()))):
            raise ValueError(f"values and violations must be finite, got {self.values} and {dict(self.violations)}")
        if self.status == "complete" and not self.values:
            raise ValueError("a complete trial has a value for each goal")


def read(tree: Mapping[str, Any], key: Key, report: Report) -> Space:
    """The space that plain values describe; `key` is where they stand. What is wrong is reported and left out.

    Keys may be dotted (`optimizer.lr:`) or blocks (`optimizer: {lr: ...}`).
    """
    domains: dict[str, Domain] = {}
    for path, node in places(tree):
        if is_domain(node):
            if (domain := _domain(node, (*key, *path), report)) is not None:
                domains[dotted(path)] = domain
        else:
            last = str(path[-1]).rpartition(".")[2]
            report((*key, *path), f"{dotted((*key, *path))} must say what is tried, as in {{log_uniform: [1e-5, 1e-3]}}"
                   f" or {{choice: [a, b]}}, got {node!r}{did_you_mean(last, (*SCALES, CHOICE))}")
    return Space(domains)


def is_domain(node: Any) -> bool:
    """Whether a node says what is tried, by the name of a range or by `choice`."""
    return isinstance(node, Mapping) and bool(node.keys() & {*SCALES, CHOICE})


def places(tree: Mapping[str, Any], above: Key = ()) -> Iterator[tuple[Key, Any]]:
    """What is searched, by its path; a node that is no block and no domain, too, for a report."""
    for name, node in tree.items():
        if isinstance(node, Mapping) and node and not is_domain(node):
            yield from places(node, (*above, str(name)))
        else:
            yield (*above, str(name)), node


def _domain(node: Mapping[str, Any], key: Key, report: Report) -> Domain | None:
    kind = next(iter(node.keys() & {*SCALES, CHOICE}))
    extra = sorted(node.keys() - {kind, *(("step",) if kind != CHOICE else ())})
    if extra:
        report(key, f"{dotted(key)}: '{extra[0]}' cannot stand beside {kind}")
        return None
    try:
        if kind == CHOICE:
            return _choice(node[kind], (*key, kind), report)
        log, whole = SCALES[kind]
        low, high = map(_number, node[kind]) if isinstance(node[kind], list) and len(node[kind]) == 2 else (1.0, 0.0)
        return Range(low, high, log, whole, _number(node.get("step", 0.0)))
    except ValueError as error:
        report(key, f"{dotted(key)}: {kind} {error}")
        return None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"needs numbers, got {value!r}")
    return value


def _choice(given: Any, key: Key, report: Report) -> Choice:
    if not isinstance(given, list) or len(given) < 2:
        raise ValueError(f"needs a list of two options at least, got {given!r}")
    labels, options = list[str](), list[Option]()
    for number, value in enumerate(given):
        label = _label(value)
        count = labels.count(label)
        labels.append(label)
        below: dict[Key, Domain] = {}
        for path, node in _searched(value):
            if (domain := _domain(node, (*key, number, *path), report)) is not None:
                below[path] = domain
        options.append(Option(f"{label}-{count + 1}" if count else label, value, below))
    repeated = [a.label for a, b in itertools.combinations(options, 2) if a.value == b.value and
                type(a.value) is type(b.value)]
    if repeated:
        raise ValueError(f"has the option {repeated[0]} twice")
    return Choice(tuple(options))


def _label(value: Any) -> str:
    """`gae` of `{use: gae, lam: ...}`, the text of a value that is no block."""
    if isinstance(value, Mapping):
        return next((str(value[name]) for name in ("use", "name", "file") if name in value), "option")
    return value if isinstance(value, str) else json.dumps(value)


def _searched(value: Any, above: Key = ()) -> Iterator[tuple[Key, Mapping[str, Any]]]:
    """Places inside an option that are searched."""
    for name, node in value.items() if isinstance(value, Mapping) else ():
        if is_domain(node):
            yield (*above, str(name)), node
        else:
            yield from _searched(node, (*above, str(name)))


def _below(name: str, option: Option, path: Key) -> str:
    return f"{name}={option.label}.{dotted(path)}"


def _draw(name: str, domain: Domain, choose: Choose, values: dict[str, Any]) -> None:
    values[name] = choose(name, domain)
    if isinstance(domain, Choice):
        option = domain.option(values[name])
        for path, inner in option.below.items():
            _draw(_below(name, option, path), inner, choose, values)


def _written(name: str, domain: Domain, values: Values) -> Any:
    if isinstance(domain, Range):
        return values[name]
    option = domain.option(values[name])
    made = deepcopy(option.value)
    for path, inner in option.below.items():
        *blocks, last = path
        place = made
        for block in blocks:
            place = place[block]
        place[last] = _written(_below(name, option, path), inner, values)
    return made


def _parameters(name: str, domain: Domain, always: bool) -> Iterator[tuple[str, Domain, bool]]:
    yield name, domain, always
    for option in domain.options if isinstance(domain, Choice) else ():
        for path, inner in option.below.items():
            yield from _parameters(_below(name, option, path), inner, always=False)


def _grid(name: str, domain: Domain) -> Iterator[dict[str, Any]]:
    if isinstance(domain, Range):
        try:
            yield from ({name: point} for point in domain.points())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return
    for option in domain.options:
        inner = (list(_grid(_below(name, option, path), d)) for path, d in option.below.items())
        for parts in itertools.product(*inner):
            yield {name: option.label, **{n: value for part in parts for n, value in part.items()}}


def _leading(name: str, domain: Domain, wanted: str, end: Any) -> Any:
    """The first of a parameter, but what leads to `wanted`, and there `end`."""
    if name == wanted:
        return end
    if isinstance(domain, Range):
        return domain.low
    leading = [o.label for o in domain.options if wanted.startswith(f"{name}={o.label}.")]
    return (leading or [domain.options[0].label])[0]


def dominates(a: Sequence[float], b: Sequence[float], goals: Sequence[Goal]) -> bool:
    """Whether `a` is at least as good as `b` in every goal, and better in one.

    >>> dominates((1.0, 2.0), (1.0, 3.0), (Goal("reward"), Goal("kl", maximize=False)))
    True
    """
    better = [(x - y) * (1 if goal.maximize else -1) for x, y, goal in zip(a, b, goals, strict=True)]
    return min(better) >= 0 and max(better) > 0
