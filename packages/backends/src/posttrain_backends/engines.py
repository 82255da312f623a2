"""The rollout engine `batched`, and what every engine does around its decoding loop. Imports no framework.

Prompts become token ids, stop strings end answers, finished answers become `Rollouts`. How tokens are drawn is the
policy's own framework's to know (`Decoding`): it stands in `_torch/generate.py` and `_jax/generate.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol, final, runtime_checkable

import numpy as np
from posttrain.data import FINISH, Prompt, Rollouts, Sampling, offsets_of
from posttrain.errors import SHOWN, ConfigError, DataError, Diverged, PluginError, Problem
from posttrain.protocols import Sampler, Scorer, Tokenizer
from posttrain.tokenizers import prompt_ids

from posttrain_backends.installed import require
from posttrain_backends.quantization import QUANTIZERS, Quantizer, check_quantizer

if TYPE_CHECKING:
    from posttrain_backends._torch.learner import TorchLearner

EOS, STOP, BUDGET = (FINISH.index(name) for name in ("eos", "stop", "budget"))
_PARTIAL_CHARACTER = 3
"""Tokens that may hold only a part of a character at the edge of decoded text: UTF-8 has up to 4 bytes."""


@runtime_checkable
class Decoding(Protocol):
    """What a loaded model is beside `Scorer` where the engine `batched` can draw from it: one that makes the sampler of
    its own framework."""

    def sampler(self, tokenizer: Tokenizer, engine: Batched, *, shared: bool) -> Sampler:
        """A sampler with this model's weights: its own arrays where `shared`, else a copy. Raises `ConfigError` where
        a setting of the engine does not fit the model, `PluginError` where a library that it needs is missing."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Batched:
    """Own decoding loop on the policy's weights, torch or JAX: one prefill per prompt, finished rows refilled at once.

    With `shared` the sampler reads the policy's own arrays. An answer depends on weights, prompt, sampling, seed and
    its place in the list; not on how many rows are decoded beside it.
    """

    slots: int = 0
    """Answers decoded at once; 0 decodes all of a rollout at once. The metric `rollout/busy` is their share in use."""
    cache_tokens: int = 0
    """Most tokens that keys and values are kept of: fewer answers at once where that is less than answers times the
    longest prompt and answer; long prompts with several answers are kept, and count, once in native models. 0 does not
    limit. A state-space model keeps none of them; `slots` limits its states."""
    prefill_tokens: int = 8192
    """Most prompt tokens of one forward pass; a single longer prompt is still one pass."""
    quantize: Quantizer | None = None
    """Draw for training from a copy of the policy in `int8` or `nf4` (bitsandbytes), `int8_weight_only`,
    `int8_dynamic` or `int4` (torchao), rounded anew after each update; the trainer corrects for it. Evaluation draws
    from the policy itself."""

    def __post_init__(self) -> None:
        if self.slots < 0 or self.cache_tokens < 0:
            raise ValueError(f"slots and cache_tokens must not be negative (0 does not limit), got {self.slots} and "
                             f"{self.cache_tokens}")
        if self.prefill_tokens < 1:
            raise ValueError(f"prefill_tokens must be at least 1, got {self.prefill_tokens}")

    @property
    def approximates(self) -> bool:
        """See `posttrain.protocols.Approximating`."""
        return self.quantize is not None

    def start(self, policy: Scorer, tokenizer: Tokenizer, *, shared: bool) -> Sampler:
        """A sampler with the policy's weights. Raises `ConfigError` for a policy of another framework."""
        if not any(map(find_spec, ("torch", "jax"))):
            raise PluginError(["engine 'batched' needs torch or JAX, and neither is installed: "
                               "pip install 'posttrain-backends[torch]', or 'posttrain-backends[flax]'"])
        if not isinstance(policy, Decoding):
            kind = f"{type(policy).__module__}.{type(policy).__qualname__}"
            raise ConfigError(
                [f"engine 'batched' decodes torch and JAX models; the policy is a {kind}"],
                next_step="Take such a policy (policy: torch, policy: flax), or an engine for this one "
                          "(rollout.engine; all: posttrain plugins engine).")
        return policy.sampler(tokenizer, self, shared=shared)


def require_quantizable(policy: TorchLearner, quantizer: Quantizer) -> None:
    """Raise `ConfigError` or `PluginError` where no copy of the policy can be drawn from with such weights."""
    require("rollout.engine.quantize", QUANTIZERS[quantizer].library, extra="quantized")
    from posttrain_backends._torch.models.projections import has_plain_layers

    if not has_plain_layers(policy.model.module):
        raise ConfigError(["rollout.engine.quantize: the policy's weights are quantised already, and drawn from as "
                           "they are; leave it out"])
    try:
        check_quantizer(quantizer, policy.device.type,
                        precision=str(policy.model.compute_dtype).removeprefix("torch."))
    except ValueError as error:
        raise ConfigError([f"rollout.engine.{error}"]) from None


@final
@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What was drawn for one prompt."""

    tokens: np.ndarray
    """[n] int32, the end-of-sequence token included."""
    logprobs: np.ndarray
    """[n] float32, after the sampler's processing."""
    finish: int
    """Index into `FINISH`."""
    routes: np.ndarray | None = None
    """[P + n, ...] of the prompt's tokens and its own; see `Rollouts.routes`."""


def encode(prompts: Sequence[Prompt], tokenizer: Tokenizer, sampling: Sampling, vocab_size: int,
           max_positions: int | None) -> list[tuple[int, ...]]:
    """Token ids of each prompt; neighbours that ask the same share the work and the tuple.

    Raises one `DataError` that names the prompts that cannot be answered, at most 20: those the tokenizer refuses,
    empty ones (nothing would predict the first token), those too long for the model together with their answer, and
    those with ids outside its vocabulary.
    """
    encoded: list[tuple[int, ...]] = []
    problems: list[Problem] = []
    asked: tuple[object, ...] | None = None
    for i, prompt in enumerate(prompts):
        if asked == (prompt.text, prompt.messages, prompt.tokens):
            encoded.append(encoded[-1])
            continue
        asked = (prompt.text, prompt.messages, prompt.tokens)
        ids: tuple[int, ...] = ()
        try:
            ids = tuple(prompt_ids(prompt, tokenizer))
            wrong = _misfit(ids, sampling, vocab_size, max_positions)
        except DataError as error:
            wrong = str(error)
        encoded.append(ids)
        if wrong:
            problems.append(Problem(wrong, prompt.where or f"prompt {i}"))
    if problems:
        title = f"{len(problems)} of {len(prompts)} prompts cannot be answered by the policy:"
        raise DataError(problems[:SHOWN], title,
                        "Shorten the prompts, lower rollout.max_new_tokens, or take a policy with more positions and "
                        "the tokenizer's vocabulary.")
    return encoded


def _misfit(ids: tuple[int, ...], sampling: Sampling, vocab_size: int, max_positions: int | None) -> str:
    """Why a model cannot answer a prompt of these ids; empty where it can."""
    if not ids:
        return "the prompt is empty, so nothing predicts its first token; give it text, or the tokenizer a bos token"
    if max_positions is not None and len(ids) + sampling.max_new_tokens > max_positions:
        return (f"{len(ids)} prompt tokens and up to {sampling.max_new_tokens} new ones do not fit the model's "
                f"{max_positions} positions")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        return f"token ids {min(ids)} to {max(ids)} do not fit the model's vocabulary of {vocab_size}"
    return ""


@final
@dataclass(frozen=True, slots=True)
class StopStrings:
    """Finds the first of some strings in text that grows token by token.

    >>> stops = StopStrings(("\\n\\n", "END"), decode=lambda tokens: "".join(map(chr, tokens)))
    >>> stops.reached(np.array([97, 10])), stops.reached(np.array([97, 10, 10])), stops.cut("one\\n\\ntwo END")
    (False, True, 'one')
    """

    strings: tuple[str, ...]
    decode: Callable[[Sequence[int]], str]

    def __post_init__(self) -> None:
        if "" in self.strings:
            raise ConfigError(["rollout.stop holds an empty string, which would end every answer; remove it"])

    def reached(self, answer: np.ndarray) -> bool:
        """Whether the newest token of `answer` [n] completed a stop string. Decodes only the end of the text, and the
        whole where that end says so."""
        if self.cut(self._tail(answer)) is None:
            return False
        return self.cut(self.decode(answer.tolist())) is not None

    def cut(self, text: str) -> str | None:
        """The text before the stop string that comes first, or None where there is none."""
        places = [place for s in self.strings if (place := text.find(s)) >= 0]
        return text[:min(places)] if places else None

    def _tail(self, answer: np.ndarray) -> str:
        """Text of the last tokens: the newest one's, and before it at least as much as the longest stop string.

        A token gives at least a byte; more tokens are taken where some of them give none.
        """
        wanted = len(self.decode(answer[-1:].tolist())) + max(map(len, self.strings)) + _PARTIAL_CHARACTER
        width = max(len(s.encode()) for s in self.strings) + 1 + _PARTIAL_CHARACTER
        while True:
            text = self.decode(answer[-width:].tolist())
            if len(text) >= wanted or width >= len(answer):
                return text
            width *= 2


def uniforms(seed: Sequence[int], episode: int, count: int) -> np.ndarray:
    """[count] float64 in [0, 1): the random numbers of one episode, whatever is decoded beside it.

    >>> bool((uniforms((0, 1), 5, 3) == uniforms((0, 1), 5, 8)[:3]).all())
    True
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([*seed, episode]))).random(count)


def assemble(prompts: Sequence[Prompt], encoded: Sequence[tuple[int, ...]], answers: Sequence[Answer],
             sampling: Sampling, stops: StopStrings, version: int) -> Rollouts:
    """Prompts and answers as `Rollouts`, one sequence per episode. Raises `Diverged` where a log-prob is not finite."""
    E = len(prompts)
    lengths = np.array([n for ids, a in zip(encoded, answers, strict=True) for n in (len(ids), len(a.tokens))], int)
    logprobs = np.concatenate([np.zeros(0, np.float32), *(a.logprobs for a in answers)])
    if not np.isfinite(logprobs).all():
        raise Diverged(f"the policy's logits are not finite (weights of version {version}); lower optimizer.lr, or "
                       "resume from an earlier checkpoint")
    finish = np.array([a.finish for a in answers], np.int8)
    pieces = [piece for ids, a in zip(encoded, answers, strict=True) for piece in (np.array(ids, np.int32), a.tokens)]
    routes = [a.routes for a in answers if a.routes is not None]
    return Rollouts(
        tokens=np.concatenate([np.zeros(0, np.int32), *pieces]), offsets=offsets_of(lengths.reshape(E, 2).sum(axis=1)),
        episode=np.arange(E), is_action=np.repeat(np.tile([False, True], E), lengths),
        group=np.array([p.group for p in prompts], np.int64), finish=finish, terminated=finish != BUDGET,
        prompts=tuple(prompts), completions=tuple(_completion(a, stops) for a in answers), behavior_logprobs=logprobs,
        policy_version=np.full(len(logprobs), version, np.int32), turn=np.zeros(len(logprobs), np.int32),
        routes=np.concatenate(routes) if routes else None, sampling=sampling)


def _completion(answer: Answer, stops: StopStrings) -> str:
    """Text of an answer without the end-of-sequence token or the stop string that ended it."""
    text = stops.decode(answer.tokens[:len(answer.tokens) - (answer.finish == EOS)].tolist())
    return (stops.cut(text) or "") if answer.finish == STOP else text
