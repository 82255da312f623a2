"""What `posttrain pareto FILE` is asked for: the file's keys, and the runs and soups that are to cover a front.

A plan is known before anything is trained: every point has a name made of what it is, so a plan that has grown finds
the points that are there. Knows configurations; trains nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
from posttrain import compose, config, fitting, layers
from posttrain.annotations import Key, construct
from posttrain.errors import ConfigError, InputError, Problem, did_you_mean
from posttrain.registry import Registry
from posttrain.trainer import held_out

DIGITS = 4
"""Decimals of drawn preferences, so that their names say them exactly."""
BASE = "base."
"""What a setting of the command line begins with that is one of the base."""
LEAST = """\
A front's file holds at least
  base: train.yaml                  # a configuration of a training run, relative to this file
  objectives: [accuracy, brevity]   # rewards of it, which are maximised
  reference: [0.0, -100.0]          # for each a mean that a useful policy exceeds"""


@final
@dataclass(frozen=True, slots=True)
class FrontSettings:
    """The keys of a front's file. Rewards are maximised; their means over held-out prompts are what is compared."""

    base: str
    """Configuration file of a training run (`loop: rl`), relative to this file."""
    objectives: tuple[str, ...]
    """Names of its rewards, at least two."""
    reference: tuple[float, ...]
    """The reference point of hypervolumes: for each objective a mean that a useful policy exceeds. Fixed for a front,
    since volumes above different points do not compare."""
    method: Literal["weights", "epsilon_constraint", "soups"] = "weights"
    """`weights` trains with weighted sums; `epsilon_constraint` maximises one objective and keeps the others above
    `levels`; `soups` trains one policy for each objective and mixes their weights."""
    front: str = ""
    """Folder of the front, which holds the run of each point; empty takes `runs/<name of this file>`."""
    preferences: Literal["grid", "dirichlet"] = "grid"
    """Of `weights` and `soups`: every split of 1 into multiples of 1 / `divisions`, or `draws` random ones."""
    divisions: int = 4
    """Of the grid; two objectives have `divisions` + 1 points, three (d + 1)(d + 2) / 2."""
    draws: int = 8
    """Random preferences. The first ones of a larger number are those of a smaller one."""
    alpha: float = 1.0
    """Concentration of the Dirichlet distribution: 1 is uniform, below 1 towards single objectives, above 1 towards
    equal shares."""
    seed: int = 0
    """Of the random preferences; runs have that of `base`."""
    levels: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Of `epsilon_constraint`: for each objective but one the means that it is kept above, in all combinations."""
    confidence: float = 0.5
    """Of the one-sided bound by which points are compared, from the spread over held-out prompts. At 0.5 these are the
    means themselves, since all points answer the same prompts."""

    def __post_init__(self) -> None:
        m = len(self.objectives)
        if m < 2 or len(set(self.objectives)) < m:
            raise ValueError(f"objectives must name at least two different rewards, got {list(self.objectives)}")
        if len(self.reference) != m or not all(map(math.isfinite, self.reference)):
            raise ValueError(f"reference needs {m} finite numbers, one for each of {', '.join(self.objectives)}, got "
                             f"{list(self.reference)}")
        for name in ("divisions", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.alpha < math.inf or self.seed < 0:
            raise ValueError("alpha must be positive and finite, and seed not negative")
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence lies in [0.5, 1), got {self.confidence}")
        limited = set(self.levels)
        if self.method == "epsilon_constraint":
            if not limited < set(self.objectives) or len(limited) != m - 1 or not all(self.levels.values()):
                raise ValueError(f"levels needs a list of numbers for all but one of {', '.join(self.objectives)}; the "
                                 f"one left out is maximised; got {sorted(limited)}")
        elif limited:
            raise ValueError("levels is of method: epsilon_constraint")


@final
@dataclass(frozen=True, slots=True)
class Candidate:
    """A point that is to be measured."""

    name: str
    """Of its folder too."""
    settings: tuple[str, ...] = ()
    """`key=value` over the base configuration: a run."""
    mix: Mapping[str, float] = field(default_factory=dict)
    """Names of other candidates -> weights: a soup of their policies. A run has none."""


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is known before the first run."""

    settings: FrontSettings
    file: Path
    directory: Path
    base: Path
    loaded: config.Loaded
    """The base configuration, without what a candidate changes."""
    prompts: int
    """Held-out prompts that means are over."""
    candidates: tuple[Candidate, ...]
    """A soup stands behind the runs that it mixes."""
    overrides: tuple[str, ...] = ()
    """`key=value` over the file, as the command was given them."""

    @property
    def name(self) -> str:
        """Of the front: that of its folder."""
        return self.directory.resolve().name

    def settings_of(self, candidate: Candidate) -> list[str]:
        """All settings over the base for a candidate's run: evaluated at its end, in its own folder, and shown
        in MLflow under a run of this front's name, unless the base names another one."""
        own = [*of_base(self.overrides), *candidate.settings, f"run={json.dumps(str(self.directory / candidate.name))}"]
        if not self.loaded.settings.evaluate.every:
            own.append(f"evaluate.every={self.loaded.settings.steps}")
        trackers = self.loaded.settings.trackers
        return own + [f"{key}.parent={json.dumps(self.name)}"
                      for key, component in self.loaded.components.items()
                      if key.startswith("trackers.") and component.name == "mlflow"
                      and not trackers[key.removeprefix("trackers.")].parent]

    def fingerprint(self) -> str:
        """SHA-256 of what all points share: the base configuration as a run keeps it, and its Python files."""
        python = [f"{path} {digest}" for path, digest in sorted(self.loaded.files.items()) if path.endswith(".py")]
        return hashlib.sha256("\n".join([config.to_yaml(self.loaded), *python]).encode()).hexdigest()


def read(file: Path, overrides: Sequence[str], registry: Registry) -> Plan:
    """The plan of a front's file and of `key=value` settings over it, `base.KEY=value` over its base. Raises
    `ConfigError`, with every problem of the file at once, and what the base configuration, or one with a candidate's
    settings, raises."""
    settings = _settings(file, [text for text in overrides if not text.startswith(BASE)])
    base = file.resolve().parent / settings.base
    if not base.is_file():
        raise ConfigError([Problem(f"base: no such file: {base}", str(file))])
    loaded = config.load(base, of_base(overrides), registry)
    problems = _of_base(settings, loaded)
    if problems:
        raise ConfigError(problems, f"{file} cannot be run with {base.name}:" if len(problems) > 1 else "")
    directory = Path(settings.front or Path("runs") / file.stem)
    candidates = tuple({c.name: c for c in METHODS[settings.method](settings, loaded)}.values())
    _, rows = compose.open_task(loaded.settings)
    prompts = len(held_out(rows, loaded.settings))
    if not prompts:
        raise ConfigError([Problem("a front is compared on held-out prompts, and the task holds none out; give "
                                   "task.held_out or task.held_out_fraction", base.name)])
    plan = Plan(settings, file, directory, base, loaded, prompts, candidates, tuple(overrides))
    for candidate in candidates:
        if not candidate.mix:  # all of them before the first is trained
            try:
                fitting.check(config.load(base, plan.settings_of(candidate), registry))
            except InputError as error:
                raise ConfigError(error.problems, f"{base.name} cannot be run for the point {candidate.name}:"
                                  ) from error
    return plan


def of_base(overrides: Sequence[str]) -> list[str]:
    """Those of the settings that are the base's, under its own names.

    >>> of_base(["divisions=8", "base.steps=3"])
    ['steps=3']
    """
    return [text.removeprefix(BASE) for text in overrides if text.startswith(BASE)]


def grid(objectives: int, divisions: int) -> Iterator[tuple[float, ...]]:
    """Every way to split 1 among objectives in multiples of 1 / divisions, all on the first one first
    (Das and Dennis 1998, SIAM J. Optimization 8).

    >>> list(grid(2, 2))
    [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    """
    for counts in itertools.product(range(divisions, -1, -1), repeat=objectives):
        if sum(counts) == divisions:
            yield tuple(count / divisions for count in counts)


def dirichlet(objectives: int, draws: int, alpha: float, seed: int) -> Iterator[tuple[float, ...]]:
    """Random preferences of sum 1, rounded to `DIGITS` decimals.

    >>> [round(sum(w), 9) for w in dirichlet(3, 2, 1.0, 0)]
    [1.0, 1.0]
    """
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        cuts = np.round(np.cumsum(rng.dirichlet([alpha] * objectives))[:-1], DIGITS)
        yield tuple(float(x) for x in np.round(np.diff(cuts, prepend=0.0, append=1.0), DIGITS))


def _preferences(settings: FrontSettings) -> Iterator[tuple[float, ...]]:
    m = len(settings.objectives)
    if settings.preferences == "grid":
        return grid(m, settings.divisions)
    return dirichlet(m, settings.draws, settings.alpha, settings.seed)


def _by_weights(settings: FrontSettings, loaded: config.Loaded) -> Iterator[Candidate]:
    for w in _preferences(settings):
        yield _weighted(settings.objectives, w, loaded)


def _by_levels(settings: FrontSettings, loaded: config.Loaded) -> Iterator[Candidate]:
    names = [name for name in settings.objectives if name in settings.levels]
    for chosen in itertools.product(*(settings.levels[name] for name in names)):
        given = ((f"rewards.{name}.at_least={level!r}", f"rewards.{name}.weight=1.0")  # a cost has no weight
                 for name, level in zip(names, chosen))
        yield Candidate("_".join(f"{name}-from-{level:g}" for name, level in zip(names, chosen)),
                        tuple(itertools.chain(*given)))


def _by_soups(settings: FrontSettings, loaded: config.Loaded) -> Iterator[Candidate]:
    m = len(settings.objectives)
    parents = [_weighted(settings.objectives, w, loaded) for w in np.eye(m).tolist()]
    yield from parents
    for w in _preferences(settings):
        if max(w) < 1.0:  # else it is a parent
            yield Candidate(_name("soup", settings.objectives, w),
                            mix={p.name: x for p, x in zip(parents, w) if x})


METHODS: Mapping[str, Callable[[FrontSettings, config.Loaded], Iterator[Candidate]]] = {
    "weights": _by_weights, "epsilon_constraint": _by_levels, "soups": _by_soups}


def _weighted(objectives: Sequence[str], w: Sequence[float], loaded: config.Loaded) -> Candidate:
    """A run in which each objective's own weight is multiplied by its preference."""
    own = _own(objectives, loaded)
    return Candidate(_name("weights", objectives, w),
                     tuple(f"{key}={float(x) * weight!r}" for (key, weight), x in zip(own, w)))


def _own(objectives: Sequence[str], loaded: config.Loaded) -> list[tuple[str, float]]:
    """Of each objective the key of its weight in the base, and the weight."""
    settings = loaded.settings
    if settings.combiner is None or "weights" not in {f.name for f in fields(settings.combiner)}:
        return [(f"rewards.{name}.weight", settings.rewards[name].weight) for name in objectives]
    return [(f"combiner.weights.{name}", settings.combiner.weights.get(name, 1.0)) for name in objectives]


def _name(what: str, objectives: Sequence[str], w: Sequence[float]) -> str:
    """`weights_accuracy-0.75_brevity-0.25`"""
    return "_".join([what, *(f"{name}-{x:g}" for name, x in zip(objectives, w))])


def _settings(file: Path, overrides: Sequence[str]) -> FrontSettings:
    """Raises one `ConfigError` with every problem of the file and of the settings over it."""
    reading = layers.Reading()
    given = layers.read_file(file, reading)
    given += [layer for text in overrides for layer in layers.read_setting(text, Path.cwd(), reading)]
    tree, marks = layers.merge(given, reading.problems)
    values: dict[str, Any] = layers.resolve(tree, marks, reading.problems)
    absent = [f.name for f in fields(FrontSettings)
              if f.default is MISSING is f.default_factory and f.name not in values]
    if absent and (tree or not reading.problems):
        reading.problems.append(Problem(f"{', '.join(absent)} must be given", str(file)))
    def report(key: Key, message: str) -> None:
        if key or not absent:  # else it says once more what is absent
            reading.problems.append(Problem(message, layers.where(marks, key) or str(file)))
    settings = construct(FrontSettings, values, (), report) if given else None
    if reading.problems or settings is None:
        raise ConfigError(reading.problems, f"{file} cannot be run:" if len(reading.problems) > 1 else "",
                          LEAST if given and absent else "")
    return settings  # type: ignore[no-any-return]  # of its first argument


def _of_base(settings: FrontSettings, loaded: config.Loaded) -> list[Problem]:
    """What the base configuration lacks for a front."""
    base, rewards = loaded.settings, loaded.settings.rewards
    if base.loop != "rl":
        return [Problem(f"base must learn from rewards (loop: rl), not {base.loop}")]
    problems = [Problem(f"objectives: the base has no reward '{name}'{did_you_mean(name, rewards)}  rewards: "
                        f"{', '.join(rewards) or 'none'}") for name in settings.objectives if name not in rewards]
    if settings.method == "soups" and "weights" not in {f.name for f in fields(base.policy)}:
        problems.append(Problem("method: soups loads mixed weights into the policy, and the base's backend has no "
                                "field weights; use another backend or method"))
    if problems:
        return problems
    if settings.method == "epsilon_constraint":
        return _of_weights([name for name in settings.objectives if name not in settings.levels], loaded)
    if base.gradient_combiner is not None:
        return [Problem(f"method: {settings.method} weighs rewards, and the base's gradient_combiner weighs them by "
                        "itself; leave it out, or use method: epsilon_constraint")]
    if base.combiner is not None and "weights" not in {f.name for f in fields(base.combiner)}:
        return [Problem(f"method: {settings.method} weighs rewards, and the base's combiner has no field weights; use "
                        "another one, or none")]
    return _of_weights(settings.objectives, loaded)


def _of_weights(objectives: Sequence[str], loaded: config.Loaded) -> list[Problem]:
    """Objectives that the base would not maximise, while the front does."""
    return [Problem(f"objectives: {key} is {weight:g} in the base, but an objective is maximised, so its weight must "
                    "be positive" + ("; write the reward with the other sign: a function that returns minus the "
                                     "length, or `use: length` with soft_limit and hard_limit" if weight < 0 else ""))
            for key, weight in _own(objectives, loaded) if not weight > 0]
