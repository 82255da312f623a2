"""What a run would take of memory, phase by phase, without its weights and without a GPU.

One iteration goes through the trainer's own code, on tensors that the backend only imagines: what is allocated and when
it is freed is not modelled but done. Answers are as long as they may be, of the longest prompts. Imports no framework.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, final

import numpy as np
from posttrain.compose import build, initial_state, open_task
from posttrain.config import Loaded
from posttrain.data import FINISH, Array, Prompt, Rollouts, Sampling, offsets_of
from posttrain.errors import ConfigError
from posttrain.memory import HOST, RESIDENT
from posttrain.passes import first_budget
from posttrain.profiling import Profile
from posttrain.protocols import Accounted, Batching, Imagining, PromptSource, Sampler, Tokenizer
from posttrain.rewards.pool import Pool
from posttrain.run import LOOPS
from posttrain.schema import Settings
from posttrain.timing import Phases
from posttrain.tokenizers import prompt_ids
from posttrain.trainer import Parts

_LOOKED_AT = 512
"""Rows whose length is looked at."""
_PARTS = 2
"""Parts of an update that are imagined: the first, and one that finds its gradients there."""
EIGHT_BIT = 2.03 / 8
"""Share of what moments in float32 take: a byte each, and a scale for every 256 (bitsandbytes)."""
CODE = 24 * 2**20
"""Bytes of a process that are touched when operations run for the first time: kernels, their tables and threads'
stacks. Chosen with the configurations of tools/bench/memory_plan.py in sight that are marked `fitted`."""


@final
@dataclass(frozen=True, slots=True)
class Prediction:
    """Peaks above what the process takes before anything is loaded, in bytes."""

    phases: dict[str, int]
    categories: dict[str, int]
    tokens: int
    """Of the largest part of an update."""

    @property
    def peak(self) -> int:
        """Of the whole run."""
        return max(self.phases.values())

    @property
    def binding(self) -> str:
        """The phase that decides: the last and innermost of the largest."""
        return max(self.phases, key=lambda phase: (self.phases[phase], phase != "update"))


def predict(loaded: Loaded, opened: tuple[Tokenizer, PromptSource] | None = None) -> Prediction:
    """Raises `ConfigError` where a model's backend cannot imagine it."""
    settings = loaded.settings
    tokenizer, source = opened or open_task(settings)
    _require_imagining(loaded)
    eight_bit = settings.optimizer.moments == "int8"
    if eight_bit:  # they run in a library whose work cannot be imagined, and only their size is another
        settings = replace(settings, optimizer=replace(settings.optimizer, moments="float32"))
    small = replace(loaded, settings=_one_update(settings, tokenizer, source))
    longest = _Longest(tokenizer, source, settings)
    with settings.policy.imagined(tokenizer.eos) as mark, _quiet():
        profile = Profile(mark)
        with profile("load"):
            parts = build(small, _pool(small.settings), (tokenizer, longest))
        profile.watch([*(t.learner for t in parts.trained), parts.reference, parts.initial, parts.sampler])
        parts = replace(parts, sampler=Lengthy(parts.sampler, settings, longest))
        state = initial_state(parts, small.settings)
        with parts.workers:
            _advance(parts, small.settings, state, profile)
        now = mark.level()[HOST]
        held = [t.learner.held() for t in parts.trained if isinstance(t.learner, Accounted)]
        profile.taken()
    phases = {phase: marks[HOST] + CODE for phase, marks in profile.run.phases.items()}
    phases["load"] -= CODE  # nothing was computed yet
    saved = sum(sum(each.values()) for each in held)  # a copy of weights and moments
    phases["checkpoint"] = now + saved + CODE
    categories = dict(profile.run.categories)
    if eight_bit:
        spared = int((1 - EIGHT_BIT) * categories["optimiser"])
        categories["optimiser"] -= spared
        phases = {phase: x - spared * (2 if phase == "checkpoint" else 1) for phase, x in phases.items()}
    return Prediction(phases, categories,
                      min(_budget(settings.batching), longest.tokens))


def process_bytes(loaded: Loaded) -> int:
    """What a process takes that has imported the framework and loaded nothing. To be asked before the first prediction,
    which imports more."""
    _require_imagining(loaded)
    loaded.settings.policy.imagined(0)  # not entered: what it imports is what a run imports
    return RESIDENT.level()[HOST]


def _advance(parts: Parts, settings: Settings, state: Any, profile: Profile) -> None:
    LOOPS[settings.loop][0](parts, settings, state, Phases(perf_counter, watched=profile))


def _require_imagining(loaded: Loaded) -> None:
    """Raise one `ConfigError` for all models that cannot be imagined."""
    settings = loaded.settings
    models = {"policy": settings.policy, "reference": settings.reference, "critic": settings.critic}
    wrong = []
    for key, backend in models.items():
        if backend is None or isinstance(backend, str):
            continue
        name = loaded.components[key].name if key in loaded.components else type(backend).__name__
        if not isinstance(backend, Imagining):
            wrong.append(f"{key}: backend '{name}' cannot say what its models take without loading them")
        elif getattr(backend, "quantize", None) is not None:
            wrong.append(f"{key}.quantize: layers of a quantising library cannot be imagined")
    wrong += [f"rewards.{name}: a reward that is a model has its own memory, which is not predicted"
              for name, entry in settings.rewards.items() if not callable(entry.call)]
    if wrong:
        raise ConfigError(wrong, next_step="Measure it instead: posttrain memory profile FILE.")


def _one_update(settings: Settings, tokenizer: Tokenizer, source: PromptSource) -> Settings:
    """The same run with no more episodes in an update than fill the parts that are imagined, and rewards that are not
    called."""
    rewards = {name: replace(entry, call=_imagined_reward, origin=None) for name, entry in settings.rewards.items()}
    settings = replace(settings, rewards=rewards, evaluate=replace(settings.evaluate, every=0))
    each = _Longest(tokenizer, source, settings).tokens_of_each
    enough = -(-_PARTS * _budget(settings.batching) // each)
    if settings.loop == "supervised":
        return replace(settings, batch_size=max(1, min(settings.batch_size, enough)))
    rollout, update = settings.rollout, settings.update
    prompts = min(-(-rollout.prompts_per_step // update.steps_per_rollout), -(-enough // rollout.group_size))
    return replace(settings, rollout=replace(rollout, prompts_per_step=max(1, prompts), filter_zero_variance=False),
                   update=replace(update, steps_per_rollout=1))


def _budget(batching: Batching) -> int:
    """Tokens of one part, at the start of a run."""
    found = first_budget(batching)
    return int(found if isinstance(found, int) else batching.tokens)


def _imagined_reward(completions: list[str], **columns: Any) -> list[float]:
    """Different numbers, so that every group has something to learn."""
    return [float(i % 2) for i in range(len(completions))]


def _pool(settings: Settings) -> Pool:
    """Rewards in this process."""
    return Pool(tuple(settings.rewards.values()), 1, False, settings.threads)


@contextmanager
def _quiet() -> Any:
    """Nothing that is imagined is worth a warning."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@final
class _Longest:
    """The longest of a task's rows, over and over; a `PromptSource`."""

    def __init__(self, tokenizer: Tokenizer, source: PromptSource, settings: Settings) -> None:
        given = [p for p in source.take(0, min(_LOOKED_AT, source.rows), settings.seed)]
        lengths = np.array([len(prompt_ids(p, tokenizer)) for p in given])
        order = np.argsort(-lengths, kind="stable")
        self._prompts, self.longest = [given[i] for i in order], int(lengths.max(initial=1))
        answers = settings.rollout.max_new_tokens if settings.loop == "rl" else 0
        self.tokens_of_each = max(1, int(np.median(lengths)) + answers)
        episodes = settings.rollout.prompts_per_step * settings.rollout.group_size
        self.tokens = self.tokens_of_each * episodes
        self.rows = source.rows
        self._held_out = source.held_out()

    def take(self, cursor: int, count: int, seed: int) -> Sequence[Prompt]:
        return [self._prompts[i % len(self._prompts)] for i in range(count)]

    def held_out(self) -> Sequence[Prompt]:
        return self._held_out


@final
class Lengthy:
    """A sampler whose rollouts are of a whole step, and whose answers are as long as they may be."""

    def __init__(self, sampler: Sampler, settings: Settings, source: PromptSource) -> None:
        self._sampler, self._settings, self._source = sampler, settings, source

    def rollout(self, prompts: Sequence[Prompt], sampling: Sampling, seed: Sequence[int]) -> Rollouts:
        rollout = self._settings.rollout
        whole = [replace(p, group=i) for i, p in enumerate(self._source.take(0, rollout.prompts_per_step, 0))
                 for _ in range(rollout.group_size)]
        drawn = self._sampler.rollout(whole, sampling, seed)
        first = np.flatnonzero(~drawn.is_action[:-1] & drawn.is_action[1:]) + 1
        lengths = (first - drawn.offsets[:-1])[:len(prompts)]
        return lengthy(prompts, lengths, sampling)

    def sync(self, params: Iterable[tuple[str, Array]], version: int) -> None:
        self._sampler.sync(params, version)

    def check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        self._sampler.check(prompts, sampling)


def lengthy(prompts: Sequence[Prompt], lengths: np.ndarray, sampling: Sampling) -> Rollouts:
    """Episodes of prompts of `lengths` tokens and answers as long as they may be. Prompts of one group are equal,
    others are not, as what is shared is computed once."""
    E, new = len(prompts), sampling.max_new_tokens
    whole = lengths + new
    is_action = np.concatenate([np.arange(n) >= n - new for n in whole])
    N, group = int(is_action.sum()), np.array([p.group for p in prompts], np.int64)
    own = np.where(is_action, np.arange(len(is_action)) % 7, np.repeat(group, whole) % 11)
    return Rollouts(
        tokens=own.astype(np.int32), offsets=offsets_of(whole), episode=np.arange(E), is_action=is_action, group=group,
        finish=np.full(E, FINISH.index("budget"), np.int8), terminated=np.zeros(E, bool), prompts=tuple(prompts),
        completions=("",) * E, behavior_logprobs=np.full(N, -1.0, np.float32),
        policy_version=np.zeros(N, np.int32), turn=np.zeros(N, np.int32), sampling=sampling)
