"""The pages of `docs/`: every key of ours in the tables exists, and the glossary is in order."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from posttrain.annotations import hints_of
from posttrain.config import RewardEntry, load
from posttrain.fitting import check
from posttrain.recipes import RECIPES
from posttrain.registry import discover
from posttrain.schema import Settings
from posttrain.synonyms import CALLED_HERE

DOCS = Path(__file__).parents[2] / "docs"
REGISTRY = discover()


def tables(text: str) -> Iterator[list[str]]:
    """Cells of every row below the head of a table."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and not set(cells[0]) <= {"-"} and cells[1] != "here":
            yield cells


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


OURS = sorted({key for row in tables((DOCS / "coming_from.md").read_text()) for key in named(row[1])})


def exists(parts: Sequence[str], cls: Any = Settings) -> bool:
    """Whether a dotted key stands in a dataclass, in a block of it, or in some component that fits there."""
    found: dict[str, Field[Any]] = {f.name: f for f in fields(cls)}
    if parts[0] not in found:
        return False
    rest, meta = parts[1:], found[parts[0]].metadata
    if meta.get("many"):  # a name of the user's stands between
        rest = rest[1:]
    if not rest:
        return True
    if kind := meta.get("kind"):
        components = [REGISTRY.load(c) for c in REGISTRY.components(kind)]
        own = kind == "reward" and exists(rest, RewardEntry)
        return own or any(is_dataclass(c) and exists(rest, c) for c in components)
    hint = hints_of(cls)[parts[0]]
    return any(is_dataclass(h) and exists(rest, h) for h in (hint, *get_args(hint)))


@pytest.mark.parametrize(("theirs", "ours"), CALLED_HERE.items())
def test_what_errors_say_of_keys_elsewhere_is_in_a_table(theirs: str, ours: str) -> None:
    """Some row holds their key, with or without its block, and ours; a word that we use ourselves is no synonym."""
    rows = tables((DOCS / "coming_from.md").read_text())
    assert any(theirs in [name.rpartition(".")[2] for name in named(row[0])] and ours in {
        name.partition(":")[0] for name in named(row[1])} for row in rows)


@pytest.mark.parametrize("key", OURS)
def test_a_key_of_ours_exists(key: str) -> None:
    if key.startswith("posttrain "):
        return
    name, _, value = key.partition(": ")
    if name == "recipe":
        assert value in RECIPES
        return
    assert exists(name.split(".")), f"{name} is no key"
    kind = next((f.metadata.get("kind") for f in fields(Settings) if f.name == name), None)
    if value and kind:
        assert value in REGISTRY.names(kind), f"{value} is no {kind}"


def test_the_tables_are_read() -> None:
    assert len(OURS) > 45 and "objective.clip_low" in OURS and "policy.adapter" in OURS
    assert not exists(["objective", "clip_lo"]) and not exists(["rollouts"]) and not exists(["policy", "adapter", "x"])
    assert exists(["policy", "adapter", "rank"]) and exists(["rewards", "mine", "weight"])


def test_keys_in_remarks_exist_too() -> None:
    """Dotted keys of ours in the last column and in the text above the tables."""
    blocks = {f.name for f in fields(Settings)}
    text = (DOCS / "coming_from.md").read_text() + (DOCS / "glossary.md").read_text()
    remarks = [key for row in tables(text) for key in named(row[2])]
    remarks += [key for line in text.splitlines() if not line.startswith("|") for key in named(line)]
    dotted = {m[1] for key in remarks if (m := re.match(r"([a-z_]+(?:\.[a-z_]+)+)(?:$|: )", key))}
    ours = {key for key in dotted if key.partition(".")[0] in blocks and not key.endswith(".yaml")}
    assert len(ours) >= 8
    assert [key for key in sorted(ours) if not exists(key.split("."))] == []


def test_the_glossary_is_alphabetical_and_short() -> None:
    lines = [line for line in (DOCS / "glossary.md").read_text().splitlines() if line.startswith("**")]
    terms = [re.sub(r"[^a-z ]", " ", line.split("**")[1].lower()) for line in lines]
    assert terms == sorted(terms) and len(set(terms)) == len(terms) > 40
    assert all(len(line) < 330 for line in lines)


def configurations() -> list[Any]:
    """The YAML blocks of all pages but the guide to plugins, which has tests of its own."""
    return [pytest.param(block, id=f"{page.stem}-{i}") for page in sorted(DOCS.glob("*.md"))
            for i, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL))]


@pytest.mark.needs("posttrain_estimators", "posttrain_objectives", "posttrain_backends")
@pytest.mark.parametrize("block", configurations())
def test_configurations_of_the_pages_fit_together(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a task, a reward where none is named, and what they say themselves."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to" / "folder").mkdir(parents=True)
    own = yaml.safe_load(block)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "answer": "a", "completion": "a"}\n')
    supervised = own.get("loop") == "supervised" or RECIPES[own.get("recipe", "grpo")].settings.get("loop")
    around = {"task": {"use": "rows", "path": str(tmp_path / "rows.jsonl")},
              **({} if supervised else {"rewards": {"correct": "exact_match"}})}
    check(load({**around, **own}, [], REGISTRY))
