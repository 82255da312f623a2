"""The task `hub`: prompts from a data set of the Hugging Face hub, or from one that `datasets` saved to a folder.

Rows are checked as those of files are, and stay in the Arrow files of the `datasets` cache. No code of a data set is
ever run. Knows how data sets are found and named; what columns mean is in `formats.py`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, final

from posttrain.errors import DataError, PluginError, Problem, did_you_mean
from posttrain.protocols import PromptSource, RowRules, Tokenizer
from posttrain.tasks.arrow import BATCH, as_json
from posttrain.tasks.formats import Keys, Row, row_of
from posttrain.tasks.source import Split, Table, load

log = logging.getLogger(__name__)

COMMIT = re.compile("[0-9a-f]{40}")
"""A revision that always means the same files."""


@final
@dataclass(frozen=True, slots=True)
class Hub:
    """Prompts from a data set of the hub, in the formats of the task `rows`.

    What a login of `huggingface-cli` or the variable `HF_TOKEN` may read, may be named here.
    """

    name: str = ""
    """Data set of the hub (`openai/gsm8k`), or a folder of data files, as `datasets.load_dataset` takes it."""
    path: str = field(default="", metadata={"path": True})
    """Folder that `save_to_disk` wrote, instead of a name."""
    config: str = ""
    """Configuration of the data set (`main`), where it has several."""
    split: str = "train"
    """Split to learn from; `datasets` also takes a part of one: `train[:1000]`."""
    revision: str = ""
    """Commit of the data set, 40 hexadecimal digits. A branch or nothing is taken with a warning that names the
    commit, since the rows may be other ones tomorrow."""
    held_out: str = ""
    """Split to evaluate on."""
    held_out_fraction: float = 0.0
    """Part of the rows that is kept for evaluation, drawn by `split_seed`, where no split is given for it."""
    split_seed: int = 0
    """Seed of that draw."""
    prompt_key: str = "prompt"
    """Column of the prompt: text, or a list of messages."""
    messages_key: str = "messages"
    """Column of the conversation, where there is no prompt column."""
    completion_key: str = "completion"
    """Column of the answer, for supervised training."""
    chosen_key: str = "chosen"
    """Column of the preferred answer, for training on pairs."""
    rejected_key: str = "rejected"
    """Column of the other answer."""
    limit: int = 0
    """Read only this many of the rows to learn from; 0 reads all."""
    shuffle: bool = True
    """A new order in each epoch; false keeps the order of the data set."""

    def __post_init__(self) -> None:
        if bool(self.name) == bool(self.path):
            raise ValueError("give either name (a data set of the hub) or path (a folder that save_to_disk wrote)")
        if self.path and (self.config or self.revision):
            raise ValueError("config and revision belong to a name of the hub; a path has neither")
        if self.held_out and self.held_out_fraction:
            raise ValueError("held_out and held_out_fraction both say what is held out; keep one")
        if not 0 <= self.held_out_fraction < 1 or self.limit < 0:
            raise ValueError("held_out_fraction lies in [0, 1), and limit is not negative")

    def load(self, tokenizer: Tokenizer, rules: RowRules) -> PromptSource:
        """Find, read and check all rows; raises one `DataError` with every malformed one, or with what failed."""
        library = _library()
        revision = self._pinned()
        learn = self._table(library, self.split, revision, self.limit)
        held_out = self._table(library, self.held_out, revision) if self.held_out else None
        keys = Keys(self.prompt_key, self.messages_key, self.completion_key, self.chosen_key, self.rejected_key)
        split = Split(self.held_out_fraction, self.split_seed)
        return load(learn, held_out, keys, split, self.shuffle, tokenizer, rules)

    def _pinned(self) -> str:
        """The commit to load; the revision as it is where the hub cannot be asked (a cached data set may be read)."""
        if self.path or Path(self.name).exists() or COMMIT.fullmatch(self.revision):
            return self.revision
        hub = import_module("huggingface_hub")
        try:
            found = str(hub.HfApi().dataset_info(self.name, revision=self.revision or None).sha)
        except Exception as error:  # of the network, of the hub, of its client: loading says it in full
            log.warning("data set '%s' is not pinned, and its commit cannot be asked for (%s); set task.revision",
                        self.name, type(error).__name__)
            return self.revision
        log.warning("data set '%s' is not pinned and may change; this run reads it at: task.revision=%s",
                    self.name, found)
        return found

    def _table(self, library: Any, split: str, revision: str, limit: int = 0) -> Table:
        found = _saved(library, self.path, split) if self.path else self._loaded(library, split, revision)
        name = f"{self.path or self.name}[{split}]"
        return Table(name, HubRows.of(name, found, limit))

    def _loaded(self, library: Any, split: str, revision: str) -> Any:
        try:
            return library.load_dataset(self.name, self.config or None, split=split, revision=revision or None)
        except Exception as error:  # datasets, huggingface_hub, the network and file formats each raise their own
            first = str(error).strip().partition("\n")[0]
            raise DataError([Problem(f"the data set cannot be loaded: {type(error).__name__}: {first}", self.name)],
                            next_step=ADVICE) from error


ADVICE = """\
Check task.name, task.config, task.split and task.revision. A private data set needs a login (HF_TOKEN).
Without a network: on a machine with one, run
  python -c "import datasets; datasets.load_dataset('NAME').save_to_disk('FOLDER')"
then copy the folder and set task.path=FOLDER instead of task.name."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class HubRows:
    """Rows of a `datasets.Dataset` in its Arrow form."""

    name: str
    dataset: Any
    schema: Any
    size: int

    @classmethod
    def of(cls, name: str, dataset: Any, limit: int = 0) -> HubRows:
        """The first `limit` rows of a data set, all of them where that is 0."""
        arrow = dataset.with_format("arrow")
        return cls(name, arrow, as_json(name, arrow.features.arrow_schema), min(limit or len(arrow), len(arrow)))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> Row:
        i = range(len(self))[number]
        (row,) = self._rows(i, i + 1)
        return row

    def __iter__(self) -> Iterator[Row]:
        for first in range(0, len(self), BATCH):
            yield from self._rows(first, min(first + BATCH, len(self)))

    def _rows(self, first: int, end: int) -> list[Row]:
        piece = self.dataset[first:end].select(self.schema.names).cast(self.schema)
        return [row_of(f"{self.name}:row {i}", columns) for i, columns in enumerate(piece.to_pylist(), start=first + 1)]


def _saved(library: Any, path: str, split: str) -> Any:
    """A split of what `save_to_disk` wrote; a folder that holds one data set has the split `train` alone."""
    try:
        found = library.load_from_disk(path)
    except Exception as error:  # datasets raises errors of its own, of pyarrow and of the system
        raise DataError([Problem(f"not a folder that save_to_disk of datasets wrote: {error}; files of rows are read "
                                 "by the task 'rows'", path)]) from error
    splits = found if isinstance(found, library.DatasetDict) else {"train": found}
    if split not in splits:
        raise DataError([Problem(f"there is no split '{split}'{did_you_mean(split, splits)}; it has "
                                 f"{', '.join(splits)}", path)])
    return splits[split]


def _library() -> Any:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise PluginError(["task 'hub' needs datasets, which is not installed: "
                           "pip install 'posttrain-core[hub]'"]) from error
