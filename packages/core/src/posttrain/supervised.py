"""Learning from given answers on the same learner, batching, checkpoints and trackers: the other loop.

A row's answer becomes an episode whose answer tokens are the actions, so that the update is the one of `update.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from posttrain.data import FINISH, Metric, Metrics, Prompt, Rollouts, offsets_of
from posttrain.errors import SHOWN, DataError, Problem
from posttrain.protocols import Output, PromptSource, Tokenizer
from posttrain.schema import Settings
from posttrain.state import RunState
from posttrain.steps import score
from posttrain.tasks.formats import COMPLETION
from posttrain.timing import Phases
from posttrain.tokenizers import prompt_ids
from posttrain.trainer import Parts, evaluate, held_out
from posttrain.update import optimiser_step


def require_answers(source: PromptSource) -> None:
    """Raise `DataError` that names rows without an answer; called before anything is written."""
    missing, shown = 0, list[Prompt]()
    for prompt in source.take(0, source.rows, seed=0):  # rows may be more than memory holds
        if COMPLETION not in prompt.extra:
            missing, shown = missing + 1, sorted([*shown, prompt], key=lambda p: p.group)[:SHOWN]
    if missing:
        raise DataError(
            [Problem(f"no '{COMPLETION}' to learn from", p.where) for p in shown],
            f"supervised training needs an answer in every row; {missing} of {source.rows} have none:",
            "add the column, or name the one that holds answers by task.completion_key")


def demonstrated(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> Rollouts:
    """Rows with answers as episodes: answer tokens and the end of the sequence are the actions."""
    asked = [prompt_ids(p, tokenizer) for p in prompts]
    answers = [[*tokenizer.encode(str(p.extra[COMPLETION])), tokenizer.eos] for p in prompts]
    E = len(prompts)
    return Rollouts(
        tokens=np.array([t for q, a in zip(asked, answers, strict=True) for t in (*q, *a)], np.int32),
        offsets=offsets_of(np.array([len(q) + len(a) for q, a in zip(asked, answers, strict=True)])),
        episode=np.arange(E), group=np.arange(E), finish=np.full(E, FINISH.index("eos"), np.int8),
        is_action=np.concatenate([np.arange(len(q) + len(a)) >= len(q) for q, a in zip(asked, answers, strict=True)]),
        terminated=np.ones(E, bool), prompts=tuple(prompts),
        completions=tuple(str(p.extra[COMPLETION]) for p in prompts))


def iterate(parts: Parts, settings: Settings, state: RunState, phases: Phases) -> tuple[RunState, Metrics, Rollouts]:
    """One optimiser step on the next rows."""
    prompts = parts.source.take(state.cursor, settings.batch_size, settings.seed)
    rollouts = demonstrated(prompts, parts.tokenizer)
    N = int(rollouts.is_action.sum())
    with phases("update"):
        metrics, budget, _ = optimiser_step(
            parts.trained, rollouts, np.ones(N, bool), np.ones(N), {}, {}, batching=parts.batching,
            budget=state.budget, comm=parts.comm)
    parts.evaluator.sync(parts.policy.params(), parts.policy.version)
    metrics += {"episode/length": Metric(N, rollouts.n_episodes)}
    return replace(state, step=state.step + 1, cursor=state.cursor + len(prompts), budget=budget), metrics, rollouts


def evaluate_supervised(parts: Parts, settings: Settings, phases: Phases) -> tuple[Metrics, Rollouts | None]:
    """Negative log-likelihood per token of the held-out answers, and rewards of own answers where rewards are given."""
    metrics, rollouts = evaluate(parts, settings, phases)
    answered = [p for p in held_out(parts.source, settings) if COMPLETION in p.extra]
    if answered:
        with phases("evaluate"):
            given = demonstrated(answered, parts.tokenizer)
            out, _ = score(parts.policy, given, frozenset({Output.LOGPROBS}), parts.batching, parts.batching.tokens)
        metrics += {"eval/loss": Metric(-float(out.logprobs.sum(dtype=np.float64)), len(out.logprobs))}
    return metrics, rollouts
