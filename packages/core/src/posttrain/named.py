"""Plugins by name, as `plugins:` of a configuration and `--plugin` say them: a file that ends in `.py`, or a module.

Also what such a plugin is made of, for the record of a run: its Python files, and the distribution that brings it.
Knows nothing of configurations and of command lines.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import final
from urllib.parse import unquote, urlsplit

from posttrain.errors import PluginError
from posttrain.registry import Registry, reason


def absolute(name: str, base: Path) -> str:
    """The name of a file with its whole path, which is relative to `base`; that of a module as it is."""
    return str((base / name).resolve()) if name.endswith(".py") else name


@final
@dataclass(frozen=True, slots=True)
class Named:
    """A registry with the plugins that were named, and what became of the names."""

    registry: Registry
    files: tuple[Path, ...]
    """The Python files that the plugins are made of."""
    problems: tuple[str, ...]
    """What is wrong with plugins that it cannot have."""


def extended(registry: Registry, names: Sequence[str], base: Path) -> Named:
    """The registry with the files, relative to `base`, and the modules that are named."""
    found: dict[str, Path | ModuleType] = {}
    problems: list[str] = []
    for name in dict.fromkeys(absolute(name, base) for name in names):
        try:
            found[name] = _found(name)
        except PluginError as error:
            problems.append(str(error))
    made = registry.extended(tuple(found.values()))
    problems += [f"{b.distribution}: {b.error}" for b in made.broken if b.distribution in found]
    return Named(made, tuple(path for plugin in found.values() for path in _files_of(plugin)), tuple(problems))


def _found(name: str) -> Path | ModuleType:
    """The file or the module of a name. Raises `PluginError` where there is none."""
    if name.endswith(".py"):
        if Path(name).is_file():
            return Path(name)
        raise PluginError([f"no such file: {name}"])
    try:
        with redirect_stdout(sys.stderr):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise PluginError([f"{name} is neither a file that ends in .py nor a module that can be imported: {error}"]
                          ) from error
    except (Exception, SystemExit) as error:  # the author's own code may raise anything
        raise PluginError([f"{name} cannot be imported: {reason(error)}"]) from error


def _files_of(plugin: Path | ModuleType) -> tuple[Path, ...]:
    """The file; of a module in a package, all of that package's, since what it declares may be in any of them."""
    if isinstance(plugin, Path):
        return (plugin,)
    file = Path(plugin.__file__ or "")
    if file.suffix != ".py":
        return ()
    return tuple(sorted(file.parent.rglob("*.py"))) if plugin.__package__ else (file,)


def distribution_of(name: str) -> str:
    """The distribution whose installation brought an imported module; empty where none did. Reads what installers
    wrote down of every distribution, so it is for once per run."""
    if (file := sys.modules[name].__file__) is None:
        return ""
    brought = (d for d in metadata.distributions() if _brings(d, Path(file).resolve()))
    return next((str(d.metadata["Name"]) for d in brought), "")


def _brings(distribution: metadata.Distribution, file: Path) -> bool:
    """Whether a distribution installed the file, or is an editable installation of a folder that holds it."""
    try:
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable") and file.is_relative_to(unquote(urlsplit(origin["url"]).path)):
            return True
        folder = Path(str(distribution.locate_file(""))).resolve()
        return file.is_relative_to(folder) and (
            f"\n{file.relative_to(folder).as_posix()}," in "\n" + (distribution.read_text("RECORD") or ""))
    except (OSError, ValueError, KeyError):  # what is written there cannot be read
        return False
