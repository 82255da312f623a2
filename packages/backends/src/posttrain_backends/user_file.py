"""A module of the user's own: the function `build` of a Python file, and what is said where it does not fit. Imports no
framework."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from posttrain.errors import ConfigError, Problem, did_you_mean
from posttrain.registry import import_file


def built(file: str, *arguments: Any) -> Any:
    """What `name` of `path.py:name` makes of the arguments. Raises `ConfigError` where there is no such function or it
    fails."""
    build = _builder(file)
    try:
        return build(*arguments)
    except Exception as error:  # the user's own code may raise anything
        raise _raised(file, error) from error


def misfit(file: str, what: str, contract: str) -> ConfigError:
    """The error for a module that is not what `contract` says."""
    return ConfigError([f"the module of {file} {what}"], next_step=f"Expected: {contract}.")


def _builder(file: str) -> Callable[..., object]:
    path, _, name = file.rpartition(":")
    if not path or not Path(path).is_file():
        raise ConfigError([f"policy.file: {file!r} is not FILE.py:NAME of an existing file"])
    try:
        names = vars(import_file(Path(path)))
    except Exception as error:  # as above
        raise _raised(file, error) from error
    if not callable(found := names.get(name)):
        raise ConfigError([f"policy.file: {path} has no function {name!r}{did_you_mean(name, names)}"])
    return cast(Callable[..., object], found)


def _raised(file: str, error: Exception) -> ConfigError:
    """What the user's file raised, with its line."""
    own = file.rpartition(":")[0]
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == own]
    lines += [error.lineno] if isinstance(error, SyntaxError) else []
    where = f"{own}:{lines[-1]}" if lines else own
    return ConfigError([Problem(f"policy.file: {file} raised {type(error).__name__}: {error}", where)])
