"""Every component that is registered, for tests that must cover one that does not exist yet: each as its preset, and as
what other choices of its fields make of it. Imports components, no framework.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from functools import cache
from importlib import import_module
from itertools import combinations, product
from typing import Any, Literal, get_args, get_origin

from posttrain.annotations import hints_of
from posttrain.errors import InputError
from posttrain.hookspecs import Component
from posttrain.registry import Registry, discover
from posttrain.testing import ComponentContract

CONTRACTS = ("contracts.test_objectives", "contracts.test_kl", "contracts.test_estimators", "contracts.test_mixing")
"""Modules whose contracts hold settings that work, for a component whose preset lacks what only a user can say."""


def registered(kind: str, changes: int = 1, *plugins: object) -> dict[str, Any]:
    """Name -> component of `kind`, also of further `plugins`: every preset, and of every class all settings in which up
    to `changes` choices (fields of `Literal` and `bool`) are not those of its first preset."""
    registry = installed().extended(plugins)
    found = {component.name: sample(registry, component) for component in registry.components(kind)}
    first = {type(preset): name for name, preset in reversed(found.items())}
    for name in first.values():
        for label, other in _others(found[name], changes):
            if other not in found.values():
                found[f"{name} {label}"] = other
    return found


@cache
def installed() -> Registry:
    """What distributions declare."""
    return discover(environ={})


def sample(registry: Registry, component: Component) -> Any:
    """The component as its preset, else as one of its class's contracts has it."""
    try:
        return registry.create(component.kind, component.name)
    except InputError:
        cls = registry.load(component)
        for made in _of_contracts():
            if type(made) is cls and all(getattr(made, name) == value for name, value in component.defaults.items()):
                return made
        raise


def _others(preset: Any, changes: int) -> Iterator[tuple[str, Any]]:
    """Label and component, for each setting that the class takes."""
    choices = {f.name: [choice for choice in _choices(type(preset), f.name) if choice != getattr(preset, f.name)]
               for f in (fields(preset) if is_dataclass(preset) else ())}
    for n in range(1, changes + 1):
        for names in combinations(choices, n):
            for values in product(*(choices[name] for name in names)):
                changed = dict(zip(names, values))
                with suppress(ValueError, InputError):  # choices that exclude one another
                    yield " ".join(f"{name}={value}" for name, value in changed.items()), replace(preset, **changed)


def _choices(cls: type, name: str) -> tuple[Any, ...]:
    """What the field may hold, where that can be counted."""
    hint = hints_of(cls).get(name)
    return get_args(hint) if get_origin(hint) is Literal else (False, True) if hint is bool else ()


@cache
def _of_contracts() -> tuple[Any, ...]:
    """The components of all contracts under test."""
    for module in CONTRACTS:
        import_module(module)
    def below(cls: type[ComponentContract]) -> Iterator[type[ComponentContract]]:
        for sub in cls.__subclasses__():
            yield sub
            yield from below(sub)
    return tuple(component for cls in below(ComponentContract) for component in cls.components)
