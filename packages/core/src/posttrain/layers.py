"""The layers of a configuration: YAML files, dicts and `key=value` settings, and how one lies over another.

Every value keeps a mark of where it was written. Knows which keys hold components (they are replaced as a whole when
another one is named, except by `X.use=NAME`, which changes the name alone), and nothing of what keys and components
mean.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import Field, dataclass, field, fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from posttrain.annotations import Key, dotted, written
from posttrain.errors import Problem
from posttrain.schema import Settings


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a value was written, the folder its paths are relative to, and the Python object it stands for."""

    where: str
    base: Path
    value: Any = None
    """Set where the tree holds `<python: ...>` in its stead."""


@dataclass(slots=True)
class Layer:
    """A tree of plain values in which components are written `{use: name, ...}`, and a mark for every key."""

    tree: dict[str, Any] = field(default_factory=dict)
    marks: dict[Key, Mark] = field(default_factory=dict)
    renames: bool = False
    """A component that it names takes over the fields that lower layers wrote for another one."""


@dataclass(slots=True)
class Reading:
    """What reading a configuration found on its way."""

    problems: list[Problem] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    """Path -> SHA-256 of every user file that was read."""

    def record(self, path: Path) -> bytes:
        """The bytes of a user's file, whose hash is kept."""
        content = path.read_bytes()
        self.files[str(path)] = hashlib.sha256(content).hexdigest()
        return content


FROM_FILE = ("reward", "task")
"""Kinds that a Python file may hold without being a plugin: `file: path.py:name`."""

COMMAND_LINE = "command line"
"""Where the settings of a command were written."""

_PLAIN = (str, int, float, bool, type(None))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without dates, in which `1e-6` is a number, as in YAML 1.2."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$"),
                              list("-+.0123456789"))


def read_file(path: Path, reading: Reading, above: tuple[Path, ...] = ()) -> list[Layer]:
    """The layers of a YAML file: those it `extends`, then its own."""
    base = path.resolve().parent
    try:
        layer = parse(reading.record(path).decode(), path.name if base == Path.cwd() else str(path), base, reading)
    except (OSError, UnicodeDecodeError) as error:
        reading.problems.append(Problem(f"cannot read {path}: {getattr(error, 'strerror', None) or error}"))
        return []
    return _extended(layer, reading, (*above, path.resolve()))


def read_mapping(source: Mapping[str, Any], reading: Reading) -> list[Layer]:
    """The layers of a dict from Python: paths are relative to the current folder, objects are put aside."""
    layer = Layer()
    tree = {**source, "task": _rows(source["task"])} if "task" in source else source
    layer.tree = {str(k): _put_aside(v, (str(k),), layer.marks, Path.cwd()) for k, v in tree.items()}
    return _extended(layer, reading, ())


def read_setting(text: str, base: Path, reading: Reading) -> list[Layer]:
    """The layer of one `a.b=value` of the command line; the value is YAML. `X.use=NAME` names another component for the
    fields that are there, `X=NAME` and `X={use: NAME}` drop them."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        reading.problems.append(Problem(f"'{text}' is not a setting; write key=value, as in rollout.group_size=8",
                                        COMMAND_LINE))
        return []
    before = len(reading.problems)
    inner = parse(value, COMMAND_LINE, base, reading, bare=True)
    path = key.split(".")
    return [Layer(*_nested(path, inner), renames=path[-1] == "use")] if len(reading.problems) == before else []


def _nested(path: Sequence[str], inner: Layer) -> tuple[dict[str, Any], dict[Key, Mark]]:
    """The value of a layer (under the key "") and its marks, moved to `path`."""
    tree: Any = inner.tree[""]
    for part in reversed(path):
        tree = {part: tree}
    return tree, {(*path, *key[1:]): mark for key, mark in inner.marks.items()}


def parse(text: str, name: str, base: Path, reading: Reading, bare: bool = False) -> Layer:
    """Plain values and marks of a YAML text; `bare` takes any value, as the key ""."""
    layer = Layer()
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if bare:
            mark = Mark(name, base)
            layer.tree = {"": None if node is None else _plain(loader, node, ("",), layer.marks, reading, mark)}
            layer.marks = {key: mark for key in (("",), *layer.marks)}
        elif node is not None and not isinstance(node, yaml.MappingNode):
            reading.problems.append(Problem("must be a block of `key: value` lines", name))
        elif node is not None:
            layer.tree = _plain(loader, node, (), layer.marks, reading, Mark(name, base))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark_of_error = getattr(error, "problem_mark", None)
        line = f":{mark_of_error.line + 1}" if mark_of_error and not bare else ""
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        reading.problems.append(Problem(f"not valid YAML: {what}", f"{name}{line}"))
        layer = Layer({"": None} if bare else {})
    return layer


def _plain(loader: _Loader, node: yaml.Node, key: Key, marks: dict[Key, Mark], reading: Reading, mark: Mark) -> Any:
    """Dicts, lists and scalars of a node; marks every key with its line, and reports keys written twice."""
    if isinstance(node, yaml.SequenceNode) and node.tag == loader.DEFAULT_SEQUENCE_TAG:
        return [_plain(loader, item, (*key, i), marks, reading, mark) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode) or node.tag != loader.DEFAULT_MAPPING_TAG:
        return loader.construct_object(node)  # raises where a tag asks for more than plain values
    written: dict[str, int] = {}
    for name_node, _ in node.value:
        name, line = str(name_node.value), name_node.start_mark.line + 1
        if name in written:
            reading.problems.append(Problem(f"{dotted((*key, name))} is written twice, first in line {written[name]}",
                                            f"{mark.where}:{line}"))
        written.setdefault(name, line)
    node = yaml.MappingNode(node.tag, list(node.value), node.start_mark, node.end_mark)
    loader.flatten_mapping(node)  # `<<: *anchor`, in a copy: an alias may lead here again
    found = {}
    for name_node, value_node in node.value:
        name = str(name_node.value)  # as written: a key `on` is text
        marks[*key, name] = Mark(f"{mark.where}:{name_node.start_mark.line + 1}", mark.base)
        found[name] = _plain(loader, value_node, (*key, name), marks, reading, mark)
    return found


def _put_aside(value: Any, key: Key, marks: dict[Key, Mark], base: Path) -> Any:
    """Plain values as they are; any other object leaves its name in the tree and itself in its mark."""
    marks[key] = mark = Mark(f"dict key '{dotted(key)}'", base)
    if isinstance(value, Mapping):
        return {str(k): _put_aside(v, (*key, str(k)), marks, base) for k, v in value.items()}
    if isinstance(value, Enum):
        return written(value)
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, set | frozenset) and all(isinstance(v, _PLAIN) for v in value):
        return sorted(value, key=repr)
    if isinstance(value, list | tuple) and all(isinstance(v, _PLAIN) for v in value):
        return list(value)
    if isinstance(value, Path):
        return str(value)
    marks[key] = Mark(mark.where, base, value)
    return f"<python: {_location(value)}>"


def _location(value: Any) -> str:
    """`/path/file.py:name` of a function at the top of a file, else the dotted name of a function or of a type."""
    named = value if isinstance(value, FunctionType) else type(value)
    file = Path(value.__code__.co_filename) if isinstance(value, FunctionType) else Path()
    at_top = named.__qualname__.isidentifier() and file.suffix == ".py" and file.is_file()
    return f"{file.resolve()}:{named.__qualname__}" if at_top else f"{named.__module__}.{named.__qualname__}"


def _rows(task: Any) -> Any:
    """Rows handed over from Python, as the `rows` task."""
    if isinstance(task, list | tuple):
        return {"use": "rows", "rows": task}
    if isinstance(task, Mapping) and "train" in task and not {"use", "file"} & set(task):
        renamed = {"train": "rows", "held_out": "held_out_rows"}
        return {"use": "rows", **{renamed.get(k, k): v for k, v in task.items()}}
    return task


def _extended(layer: Layer, reading: Reading, above: tuple[Path, ...]) -> list[Layer]:
    """The layer over those it extends."""
    if (name := layer.tree.pop("extends", None)) is None:
        return [layer]
    mark = layer.marks.pop(("extends",))
    path = mark.base / str(name)
    if not isinstance(name, str) or not path.is_file() or path.resolve() in above:
        why = "extends itself" if path.resolve() in above else f"no such file: {path}"
        reading.problems.append(Problem(f"extends: {why}", mark.where))
        return [layer]
    return [*read_file(path, reading, above), layer]


def slots(block: type = Settings, above: Key = ()) -> Iterator[tuple[Key, Mapping[str, Any]]]:
    """Keys that hold a component (`kind`) or a map of them (`many`)."""
    for f in fields(block):
        if "kind" in f.metadata:
            yield (*above, f.name), f.metadata
        elif _is_block(f):
            yield from slots(f.default_factory, (*above, f.name))  # type: ignore[arg-type]  # it is a block's class


def _is_block(f: Field[Any]) -> bool:
    factory: Any = f.default_factory
    return isinstance(factory, type) and is_dataclass(factory)


def merge(layers: Sequence[Layer], problems: list[Problem]) -> tuple[dict[str, Any], dict[Key, Mark]]:
    """All layers, the lowest first, as one tree with its `${...}`, and the marks of what is left."""
    tree: dict[str, Any] = {}
    marks: dict[Key, Mark] = {}
    blocks = [f.name for f in fields(Settings) if _is_block(f)]  # `rollout:` with nothing below it says nothing
    for layer in layers:
        layer.tree = {k: v for k, v in layer.tree.items() if v is not None or k not in blocks}
        for key in _named(layer):
            if not layer.renames or "use" not in (at(tree, key) or {}):  # `file:` is no field but another kind of name
                _forget(tree, marks, key)
        tree = _attempt(partial(OmegaConf.merge, tree), layer.tree, layer.marks, problems)
        marks |= layer.marks
    return tree, marks


def resolve(tree: Mapping[str, Any], marks: Mapping[Key, Mark], problems: list[Problem]) -> dict[str, Any]:
    """The tree with every `${...}` replaced; what cannot be is reported and left out."""
    return _attempt(partial(OmegaConf.to_container, resolve=True), deepcopy(dict(tree)), marks, problems)


def where(marks: Mapping[Key, Mark], key: Key) -> str:
    """Where `key` was written, or else the nearest block around it, or else something in it."""
    around = [marks[key[:n]].where for n in range(len(key), 0, -1) if key[:n] in marks]
    return next(iter(around or [mark.where for k, mark in marks.items() if k[: len(key)] == key]), "")


def _attempt(work: Callable[[DictConfig], Any], tree: dict[str, Any], marks: Mapping[Key, Mark],
             problems: list[Problem]) -> dict[str, Any]:
    """Plain `work(tree)`; a value that OmegaConf refuses is reported, taken out of `tree`, and the work done again."""
    while True:
        try:
            done = work(OmegaConf.create(tree))
            plain = OmegaConf.to_container(done) if isinstance(done, DictConfig) else done
            return plain  # type: ignore[return-value]  # OmegaConf types lists too; a dict stays one
        except OmegaConfBaseException as error:
            key: Key = tuple(part for part in re.split(r"[.\[\]]+", error.full_key or "") if part)
            problems.append(Problem(f"{dotted(key)}: {str(error).splitlines()[0]}", where(marks, key)))
            while key and (key[-1] == "use" or not isinstance(at(tree, key[:-1]), dict)):  # the whole part or list
                key = key[:-1]
            if not key:
                return {}
            del at(tree, key[:-1])[key[-1]]


def names_part(kind: str, node: Any) -> bool:
    """Whether a node says which component it is, by `use:` or, a reward or task, by `file:`; else it sets fields."""
    return not isinstance(node, dict) or "use" in node or ("file" in node and kind in FROM_FILE)


def _named(layer: Layer) -> list[Key]:
    """Writes bare names as `{use: name}`; the keys under which the layer names a component or takes it away."""
    found = []
    for slot, meta in slots():
        holder = at(layer.tree, slot[:-1])
        if not isinstance(holder, dict) or slot[-1] not in holder:
            continue
        node = holder[slot[-1]]
        if meta.get("many") and not isinstance(node, dict):
            holder[slot[-1]] = {} if node is None else node  # `trackers: null` is none at all
            found.append(slot)
            continue
        for key in [(*slot, name) for name in node] if meta.get("many") else [slot]:
            holder = at(layer.tree, key[:-1])
            if isinstance(holder[key[-1]], str):
                holder[key[-1]] = {"use": holder[key[-1]]}
                layer.marks[*key, "use"] = mark = layer.marks[key]
                layer.marks[key] = Mark(mark.where, mark.base)
            if names_part(meta["kind"], holder[key[-1]]):
                found.append(key)
    return found


def at(tree: Any, key: Key) -> Any:
    """What stands under `key`, or None."""
    for part in key:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _forget(tree: dict[str, Any], marks: dict[Key, Mark], key: Key) -> None:
    """Take away what lower layers say under `key`, which keeps its place."""
    if isinstance(parent := at(tree, key[:-1]), dict) and key[-1] in parent:
        parent[key[-1]] = None
    for below in [k for k in marks if k[: len(key)] == key]:
        del marks[below]
