"""Older rollouts mixed into later updates, and how rollouts go to disk.

The buffer is a value: `mixed` returns a new one. Whole groups are kept and drawn, so that group statistics stay whole.
Knows arrays alone; the files are written by `checkpoint.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from posttrain.data import Prompt, Rollouts, Sampling

_TOKEN_ARRAYS = ("tokens", "offsets", "episode", "is_action", "group", "finish", "terminated", "behavior_logprobs",
                 "policy_version", "turn", "routes")


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """Scored rollouts of earlier iterations and the iteration [E] that each episode is from."""

    rollouts: Rollouts | None = None
    iteration: np.ndarray | None = None

    def mixed(self, fresh: Rollouts, step: int, *, capacity: int, reuse: int, max_age: int,
              rng: np.random.Generator) -> tuple[Rollouts, Replay]:
        """`fresh` with up to `reuse` older episodes behind it, and the buffer for the next step."""
        if capacity == 0:
            return fresh, self
        chosen, kept = [fresh], [fresh]
        iterations = [np.full(fresh.n_episodes, step)]
        if self.rollouts is not None and self.iteration is not None:
            young = np.flatnonzero(step - self.iteration <= max_age)
            old, age = self.rollouts.select(young), self.iteration[young]
            drawn = _whole_groups(old.group, rng.permutation(np.unique(old.group)), reuse)
            if len(drawn):
                chosen.append(old.select(drawn))
            newest_first = np.unique(old.group)[::-1]
            room = _whole_groups(old.group, newest_first, max(0, capacity - fresh.n_episodes))
            if len(room):
                kept.insert(0, old.select(room))
                iterations.insert(0, age[room])
        return Rollouts.concat(chosen), Replay(Rollouts.concat(kept), np.concatenate(iterations))


def _whole_groups(group: np.ndarray, order: np.ndarray, limit: int) -> np.ndarray:
    """Episodes of the first groups in `order` that fit into `limit` episodes, in their own order."""
    sizes = np.array([int((group == g).sum()) for g in order], np.int64)
    fits = order[np.cumsum(sizes) <= limit]
    return np.flatnonzero(np.isin(group, fits))


def to_files(replay: Replay) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays for safetensors and values for JSON."""
    r = replay.rollouts
    if r is None or replay.iteration is None:
        return {}, {}
    arrays = {name: x for name in _TOKEN_ARRAYS if (x := getattr(r, name)) is not None}
    arrays |= {f"rewards.{name}": x for name, x in r.rewards.items()}
    arrays |= {f"excluded.{name}": x for name, x in r.excluded.items()}
    arrays |= {f"greedy_rewards.{name}": x for name, x in r.greedy_rewards.items()}
    arrays["iteration"] = replay.iteration
    prompts = [{f.name: getattr(p, f.name) for f in fields(Prompt)} for p in r.prompts]
    return arrays, {"prompts": prompts, "completions": list(r.completions), "sampling": asdict(r.sampling)}


def from_files(arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> Replay:
    """The inverse of `to_files`."""
    if not arrays:
        return Replay()
    def prompt(row: Mapping[str, Any]) -> Prompt:
        known = dict(row)
        known["messages"] = None if row["messages"] is None else tuple(row["messages"])
        known["tokens"] = None if row["tokens"] is None else tuple(row["tokens"])
        return Prompt(**known)
    sampling = {**values["sampling"], "stop": tuple(values["sampling"]["stop"])}
    def named(prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
    rollouts = Rollouts(
        **{name: arrays[name] for name in _TOKEN_ARRAYS if name in arrays}, rewards=named("rewards."),
        excluded=named("excluded."), greedy_rewards=named("greedy_rewards."),
        prompts=tuple(prompt(row) for row in values["prompts"]), completions=tuple(values["completions"]),
        sampling=Sampling(**sampling))
    return Replay(rollouts, arrays["iteration"])
