"""From a configuration to `Settings`: layers merged, values checked, components created, every problem at once.

Knows the schema and the registry; imports no framework and loads no weights.
Order, low to high: field defaults < preset < recipe < `extends:` < file < command line.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import FunctionType, MappingProxyType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from posttrain import named
from posttrain.annotations import Key, construct, dotted
from posttrain.constrained import Bound
from posttrain.errors import ConfigError, InputError, PluginError, Problem, did_you_mean
from posttrain.hookspecs import IN_FILE, Component
from posttrain.layers import (
    COMMAND_LINE,
    Layer,
    Mark,
    Reading,
    at,
    merge,
    names_part,
    read_file,
    read_mapping,
    read_setting,
    resolve,
    slots,
    where,
)
from posttrain.off_policy import DEFAULT_CORRECTION, needs_correction
from posttrain.protocols import Need, RewardSource
from posttrain.recipes import RECIPES
from posttrain.registry import Registry, import_file
from posttrain.rewards.calls import Origin
from posttrain.rewards.scoring import Rule
from posttrain.schema import Settings

SHARED_CRITIC = "policy"
"""`critic: policy` names no component: values come from a head on the policy's trunk."""
ASIDE = ("tune",)
"""Blocks that stand in a configuration for a command of a plugin; a run passes over them."""
_DEFAULT = "default"
"""Where a value stands that nobody wrote."""
_ABSENT = (None, {"use": "none"})
"""A key of a component that holds none."""

SECRET = re.compile("token|secret|password|key", re.IGNORECASE)
"""Fields of trackers whose literal values are not written to a run directory."""


@dataclass(frozen=True, slots=True)
class RewardEntry:
    """A named reward: what is called, its weight in the sum, and what becomes of rows on which it fails."""

    name: str
    call: Callable[..., Any] | RewardSource
    weight: float = 1.0
    timeout: float = 30.0
    """Seconds for one call. A call on several rows that takes longer is done again row by row."""
    on_error: Rule = "fail"
    """What becomes of a row on which it raises."""
    on_timeout: Rule = "drop_sample"
    """What becomes of a row on which it does not answer in time, or ends its process."""
    bootstrap: bool = False
    """It is no part of the sum: its score of a truncated episode is the value with which an estimator whose field
    `bootstrap` is `score` goes on."""
    at_most: float | None = None
    """It is a cost, no part of the sum: `constraint` keeps its mean from being larger."""
    at_least: float | None = None
    """It is a cost, no part of the sum: `constraint` keeps its mean from being smaller."""
    origin: Origin | None = None
    """Where a worker finds it; None where it was handed over from Python."""

    @property
    def bound(self) -> Bound | None:
        """What is asked of a cost."""
        limited = self.at_most is not None or self.at_least is not None
        return Bound(self.at_most, self.at_least) if limited else None

    def __post_init__(self) -> None:
        if self.at_most is not None and self.at_least is not None:
            raise ValueError("at_most and at_least stand in one entry; a band is two entries of the same reward")
        if self.bound is not None and (self.weight != 1 or self.bootstrap):
            raise ValueError("at_most and at_least make it a cost, which has no weight and no bootstrap; leave those "
                             "out, or name the reward twice")
        if self.bound is not None and not math.isfinite(self.bound.limit):
            raise ValueError(f"at_most and at_least must be finite, got {self.bound.limit}")
        if not math.isfinite(self.weight):
            raise ValueError(f"weight must be finite, got {self.weight}")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout must be positive and finite, got {self.timeout}")


RULES = ("weight", "timeout", "on_error", "on_timeout", "bootstrap", "at_most", "at_least")
"""Fields of a reward's entry that stand beside those of the reward itself."""
WORKER_RULES = ("timeout", "on_timeout")
"""Those of them that mean something only where a reward is called in a worker."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration that was read and is right as far as values, types and names go."""

    settings: Settings
    tree: DictConfig
    """All layers merged, components as `{use: name, ...}`, `${...}` not resolved, paths absolute."""
    components: Mapping[str, Component]
    """By key (`estimator`, `rewards.correct`); parts from a file or from Python have none."""
    files: Mapping[str, str]
    """Path -> SHA-256 of every user file that was read: configurations, plugins, Python files."""
    registry: Registry
    """The given registry and the configuration's own `plugins:`."""
    base: Path
    """The folder that paths of the configuration are relative to."""
    name: str
    """Of the configuration: the file's name without its ending, or `run`."""


def load(source: Path | Mapping[str, Any], overrides: Sequence[str], registry: Registry) -> Loaded:
    """Read a YAML file or a dict, and `key=value` settings over it. Raises one `ConfigError` with every problem."""
    reading = Reading()
    tree, marks = _merged(source, overrides, reading)
    base = source.resolve().parent if isinstance(source, Path) else Path.cwd()
    registry = _with_plugins(tree, marks, registry, reading)
    values = resolve(tree, marks, reading.problems)
    for key, mark in marks.items():
        if mark.value is not None and isinstance(parent := at(values, key[:-1]), dict):
            parent[key[-1]] = mark.value
    values.pop("recipe", None)
    for name in set(values) - {f.name for f in fields(Settings)}:
        if name != "extends" and (hint := did_you_mean(name, ("recipe", "extends"))):  # keys that only layers have
            values.pop(name)
            reading.problems.append(Problem(f"{name} is not a key{hint}", where(marks, (name,))))
    builder = _Builder(registry, marks, tree, reading)
    settings = builder.settings(values)
    if settings is not None and needs_correction(settings):
        tree["correction"] = {"use": DEFAULT_CORRECTION}
        settings = replace(settings, correction=builder.part("correction", tree["correction"], ("correction",)))
    if reading.problems or settings is None:
        title = f"{source if isinstance(source, Path) else 'the configuration'} cannot be run:"
        problems = _told(reading.problems, builder.beside)
        raise ConfigError(problems, title if len(problems) > 1 else "")
    return Loaded(settings, OmegaConf.create(tree), builder.components, reading.files, registry, base,
                  source.stem if isinstance(source, Path) else "run")


def to_yaml(loaded: Loaded, rows: Mapping[str, str] = MappingProxyType({})) -> str:
    """What a run directory keeps: running this file repeats the run. Literal secrets of trackers are left out.

    `rows` names the files (field of the `rows` task -> path) that hold what came from Python as lists.
    """
    tree: dict[str, Any] = OmegaConf.to_container(loaded.tree)  # type: ignore[assignment]  # a dict stays one
    if rows:
        kept = {key: value for key, value in tree["task"].items() if key not in ("rows", "held_out_rows")}
        tree["task"] = {**kept, **rows}
    for slot, meta in slots():
        holder = at(tree, slot[:-1])
        parts = holder[slot[-1]] if meta.get("many") else holder
        for name in list(parts) if meta.get("many") else [slot[-1]]:
            node = _redacted(parts[name]) if meta["kind"] == "tracker" else _by_file(parts[name])
            parts[name] = node["use"] if isinstance(node, dict) and set(node) == {"use"} else node
    return OmegaConf.to_yaml(OmegaConf.create({key: tree[key] for key in ("recipe", *tree) if key in tree}))


def derived(settings: Settings) -> tuple[tuple[str, str], ...]:
    """Sizes that follow from the settings, as (what, value) rows."""
    if settings.loop == "supervised":
        pairs = Need.PREFERRED in settings.objective.needs
        episodes = settings.batch_size * (2 if pairs else 1)
        return (("episodes per optimiser step", f"{episodes:,}" + f" ({settings.batch_size:,} pairs)" * pairs),
                ("optimiser steps in all", f"{settings.steps:,}"),
                ("episodes in all", f"{settings.steps * episodes:,}"))
    rollout, update = settings.rollout, settings.update
    fresh = rollout.prompts_per_step * rollout.group_size
    trained = fresh + settings.replay.reuse
    optimiser = update.steps_per_rollout * update.epochs
    per_step = f"{trained // update.steps_per_rollout:,}" + (
        f" to {-(-trained // update.steps_per_rollout):,}" if trained % update.steps_per_rollout else "")
    return (
        ("episodes per step", f"{fresh:,} ({rollout.prompts_per_step} prompts x {rollout.group_size} answers)"
         + (f" and {settings.replay.reuse:,} replayed" if settings.replay.reuse else "")),
        ("optimiser steps per rollout", f"{optimiser:,} ({update.steps_per_rollout} minibatches x {update.epochs} "
                                        "passes)"),
        ("episodes per optimiser step", per_step),
        ("optimiser steps in all", f"{settings.steps * optimiser:,}"),
        ("new tokens per step, at most", f"{fresh * rollout.max_new_tokens:,}"),
        ("new tokens in all, at most", f"{settings.steps * fresh * rollout.max_new_tokens:,}"))


def _merged(source: Path | Mapping[str, Any], overrides: Sequence[str],
            reading: Reading) -> tuple[dict[str, Any], dict[Key, Mark]]:
    """All layers as one tree; the recipe is the one that the highest layer names."""
    given = read_file(source, reading) if isinstance(source, Path) else read_mapping(source, reading)
    if reading.problems and not given:
        raise ConfigError(reading.problems)
    base = source.resolve().parent if isinstance(source, Path) else Path.cwd()
    given += [layer for text in overrides for layer in read_setting(text, Path.cwd(), reading)]
    for layer in given:
        layer.tree = {key: value for key, value in layer.tree.items() if key not in ASIDE}
    chosen = next((layer for layer in reversed(given) if "recipe" in layer.tree), None)
    layers = [_layer(_defaults(Settings), _DEFAULT, base)]
    if chosen is not None and (name := chosen.tree["recipe"]) is not None:
        if name in RECIPES:
            layers.append(_layer(RECIPES[name].settings, f"recipe {name}", base))
        else:
            reading.problems.append(Problem(f"recipe '{name}' not found{did_you_mean(str(name), RECIPES)}  recipes: "
                                            f"{', '.join(RECIPES)}", where(chosen.marks, ("recipe",))))
    return merge([*layers, *given], reading.problems)


def _layer(settings: Mapping[str, Any], name: str, base: Path) -> Layer:
    """A layer of values that no user wrote."""
    layer = Layer({k: dict(v) if isinstance(v, Mapping) else v for k, v in settings.items()})
    layer.marks = {(key,): Mark(name, base) for key in layer.tree}
    for key, value in layer.tree.items():
        layer.marks |= {(key, below): Mark(name, base) for below in value} if isinstance(value, dict) else {}
    return layer


def _defaults(block: Any) -> dict[str, Any]:
    """The schema's own defaults as plain values."""
    values = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(block)}
    return {name: _defaults(type(v)) if is_dataclass(v) else list(v) if isinstance(v, tuple) else v
            for name, v in values.items()}


def _with_plugins(tree: dict[str, Any], marks: Mapping[Key, Mark], registry: Registry, reading: Reading) -> Registry:
    """The registry with the files and modules under `plugins:`; paths in `tree` become absolute."""
    names = tree.get("plugins")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return registry  # of a wrong type: reported with all other keys
    base, written = marks["plugins",].base, where(marks, ("plugins",))
    tree["plugins"] = [named.absolute(name, base) for name in names]
    found = named.extended(registry, names, base)
    reading.problems += [Problem(f"plugins: {problem}", written) for problem in found.problems]
    for path in found.files:
        reading.record(path)
    return found.registry


@dataclass(slots=True)
class _Builder:
    """Turns component nodes of the resolved tree into components, and notes every problem on the way."""

    registry: Registry
    marks: Mapping[Key, Mark]
    tree: dict[str, Any]
    reading: Reading
    components: dict[str, Component] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    """What may lie behind names that were not found (plugins that are broken) -> where such a name was written."""

    def problem(self, key: Key, message: str) -> None:
        """Note what is wrong, with the place where `key` was written."""
        self.reading.problems.append(Problem(message, where(self.marks, key)))

    def settings(self, values: dict[str, Any]) -> Settings | None:
        """The whole configuration, or None where something in it is wrong."""
        return construct(Settings, values, (), self.problem, special=self.slot)  # type: ignore[no-any-return]  # of its first argument

    def slot(self, f: Field[Any], value: Any, key: Key) -> Any:
        """What a key of components holds: one, none, or a map of names to them."""
        kind = f.metadata["kind"]
        if (beside := f.metadata.get("beside")) and value == {"use": f.default} and self.tree.get(beside) in _ABSENT:
            return None
        if not f.metadata.get("many"):
            absent = {"use": "none"} if "none" in self.registry.names(kind) else None
            return None if f.default is value is None else self.part(
                kind, absent if value is None else value, key, f.default is None)
        if not isinstance(value, dict):
            return self.problem(key, f"{dotted(key)} must be a map of names to components, as in {dotted(key)}: "
                                     f"{{my_name: NAME}}, got {value!r}")
        return {name: self.part(kind, node, (*key, name)) for name, node in value.items() if node is not None}

    def part(self, kind: str, node: Any, key: Key, optional: bool = False) -> Any:
        """The component under `key`; a reward becomes a `RewardEntry`."""
        if not isinstance(node, dict) or not names_part(kind, node):
            hint = "; quote the word if YAML took it for true or false" if isinstance(node, bool) else ""
            name = dotted(key)
            return self.problem(key, f"{name} must name a component of kind {kind}, as in {name}: NAME or {name}: "
                                     f"{{use: NAME, field: value}}, got {node!r}{hint}")
        given = {k: v for k, v in node.items() if k != ("use" if "use" in node else "file")}
        if kind == "reward":
            rules = {name: given.pop(name) for name in RULES if name in given}
            call = self.made(kind, node, given, key)
            self.reward_model(call, rules, key)
            entry = {"name": str(key[-1]), "call": call, "origin": self.origin(call, node, given, key), **rules}
            name = dotted(key)
            return construct(RewardEntry, entry, key, lambda at, message: self.problem(
                at, message.replace(f"{name}: ", f"{name}.", 1)))  # what is wrong begins with a field's name
        if node.get("use") == "none" and optional and "none" not in self.registry.names(kind):
            return None
        shared = (key, node) == (("critic",), {"use": SHARED_CRITIC})
        return SHARED_CRITIC if shared else self.made(kind, node, given, key)

    def reward_model(self, call: Any, rules: Mapping[str, Any], key: Key) -> None:
        """Note what is wrong with a reward that is no function."""
        if call is None or callable(call):
            return
        if not isinstance(call, RewardSource):
            self.problem(key, f"{dotted(key)}: {type(call).__name__} can neither be called nor loaded; a reward is a "
                              "function f(prompts, completions, **columns), or a RewardSource with load(threads)")
        for name in [name for name in WORKER_RULES if name in rules]:
            self.problem((*key, name), f"{dotted((*key, name))}: a reward that is a model is called in the training "
                                       "process, which has no deadline; leave it out")

    def origin(self, call: Any, node: Mapping[str, Any], given: Mapping[str, Any], key: Key) -> Origin | None:
        """Where another process finds a reward; None where it is an object from Python, or wrong."""
        if call is None or not isinstance(node.get("use", ""), str):
            return None
        if "use" not in node:
            return Origin.of(at(self.tree, key)["file"], call, given)
        module, _, name = self.components[dotted(key)].target.partition(":")
        in_file = module.startswith(IN_FILE)
        return Origin.of(f"{sys.modules[module].__file__ if in_file else module}:{name}", call, given)

    def made(self, kind: str, node: Mapping[str, Any], given: dict[str, Any], key: Key) -> Any:
        """The component that `use` or `file` names, with the given fields; an object from Python as it is."""
        if "use" not in node:
            return self.from_file(kind, node["file"], given, key)
        if not isinstance(name := node["use"], str):
            if given or self.marks[*key, "use"].value is None:
                self.problem((*key, "use"), f"{dotted(key)}: use names a component, or is an object from Python that "
                                            f"takes no further fields; got {name!r}")
            if isinstance(name, FunctionType) and (file := Path(name.__code__.co_filename)).is_file():
                self.reading.record(file)
            return name
        try:
            component = self.registry.resolve(kind, name)
            given = self.located(self.registry.load(component), given, key)
        except InputError as error:
            python = "; it was a Python object: write it as file: path.py:name" if name.startswith("<python: ") else ""
            first, *behind = error.problems if isinstance(error, PluginError) else (error,)
            for text in map(str, behind):
                self.beside[text] = where(self.marks, (*key, "use"))
            return self.problem((*key, "use"), f"{first}{python}")
        self.components[dotted(key)] = component
        return self.registry.build(component, given, key, partial(self.of_another, key, name))

    def of_another(self, slot: Key, name: str, key: Key, message: str) -> None:
        """Note what is wrong with a component's field; where `X.use=NAME` took it over, also how to drop it."""
        taken_over = key in self.marks and self.marks[*slot, "use"].where == COMMAND_LINE != self.marks[key].where
        hint = f"; {dotted(slot)}={{use: {name}}} drops the fields that were there"
        self.problem(key, message + hint * (taken_over and key != slot))

    def located(self, target: Any, given: dict[str, Any], key: Key) -> dict[str, Any]:
        """The given fields, those with metadata of `path` made absolute (`model.py:name` keeps its `:name`); what they
        name must exist."""
        for f in fields(target) if is_dataclass(target) else ():
            if f.metadata.get("path") and isinstance(value := given.get(f.name), str) and value:
                name, suffix = re.fullmatch(r"(.*?)((?<=\.py):\w+)?", value, re.DOTALL).groups("")  # type: ignore[union-attr]  # matches any text
                path = self.absolute((*key, f.name), name)
                if not path.exists():
                    self.problem((*key, f.name), f"{dotted((*key, f.name))}: no such file: {path}")
                elif path.suffix == ".py":
                    self.reading.record(path)
                given[f.name] = at(self.tree, key)[f.name] = f"{path}{suffix}"
        return given

    def absolute(self, key: Key, value: str) -> Path:
        """A path, relative to the file where it was written."""
        base = next(self.marks[key[:n]].base for n in range(len(key), 0, -1) if key[:n] in self.marks)
        return (base / value).resolve()

    def from_file(self, kind: str, location: Any, given: dict[str, Any], key: Key) -> Any:
        """What `file: path.py:name` names: a reward, or what makes a task (or a list of its rows) from the fields."""
        here = (*key, "file")
        if not isinstance(location, str) or ":" not in location:
            return self.problem(here, f"{dotted(here)} must be path.py:name, got {location!r}")
        file, _, attribute = location.rpartition(":")
        path = self.absolute(here, file)
        at(self.tree, key)["file"] = f"{path}:{attribute}"
        if not path.is_file():
            return self.problem(here, f"{dotted(here)}: no such file: {path}")
        try:
            self.reading.record(path)
            names = vars(import_file(path))
            if attribute not in names:
                hint = did_you_mean(attribute, [name for name in names if not name.startswith("_")])
                return self.problem(here, f"{dotted(here)}: {file} has no '{attribute}'{hint}")
            return self.called(kind, names[attribute], given, key)
        except InputError as error:
            return self.problem(here, f"{dotted(here)}: {error}")
        except Exception as error:  # the user's own code may raise anything
            return self.problem(here, f"{dotted(here)}: {location} raised {type(error).__name__}: {error}")

    def called(self, kind: str, target: Any, given: dict[str, Any], key: Key) -> Any:
        """A reward function with its fields bound; a component of the class, or the task that a function makes."""
        if isinstance(target, type) and is_dataclass(target):
            given = self.located(target, given, key)
            return construct(target, given, key, self.problem, f"a field of {target.__name__}")
        if not isinstance(target, type) and (kind == "reward" or not callable(target)):
            return partial(target, **given) if given else target
        made = target(**given)
        return self.registry.create("task", "rows", rows=tuple(made)) if isinstance(made, list | tuple) else made


def _told(problems: Sequence[Problem], beside: Mapping[str, str]) -> list[Problem]:
    """Problems in the order of lines, then what lies `beside` them (text -> place). Those of defaults that nobody wrote
    are left out where there are others: they may follow from them."""
    written = [problem for problem in problems if problem.where != _DEFAULT]
    return sorted(written or problems, key=_line) + [
        Problem(text) for text, place in beside.items() if place != _DEFAULT or not written]


def _line(problem: Problem) -> tuple[str, int]:
    """Problems of a file in the order of its lines."""
    file, _, line = problem.where.rpartition(":")
    return (file, int(line)) if line.isdigit() else ("\uffff", 0)


def _by_file(node: Any) -> Any:
    """A function from Python that stands at the top of a file, as `file: path.py:name`."""
    found = re.fullmatch(r"<python: (.+\.py:\w+)>", str(node.get("use"))) if isinstance(node, dict) else None
    return node if found is None else {"file": found[1], **{k: v for k, v in node.items() if k != "use"}}


def _redacted(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return {k: "<redacted>" if SECRET.search(str(k)) and isinstance(v, str) and "${" not in v else v
            for k, v in node.items()}
