"""What is installed, for reading: the listing of components and the card of one, as values that print as text or JSON.

The listing is made of declarations and imports no component. A card imports its component, or where a package is
missing reads its source instead. Knows nothing of terminals.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from enum import Enum
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from posttrain.annotations import hints_of, written
from posttrain.errors import PluginError
from posttrain.hookspecs import ENTRY_POINT_GROUP, Component
from posttrain.registry import Foreign, Plugin, Registry, canonical, misfit, optional_requirements

ASPECTS = ("needs", "outputs", "provides", "unit", "slots", "framework")
"""What components say of themselves beside their fields, by kind; see `protocols.py`."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One component in the listing."""

    kind: str
    name: str
    use: str
    """What a configuration writes: the name, or `distribution/name` where several distributions offer it."""
    summary: str
    target: str
    source: str
    defaults: Mapping[str, Any]
    distribution: str
    version: str

    @property
    def provider(self) -> str:
        return f"{self.distribution} {self.version}".strip()


def entries(registry: Registry, kind: str = "") -> tuple[Entry, ...]:
    """All components, or those of a kind, sorted by kind, name and distribution."""
    declared = [(p, c) for p in registry.plugins for c in p.components if kind in ("", c.kind)]
    offered = Counter((c.kind, c.name) for _, c in declared)
    found = (Entry(c.kind, c.name, f"{p.distribution}/{c.name}" if offered[c.kind, c.name] > 1 else c.name, c.summary,
                   c.target, c.source, dict(c.defaults), p.distribution, p.version) for p, c in declared)
    return tuple(sorted(found, key=lambda e: (e.kind, e.name, e.distribution)))


def listing(registry: Registry, kind: str = "") -> dict[str, Any]:
    """What `posttrain plugins [KIND] --json` prints. Keys may be added to it; none is renamed, removed or retyped
    without another `schema`.

    - `schema`: 1.
    - `components`: each with `kind, name, use, clash, summary, target, source, defaults, distribution, version`; `use`
      is what a configuration writes, `distribution/name` where `clash` is true.
    - `plugins`: each with `distribution, version, components` (their number) `, seconds` (of its import).
    - `broken`: each with `distribution, error, remedy`.
    - `foreign`: each with `distribution, group` (of entry points) `, remedy`; written for another plugin interface.
    - `left_out`: each with `distribution, by` (the environment variable).

    `kind` limits the components alone. A default that JSON cannot say is there as its `repr`.
    """
    return {
        "schema": 1,
        "components": [{"clash": e.use != e.name, **asdict(e)} for e in entries(registry, kind)],
        "plugins": [{"distribution": p.distribution, "version": p.version, "components": len(p.components),
                     "seconds": p.seconds} for p in registry.plugins],
        "broken": [asdict(b) for b in registry.broken],
        "foreign": [{**asdict(f), "remedy": remedy(f)} for f in registry.foreign],
        "left_out": [asdict(left) for left in registry.left_out]}


def remedy(foreign: Foreign) -> str:
    """What to do about a plugin in another group of entry points."""
    return foreign.misnamed or f"install {foreign.distribution}'s version for '{ENTRY_POINT_GROUP}', or uninstall it"


@dataclass(frozen=True, slots=True)
class FieldCard:
    """One field of a component."""

    name: str
    type: str
    default: str
    """As Python writes it; empty where the field must be given."""
    doc: str


@dataclass(frozen=True, slots=True)
class Card:
    """A component described. Where `problem` is not empty it could not be imported, and the rest is what its
    declaration and its source say."""

    kind: str
    name: str
    summary: str
    source: str
    distribution: str
    version: str
    target: str
    file: str
    doc: str
    fields: tuple[FieldCard, ...]
    aspects: Mapping[str, tuple[str, ...]]
    """`needs`, `provides`, ... of the component with its default fields; see `ASPECTS`."""
    missing: tuple[str, ...]
    """Packages of its extra that are not installed."""
    install: str
    """The command that installs them; empty where nothing is missing."""
    problem: str


def card(registry: Registry, component: Component) -> Card:
    """Everything there is to say of a component. One that cannot be imported is told from its source."""
    distribution, version = registry.provider(component)
    missing = missing_packages(distribution, component.extra)
    install = f"pip install '{distribution}[{component.extra}]'" if missing else ""
    try:
        target, problem = registry.load(component), ""
        file, doc, shown = _file_of(target), inspect.getdoc(target) or "", _fields_of(target, component)
        aspects = _aspects(registry, component)
    except PluginError as error:
        problem, aspects = str(error), {}
        file, doc, shown = _read(component)
    return Card(component.kind, component.name, component.summary, component.source, distribution, version,
                component.target, file, doc, shown, aspects, missing, install, problem)


def missing_packages(distribution: str, extra: str) -> tuple[str, ...]:
    """What an extra of a distribution brings and is not installed."""
    brought = [name for name, of, _ in optional_requirements(distribution) if canonical(of) == canonical(extra)]
    return tuple(name for name in brought if not _installed(name))


def field_docs(cls: type) -> dict[str, str]:
    """The string literal under each field of a class, read from its source; none where it has no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):  # made by a call, or in an interpreter's session
        return {}
    return {line.target.id: doc for line, doc in _annotated(tree.body[0])}


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one component."""

    distribution: str
    component: str
    what: str
    status: Literal["ok", "note", "broken"]
    """`ok`: would work once something optional is installed; `note`: works."""
    remedy: str


def faults(registry: Registry) -> Iterator[Fault]:
    """Components that cannot be used as declared. Imports every one: for a process of its own."""
    for plugin in registry.plugins:
        for component in plugin.components:
            yield from _faults(registry, plugin, component)


def _faults(registry: Registry, plugin: Plugin, component: Component) -> Iterator[Fault]:
    mend = f"its authors must mend it: {plugin.distribution}"
    named = plugin.distribution, f"{component.kind} '{component.name}'"
    if not component.summary.strip():
        yield Fault(*named, "has no summary", "note", mend)
    if missing := missing_packages(plugin.distribution, component.extra):
        yield Fault(*named, f"needs {', '.join(missing)}", "ok",
                    f"pip install '{plugin.distribution}[{component.extra}]'")
    try:
        if wrong := misfit(component, registry.load(component)):
            yield Fault(*named, wrong, "broken", mend)
    except PluginError as error:
        if not missing:
            yield Fault(*named, str(error), "broken", mend)


def _installed(project: str) -> bool:
    try:
        return bool(metadata.version(project))
    except (metadata.PackageNotFoundError, ValueError):
        return False


def _file_of(target: Any) -> str:
    try:
        return inspect.getsourcefile(target) or ""
    except TypeError:  # no Python code
        return ""


def _fields_of(target: Any, component: Component) -> tuple[FieldCard, ...]:
    if not (isinstance(target, type) and is_dataclass(target)):
        return ()
    return tuple(_cards(target, component.defaults))


def _cards(cls: type, defaults: Mapping[str, Any], above: str = "",
           within: tuple[type, ...] = ()) -> Iterator[FieldCard]:
    """The fields of a dataclass; below one that may hold another dataclass, the fields of that (`adapter.rank`)."""
    docs, hints = field_docs(cls), hints_of(cls)
    for f in fields(cls):
        hint = hints.get(f.name, f.type)
        if not f.init:
            continue
        yield FieldCard(f"{above}{f.name}", _type(hint),
                        _shown(defaults[f.name]) if f.name in defaults else _default(f),
                        " ".join(docs.get(f.name, "").split()))
        for inner in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
            if isinstance(inner, type) and is_dataclass(inner) and inner not in (cls, *within):
                yield from _cards(inner, {}, f"{above}{f.name}.", (cls, *within))


def _type(hint: Any) -> str:
    """An annotation as Python writes it, and what may be chosen where that does not say so."""
    text = re.sub(r"""('[^']*'|"[^"]*")|\b(?:[A-Za-z_]\w*\.)+([A-Z]\w*)""",  # no modules in front, but of strings
                  lambda found: found[1] or found[2], inspect.formatannotation(hint))
    text = re.sub(r"^Optional\[(.*)\]$", r"\1 | None", text)  # of an alias of a Literal
    chosen = isinstance(hint, type) and issubclass(hint, Enum)
    return f"{text}, one of {', '.join(map(_shown, hint))}" if chosen else text


def _shown(value: object) -> str:
    """A value as Python writes it; a member of an `Enum` as a configuration does, a set in an order."""
    if isinstance(value, Enum):
        return repr(written(value))
    if value and isinstance(value, set | frozenset):
        items = ", ".join(sorted(map(_shown, value)))
        return f"frozenset({{{items}}})" if isinstance(value, frozenset) else f"{{{items}}}"
    return repr(value)


def _default(f: Field[Any]) -> str:
    if f.default is not MISSING:
        return _shown(f.default)
    return _shown(f.default_factory()) if f.default_factory is not MISSING else ""


def _aspects(registry: Registry, component: Component) -> dict[str, tuple[str, ...]]:
    """What the component with its defaults says of itself; nothing where it cannot be made of these alone."""
    wrong: list[str] = []
    try:
        made = registry.build(component, {}, (component.name,), lambda key, message: wrong.append(message))
        own = {f.name for f in fields(made)} if is_dataclass(made) else set()
        found = {} if wrong else {aspect: getattr(made, aspect, None) for aspect in ASPECTS if aspect not in own}
    except Exception:  # a field that must be given, or the author's own check
        found = {}
    return {aspect: (str(value),) if isinstance(value, str) else tuple(sorted(map(str, value)))
            for aspect, value in found.items() if isinstance(value, str | frozenset | set | tuple)}


def _read(component: Component) -> tuple[str, str, tuple[FieldCard, ...]]:
    """File, docstring and fields of a component as its source has them; nothing of it is executed."""
    module, _, name = component.target.partition(":")
    try:
        spec = importlib.util.find_spec(module)
        file = spec.origin if spec is not None and spec.origin is not None else ""
        tree = ast.parse(Path(file).read_text("utf-8"))
    except (ImportError, ValueError, OSError, SyntaxError, PluginError):
        return "", "", ()
    body = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if body is None:
        return file, "", ()
    defaults = {key: repr(value) for key, value in component.defaults.items()}
    docs = {line.target.id: doc for line, doc in _annotated(body)}
    return file, ast.get_docstring(body) or "", tuple(
        FieldCard(line.target.id, ast.unparse(line.annotation),
                  defaults.get(line.target.id, ast.unparse(line.value) if line.value is not None else ""),
                  " ".join(docs.get(line.target.id, "").split()))
        for line in body.body if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        and not ast.unparse(line.annotation).startswith(("ClassVar", "typing.ClassVar")))


def _annotated(node: ast.stmt) -> Iterator[tuple[Any, str]]:
    """Each annotated name in the body of a class that has a string literal under it, and that string."""
    for line, doc in pairwise(node.body if isinstance(node, ast.ClassDef) else []):
        if (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(doc, ast.Expr)
                and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)):
            yield line, doc.value.value
