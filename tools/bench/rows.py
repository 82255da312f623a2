"""CPU seconds and memory of the task `rows` on a large JSONL file: index, check of every row, and a step's prompts.

The file is made for it in a temporary folder: rows of about 200 bytes. Memory is the growth of the peak of resident
memory over what it was before the load. Predicted before the index searched lines by block and the format was guessed
from the first rows: 2.5 times as many rows per CPU second; it became 1.8 to 2.0 times.

    python tools/bench/rows.py [--megabytes 200]
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from posttrain.protocols import RowRules
from posttrain.tasks.rows import Rows
from posttrain.tokenizers import Bytes

STEP = 256
"""Prompts of one step."""


def written(path: Path, megabytes: int) -> int:
    """Write rows until the file has its size; returns how many."""
    size, rows = 0, 0
    with path.open("w") as file:
        while size < megabytes * 2**20:
            question = f"What is {rows} plus {rows + 1}? " + "Give the number alone. " * 5
            row = {"prompt": question, "answer": str(2 * rows + 1)}
            size += file.write(json.dumps(row) + "\n")
            rows += 1
    return rows


def peak() -> float:
    """MiB of resident memory, at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=200)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        rows = written(path, given.megabytes)
        before, busy = peak(), time.process_time()
        source = Rows(path=str(path)).load(Bytes().load(), RowRules())
        busy = time.process_time() - busy
        assert source.rows == rows
        print(f"{given.megabytes} MB, {rows} rows: {busy:.1f} CPU s, {rows / busy / 1000:.0f} thousand rows per CPU s, "
              f"peak +{peak() - before:.0f} MiB")
        for name, cursor in (("the first step of an epoch", 0), ("a later step", STEP)):
            start = time.process_time()
            prompts = list(source.take(cursor, STEP, 0))
            print(f"{name}: {len(prompts)} prompts in {1000 * (time.process_time() - start):.1f} CPU ms")


if __name__ == "__main__":
    main()
