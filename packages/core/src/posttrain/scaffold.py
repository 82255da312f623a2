"""Files for a user to start from: templates filled in and written. Runs nothing and overwrites nothing.

A template is a file of `templates/` whose name ends in `.tmpl`; `$name` in its text and `NAME` in its path are
replaced, `$$` is a dollar sign. The folder `init` is what `posttrain init` writes; of the others see `authoring.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from string import Template

from posttrain.errors import InputError, Problem

TEMPLATES = Path(__file__).with_name("templates")
SUFFIX = ".tmpl"


def filled(folder: str, **values: str) -> dict[str, str]:
    """Path -> text of the templates in a folder.

    >>> sorted(filled("init"))
    ['data.jsonl', 'rewards.py', 'train.yaml']
    """
    def placed(word: re.Match[str]) -> str:
        return values.get(word[0].lower(), word[0])
    root = TEMPLATES / folder
    paths = {path: path.relative_to(root).as_posix().removesuffix(SUFFIX) for path in root.rglob(f"*{SUFFIX}")}
    return {re.sub(r"[A-Z]{4,}", placed, name): Template(path.read_text("utf-8")).substitute(values)
            for path, name in sorted(paths.items())}


def put(files: Mapping[Path, str], next_step: str) -> list[Path]:
    """Write files and the folders they lie in; raises `InputError`, and writes nothing, where one of them exists."""
    if there := [path for path in files if path.exists()]:
        raise InputError([Problem("this file exists and is not overwritten", str(path)) for path in there],
                         next_step=next_step)
    for path, text in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        except OSError as error:
            raise InputError([Problem(f"cannot write: {error.strerror or error}", str(path))],
                             next_step=next_step) from error
    return list(files)


def write(directory: Path) -> list[Path]:
    """Three files of the user's own, for `posttrain init`: a configuration, rewards and rows. Raises `InputError`."""
    files = {directory / name: text for name, text in filled("init").items()}
    return put(files, "choose another folder: posttrain init DIR")
