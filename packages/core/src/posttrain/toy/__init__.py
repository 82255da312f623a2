"""A policy that is a table, in NumPy: parts are tried with core alone, in a second, with numbers that can be checked.

`plugins: [posttrain.toy]` in a configuration brings a backend, an engine, an estimator and an objective, all named
`toy`. The loop around them is the real one. Not for learning anything: real policies come from posttrain-backends.
"""

from __future__ import annotations

from collections.abc import Iterable

from posttrain.hookspecs import Component, hookimpl


@hookimpl
def components() -> Iterable[Component]:
    """What this plugin offers."""
    yield Component("backend", "toy", "posttrain.toy.policy:Toy", "a table of logits, in NumPy")
    yield Component("engine", "toy", "posttrain.toy.engine:ToyEngine", "draws from the table, token by token")
    yield Component("estimator", "toy", "posttrain.toy.parts:GroupMean", "rewards against the group's mean")
    yield Component("objective", "toy", "posttrain.toy.parts:LogLikelihood", "advantage times log-probability",
                    source="Williams 1992")
