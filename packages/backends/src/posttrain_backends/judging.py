"""What a reward model reads: prompts and answers as texts, texts as token ids, rows in parts that fit a budget.

As TRL has it. Knows a tokenizer of transformers by its calls, and no framework.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from posttrain.errors import ConfigError, DataError, MemoryExhausted

log = logging.getLogger(__name__)


# ---- texts


@final
@dataclass(frozen=True, slots=True)
class Text:
    """What the model reads of one row."""

    whole: str
    answer: slice
    """Characters of the answer in `whole`."""
    is_chat: bool
    """Whether a chat template wrote it, special tokens included."""


def text_of(prompt: Any, completion: str, tokenizer: Any) -> Text:
    """The row as one text. Raises `DataError` where the prompt is token ids, or the template is missing or refuses.

    The answer is looked for behind the prompt as the template writes it when an answer is to follow; templates that
    trim it are followed.
    """
    if isinstance(prompt, str):
        return Text(prompt + completion, slice(len(prompt), len(prompt) + len(completion)), False)
    if not all(isinstance(message, Mapping) for message in prompt):
        raise DataError(["the prompt is token ids, which a reward model with its own tokenizer cannot read; give rows "
                         "text or messages"])
    messages = [dict(message) for message in prompt]
    whole = _written(tokenizer, [*messages, {"role": "assistant", "content": completion}], follows=False)
    before = [_written(tokenizer, messages, follows=follows) for follows in (True, False)]
    start = next((len(text) for text in before if whole.startswith(text)), 0)
    answer = completion if completion in whole[start:] else completion.strip()
    found = whole.find(answer, start)
    return Text(whole, slice(found, found + len(answer)) if found >= 0 else slice(start, len(whole)), True)


def _written(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, follows: bool) -> str:
    """The conversation as the model's own chat template writes it; `follows`: up to where an answer begins."""
    if not tokenizer.chat_template:
        raise DataError(["the prompt is made of messages, but the reward model's tokenizer has no chat template; give "
                         "its folder a chat_template.jinja, or give rows text"])
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=follows)
    except Exception as error:  # templates raise whatever Jinja or their author raises
        raise DataError([f"the reward model's chat template refuses the messages: {error}"]) from error
    return text


# ---- token ids


@final
@dataclass(frozen=True, slots=True)
class Row:
    """Token ids of one row, and which of them are the answer's."""

    ids: tuple[int, ...]
    answer: tuple[int, ...] | None = None
    """Places of the answer's tokens; None where nobody asks for them."""


@final
@dataclass(frozen=True, slots=True)
class Reader:
    """How rows of prompt and answer become token ids."""

    tokenizer: Any
    adds_special_tokens: bool
    """Around a plain text; a chat template writes its own."""
    whole: bool
    """Read what the template writes behind the answer, too."""
    finds_answers: bool
    limit: int | None
    """Most tokens of a row."""

    def __call__(self, prompt: Any, completion: str) -> Row:
        """Raises `DataError` for a row that cannot be read."""
        text = text_of(prompt, completion, self.tokenizer)
        special = self.adds_special_tokens and not text.is_chat
        read = text.whole if self.whole else text.whole[:text.answer.stop]
        found = self.tokenizer(read, add_special_tokens=special, return_offsets_mapping=self.finds_answers)
        ids = tuple(found["input_ids"])
        if not ids:
            raise DataError(["prompt and answer are empty; a reward model reads at least one token"])
        if self.limit is not None and len(ids) > self.limit:
            raise DataError([f"the row has {len(ids)} tokens for the reward model, which reads {self.limit} (its "
                             "positions, or max_tokens); lower rollout.max_new_tokens or data.max_prompt_tokens"])
        start, stop = text.answer.start, text.answer.stop
        return Row(ids, tuple(i for i, (a, b) in enumerate(found["offset_mapping"])
                              if a < b and b > start and a < stop) if self.finds_answers else None)


def padded(ids: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """[rows, columns] ids with `pad` on the right, and which of them are real.

    >>> padded([[3, 4], [5]], 0)[0].tolist()
    [[3, 4], [5, 0]]
    """
    lengths = np.array([len(row) for row in ids])
    table = np.full((len(ids), lengths.max()), pad)
    real = np.arange(lengths.max()) < lengths[:, None]
    table[real] = np.concatenate([np.asarray(row) for row in ids])
    return table, real


def pad_of(tokenizer: Any, eos: int | None, what: str, *, at_last: bool) -> int:
    """The id for padding of a model that names none: the tokenizer's, else the end of a text's. Raises `ConfigError`
    where there is none; warns where a score is read `at_last` token that is not this one."""
    known = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, eos) if isinstance(i, int)]
    if not known:
        raise ConfigError([f"neither {what} nor its tokenizer names a token for padding or for the end of a text, so "
                           "rows cannot be padded"],
                          next_step="Set pad_token_id in the config.json of the reward model.")
    if at_last and known[0] == tokenizer.eos_token_id:
        log.warning("%s names no token for padding; %r is taken, as TRL does, so a score is read at the last token "
                    "before it; set pad_token_id in its config.json for another", what, tokenizer.eos_token)
    return known[0]


# ---- parts


@final
class Parts:
    """Scores rows the longest first, as many at a time as `cells` padded tokens allow; half as many from then on where
    memory runs out, after a call of `free`."""

    def __init__(self, cells: int, free: Callable[[], None] = lambda: None) -> None:
        self._cells, self._free, self._halved = cells, free, False

    def __call__(self, rows: Sequence[Row], scored: Callable[[Sequence[Row]], Sequence[float]], *,
                 alone: bool = False) -> list[float | None]:
        """None for a row whose answer is asked for and has no token. Raises `MemoryExhausted` where a single row does
        not fit."""
        scores: list[float | None] = [None] * len(rows)
        waiting = sorted((i for i, row in enumerate(rows) if row.answer != ()), key=lambda i: -len(rows[i].ids))
        while waiting:
            part = waiting[:1 if alone else max(1, self._cells // len(rows[waiting[0]].ids))]
            try:
                found = scored([rows[i] for i in part])
            except MemoryExhausted:
                if len(part) == 1:
                    raise
                self._halve(len(part) * len(rows[part[0]].ids))
                continue
            for i, number in zip(part, found, strict=True):
                scores[i] = number
            waiting = waiting[len(part):]
        return scores

    def _halve(self, failed: int) -> None:
        """Go on with half the cells of what did not fit; told once."""
        self._cells = failed // 2
        self._free()
        if not self._halved:
            log.warning("the reward model ran out of memory on %d padded tokens and goes on with half as many in a "
                        "forward pass; set batch_tokens to what fits", failed)
        self._halved = True
