"""All state of a run that is not inside a learner: a value, replaced at each step, saved and restored bit for bit.

Randomness needs no state of its own: every draw is seeded by (seed, step, purpose).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

import numpy as np

from posttrain import replay as replay_files
from posttrain.errors import ConfigError
from posttrain.passes import Budget
from posttrain.replay import Replay


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Policy weights on the host, and the version they are."""

    version: int
    params: Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, eq=False)
class RunState:
    """Where a run stands after `step` iterations."""

    step: int = 0
    cursor: int = 0
    """Rows taken from the task so far."""
    budget: Budget = 0
    """Tokens of one micro-batch, which shrink when memory runs out; the state of a planner that adapts."""
    kl: Any = None
    """State of the KL controller: a frozen dataclass of numbers."""
    combiner: Any = None
    gradient_combiner: Any = None
    constraint: Any = None
    limits: Mapping[str, float] = field(default_factory=dict)
    """Of the costs, as the constraint's state was made for them."""
    ended_at_kl: float = 0.0
    """The KL to the reference at which the run was ended; 0 where it was not."""
    replay: Replay = field(default_factory=Replay)
    reference: Snapshot | None = None
    """Weights of a reference that has moved."""
    stale: tuple[Snapshot, ...] = ()
    """Weights of earlier iterations, oldest first, for a sampler that lags behind."""


CONTROLLERS = ("kl", "combiner", "gradient_combiner", "constraint")
"""Fields that hold the state of a component: a frozen dataclass of plain values, or None."""


def to_files(state: RunState) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """Groups of arrays (one safetensors file each) and JSON values."""
    replayed, texts = replay_files.to_files(state.replay)
    arrays = {"replay": replayed} if replayed else {}
    arrays |= {f"stale-{i}": dict(s.params) for i, s in enumerate(state.stale)}
    moved = state.reference
    if moved is not None:
        arrays["reference"] = dict(moved.params)
    controllers = {name: asdict(value) for name in CONTROLLERS
                   if (value := getattr(state, name)) is not None}
    return arrays, {"state": {"step": state.step, "cursor": state.cursor, "budget": _plain(state.budget), **controllers,
                              "limits": dict(state.limits), "ended_at_kl": state.ended_at_kl,
                              "stale_versions": [s.version for s in state.stale],
                              "reference_version": None if moved is None else moved.version}, "replay": texts}


def from_files(arrays: Mapping[str, Mapping[str, np.ndarray]], values: Mapping[str, Any], fresh: RunState) -> RunState:
    """The inverse of `to_files`; `fresh` tells the classes of the controllers' states. Raises `ConfigError` where the
    configuration has costs or limits that the run did not have."""
    stored = values["state"]
    if (limits := stored.get("limits", {})) != dict(fresh.limits):
        raise ConfigError([f"limits of costs changed: the run has {_said(limits)}, the configuration "
                           f"{_said(fresh.limits)} (at_least is negated)"], next_step=(
            "Resume with the limits of the run, or start a new one from its weights: policy.weights=RUN/policy."))
    controllers = {name: type(initial)(**stored[name]) for name in CONTROLLERS
                   if (initial := getattr(fresh, name)) is not None}
    stale = tuple(Snapshot(v, arrays[f"stale-{i}"]) for i, v in enumerate(stored["stale_versions"]))
    version = stored.get("reference_version")
    return RunState(
        step=stored["step"], cursor=stored["cursor"], budget=_budget(stored["budget"], fresh.budget), stale=stale,
        limits=limits, ended_at_kl=stored.get("ended_at_kl", 0.0),
        reference=None if version is None else Snapshot(version, arrays["reference"]),
        replay=replay_files.from_files(arrays.get("replay", {}), values["replay"]), **controllers)


def _plain(budget: Budget) -> Any:
    return asdict(budget) if is_dataclass(budget) and not isinstance(budget, type) else budget


def _budget(stored: Any, fresh: Budget) -> Budget:
    """What was stored; the fresh one where the configuration now has a planner of another sort."""
    if isinstance(fresh, int) or isinstance(stored, int):
        return stored if isinstance(fresh, int) and isinstance(stored, int) else fresh
    return type(fresh)(**stored)


def _said(limits: Mapping[str, float]) -> str:
    return ", ".join(f"{name}: {limit:g}" for name, limit in limits.items()) or "none"
