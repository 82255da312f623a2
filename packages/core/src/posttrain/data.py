"""The data of a run: what a sampler produced, what an estimator sees, what a learner is given, what is measured.

Token data is ragged: flat arrays plus offsets, so there is no padding and no mask to get wrong.
Axes, in every docstring of this project: M tokens, S sequences, E episodes, N actions (tokens the policy chose),
k reward columns, m gradient slots. Knows NumPy alone: no framework, no config, no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np

Array = Any
"""An array of NumPy, torch or JAX. Typed as `Any`: no common static type of the three exists."""

FINISH = ("eos", "stop", "budget", "done", "failed")
"""Why an episode ended; `Rollouts.finish` holds indices into this tuple."""


def ragged_indices(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices of the ranges `starts[i] .. starts[i] + lengths[i]`, one after the other.

    >>> ragged_indices(np.array([5, 0]), np.array([2, 3]))
    array([5, 6, 0, 1, 2])
    """
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """`[0, l0, l0 + l1, ...]`: where each of the ragged rows begins, and the end."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the policy is asked: exactly one of `text`, `messages` or `tokens`.

    `group` is shared by the answers to one prompt; `extra` holds the row's other columns (rewards receive them);
    `where` names the row (`data.jsonl:7`) in error messages.
    """

    text: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    tokens: tuple[int, ...] | None = None
    group: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    def __post_init__(self) -> None:
        if sum(part is not None for part in (self.text, self.messages, self.tokens)) != 1:
            raise ValueError(f"a prompt has exactly one of text, messages and tokens ({self.where or 'no location'})")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 truncate nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p < 1 or self.top_k < 0 or not self.temperature >= 0:
            raise ValueError("top_p lies in (0, 1], min_p in [0, 1), top_k and temperature are not negative")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")

    @property
    def truncates(self) -> bool:
        """Whether the recorded log-probs are those of a truncated distribution."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Rollouts:
    """S token sequences of E episodes in flat NumPy arrays; crosses processes and goes to disk.

    The sequences of one episode are contiguous and episodes are numbered 0 .. E-1 in order, so actions in token order
    are actions in episode order. An action is never the first token of its sequence (nothing would predict it).

    Raises `ValueError` where shapes, the order of episodes or a log-prob do not fit.
    """

    tokens: np.ndarray
    """[M] int32."""
    offsets: np.ndarray
    """[S+1] int64, where each sequence begins in `tokens`."""
    episode: np.ndarray
    """[S] int64, the episode of each sequence."""
    is_action: np.ndarray
    """[M] bool, whether the policy chose the token (others say completion or response mask)."""
    group: np.ndarray
    """[E] int64, equal for the answers to one prompt."""
    finish: np.ndarray
    """[E] int8, index into `FINISH`."""
    terminated: np.ndarray
    """[E] bool, whether no future follows. Said by the sampler, never inferred."""
    prompts: tuple[Prompt, ...]
    """[E]"""
    completions: tuple[str, ...]
    """[E] decoded text of the actions, stop string removed."""
    behavior_logprobs: np.ndarray | None = None
    """[N] float32, log-prob under the sampler after its processing (others say rollout log-probs)."""
    policy_version: np.ndarray | None = None
    """[N] int32, the weights that chose the token."""
    turn: np.ndarray | None = None
    """[N] int32"""
    routes: np.ndarray | None = None
    """[M, L, k] uint8 or uint16, the experts that each of the sampler's L layers with experts sent each token to; the
    largest number of the type where none was recorded, as for a last token, which nothing read."""
    rewards: Mapping[str, np.ndarray] = field(default_factory=dict)
    """name -> [M] float64, a reward column on tokens; an outcome stands on the episode's last token."""
    excluded: Mapping[str, np.ndarray] = field(default_factory=dict)
    """name -> [E] bool, episodes to which that reward does not apply."""
    greedy_rewards: Mapping[str, np.ndarray] = field(default_factory=dict)
    """name -> [E] float64, that reward of the greedy answer to the episode's prompt, where one was asked for."""
    sampling: Sampling = Sampling()

    def __post_init__(self) -> None:
        M, S, E = len(self.tokens), len(self.offsets) - 1, len(self.group)
        shapes = {
            "is_action": (self.is_action, M), "episode": (self.episode, S), "finish": (self.finish, E),
            "terminated": (self.terminated, E), "prompts": (self.prompts, E), "completions": (self.completions, E),
            **{f"rewards[{name!r}]": (x, M) for name, x in self.rewards.items()},
            **{f"excluded[{name!r}]": (x, E) for name, x in self.excluded.items()},
            **{f"greedy_rewards[{name!r}]": (x, E) for name, x in self.greedy_rewards.items()},
        }
        if self.routes is not None:
            shapes["routes"] = (self.routes, M)
        N = int(self.is_action.sum())
        for name in ("behavior_logprobs", "policy_version", "turn"):
            if (column := getattr(self, name)) is not None:
                shapes[name] = (column, N)
        for name, (column, length) in shapes.items():
            if len(column) != length:
                raise ValueError(f"Rollouts.{name} has length {len(column)}, expected {length}")
        if self.offsets[0] != 0 or self.offsets[-1] != M or (np.diff(self.offsets) < 0).any():
            raise ValueError(f"Rollouts.offsets must rise from 0 to the number of tokens, {M}")
        steps = np.diff(self.episode)
        if S and (self.episode[0] != 0 or self.episode[-1] != E - 1 or not np.isin(steps, (0, 1)).all()):
            raise ValueError("Rollouts.episode must number the episodes 0 .. E-1 in order, sequences contiguous")
        first = self.offsets[:-1][np.diff(self.offsets) > 0]
        if self.is_action[first].any():
            raise ValueError("an action cannot be the first token of its sequence: give the prompt at least one token")

    @property
    def n_episodes(self) -> int:
        return len(self.group)

    @property
    def source(self) -> np.ndarray:
        """[N] index into `tokens` of each action."""
        return np.flatnonzero(self.is_action)

    @property
    def episode_tokens(self) -> np.ndarray:
        """[E] tokens of each episode."""
        return np.bincount(self.episode, np.diff(self.offsets), self.n_episodes).astype(np.int64)

    @property
    def episode_actions(self) -> np.ndarray:
        """[E] actions of each episode."""
        return np.bincount(self.action_episode, minlength=self.n_episodes)

    @property
    def action_episode(self) -> np.ndarray:
        """[N] the episode of each action."""
        per_token: np.ndarray = np.repeat(self.episode, np.diff(self.offsets))
        return np.asarray(per_token[self.source])

    def select(self, episodes: np.ndarray) -> Rollouts:
        """The given episodes, in the given order, numbered anew."""
        tokens, actions = self.episode_tokens, self.episode_actions
        sequences = np.bincount(self.episode, minlength=self.n_episodes)
        s = ragged_indices(offsets_of(sequences)[episodes], sequences[episodes])
        t = ragged_indices(offsets_of(tokens)[episodes], tokens[episodes])
        a = ragged_indices(offsets_of(actions)[episodes], actions[episodes])
        def picked(column: np.ndarray | None) -> np.ndarray | None:
            return None if column is None else column[a]
        return replace(
            self, tokens=self.tokens[t], offsets=offsets_of(np.diff(self.offsets)[s]), is_action=self.is_action[t],
            episode=np.repeat(np.arange(len(episodes)), sequences[episodes]), group=self.group[episodes],
            finish=self.finish[episodes], terminated=self.terminated[episodes],
            prompts=tuple(self.prompts[e] for e in episodes), completions=tuple(self.completions[e] for e in episodes),
            rewards={n: c[t] for n, c in self.rewards.items()},
            excluded={n: c[episodes] for n, c in self.excluded.items()},
            greedy_rewards={n: c[episodes] for n, c in self.greedy_rewards.items()},
            behavior_logprobs=picked(self.behavior_logprobs), policy_version=picked(self.policy_version),
            turn=picked(self.turn), routes=None if self.routes is None else self.routes[t])

    @staticmethod
    def concat(parts: Sequence[Rollouts]) -> Rollouts:
        """The episodes of all parts; a column that one part lacks is an error. Groups keep their ids."""
        if len(parts) == 1:
            return parts[0]
        head = parts[0]
        def joined(name: str) -> Any:
            columns = [getattr(p, name) for p in parts]
            return None if columns[0] is None else np.concatenate(columns)
        starts = np.cumsum([0] + [p.n_episodes for p in parts])
        return replace(
            head, tokens=joined("tokens"), is_action=joined("is_action"), group=joined("group"),
            offsets=offsets_of(np.concatenate([np.diff(p.offsets) for p in parts])),
            episode=np.concatenate([p.episode + start for p, start in zip(parts, starts)]),
            finish=joined("finish"), terminated=joined("terminated"),
            prompts=tuple(x for p in parts for x in p.prompts),
            completions=tuple(x for p in parts for x in p.completions),
            behavior_logprobs=joined("behavior_logprobs"), policy_version=joined("policy_version"), turn=joined("turn"),
            routes=joined("routes"), rewards={n: np.concatenate([p.rewards[n] for p in parts]) for n in head.rewards},
            excluded={n: np.concatenate([p.excluded[n] for p in parts]) for n in head.excluded},
            greedy_rewards={n: np.concatenate([p.greedy_rewards[n] for p in parts]) for n in head.greedy_rewards})


_ACTION_COLUMNS = ("values", "action_values", "expected_action_values", "logprobs", "behavior_logprobs",
                   "ref_logprobs", "turn")
_EPISODE_COLUMNS = ("bootstrap_values", "final_scores", "greedy_rewards")


@dataclass(frozen=True, slots=True, eq=False)
class Episodes:
    """The action axis of E episodes for one reward column: what an estimator sees. Arrays of one framework.

    Refuses episodes without an action (they would alias their neighbour) and numbers that are not finite, naming the
    episode: one NaN would poison all earlier actions of the recurrence.

    >>> Episodes.from_rows(rewards=[[0.0, 1.0], [0.5]]).offsets
    array([0, 2, 3])
    """

    offsets: np.ndarray
    """[E+1] where each episode begins; NumPy whatever the framework, it is structure and not data."""
    rewards: Array
    """[N]"""
    terminated: np.ndarray
    """[E] bool"""
    group: np.ndarray
    """[E] int"""
    values: Array | None = None
    """[N] value of the state before each action."""
    bootstrap_values: Array | None = None
    """[E] value of the state after the last action; ignored where terminated."""
    final_scores: Array | None = None
    """[E] what a reward says of the state after the last action, in place of a critic; ignored where terminated."""
    greedy_rewards: Array | None = None
    """[E] sum of the rewards of the greedy answer to the same prompt."""
    action_values: Array | None = None
    """[N] Q(s, a) of the state before each action and the action taken."""
    expected_action_values: Array | None = None
    """[N] sum over all actions of pi(a|s) Q(s, a), in the state before each action; `bootstrap_values` is the same of
    the state after the last one where values come from action values."""
    logprobs: Array | None = None
    """[N] under the policy before the update (pi_old)."""
    behavior_logprobs: Array | None = None
    """[N] under the sampler (mu)."""
    ref_logprobs: Array | None = None
    turn: np.ndarray | None = None
    """[N] int, not falling within an episode; NumPy whatever the framework, as `offsets`."""

    def __post_init__(self) -> None:
        E, N = self.n_episodes, len(self.rewards)
        empty = np.flatnonzero(np.diff(self.offsets) <= 0)
        if len(empty):
            raise ValueError(f"episode {empty[0]} has no action; drop such episodes before building Episodes")
        if self.offsets[0] != 0 or self.offsets[-1] != N:
            raise ValueError(f"offsets must rise from 0 to the number of actions, {N}")
        for name, length in [("terminated", E), ("group", E), *((n, E) for n in _EPISODE_COLUMNS),
                             *((n, N) for n in _ACTION_COLUMNS)]:
            column = getattr(self, name)
            if column is not None and len(column) != length:
                raise ValueError(f"Episodes.{name} has length {len(column)}, expected {length}")
        episode = np.repeat(np.arange(E), np.diff(self.offsets))
        for name in ("rewards", *_ACTION_COLUMNS, *_EPISODE_COLUMNS):
            if (column := getattr(self, name)) is None:
                continue
            bad = np.flatnonzero(~np.isfinite(to_numpy(column).astype(np.float64)))
            if len(bad):
                e = bad[0] if name in _EPISODE_COLUMNS else episode[bad[0]]
                raise ValueError(f"Episodes.{name} is {to_numpy(column)[bad[0]]} in episode {e}, it must be finite")

    @property
    def n_episodes(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[E] actions of each episode."""
        return np.diff(self.offsets)

    @property
    def episode(self) -> np.ndarray:
        """[N] the episode of each action."""
        return np.repeat(np.arange(self.n_episodes), self.lengths)

    @classmethod
    def from_rows(cls, rewards: Sequence[Sequence[float]], *, terminated: Sequence[bool] | None = None,
                  group: Sequence[int] | None = None, bootstrap_values: Sequence[float] | None = None,
                  **columns: Sequence[Sequence[float]]) -> Episodes:
        """Episodes from one list per episode; `terminated` defaults to all true, `group` to one group for all."""
        known = {f.name for f in fields(cls)}
        if unknown := set(columns) - known:
            raise TypeError(f"unknown column {min(unknown)!r}; columns are {', '.join(_ACTION_COLUMNS)}")
        lengths = [len(row) for row in rewards]
        for name, rows in columns.items():
            if [len(row) for row in rows] != lengths:
                raise ValueError(f"{name} has rows of lengths {[len(r) for r in rows]}, rewards {lengths}")
        E = len(lengths)
        def flat(rows: Sequence[Sequence[float]]) -> np.ndarray:
            return np.asarray([x for row in rows for x in row], dtype=np.float64)
        return cls(
            offsets=offsets_of(np.asarray(lengths, dtype=np.int64)), rewards=flat(rewards),
            terminated=np.ones(E, bool) if terminated is None else np.asarray(terminated, bool),
            group=np.zeros(E, np.int64) if group is None else np.asarray(group, np.int64),
            bootstrap_values=None if bootstrap_values is None else np.asarray(bootstrap_values, np.float64),
            **{name: flat(rows) for name, rows in columns.items()})


def to_numpy(x: Array) -> np.ndarray:
    """A NumPy view or copy of an array of any framework, on the host, outside any gradient; bfloat16 as float32, which
    holds it exactly, since NumPy's own functions know no bfloat16.

    >>> to_numpy(np.array([1.5, 2.0], np.float16))
    array([1.5, 2. ], dtype=float16)
    """
    detach = getattr(x, "detach", None)  # torch: the one framework whose arrays carry a gradient and its own bfloat16
    if detach is not None:
        host = detach().cpu()
        return np.asarray((host.float() if str(host.dtype) == "torch.bfloat16" else host).numpy())
    host = np.asarray(x)
    return host.astype(np.float32) if host.dtype.name == "bfloat16" else host


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """What an estimator says: `advantages[N]`; `targets[N]` for the value head, never whitened; `keep[N]` bool,
    false where an action is out of the update (which is not the same as advantage 0)."""

    advantages: Array
    targets: Array | None = None
    keep: Array | None = None
    metrics: Metrics = field(default_factory=lambda: Metrics())


@dataclass(frozen=True, slots=True, eq=False)
class Signal:
    """What the update consumes, on the action axis of its rollouts.

    `advantages` [N], or [m, N] where gradients of m slots are combined; `targets` [k, N] or None;
    `keep` [N] bool; `correction` [N], off-policy weights (1 where none applies).
    """

    advantages: np.ndarray
    keep: np.ndarray
    correction: np.ndarray
    targets: np.ndarray | None = None
    metrics: Metrics = field(default_factory=lambda: Metrics())


@dataclass(frozen=True, slots=True, eq=False)
class TokenOutputs:
    """What a model says of the actions of a batch; differentiable inside a backend, plain NumPy outside."""

    logprobs: Array
    """[N]"""
    entropy: Array | None = None
    """[N]"""
    reference_kl: Array | None = None
    """[N] KL(policy || reference) over the whole vocabulary, before each action."""
    values: Array | None = None
    """[k, N] value of the state before each action, one row per reward column."""
    bootstrap_values: Array | None = None
    """[k, E] value of the state after each episode's last token."""
    action_values: Array | None = None
    """[k, N] Q(s, a) of the action taken, one row per reward column."""
    expected_action_values: Array | None = None
    """[k, N] sum over the vocabulary of pi(a|s) Q(s, a); carries no gradient."""
    expected_bootstrap_values: Array | None = None
    """[k, E] the same after each episode's last token."""
    aux: Mapping[str, Array] = field(default_factory=dict)
    """Columns on other axes, by the name of their `Output`."""


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """One part of an optimiser step. Holds kept actions only: a rejected action is not even computed.

    Built and validated by `posttrain.batching.cut`, not in `__post_init__`, since JAX makes a pytree of it.
    """

    tokens: Array
    """[M] int32"""
    sequence: Array
    """[M] local sequence of each token."""
    positions: Array
    """[M] position of each token in its sequence."""
    token_weight: Array
    """[M] weight of each token in terms that run over tokens (expert load)."""
    source: Array
    """[N] index into `tokens` of each action."""
    episode: Array
    """[N] local episode of each action."""
    group: Array
    """[E] local group of each episode."""
    count: Array
    """[E] kept actions of each episode, at least 1; its length is the number of episodes."""
    last: Array
    """[E] index into `tokens` of each episode's last token."""
    weight: Array
    """[N] weight in policy terms, corrections included."""
    kl_weight: Array
    """[N] weight in KL and entropy terms, corrections not included."""
    value_weight: Array
    """[N] weight in value terms."""
    advantages: Array | None = None
    """[N], or [m, N] with m slots."""
    targets: Array | None = None
    """[k, N]"""
    old_logprobs: Array | None = None
    """[N]; absent means `stop_gradient(logprobs)`: with one optimiser step per rollout they are equal."""
    behavior_logprobs: Array | None = None
    ref_logprobs: Array | None = None
    old_values: Array | None = None
    """[k, N]"""
    preferred: Array | None = None
    """[N] 1 for the actions of the answer that is preferred in its group, 0 for those of the other."""
    routes: Array | None = None
    """[M, L, k] see `Rollouts.routes`: what the policy's layers with experts replay, if it has some."""
    temperature: float = 1.0
    constants: Mapping[str, Array] = field(default_factory=dict)
    """Detached numbers of the whole optimiser step: `expert_load` [L, E], the share of its tokens that went to each
    expert of each layer, where a loss reads it."""


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One term of a loss: `total = sum(weight * x)` is logged raw, `coef * total` is differentiated in `slot`."""

    total: Array
    coef: Array | float = 1.0
    slot: str = "main"


@dataclass(frozen=True, slots=True, eq=False)
class Loss:
    """Named terms, and metrics as detached `(total, weight)` pairs: value = total / weight over all parts."""

    terms: Mapping[str, Term]
    metrics: Mapping[str, tuple[Array, Array]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Counts:
    """What one optimiser step holds, over all ranks; the per-episode column is this rank's own."""

    actions: int
    """Kept actions, all ranks."""
    episodes: int
    """Episodes with a kept action, all ranks."""
    episode_actions: np.ndarray
    """[E] kept actions of each episode of this rank; may be 0."""


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Per-action weights made from `Counts`, [N] each, float64; None where the objective has no such term."""

    weight: np.ndarray | None = None
    """Of policy terms, corrections not included: core multiplies them in."""
    kl_weight: np.ndarray | None = None
    """Of KL and entropy, which corrections leave alone; None is as `weight`."""
    value_weight: np.ndarray | None = None
    """Of value terms."""


Reduction = Literal["mean", "sum", "max", "min", "last"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A number and how it adds up over parts and ranks: a mean is carried as total and weight, so no mean of means."""

    total: float
    weight: float = 1.0
    reduction: Reduction = "mean"

    @property
    def value(self) -> float:
        """The number to show; a mean over nothing is NaN."""
        if self.reduction != "mean":
            return self.total
        return self.total / self.weight if self.weight else float("nan")

    def __add__(self, other: Metric) -> Metric:
        match self.reduction:
            case "mean":
                return Metric(self.total + other.total, self.weight + other.weight)
            case "sum":
                return replace(self, total=self.total + other.total)
            case "max":
                return replace(self, total=max(self.total, other.total))
            case "min":
                return replace(self, total=min(self.total, other.total))
            case "last":
                return other


class Metrics(Mapping[str, Metric]):
    """Immutable metrics by name; `a + b` reduces each by its own rule.

    >>> (Metrics(kl=Metric(2.0, 4.0)) + Metrics(kl=Metric(1.0, 2.0)))["kl"].value
    0.5
    """

    __slots__ = ("_entries",)

    def __init__(self, entries: Mapping[str, Metric] | None = None, /, **named: Metric) -> None:
        self._entries = {**(entries or {}), **named}

    def __getitem__(self, name: str) -> Metric:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __add__(self, other: Mapping[str, Metric]) -> Metrics:
        merged = dict(self._entries)
        for name, metric in other.items():
            merged[name] = merged[name] + metric if name in merged else metric
        return Metrics(merged)

    def __repr__(self) -> str:
        return f"Metrics({', '.join(f'{name}={metric.value:.4g}' for name, metric in self.items())})"

    def values_by_name(self) -> dict[str, float]:
        """name -> the number to show."""
        return {name: metric.value for name, metric in self.items()}

    def prefixed(self, prefix: str) -> Metrics:
        """The same metrics under `prefix/name`."""
        return Metrics({f"{prefix}/{name}": metric for name, metric in self.items()})
