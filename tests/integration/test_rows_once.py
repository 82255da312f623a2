"""A run reads its rows once, and a resumed one sees the prompts that it saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import posttrain
import pytest
from integration import small
from posttrain import compose, config
from posttrain.errors import DataError
from posttrain.registry import discover
from posttrain.rundir import CONFIG
from posttrain.tasks import source

pytest.importorskip("torch")

ROWS = [{"prompt": f"{i}+1=", "answer": str(i + 1), "near": (i, i + 2)} for i in range(4)]


def settings(folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = small.config(
        folder / "run", steps=3, task=task, evaluate={"every": 0}, checkpoint={"every": 0})
    return found


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tables that were checked, by name."""
    names, real = list[str](), source.load

    def counted(learn: source.Table, *rest: Any) -> Any:
        names.append(learn.name)
        return real(learn, *rest)

    monkeypatch.setattr("posttrain.tasks.rows.load", counted)
    return names


def test_a_file_is_read_once(tmp_path: Path, checked: list[str]) -> None:
    (path := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    posttrain.train(settings(tmp_path, {"use": "rows", "path": str(path)}), output="quiet")
    assert checked == [str(path)]


def test_rows_from_python_are_those_that_a_resumed_run_reads(tmp_path: Path, checked: list[str]) -> None:
    given = config.load(settings(tmp_path, {"use": "rows", "rows": ROWS}), (), discover())
    run = posttrain.train(settings(tmp_path, {"use": "rows", "rows": ROWS}), output="quiet")
    assert checked == ["rows"]
    # the reward of these runs comes from Python, which a file cannot name
    kept = config.load(run.directory / CONFIG, ["rewards.correct=exact_match"], discover())
    opened = [compose.open_task(loaded.settings)[1].take(0, 9, 3) for loaded in (given, kept)]
    first, second = ([(p.text, p.messages, p.group, p.extra) for p in prompts] for prompts in opened)
    assert first == second and first[0][3]["near"] == [first[0][2], first[0][2] + 2]
    assert checked[1:] == ["rows", str(run.directory.resolve() / "path.jsonl")]


def test_no_directory_is_made_for_malformed_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 of 5 rows"):
        posttrain.train(settings(tmp_path, {"use": "rows", "rows": [*ROWS, {"prompt": ""}]}), output="quiet")
    assert not (tmp_path / "run").exists()
