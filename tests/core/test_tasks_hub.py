"""The task `hub` on local data sets; without a network, what failed and what to do instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from posttrain.errors import DataError
from posttrain.protocols import RowRules
from posttrain.tasks.hub import Hub
from posttrain.tasks.rows import Rows
from posttrain.tokenizers import Bytes

datasets = pytest.importorskip("datasets")
BYTES, RULES = Bytes().load(), RowRules()
ROWS: list[dict[str, Any]] = [{"prompt": [{"role": "user", "content": f"{i}?"}], "answer": i} for i in range(40)]


def bare(prompts: Any) -> list[tuple[Any, ...]]:
    return [(p.text, p.messages, dict(p.extra), p.group) for p in prompts]


@pytest.fixture
def saved(tmp_path: Path) -> str:
    path = str(tmp_path / "saved")
    every = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": every.select(range(30)), "test": every.select(range(30, 40))}).save_to_disk(path)
    return path


def test_a_saved_data_set_gives_the_prompts_of_a_list(saved: str) -> None:
    found = Hub(path=saved, held_out="test").load(BYTES, RULES)
    listed = Rows(rows=tuple(ROWS[:30]), held_out_rows=tuple(ROWS[30:])).load(BYTES, RULES)
    assert bare(found.take(7, 50, 2)) == bare(listed.take(7, 50, 2))
    assert bare(found.held_out()) == bare(listed.held_out())
    assert Hub(path=saved, limit=3, shuffle=False).load(BYTES, RULES).take(2, 1, 0)[0].where == f"{saved}[train]:row 3"


def test_a_folder_of_files_is_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = Hub(name=str(tmp_path / "folder"), split="train[:10]", held_out="train[10:12]").load(BYTES, RULES)
    listed = Rows(rows=tuple(ROWS[:10])).load(BYTES, RULES)
    assert bare(found.take(0, 20, 0)) == bare(listed.take(0, 20, 0)) and len(found.held_out()) == 2


def test_bad_rows_are_named(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": ""}]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"column 'prompt' is empty \(.*saved\[train\]:row 2\)"):
        Hub(path=str(tmp_path / "saved")).load(BYTES, RULES)


def test_what_is_not_there(saved: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'tst'; did you mean 'test'\?; it has train, test"):
        Hub(path=saved, split="tst").load(BYTES, RULES)
    with pytest.raises(DataError, match="not a folder that save_to_disk"):
        Hub(path=str(tmp_path)).load(BYTES, RULES)


def test_without_a_network_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        Hub(name="nobody/nothing", revision="0" * 40).load(BYTES, RULES)
    text = str(caught.value)
    assert "the data set cannot be loaded: " in text and "nobody/nothing" in text
    assert "task.path=FOLDER" in text and "save_to_disk" in text


def test_a_revision_that_is_no_commit_is_warned_of_and_the_commit_is_loaded(
        saved: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The hub's two answers are replaced: the commit of `main`, and the data set at that commit."""
    asked = []

    class Info:
        sha = "a" * 40

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> Any:
        asked.append((name, config, split, revision))
        return datasets.load_from_disk(saved)[split]
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, revision: Info())
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    Hub(name="some/data", config="main", revision="main").load(BYTES, RULES)
    assert asked == [("some/data", "main", "train", "a" * 40)]
    assert f"task.revision={'a' * 40}" in caplog.text
    caplog.clear()
    Hub(name="some/data", revision="b" * 40).load(BYTES, RULES)
    assert asked[-1][-1] == "b" * 40 and "pinned" not in caplog.text


@pytest.mark.parametrize("fields", [
    {}, {"name": "a", "path": "b"}, {"path": "a", "revision": "b"}, {"name": "a", "limit": -1},
    {"name": "a", "held_out": "b", "held_out_fraction": 0.1}])
def test_fields_that_make_no_sense(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="name|held|limit"):
        Hub(**fields)
