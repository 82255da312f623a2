"""The task `reasoning_gym` and its reward: puzzles that the library of that name makes and scores.

Rows are made in a process of their own with a fixed hash seed, because some of the library's generators go through sets
and would make other puzzles in each process. A row carries its whole entry as text, so that its answer is scored by the
library's own rule in any process. Knows nothing of models.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, final

from posttrain.errors import ConfigError, PluginError, did_you_mean
from posttrain.protocols import PromptSource, RowRules, Tokenizer
from posttrain.tasks.formats import Keys
from posttrain.tasks.records import read_jsonl
from posttrain.tasks.source import Split, Table, load

ENTRY = "entry"
"""Column that holds what the reward needs: data set, its settings and the entry, as a Python literal (which, unlike
JSON, keeps tuples and keys that are numbers: some of the library's rules tell them apart)."""


@final
@dataclass(frozen=True, slots=True)
class ReasoningGym:
    """Puzzles of one or more data sets of reasoning-gym, in turn. Equal fields give equal rows.

    Rows have the columns `prompt`, `answer` (the library's, where there is one), `dataset` and `entry`; the reward
    `reasoning_gym` scores them.
    """

    names: tuple[str, ...] = ()
    """Data sets of the library, for example `[chain_sum, gcd]`; row i comes from the next one in turn."""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Data set -> fields of its own configuration: `{chain_sum: {min_terms: 2, max_terms: 3}}`."""
    size: int = 1000
    """Rows to learn from, of all data sets together."""
    seed: int = 0
    """Entry i of a data set is drawn by seed + i."""
    held_out_size: int = 0
    """Rows to evaluate on."""
    held_out_seed: int = 1_000_000_000
    """As `seed`, of the rows to evaluate on; so far away that no entry is drawn by one seed in both."""
    system: str = ""
    """System message in front of every question; makes prompts conversations."""
    template: str = "{question}"
    """What is asked: a text that holds `{question}`."""
    chat: bool = False
    """Prompts are conversations of one user message, also without a system message."""
    shuffle: bool = True
    """A new order in each epoch; false keeps the order in which rows were drawn."""

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError("names lists data sets of reasoning-gym, each once, for example [chain_sum]")
        if unknown := [name for name in self.settings if name not in self.names]:
            raise ValueError(f"settings are given for {unknown[0]!r}, which is not among names")
        if self.size < 1 or self.held_out_size < 0 or self.seed < 0 or self.held_out_seed < 0:
            raise ValueError("size is at least 1; held_out_size, seed and held_out_seed are not negative")
        if (self.held_out_size and self.seed < self.held_out_seed + self.held_out_size
                and self.held_out_seed < self.seed + self.size):
            raise ValueError(f"seed {self.seed} and held_out_seed {self.held_out_seed} draw common entries: they must "
                             "lie at least size and held_out_size apart")
        if "{question}" not in self.template:
            raise ValueError("template holds no {question}, so nothing would be asked")

    def load(self, tokenizer: Tokenizer, rules: RowRules) -> PromptSource:
        """Make and check all rows."""
        learn = self._made("reasoning_gym", self.seed, self.size)
        held_out = self._made("reasoning_gym[held_out]", self.held_out_seed, self.held_out_size) if (
            self.held_out_size) else None
        return load(learn, held_out, Keys(), Split(), self.shuffle, tokenizer, rules)

    def _made(self, name: str, seed: int, size: int) -> Table:
        """Rows written by a process of their own and read as a JSONL file."""
        _require()
        wanted = {"names": self.names, "settings": {n: dict(v) for n, v in self.settings.items()}, "size": size,
                  "seed": seed, "system": self.system, "template": self.template, "chat": self.chat}
        with tempfile.TemporaryDirectory(prefix="posttrain-") as folder:
            path = Path(folder) / "rows.jsonl"
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-m", __name__, str(path)], input=json.dumps(wanted),
                capture_output=True, text=True, check=False, env={**os.environ, "PYTHONHASHSEED": "0"})
            if done.returncode == REFUSED:
                raise ConfigError([done.stderr.strip()])
            if done.returncode:
                raise ConfigError([f"reasoning_gym cannot make {', '.join(self.names)}:\n{done.stderr.strip()}"])
            return Table(name, read_jsonl(str(path), name=name, own=True))


REFUSED = 2
"""Exit code of the process that makes rows where its error is the user's."""


def write(wanted: Mapping[str, Any], path: Path) -> None:
    """Rows as a JSONL file. Raises `ConfigError` for an unknown data set or settings that it does not take."""
    sources = [_dataset(name, wanted["settings"].get(name, {}), wanted["seed"], wanted["size"])
               for name in wanted["names"]]
    with path.open("w", encoding="utf-8") as file:
        for i in range(wanted["size"]):
            name = wanted["names"][i % len(sources)]
            entry = _plain(sources[i % len(sources)][i])
            asked = wanted["template"].replace("{question}", entry["question"])
            messages = [{"role": "system", "content": wanted["system"]}] if wanted["system"] else []
            prompt = [*messages, {"role": "user", "content": asked}] if messages or wanted["chat"] else asked
            held = {"dataset": name, "settings": wanted["settings"].get(name, {}), "entry": entry}
            row = {"prompt": prompt, "answer": entry["answer"], "dataset": name, ENTRY: repr(held)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _dataset(name: str, settings: Mapping[str, Any], seed: int, size: int) -> Any:
    factory = import_module("reasoning_gym.factory")
    if name not in factory.DATASETS or name == "composite":  # made of others: name those
        raise ConfigError([f"reasoning_gym has no data set '{name}'{did_you_mean(name, factory.DATASETS)}; there are "
                           f"{', '.join(sorted(set(factory.DATASETS) - {'composite'}))}"])
    try:
        return factory.create_dataset(name, **settings, seed=seed, size=size)
    except (TypeError, ValueError, AssertionError) as error:
        fields = [f for f in factory.DATASETS[name][1].__dataclass_fields__ if f not in ("seed", "size")]
        raise ConfigError([f"task.settings.{name}: {type(error).__name__}: {error}; its fields are "
                           f"{', '.join(fields)}"]) from error


def _plain(value: Any) -> Any:
    """A value of the library as literals: NumPy's texts and numbers as Python's, the shapes kept."""
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        kind = list if isinstance(value, list) else tuple if isinstance(value, tuple) else set
        return kind(map(_plain, value))
    kinds = (bool, int, float, str)
    return next((kind(value) for kind in kinds if isinstance(value, kind)), value)


EXTRACT: Mapping[str, Callable[[str, str], str | None]] = {
    "whole": lambda completion, tag: completion.strip(),
    "tag": lambda completion, tag: _inside(completion, tag),
}
"""How the answer is found in a completion; None where it is not."""


def _inside(completion: str, tag: str) -> str | None:
    """Text inside the last `<tag>...</tag>`.

    >>> _inside("<answer>3</answer> no: <answer> 4 </answer>", "answer")
    '4'
    """
    before, found, _ = completion.rpartition(f"</{tag}>")
    _, opened, text = before.rpartition(f"<{tag}>")
    return text.strip() if found and opened else None


@final
@dataclass(frozen=True, slots=True)
class ReasoningGymScore:
    """What reasoning-gym's own rule gives an answer, mostly 0 to 1; None where a row is not of that task."""

    extract: Literal["whole", "tag"] = "whole"
    """The answer is the whole completion, or what stands inside `<answer>` and `</answer>`."""
    tag: str = "answer"
    """Name of that tag."""

    def __post_init__(self) -> None:
        if self.extract not in EXTRACT or not self.tag:
            raise ValueError(f"extract is one of {', '.join(EXTRACT)}, and tag is not empty")

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        if ENTRY not in columns:
            raise LookupError(f"no row has a column '{ENTRY}'; the reward reasoning_gym scores rows of the task of "
                              "that name")
        _require()
        found = [EXTRACT[self.extract](text, self.tag) for text in completions]
        return [None if held is None else _scored(answer, held)
                for answer, held in zip(found, columns[ENTRY], strict=True)]


def _scored(answer: str | None, held: str) -> float:
    """The library's score. Its rules may raise on an answer that is no answer; that is worth 0, but only where they
    can score the right one."""
    row = ast.literal_eval(held)
    source, entry = _scorer(row["dataset"], repr(row["settings"])), row["entry"]
    try:
        return float(source.score_answer(answer, entry))
    except Exception:  # of any kind: each of a hundred rules parses answers in its own way
        source.score_answer(entry["answer"], entry)
        return 0.0


@lru_cache(maxsize=256)
def _scorer(name: str, settings: str) -> Any:
    return _dataset(name, ast.literal_eval(settings), seed=0, size=1)


def _require() -> None:
    if find_spec("reasoning_gym") is None:
        raise PluginError(["reasoning_gym needs reasoning-gym, which is not installed: "
                           "pip install 'posttrain-core[reasoning-gym]'"])


if __name__ == "__main__":
    try:
        write(json.load(sys.stdin), Path(sys.argv[1]))
    except ConfigError as refused:
        print(refused, file=sys.stderr)
        sys.exit(REFUSED)
