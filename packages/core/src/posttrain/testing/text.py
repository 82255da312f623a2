"""Contracts of what deals in text: tokenizers, tasks and rewards."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from inspect import getsourcefile, isfunction
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data import FINISH, Prompt, Rollouts, offsets_of
from posttrain.errors import DataError
from posttrain.protocols import PromptSource, Reward, RewardSource, RowRules, Task, Tokenizer, TokenizerSource
from posttrain.rewards.calls import Origin, Outcome, Raised, Returned, Wrong, outcome
from posttrain.rewards.pool import Job, Pool
from posttrain.rewards.scoring import Rule, accepted_by, columns_of, said, score
from posttrain.shape import protocol_members
from posttrain.tasks.formats import RESERVED
from posttrain.testing.contract import EXAMPLES, ComponentContract, config_fields, named
from posttrain.tokenizers import Bytes, prompt_ids

CONVERSATION = ({"role": "user", "content": "1+2="}, {"role": "assistant", "content": "3"},
                {"role": "user", "content": "2+2="})


class TokenizerContract(ComponentContract):
    """Contract of tokenizers: components with `load()` (`posttrain.protocols.TokenizerSource`) and what they load."""

    kind = "tokenizer"
    protocol = TokenizerSource
    conversation: ClassVar[Sequence[Mapping[str, str]]] = CONVERSATION
    """A question, its answer and a second question, in texts that the tokenizer covers."""

    def texts(self, component: Any) -> st.SearchStrategy[str]:
        """Texts that come back as they were; by default all of Unicode."""
        return st.text(st.characters(exclude_categories=["Cs"]), max_size=40)

    def test_loads_what_its_protocol_asks_for(self, component: Any) -> None:
        """Everything that the loop may ask of a tokenizer is there."""
        loaded = component.load()
        for name, _ in protocol_members(Tokenizer):
            try:
                getattr(loaded, name)
            except AttributeError:
                pytest.fail(f"what {named(component)} loads has no {name}, which Tokenizer asks for", pytrace=False)

    def test_text_comes_back(self, component: Any) -> None:
        """Rewards read what was decoded; special tokens in between are no text."""
        tokenizer = component.load()

        @EXAMPLES
        @given(self.texts(component))
        def holds(text: str) -> None:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text, f"{text!r} came back as {tokenizer.decode(ids)!r} from {ids}"
            around = [tokenizer.pad, *([] if tokenizer.bos is None else [tokenizer.bos]), *ids, tokenizer.eos]
            assert tokenizer.decode(around) == text, \
                f"{text!r} with pad, bos and eos around is decoded as {tokenizer.decode(around)!r}; leave them out"
            assert tokenizer.decode(np.array(ids, np.int32)) == text, "ids in a NumPy array are decoded otherwise"
        holds()

    def test_ids_fit_the_vocabulary(self, component: Any) -> None:
        """An id at or beyond `vocab_size` would read past the embedding."""
        tokenizer = component.load()

        @EXAMPLES
        @given(self.texts(component))
        def holds(text: str) -> None:
            ids = tokenizer.encode(text)
            assert isinstance(ids, list) and all(type(i) is int for i in ids), f"encode must give a list of int: {ids}"
            assert all(0 <= i < tokenizer.vocab_size for i in ids), \
                f"{text!r} has ids {ids}, but the vocabulary {tokenizer.vocab_size}"
        holds()

    def test_special_tokens_are_no_text(self, component: Any) -> None:
        """pad, bos and eos lie in the vocabulary, and no text contains them: an eos inside a prompt would end it."""
        tokenizer = component.load()
        special = {"pad": tokenizer.pad, "bos": tokenizer.bos, "eos": tokenizer.eos}
        for name, i in special.items():
            allowed = (name == "bos" and i is None) or (type(i) is int and 0 <= i < tokenizer.vocab_size)
            assert allowed, f"{name} is {i!r}, which is no id below vocab_size, {tokenizer.vocab_size}"

        @EXAMPLES
        @given(self.texts(component))
        def holds(text: str) -> None:
            for name, i in special.items():
                assert i not in tokenizer.encode(text), \
                    f"{text!r} is encoded with the {name} token {i}; encode adds no special token"
        holds()

    def test_nothing_is_cut_or_padded(self, component: Any) -> None:
        """A long prompt stays whole, whatever limits a tokenizer's file holds; no text has no token."""
        tokenizer, text = component.load(), self.conversation[0]["content"]
        assert tokenizer.encode("") == [], f"an empty text has the ids {tokenizer.encode('')}"
        assert tokenizer.decode([]) == "", f"no id is decoded as {tokenizer.decode([])!r}"
        long = text * 3000
        assert tokenizer.decode(tokenizer.encode(long)) == long, \
            f"of a text of {len(long)} characters {len(tokenizer.decode(tokenizer.encode(long)))} came back"

    def test_texts_do_not_depend_on_one_another(self, component: Any) -> None:
        """The same text has the same ids whatever was encoded before, and in every tokenizer of the component."""
        tokenizer, other = component.load(), pickle.loads(pickle.dumps(component)).load()

        @EXAMPLES
        @given(self.texts(component), self.texts(component))
        def holds(a: str, b: str) -> None:
            first = tokenizer.encode(a)
            tokenizer.encode(b)
            assert tokenizer.encode(a) == first, f"{a!r} has other ids after {b!r} was encoded"
            assert other.encode(a) == first, f"{a!r} has other ids in a tokenizer that was sent to another process"
        holds()

    def test_chat_ends_where_the_assistant_answers(self, component: Any) -> None:
        """What the policy writes comes where its answers stood when it was trained: the conversation with the answer
        begins as the question's ids and the answer do."""
        tokenizer = component.load()
        asked, answer = self._chat(tokenizer, self.conversation[:1]), self.conversation[1]["content"]
        whole = self._chat(tokenizer, self.conversation)
        if asked is None or whole is None:
            return
        assert asked and all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in asked), f"chat gives {asked!r}"
        assert asked == self._chat(tokenizer, self.conversation[:1]), "chat gives other ids when asked again"
        begin = tokenizer.decode(asked)
        assert self.conversation[0]["content"] in begin, f"the question is not in the chat: {begin!r}"
        assert tokenizer.decode(whole).startswith(begin + answer), (
            f"a question ends as {begin!r}, but its answer does not follow there in {tokenizer.decode(whole)!r}; "
            "render the chat with the beginning of the assistant's turn (add_generation_prompt)")

    def test_saves_what_transformers_loads(self, component: Any, tmp_path: Path) -> None:
        """A trained policy is used with its tokenizer: the same ids, special tokens and chat."""
        if find_spec("transformers") is None:
            pytest.skip("not measured: transformers is not installed")
        tokenizer = component.load()
        tokenizer.save(tmp_path)
        theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
        for text in (*(m["content"] for m in self.conversation), "".join(m["content"] for m in self.conversation)):
            found = theirs.encode(text, add_special_tokens=False)
            ours = tokenizer.encode(text)
            assert found == ours, f"{text!r} has ids {ours}, in transformers {found}"
        special = {"pad": theirs.pad_token_id, "bos": theirs.bos_token_id, "eos": theirs.eos_token_id}
        for name, i in special.items():
            assert i == getattr(tokenizer, name), f"{name} is {getattr(tokenizer, name)}, in transformers {i}"
        if (chat := self._chat(tokenizer, self.conversation)) is not None:
            found = theirs.apply_chat_template([dict(m) for m in self.conversation], add_generation_prompt=True,
                                               return_dict=False)
            assert found == chat, f"the conversation has ids {chat}, in transformers {found}"

    def _chat(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int] | None:
        """None where the tokenizer has no chat template and says so."""
        try:
            return tokenizer.chat(messages)
        except DataError as error:
            assert "template" in str(error), f"chat refuses {messages}: {error}"
            return None


class TaskContract(ComponentContract):
    """Contract of tasks: components with `load` (`posttrain.protocols.Task`) and the prompts they load."""

    kind = "task"
    protocol = Task
    shuffled: ClassVar[bool] = True
    """Each seed and epoch has an order of its own; false: always the same order."""
    columns: ClassVar[tuple[str, ...]] = ()
    """Columns that rows have beside the prompt: rewards receive them."""
    has_held_out: ClassVar[bool] = False
    """The components hold rows back for evaluation."""

    def tokenizer(self) -> Tokenizer:
        """Any that covers the prompts; by default bytes."""
        return Bytes().load()

    def broken(self, component: Any, directory: Path) -> tuple[Any, Sequence[str]] | None:
        """A task like the component with several malformed rows, and where each stands (`rows.jsonl:3`), which the one
        error must name. None where rows cannot be malformed (they are generated); `directory` is for files."""
        return None

    def test_take_is_a_pure_function(self, component: Any) -> None:
        """A resumed run goes on with the rows that the uninterrupted one would have had: windows agree wherever they
        overlap, over the border of an epoch too (verl, issue 7401)."""
        source = self._load(component)
        n = source.rows

        @EXAMPLES
        @given(st.integers(0, 3 * n), st.integers(0, n + 2), st.integers(0, n + 2), st.integers(0, 3))
        def holds(cursor: int, a: int, b: int, seed: int) -> None:
            whole = list(source.take(cursor, a + b, seed))
            parts = [*source.take(cursor, a, seed), *source.take(cursor + a, b, seed)]
            assert len(whole) == a + b, f"take({cursor}, {a + b}, {seed}) gave {len(whole)} rows of epochs of {n}"
            assert parts == whole, (
                f"take({cursor}, {a + b}, {seed}) differs from take({cursor}, {a}) followed by take({cursor + a}, {b});"
                " the order may depend on the seed and the epoch alone")
        holds()

    def test_each_epoch_holds_every_row_once(self, component: Any) -> None:
        """No row is learned from more often than another."""
        source = self._load(component)
        n = source.rows
        assert type(n) is int and n >= 1, f"rows must be a positive int, got {n!r}"
        first = Counter(p.where for p in source.take(0, n, 0))
        assert len(first) == n, (f"an epoch of {n} rows holds {len(first)} of them; each must come once, and `where` "
                                 "must name each by itself")
        for epoch in (1, 2, 1000):
            assert Counter(p.where for p in source.take(epoch * n, n, 0)) == first, \
                f"epoch {epoch} does not hold the rows of the first, each once"

    def test_order_is_as_claimed(self, component: Any) -> None:
        """Other seeds and epochs have other orders, or (not `shuffled`) none has."""
        source = self._load(component)
        n = source.rows
        orders = {name: {tuple(p.where for p in source.take(cursor, n, seed)) for cursor, seed in windows}
                  for name, windows in {"seeds": [(0, s) for s in range(6)],
                                        "epochs": [(e * n, 0) for e in range(6)]}.items()}
        for name, found in orders.items():
            assert n == 1 or (len(found) > 1) == self.shuffled, (
                f"six {name} have {len(found)} different orders, but the contract's shuffled is {self.shuffled}")

    def test_held_out_rows_are_not_learned_from(self, component: Any) -> None:
        """An evaluation on training rows would measure memory; its rows and their order stay the same."""
        source = self._load(component)
        kept = list(source.held_out())
        assert bool(kept) == self.has_held_out, \
            f"{len(kept)} rows are held out, but the contract's has_held_out is {self.has_held_out}"
        source.take(3, 5, 1)
        assert list(source.held_out()) == kept, "held_out gives other rows when asked again"
        assert list(self._again(component).held_out()) == kept, "another load holds out other rows"
        both = {p.where for p in kept} & {p.where for p in source.take(0, source.rows, 0)}
        assert not both, f"rows are held out and learned from: {', '.join(sorted(both))}"

    def test_every_load_gives_the_same_rows(self, component: Any) -> None:
        """A run is repeated, and resumed in another process."""
        source, again = self._load(component), self._again(component)
        count = source.rows + 2
        assert list(again.take(1, count, 5)) == list(source.take(1, count, 5)), "a second load gives other prompts"

    def test_prompts_can_be_asked(self, component: Any) -> None:
        """Each has tokens, says in `where` what row it is, and carries the row's other columns to the rewards."""
        source, tokenizer = self._load(component), self.tokenizer()
        for prompt in [*source.take(0, source.rows, 0), *source.held_out()]:
            assert isinstance(prompt, Prompt), f"take gives Prompt, got {type(prompt).__name__}"
            assert prompt.where, f"a prompt does not say in `where` what row it is: {prompt}"
            assert prompt_ids(prompt, tokenizer), f"the prompt of {prompt.where} has no token"
            assert (missing := set(self.columns) - prompt.extra.keys()) == set(), \
                f"{prompt.where} lost the columns {', '.join(sorted(missing))}; keep them in Prompt.extra"
            assert not (taken := set(RESERVED) & prompt.extra.keys()), \
                f"{prompt.where} has a column {', '.join(taken)}, which is an argument of every reward"
            pickle.dumps(prompt)  # rewards are called in other processes

    def test_all_malformed_rows_are_told_at_once(self, component: Any, tmp_path: Path) -> None:
        """One error names each by file and line, so that all are mended at once; or they are left out."""
        given_ = self.broken(component, tmp_path)
        if given_ is None:
            return
        task, places = given_
        assert len(places) > 1, "broken() must hold several malformed rows, so that stopping at the first is seen"
        with pytest.raises(DataError) as caught:
            task.load(self.tokenizer(), RowRules())
        for place in places:
            assert place in str(caught.value), f"the error does not name {place}:\n{caught.value}"
        left = task.load(self.tokenizer(), RowRules(on_bad_row="skip"))
        found = "\n".join(p.where for p in left.take(0, left.rows, 0))
        assert not any(p.where.endswith(place) for p in left.take(0, left.rows, 0) for place in places), \
            f"malformed rows are there although data.on_bad_row is skip:\n{found}"

    def test_prompts_are_no_longer_than_allowed(self, component: Any) -> None:
        """`data.max_prompt_tokens` holds for every task: a longer prompt is a malformed row."""
        source, tokenizer = self._load(component), self.tokenizer()
        lengths = [len(prompt_ids(p, tokenizer)) for p in [*source.take(0, source.rows, 0), *source.held_out()]]
        longest = max(lengths)
        allowed = component.load(tokenizer, RowRules(max_prompt_tokens=longest))
        assert allowed.rows == source.rows, f"{allowed.rows} of {source.rows} rows are left by their own longest length"
        if longest > 1:
            with pytest.raises(DataError):
                component.load(tokenizer, RowRules(max_prompt_tokens=longest - 1))
        if min(lengths) < longest and not source.held_out():
            left = component.load(tokenizer, RowRules("skip", longest - 1))
            assert left.rows == sum(n < longest for n in lengths), \
                f"{left.rows} rows are left of those with {lengths} tokens, {longest - 1} allowed, the others skipped"

    def _load(self, component: Any) -> PromptSource:
        """Loaded once: making rows may take a second."""
        contract: Any = type(self)  # mypy holds a class with fields for unhashable
        return _loaded(contract, pickle.dumps(component))

    def _again(self, component: Any) -> PromptSource:
        found: PromptSource = pickle.loads(pickle.dumps(component)).load(self.tokenizer(), RowRules())
        return found


@final
@dataclass(frozen=True, slots=True)
class Example:
    """An answer, and the reward that it must get; None where the reward does not apply."""

    completion: str
    reward: float | None
    prompt: str = "1+1="
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns."""


HOSTILE: Mapping[str, str] = {
    "no text": "", "blank": " \n\t ", "a power that never ends": "9**9**9", "the same, boxed": "\\boxed{9^{9^{9}}}",
    "brackets that never close": "(" * 5000, "a long number": "1" * 5000, "a long text": "a " * 50_000,
    "a backtracking trap": "a" * 40 + "!", "formulas that never end": "\\frac{" * 300, "NUL": "\x00 2 \x00",
    "no letter of ASCII": "二 ٣ 𝟜 é 👩‍👩‍👧 \u202e2", "replaced bytes": "\ufffd" * 20, "not a number": "nan",
    "infinity": "1e999", "a program": "```python\nimport os, signal\nos.kill(os.getppid(), 0)\n```",
}
"""Answers that policies do write, early in training, and that rules hang or fail on (RL2 evaluated `9**9**9`)."""

TRAINING = frozenset({"torch", "jax", "flax", "tensorflow", "transformers", "vllm"})
"""What no reward worker imports: there are several of them, beside the training process."""


class RewardContract(ComponentContract):
    """Contract of rewards (`posttrain.protocols.Reward`): functions, or dataclasses that are called.

    A reward that is a model, loaded by `load(threads)`, sets `protocol = RewardSource`.
    """

    kind = "reward"
    protocol = Reward
    scope: ClassVar[Literal["row", "batch"]] = "row"
    """Whether the reward of an answer depends on its row alone."""
    deadline: ClassVar[float] = 10.0
    """Seconds for one answer, however hostile."""
    tolerance: ClassVar[float] = 1e-9
    """Of the examples' rewards."""

    def examples(self, component: Any) -> Sequence[Example]:
        """Rows with the rewards they must get: several, and not all the same."""
        pytest.fail(f"{type(self).__name__} has no examples; write "
                    "def examples(self, component): return [Example(completion, reward, columns={...}), ...]",
                    pytrace=False)

    def test_gives_the_examples_rewards(self, component: Any) -> None:
        """The rule, on rows whose rewards its author knows."""
        examples = self._examples(component)
        got = self._rewards(component, examples)
        for example, x in zip(examples, got):
            same = x is None if example.reward is None else (
                x is not None and abs(x - example.reward) <= self.tolerance * max(1.0, abs(example.reward)))
            assert same, f"{example.completion!r} got {x} instead of {example.reward}"

    def test_rows_do_not_depend_on_one_another(self, component: Any) -> None:
        """Workers are called on some rows each, and failed rows again one by one: an answer's reward is its own, or
        (scope "batch") goes with it in every order."""
        examples = self._examples(component)
        whole = self._rewards(component, examples)
        order = np.random.default_rng(0).permutation(len(examples)).tolist()
        turned = self._rewards(component, [examples[i] for i in order])
        assert turned == [whole[i] for i in order], "rewards do not go with their rows when rows are in another order"
        if self.scope == "row":
            alone = [self._rewards(component, [example])[0] for example in examples]
            assert alone == whole, (f"alone, rows get {alone}, together {whole}; if the reward compares answers, set "
                                    'scope = "batch" in the contract')

    def test_changes_nothing_and_says_the_same_again(self, component: Any) -> None:
        """Other rewards get the same lists; a resumed run the same rewards."""
        examples = self._examples(component)
        call, columns = self._call(component), self._columns(component, examples)
        before = copy.deepcopy(columns)
        first, second = (self._numbers(component, examples, outcome(call, columns, len(examples))) for _ in range(2))
        assert columns == before, f"{named(component)} changed the lists it was given"
        assert first == second, f"a second call gives {second} instead of {first}"

    def test_takes_columns_it_does_not_know(self, component: Any) -> None:
        """Rows have columns for other rewards: they come as keywords, and change nothing."""
        examples = self._examples(component)
        more = [Example(e.completion, e.reward, e.prompt, {**e.columns, "another_column": i})
                for i, e in enumerate(examples)]
        assert self._rewards(component, more) == self._rewards(component, examples)

    def test_takes_an_empty_batch(self, component: Any) -> None:
        """No row, no reward, no error."""
        names = self._columns(component, self._examples(component))
        found = outcome(self._call(component), {name: [] for name in names}, 0)
        assert found == Returned(()), self._told(component, found, "an empty batch", "return []")

    def test_survives_hostile_answers(self, component: Any) -> None:
        """A number or None, in time, for whatever a policy may write: one that raises stops the run, one that hangs
        costs its deadline in every step."""
        example = next((e for e in self._examples(component) if e.reward is not None), None)
        assert example is not None, "no example applies"
        rows = {what: Example(text, 0.0, example.prompt, example.columns) for what, text in HOSTILE.items()}
        found = self._in_workers(component, [[row] for row in rows.values()])
        for what, outcome_ in zip(rows, found):
            assert isinstance(outcome_, Returned), self._told(
                component, outcome_, f"an answer that is {what} ({HOSTILE[what][:30]!r})", "give 0 or None for it")

    def test_works_in_a_worker(self, component: Any) -> None:
        """A run calls rewards in processes of their own, made anew from their fields: the same rewards there."""
        examples = self._examples(component)
        here = self._rewards(component, examples)
        with Pool([self._entry(component)], 1) as pool:
            columns, metrics = score(_rollouts(examples), [self._entry(component)], pool)
            excluded, placed = columns.excluded["reward"], columns.rewards["reward"]
        last = np.cumsum(columns.episode_tokens) - 1
        there = [None if out else float(x) for out, x in zip(excluded, placed[last])]
        assert there == here, f"in a worker rows get {there}, in this process {here}"
        assert not metrics["dropped"].value

    def test_imports_no_framework_when_called(self, component: Any) -> None:
        """There are as many workers as cores: one that imports torch takes seconds and hundreds of megabytes."""
        if not callable(component):
            return
        code = ("import pickle, sys\norigin, columns, rows = pickle.load(sys.stdin.buffer)\n"
                "from posttrain.rewards.calls import outcome\noutcome(origin.load(), columns, rows)\n"
                "print(','.join({name.partition('.')[0] for name in sys.modules}))")
        examples = self._examples(component)
        given_ = pickle.dumps((_origin(component), self._columns(component, examples), len(examples)))
        done = subprocess.run([sys.executable, "-c", code], input=given_, capture_output=True, check=False,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
        assert done.returncode == 0, f"it cannot be called in a fresh process:\n{done.stderr.decode()}"
        heavy = TRAINING & set(done.stdout.decode().split("\n")[-2].split(","))
        assert not heavy, f"calling {named(component)} imports {', '.join(sorted(heavy))}"

    # ---- the component as the loop calls it

    def _examples(self, component: Any) -> Sequence[Example]:
        examples = self.examples(component)
        assert len({e.reward for e in examples}) > 1, "examples() must hold rows with different rewards"
        return examples

    def _call(self, component: Any) -> Callable[..., Any]:
        call: Callable[..., Any] = component if callable(component) else component.load(1)
        return call

    def _columns(self, component: Any, examples: Sequence[Example]) -> dict[str, list[Any]]:
        """What the loop would give: everything that the signature accepts."""
        return accepted_by(self._entry(component), self._call(component), columns_of(_rollouts(examples)))

    def _rewards(self, component: Any, examples: Sequence[Example]) -> list[float | None]:
        found = outcome(self._call(component), self._columns(component, examples), len(examples))
        return self._numbers(component, examples, found)

    def _numbers(self, component: Any, examples: Sequence[Example], found: Outcome) -> list[float | None]:
        """One for each example."""
        row = found.row if isinstance(found, Wrong) else None
        asked = f"{len(examples)} examples together" if row is None else f"the example {examples[row].completion!r}"
        assert isinstance(found, Returned), self._told(component, found, asked, "give a number or None")
        return list(found.numbers)

    def _told(self, component: Any, found: Outcome, asked: str, remedy: str) -> str:
        """What came of a call, in the words of a run."""
        entry = replace(self._entry(component), name=named(component))
        match found:
            case Returned(numbers):
                what = f"reward '{entry.name}' returned {list(numbers)} on {asked}"
            case Wrong(said_of_it, _):
                what = f"reward '{entry.name}' returned {said_of_it} on {asked}"
            case _:
                what = said(entry, found, f" on {asked}").splitlines()[0]
        return "\n".join([f"{what}; {remedy}", *([found.traceback] if isinstance(found, Raised) else [])])

    def _entry(self, component: Any) -> _Entry:
        return _Entry(component, self.deadline, _origin(component) if callable(component) else None)

    def _in_workers(self, component: Any, calls: Sequence[Sequence[Example]]) -> list[Outcome]:
        """The outcome of each call, in a worker that is killed at the deadline."""
        with Pool([self._entry(component)], 1) as pool:
            return pool.run([Job(0, tuple(range(len(rows))), self._columns(component, rows)) for rows in calls])


@final
@dataclass(frozen=True, slots=True)
class _Entry:
    """A reward as a configuration names it."""

    call: Callable[..., Any] | RewardSource
    timeout: float
    origin: Origin | None
    name: str = "reward"
    weight: float = 1.0
    on_error: Rule = "fail"
    on_timeout: Rule = "fail"
    bootstrap: bool = False
    bound: None = None


def _rollouts(examples: Sequence[Example]) -> Rollouts:
    """The examples as answers of a policy: a prompt of one token, then the answer's bytes."""
    tokens = [[0, *(list(e.completion.encode()) or [0])] for e in examples]
    lengths, E = np.array([len(t) for t in tokens], np.int64), len(examples)
    offsets = offsets_of(lengths)
    is_action = np.ones(offsets[-1], bool)
    is_action[offsets[:-1]] = False
    return Rollouts(
        tokens=np.concatenate([np.array(t, np.int32) for t in tokens]), offsets=offsets, episode=np.arange(E),
        is_action=is_action, group=np.arange(E), finish=np.full(E, FINISH.index("eos"), np.int8),
        terminated=np.ones(E, bool), completions=tuple(e.completion for e in examples),
        prompts=tuple(Prompt(text=e.prompt, extra=e.columns, where=f"example {i}") for i, e in enumerate(examples)))


def _origin(component: Any) -> Origin:
    """How another process makes the component again: by its module, or by its file where no module is found."""
    cls = component if isfunction(component) else type(component)
    fields = {f.name: getattr(component, f.name) for f in config_fields(component)}
    place = cls.__module__ if _importable(cls.__module__) else str(getsourcefile(cls))
    return Origin(f"{place}:{cls.__qualname__}", fields)


def _importable(module: str) -> bool:
    """Whether a fresh interpreter with this one's path finds the module."""
    path: Sequence[str] | None = None
    parts = module.split(".")
    for i in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: i + 1]), path)
        if spec is None or (spec.origin is None and i + 1 == len(parts)):
            return False
        path = spec.submodule_search_locations
    return True


@cache
def _loaded(contract: type[TaskContract], component: bytes) -> PromptSource:
    found: PromptSource = pickle.loads(component).load(contract().tokenizer(), RowRules())
    return found
