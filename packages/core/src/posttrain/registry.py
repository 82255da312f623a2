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
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from posttrain import hookspecs
from posttrain.annotations import Key, Report, construct, dotted
from posttrain.errors import ConfigError, InputError, PluginError, Problem, did_you_mean
from posttrain.hookspecs import ENTRY_POINT_GROUP, IN_FILE, KINDS, PROJECT, Component
from posttrain.hooktrace import Call, traced

ALLOW, BLOCK = "POSTTRAIN_PLUGINS", "POSTTRAIN_BLOCK"
"""Environment variables: distributions, comma-separated, that alone are imported, or that never are."""
TRACE = "POSTTRAIN_TRACE_HOOKS"
"""Environment variable: where set, and not to 0, every call of a hook is told on stderr."""

HOOKS = ("components", "commands", "run_started", "step_finished", "run_finished")
"""What a plugin may implement; see `hookspecs`."""

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
"""What a component may be called: a configuration, a command line and `distribution/name` can say it."""

_VERSIONED = re.compile(rf"{PROJECT}\.v\d+")
"""Groups of entry points of some version of the plugin interface."""
_ALIKE = re.compile(rf"{PROJECT}([._-].*)?", re.IGNORECASE)
"""Groups that may be meant for one."""

PROJECTS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
"""Import names that are not the name of their distribution."""


FRAMEWORKS = frozenset({
    "accelerate", "datasets", "flax", "jax", "matplotlib", "mlflow", "onnx", "onnxruntime", "optuna", "pandas", "peft",
    "pyarrow", "scipy", "tensorflow", "tokenizers", "torch", "transformers", "triton", "vllm", "wandb"})
"""What a module that declares a component does not import: listing and help must stay quick."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin that was imported, and what it declares."""

    distribution: str
    version: str
    components: tuple[Component, ...]
    seconds: float = field(default=0.0, compare=False)
    """What its import and declaration took."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A plugin that could not be imported, declares something wrong, or raised in a hook."""

    distribution: str
    error: str
    remedy: str = field(default="", compare=False)
    """What to do about it."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """A distribution whose plugins are all in another group of entry points, for another version of the plugin
    interface or by a slip of the pen: reported, never imported."""

    distribution: str
    group: str

    @property
    def misnamed(self) -> str:
        """What is wrong with a group that names no version of the interface; empty where it names one."""
        if _VERSIONED.fullmatch(self.group):
            return ""
        return (f"{self.distribution} declares its plugin in the group '{self.group}'; did you mean "
                f"'{ENTRY_POINT_GROUP}'?")


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An installed plugin that the environment variable `by` leaves out: never imported."""

    distribution: str
    by: str


@dataclass(frozen=True, slots=True)
class Hooks:
    """The observing hooks of all plugins, typed. Each plugin is called on its own; one that raises is returned as
    `Broken`, and the others are called all the same."""

    manager: pluggy.PluginManager
    call: Call

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
                self.call(self.manager, plugin, hook, arguments)
            except (Exception, SystemExit) as error:  # an observer must not stop what it observes
                failed.append(Broken(name.rpartition("#")[0], f"{hook}: {reason(error)}"))
        return tuple(failed)


@dataclass(frozen=True, slots=True)
class Registry:
    """Components by kind and name. A value: `extended` gives another one."""

    plugins: tuple[Plugin, ...]
    broken: tuple[Broken, ...]
    foreign: tuple[Foreign, ...]
    hooks: Hooks
    rediscover: Callable[[Sequence[Path | object]], Registry]
    left_out: tuple[LeftOut, ...] = ()

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
                 and (not distribution or canonical(p.distribution) == canonical(distribution))]
        if not found:
            raise PluginError(self._not_found(kind, name))
        if len(found) > 1:
            raise PluginError([f"{kind} '{name}' is {_ambiguous(found)}"])
        return found[0][1]

    def _not_found(self, kind: str, name: str) -> list[str]:
        """That there is none of the name, then the plugins that may have it but offer nothing."""
        from posttrain.known import elsewhere, nearest  # only an error reads the index

        if known := elsewhere(self, kind, name):
            return [known]
        names = self.names(kind)
        near = get_close_matches(name.rpartition("/")[2], names, n=1)
        owner = " ".join(self.provider(next(c for c in self.components(kind) if c.name == near[0]))) if near else ""
        text = f"{kind} '{name}' not found"
        text += f"; did you mean '{near[0]}' ({owner.strip()})?" if near else nearest(self, kind, name)
        other = [c.kind for c in self.components() if c.name == name]
        text += f"; '{name}' is declared with kind '{other[0]}'" if other and not near else ""
        text += f"  installed: {', '.join(names[:8]) or 'none'}{', ...' if len(names) > 8 else ''}"
        return [f"{text}  all: posttrain plugins {kind}",
                *(f"broken plugin {b.distribution}: {b.error}" for b in self.broken),
                *(foreign.misnamed for foreign in self.foreign if foreign.misnamed)]

    def load(self, component: Component) -> Any:
        """The class (or function) that `component` names, imported now. Raises `PluginError`."""
        module, _, attribute = component.target.partition(":")
        broken = f"{component.kind} '{component.name}' ({self.provider(component)[0]}) is broken: "
        with self.importing(component), redirect_stdout(sys.stderr):
            try:
                found = importlib.import_module(module)
            except ModuleNotFoundError:
                raise
            except (Exception, SystemExit) as error:
                raise PluginError([f"{broken}{shown(component.target)}: {reason(error)}"]) from error
            try:
                return getattr(found, attribute)
            except AttributeError as error:
                near = did_you_mean(attribute, [name for name in vars(found) if not name.startswith("_")])
                raise PluginError([f"{broken}{shown(module)} has no '{attribute}'{near}"]) from error

    @contextmanager
    def importing(self, component: Component) -> Iterator[None]:
        """Turns a package that is missing inside the block into a `PluginError` that says what to install."""
        try:
            yield
        except ModuleNotFoundError as error:
            distribution, package = self.provider(component)[0], (error.name or "").partition(".")[0]
            what = f"{component.kind} '{component.name}'"
            if package in ("", component.target.partition(".")[0].partition(":")[0]):
                raise PluginError([f"{what} ({distribution}) is broken: {shown(component.target)}: {error}"]) from error
            raise PluginError([f"{what} needs {package}, which is not installed: "
                               f"{_install_hint(distribution, package, component)}"]) from error

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
        if fault := misfit(component, target):
            owner = self.provider(component)[0]
            return report(key, f"{component.kind} '{component.name}' ({owner}) is broken: {fault}")
        if not _has_fields(target) and values:
            return report((*key, next(iter(values))), f"{dotted(key)}: {component.name} takes no fields, since "
                          f"{shown(component.target)} is no dataclass; given: {', '.join(map(str, values))}")
        if not _has_fields(target):
            return _made(target, key, report) if isinstance(target, type) else target  # or a plain function
        return construct(target, {**component.defaults, **values}, key, report, f"a field of {component.name}")


def discover(extra_plugins: Sequence[Path | object] = (), *, environ: Mapping[str, str] | None = None,
             entry_points: Iterable[metadata.EntryPoint] | None = None) -> Registry:
    """Find plugins: installed ones by entry point, further ones as files, modules or objects with hooks.

    `environ` (default: the process's) may hold `POSTTRAIN_PLUGINS`, `POSTTRAIN_BLOCK` and `POSTTRAIN_TRACE_HOOKS`. What
    a plugin prints goes to stderr. An interrupt (Ctrl-C) goes on, with a note of the plugin that was being imported.
    """
    environ = os.environ if environ is None else environ
    installed, unread = _installed() if entry_points is None else (entry_points, ())
    points = tuple(installed)
    call: Call = traced(_call) if environ.get(TRACE, "0") not in ("", "0") else _call
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    chosen, foreign, left_out = _chosen(points, environ)
    found: list[Plugin | Broken | None] = list(unread)
    found += [_register(manager, call, name, version, point.load, _remedy(name, environ))
              for name, version, point in chosen]
    found += [_register(manager, call, *_load_extra(plugin), given=True) for plugin in extra_plugins]
    seen = {canonical(name) for name in (*(f.distribution for f in foreign), *(f.distribution for f in left_out),
                                         *(b.distribution for b in unread), *(name for name, _, _ in chosen))}
    found += [Broken(name, f"named by {ALLOW}, but not installed", f"pip install {name}, or take it out of {ALLOW}")
              for name in sorted(_distributions(environ.get(ALLOW, "")) - seen)]
    return Registry(
        tuple(p for p in found if isinstance(p, Plugin)), tuple(p for p in found if isinstance(p, Broken)),
        foreign, Hooks(manager, call), lambda more: discover(
            (*extra_plugins, *more), environ=environ, entry_points=points), left_out)


Chosen = tuple[tuple[str, str, metadata.EntryPoint], ...]


def _chosen(points: Iterable[metadata.EntryPoint], environ: Mapping[str, str],
            ) -> tuple[Chosen, tuple[Foreign, ...], tuple[LeftOut, ...]]:
    """Which plugins to import, as (distribution, version, entry point), and which not; in the order of their names."""
    allowed, blocked = _distributions(environ.get(ALLOW, "")), _distributions(environ.get(BLOCK, ""))
    chosen, foreign, left_out = [], [], []
    ours = [(*_owner(point), point) for point in points if _ALIKE.fullmatch(point.group)]
    fitting = {canonical(name) for name, _, point in ours if point.group == ENTRY_POINT_GROUP}
    for name, version, point in sorted(ours, key=lambda p: (p[2].group, p[0], p[1], p[2].name)):
        if canonical(name) in blocked:
            left_out.append(LeftOut(name, BLOCK))
        elif point.group != ENTRY_POINT_GROUP:  # one that offers this version too is used by that
            foreign += [] if canonical(name) in fitting else [Foreign(name, point.group)]
        elif allowed and canonical(name) not in allowed:
            left_out.append(LeftOut(name, ALLOW))
        else:
            chosen.append((name, version, point))
    return tuple(chosen), tuple(dict.fromkeys(foreign)), tuple(dict.fromkeys(left_out))


def import_file(path: Path) -> ModuleType:
    """The module in the file at `path`. A file that did not change is executed once."""
    source = path.read_bytes()
    stem = re.sub(r"\W", "_", path.stem)  # what a target names must be an identifier
    name = f"{IN_FILE}{stem}_{hashlib.sha256(bytes(path.resolve()) + source).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:  # not by the loader: its cache takes a file that changed within a second for the old one
        exec(compile(source, str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def misfit(component: Component, target: Any) -> str:
    """What is wrong with a component beside its target, imported; empty where nothing is."""
    if not callable(target):
        return f"{shown(component.target)} is no class and no function, but {target!r}"
    if not _has_fields(target):
        return f"it has defaults, but {shown(component.target)} is no dataclass" if component.defaults else ""
    known = [f.name for f in fields(target) if f.init]
    wrong = [f"'{name}'{did_you_mean(name, known)}" for name in component.defaults if name not in known]
    return f"its defaults name what is no field of {shown(component.target)}: {', '.join(wrong)}" if wrong else ""


def _made(target: type, key: Key, report: Report) -> Any:
    """An instance of a class without fields, or None after a report."""
    try:
        return target()
    except (ValueError, TypeError, InputError) as error:
        return report(key, f"{dotted(key)}: {error}")


def _has_fields(target: Any) -> bool:
    return isinstance(target, type) and is_dataclass(target)


def _register(manager: pluggy.PluginManager, call: Call, name: str, version: str, load: Callable[[], object],
              remedy: str, given: bool = False) -> Plugin | Broken | None:
    """Import, register and question one plugin; whatever goes wrong concerns this plugin alone. None for an object
    that stands there already under the same name, or that was `given` by name though it is installed."""
    key = f"{name}#{len(manager.get_plugins())}"  # a distribution may have several entry points
    start = time.perf_counter()
    try:
        with redirect_stdout(sys.stderr):
            plugin = load()
        hash(plugin)  # the manager puts plugins into sets: one that cannot be there would break all
        if manager.is_registered(plugin):
            owner = str(manager.get_name(plugin)).rpartition("#")[0]
            if given or owner == name:
                return None
            raise ValueError(f"its entry point names the same module as that of {owner}; uninstall one of the two")
        manager.register(plugin, key)
        manager.check_pending()
        return Plugin(name, version, _declared(manager, call, plugin), time.perf_counter() - start)
    except KeyboardInterrupt as stop:  # Ctrl-C; a plugin that raises it by itself cannot be told from that
        stop.add_note(f"interrupted while plugin {name} was imported; to leave it out: {BLOCK}={name}")
        raise
    except BaseException as error:  # SystemExit too, and what test frameworks end a test with
        if manager.has_plugin(key):
            manager.unregister(name=key)
        return Broken(name, reason(error), remedy)


def _declared(manager: pluggy.PluginManager, call: Call, plugin: object) -> tuple[Component, ...]:
    hooks = manager.get_hookcallers(plugin)
    if not hooks:
        raise TypeError("implements no hook; mark its functions with @posttrain.hookspecs.hookimpl")
    results = call(manager, plugin, "components", {})
    if not results and "components" in [hook.name for hook in hooks]:
        raise TypeError("components() returned None; return or yield its components")
    if wrong := [result for result in results if not isinstance(result, Iterable)]:
        raise TypeError(f"components() returned {wrong[0]!r}; it must return or yield several components, as a list")
    declared = [c for result in results for c in result]
    for i, c in enumerate(declared):
        if fault := _fault(c):
            raise ValueError(fault)
        if (c.kind, c.name) in [(d.kind, d.name) for d in declared[:i]]:
            raise ValueError(f"declares {c.kind} '{c.name}' twice")
    if isinstance(plugin, ModuleType) and plugin.__name__.startswith(IN_FILE):
        own = f"{Path(str(plugin.__file__)).stem}:"  # a single file may name its classes as `my_plugin:Class`
        declared = [replace(c, target=f"{plugin.__name__}:{c.target.removeprefix(own)}")
                    if c.target.startswith(own) else c for c in declared]
    return tuple(declared)


def _fault(c: object) -> str:
    """What is wrong with a declaration, seen without importing its target; empty where nothing is."""
    if not isinstance(c, Component):
        return f"components() holds {c!r}; it must be a Component whose target is 'module:Class'"
    texts: dict[str, object] = {f: getattr(c, f) for f in ("kind", "name", "target", "summary", "source", "extra")}
    if wrong := [f"{f}={value!r}" for f, value in texts.items() if not isinstance(value, str)]:
        return f"declares a component with {', '.join(wrong)}, which must be text"
    if c.kind not in KINDS:
        return (f"declares '{c.name}' with kind '{c.kind}', which is none{did_you_mean(c.kind, KINDS)}  "
                f"kinds: {', '.join(KINDS)}")
    if not NAME.fullmatch(c.name):
        return (f"declares {c.kind} {c.name!r}; a name begins with a letter and holds letters, digits, '_', '-' and "
                "'.' alone")
    module, colon, attribute = c.target.partition(":")
    if not (colon and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        return f"declares {c.kind} '{c.name}' with target {c.target!r}, which must be 'module:Class'"
    defaults: object = c.defaults
    if not isinstance(defaults, Mapping) or not all(isinstance(name, str) for name in defaults):
        return f"declares {c.kind} '{c.name}' with defaults={defaults!r}, which must map names of fields to values"
    return ""


def _ambiguous(found: Sequence[tuple[Plugin, Component]]) -> str:
    """Who offers one name, and how to choose: `distribution/name`, where that tells them apart."""
    owners = list(dict.fromkeys(f"{p.distribution} {p.version}".strip() for p, _ in found))
    if len(owners) == 1:
        return (f"declared twice by {owners[0]} ({' and '.join(c.target for _, c in found)}); its authors must rename "
                "one of the two")
    choices = ", ".join(f"'{p.distribution}/{c.name}'" for p, c in found)
    return f"offered by {' and '.join(owners)}; choose one of {choices}"


def _call(manager: pluggy.PluginManager, plugin: object, hook: str, arguments: Mapping[str, Any]) -> list[Any]:
    """What `plugin` alone answers to a hook; a generator is run to its end. What it prints goes to stderr."""
    caller = manager.subset_hook_caller(hook, [p for p in manager.get_plugins() if p is not plugin])
    with redirect_stdout(sys.stderr):
        return [list(answer) if isinstance(answer, Iterator) else answer for answer in caller(**arguments)]


def _load_extra(plugin: Path | object) -> tuple[str, str, Callable[[], object], str]:
    if isinstance(plugin, Path):
        return str(plugin), "", partial(import_file, plugin), "mend the file, or take it out of plugins:"
    return str(getattr(plugin, "__name__", type(plugin).__name__)), "", lambda: plugin, "mend what was handed over"


def _remedy(name: str, environ: Mapping[str, str]) -> str:
    others = [other for other in environ.get(BLOCK, "").split(",") if other.strip()]
    return f"mend or upgrade it, or leave it out: {BLOCK}={','.join([*others, name])}"


def _installed() -> tuple[list[metadata.EntryPoint], tuple[Broken, ...]]:
    """Entry points of this plugin interface, whatever its version, or of a group that is called almost so, and
    distributions whose metadata cannot be read."""
    try:
        points = metadata.entry_points()
        groups = [group for group in points.groups if _ALIKE.fullmatch(group)]
        return [point for group in groups for point in points.select(group=group)], ()
    except Exception:  # of any distribution; each is looked at on its own, which takes longer
        return _one_by_one()


def _one_by_one() -> tuple[list[metadata.EntryPoint], tuple[Broken, ...]]:
    """All entry points, and distributions that do not say theirs. Of two of one name the first on the path counts."""
    points: dict[str, list[metadata.EntryPoint]] = {}
    broken: dict[str, Broken] = {}
    for distribution in metadata.distributions():
        name, _ = _said_by(distribution)
        if (key := canonical(name)) in points or key in broken:
            continue
        try:
            points[key] = list(distribution.entry_points)
        except Exception as error:
            name = name or str(distribution.locate_file(""))
            broken[key] = Broken(name, f"its entry_points.txt cannot be read: {type(error).__name__}: {error}",
                                 f"install it anew: pip install --force-reinstall --no-deps {name}")
    every = [point for found in points.values() for point in found]
    return [point for point in every if _ALIKE.fullmatch(point.group)], tuple(broken.values())


def _owner(point: metadata.EntryPoint) -> tuple[str, str]:
    """Distribution and version; each is a file parsed, so it is asked for once."""
    name, version = ("", "") if point.dist is None else _said_by(point.dist)
    return name or point.name, version


def _said_by(distribution: metadata.Distribution) -> tuple[str, str]:
    """Name and version by a distribution's metadata; empty where these cannot be read."""
    try:
        known: Mapping[str, str] = dict(distribution.metadata.items())  # type: ignore[attr-defined]  # a Message
    except Exception:  # files that an installation left half-written may hold anything
        return "", ""
    return known.get("Name") or "", known.get("Version") or ""


def canonical(distribution: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _distributions(text: str) -> frozenset[str]:
    return frozenset(canonical(name.strip()) for name in text.split(",") if name.strip())


def reason(error: BaseException) -> str:
    """An exception in one line, with the place in the plugin where it was raised."""
    text = shown(" ".join(str(error).split()))
    if isinstance(error, pluggy.PluginValidationError):
        unknown = re.match(r"unknown hook '(\w+)'", text)
        text = f"{unknown[0]}{did_you_mean(unknown[1], HOOKS)}" if unknown else text
        text += f"; the hooks are {', '.join(HOOKS)}"
    ours = ("<", __file__, str(Path(pluggy.__file__).parent), str(Path(importlib.__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    heavy = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in FRAMEWORKS
    advice = "; import it inside the function that computes" if heavy else ""
    return f"{type(error).__name__}: {text}".removesuffix(": ") + place + advice


def shown(text: str) -> str:
    """A text in which a module that was imported from a file alone is called by its file.

    >>> shown("posttrain_file_part_20ecb805482a:Part")
    'part.py:Part'
    """
    def file(name: re.Match[str]) -> str:
        return Path(str(getattr(sys.modules.get(name[0]), "__file__", f"{name[1]}.py"))).name
    return re.sub(IN_FILE + r"(\w+?)_[0-9a-f]{12}", file, text)


def optional_requirements(distribution: str) -> list[tuple[str, str, str]]:
    """What the extras of a distribution bring, as (project, extra, least version)."""
    try:
        requirements = metadata.requires(distribution) or []
    except (metadata.PackageNotFoundError, ValueError):
        requirements = []
    found = []
    for text in requirements:
        name, extra = re.match(r"[\w.-]+", text), re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", text)
        least = re.search(r">=\s*([\w.]+)", text)
        if name and extra:
            found.append((canonical(name[0]), extra[1], least[1] if least else ""))
    return found


def _install_hint(distribution: str, package: str, component: Component) -> str:
    """`pip install 'posttrain-backends[hf]'` where an extra of the distribution brings the package."""
    project = canonical(PROJECTS.get(package, package))
    extras = [extra for brought, extra, _ in optional_requirements(distribution) if brought == project]
    chosen = next((e for e in (component.extra, component.name) if e in extras), next(iter(extras), ""))
    return f"pip install '{distribution}[{chosen}]'" if chosen else f"pip install {project}"
