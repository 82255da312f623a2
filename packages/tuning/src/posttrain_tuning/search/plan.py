"""What `posttrain tune FILE` is asked for: the keys of the block `tune:`, all checked before the first trial.

The rest of the file is the configuration that trials vary, and an ordinary one: `posttrain train FILE` trains it as it
stands. Knows configurations; trains nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, final

from posttrain import compose, config, fitting, layers, search
from posttrain.annotations import Key, construct, dotted
from posttrain.errors import ConfigError, InputError, Problem, did_you_mean
from posttrain.protocols import Searcher
from posttrain.registry import Registry
from posttrain.schema import Settings, part
from posttrain.search import Goal, Range, Space, Values
from posttrain.trainer import held_out

BLOCK = "tune"
EVALUATED = "eval/"
"""How metrics begin that only an evaluation measures."""
LEAST = """\
A file for a search is a configuration of training with a block like
  tune:
    space:
      optimizer.lr: {log_uniform: [1e-5, 1e-2]}
    objectives: [{metric: eval/reward/mean}]"""


@final
@dataclass(frozen=True, slots=True)
class Objective:
    """A metric of `metrics.jsonl`, as one number of a trial."""

    metric: str
    direction: Literal["maximize", "minimize"] = "maximize"
    reduce: Literal["last", "best", "mean_last"] = "last"
    """Of the steps that have it: the last, the best, or the mean of the last `over` ones."""
    over: int = 5
    """Of `mean_last`."""

    def __post_init__(self) -> None:
        if self.over < 1:
            raise ValueError(f"over must be at least 1, got {self.over}")

    @property
    def goal(self) -> Goal:
        return Goal(self.metric, self.direction == "maximize")

    def value(self, records: Sequence[Mapping[str, Any]]) -> float | None:
        """Of the lines of a run; None where none of them has a finite number.

        >>> Objective("loss", "minimize", "best").value([{"loss": 3.0}, {"loss": 1.0}, {"loss": None}, {"kl": 0.0}])
        1.0
        """
        found = [x for record in records if (x := record.get(self.metric)) is not None and math.isfinite(x)]
        if not found:
            return None
        best = max if self.direction == "maximize" else min
        last = found[-self.over:]
        return float({"last": found[-1], "best": best(found), "mean_last": sum(last) / len(last)}[self.reduce])


@final
@dataclass(frozen=True, slots=True)
class Constraint:
    """A bound of a metric. A trial that breaks it is no candidate for the best, however good it is."""

    metric: str
    at_most: float | None = None
    at_least: float | None = None
    reduce: Literal["last", "best", "mean_last"] = "last"
    """As of objectives; `best` is the one that keeps the bound most."""
    over: int = 5

    def __post_init__(self) -> None:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("at_most or at_least must be given, and one of them only")

    @property
    def name(self) -> str:
        return f"{self.metric} {'at most' if self.at_most is not None else 'at least'} {self.limit:g}"

    @property
    def limit(self) -> float:
        return float(self.at_least if self.at_most is None else self.at_most)  # type: ignore[arg-type]  # one is there

    def violation(self, records: Sequence[Mapping[str, Any]]) -> float | None:
        """By how much it is broken; 0 or less where it is kept, None where nothing was measured.

        >>> Constraint("kl", at_most=0.5).violation([{"kl": 0.75}])
        0.25
        """
        direction: Literal["maximize", "minimize"] = "minimize" if self.at_least is None else "maximize"
        value = Objective(self.metric, direction, self.reduce, self.over).value(records)
        if value is None:
            return None
        return value - self.limit if self.at_least is None else self.limit - value


@final
@dataclass(frozen=True, slots=True)
class Prune:
    """Gives a trial up while it runs: at the first step beyond the bound."""

    metric: str
    at_most: float | None = None
    at_least: float | None = None
    after: int = 0
    """Steps up to here may be beyond it."""

    def __post_init__(self) -> None:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("at_most or at_least must be given, and one of them only")

    def reason(self, records: Sequence[Mapping[str, Any]]) -> str:
        """Why a run with these lines is given up; empty where it is not.

        >>> Prune("kl", at_most=0.5).reason([{"step": 3, "kl": 0.75}])
        'kl is 0.75 at step 3, above 0.5'
        """
        for record in records:
            x, step = record.get(self.metric), record["step"]
            if x is None or step <= self.after:
                continue
            if self.at_most is not None and x > self.at_most:
                return f"{self.metric} is {x:.4g} at step {step}, above {self.at_most:g}"
            if self.at_least is not None and x < self.at_least:
                return f"{self.metric} is {x:.4g} at step {step}, below {self.at_least:g}"
        return ""


@final
@dataclass(frozen=True, slots=True)
class Halving:
    """Asynchronous successive halving (Li et al. 2020, arXiv 1810.05934, algorithm 2): trials stop at rungs, and the
    best of a rung go on from their checkpoints."""

    rungs: tuple[int, ...] = ()
    """Steps after which a trial waits, rising; empty: every trial is trained to its end."""
    factor: int = 3
    """One in so many of a rung goes on."""

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise ValueError(f"factor must be at least 2, got {self.factor}")
        if list(self.rungs) != sorted(set(self.rungs)) or any(step < 1 for step in self.rungs):
            raise ValueError(f"rungs must be rising steps from 1 on, got {list(self.rungs)}")


@final
@dataclass(frozen=True, slots=True)
class Population:
    """Population-based training (Jaderberg et al. 2017, arXiv 1711.09846) by Ray Tune, in place of a searcher: `trials`
    members train side by side; every so often the worst take over the weights of the best, and change their settings.
    """

    every: int = 0
    """Steps between two comparisons; 0: no population, a searcher proposes trials."""
    quantile: float = 0.25
    """Share of the members that take over, and of those that are taken over from."""
    resample: float = 0.25
    """Probability that a changed setting is drawn anew; else a number is multiplied by 0.8 or 1.2, and an option moves
    to a neighbour."""
    cluster: str = ""
    """Address of a Ray cluster, such as `auto`; its machines share the study's folder. Empty starts Ray here."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every must not be negative, got {self.every}")
        if not 0 < self.quantile <= 0.5 or not 0 <= self.resample <= 1:
            raise ValueError("quantile lies in (0, 0.5] and resample in [0, 1]")


@final
@dataclass(frozen=True, slots=True)
class TuneSettings:
    """The block `tune:`, but for its `space`."""

    objectives: tuple[Objective, ...] = (Objective("eval/reward/mean"),)
    """One number of a trial each; several give a front. See `Objective`."""
    constraints: tuple[Constraint, ...] = ()
    """Bounds that the best keeps."""
    trials: int = 24
    workers: int = 1
    """Trials that run at the same time, each in a process of its own."""
    hours: float = 0.0
    """No trial begins after the command has run so long; those under way end. 0: no limit. Called again it goes on."""
    searcher: Any = part("searcher", "optuna")
    halving: Halving = field(default_factory=Halving)
    population: Population = field(default_factory=Population)
    prune: tuple[Prune, ...] = ()
    """What gives a trial up while it runs. One that diverges, or whose memory runs out, is given up in any case."""
    retries: int = 1
    """How often a trial whose process was killed goes on from its newest checkpoint."""
    devices: tuple[str, ...] = ()
    """`CUDA_VISIBLE_DEVICES` of the workers, one for each; empty leaves it as it is."""
    study: str = ""
    """Folder of the study, with the run of each trial; empty takes `runs/<name of the file>-study`."""

    def __post_init__(self) -> None:
        for name in ("trials", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.hours < math.inf or self.retries < 0:
            raise ValueError("hours and retries must not be negative")
        names = [objective.metric for objective in self.objectives]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"objectives must name at least one metric, each once, got {names}")
        if self.halving.rungs and len(names) > 1:
            raise ValueError(f"halving ranks trials by one objective, and there are {len(names)}; leave out its rungs")
        if self.population.every and (len(names) > 1 or self.constraints or self.prune or self.halving.rungs):
            raise ValueError("population compares its members by one objective, without constraints, prune and halving")
        if self.devices and len(self.devices) != self.workers:
            raise ValueError(f"devices needs one for each of {self.workers} workers, got {len(self.devices)}")


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is known before the first trial."""

    settings: TuneSettings
    space: Space
    file: Path
    directory: Path
    loaded: config.Loaded
    """The configuration as it stands, without what a trial changes."""
    overrides: tuple[str, ...] = ()
    """`key=value` over the file, as the command was given them."""

    @property
    def name(self) -> str:
        """Of the study: that of its folder."""
        return self.directory.resolve().name

    @property
    def goals(self) -> tuple[Goal, ...]:
        return tuple(objective.goal for objective in self.settings.objectives)

    @property
    def searcher(self) -> Searcher:
        return self.settings.searcher  # type: ignore[no-any-return]  # a component

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured of a trial."""
        return (*(o.metric for o in self.settings.objectives), *(c.metric for c in self.settings.constraints))

    def ends(self, values: Values) -> tuple[int, ...]:
        """Steps up to which a trial is trained in one go: its rungs, and the last."""
        return (*self.settings.halving.rungs, int(self.space.settings(values).get("steps", self.loaded.settings.steps)))

    def of_trial(self, values: Values) -> list[str]:
        """`key=value` settings over the file that make the configuration of a trial, wherever it runs."""
        settings = [f"{key}={json.dumps(value)}" for key, value in self.space.settings(values).items()]
        if any(metric.startswith(EVALUATED) for metric in self.metrics) and not self.loaded.settings.evaluate.every:
            settings.append(f"evaluate.every={self.ends(values)[-1]}")
        return [*of_base(self.overrides), *settings]

    def of_run(self, trial: int, values: Values) -> list[str]:
        """The same in the trial's own folder, and shown in MLflow under a run of the study's name, unless the file
        names another one."""
        trackers = self.loaded.settings.trackers
        return [*self.of_trial(values), f"run={json.dumps(str(self.run(trial)))}",
                *(f"{key}.parent={json.dumps(self.name)}" for key, component in self.loaded.components.items()
                  if key.startswith("trackers.") and component.name == "mlflow"
                  and not trackers[key.removeprefix("trackers.")].parent)]

    def run(self, trial: int) -> Path:
        """The run directory of a trial."""
        return self.directory / f"trial-{trial:04d}"

    def fingerprint(self) -> dict[str, str]:
        """What all trials of a study share: name -> SHA-256."""
        python = [f"{path} {digest}" for path, digest in sorted(self.loaded.files.items()) if path.endswith(".py")]
        settings = self.settings
        shared = {"configuration": "\n".join([config.to_yaml(self.loaded), *python]), "space": repr(self.space),
                  "objectives": repr(settings.objectives), "constraints": repr(settings.constraints),
                  "searcher": repr(settings.searcher), "halving": repr(settings.halving),
                  "population": repr(settings.population)}
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in shared.items()}


def read(file: Path, overrides: Sequence[str], registry: Registry) -> Plan:
    """The plan of a file and of `key=value` settings over it. Raises `ConfigError`, with every problem at once, and
    what the configuration raises as it stands."""
    reading = layers.Reading()
    given = layers.read_file(file, reading)
    given += [layer for text in overrides for layer in layers.read_setting(text, Path.cwd(), reading)]
    block, marks = _block(given)

    def report(key: Key, message: str) -> None:
        reading.problems.append(Problem(message, layers.where(marks, key) or str(file)))

    if not given or not block:
        raise ConfigError(reading.problems or [Problem(f"has no block {BLOCK}", str(file))], next_step=LEAST)
    space = search.read(block.pop("space", {}), (BLOCK, "space"), report)
    if not space.domains and not reading.problems:
        report((BLOCK,), f"{BLOCK}.space must say what is tried")
    settings = construct(TuneSettings, block, (BLOCK,), report, special=_components(registry, report))
    if reading.problems or settings is None:
        raise ConfigError(reading.problems, f"{file} cannot be searched:" if len(reading.problems) > 1 else "")
    loaded = config.load(file, overrides, registry)
    directory = Path(settings.study or Path("runs") / f"{file.stem}-study")
    plan = Plan(settings, space, file, directory, loaded, tuple(overrides))
    for key, message in _unfit(plan):
        report((BLOCK, *key), message)
    if reading.problems:
        raise ConfigError(reading.problems, f"{file} cannot be searched:" if len(reading.problems) > 1 else "")
    return plan


def require_runnable(plan: Plan, registry: Registry) -> None:
    """Raise `ConfigError` where the configuration cannot be run with an option, or with an end of a range."""
    for values in plan.space.corners():
        try:
            fitting.check(config.load(plan.file, plan.of_trial(values), registry))
        except InputError as error:
            said = ", ".join(f"{name} {value}" for name, value in values.items())
            raise ConfigError(error.problems, f"{plan.file} cannot be run with {said}:") from error


def of_base(overrides: Sequence[str]) -> list[str]:
    """Those of the settings that are not of the search.

    >>> of_base(["tune.trials=8", "steps=3"])
    ['steps=3']
    """
    return [text for text in overrides if not text.startswith((f"{BLOCK}.", f"{BLOCK}="))]


def _block(given: Sequence[layers.Layer]) -> tuple[dict[str, Any], dict[Key, layers.Mark]]:
    """The block of all layers, one over the other, and its marks. A domain, and a searcher that is named, replaces what
    lower layers say there."""
    block: dict[str, Any] = {}
    marks: dict[Key, layers.Mark] = {}
    for layer in given:
        own = layer.tree.get(BLOCK)
        if not isinstance(own, dict):
            continue
        space = {dotted(path): node for path, node in search.places(own.get("space") or {})}
        searcher = own.get("searcher", {})
        searcher = {"use": searcher} if isinstance(searcher, str) else searcher
        if isinstance(searcher, dict) and "use" not in searcher:
            searcher = {**block.get("searcher", {"use": "optuna"}), **searcher}
        halving = own.get("halving") or {}
        halving = {**block.get("halving", {}), **halving} if isinstance(halving, dict) else halving
        block |= {**own, "space": {**block.get("space", {}), **space}, "searcher": searcher, "halving": halving}
        marks |= {key: mark for key, mark in layer.marks.items() if key[:1] == (BLOCK,)}
        marks |= {(BLOCK, "space", dotted(path)): _mark(layer, path)
                  for path, _ in search.places(own.get("space") or {})}
    return block, marks


def _mark(layer: layers.Layer, path: Key) -> layers.Mark:
    """Where something of the space was written, however its key is split into blocks."""
    key = (BLOCK, "space", *path)
    return next(layer.marks[key[:n]] for n in range(len(key), 0, -1) if key[:n] in layer.marks)


def _components(registry: Registry, report: Any) -> Any:
    """Makes the component that a field with metadata of `kind` names."""
    def made(f: Field[Any], value: Any, key: Key) -> Any:
        kind = f.metadata["kind"]
        if not isinstance(value, dict) or not isinstance(value.get("use"), str):
            return report(key, f"{dotted(key)} must name a component of kind {kind}, as in {dotted(key)}: NAME or "
                               f"{dotted(key)}: {{use: NAME, field: value}}, got {value!r}")
        try:
            component = registry.resolve(kind, value["use"])
        except InputError as error:
            return report((*key, "use"), str(error))
        return registry.build(component, {k: v for k, v in value.items() if k != "use"}, key, report)
    return made


def _unfit(plan: Plan) -> Iterator[tuple[Key, str]]:
    """What the search asks for and the configuration, or the searcher, does not have."""
    base, settings = plan.loaded.settings, plan.settings
    known = [f.name for f in fields(Settings)]
    for key in plan.space.domains:
        first = key.partition(".")[0]
        if first not in known:
            yield ("space", key), f"{BLOCK}.space.{key}: {first} is no key{did_you_mean(first, known)}"
        if first in ("run", "plugins", "recipe", "extends", "checkpoint", "resume", "threads"):
            yield ("space", key), f"{BLOCK}.space.{key}: {first} is the same in all trials"
    if "steps" in plan.space.domains and settings.halving.rungs:
        yield ("space", "steps"), f"{BLOCK}.space.steps: steps cannot be searched where trials stop at rungs"
    if settings.halving.rungs and settings.halving.rungs[-1] >= base.steps:
        yield ("halving",), (f"{BLOCK}.halving: rungs must be below steps, which is {base.steps}, got "
                             f"{list(settings.halving.rungs)}")
    measured = [metric for metric in plan.metrics if metric.startswith(EVALUATED)]
    if measured and not held_out(compose.open_task(base)[1], base):
        yield ("objectives",), (f"{measured[0]} is measured on held-out prompts, and the task holds none out; give "
                                "task.held_out or task.held_out_fraction, or take another metric, such as reward/mean")
    if settings.population.every:
        yield from ((("population",), f"{BLOCK}.population: {text}") for text in _unfit_population(plan))
        return
    for problem in settings.searcher.problems(plan.space, plan.goals):
        yield ("searcher",), f"{BLOCK}.searcher: {problem}"


def _unfit_population(plan: Plan) -> Iterator[str]:
    if find_spec("ray") is None:
        yield "needs Ray Tune, which is not installed: pip install 'posttrain-tuning[ray]'"
    if plan.settings.population.every >= plan.loaded.settings.steps:
        yield f"every must be below steps, which is {plan.loaded.settings.steps}"
    if plan.settings.trials < 2:
        yield "needs two trials at least: its members"
    for name, domain, always in plan.space.parameters():
        if not always:
            yield f"{name} exists with one option alone, and members that change options would lack it; leave it out"
        if isinstance(domain, Range) and domain.step:
            yield f"{name} has a step, and members multiply numbers; leave the step out"
