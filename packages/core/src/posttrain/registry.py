"""What is installed: finds plugins, names their components, creates them. Imports a component only when it is used.

Knows entry points and declarations (`hookspecs.Component`); what a component does, and what a configuration looks like,
it does not know. A plugin that fails is kept as `Broken` and harms nobody who does not need it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from difflib import get_close_matches
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from posttrain import hookspecs
from posttrain.annotations import Key, Report, construct
from posttrain.errors import ConfigError, PluginError, Problem, did_you_mean
from posttrain.hookspecs import ENTRY_POINT_GROUP, KINDS, PROJECT, Component

ALLOW, BLOCK = "POSTTRAIN_PLUGINS", "POSTTRAIN_BLOCK"
"""Environment variables: distributions, comma-separated, that alone are imported, or that never are."""

PROJECTS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
"""Import names that are not the name of their distribution."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin that was imported, and what it declares."""

    distribution: str
    version: str
    components: tuple[Component, ...]


@dataclass(frozen=True, slots=True)
class Broken:
    """A plugin that could not be imported, declares something wrong, or raised in a hook."""

    distribution: str
    error: str


@dataclass(frozen=True, slots=True)
class Foreign:
    """A plugin for another version of the plugin interface: reported, never imported."""

    distribution: str
    group: str


@dataclass(frozen=True, slots=True)
class Hooks:
    """The observing hooks of all plugins, typed. Each plugin is called on its own; one that raises is returned as
    `Broken`, and the others are called all the same."""

    manager: pluggy.PluginManager

    def commands(self, app: Any) -> tuple[Broken, ...]:
        """Let plugins add commands to the command line."""
        return self._each("commands", app=app)

    def run_started(self, run: Any) -> tuple[Broken, ...]:
        """A run began or was resumed."""
        return self._each("run_started", run=run)

    def step_finished(self, run: Any, step: int, metrics: Mapping[str, float]) -> tuple[Broken, ...]:
        """A step is done and recorded."""
        return self._each("step_finished", run=run, step=step, metrics=metrics)

    def run_finished(self, run: Any, error: BaseException | None) -> tuple[Broken, ...]:
        """A run ended, by itself or by `error`."""
        return self._each("run_finished", run=run, error=error)

    def _each(self, hook: str, **arguments: Any) -> tuple[Broken, ...]:
        failed = []
        for name, plugin in self.manager.list_name_plugin():
            try:
                _alone(self.manager, plugin, hook)(**arguments)
            except Exception as error:  # an observer must not stop what it observes
                failed.append(Broken(name.rpartition("#")[0], f"{hook}: {_reason(error)}"))
        return tuple(failed)


@dataclass(frozen=True, slots=True)
class Registry:
    """Components by kind and name. A value: `extended` gives another one."""

    plugins: tuple[Plugin, ...]
    broken: tuple[Broken, ...]
    foreign: tuple[Foreign, ...]
    hooks: Hooks
    rediscover: Callable[[Sequence[Path | object]], Registry]

    def extended(self, plugins: Sequence[Path | object]) -> Registry:
        """A registry that also holds the given plugins: files, modules or objects with hooks."""
        return self.rediscover(plugins) if plugins else self

    def components(self, kind: str | None = None) -> tuple[Component, ...]:
        """All components, or those of a kind, sorted by kind and name; names that clash are all there."""
        found = (c for p in self.plugins for c in p.components if kind in (None, c.kind))
        return tuple(sorted(found, key=lambda c: (c.kind, c.name)))

    def names(self, kind: str) -> tuple[str, ...]:
        """Names of a kind, sorted."""
        return tuple(dict.fromkeys(c.name for c in self.components(kind)))

    def provider(self, component: Component) -> tuple[str, str]:
        """Distribution and version that declare `component`."""
        return next(((p.distribution, p.version) for p in self.plugins if component in p.components), ("", ""))

    def resolve(self, kind: str, name: str) -> Component:
        """The component called `name`, or `distribution/name`. Raises `PluginError`."""
        distribution, _, bare = name.rpartition("/")
        found = [(p, c) for p in self.plugins for c in p.components if (c.kind, c.name) == (kind, bare)
                 and (not distribution or _canonical(p.distribution) == _canonical(distribution))]
        if not found:
            raise PluginError([self._not_found(kind, name)])
        if len(found) > 1:
            owners = " and ".join(f"{p.distribution} {p.version}".strip() for p, _ in found)
            choices = ", ".join(f"'{p.distribution}/{bare}'" for p, _ in found)
            raise PluginError([f"{kind} '{name}' is offered by {owners}; choose one of {choices}"])
        return found[0][1]

    def _not_found(self, kind: str, name: str) -> str:
        names = self.names(kind)
        near = get_close_matches(name.rpartition("/")[2], names, n=1)
        owner = " ".join(self.provider(next(c for c in self.components(kind) if c.name == near[0]))) if near else ""
        text = f"{kind} '{name}' not found" + (f"; did you mean '{near[0]}' ({owner.strip()})?" if near else "")
        other = [c.kind for c in self.components() if c.name == name]
        text += f"; '{name}' is declared with kind '{other[0]}'" if other and not near else ""
        text += f"  installed: {', '.join(names[:8]) or 'none'}{', ...' if len(names) > 8 else ''}"
        broken = ", ".join(b.distribution for b in self.broken)
        return text + f"  all: posttrain plugins {kind}" + (f"  broken plugins: {broken}" if broken else "")

    def load(self, component: Component) -> Any:
        """The class (or function) that `component` names, imported now. Raises `PluginError`."""
        module, _, attribute = component.target.partition(":")
        with self.importing(component):
            try:
                return getattr(importlib.import_module(module), attribute)
            except ModuleNotFoundError:
                raise
            except Exception as error:
                raise PluginError([f"{component.kind} '{component.name}' ({self.provider(component)[0]}) is broken: "
                                   f"{component.target}: {_reason(error)}"]) from error

    @contextmanager
    def importing(self, component: Component) -> Iterator[None]:
        """Turns a package that is missing inside the block into a `PluginError` that says what to install."""
        try:
            yield
        except ModuleNotFoundError as error:
            distribution, package = self.provider(component)[0], (error.name or "").partition(".")[0]
            what = f"{component.kind} '{component.name}'"
            if package in ("", component.target.partition(".")[0].partition(":")[0]):
                raise PluginError([f"{what} ({distribution}) is broken: {component.target}: {error}"]) from error
            raise PluginError([f"{what} needs {package}, which is not installed: "
                               f"{_install_hint(distribution, package, component.name)}"]) from error

    def create(self, kind: str, name: str, **values: Any) -> Any:
        """The component `name` with the given fields. Raises `PluginError`, or `ConfigError` for a wrong field."""
        problems: list[Problem] = []
        made = self.build(self.resolve(kind, name), values, (kind,), lambda _, text: problems.append(Problem(text)))
        if problems:
            raise ConfigError(problems)
        return made

    def build(self, component: Component, values: Mapping[str, Any], key: Key, report: Report) -> Any:
        """A component from its preset's defaults and `values`, or None after a report of what is wrong."""
        target = self.load(component)
        if not is_dataclass(target) and not (values or component.defaults):
            return target() if isinstance(target, type) else target  # without fields, or a plain function
        return construct(target, {**component.defaults, **values}, key, report, f"a field of {component.name}")


def discover(extra_plugins: Sequence[Path | object] = (), *, environ: Mapping[str, str] | None = None,
             entry_points: Iterable[metadata.EntryPoint] | None = None) -> Registry:
    """Find plugins: installed ones by entry point, further ones as files, modules or objects with hooks.

    `environ` (default: the process's) may hold `POSTTRAIN_PLUGINS` and `POSTTRAIN_BLOCK`.
    """
    environ = os.environ if environ is None else environ
    points = tuple(_installed() if entry_points is None else entry_points)
    allowed, blocked = _distributions(environ.get(ALLOW, "")), _distributions(environ.get(BLOCK, ""))
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    foreign, found = [], []
    for point in sorted(points, key=lambda p: (p.group, _owner(p), p.name)):
        name, version = _owner(point)
        if not point.group.startswith(f"{PROJECT}.v") or _canonical(name) in blocked:
            continue
        if point.group != ENTRY_POINT_GROUP:
            foreign.append(Foreign(name, point.group))
        elif not allowed or _canonical(name) in allowed:
            found.append(_register(manager, name, version, point.load))
    for plugin in extra_plugins:
        found.append(_register(manager, *_load_extra(plugin)))
    seen = {_canonical(f.distribution) for f in (*found, *foreign)}
    found += [Broken(name, f"named by {ALLOW}, but not installed") for name in sorted(allowed - seen)]
    return Registry(
        tuple(p for p in found if isinstance(p, Plugin)), tuple(p for p in found if isinstance(p, Broken)),
        tuple(foreign), Hooks(manager), lambda more: discover(
            (*extra_plugins, *more), environ=environ, entry_points=points))


def import_file(path: Path) -> ModuleType:
    """The module in the file at `path`. A file that did not change is executed once."""
    source = path.read_bytes()
    name = f"{PROJECT}_file_{path.stem}_{hashlib.sha256(bytes(path.resolve()) + source).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _register(manager: pluggy.PluginManager, name: str, version: str, load: Callable[[], object]) -> Plugin | Broken:
    """Import, register and question one plugin; whatever goes wrong concerns this plugin alone."""
    key = f"{name}#{len(manager.get_plugins())}"  # a distribution may have several entry points
    try:
        plugin = load()
        manager.register(plugin, key)
        manager.check_pending()
        return Plugin(name, version, _declared(manager, plugin))
    except (Exception, SystemExit) as error:
        if manager.has_plugin(key):
            manager.unregister(name=key)
        return Broken(name, _reason(error))


def _declared(manager: pluggy.PluginManager, plugin: Any) -> tuple[Component, ...]:
    if not manager.get_hookcallers(plugin):
        raise TypeError("implements no hook; mark its functions with @posttrain.hookspecs.hookimpl")
    declared = [c for result in _alone(manager, plugin, "components")() for c in result]
    for i, c in enumerate(declared):
        if not isinstance(c, Component) or ":" not in c.target:
            raise TypeError(f"components() holds {c!r}; it must be a Component whose target is 'module:Class'")
        if c.kind not in KINDS:
            raise ValueError(f"declares '{c.name}' with kind '{c.kind}', which is none{did_you_mean(c.kind, KINDS)}  "
                             f"kinds: {', '.join(KINDS)}")
        if (c.kind, c.name) in [(d.kind, d.name) for d in declared[:i]]:
            raise ValueError(f"declares {c.kind} '{c.name}' twice")
    if isinstance(plugin, ModuleType) and plugin.__name__.startswith(f"{PROJECT}_file_"):
        own = f"{Path(str(plugin.__file__)).stem}:"  # a single file may name its classes as `my_plugin:Class`
        declared = [replace(c, target=f"{plugin.__name__}:{c.target.removeprefix(own)}")
                    if c.target.startswith(own) else c for c in declared]
    return tuple(declared)


def _alone(manager: pluggy.PluginManager, plugin: object, hook: str) -> Callable[..., list[Any]]:
    """The hook as implemented by `plugin` alone."""
    return manager.subset_hook_caller(hook, [p for p in manager.get_plugins() if p is not plugin])


def _load_extra(plugin: Path | object) -> tuple[str, str, Callable[[], object]]:
    if isinstance(plugin, Path):
        return str(plugin), "", partial(import_file, plugin)
    return str(getattr(plugin, "__name__", type(plugin).__name__)), "", lambda: plugin


def _installed() -> list[metadata.EntryPoint]:
    """Entry points of this plugin interface, whatever its version."""
    points = metadata.entry_points()
    return [p for group in points.groups if group.startswith(f"{PROJECT}.v") for p in points.select(group=group)]


def _owner(point: metadata.EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist is not None else (point.name, "")


def _canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _distributions(text: str) -> frozenset[str]:
    return frozenset(_canonical(name.strip()) for name in text.split(",") if name.strip())


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, pluggy.PluginValidationError):
        text += "; the hooks are components, commands, run_started, step_finished, run_finished"
    return f"{type(error).__name__}: {text}"


def _install_hint(distribution: str, package: str, component: str) -> str:
    """`pip install 'posttrain-backends[hf]'` where an extra of the distribution brings the package."""
    try:
        requirements = metadata.requires(distribution) or []
    except (metadata.PackageNotFoundError, ValueError):
        requirements = []
    project, extras = _canonical(PROJECTS.get(package, package)), []
    for text in requirements:
        name, extra = re.match(r"[\w.-]+", text), re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", text)
        if name and extra and _canonical(name[0]) == project:
            extras.append(extra[1])
    chosen = component if component in extras else next(iter(extras), "")
    return f"pip install '{distribution}[{chosen}]'" if chosen else f"pip install {project}"
