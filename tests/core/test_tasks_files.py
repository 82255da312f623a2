"""Files other than plain JSONL, and files larger than memory: the same rows, order and errors as a list in memory."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from posttrain.data import Prompt
from posttrain.errors import DataError, PluginError
from posttrain.protocols import PromptSource, RowRules
from posttrain.tasks import storage
from posttrain.tasks.rows import Rows
from posttrain.tokenizers import Bytes

BYTES, RULES = Bytes().load(), RowRules()
TEXTS: list[dict[str, Any]] = [{"prompt": f"{i}+1=, or \"{i}\"\nand {i}", "answer": str(i + 1)} for i in range(50)]
CHATS: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": f"é {i}"}], "extra_info": {"answer": i}}
                               for i in range(50)]


def opened(path: Path, rules: RowRules = RULES, **fields: Any) -> PromptSource:
    return Rows(path=str(path), **fields).load(BYTES, rules)


def bare(prompts: Any) -> list[tuple[Any, ...]]:
    """All of prompts but where they stand."""
    return [(p.text, p.messages, dict(p.extra), p.group) for p in prompts]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def written(folder: Path, ending: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"rows{ending}"
    if ending.endswith(".gz"):
        path.write_bytes(gzip.compress(jsonl(rows)))
    elif ending == ".jsonl":
        path.write_bytes(jsonl(rows))
    elif ending == ".csv":
        def quoted(v: str) -> str:
            return '"' + v.replace('"', '""') + '"'
        path.write_text("prompt,answer\n" + "".join(f"{quoted(r['prompt'])},{r['answer']}\n" for r in rows))
    else:
        pa = pytest.importorskip("pyarrow")
        table = pa.Table.from_pylist(rows)
        if ending == ".parquet":
            from pyarrow import parquet
            parquet.write_table(table, path, row_group_size=7)
        elif ending == ".feather":
            from pyarrow import feather
            feather.write_feather(table, str(path), compression="lz4", chunksize=7)
        else:
            make = pa.ipc.new_file if ending == ".arrow" else pa.ipc.new_stream
            with make(str(path), table.schema) as writer:
                writer.write_table(table, max_chunksize=7)
    return path


@pytest.mark.parametrize(("ending", "rows"), [
    pytest.param(ending, rows, id=f"{ending} {what}") for what, rows in (("texts", TEXTS), ("chats", CHATS))
    for ending in (".jsonl", ".jsonl.gz", ".csv", ".parquet", ".feather", ".arrow", ".ipc")
    if ending != ".csv" or rows is TEXTS])  # CSV holds texts alone
@pytest.mark.parametrize("kept", [storage.KEPT, 0], ids=["in memory", "on disk"])
def test_every_form_gives_the_prompts_of_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str,
                                                rows: list[dict[str, Any]], kept: int) -> None:
    monkeypatch.setattr(storage, "KEPT", kept)
    path = written(tmp_path, ending, rows)
    for fields in ({}, {"limit": 11}, {"held_out_fraction": 0.3}, {"shuffle": False}):
        found, listed = opened(path, **fields), Rows(rows=tuple(rows), **fields).load(BYTES, RULES)
        assert found.rows == listed.rows
        assert bare(found.held_out()) == bare(listed.held_out())
        assert bare(found.take(17, 80, 3)) == bare(listed.take(17, 80, 3))


def test_places_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfprompt,answer\r\n"1\n+1",2\r\n\r\n3,4\r\n')
    assert [p.where.rpartition("a.csv")[2] for p in opened(tmp_path / "a.csv", shuffle=False).take(0, 2, 0)] == [
        ":2", ":5"]
    path = written(tmp_path, ".parquet", TEXTS)
    assert opened(path, shuffle=False).take(30, 1, 0)[0].where == f"{path}:row 31"


@pytest.mark.parametrize(("content", "where", "message"), [
    (b"prompt,answer\na,b\nc\n", ":3", "the row has 1 columns, but the first row names 2"),
    (b"prompt,answer\na,b\n\xff,c\nd,e\n", ":3", "byte 1 of the row is not UTF-8"),
    (b'prompt,answer\na,b\n"c"d,e\nf,g\n', ":3", "not CSV: "),
    (b'prompt,answer\na,b\n"c,e\nf,g\n', ":3", "not CSV: unexpected end of data"),
    (b"prompt,answer\n,b\nx,y\n", ":2", "column 'prompt' is empty"),
    (b"prompt,prompt\na,b\n", "", "the first row should name every column, each once"),
    (b"prompt,answer\n", "", "there is no row"), (b"", "", "there is no row"),
])
def test_bad_rows_of_csv(tmp_path: Path, content: bytes, where: str, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        opened(path)
    assert [p.where for p in caught.value.problems] == [f"{path}{where}"]
    assert message in caught.value.problems[0].message


def test_a_long_field_of_csv(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt\n" + "x" * 200_000 + "\n")
    assert len(opened(tmp_path / "rows.csv").take(0, 1, 0)[0].text or "") == 200_000


def test_bad_rows_of_parquet_and_values_that_json_cannot_hold(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    rows = [{"prompt": "a", "at": datetime(2024, 1, 2), "image": b"x", "tags": [{"at": datetime(2024, 1, 2)}]},
            {"prompt": None, "at": None, "image": None, "tags": None}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"'prompt' should be text or a list of messages, found null.*parquet:row 2\)"):
        opened(tmp_path / "rows.parquet")
    (row,) = opened(tmp_path / "rows.parquet", RowRules("skip")).take(0, 1, 0)
    assert set(row.extra) == {"at", "tags"} and row.extra["at"].startswith("2024-01-02 00:00:00")
    assert row.extra["tags"][0]["at"].startswith("2024-01-02") and "left out 'image' (binary)" in caplog.text
    json.dumps(row.extra)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "rows.jsonl.gz"])
@pytest.mark.parametrize("content", [b"", b"no such format", None])
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None) -> None:
    if not name.startswith("rows.jsonl"):
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read|there is no row"):
        opened(tmp_path / name)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(PluginError, match=r"pip install 'posttrain-core\[data\]'"):
        opened(tmp_path / "rows.parquet")


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(jsonl(TEXTS[20:]))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS[:20])))
    (tmp_path / "README.md").write_text("notes")
    for fields in ({}, {"limit": 30}, {"limit": 5}):
        listed = Rows(rows=tuple(TEXTS), **fields).load(BYTES, RULES)
        assert bare(opened(tmp_path, **fields).take(3, 60, 1)) == bare(listed.take(3, 60, 1))
    (tmp_path / "b.jsonl").write_bytes(b"{\n")
    with pytest.raises(DataError, match=r"b\.jsonl:1\)"):
        opened(tmp_path)


def test_a_large_file_that_changes_is_an_error_and_a_small_one_does_not_matter(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, ".jsonl", TEXTS)
    small = opened(path)
    monkeypatch.setattr(storage, "KEPT", 0)
    large = opened(path)
    before = bare(large.take(0, 5, 0))
    path.write_bytes(jsonl(TEXTS[:40]))
    assert bare(small.take(0, 5, 0)) == before
    with pytest.raises(DataError, match=r"the file was changed after its rows were checked.*rows\.jsonl\)"):
        list(large.take(0, 5, 0))


def test_a_line_without_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.tasks.records.LONGEST", 100)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps([{"prompt": "x" * 100}]))
    with pytest.raises(DataError, match=r"longer than .*rows\.jsonl:2\)"):
        opened(tmp_path / "rows.jsonl")


def test_prompts_are_a_sequence() -> None:
    rows = Rows(rows=tuple(TEXTS), shuffle=False).load(BYTES, RULES).take(0, 50, 0)
    assert isinstance(rows[0], Prompt) and rows[-1] == rows[49] and list(rows[2:4]) == [rows[2], rows[3]]
    assert rows == list(rows) and rows[:2] != rows[1:3]
    with pytest.raises(IndexError):
        rows[50]


BOUNDED = """
import resource, sys
from posttrain.protocols import RowRules
from posttrain.tasks.rows import Rows
from posttrain.tokenizers import Bytes
def peak():  # in MiB; macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
task = Rows(rows=({"prompt": "a"},))
task.load(Bytes().load(), RowRules())
before = peak()
source = Rows(path=sys.argv[1]).load(Bytes().load(), RowRules())
assert len(list(source.take(source.rows - 32, 64, 1))) == 64
print(source.rows, peak() - before)
"""


@pytest.mark.parametrize("megabytes", [80, pytest.param(2048, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, megabytes: int) -> None:
    """Rows of about 2 KB: what is kept of one is 8 bytes of the index, some for its order and one for the check."""
    path, rows = tmp_path / "rows.jsonl", megabytes * 500
    with path.open("wb") as file:
        for i in range(rows):
            file.write(b'{"prompt": "%d %s", "answer": "%d"}\n' % (i, b"word " * 412, i))
    assert path.stat().st_size > megabytes << 20
    done = subprocess.run([sys.executable, "-c", BOUNDED, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, grown = done.stdout.split()
    assert int(found) == rows and float(grown) < 24 + 64 * rows / 2**20
