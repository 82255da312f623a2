"""Tokenizers, tasks and rewards of core under their contracts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from posttrain.rewards.code import Code
from posttrain.rewards.rules import ExactMatch, Length, Regex, Size
from posttrain.tasks.reasoning import ReasoningGym
from posttrain.tasks.rows import Rows
from posttrain.testing import Example, RewardContract, TaskContract, TokenizerContract
from posttrain.tokenizers import Bytes, Characters

LINES = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}assistant: "


class TestBytes(TokenizerContract):
    components = (Bytes(), Bytes(bos=True))


@pytest.mark.needs("jinja2")
class TestBytesWithATemplate(TokenizerContract):
    components = (Bytes(template=LINES),)


class TestCharacters(TokenizerContract):
    components = (Characters("0123456789+="), Characters(bos=True))

    def texts(self, component: Characters) -> st.SearchStrategy[str]:
        return st.text(component.alphabet, max_size=40)


ROWS: tuple[dict[str, Any], ...] = tuple(
    {"prompt": f"{i}+{i}=", "answer": str(2 * i), "level": i} for i in range(9, 16))


class TestRows(TaskContract):
    components = (Rows(rows=ROWS), Rows(rows=tuple(
        {"messages": [{"role": "user", "content": row["prompt"]}], **row} for row in ROWS), limit=5))
    columns = ("answer", "level")

    def broken(self, component: Rows, directory: Path) -> tuple[Rows, Sequence[str]]:
        path = directory / "rows.jsonl"
        lines = [json.dumps(row) for row in ROWS]
        lines[1], lines[3], lines[5] = "{no JSON", '{"prompt": ""}', '{"prompt": 7}'
        path.write_text("\n".join(lines), "utf-8")
        return Rows(path=str(path)), ("rows.jsonl:2", "rows.jsonl:4", "rows.jsonl:6")


class TestRowsInOrder(TaskContract):
    components = (Rows(rows=ROWS, shuffle=False),)
    shuffled = False

    def broken(self, component: Rows, directory: Path) -> tuple[Rows, Sequence[str]]:
        path = directory / "rows.csv.gz"
        path.write_bytes(gzip.compress(b"prompt,answer\na,1\n,2\nb,3\n,4\n"))
        return Rows(path=str(path)), ("rows.csv.gz:3", "rows.csv.gz:5")


class TestRowsHeldOut(TaskContract):
    components = (Rows(rows=ROWS, held_out_rows=ROWS[:2]), Rows(rows=ROWS, held_out_fraction=0.3, split_seed=4))
    has_held_out = True


@pytest.mark.slow
@pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="not measured: reasoning_gym is not installed")
class TestReasoningGym(TaskContract):
    components = (ReasoningGym(names=("chain_sum",), size=6, held_out_size=3, held_out_seed=100),)
    columns = ("answer", "entry", "dataset")
    has_held_out = True


class TestExactMatch(RewardContract):
    components = (ExactMatch(), ExactMatch(ignore_case=True))

    def examples(self, component: ExactMatch) -> Sequence[Example]:
        return (Example(" 2 ", 1.0, columns={"answer": 2}), Example("3", 0.0, columns={"answer": "2"}),
                Example("Two", float(component.ignore_case), columns={"answer": ["2", "two"]}),
                Example("2", None, columns={"answer": None}))


class TestRegex(RewardContract):
    components = (Regex(r"(\d+)"), Regex(r"(\d+)", answer_key="answer", which="last"))

    def examples(self, component: Regex) -> Sequence[Example]:
        compares = bool(component.answer_key)
        return (Example("3, no: 2", 1.0, columns={"answer": "2"}), Example("two", 0.0, columns={"answer": "2"}),
                Example("2, no: 3", float(not compares), columns={"answer": "2"}))


class TestLength(RewardContract):
    components = (Length(2, 6), Length(2, 6, unit="tokens"))

    def examples(self, component: Length) -> Sequence[Example]:
        return Example("ab", 0.0), Example("abc", -0.25), Example("abcdefgh", -1.0)


class TestWords(RewardContract):
    components = (Length(2, 6, unit="words"),)

    def examples(self, component: Length) -> Sequence[Example]:
        return Example("a b", 0.0), Example("a b  c", -0.25), Example("a " * 9, -1.0)


class TestSize(RewardContract):
    components = (Size(), Size("tokens"))

    def examples(self, component: Size) -> Sequence[Example]:
        return Example("ab", 2.0), Example("a b c", 5.0), Example("abcdefgh", 8.0)


class TestCode(RewardContract):
    components = (Code(seconds=2.0),)

    def examples(self, component: Code) -> Sequence[Example]:
        tests = {"tests": ["assert add(1, 2) == 3", "assert add(1, 1) == 2"]}
        return (Example("```python\ndef add(a, b):\n    return a + b\n```", 1.0, columns=tests),
                Example("def add(a, b): return 3", 0.5, columns=tests), Example("add", 0.0, columns=tests),
                Example("x", None, columns={"tests": None}))


if find_spec("math_verify") is not None:
    from posttrain.rewards.math import Math

    @pytest.mark.slow
    class TestMath(RewardContract):
        components = (Math(),)
        deadline = 8.0

        def examples(self, component: Math) -> Sequence[Example]:
            return (Example("it is $\\frac{1}{2}$", 1.0, columns={"answer": "0.5"}),
                    Example("\\boxed{3}", 0.0, columns={"answer": 2}), Example("3", None, columns={"answer": None}))
