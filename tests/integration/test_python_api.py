"""Training from Python: a dict, functions as rewards, lists as data; what the run keeps can be run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import posttrain
import pytest
from integration import small
from posttrain.rundir import read_metrics

pytest.importorskip("torch")


def test_a_dict_with_functions_and_lists(tmp_path: Path) -> None:
    run = posttrain.train(small.config(tmp_path / "run", task={"use": "rows", "rows": small.ROWS,
                                                               "held_out_rows": small.ROWS[:5]}), output="quiet")
    assert run.state.step == 6 and run.directory == tmp_path / "run"
    assert [line["step"] for line in read_metrics(run.directory)] == list(range(7))
    assert (run.directory / "path.jsonl").read_text().count("\n") == len(small.ROWS)


def test_the_kept_config_repeats_the_run(tmp_path: Path) -> None:
    """Rows became files of the run, and the function is named by its file."""
    first = posttrain.train(small.config(tmp_path / "a", task=small.ROWS, evaluate={"every": 0}), output="quiet")
    again = posttrain.train(first.directory / "config.yaml", [f"run={tmp_path / 'b'}"], output="quiet")
    def history(directory: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if k != "timing"} for line in read_metrics(directory)]
    assert history(first.directory) == history(again.directory)


def test_evaluate_and_sample(tmp_path: Path) -> None:
    run = posttrain.train(small.config(tmp_path / "run"), output="quiet")
    found = posttrain.evaluate(run.directory)
    assert found["eval/reward/mean"] == read_metrics(run.directory)[-1]["eval/reward/mean"]
    answers = posttrain.sample(run.directory, "1+2=", n=3)
    assert len(answers) == 3 and all(len(text) <= 4 for text in answers)
    assert posttrain.sample(run.directory, "1+2=", temperature=0) == posttrain.sample(run.directory, "1+2=",
                                                                                      temperature=0)
