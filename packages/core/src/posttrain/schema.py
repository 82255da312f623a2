"""The keys of a configuration file: one dataclass per block, each field with its default and its meaning.

Fields that name a component are made by `part`: in the file they hold a name or `{use: name, field: value}`,
after `config.load` they hold the component itself. Knows the protocols only by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any, Literal

from posttrain.protocols import Optimization, RowRules


def part(kind: str, default: Any = None, beside: str = "") -> Any:
    """A field that holds one component of `kind`; `default` is its name, or None where it may be absent.

    With `beside` the default is made only where the key of that name holds a component, and is None elsewhere.
    """
    return field(default=default, metadata={"kind": kind, "beside": beside})


def parts(kind: str, default: Mapping[str, str] | None = None) -> Any:
    """A field that holds a map of names to components of `kind`."""
    return field(default_factory=lambda: dict(default or {}), metadata={"kind": kind, "many": True})


def not_negative(block: object, *names: str) -> None:
    """Raise `ValueError` for a field that is negative, infinite or no number."""
    for name in names:
        if not 0 <= (value := getattr(block, name)) < inf:
            raise ValueError(f"{name} must {'not be negative' if value < 0 else 'be finite'}, got {value}")


@dataclass(frozen=True)
class RolloutSettings:
    """Block `rollout:` - what is generated in each step. Episodes = prompts_per_step * group_size."""

    engine: Any = part("engine", "batched")
    prompts_per_step: int = 16
    """Prompts of one step."""
    group_size: int = 8
    """Answers to each prompt."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    min_p: float = 0.0
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    """Strings that end an answer."""
    staleness: int = 0
    """The sampler uses the weights of this many iterations ago."""
    filter_zero_variance: bool = False
    """Drop groups whose rewards are all equal, and draw further prompts in their place."""
    max_refills: int = 4
    """How often dropped groups are drawn anew before the step goes on with what it has."""

    def __post_init__(self) -> None:
        for name in ("prompts_per_step", "group_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.temperature < inf:
            raise ValueError("temperature must be positive in training; evaluate.temperature may be 0 (greedy)")
        if self.max_refills < 0:
            raise ValueError(f"max_refills must not be negative, got {self.max_refills}")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p < 1 or self.top_k < 0 or self.staleness < 0:
            raise ValueError("top_p lies in (0, 1], min_p in [0, 1), top_k and staleness are not negative")


@dataclass(frozen=True)
class ReplaySettings:
    """Block `replay:` - older rollouts mixed into the update, with the policy versions that wrote them."""

    capacity: int = 0
    """Episodes kept; 0 keeps none."""
    reuse: int = 0
    """Older episodes added to each step, in whole groups."""
    max_age: int = 4
    """Iterations after which an episode is no longer used."""

    def __post_init__(self) -> None:
        not_negative(self, "capacity", "reuse", "max_age")


@dataclass(frozen=True)
class UpdateSettings:
    """Block `update:` - how a rollout becomes optimiser steps."""

    steps_per_rollout: int = 1
    """Disjoint minibatches per pass, one optimiser step each."""
    epochs: int = 1
    """Passes over the rollout."""
    old_logprobs: Literal["auto", "recompute", "behavior"] = "auto"
    """pi_old of the ratio: recomputed by the trainer, or the sampler's own. `auto` takes the sampler's where rollouts
    are stale or replayed and no correction is configured, so that the ratio then corrects for the sampler."""
    non_finite_logprobs: Literal["reject", "one"] = "reject"
    """Actions whose sampler's log-prob is no finite number: left out of the update, or taken with ratio 1."""
    max_kl: float = 0.0
    """Leave out the remaining optimiser steps of a rollout where KL(pi_old || pi) per action is above this; 0 never."""
    entropy_coef: float = 0.0
    expert_balance_coef: float = 0.0
    """Weight of the loss that evens out the load of a policy's experts, which is 1 where it is even."""
    value_coef: float = 0.5
    """Weight of the value loss where critic and policy share a trunk."""

    def __post_init__(self) -> None:
        if self.steps_per_rollout < 1 or self.epochs < 1:
            raise ValueError("steps_per_rollout and epochs must be at least 1")
        not_negative(self, "value_coef", "max_kl", "expert_balance_coef")
        if not isfinite(self.entropy_coef):  # negative: less entropy is wanted
            raise ValueError(f"entropy_coef must be finite, got {self.entropy_coef}")


@dataclass(frozen=True)
class EvaluateSettings:
    """Block `evaluate:` - reward on held-out prompts."""

    every: int = 0
    """Evaluate before the first step, after the last and every n steps; 0 never."""
    prompts: int = 0
    """Held-out prompts used; 0 uses all."""
    temperature: float = 0.0
    """0 is greedy."""

    def __post_init__(self) -> None:
        not_negative(self, "every", "prompts", "temperature")


@dataclass(frozen=True)
class RewardWorkerSettings:
    """Block `reward_workers:` - the processes in which rewards are called."""

    count: int = 0
    """Processes that share the rewards named in the configuration; 0: one per core that `threads` leaves, at most 8. A
    function handed over from Python has a process of its own. Results do not depend on it."""
    fork: bool = True
    """Call functions handed over from Python in forked processes; false: in the run's own, without a deadline (for
    functions that use CUDA). Only Linux can fork; names and `file:` have new processes everywhere."""
    max_error_rate: float = 0.05
    """Stop where a reward fails on a larger share of a step's rows, by exceptions, time-outs or the death of its
    process, whatever its rules say."""

    def __post_init__(self) -> None:
        not_negative(self, "count")
        if not 0 <= self.max_error_rate <= 1:
            raise ValueError(f"max_error_rate lies in [0, 1], got {self.max_error_rate}")


@dataclass(frozen=True)
class CheckpointSettings:
    """Block `checkpoint:`."""

    every: int = 50
    """Steps between checkpoints; one is always written at the end. 0: only at the end."""
    keep: int = 2
    """Newest checkpoints kept; 0 keeps all."""

    def __post_init__(self) -> None:
        not_negative(self, "every", "keep")


@dataclass(frozen=True)
class ReferenceSettings:
    """Block `reference_update:` - a reference that moves after the policy. The KL to the policy before training is
    then measured beside it (`kl/initial`), which takes one more copy of the weights and one more pass over a rollout;
    the weights of the reference are part of every checkpoint."""

    every: int = 0
    """Move after every n iterations; 0 never by their number."""
    kl_above: float = 0.0
    """Move after an iteration whose KL to the reference per action was above this; 0 never."""
    rate: float = 1.0
    """reference <- rate * policy + (1 - rate) * reference; 1 resets it to the policy."""

    def __post_init__(self) -> None:
        not_negative(self, "every", "kl_above")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate lies in (0, 1], got {self.rate}; 1 resets the reference to the policy")

    @property
    def moves(self) -> bool:
        """Whether the reference ever moves."""
        return self.every > 0 or self.kl_above > 0


@dataclass(frozen=True)
class MemorySettings:
    """Block `memory:` - what a run says of its memory."""

    profile: bool = False
    """Record the peak of each phase and what takes it, and warn where memory grows from step to step. Where CUDA runs
    out of memory, a snapshot for pytorch.org/memory_viz is written into the run directory."""


@dataclass(frozen=True)
class StopSettings:
    """Block `stop:` - what ends a run before its last step, evaluated and saved as after that."""

    kl: float = 0.0
    """The KL to the reference per action is above this; 0 never."""
    after: int = 0
    """This step, while schedules and all else go by `steps`: the run is as if it was interrupted there. 0 never."""

    def __post_init__(self) -> None:
        not_negative(self, "kl", "after")


@dataclass(frozen=True)
class ResumeSettings:
    """Block `resume:`."""

    fallback: bool = False
    """Take the newest valid checkpoint where the newest one is damaged."""


@dataclass(frozen=True)
class Settings:
    """A whole configuration."""

    steps: int = 100
    """Iterations: rollouts where `loop: rl`, optimiser steps where `loop: supervised`."""
    loop: Literal["rl", "supervised"] = "rl"
    """Learn from rewards of own rollouts, or from given answers."""
    seed: int = 0
    run: str = ""
    """Run directory; empty derives `runs/<config name>`, with a number behind it where that exists."""
    threads: int = 0
    """CPU threads of the framework; 0 leaves its own default. Part of what makes a resume exact."""
    policy: Any = part("backend", "torch")
    reference: Any = part("backend")
    """Default: the policy's weights at the start of the run."""
    critic: Any = part("backend")
    """`policy` shares the policy's trunk; a backend loads a model of its own; absent where nothing needs values."""
    tokenizer: Any = part("tokenizer", "bytes")
    task: Any = part("task")
    rewards: Mapping[str, Any] = parts("reward")
    """Named rewards. Beside `use:` or `file:` each has `weight: 1.0` in the sum, `timeout: 30.0` seconds for a call,
    and what becomes of a row: `on_error: fail` where it raises, `on_timeout: drop_sample` where it does not answer or
    its process dies; both take `fail`, `drop_sample`, `drop_group` or `zero`. `bootstrap: true` takes it out of the
    sum: it scores the states in which truncated episodes end, for an estimator with `bootstrap: score`. `at_most` or
    `at_least` makes it a cost, whose mean `constraint` keeps there, and takes it out of the sum, too."""
    reward_workers: RewardWorkerSettings = field(default_factory=RewardWorkerSettings)
    estimator: Any = part("estimator", "grpo")
    correction: Any = part("correction")
    """Default: `tis` where answers are drawn with log-probs that are not the trainer's, as from quantised weights, and
    nothing else corrects for it."""
    combiner: Any = part("combiner")
    """Runs the estimator once per reward column and mixes the advantages; absent: rewards are summed first."""
    gradient_combiner: Any = part("gradient_combiner")
    """Runs the estimator once per reward column and mixes the gradients: one backward pass and one gradient each."""
    constraint: Any = part("constraint")
    """Keeps rewards with `at_most` or `at_least` there: the estimator runs once for each of them, and their advantages
    are mixed with those of the reward by multipliers."""
    objective: Any = part("objective", "grpo")
    value_objective: Any = part("objective", "value", beside="critic")
    """Loss of the critic."""
    kl: Any = part("kl", "none")
    reference_update: ReferenceSettings = field(default_factory=ReferenceSettings)
    batching: Any = part("batching", "first_fit")
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    update: UpdateSettings = field(default_factory=UpdateSettings)
    batch_size: int = 64
    """Rows per optimiser step where `loop: supervised`: answers, or pairs of them."""
    optimizer: Optimization = field(default_factory=Optimization)
    critic_optimizer: Optimization | None = None
    """Of a separate critic; default: as `optimizer`."""
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    stop: StopSettings = field(default_factory=StopSettings)
    data: RowRules = field(default_factory=RowRules)
    resume: ResumeSettings = field(default_factory=ResumeSettings)
    trackers: Mapping[str, Any] = parts("tracker", {"console": "console", "jsonl": "jsonl"})
    plugins: tuple[str, ...] = ()
    """Plugins that no distribution installs: files that end in `.py`, recorded with their hash, and modules."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        not_negative(self, "seed", "threads")
