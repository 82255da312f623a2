"""Draws answers from the table, token by token. Knows prompts and randomness, no training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from posttrain.data import FINISH, Array, Prompt, Rollouts, Sampling, offsets_of
from posttrain.errors import ConfigError, DataError, Problem
from posttrain.protocols import Sampler, Scorer, Tokenizer
from posttrain.tokenizers import prompt_ids
from posttrain.toy.policy import TABLE, ToyLearner

_EOS, _BUDGET = FINISH.index("eos"), FINISH.index("budget")


@final
@dataclass(frozen=True, slots=True)
class ToyEngine:
    """Draws one token after the other from a toy policy."""

    def start(self, policy: Scorer, tokenizer: Tokenizer, *, shared: bool) -> Sampler:
        """Raises `ConfigError` for another policy."""
        if not isinstance(policy, ToyLearner):
            raise ConfigError(["engine 'toy' draws from the toy policy alone"],
                              next_step="set policy: toy, or take another engine: posttrain plugins engine")
        if shared:
            return ToySampler(policy, tokenizer)
        own = ToyLearner(len(policy.parameters[TABLE]), 0, None)
        own.load_params(policy.params(), policy.version)
        return ToySampler(own, tokenizer)


@final
@dataclass(frozen=True, slots=True, eq=False)
class ToySampler:
    """See `posttrain.protocols.Sampler`."""

    policy: ToyLearner
    tokenizer: Tokenizer

    def rollout(self, prompts: Sequence[Prompt], sampling: Sampling, seed: Sequence[int]) -> Rollouts:
        self.check(prompts, sampling)
        asked = [list(prompt_ids(prompt, self.tokenizer)) for prompt in prompts]
        drawn = [self._answer(ids[-1], sampling, np.random.default_rng([*seed, i])) for i, ids in enumerate(asked)]
        lengths = np.array([len(part) for ids, (new, _) in zip(asked, drawn, strict=True) for part in (ids, new)], int)
        lengths = lengths.reshape(-1, 2)
        finish = np.array([_EOS if tokens[-1] == self.tokenizer.eos else _BUDGET for tokens, _ in drawn], np.int8)
        N, E = int(lengths[:, 1].sum()), len(prompts)
        return Rollouts(
            tokens=np.array([t for ids, (new, _) in zip(asked, drawn, strict=True) for t in (*ids, *new)], np.int32),
            offsets=offsets_of(lengths.sum(axis=1)), episode=np.arange(E),
            is_action=np.repeat(np.tile([False, True], E), lengths.ravel()),
            group=np.array([p.group for p in prompts], np.int64), finish=finish, terminated=finish == _EOS,
            prompts=tuple(prompts), completions=tuple(
                self.tokenizer.decode([t for t in tokens if t != self.tokenizer.eos]) for tokens, _ in drawn),
            behavior_logprobs=np.array([x for _, logprobs in drawn for x in logprobs], np.float32),
            policy_version=np.full(N, self.policy.version, np.int32), turn=np.zeros(N, np.int32), sampling=sampling)

    def _answer(self, last: int, sampling: Sampling, rng: np.random.Generator) -> tuple[list[int], list[float]]:
        """Tokens up to the end of the answer or the budget, and their log-probs; temperature 0 takes the likeliest,
        whose log-prob among nothing else is 0."""
        tokens: list[int] = []
        logprobs: list[float] = []
        while len(tokens) < sampling.max_new_tokens and (not tokens or tokens[-1] != self.tokenizer.eos):
            logp = self.policy.log_softmax(np.array([last]), sampling.temperature or 1.0)[0]
            if sampling.temperature:
                place = np.searchsorted(np.cumsum(np.exp(logp)), rng.random(), side="right")
                last = min(int(place), len(logp) - 1)  # the sum of all probabilities may be a little under 1
            else:
                last = int(logp.argmax())
            tokens.append(last)
            logprobs.append(float(logp[last]) if sampling.temperature else 0.0)
        return tokens, logprobs

    def sync(self, params: Iterable[tuple[str, Array]], version: int) -> None:
        self.policy.load_params(params, version)

    def check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Raises `ConfigError` for settings that it cannot keep, `DataError` with every prompt that cannot be asked."""
        if sampling.truncates or sampling.stop:
            raise ConfigError(["the toy engine draws without top_p, top_k, min_p and stop strings; leave them out"])
        problems = [Problem(wrong, prompt.where or f"prompt {i}")
                    for i, prompt in enumerate(prompts) if (wrong := self._wrong(prompt))]
        if problems:
            raise DataError(problems, title="prompts that the toy policy cannot answer:")

    def _wrong(self, prompt: Prompt) -> str:
        """Why the prompt cannot be asked; empty where it can."""
        V = len(self.policy.parameters[TABLE])
        try:
            ids = prompt_ids(prompt, self.tokenizer)
        except DataError as error:
            return str(error)
        if not ids:
            return "the prompt is empty, so nothing predicts its first token"
        if not 0 <= min(ids) <= max(ids) < V:
            return f"token ids {min(ids)} to {max(ids)} do not fit the table of {V}"
        return ""
