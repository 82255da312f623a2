"""Rows: both formats, every kind of malformed row by file and line, held-out rows, and the endless order."""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from posttrain.data import Prompt
from posttrain.errors import DataError
from posttrain.protocols import RowRules
from posttrain.tasks import records
from posttrain.tasks import source as sources
from posttrain.tasks.formats import Row
from posttrain.tasks.rows import Rows
from posttrain.tasks.source import PromptRows
from posttrain.tokenizers import Bytes, Characters

BYTES = Bytes().load()
RULES = RowRules()
GOOD = {"prompt": "1+1=", "answer": "2"}
USER, SYSTEM = {"role": "user", "content": "hi"}, {"role": "system", "content": "be brief"}
ASSISTANT, TOOL = {"role": "assistant", "content": "hello"}, {"role": "tool", "content": "4"}


def written(folder: Path, *lines: object, name: str = "rows.jsonl") -> str:
    """A JSONL file: bytes as they are, anything else as JSON."""
    path = folder / name
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")
    return str(path)


def loaded(path: str, rules: RowRules = RULES, **fields: Any) -> tuple[Prompt, ...]:
    source = Rows(path=path, shuffle=False, **fields).load(BYTES, rules)
    return tuple(source.take(0, source.rows, 0))


def problems(path: str, rules: RowRules = RULES, **fields: Any) -> list[tuple[str, str]]:
    with pytest.raises(DataError) as caught:
        loaded(path, rules, **fields)
    return [(p.where.removeprefix(str(Path(path).parent) + "/"), p.message) for p in caught.value.problems]


def test_trl_text_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = written(tmp_path, GOOD, b"", {"prompt": "2+2=", "answer": "4", "level": 3})
    first, second = loaded(path)
    assert (first.text, first.extra, first.where) == ("1+1=", {"answer": "2"}, f"{path}:1")
    assert (second.text, second.extra, second.where) == ("2+2=", {"answer": "4", "level": 3}, f"{path}:3")
    assert f"{path}: 2 rows, TRL format, prompts in 'prompt'" in caplog.text


def test_trl_conversational_rows(tmp_path: Path) -> None:
    (row,) = loaded(written(tmp_path, {"prompt": [SYSTEM, USER], "answer": "x"}))
    assert row.messages == (SYSTEM, USER) and row.text is None and row.extra == {"answer": "x"}


def test_rl2_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    info = {"answer": "2", "level": 1}
    (row,) = loaded(written(tmp_path, {"messages": [USER, ASSISTANT, USER], "extra_info": info}))
    assert row.messages == (USER, ASSISTANT, USER) and row.extra == {"extra_info": info, **info}
    assert "RL2 format (extra_info), prompts in 'messages'" in caplog.text


@pytest.mark.parametrize(("row", "completion"), [
    ({"prompt": "a", "completion": "b"}, "b"),
    ({"prompt": "a", "response": "b"}, "b"),
    ({"prompt": [USER], "completion": [ASSISTANT]}, "hello"),
    ({"messages": [USER, ASSISTANT]}, "hello"),
    ({"messages": [USER, ASSISTANT, TOOL, ASSISTANT]}, "hello"),
])
def test_answers_for_supervised_training(tmp_path: Path, row: dict[str, Any], completion: str) -> None:
    (prompt,) = loaded(written(tmp_path, row))
    assert prompt.extra["completion"] == completion
    if "messages" in row:
        assert prompt.messages == tuple(row["messages"][:-1])


def test_keys_can_be_renamed(tmp_path: Path) -> None:
    (row,) = loaded(written(tmp_path, {"question": "q", "solution": "s"}), prompt_key="question",
                    completion_key="solution")
    assert (row.text, row.extra) == ("q", {"solution": "s", "completion": "s"})


def test_byte_order_mark_windows_lines_and_other_line_separators(tmp_path: Path) -> None:
    path = written(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r",
                   '{"prompt": "a\u2028b"}'.encode())
    assert [row.text for row in loaded(path)] == ["1+1=", "a\u2028b"]


BAD_ROWS: list[tuple[object, str]] = [
    (b'{"prompt": "a"', "not JSON: Expecting ',' delimiter at character 15"),
    (b'{"prompt": "\xff"}', "byte 13 of the line is not UTF-8 (invalid start byte); save the file as UTF-8"),
    (["a"], "a row is an object with columns, found a list"),
    (3, "a row is an object with columns, found a number"),
    ({"promt": "a"}, "column 'prompt' is missing; the row has promt"),
    ({}, "column 'prompt' is missing; the row has no column"),
    ({"prompt": 3}, "column 'prompt' should be text or a list of messages, found a number"),
    ({"prompt": None}, "column 'prompt' should be text or a list of messages, found null"),
    ({"prompt": True}, "column 'prompt' should be text or a list of messages, found true or false"),
    ({"prompt": USER}, "column 'prompt' should be text or a list of messages, found an object"),
    ({"prompt": ""}, "column 'prompt' is empty"),
    ({"prompt": " \n"}, "column 'prompt' is empty"),
    ({"prompt": []}, "column 'prompt' is empty"),
    ({"prompt": ["a"]}, "column 'prompt': message 0 should be an object with role and content, found text"),
    ({"prompt": [{"role": "user"}]}, "column 'prompt': message 0: 'content' should be text, found null"),
    ({"prompt": [{"role": 1, "content": "a"}]}, "column 'prompt': message 0: 'role' should be text, found a number"),
    ({"prompt": [USER | {"tool_calls": []}]}, "column 'prompt': message 0: 'tool_calls' should be text, found a list"),
    ({"prompt": [USER | {"role": "human"}]}, "column 'prompt': message 0: role 'human' is none of system, developer, "
                                             "user, assistant, tool"),
    ({"prompt": [ASSISTANT, USER]}, "column 'prompt': message 0: role 'assistant' at the start, expected developer or "
                                    "system or user"),
    ({"prompt": [USER, USER]}, "column 'prompt': message 1: role 'user' after 'user', expected assistant"),
    ({"prompt": [USER, SYSTEM]}, "column 'prompt': message 1: role 'system' after 'user', expected assistant"),
    ({"prompt": [USER | {"content": " "}]}, "column 'prompt': message 0 ('user') is empty"),
    ({"prompt": [SYSTEM]}, "column 'prompt': ends with 'system', but the policy answers a user (or a tool); remove the "
                           "last message"),
    ({"prompt": [USER, ASSISTANT]}, "column 'prompt': ends with 'assistant', but the policy answers a user (or a "
                                    "tool); remove the last message"),
    ({"prompt": "a", "completions": 1}, "column 'completions' has the name of an argument of every reward; rename it"),
    ({"prompt": "a", "extra_info": {"prompts": 1}}, "column 'extra_info' holds 'prompts', which is also an argument of "
                                                    "every reward; rename it"),
    ({"prompt": "a", "answer": 1, "extra_info": {"answer": 2}}, "column 'extra_info' holds 'answer', which is also a "
                                                                "column with another value"),
    (b'{"prompt": "a\\ud800"}', "column 'prompt': character '\\ud800' at position 1 of 'a\\ud800' is half of a "
                                "surrogate pair, which is no text; mend the row"),
    ({"prompt": "0123456789"}, "column 'prompt' has 10 tokens, more than data.max_prompt_tokens, 9"),
]


@pytest.mark.parametrize(("line", "message"), BAD_ROWS)
def test_a_bad_row_is_named_by_file_line_and_column(tmp_path: Path, line: object, message: str) -> None:
    path = written(tmp_path, GOOD, b"", line, GOOD)
    assert problems(path, RowRules(max_prompt_tokens=9)) == [("rows.jsonl:3", message)]
    assert len(loaded(path, RowRules("skip", 9))) == 2


@pytest.mark.parametrize(("answered", "line", "message"), [
    ({"prompt": "a", "completion": "b"}, {"prompt": "a"}, "column 'completion' is missing; other rows have it"),
    ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}, "column 'completion' is empty"),
    ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 2},
     "column 'completion' should be text or one assistant message, found a number"),
    ({"messages": [USER, ASSISTANT]}, {"messages": [USER]},
     "column 'messages': ends with 'user', but other rows end with the assistant's answer; add the answer"),
    ({"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT | {"content": ""}]},
     "column 'messages': the assistant's answer is empty"),
    ({"messages": [USER, ASSISTANT]}, {"messages": "hi"},
     "column 'messages' is text, but other rows hold conversations that end with the answer"),
])
def test_a_bad_answer_is_named(tmp_path: Path, answered: object, line: object, message: str) -> None:
    assert problems(written(tmp_path, answered, answered, line)) == [("rows.jsonl:3", message)]


def test_what_the_tokenizer_cannot_encode_is_a_bad_row(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "1+1", "completion": "2"}, {"prompt": "1-1", "completion": "zero"})
    with pytest.raises(DataError) as caught:
        Rows(path=path).load(Characters("0123456789+").load(), RULES)
    first, second = caught.value.problems
    assert (first.where, second.where) == (f"{path}:2", f"{path}:2")
    assert "column 'prompt': character '-' at position 1" in first.message
    assert "column 'completion': character 'z' at position 0" in second.message


def test_a_column_that_no_reader_needs_is_left_alone(tmp_path: Path) -> None:
    (row,) = loaded(written(tmp_path, {"prompt": "a", "response": {"score": 1}}))
    assert row.extra == {"response": {"score": 1}}


def test_both_files_are_reported_at_once_and_the_list_is_cut(tmp_path: Path) -> None:
    train = written(tmp_path, *[{"prompt": ""}] * 30, GOOD)
    held_out = written(tmp_path, GOOD, {"prompt": 1}, name="held_out.jsonl")
    with pytest.raises(DataError) as caught:
        loaded(train, held_out=held_out)
    assert len(caught.value.problems) == 20
    text = str(caught.value)
    assert "rows.jsonl: 30 of 31 rows cannot be used" in text and "held_out.jsonl: 1 of 2 rows cannot be used" in text
    assert "and 11 more problems" in text and "data.on_bad_row=skip" in text


def test_skipped_rows_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, GOOD, {"prompt": ""}, b"{")
    assert len(loaded(path, RowRules("skip"))) == 1
    assert "left out 2 of 3 rows, the first for: column 'prompt' is empty" in caplog.text and ":2)" in caplog.text


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_no_good_row_is_an_error_in_any_case(tmp_path: Path, policy: Literal["fail", "skip"]) -> None:
    with pytest.raises(DataError, match=r"2 of 2 rows cannot be used(.|\n)*no row of .*rows\.jsonl is left"):
        loaded(written(tmp_path, b"{", {"prompt": ""}), RowRules(policy))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"there is no row.*rows\.jsonl"):
        loaded(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("name", ["absent.jsonl", ""])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"cannot be read"):
        loaded(str(tmp_path / name))


def test_no_prompt_column_suggests_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"did you mean 'prompts_'\?; the columns are prompts_, x.*task\.prompt_key"):
        loaded(written(tmp_path, {"prompts_": "a", "x": 1}))


def test_rows_from_python() -> None:
    task = Rows(rows=(GOOD, {"prompt": "b", "key": (1, 2)}), held_out_rows=({"prompt": "c"},), shuffle=False)
    source = task.load(BYTES, RULES)
    assert [p.where for p in source.take(0, 2, 0)] == ["rows[0]", "rows[1]"]
    assert source.take(1, 1, 0)[0].extra == {"key": [1, 2]}  # as a resumed run reads it from the file
    assert [(p.text, p.where) for p in source.held_out()] == [("c", "held_out_rows[0]")]
    with pytest.raises(DataError, match=r"rows\[1\]"):
        Rows(rows=(GOOD, {"prompt": ""})).load(BYTES, RULES)


def test_rows_from_python_that_cannot_be_kept_are_named_before_a_run_begins() -> None:
    rows = (GOOD, {"prompt": "b", "key": {1, 2}}, {"prompt": "c", "key": "\ud800"})
    with pytest.raises(DataError, match=r"2 of 3 rows cannot be kept(.|\n)*rows\[1\](.|\n)*rows\[2\]"):
        Rows(rows=rows).load(BYTES, RULES)


def test_limit_cuts_the_rows_to_learn_from(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD, GOOD, b"{")
    source = Rows(path=path, held_out=written(tmp_path, GOOD, GOOD, GOOD, name="h.jsonl"), limit=2).load(BYTES, RULES)
    assert source.rows == 2 and len(source.held_out()) == 3


@pytest.mark.parametrize("fields", [
    {}, {"path": "a", "rows": (GOOD,)}, {"path": "a", "held_out": "b", "held_out_fraction": 0.1},
    {"path": "a", "held_out_fraction": 1.0}, {"path": "a", "limit": -1}])
def test_fields_that_make_no_sense(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="path|held|limit"):
        Rows(**fields)


@given(n=st.integers(2, 40), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 5))
def test_a_split_keeps_every_row_once_and_the_order(n: int, fraction: float, seed: int) -> None:
    task = Rows(rows=tuple({"prompt": str(i)} for i in range(n)), held_out_fraction=fraction, split_seed=seed,
                shuffle=False)
    if not 0 < round(fraction * n) < n:
        with pytest.raises(DataError, match="leaves nothing on one side"):
            task.load(BYTES, RULES)
        return
    source = task.load(BYTES, RULES)
    train = [int(p.text or "") for p in source.take(0, source.rows, 0)]
    held = [int(p.text or "") for p in source.held_out()]
    assert sorted(train + held) == list(range(n)) and len(held) == round(fraction * n)
    assert train == sorted(train) and held == sorted(held)
    assert task.load(BYTES, RULES).held_out() == source.held_out()


SOURCE = Rows(rows=tuple({"prompt": str(i)} for i in range(7))).load(BYTES, RULES)
assert isinstance(SOURCE, PromptRows)


@given(cursor=st.integers(0, 50), count=st.integers(0, 30), seed=st.integers(0, 3))
def test_take_is_a_window_of_one_endless_sequence(cursor: int, count: int, seed: int) -> None:
    endless = list(SOURCE.take(0, 100, seed))
    assert list(SOURCE.take(cursor, count, seed)) == endless[cursor: cursor + count]


@given(epoch=st.integers(0, 20), seed=st.integers(0, 5))
def test_each_epoch_holds_every_row_once(epoch: int, seed: int) -> None:
    assert Counter(p.text for p in SOURCE.take(7 * epoch, 7, seed)) == Counter(map(str, range(7)))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(p.text for p in SOURCE.take(7 * epoch, 7, seed)) for epoch in range(5) for seed in range(5)}
    assert len(orders) > 20


def test_unshuffled_rows_keep_their_order() -> None:
    taken = PromptRows(SOURCE.train, shuffle=False).take(5, 5, 0)
    assert [p.text for p in taken] == ["5", "6", "0", "1", "2"]


@pytest.mark.parametrize("first", [{"prompt": "a"}, {"text": "a"}])
def test_what_the_first_rows_hold_does_not_decide(tmp_path: Path, first: dict[str, str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """The meaning of the columns is guessed by the first rows, and found by all."""
    monkeypatch.setattr(sources, "_FIRST", 1)
    rest = [{"messages": [USER, ASSISTANT]}] * 3
    with pytest.raises(DataError, match=r"1 of 4 rows cannot be used(.|\n)*'messages' is missing(.|\n)*:1\)"):
        loaded(written(tmp_path, first, *rest))
    found = loaded(written(tmp_path, first, *rest), RowRules(on_bad_row="skip"))
    assert [(p.messages, p.extra["completion"]) for p in found] == [((USER,), "hello")] * 3


def indexed_slowly(data: bytes, limit: int) -> list[tuple[int, bytes]]:
    """Line and content of the rows that are not blank, by the definition."""
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    return rows[: limit or None]


@given(st.lists(st.sampled_from([b"\n", b"\r\n", b" ", b"\t", b'{"a": 1}', b" {}", b"x\x0b"]), max_size=30),
       st.booleans(), st.integers(0, 6), st.integers(1, 9))
def test_the_index_of_lines(parts: list[bytes], marked: bool, limit: int, block: int) -> None:
    data = b"\xef\xbb\xbf" * marked + b"".join(parts)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(records, "BLOCK", block)
        patch.setattr(records, "AT_ONCE", 3)
        (path := Path(folder, "rows.jsonl")).write_bytes(data)
        found = replace(records.read_jsonl(str(path), limit), parse=lambda raw, where: Row(where, {"raw": raw}))
        wanted = [(f"{path}:{number}", line) for number, line in indexed_slowly(data, limit)]
        for rows in (list(found), [found[i] for i in range(len(found))]):
            assert [(row.where, row.columns["raw"].partition(b"\n")[0]) for row in rows] == wanted
