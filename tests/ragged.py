"""Small ragged rollouts for tests."""

from __future__ import annotations

import numpy as np
from posttrain.data import FINISH, Prompt, Rollouts, Sampling, offsets_of


def three_episodes(**changes: object) -> Rollouts:
    """Three episodes; the second has two sequences, a tool span and a reward on it."""
    fields = dict(
        tokens=np.arange(12, dtype=np.int32), offsets=np.array([0, 3, 6, 9, 12]), episode=np.array([0, 1, 1, 2]),
        is_action=np.array([0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 1], bool), group=np.array([4, 4, 5]),
        finish=np.zeros(3, np.int8), terminated=np.array([True, False, True]),
        prompts=tuple(Prompt(text=t) for t in "abc"), completions=("x", "y", "z"),
        behavior_logprobs=-np.arange(6, dtype=np.float32), rewards={"r": np.arange(12.0)},
        excluded={"r": np.array([False, True, False])}, sampling=Sampling(temperature=0.5))
    return Rollouts(**{**fields, **changes})


def rollouts(lengths: list[tuple[int, int]], group: list[int] | None = None, seed: int = 0) -> Rollouts:
    """Episodes of one sequence each: (prompt tokens, actions)."""
    rng = np.random.default_rng(seed)
    E = len(lengths)
    total = [p + a for p, a in lengths]
    return Rollouts(
        tokens=rng.integers(0, 9, sum(total)).astype(np.int32), offsets=offsets_of(np.array(total, int)),
        episode=np.arange(E), is_action=np.concatenate([np.arange(p + a) >= p for p, a in lengths]),
        group=np.arange(E) if group is None else np.array(group), finish=np.zeros(E, np.int8),
        terminated=np.ones(E, bool), prompts=tuple(Prompt(text="x") for _ in range(E)), completions=("",) * E)


def answers_to_one_prompt(prompt: int, answers: tuple[int, ...], *, low: int, high: int, seed: int = 0,
                          terminated: bool = True) -> Rollouts:
    """Answers of the given lengths to one prompt of `prompt` tokens, all drawn from low .. high - 1; those that did
    not terminate ran out of budget."""
    r = np.random.default_rng(seed)
    start, lengths = r.integers(low, high, prompt), prompt + np.array(answers)
    E, n = len(answers), sum(answers)
    return Rollouts(
        tokens=np.concatenate([np.r_[start, r.integers(low, high, a)] for a in answers]).astype(np.int32),
        offsets=offsets_of(lengths), episode=np.arange(E),
        is_action=np.concatenate([np.arange(m) >= prompt for m in lengths]), group=np.zeros(E, np.int64),
        finish=np.full(E, 0 if terminated else FINISH.index("budget"), np.int8), terminated=np.full(E, terminated),
        prompts=tuple(Prompt(tokens=tuple(start.tolist())) for _ in answers), completions=("",) * E,
        behavior_logprobs=np.zeros(n, np.float32), policy_version=np.zeros(n, np.int32), turn=np.zeros(n, np.int32),
        sampling=Sampling())
