"""Learning from given answers on the same learner, batching, checkpoints and trackers: the other loop.

A row's answer, or both answers of a pair, become episodes whose answer tokens are the actions, so that the update is
the one of `update.py`. Which of the two it is follows from what the objective needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from posttrain.batching import StepData, counts_of, cut
from posttrain.data import (
    FINISH,
    Array,
    Metric,
    Metrics,
    Prompt,
    Rollouts,
    Sampling,
    TokenOutputs,
    offsets_of,
)
from posttrain.errors import SHOWN, ConfigError, DataError, Problem
from posttrain.ops import ops_of
from posttrain.passes import Budget, first_budget
from posttrain.protocols import Need, Output, PromptSource, Scorer, Tokenizer
from posttrain.schema import Settings
from posttrain.state import RunState
from posttrain.steps import score
from posttrain.tasks.formats import CHOSEN, COMPLETION, REJECTED, kind_of
from posttrain.timing import Phases
from posttrain.tokenizers import prompt_ids
from posttrain.trainer import Parts, evaluate, held_out
from posttrain.update import optimiser_step

REFERENCE = frozenset({Output.LOGPROBS})
"""What is asked of the reference."""
PROVIDED = frozenset({Need.REF_LOGPROBS, Need.PREFERRED})
"""What this loop can give an objective."""
_ADVICE = {
    (COMPLETION,): ("an answer", "none", "name the column that holds answers by task.completion_key"),
    (CHOSEN, REJECTED): ("a preferred and a rejected answer", "not both",
                         "name the columns that hold them by task.chosen_key and task.rejected_key")}
"""Names under which answers stand in a row -> what it needs, what the others have, and the keys that say where."""


@final
@dataclass(frozen=True, slots=True)
class Mute:
    """Engine and sampler of a model that scores answers and writes none."""

    def start(self, policy: Scorer, tokenizer: Tokenizer, *, shared: bool) -> Mute:
        return self

    def rollout(self, prompts: Sequence[Prompt], sampling: Sampling, seed: Sequence[int]) -> Rollouts:
        """Raises `ConfigError`."""
        raise ConfigError(["this run trains a model that scores answers and gives no log-probs, so it writes none"],
                          next_step="score answers with it: export it, and name the folder in a reward "
                                    "(rewards: {judge: {use: reward_model, weights: FOLDER}})")

    def sync(self, params: Iterable[tuple[str, Array]], version: int) -> None:
        """Nothing is sampled from the weights."""

    def check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Nothing is asked of it."""


def answers_of(needs: frozenset[Need]) -> tuple[str, ...]:
    """The names in `Prompt.extra` of the answers that an objective with these needs learns from."""
    return (CHOSEN, REJECTED) if Need.PREFERRED in needs else (COMPLETION,)


def require_answers(source: PromptSource, names: tuple[str, ...]) -> None:
    """Raise `DataError` that names rows without their answers; called before anything is written."""
    missing, shown = 0, list[Prompt]()
    for prompt in source.take(0, source.rows, seed=0):  # rows may be more than memory holds
        if not answered(prompt, names):
            missing, shown = missing + 1, sorted([*shown, prompt], key=lambda p: p.group)[:SHOWN]
    if missing:
        needed, have, keys = _ADVICE[names]
        texts = [(_lacking(p, names), p.where) for p in shown]
        mend = "add what is missing" if any("to learn from" in text for text, _ in texts) else "write answers as text"
        raise DataError([Problem(*text) for text in texts], f"this training needs {needed} in every row; {missing} of "
                        f"{source.rows} have {have}:", f"{mend}, or {keys}")


def _lacking(prompt: Prompt, names: tuple[str, ...]) -> str:
    """Which answers a row is without, and which are no texts."""
    absent = [f"no '{name}'" for name in names if name not in prompt.extra]
    other = [f"column '{name}' should be text or one assistant message, found {kind_of(prompt.extra[name])}"
             for name in names if name in prompt.extra and not isinstance(prompt.extra[name], str)]
    return "; ".join([*([f"{' and '.join(absent)} to learn from"] if absent else []), *other])


def answered(prompt: Prompt, names: tuple[str, ...]) -> bool:
    """Whether a row has all of its answers, as texts."""
    return all(isinstance(prompt.extra.get(name), str) for name in names)


def demonstrated(prompts: Sequence[Prompt], tokenizer: Tokenizer, names: tuple[str, ...] = (COMPLETION,)) -> Rollouts:
    """Rows with answers as episodes, the answers of one row a group: answer tokens and the end of the sequence are the
    actions."""
    asked = [ids for p in prompts for ids in [prompt_ids(p, tokenizer)] * len(names)]
    texts = tuple(str(p.extra[name]) for p in prompts for name in names)
    answers = [[*tokenizer.encode(text), tokenizer.eos] for text in texts]
    E = len(texts)
    return Rollouts(
        tokens=np.array([t for q, a in zip(asked, answers, strict=True) for t in (*q, *a)], np.int32),
        offsets=offsets_of(np.array([len(q) + len(a) for q, a in zip(asked, answers, strict=True)])),
        episode=np.arange(E), group=np.arange(E) // len(names), finish=np.full(E, FINISH.index("eos"), np.int8),
        is_action=np.concatenate([np.arange(len(q) + len(a)) >= len(q) for q, a in zip(asked, answers, strict=True)]),
        terminated=np.ones(E, bool), prompts=tuple(p for p in prompts for _ in names), completions=texts)


def columns_of(parts: Parts, rollouts: Rollouts, budget: Budget) -> tuple[dict[str, np.ndarray], Budget]:
    """The columns that the objective needs, on the action axis, and the token budget."""
    columns = {}
    if Need.PREFERRED in parts.needs:
        columns["preferred"] = (rollouts.action_episode % 2 == 0).astype(np.float64)
    if parts.reference is not None:
        out, budget = score(parts.reference, rollouts, REFERENCE, parts.batching, budget, "score/reference")
        columns["ref_logprobs"] = np.asarray(out.logprobs, np.float64)
    return columns, budget


def iterate(parts: Parts, settings: Settings, state: RunState, phases: Phases) -> tuple[RunState, Metrics, Rollouts]:
    """One optimiser step on the next rows."""
    prompts = parts.source.take(state.cursor, settings.batch_size, settings.seed)
    rollouts = demonstrated(prompts, parts.tokenizer, answers_of(parts.needs))
    with phases("score"):
        columns, budget = columns_of(parts, rollouts, state.budget)
    N = int(rollouts.is_action.sum())
    with phases("update"):
        metrics, budget, _ = optimiser_step(
            parts.trained, rollouts, np.ones(N, bool), np.ones(N), columns, {}, batching=parts.batching,
            budget=budget, comm=parts.comm, phase=phases)
    parts.evaluator.sync(parts.policy.params(), parts.policy.version)
    metrics += {"episode/length": Metric(N, rollouts.n_episodes)}
    return replace(state, step=state.step + 1, cursor=state.cursor + len(prompts), budget=budget), metrics, rollouts


def evaluate_supervised(parts: Parts, settings: Settings, phases: Phases) -> tuple[Metrics, Rollouts | None]:
    """The loss of the held-out rows and its metrics, and rewards of own answers where rewards are given."""
    metrics, rollouts = evaluate(parts, settings, phases)
    names = answers_of(parts.needs)
    given = [p for p in held_out(parts.source, settings) if answered(p, names)]
    if given:
        with phases("evaluate"):
            metrics += held_out_loss(parts, demonstrated(given, parts.tokenizer, names))
    return metrics, rollouts


def held_out_loss(parts: Parts, rollouts: Rollouts) -> Metrics:
    """`eval/loss`, which is what training minimises, and the objective's own metrics, over all rows at once."""
    objective = parts.trained[0].objective
    columns, budget = columns_of(parts, rollouts, first_budget(parts.batching))
    out, _ = score(parts.policy, rollouts, objective.outputs, parts.batching, budget, "score/policy")
    keep = np.ones(int(rollouts.is_action.sum()), bool)
    counts = counts_of(rollouts, keep)
    batch = cut(StepData(rollouts, keep, objective.weights(counts), columns), np.arange(rollouts.n_episodes))
    wide = TokenOutputs(np.asarray(out.logprobs, np.float64), entropy=_widened(out.entropy),
                        values=_widened(out.values))
    loss = objective(ops_of(wide.logprobs), wide, batch, {})
    total = sum(float(term.coef * term.total) for term in loss.terms.values())
    own = {f"eval/{name}": Metric(float(x), float(n)) for name, (x, n) in loss.metrics.items()}
    return Metrics({"eval/loss": Metric(total), **own})


def _widened(x: np.ndarray | None) -> np.ndarray | None:
    return None if x is None else np.asarray(x, np.float64)
