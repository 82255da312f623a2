"""One protocol per kind of component: the doors between core and everything that can be exchanged.

A component is a final frozen dataclass whose fields are its configuration; no base class is needed, its shape decides.
What must be loaded before use (a model, an engine, a task) has a light component with one loading method, and a
protocol for the loaded thing. The list of kinds is closed: only core adds one. Knows `data.py` and
`search.py` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np

from posttrain.comm import Comm, SingleProcess
from posttrain.data import (
    Array,
    Counts,
    Episodes,
    Estimate,
    Loss,
    Metrics,
    MicroBatch,
    Prompt,
    Rollouts,
    Sampling,
    TokenOutputs,
    Weights,
)
from posttrain.hookspecs import KINDS as KINDS
from posttrain.ops import Ops
from posttrain.search import Goal, Result, Space, Values
from posttrain.watermark import Watermark


class Need(StrEnum):
    """A batch column that a component needs; the loop computes exactly what somebody needs."""

    ADVANTAGES = "advantages"
    TARGETS = "targets"
    VALUES = "values"
    """Values and bootstrap values of the critic before the update."""
    ACTION_VALUES = "action_values"
    """Action values of a critic before the update: those of the actions taken, and their mean under the policy, also
    in the state after the last action (`bootstrap_values`)."""
    FINAL_SCORES = "final_scores"
    """The score of a reward with `bootstrap: true`, of truncated episodes."""
    GREEDY_REWARDS = "greedy_rewards"
    """Rewards of one greedy answer to each prompt."""
    TURN = "turn"
    """Which turn of its episode an action belongs to."""
    LOGPROBS = "logprobs"
    """Log-probs of the trainer before the update, pi_old."""
    BEHAVIOR_LOGPROBS = "behavior_logprobs"
    REF_LOGPROBS = "ref_logprobs"
    PREFERRED = "preferred"
    """Which of the two answers to a prompt is the better one."""


class Output(StrEnum):
    """What a model can say of a batch of actions."""

    LOGPROBS = "logprobs"
    ENTROPY = "entropy"
    VALUES = "values"
    BOOTSTRAP_VALUES = "bootstrap_values"
    ACTION_VALUES = "action_values"
    """Of the actions taken; differentiable."""
    EXPECTED_ACTION_VALUES = "expected_action_values"
    """Mean over the vocabulary under the policy, of the state before each action and after each episode's last token;
    asked for in scoring only."""
    EXPERT_LOAD = "expert_load"
    """In `TokenOutputs.aux`: [M] per token, the mean over layers of E sum_e f_e p_e, with p the router's probabilities
    of its E experts and f the step's shares, `MicroBatch.constants` of the same name. In training only; differentiable
    in p."""
    REFERENCE_KL = "reference_kl"
    """KL(policy || reference) over the whole vocabulary, of the state before each action; differentiable in the policy
    alone. There for a learner that was given its reference (`Comparing`)."""


class Estimator(Protocol):
    """Advantages of the actions of one reward column. Pure."""

    @property
    def needs(self) -> frozenset[Need]: ...
    def __call__(self, episodes: Episodes, /) -> Estimate: ...


@runtime_checkable
class OffPolicy(Protocol):
    """What an estimator, a correction or an objective may be beside its kind: one that says whether it weighs the
    policy's loss by pi_old / mu. A correction that does not say so is taken to weigh, the others are not."""

    @property
    def corrects_for_sampler(self) -> bool: ...


@dataclass(frozen=True, slots=True, eq=False)
class Corrected:
    """What a correction says of each action: a detached weight, whether it stays, and diagnostics."""

    weight: Array
    keep: Array
    metrics: Metrics


class Correction(Protocol):
    """Off-policy weights and rejection from `logprobs` and `behavior_logprobs`. Pure."""

    @property
    def needs(self) -> frozenset[Need]: ...
    def __call__(self, episodes: Episodes, /) -> Corrected: ...


class Objective(Protocol):
    """A loss: hashable and pure. What is to be maximised is a reward, not an objective.

    Every term is `sum(weight * x)`; an objective never averages by itself, so any split into parts at `unit` gives the
    same gradient. Columns are finite, and appending zero-weight actions in a dummy episode changes nothing.
    """

    @property
    def needs(self) -> frozenset[Need]: ...
    @property
    def outputs(self) -> frozenset[Output]: ...
    @property
    def unit(self) -> Literal["action", "episode", "group"]:
        """What must not be split: over micro-batches, and `action` also allows any actions of one to be a call of their
        own, whose terms and metrics add up with those of the others."""
        ...
    @property
    def slots(self) -> tuple[str, ...]:
        """`("main",)`, or one per reward column when gradients are combined."""
        ...
    def weights(self, counts: Counts) -> Weights:
        """Per-action weights, once per optimiser step, from counts over all ranks."""
        ...
    def __call__(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Array]) -> Loss: ...


class ControllerState(Protocol):
    """State of a KL controller: a frozen dataclass of numbers, saved as JSON."""

    @property
    def coef(self) -> float: ...


_C = TypeVar("_C", bound=ControllerState)
_S = TypeVar("_S")


@dataclass(frozen=True, slots=True, eq=False)
class Compared:
    """What a KL compares the policy's log-probs of N actions with, in E episodes. Arrays of one framework."""

    ref_logprobs: Array
    """[N]; None for a KL over the whole vocabulary, unless another part needs them."""
    episode: Array
    """[N] the episode of each action, in 0 .. E-1."""
    count: Array
    """[E] actions of each episode, at least 1."""
    old_logprobs: Array | None = None
    """[N] of the policy that drew the actions (pi_old); absent means that it is the one which is compared."""
    exact: Array | None = None
    """[N] the KL over the whole vocabulary before each action, differentiable; for a KL that is `OverVocabulary`."""


class KL(Protocol[_C]):
    """An estimator of KL(policy || reference) per action, where it is applied, and the controller of its weight."""

    @property
    def placement(self) -> Literal["none", "loss", "reward", "advantage", "constraint"]: ...
    @property
    def unit(self) -> Literal["action", "episode", "group"]:
        """What must not be split for `divergence` to be right."""
        ...
    def divergence(self, ops: Ops, logprobs: Array, compared: Compared) -> Array:
        """[N] per action; differentiable in `logprobs`."""
        ...
    def init(self) -> _C: ...
    def update(self, state: _C, *, kl: float, n: int, **measured: float) -> _C:
        """The state after a rollout whose mean KL per action was `kl`, over `n` episodes."""
        ...


@runtime_checkable
class OverVocabulary(Protocol):
    """What a KL may be beside `KL`: one that says whether it looks at all actions of a state, and not at the one taken
    alone. Its divergence is then given `Compared.exact`, which there is in the loss only; one that does not say so is
    taken to look at the action taken."""

    @property
    def over_vocabulary(self) -> bool: ...


@runtime_checkable
class Restarting(Protocol):
    """What a KL may be beside `KL`: one whose state remembers the KL to a reference, and has to forget it where the
    reference moves."""

    def restarted(self, state: Any) -> Any:
        """The state at its coefficient, without what belongs to the reference before."""
        ...


@runtime_checkable
class Limited(Protocol):
    """What a KL placed in `constraint` is beside `KL`."""

    @property
    def at_most(self) -> float:
        """Largest mean KL per action."""
        ...


class ConstraintState(Protocol):
    """State of a constraint: a frozen dataclass of plain values, saved as JSON."""

    @property
    def multipliers(self) -> Mapping[str, float]:
        """lambda >= 0 of each cost: the weight of its advantages beside those of the reward."""
        ...
    @property
    def status(self) -> Mapping[str, str]:
        """Where each cost stands: `feasible`, `converging`, `infeasible`."""
        ...


@runtime_checkable
class Switching(Protocol):
    """What the state of a constraint may be beside `ConstraintState`: one that leaves the reward out while a limit is
    broken, as CRPO does. Advantages are (w A_R - sum_i lambda_i A_i) / (w + sum_i lambda_i) with w this weight; that of
    a state which does not say is 1."""

    @property
    def reward_weight(self) -> float: ...


_L = TypeVar("_L", bound=ConstraintState)


class Constraint(Protocol[_L]):
    """Keeps measured costs under limits by multipliers. A cost is to be at most its limit."""

    def init(self, limits: Mapping[str, float]) -> _L: ...
    def update(self, state: _L, costs: Mapping[str, float]) -> _L:
        """The state after a rollout whose mean costs were `costs`; one that is absent or NaN was not measured, and
        what is remembered of it is held."""
        ...


class Combiner(Protocol[_S]):
    """Mixes the estimates of several reward columns into one."""

    def init(self, columns: Sequence[str]) -> _S: ...
    def combine(self, estimates: Mapping[str, Estimate], state: _S) -> Estimate: ...


@runtime_checkable
class Measuring(Protocol):
    """What a combiner may be beside `Combiner`: one whose state follows the rewards."""

    def update(self, state: Any, measured: Mapping[str, float]) -> Any:
        """The state after a rollout whose mean of each reward column, over all ranks and the episodes to which it
        applies, was `measured`; called once per rollout, before `combine`. A column that is absent or NaN was not
        measured."""
        ...


class GradientCombiner(Protocol[_S]):
    """Weights of per-slot gradients from their Gramian G[m, m] (float64, summed over ranks)."""

    def init(self, slots: Sequence[str]) -> _S: ...
    def weights(self, gramian: np.ndarray, state: _S) -> tuple[np.ndarray, _S]: ...


class Scorer(Protocol):
    """A loaded model that says something of given tokens."""

    @property
    def provides(self) -> frozenset[Output]: ...
    def score(self, rollouts: Rollouts, outputs: frozenset[Output], temperature: float) -> TokenOutputs:
        """Outputs of all actions, as NumPy; raises `MemoryExhausted`."""
        ...
    def params(self) -> Iterator[tuple[str, Array]]:
        """Canonical names (Hugging Face safetensors) and arrays, buffers included; live, not copies."""
        ...
    def load_params(self, items: Iterable[tuple[str, Array]], version: int) -> None: ...


class Learner(Scorer, Protocol):
    """A loaded model that is trained. Gradients are sums: weights already carry the global counts."""

    @property
    def version(self) -> int:
        """Optimiser steps taken; numbers the policy's weights."""
        ...
    def accumulate(self, batch: MicroBatch, objective: Objective, coef: Mapping[str, float]) -> Metrics:
        """Add the gradients of one part, in float32 or better; raises `MemoryExhausted`."""
        ...
    def gramian(self, slots: Sequence[str], parameters: str = "") -> np.ndarray:
        """[m, m] float64 inner products of the slots' gradients, over parameters that match the pattern."""
        ...
    def apply(self, weights: Mapping[str, float] | None = None) -> Metrics:
        """Mix the slots, clip by the global norm, step the optimiser and the schedule; a step whose gradient is not
        finite is skipped and counted."""
        ...
    def discard(self) -> None:
        """Forget the gradients of the step and put the random state back to the step's start."""
        ...
    def state(self) -> Mapping[str, np.ndarray]:
        """Everything that resuming bit for bit needs: weights, moments, schedule, random state."""
        ...
    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None: ...
    def save(self, directory: Path) -> None:
        """Write what `weights:` of a config can load again: safetensors and a description of the model."""
        ...


@runtime_checkable
class Adapted(Protocol):
    """What a learner may be beside `Learner`: one that can train an adapter on weights that stay as they are."""

    def base(self) -> Scorer | None:
        """The model as it was before its adapter, reading the same weights: it holds no copy, and is not used while
        another thread uses the learner. None where there is no adapter."""
        ...


@runtime_checkable
class Comparing(Protocol):
    """What a learner may be beside `Learner`: one that can look at a reference over the whole vocabulary."""

    def compare_with(self, reference: Scorer) -> None:
        """Provide `Output.REFERENCE_KL` from now on: the KL to this model, with the weights that it has whenever it is
        asked for. Raises `ConfigError` for a model that it cannot be compared with."""
        ...


@dataclass(frozen=True, slots=True)
class Optimization:
    """How a learner is stepped (block `optimizer:`)."""

    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays."""
    eps: float = 1e-8
    """AdamW's denominator constant."""
    moments: Literal["float32", "int8"] = "float32"
    """`int8` keeps AdamW's moments of matrices with 4,096 numbers or more in 8 bits, by blocks (Dettmers et al. 2022,
    arXiv 2110.02861): for learners of torch, by bitsandbytes."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warm-up."""
    warmup_steps: int = 0
    """Optimiser steps of linear warm-up from 0."""
    min_lr_ratio: float = 0.0
    """The schedule ends at `lr * min_lr_ratio`."""
    total_steps: int = 0
    """Optimiser steps of the whole schedule; 0 derives them from `steps` and `update`."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    max_bad_steps: int = 3
    """Consecutive steps without a finite gradient that are skipped; one more stops the run."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        for name in ("weight_decay", "warmup_steps", "min_lr_ratio", "total_steps", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps}")
        if self.max_bad_steps < 1:
            raise ValueError(f"max_bad_steps must be at least 1, got {self.max_bad_steps}")


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What core asks of a backend: sizes that the rest of the config decides."""

    vocab_size: int
    """Rows of the embedding the tokenizer needs; 0 where the model brings its own."""
    value_heads: int = 0
    """Scalar value outputs, one per reward column that a critic estimates."""
    action_value_heads: int = 0
    """Action-value outputs, one per reward column and each as wide as the vocabulary: Q(s, a) of every action a. For a
    model with log-probs, whose policy they are averaged under; a backend without them refuses any but 0."""
    seed: int = 0
    threads: int = 0
    """CPU threads the framework may use; 0 leaves its own default."""
    optimization: Optimization | None = None
    """None loads a `Scorer` that holds no gradients and no moments."""
    comm: Comm = SingleProcess()
    """The ranks over which `Learner.apply` sums gradients."""


class Backend(Protocol):
    """Loads a model. Imports its framework in `load`, never before."""

    @property
    def framework(self) -> str: ...
    @property
    def provides(self) -> frozenset[Output]: ...
    def load(self, request: LoadRequest) -> Learner: ...


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int: ...
    @property
    def pad(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...
    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation up to where the assistant answers."""
        ...
    def save(self, directory: Path) -> None:
        """Write into an existing folder what `AutoTokenizer` of transformers loads, the chat template included."""
        ...


class TokenizerSource(Protocol):
    """A tokenizer component: its configuration, and how to load it."""

    def load(self) -> Tokenizer: ...


class Sampler(Protocol):
    """A started engine: writes episodes with the weights last given to it."""

    def rollout(self, prompts: Sequence[Prompt], sampling: Sampling, seed: Sequence[int]) -> Rollouts:
        """One episode per prompt, in order; equal for equal prompts, weights and seed."""
        ...
    def sync(self, params: Iterable[tuple[str, Array]], version: int) -> None: ...
    def check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Raise one `DataError` that names prompts which the model cannot answer; called before training."""
        ...


@runtime_checkable
class Reporting(Protocol):
    """What a sampler may be beside `Sampler`: one that says how it drew."""

    def metrics(self) -> Metrics:
        """Of the last rollout; they are logged as `rollout/NAME`, and those named `timing/...` as they are: only they
        may differ between equal runs."""
        ...


@dataclass(frozen=True, slots=True)
class Kept:
    """For how many tokens a rollout had room."""

    tokens: int
    ran_out: int = 0
    """The least room with which memory ran out before; 0 where it did not."""


@runtime_checkable
class Rationed(Protocol):
    """What a sampler may be beside `Sampler`: one that can be told of how many tokens to keep keys and values at once.
    What it draws does not depend on it."""

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values; 0 where the sampler keeps none, and cannot be told."""
        ...
    def ration(self, tokens: int) -> None:
        """Keep no more from now on; those of one answer at least."""
        ...
    def kept(self) -> Kept:
        """In the last rollout. A sampler itself makes do with less where memory runs out."""
        ...


class Engine(Protocol):
    """A rollout engine. `shared` lets the sampler read the policy's own arrays, so that `sync` copies nothing."""

    def start(self, policy: Scorer, tokenizer: Tokenizer, *, shared: bool) -> Sampler: ...


@runtime_checkable
class Approximating(Protocol):
    """What an engine or a backend may be beside its kind: one that says whether log-probs are recorded while drawing
    that differ from those of the trainer at the same weights by more than the rounding of floats, as where one of the
    two has quantised weights. What is drawn so is never taken as drawn by the policy: where nothing else in a
    configuration corrects for the sampler, core adds `correction: tis`. Answers for training then come from a sampler
    that an engine of this kind starts with `shared=False`, those for evaluation from another one."""

    @property
    def approximates(self) -> bool: ...


@runtime_checkable
class Selective(Protocol):
    """What an engine may be beside `Engine`: one that draws from policies of some frameworks alone. Others are refused
    before anything is loaded."""

    @property
    def frameworks(self) -> frozenset[str]:
        """As `Backend.framework` names them."""
        ...


@runtime_checkable
class Frozen(Protocol):
    """What a backend may be beside its kind: one whose model can be of a form that is scored and drawn from alone, as
    one with quantised weights. It is a reference, and no policy and no critic."""

    @property
    def frozen(self) -> str:
        """Why nothing of the model can be trained, and what to do; empty where it can."""
        ...


@dataclass(frozen=True, slots=True)
class Exported:
    """What is said of a model that was written in another format."""

    compared: str
    """How far the written model is from the one that was saved, measured: a sentence for people."""
    usage: str
    """Markdown that shows how a folder named FOLDER is used, for the model's card."""


@runtime_checkable
class Exporting(Protocol):
    """What a backend may be beside its kind: one that writes its models in more formats than its learners save, by
    `posttrain export RUN --format NAME`."""

    @property
    def formats(self) -> tuple[str, ...]:
        """Their names."""
        ...
    def export(self, form: str, saved: Path, folder: Path) -> Exported:
        """Write what `Learner.save` wrote to `saved` into the empty `folder`, in one of the formats, and compare the
        two. Raises `ConfigError` where the format has no such model and where the two differ, `PluginError`."""
        ...


class Kernel(Protocol):
    """A faster form of an op of `ops.py`; must equal the reference."""

    @property
    def op(self) -> str: ...
    @property
    def framework(self) -> str: ...
    @property
    def device(self) -> str: ...
    def supports(self, *args: Array) -> bool: ...
    def __call__(self, *args: Array) -> Array: ...


class Batching(Protocol):
    """Plans micro-batches under a budget."""

    def plan(self, costs: np.ndarray, budget: int) -> list[np.ndarray]:
        """Units of the given costs in tokens -> parts, each an array of unit numbers; no part is over the budget
        unless it is a single unit. Units that had better be in one part come one after the other: those of one group,
        the costliest first, and the costliest group first."""
        ...
    @property
    def tokens(self) -> int:
        """The budget to begin with."""
        ...


@dataclass(frozen=True, slots=True)
class Usage:
    """Memory of a device at one moment, in bytes."""

    used: int = 0
    """What nobody can have."""
    limit: int = 0
    """What may be in use; 0 where nobody knows."""
    held: int = 0
    """What the process was given: beside `used`, what its allocator keeps for later."""
    resident: int = 0
    """What of `held` was touched."""


class Memory(Protocol):
    """What a device says of its memory."""

    def start(self) -> Usage:
        """The memory now, from which on the peak is watched."""
        ...
    def peak(self, since: Usage) -> int:
        """The most that was in use since then; 0 where nobody knows, as where all of it was kept from before."""
        ...


@runtime_checkable
class Metered(Protocol):
    """What a scorer or a sampler may be beside its kind: one that computes on a device with memory of its own. Of the
    others the host's memory is watched."""

    def memory(self) -> Memory: ...


@runtime_checkable
class Accounted(Protocol):
    """What a scorer or a sampler may be beside its kind: one that says what takes its memory. See `memory.profile`."""

    def held(self) -> Mapping[str, int]:
        """Bytes of what is kept now, by what it is: `parameters`, `buffers`, `gradients`, `optimiser`, and of a sampler
        `kv_cache`, which is of its last rollout. What two share is told by one of them."""
        ...
    def watermark(self) -> Watermark | None:
        """Of a device with memory of its own: what is `allocated`, and what is `reserved` for that. The same object
        each time; None where its memory is the host's."""
        ...
    def explain(self, folder: Path) -> None:
        """From now on, write what explains it into the folder where that device runs out of memory; a host cannot."""
        ...


@runtime_checkable
class Imagining(Protocol):
    """What a backend may be beside its kind: one that can say what its models take without taking it."""

    def imagined(self, drawn: int) -> AbstractContextManager[Watermark]:
        """While it lasts, models of this backend's framework load and compute as ever, but nothing is read, computed or
        allocated; numbers that are asked of them say nothing, and tokens that are drawn are `drawn`. The watermark
        counts what would be in use."""
        ...


@dataclass(frozen=True, slots=True)
class Pass:
    """One part that went through a model, or through all models that are trained on it."""

    tokens: int
    """What the budget is of."""
    seconds: float
    start: Usage
    peak: int = 0
    """Bytes in use at the most; 0 where nobody knows."""
    failed: bool = False
    """Memory ran out."""
    work: int = 0
    """Tokens computed in that time, where they are not `tokens`; 0 where they are."""


_B = TypeVar("_B")


@runtime_checkable
class Adapting(Protocol[_B]):
    """What a batching may be beside `Batching`: one that learns from each pass how large the next may be.

    Its state is a frozen dataclass of plain values that is made anew from what `asdict` and JSON made of it. A `use` is
    a kind of pass with a budget of its own: `update`, the scoring of each model, `rollout`.
    """

    def init(self) -> _B: ...
    def prepared(self, state: _B, use: str, memory: Usage, token_bytes: int = 0) -> _B:
        """The state before passes of one use, with the memory as it is now; `token_bytes` are those that a token is
        known to take at least."""
        ...
    def budget(self, state: _B, use: str) -> int:
        """Tokens of the next part."""
        ...
    def observed(self, state: _B, use: str, seen: Pass) -> _B:
        """The state after a pass. After a failed one the budget is smaller than what failed."""
        ...


@dataclass(frozen=True, slots=True)
class RowRules:
    """What may be wrong with rows (block `data:`), whatever task reads them."""

    on_bad_row: Literal["fail", "skip"] = "fail"
    """Malformed rows: report all and stop, or leave them out and say how many."""
    max_prompt_tokens: int = 0
    """Longest prompt allowed; 0 allows any. A longer one is a malformed row."""

    def __post_init__(self) -> None:
        if self.max_prompt_tokens < 0:
            raise ValueError(f"max_prompt_tokens must not be negative, got {self.max_prompt_tokens}")


class PromptSource(Protocol):
    """A loaded task."""

    def take(self, cursor: int, count: int, seed: int) -> Sequence[Prompt]:
        """Rows `cursor .. cursor + count` of an endless shuffled sequence of epochs; a pure function."""
        ...
    def held_out(self) -> Sequence[Prompt]:
        """Rows kept for evaluation, in order."""
        ...
    @property
    def rows(self) -> int: ...


class Task(Protocol):
    """Where prompts come from."""

    def load(self, tokenizer: Tokenizer, rules: RowRules) -> PromptSource:
        """Read and check all rows; raises one `DataError` with every malformed one."""
        ...


class Reward(Protocol):
    """The TRL signature: lists in, one number per completion out; None where the reward does not apply."""

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]: ...


@runtime_checkable
class RewardSource(Protocol):
    """A reward that is a model: its configuration, and how to load it. Known by its shape: it cannot be called itself.

    It is loaded beside the policy and called in the training process on all rows of a step at once, without deadline.
    """

    def load(self, threads: int) -> Reward:
        """Import the framework and read the weights; `threads` are those the framework may use on a CPU, 0 for its own
        default. Raises `ConfigError`, `PluginError`."""
        ...


class ObservedRun(Protocol):
    """What a tracker may know of a run."""

    @property
    def directory(self) -> Path: ...
    @property
    def steps(self) -> int:
        """Iterations of the whole run."""
        ...
    @property
    def loop(self) -> str:
        """`rl` or `supervised`."""
        ...
    @property
    def output(self) -> str:
        """`auto`, `plain`, `json` or `quiet`: what the command line was asked to show."""
        ...


class TrackerSession(Protocol):
    """A tracker at work on one run. Metrics under `timing/` may differ between equal runs, all others may not."""

    def phase_started(self, phase: str) -> None:
        """The run entered a phase (`rollout`, `reward`, `update`, ...), which may take long."""
        ...
    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def finished(self, error: BaseException | None) -> None: ...


class Tracker(Protocol):
    """Observes a run; neither changes nor stops it. What belongs to one run lives in the session."""

    def start(self, run: ObservedRun) -> TrackerSession: ...


class Search(Protocol):
    """A searcher at work on one study. Trials are numbered from 0; several may be under way at once."""

    def ask(self, trial: int) -> Values | None:
        """Values of a trial, in the space; None where nothing is left to try. Asked again for a trial, also by a new
        process on the same folder, it answers the same."""
        ...
    def tell(self, trial: int, result: Result) -> None:
        """What became of a trial that was asked for, in any order. Told again the same, it does nothing."""
        ...


class Searcher(Protocol):
    """Proposes configurations and learns from their results. What belongs to one study lives in the search."""

    def problems(self, space: Space, goals: Sequence[Goal]) -> Iterable[str]:
        """Why it cannot search for these; nothing where it can. Said before the first trial, so it starts nothing."""
        ...
    def start(self, space: Space, goals: Sequence[Goal], directory: Path) -> Search:
        """Goes on with what an earlier search in the folder was told, if it keeps that there; whoever starts it tells
        it everything again in any case. May import what is heavy."""
        ...


__all__ = [name for name in dir() if name[0].isupper()]
