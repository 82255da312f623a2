"""Where prompts come from, and what authors of tasks need: rows of their own, checked and split as core's are.

`load` checks the rows of a `Table` by what its columns mean (`Keys`), holds some out (`Split`) and gives prompts. The
table's rows are made by Python (`given_rows`), read from a file (`read`), or any sequence of `Row`s (`RowTable`).
Importing this loads nothing, each name is imported on first use. Core's own tasks are registered in `posttrain.plugin`.

>>> from posttrain.protocols import RowRules
>>> from posttrain.tokenizers import Bytes
>>> table = Table("sums", given_rows("sums", [{"prompt": "1+1=", "answer": 2}]))
>>> source = load(table, None, Keys(), Split(), True, Bytes().load(), RowRules())
>>> source.take(0, 1, seed=0)[0].extra
{'answer': 2}
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.tasks.files import given_rows, read
    from posttrain.tasks.formats import Keys, Row, RowTable
    from posttrain.tasks.source import Split, Table, load

__all__ = ["Keys", "Row", "RowTable", "Split", "Table", "given_rows", "load", "read"]

_MODULE = {"Keys": "formats", "Row": "formats", "RowTable": "formats", "Split": "source", "Table": "source",
           "given_rows": "files", "load": "source", "read": "files"}


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'posttrain.tasks' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"posttrain.tasks.{_MODULE[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
