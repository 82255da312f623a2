"""What the columns of a row mean, in the format of RL2 or of TRL, and everything that can be wrong with them.

Knows one row at a time and what a tokenizer can encode. Nothing about files, epochs or splits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, final

from posttrain.data import Prompt
from posttrain.errors import SHOWN, DataError, Problem, did_you_mean
from posttrain.protocols import Tokenizer
from posttrain.tokenizers import prompt_ids

RESERVED = ("prompts", "completions", "completion_ids")
"""Keywords that every reward receives; a column of that name would hide them."""

COMPLETION = "completion"
"""Name under which `Prompt.extra` holds a given answer, whatever its column is called."""

CHOSEN, REJECTED = "chosen", "rejected"
"""Names under which `Prompt.extra` holds the better and the other answer, as texts."""

ANSWER_IN_RL2 = "response"
"""Column of a given answer in RL2's rows, looked for where the configured one is absent."""

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read: where it stands and its columns, or what is wrong with it."""

    where: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


class RowTable(Protocol):
    """The rows of a file or a data set, each read when it is asked for; iterating reads them in larger pieces."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Row: ...
    def __iter__(self) -> Iterator[Row]: ...


@dataclass(frozen=True, slots=True)
class Format:
    """What the columns of one file mean, found by looking at its rows."""

    prompt: str
    """Column of the prompt; empty: the conversations of a pair begin with it."""
    completion: str = ""
    """Column of the given answer; empty: none."""
    answered: bool = False
    """Conversations end with the assistant's answer, which is to be learned."""
    rl2: bool = False
    """`extra_info` holds further columns."""
    pair: tuple[str, str] | None = None
    """Columns of the preferred and of the rejected answer; None: none."""

    def __str__(self) -> str:
        if self.pair:
            prompts = f"prompts in '{self.prompt}'" if self.prompt else "prompts in the conversations"
            return f"{prompts}, preferred answers in '{self.pair[0]}', rejected ones in '{self.pair[1]}'"
        answer = f", answers in '{self.completion}'" if self.completion else ", answers in the last message"
        style = "RL2 format (extra_info)" if self.rl2 else "TRL format"
        return f"{style}, prompts in '{self.prompt}'{answer if self.completion or self.answered else ''}"


def row_of(where: str, columns: Any) -> Row:
    """A row as it was read; what is no row at all keeps its problem."""
    if not isinstance(columns, Mapping):
        return Row(where, problem=f"a row is an object with columns, found {kind_of(columns)}")
    if not columns.keys().isdisjoint(RESERVED):
        found = [name for name in RESERVED if name in columns]
        return Row(where, problem=f"column '{found[0]}' has the name of an argument of every reward; rename it")
    return Row(where, columns)


@dataclass(frozen=True, slots=True)
class Keys:
    """Names of the columns to look for, as the task configures them."""

    prompt: str = "prompt"
    messages: str = "messages"
    completion: str = "completion"
    chosen: str = "chosen"
    rejected: str = "rejected"


@final
class Census:
    """Counts what the columns of a file hold, row by row, and keeps no row."""

    def __init__(self, keys: Keys) -> None:
        self._asked = tuple(dict.fromkeys((keys.prompt, keys.messages)))
        self._answers = tuple(dict.fromkeys((keys.completion, ANSWER_IN_RL2)))
        self._pair = (keys.chosen, keys.rejected)
        self._rows = 0
        self._present, self._answered, self._ends = Counter[str](), Counter[str](), Counter[str]()
        self._whole, self._talks = Counter[str](), Counter[str]()

    def add(self, columns: Mapping[str, Any]) -> None:
        """One more row."""
        self._rows += 1
        for column in columns:
            self._present[column] += 1
        for column in {*self._answers, *self._pair}:
            if column in columns and _is_answer(columns[column]):
                self._answered[column] += 1
                self._whole[column] += not isinstance(columns[column], str) and len(columns[column]) > 1
        for column in self._pair:
            self._talks[column] += _last_role(columns.get(column)) is not None
        for column in self._asked:
            if column in columns and _last_role(columns[column]) == "assistant":
                self._ends[column] += 1

    def format(self, name: str) -> Format:
        """What the columns of file `name` mean, by what most of its rows hold. Raises `DataError` where no row has a
        prompt."""
        present, asked = self._present, max(self._asked, key=lambda column: self._present[column])
        given = next((c for c in self._answers if 2 * self._answered[c] > present[c]), "")
        paired = not given and all(2 * self._answered[c] > self._rows for c in self._pair)
        if paired:
            whole = all(2 * self._whole[c] > self._rows for c in self._pair)
            whole = whole or (not present[asked] and any(self._whole[c] for c in self._pair))
            return Format("" if whole else asked, rl2=present["extra_info"] > 0, pair=self._pair)
        if self._rows and not present[asked]:
            if any(2 * self._talks[c] > self._rows for c in self._pair):  # the prompt is there; rows say what is not
                return Format("", rl2=present["extra_info"] > 0, pair=self._pair)
            found = sorted(present)
            hint = next(filter(None, (did_you_mean(column, found) for column in self._asked)), "")
            raise DataError([Problem(
                f"no row has a column {' or '.join(map(repr, self._asked))}{hint}; the columns are "
                f"{', '.join(found[:SHOWN]) or 'none'}: name one by task.prompt_key or task.messages_key", name)])
        answered = not given and 2 * self._ends[asked] > present[asked]
        return Format(asked, given, answered, rl2=present["extra_info"] > 0)


def _is_answer(value: Any) -> bool:
    return isinstance(value, str) or _last_role(value) == "assistant"


def _last_role(prompt: Any) -> Any:
    last = prompt[-1] if isinstance(prompt, (list, tuple)) and prompt else None
    return last.get("role") if isinstance(last, Mapping) else None


def prompt_of(row: Row, number: int, form: Format) -> Prompt | Sequence[Problem]:
    """The prompt of a row, or everything that is wrong with its columns."""
    wrong = [row.problem] if row.problem else []
    if not wrong:
        asked = _asked(row.columns, form, wrong) if form.prompt else _common_prompt(row.columns, form, wrong)
        extra = _extra(row.columns, form, wrong)
        if form.answered and isinstance(asked, tuple):
            extra[COMPLETION], asked = asked[-1]["content"], asked[:-1]
        elif form.completion:
            extra[COMPLETION] = _answer(row.columns, form.completion, wrong)
        if form.pair:
            before = len(wrong)
            extra[CHOSEN], extra[REJECTED] = (_answer(row.columns, column, wrong, whole=not form.prompt)
                                              for column in form.pair)
            if len(wrong) == before and extra[CHOSEN] and extra[CHOSEN] == extra[REJECTED]:
                wrong.append(f"columns '{form.pair[0]}' and '{form.pair[1]}' hold the same answer; a preference is "
                             "between two")
    if wrong:
        return [Problem(message, row.where) for message in wrong]
    text, messages = (asked, None) if isinstance(asked, str) else (None, asked)
    return Prompt(text=text, messages=messages, group=number, extra=extra, where=row.where)


def problems_of(row: Row, number: int, form: Format, tokenizer: Tokenizer, longest: int) -> Sequence[Problem]:
    """Everything that is wrong with a row, its columns and what the tokenizer makes of them; empty where it is good."""
    made = prompt_of(row, number, form)
    if isinstance(made, Prompt):
        return [Problem(message, row.where) for message in _untokenizable(made, form, tokenizer, longest)]
    return made


def _asked(columns: Mapping[str, Any], form: Format, wrong: list[str]) -> str | tuple[Message, ...] | None:
    """Text or messages of the prompt column; what is wrong is added to `wrong`."""
    value = columns.get(form.prompt)
    if isinstance(value, str) and value.strip() and not form.answered:
        return value
    if form.prompt not in columns:
        beside = "; name it by task.prompt_key, or let both answers be conversations that begin with it"
        wrong.append(f"column '{form.prompt}' is missing; the row has {', '.join(columns) or 'no column'}"
                     f"{beside if form.pair else ''}")
    elif isinstance(value, str | list | tuple) and not value:
        wrong.append(f"column '{form.prompt}' is empty")
    elif isinstance(value, list | tuple):
        if problem := _conversation_problem(value, form.answered):
            wrong.append(f"column '{form.prompt}': {problem}")
        else:
            return tuple({name: part for name, part in m.items() if part is not None} for m in value)
    elif not isinstance(value, str):
        wrong.append(f"column '{form.prompt}' should be text or a list of messages, found {kind_of(value)}")
    elif form.answered:
        wrong.append(f"column '{form.prompt}' is text, but other rows hold conversations that end with the answer")
    else:
        wrong.append(f"column '{form.prompt}' is empty")
    return None


def _common_prompt(columns: Mapping[str, Any], form: Format, wrong: list[str]) -> tuple[Message, ...] | None:
    """The messages before the answers of a pair of conversations, which must be the same."""
    assert form.pair is not None
    found, before = [], len(wrong)
    for column in form.pair:
        value = columns.get(column)
        if column not in columns:
            continue  # said where the answer is looked for
        if not isinstance(value, list | tuple):
            wrong.append(f"column '{column}' should be a conversation that ends with the answer, found "
                         f"{kind_of(value)}; or give the prompt a column of its own (task.prompt_key)")
        elif problem := _conversation_problem(value, True, "each conversation of a pair ends"):
            wrong.append(f"column '{column}': {problem}")
        else:
            found.append(tuple({name: part for name, part in m.items() if part is not None} for m in value[:-1]))
    if len(wrong) > before or not found:
        return None
    if found[0] != found[-1]:
        wrong.append(f"the conversations in '{form.pair[0]}' and '{form.pair[1]}' differ before the answers; a pair "
                     "answers one prompt")
    return found[0]


FOLLOWS: Mapping[str, frozenset[str]] = {
    "start": frozenset({"system", "developer", "user"}),
    "system": frozenset({"user"}),
    "developer": frozenset({"user"}),
    "user": frozenset({"assistant"}),
    "assistant": frozenset({"user", "tool"}),
    "tool": frozenset({"tool", "assistant"}),
}
"""Role of a message -> roles of the next one."""


def _conversation_problem(messages: Sequence[Any], answered: bool, others: str = "other rows end") -> str:
    """What is wrong with a list of messages, or nothing; `others` end with the answer where it is `answered`."""
    before = "start"
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            return f"message {i} should be an object with role and content, found {kind_of(message)}"
        for part in ("role", "content", *message):
            if not isinstance(message.get(part), str) and (part in ("role", "content") or message[part] is not None):
                return f"message {i}: '{part}' should be text, found {kind_of(message.get(part))}"
        role = message["role"]
        if role not in FOLLOWS or role == "start":
            return f"message {i}: role '{role}' is none of {', '.join(r for r in FOLLOWS if r != 'start')}"
        if role not in FOLLOWS[before]:
            place = "at the start" if before == "start" else f"after '{before}'"
            return f"message {i}: role '{role}' {place}, expected {' or '.join(sorted(FOLLOWS[before]))}"
        if role in ("user", "tool") and not message["content"].strip():
            return f"message {i} ('{role}') is empty"
        before = role
    if answered and before != "assistant":
        return f"ends with '{before}', but {others} with the assistant's answer; add the answer"
    if answered and (not messages[-1]["content"].strip() or len(messages) == 1):
        return "the assistant's answer is empty"
    if not answered and before not in ("user", "tool"):
        return f"ends with '{before}', but the policy answers a user (or a tool); remove the last message"
    return ""


def _answer(columns: Mapping[str, Any], column: str, wrong: list[str], whole: bool = False) -> str:
    """The given answer: text, or a list that holds the assistant's one message; the last message of a `whole`
    conversation, whose problems are reported elsewhere."""
    value = columns.get(column)
    if whole and column in columns:
        return str(value[-1].get("content")) if value and _last_role(value) == "assistant" else ""
    if isinstance(value, list | tuple) and len(value) == 1 and _last_role(value) == "assistant":
        value = value[0].get("content")
    if isinstance(value, str) and value.strip():
        return value
    if column not in columns:
        others = f"the row has {', '.join(columns)}, and a pair has two answers" if whole else "other rows have it"
        wrong.append(f"column '{column}' is missing; {others}")
    elif isinstance(value, str):
        wrong.append(f"column '{column}' is empty")
    else:
        wrong.append(f"column '{column}' should be text or one assistant message, found {kind_of(value)}")
    return ""


def _extra(columns: Mapping[str, Any], form: Format, wrong: list[str]) -> dict[str, Any]:
    """All other columns, those inside `extra_info` among them."""
    extra = {name: value for name, value in columns.items() if name != form.prompt}
    inside = extra.get("extra_info")
    if inside is None or not isinstance(inside, Mapping):
        return extra
    for name, value in inside.items():
        if name in RESERVED or (name in extra and extra[name] != value):
            wrong.append(f"column 'extra_info' holds '{name}', which is also " + (
                "an argument of every reward; rename it" if name in RESERVED else "a column with another value"))
        extra[name] = value
    return extra


def _untokenizable(prompt: Prompt, form: Format, tokenizer: Tokenizer, longest: int) -> Iterator[str]:
    """What the tokenizer cannot take of a prompt and its answers."""
    asked = f"column '{form.prompt}'" if form.prompt else "the prompt"
    try:
        length = len(prompt_ids(prompt, tokenizer))
        if length == 0:
            yield f"{asked} has no token"
        if longest and length > longest:
            yield f"{asked} has {length} tokens, more than data.max_prompt_tokens, {longest}"
    except (DataError, ValueError) as error:
        yield f"{asked}: {error}"
    answers = {COMPLETION: form.completion or form.prompt} if form.completion or form.answered else {}
    if form.pair:
        answers = dict(zip((CHOSEN, REJECTED), form.pair))
    for name, column in answers.items():
        try:
            tokenizer.encode(prompt.extra[name])
        except (DataError, ValueError) as error:
            yield f"column '{column}': {error}"


KINDS: Sequence[tuple[type | tuple[type, ...], str]] = (
    (type(None), "null"), (bool, "true or false"), ((int, float), "a number"), (str, "text"), ((list, tuple), "a list"),
    (Mapping, "an object"))
"""Types of a JSON value, in words; the first that fits counts."""


def kind_of(value: Any) -> str:
    """The type of a value in words."""
    return next((name for kind, name in KINDS if isinstance(value, kind)), type(value).__name__)
