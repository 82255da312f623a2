"""The five hooks a plugin may implement, and the declaration of a component. Imports no framework.

Components compute, hooks observe: no hook changes data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pluggy

PROJECT = "posttrain"
ENTRY_POINT_GROUP = "posttrain.v1"
"""Carries the version of the plugin interface; another group is reported, never imported."""

IN_FILE = f"{PROJECT}_file_"
"""How the names of modules begin that were imported from a file alone (`registry.import_file`)."""

KINDS = ("estimator", "correction", "objective", "kl", "constraint", "combiner", "gradient_combiner", "backend",
         "engine", "kernel", "tokenizer", "batching", "searcher", "task", "reward", "tracker")
"""Kinds of component, closed: only core adds one. What each is stands in `protocols.py`."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True, slots=True)
class Component:
    """A component as data, so that listing and help import nothing.

    >>> Component("estimator", "gae", "posttrain_estimators.multistep:GAE", "generalised advantages").kind
    'estimator'
    """

    kind: str
    name: str
    target: str
    """`module:Class`, imported when the component is used or shown."""
    summary: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """A preset: field values other than the class's own defaults."""
    source: str = ""
    """Paper and equation."""
    extra: str = ""
    """Extra of its distribution that brings what it needs: `hf` for `pip install 'posttrain-backends[hf]'`."""


@hookspec
def components() -> Iterable[Component]:
    """Components this plugin offers."""
    raise AssertionError("a hook specification is not called")


@hookspec
def commands(app: Any) -> None:
    """Add commands to the command line, a `typer.Typer`."""


@hookspec
def run_started(run: Any) -> None:
    """A run began or was resumed."""


@hookspec
def step_finished(run: Any, step: int, metrics: Mapping[str, float]) -> None:
    """A step is done and its metrics are in `metrics.jsonl`."""


@hookspec
def run_finished(run: Any, error: BaseException | None) -> None:
    """A run ended, by itself or by `error`."""
