"""Two engines that let runs be compared on equal rollouts: one keeps what another engine draws, one gives it again.

A run in Python takes them as they are, `rollout: {engine: Recording(...)}`. Knows neither models nor frameworks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np

from posttrain.data import Array, Prompt, Rollouts, Sampling
from posttrain.protocols import Engine, Sampler, Scorer, Tokenizer


@final
@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """Draws as `engine` does, and keeps every rollout in `kept`, in order."""

    engine: Engine
    kept: list[Rollouts] = field(default_factory=list)

    def start(self, policy: Scorer, tokenizer: Tokenizer, *, shared: bool) -> Sampler:
        return _RecordingSampler(self.engine.start(policy, tokenizer, shared=shared), self.kept)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Replaying:
    """Gives `kept` again, in order, whatever the policy is: what it draws is another's, with the other's log-probs."""

    kept: Sequence[Rollouts]

    def start(self, policy: Scorer, tokenizer: Tokenizer, *, shared: bool) -> Sampler:
        return _ReplayingSampler(self.kept)


@dataclass(slots=True, eq=False)
class _RecordingSampler:
    """See `posttrain.protocols.Sampler`."""

    sampler: Sampler
    kept: list[Rollouts]

    def rollout(self, prompts: Sequence[Prompt], sampling: Sampling, seed: Sequence[int]) -> Rollouts:
        self.kept.append(found := self.sampler.rollout(prompts, sampling, seed))
        return found

    def sync(self, params: Iterable[tuple[str, Array]], version: int) -> None:
        self.sampler.sync(params, version)

    def check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        self.sampler.check(prompts, sampling)


@dataclass(slots=True, eq=False)
class _ReplayingSampler:
    """See `posttrain.protocols.Sampler`."""

    kept: Sequence[Rollouts]
    given: int = 0
    version: int = 0

    def rollout(self, prompts: Sequence[Prompt], sampling: Sampling, seed: Sequence[int]) -> Rollouts:
        """Raises `ValueError` where other prompts were answered, or fewer rollouts were kept than are asked for."""
        if self.given == len(self.kept):
            raise ValueError(f"{self.given} rollouts were kept, and one more is asked for")
        found = self.kept[self.given]
        if found.prompts != tuple(prompts) or found.sampling != sampling:
            raise ValueError(f"rollout {self.given} that was kept answers other prompts, or by other sampling")
        self.given += 1
        versions = np.full(int(found.is_action.sum()), self.version, np.int32)
        return replace(found, policy_version=versions)

    def sync(self, params: Iterable[tuple[str, Array]], version: int) -> None:
        self.version = version

    def check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Nothing is too long for what was answered before."""
