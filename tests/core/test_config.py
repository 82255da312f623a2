"""Configurations: layers, names, types, and every problem at once with the line where it stands."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import asdict, dataclass, field
from enum import Enum, IntEnum, StrEnum
from pathlib import Path
from typing import Any, Literal

import pytest
from needed import first_party
from omegaconf import OmegaConf
from posttrain.config import Loaded, RewardEntry, derived, load, to_yaml
from posttrain.errors import ConfigError, DataError, PluginError, PosttrainError, Problem
from posttrain.hookspecs import Component, hookimpl
from posttrain.recipes import RECIPES
from posttrain.registry import Registry, discover
from posttrain.schema import Settings


class Mode(Enum):
    """Members with values that YAML holds, and one with a value that it does not."""

    MEAN = "mean"
    SUM = "sum"
    NEITHER = (0, 0)


class Word(StrEnum):
    """A member whose name is another's value: the value counts."""

    a = "b"
    b = "c"
    ON = "on"


class Level(IntEnum):
    """Numbers."""

    LOW = 0
    HIGH = 1


@dataclass(frozen=True)
class Inner:
    """A nested block of a component."""

    rate: float = 0.0
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Typed:
    """A component with a field of every type that a configuration can express."""

    number: float = 0.0
    whole: int = 0
    flag: bool = False
    text: str = ""
    choice: Literal["on", "mask", "none"] = "none"
    several: tuple[str, ...] = ()
    pair: tuple[float, int] = (0.0, 0)
    maybe: int | None = None
    either: float | Literal["auto"] = "auto"
    table: Mapping[str, float] = field(default_factory=dict)
    items: list[int] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)
    file: str = field(default="", metadata={"path": True})
    anything: Any = None
    function: Callable[[int], int] | None = None
    limit: float = 1.0
    mode: Mode = Mode.MEAN
    maybe_mode: Mode | None = None
    modes: tuple[Mode, ...] = ()
    word: Word = Word.ON
    level: Level = Level.LOW
    by_mode: Mapping[Mode, float] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()
    numbers: set[int] = field(default_factory=set)
    pairs: frozenset[tuple[int, int]] = frozenset()
    few: Set[Mode] = frozenset()
    lists: frozenset[Any] = frozenset()
    refuses: str = ""

    def __post_init__(self) -> None:
        if self.refuses:
            raise REFUSALS[self.refuses]
        if self.limit <= 0:
            raise ValueError(f"limit must be positive, got {self.limit}")


REFUSALS: Mapping[str, PosttrainError] = {
    "config": ConfigError(["limit and refuses do not go together"]), "plugin": PluginError(["nothing of that name"]),
    "data": DataError([Problem("no number", "rows.txt:3"), "no rows"], "the rows are wrong:", "mend them")}
"""What components may raise in `__post_init__` beside `ValueError`."""


class Plugin:
    """Declares `Typed` as an estimator, a preset of it, and a tracker with a secret."""

    @hookimpl
    def components(self) -> list[Component]:
        target = f"{__name__}:Typed"
        return [Component("estimator", "typed", target, "every type"),
                Component("estimator", "preset", target, "a preset", defaults={"number": 0.5, "whole": 7}),
                Component("tracker", "remote", f"{__name__}:Remote", "has a secret")]


@dataclass(frozen=True)
class Remote:
    """A tracker that is told a secret."""

    api_key: str = ""
    url: str = ""


@pytest.fixture(scope="module")
def registry() -> Registry:
    sys.modules.setdefault(__name__, sys.modules[Typed.__module__])
    return discover([Plugin()], environ={})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with rows and rewards."""
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (tmp_path / "rewards.py").write_text(
        "def correct(prompts, completions, **columns):\n    return [1.0 for _ in completions]\n"
        "def scaled(prompts, completions, by=1.0, **columns):\n    return [by for _ in completions]\n"
        "def rows(n=1):\n    return [{'prompt': str(i)} for i in range(n)]\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(registry: Registry, text: str, *overrides: str) -> Loaded:
    Path("train.yaml").write_text(text)
    return load(Path("train.yaml"), overrides, registry)


def problems(registry: Registry, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        given(registry, text, *overrides)
    assert error.value.exit_code == 2
    return [str(problem) for problem in error.value.problems]


# --- values -----------------------------------------------------------------------------------------------------------

@first_party
def test_an_empty_file_is_the_schemas_defaults(folder: Path, registry: Registry) -> None:
    loaded = given(registry, "")
    elsewhere = ("trackers", "rollout", "value_objective")
    plain = {f for f in asdict(Settings()) if f not in loaded.components and f not in elsewhere}
    for name in plain:
        assert getattr(loaded.settings, name) == getattr(Settings(), name), name
    assert loaded.components["estimator"].name == "grpo" and loaded.components["rollout.engine"].name == "batched"
    assert set(loaded.settings.trackers) == {"console", "jsonl"}
    assert (loaded.base, loaded.name) == (folder, "train")


@first_party
@pytest.mark.parametrize(("written", "name", "value"), [
    ("1e-6", "number", 1e-6), ("3", "number", 3.0), ("1E5", "whole", 100_000), ("-7", "whole", -7),
    ("true", "flag", True), ("'7'", "text", "7"), ("2026-01-02", "text", "2026-01-02"), ("'on'", "choice", "on"),
    ("[a, b]", "several", ("a", "b")), ("[]", "several", ()), ("[1, 2]", "pair", (1.0, 2)), ("null", "maybe", None),
    ("3", "maybe", 3), ("auto", "either", "auto"), ("2", "either", 2.0), ("{a: 1}", "table", {"a": 1.0}),
    ("mean", "mode", Mode.MEAN), ("SUM", "mode", Mode.SUM), ("NEITHER", "mode", Mode.NEITHER),
    ("null", "maybe_mode", None), ("sum", "maybe_mode", Mode.SUM), ("[mean, SUM]", "modes", (Mode.MEAN, Mode.SUM)),
    ("b", "word", Word.a), ("c", "word", Word.b), ("a", "word", Word.a), ("'on'", "word", Word.ON),
    ("1", "level", Level.HIGH), ("HIGH", "level", Level.HIGH), ("{sum: 2}", "by_mode", {Mode.SUM: 2.0}),
    ("[a, b, a]", "tags", frozenset("ab")), ("[]", "tags", frozenset()), ("[2, 1]", "numbers", {1, 2}),
    ("[[1, 2]]", "pairs", frozenset({(1, 2)})), ("[mean]", "few", frozenset({Mode.MEAN})),
    ("[1, 2]", "items", [1, 2]), ("{rate: 1, names: [x]}", "inner", Inner(1.0, ("x",))), ("[1, {a: b}]", "anything",
                                                                                         [1, {"a": "b"}]),
])
def test_values_become_what_the_annotation_asks(folder: Path, registry: Registry, written: str, name: str,
                                                value: Any) -> None:
    made = getattr(given(registry, f"estimator: {{use: typed, {name}: {written}}}").settings.estimator, name)
    assert made == value and type(made) is type(value)


@first_party
@pytest.mark.parametrize(("written", "name", "message"), [
    ("high", "number", "must be a number, got 'high'"), ("true", "number", "must be a number, got True"),
    ("1.5", "whole", "must be a whole number, got 1.5"), ("'3'", "whole", "must be a whole number, got '3'"),
    ("1", "flag", "must be true or false, got 1"), ("5", "text", "must be text, got 5"),
    ("on", "choice", "must be one of 'on', 'mask', 'none', got True; YAML reads on, off, yes and no as true and false: "
                     "quote the word"),
    ("maks", "choice", "must be one of 'on', 'mask', 'none', got 'maks'; did you mean 'mask'?"),
    ("abc", "several", "must be a list, got 'abc'"), ("[1]", "several", "must be text, got 1"),
    ("[1]", "pair", "must be a list of 2 values, got [1]"), ("x", "maybe", "must be a whole number or null, got 'x'"),
    ("x", "either", "must be a number or one of 'auto', got 'x'"), ("[1]", "table", "must be a map, got [1]"),
    ("3", "inner", "must be a block of keys, got 3"),
    ("men", "mode", "must be one of 'mean', 'sum', 'NEITHER', got 'men'; did you mean 'mean'?"),
    ("[0, 0]", "mode", "must be one of 'mean', 'sum', 'NEITHER', got [0, 0]"),
    ("suum", "maybe_mode", "must be one of 'mean', 'sum', 'NEITHER' or null, got 'suum'; did you mean 'sum'?"),
    ("[mean, x]", "modes", "must be one of 'mean', 'sum', 'NEITHER', got 'x'"),
    ("on", "word", "must be one of 'b', 'c', 'on', got True; YAML reads on, off, yes and no as true and false: quote "
                   "the word"),
    ("true", "level", "must be one of 0, 1, got True"), ("2", "level", "must be one of 0, 1, got 2"),
    ("abc", "tags", "must be a list, got 'abc'"), ("[1]", "tags", "must be text, got 1"),
    ("{a: 1}", "tags", "must be a list, got {'a': 1}"), ("[[1]]", "lists", "must be a list, got [[1]]"),
])
def test_values_of_a_wrong_type(folder: Path, registry: Registry, written: str, name: str, message: str) -> None:
    text = f"steps: 3\nestimator:\n  use: typed\n  {name}: {written}\n"
    assert problems(registry, text) == [f"estimator.{name} {message} (train.yaml:4)"]


@first_party
def test_a_problem_deep_inside_names_the_whole_key(folder: Path, registry: Registry) -> None:
    text = "estimator:\n  use: typed\n  inner:\n    rte: 1\n  table: {a: x}\ncritic_optimizer:\n  lr: fast\n  lrr: 2\n"
    assert problems(registry, text) == [
        "estimator.inner.rte is not a key; did you mean 'rate'? (train.yaml:4)",
        "estimator.table.a must be a number, got 'x' (train.yaml:5)",
        "critic_optimizer.lr must be a number, got 'fast' (train.yaml:7)",
        "critic_optimizer.lrr is not a key; did you mean 'lr'? (train.yaml:8)"]


# --- every problem at once --------------------------------------------------------------------------------------------

WRONG = """\
recipe: grppo
stepz: 3
loop: on
seed: 1
rollout:
  group_sise: 4
  temperature: -1
  stop: abc
estimator:
  use: gae
  lamb: 0.5
kl: fixd
task: {use: rows, path: nope.jsonl}
rewards:
  a: {use: exact_match, weight: heavy}
  b: {file: rewards.py:corect}
  c: {file: gone.py:x}
  d:
    use: length
    hard_limit: 5
seed: 4
run: ${oc.env:NO_SUCH_VARIABLE}
"""


@first_party
def test_every_problem_is_told_at_once_with_its_line(folder: Path, registry: Registry) -> None:
    found = problems(registry, WRONG, "rollout.top_k=many", "nonsense")
    assert found == [
        "recipe 'grppo' not found; did you mean 'grpo'?  recipes: reinforce, grpo, dr_grpo, rloo, ppo, dapo, gspo, "
        "sft, dpo, reward_model (train.yaml:1)",
        "stepz is not a key; did you mean 'steps'? (train.yaml:2)",
        "loop must be one of 'rl', 'supervised', got True; YAML reads on, off, yes and no as true and false: quote the "
        "word (train.yaml:3)",
        "rollout.group_sise is not a key; did you mean 'group_size'? (train.yaml:6)",
        "rollout: temperature must be positive in training; evaluate.temperature may be 0 (greedy) (train.yaml:7)",
        "rollout.stop must be a list, got 'abc' (train.yaml:8)",
        "estimator.lamb is not a field of gae; did you mean 'lam'? (train.yaml:11)",
        "kl 'fixd' not found; did you mean 'fixed' (posttrain-objectives 0.1.0)?  installed: adaptive, band, "
        "constrained, cosine, dual, entropy, fixed, linear, ...  all: posttrain plugins kl (train.yaml:12)",
        f"task.path: no such file: {folder / 'nope.jsonl'} (train.yaml:13)",
        "rewards.a.weight must be a number, got 'heavy' (train.yaml:15)",
        "rewards.b.file: rewards.py has no 'corect'; did you mean 'correct'? (train.yaml:16)",
        f"rewards.c.file: no such file: {folder / 'gone.py'} (train.yaml:17)",
        "rewards.d: limits must rise from 0: soft_limit 256, hard_limit 5 (train.yaml:20)",
        "seed is written twice, first in line 4 (train.yaml:21)",
        "run: KeyError raised while resolving interpolation: \"Environment variable 'NO_SUCH_VARIABLE' not found\" "
        "(train.yaml:22)",
        "'nonsense' is not a setting; write key=value, as in rollout.group_size=8 (command line)",
        "rollout.top_k must be a whole number, got 'many' (command line)"]


@first_party
def test_the_whole_report_is_one_text(folder: Path, registry: Registry) -> None:
    with pytest.raises(ConfigError) as error:
        given(registry, "estimator: {use: gae, lamb: 1, gama: 1}")
    assert str(error.value).splitlines() == [
        "train.yaml cannot be run:",
        "  estimator.lamb is not a field of gae; did you mean 'lam'? (train.yaml:1)",
        "  estimator.gama is not a field of gae; did you mean 'gamma'? (train.yaml:1)"]
    with pytest.raises(ConfigError, match=r"^estimator.lamb is not a field of gae; .* \(command line\)$"):
        given(registry, "estimator: gae", "estimator.lamb=1")


@first_party
@pytest.mark.parametrize(("text", "message"), [
    ("zzz: 1", "zzz is not a key; known: steps, loop, seed, "),
    ("recipie: grpo", "did you mean 'recipe'? (train.yaml:1)"),
    ("rollout: {zzz: 1}", "rollout.zzz is not a key; known: engine, prompts_per_step, "),
    ("estimator: {use: gae, zzz: 1}", "estimator.zzz is not a field of gae; known: gamma, lam, "),
    ("estimator: null", "estimator must name a component of kind estimator, as in estimator: NAME or "),
    ("kl: off", "got False; quote the word if YAML took it for true or false (train.yaml:1)"),
    ("estimator: [gae]", "got ['gae'] (train.yaml:1)"), ("estimator: {use: 3}", "got 3 (train.yaml:1)"),
    ("critic: {lr: 1}", "critic must name a component of kind backend"),
    ("rollout: 3", "rollout must be a block of keys, got 3 (train.yaml:1)"),
    ("rewards: [exact_match]", "rewards must be a map of names to components, as in rewards: {my_name: NAME}"),
    ("rewards: {a: {weight: 2}}", "rewards.a must name a component of kind reward"),
    ("rewards: {a: {file: rewards.py}}", "rewards.a.file must be path.py:name, got 'rewards.py'"),
    ("estimator: {use: typed, limit: -2}", "estimator: limit must be positive, got -2.0 (train.yaml:1)"),
    ("steps: 0", "steps must be at least 1, got 0 (train.yaml:1)"),
    ("steps: ${", "steps: no viable alternative at input '${' (train.yaml:1)"),
    ("steps: ${no.such.key}", "steps: Interpolation key 'no.such.key' not found (train.yaml:1)"),
    ("steps: ${nonsense:1}", "steps: Unsupported interpolation type nonsense (train.yaml:1)"),
    ("rollout: {stop: ['${no}']}", "rollout.stop.0: Interpolation key 'no' not found (train.yaml:1)"),
    ("task: ${no}", "task.use: Interpolation key 'no' not found (train.yaml:1)"),
    ("extends: gone.yaml", "extends: no such file: "), ("plugins: [gone.py]", "plugins: no such file: "),
    ("plugins: gone.py", "plugins must be a list, got 'gone.py' (train.yaml:1)"),
    ("extends: train.yaml", "extends: extends itself (train.yaml:1)"),
    ("a: [1", "not valid YAML: expected ',' or ']', but got '<stream end>' (train.yaml:1)"),
    ("steps: !!python/object/apply:os.system ['true']", "not valid YAML: could not determine a constructor"),
    ("seed: &a [*a]", "not valid YAML"), ("- 1", "must be a block of `key: value` lines (train.yaml)"),
    ("rewards: {a: '<python: m.f>'}", "it was a Python object: write it as file: path.py:name"),
    ("estimator: torch", "estimator 'torch' not found; 'torch' is declared with kind 'backend'"),
])
def test_one_problem_is_one_message(folder: Path, registry: Registry, text: str, message: str) -> None:
    found = problems(registry, text)
    assert len(found) == 1 and message in found[0], found


@pytest.fixture
def core_alone() -> Registry:
    """As where core is installed and none of the packages that the schema's defaults name."""
    return discover(environ={"POSTTRAIN_PLUGINS": "posttrain-core"})


@first_party
@pytest.mark.parametrize(("text", "expected"), [
    ("estimater: grpo", ["estimater is not a key; did you mean 'estimator'? (train.yaml:1)"]),
    ("steps: [1", ["not valid YAML: expected ',' or ']', but got '<stream end>' (train.yaml:1)"]),
])
def test_what_is_wrong_with_defaults_is_told_only_where_nothing_else_is(
        folder: Path, core_alone: Registry, text: str, expected: list[str]) -> None:
    assert problems(core_alone, text) == expected
    left = problems(core_alone, "steps: 1")
    assert "estimator 'grpo' is in posttrain-estimators, which POSTTRAIN_PLUGINS leaves out" in "\n".join(left)
    assert len(left) > 1 and all(problem.endswith("(default)") for problem in left)


def test_broken_plugins_have_a_line_of_their_own_after_all_names_that_were_not_found(
        folder: Path, registry: Registry) -> None:
    Path("bad.py").write_text("1 / 0")
    broken = registry.extended([Path("bad.py")])
    found = problems(broken, "batching: nowhere_to_be_found\ntask: {use: neither_here}\nsteps: many")
    assert [problem for problem in found if "broken plugin" in problem] == found[3:] == [
        "broken plugin bad.py: ZeroDivisionError: division by zero (bad.py:1)"]
    assert found[0].startswith("batching 'nowhere_to_be_found' not found") and found[0].endswith("(train.yaml:1)")


@pytest.mark.parametrize(("text", "says"), [
    ("optimizer: {learning_rate: 1}", "optimizer.learning_rate is not a key; is called 'lr' here (train.yaml:1)"),
    ("critic_optimizer: {learning_rate: 1}", "critic_optimizer.learning_rate is not a key; is called 'lr' here"),
    ("learning_rate: 1", "learning_rate is not a key; is called 'optimizer.lr' here (train.yaml:1)"),
    ("num_generations: 8", "num_generations is not a key; is called 'rollout.group_size' here"),
    ("rollout: {max_completion_length: 8}", "is not a key; is called 'max_new_tokens' here"),
    ("beta: 0.1", "beta is not a key; is called 'kl.coef' here"),
    ("max_steps: 10", "max_steps is not a key; is called 'steps' here"),
    ("kl: {use: fixed, beta: 0.1}", "kl.beta is not a field of fixed; is called 'coef' here"),
])
@first_party
def test_a_key_of_another_library_is_told_its_name_here(folder: Path, registry: Registry, text: str, says: str) -> None:
    found = problems(registry, text)
    assert len(found) == 1 and says in found[0], found


def test_a_file_that_cannot_be_read(folder: Path, registry: Registry) -> None:
    with pytest.raises(ConfigError, match="cannot read gone.yaml: No such file or directory"):
        load(Path("gone.yaml"), [], registry)


# --- layers -----------------------------------------------------------------------------------------------------------

@first_party
def test_layers_from_low_to_high(folder: Path, registry: Registry) -> None:
    """Field defaults < preset < recipe < extends < file < command line, each seen where the next says nothing."""
    assert given(registry, "estimator: preset").settings.estimator == Typed(number=0.5, whole=7)
    assert given(registry, "estimator: {use: preset, whole: 1}").settings.estimator == Typed(number=0.5, whole=1)
    assert given(registry, "").settings.update.epochs == 1
    assert given(registry, "recipe: ppo").settings.update.epochs == 4
    (folder / "base.yaml").write_text("recipe: ppo\nupdate: {epochs: 2}\nseed: 1\nsteps: 9\n")
    loaded = given(registry, "extends: base.yaml\nseed: 2\n", "steps=3")
    assert (loaded.settings.update.epochs, loaded.settings.seed, loaded.settings.steps) == (2, 2, 3)
    assert loaded.settings.estimator.lam == 0.95, "the recipe of the extended file"
    assert given(registry, "extends: base.yaml\nrecipe: grpo\n").components["estimator"].name == "grpo"
    assert given(registry, "extends: base.yaml", "recipe=rloo").components["objective"].name == "reinforce"


@first_party
def test_naming_a_component_drops_the_old_ones_fields(folder: Path, registry: Registry) -> None:
    lam = given(registry, "estimator: gae", "estimator.lam=0.5").settings.estimator
    assert lam.lam == 0.5, "a field over a bare name"
    text = "estimator: {use: gae, lam: 0.5, gamma: 0.9}"
    assert given(registry, text, "estimator.lam=0.25").settings.estimator.gamma == 0.9
    assert given(registry, text, "estimator=gae").settings.estimator.lam == 0.95
    assert given(registry, text, "estimator=rloo").components["estimator"].name == "rloo"
    assert given(registry, text, "estimator=rloo", "estimator.eps=1e-3").settings.estimator.eps == 1e-3
    assert given(registry, text, "estimator={use: gae, lam: 1}").settings.estimator.gamma == 1.0
    assert problems(registry, text, "estimator=rloo", "estimator.lam=1")[0].endswith("(command line)")
    assert given(registry, "recipe: ppo\nkl: {target: 0.5}").settings.kl.target == 0.5, "fields over the recipe's part"
    assert given(registry, "rollout:\n  engine: {slots: 3}").settings.rollout.engine.slots == 3, "over the default"


@first_party
def test_use_alone_keeps_the_fields_that_are_there(folder: Path, registry: Registry) -> None:
    text = "estimator: {use: gae, lam: 0.5, gamma: 0.9}\nrewards: {a: {file: rewards.py:scaled, by: 2, weight: 3}}"
    loaded = given(registry, text, "estimator.use=td_lambda")
    assert loaded.components["estimator"].name == "td_lambda"
    assert (loaded.settings.estimator.lam, loaded.settings.estimator.gamma) == (0.5, 0.9)
    assert given(registry, text, "estimator.use=td_lambda", "estimator.lam=1").settings.estimator.gamma == 0.9
    assert given(registry, text, "estimator.lam=1", "estimator.use=td_lambda").settings.estimator.lam == 1
    assert given(registry, "recipe: ppo\n", "kl.use=pid").settings.kl.placement == "reward", "of the recipe, too"
    assert given(registry, "estimator: gae", "estimator.use=rloo").components["estimator"].name == "rloo"
    critic = given(registry, "critic: none", "critic.use=torch", "critic.hidden_size=32").settings.critic
    assert critic.hidden_size == 32, "over no component at all"
    assert given(registry, "policy: {use: torch, hidden_size: 96}\ntrackers: {console: null}",
                 "trackers.console.use=console").settings.policy.hidden_size == 96
    assert "is not a field" in problems(registry, text, "rewards.a.use=exact_match", "rewards.a.by=2")[0]
    assert given(registry, text, "rewards.a.use=exact_match").settings.rewards["a"].weight == 1, "of a file, no field"


@first_party
def test_a_field_that_the_component_of_use_lacks_is_told_with_how_to_drop_it(folder: Path, registry: Registry) -> None:
    text = "estimator:\n  use: gae\n  lam: 0.5\n"
    assert problems(registry, text, "estimator.use=remax") == [
        "estimator.lam is not a field of remax; known: gamma, whiten, statistics, truncation, overlong_length, "
        "overlong_buffer; estimator={use: remax} drops the fields that were there (train.yaml:3)"]
    near = problems(registry, "estimator: {use: gae, lamm: 0.5}", "estimator.use=td_lambda")[0]
    assert "is not a field of td_lambda; did you mean 'lam'" in near
    assert "drops" not in problems(registry, text, "estimator.lamm=1")[0], "nothing was taken over"
    assert "drops" not in problems(registry, "estimator: gae", "estimator.use=rloo", "estimator.lamm=1")[0]


@first_party
def test_named_maps_are_merged_and_null_takes_away(folder: Path, registry: Registry) -> None:
    (folder / "base.yaml").write_text("rewards: {a: {use: exact_match, weight: 2}, b: length}\nrollout: {top_k: 3}\n")
    loaded = given(registry, "extends: base.yaml\nrewards:\n  b: null\n  c: {file: rewards.py:correct}\nrollout:\n"
                             "trackers: {console: null}\n", "rewards.a.weight=0.5")
    assert [(r.name, r.weight) for r in loaded.settings.rewards.values()] == [("a", 0.5), ("c", 1.0)]
    assert loaded.settings.rollout.top_k == 3, "an empty block says nothing"
    assert set(loaded.settings.trackers) == {"jsonl"}
    assert given(registry, "extends: base.yaml\nrewards: null\ntrackers: null").settings.rewards == {}


@first_party
def test_none_and_policy_are_kept_as_such(folder: Path, registry: Registry) -> None:
    settings = given(registry, "critic: policy\nreference: none\ncorrection: none\nkl: null\n").settings
    assert (settings.critic, settings.reference, settings.correction) == ("policy", None, None)
    assert settings.kl.placement == "none"
    assert given(registry, "critic: {use: torch, hidden_size: 32}").settings.critic.hidden_size == 32
    assert given(registry, "critic: policy", "critic=none").settings.critic is None


@first_party
def test_interpolation_and_anchors(folder: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_NAME", "mine")
    loaded = given(registry, "steps: 7\nrun: runs/${oc.env:RUN_NAME}\nbatch_size: ${steps}\nrollout: &r {top_k: 2}\n"
                             "estimator: {use: typed, inner: {<<: {rate: 1}, rate: 2}}\n")
    assert (loaded.settings.run, loaded.settings.batch_size) == ("runs/mine", 7)
    assert loaded.settings.estimator.inner.rate == 2.0, "a key over what `<<` merges is not written twice"
    assert "run: runs/${oc.env:RUN_NAME}" in to_yaml(loaded), "secrets of the environment stay there"


# --- user code and paths ----------------------------------------------------------------------------------------------

@first_party
def test_paths_are_relative_to_the_file_that_says_them(folder: Path, registry: Registry) -> None:
    other = folder / "shared"
    other.mkdir()
    (other / "rows.jsonl").write_text('{"prompt": "a"}\n')
    (other / "score.py").write_text("def f(prompts, completions, **columns):\n    return [0.5]\n")
    (other / "base.yaml").write_text("task: {use: rows, path: rows.jsonl}\nrewards: {f: {file: 'score.py:f'}}\n"
                                     "plugins: [p.py]\n")
    (other / "p.py").write_text("from posttrain.hookspecs import Component, hookimpl\n@hookimpl\ndef components():\n"
                                "    return [Component('estimator', 'p', 'p:P', '')]\nclass P: pass\n")
    loaded = given(registry, "extends: shared/base.yaml\nestimator: p\n")
    assert loaded.settings.task.path == str(other / "rows.jsonl")
    assert loaded.settings.rewards["f"].call([], []) == [0.5]
    assert type(loaded.settings.estimator).__name__ == "P" and "p" in loaded.registry.names("estimator")
    assert "p" not in registry.names("estimator")
    assert {Path(path).name for path in loaded.files} == {"train.yaml", "base.yaml", "score.py", "p.py"}
    assert all(len(digest) == 64 for digest in loaded.files.values())


@first_party
def test_a_broken_plugin_file_is_a_problem_of_the_configuration(folder: Path, registry: Registry) -> None:
    (folder / "p.py").write_text("1 / 0\n")
    found = problems(registry, "plugins: [p.py]\nsteps: x")
    assert len(found) == 2 and found[0].startswith(f"plugins: {folder / 'p.py'}: ZeroDivisionError")


@first_party
def test_rewards_and_tasks_from_a_python_file(folder: Path, registry: Registry) -> None:
    text = ("rewards:\n  a: {file: rewards.py:correct, weight: 2}\n  b: {file: rewards.py:scaled, by: 0.25}\n"
            "task: {file: rewards.py:rows, n: 3}\n")
    settings = given(registry, text).settings
    assert settings.rewards["a"].call(["p"], ["c"]) == [1.0] and settings.rewards["a"].weight == 2.0
    assert settings.rewards["b"].call(["p"], ["c"]) == [0.25]
    assert [row["prompt"] for row in settings.task.rows] == ["0", "1", "2"]
    (folder / "bad.py").write_text("def f(): raise LookupError('no data')\n1 +\n")
    assert "bad.py:f raised SyntaxError" in problems(registry, "task: {file: bad.py:f}")[0]
    (folder / "bad.py").write_text("def f(): raise LookupError('no data')\n")
    assert problems(registry, "task: {file: bad.py:f}") == ["task.file: bad.py:f raised LookupError: no data "
                                                            "(train.yaml:1)"]


@first_party
def test_a_field_called_file_belongs_to_its_component(folder: Path, registry: Registry) -> None:
    (folder / "model.py").write_text("def build(): ...\n")
    loaded = given(registry, "estimator: {use: typed, file: 'model.py:build', limit: 2}", "estimator.number=3")
    assert loaded.settings.estimator == Typed(file=f"{folder / 'model.py'}:build", limit=2.0, number=3.0)
    assert str(folder / "model.py") in loaded.files
    assert given(registry, "estimator: {use: typed, limit: 2}", "estimator.file=model.py").settings.estimator.limit == 2


@first_party
def test_a_dict_from_python(folder: Path, registry: Registry) -> None:
    def mine(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        return [0.5]

    rows = [{"prompt": "1+1=", "answer": "2", "odd": "${not an interpolation"}]
    estimator = Typed(number=0.125)
    source = {"task": rows, "rewards": {"f": mine, "g": {"use": mine, "weight": 3}, "h": "exact_match"},
              "estimator": estimator, "rollout": {"stop": ("x",)}, "optimizer": {"betas": (0.5, 0.9)}}
    loaded = load(source, ["rewards.h=length", "steps=3"], registry)
    assert loaded.settings.task.rows == tuple(rows)
    assert loaded.settings.rewards["f"] == RewardEntry("f", mine) and loaded.settings.rewards["g"].weight == 3.0
    assert loaded.components["rewards.h"].name == "length" and loaded.settings.steps == 3
    assert loaded.settings.estimator is estimator and loaded.settings.optimizer.betas == (0.5, 0.9)
    assert loaded.settings.rollout.stop == ("x",)
    assert f"f: '<python: {mine.__module__}.{mine.__qualname__}>'" in to_yaml(loaded)
    assert load({**source, "estimator": "gae"}, ["rewards.f=length"], registry).components["rewards.f"].name == "length"
    split = load({"task": {"train": rows, "held_out": [{"prompt": "a"}], "limit": 1}}, [], registry).settings.task
    assert (split.rows, split.held_out_rows, split.limit) == (tuple(rows), ({"prompt": "a"},), 1)


@first_party
def test_problems_of_a_dict_name_its_keys(folder: Path, registry: Registry) -> None:
    with pytest.raises(ConfigError) as error:
        load({"rollout": {"group_sise": 3}, "estimator": {"use": Typed(), "number": 3}}, ["kl=zzz"], registry)
    assert [p.where for p in error.value.problems] == [
        "dict key 'estimator.use'", "command line", "dict key 'rollout.group_sise'"]


# --- what is written, and what follows --------------------------------------------------------------------------------

@first_party
def test_running_the_written_file_repeats_the_run(folder: Path, registry: Registry) -> None:
    loaded = given(registry, "recipe: dr_grpo\nseed: 3\ntask: {use: rows, path: data.jsonl}\nrollout: {stop: ['on', "
                             "'1e-6', 'null']}\nrewards: {a: {file: rewards.py:scaled, by: 0.5, weight: 2}}\n"
                             "optimizer: {lr: 1e-6}\ntrackers: {console: null}\n", "rollout.max_new_tokens=9")
    elsewhere = folder / "runs" / "train"
    elsewhere.mkdir(parents=True)
    (elsewhere / "config.yaml").write_text(to_yaml(loaded))
    again = load(elsewhere / "config.yaml", [], registry)
    assert to_yaml(again) == to_yaml(loaded)
    settings, repeated = loaded.settings, again.settings
    call, same = settings.rewards["a"].call, repeated.rewards["a"].call
    assert (call.func, call.keywords) == (same.func, same.keywords) and repeated.rewards["a"].weight == 2.0
    for name in (n for n in asdict(Settings()) if n != "rewards"):
        assert getattr(repeated, name) == getattr(settings, name), name
    assert repeated.objective.length == 9
    changed = load(elsewhere / "config.yaml", ["rollout.max_new_tokens=5"], registry)
    assert changed.settings.objective.length == 5, "what refers to another key still does"


@first_party
def test_literal_secrets_of_trackers_are_not_written(folder: Path, registry: Registry) -> None:
    text = to_yaml(given(registry, "trackers: {r: {use: remote, api_key: hunter2, url: 'http://x'}}\n"
                                   "task: {use: rows, path: data.jsonl, prompt_key: prompt}"))
    assert "hunter2" not in text and "api_key: <redacted>" in text and "url: http://x" in text
    assert "prompt_key: prompt" in text, "only trackers have secrets"


@first_party
def test_the_tree_holds_names_and_no_values_of_interpolations(folder: Path, registry: Registry) -> None:
    loaded = given(registry, "recipe: dr_grpo")
    raw = OmegaConf.to_container(loaded.tree)
    assert raw["objective"] == {"use": "dr_grpo", "length": "${rollout.max_new_tokens}"}
    assert loaded.settings.objective.length == 64


@first_party
def test_derived_sizes(folder: Path, registry: Registry) -> None:
    rows = dict(derived(given(registry, "steps: 10\nrollout: {prompts_per_step: 5, group_size: 3, max_new_tokens: 7}\n"
                                        "update: {steps_per_rollout: 4, epochs: 2}").settings))
    assert rows == {"episodes per step": "15 (5 prompts x 3 answers)",
                    "optimiser steps per rollout": "8 (4 minibatches x 2 passes)",
                    "episodes per optimiser step": "3 to 4", "optimiser steps in all": "80",
                    "new tokens per step, at most": "105", "new tokens in all, at most": "1,050"}
    rows = dict(derived(given(registry, "recipe: sft\nsteps: 10\nbatch_size: 200").settings))
    assert rows == {"episodes per optimiser step": "200", "optimiser steps in all": "10", "episodes in all": "2,000"}


@first_party
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_whole(folder: Path, registry: Registry, recipe: str) -> None:
    rewarded = "" if recipe == "reward_model" else "rewards: {a: exact_match}"
    loaded = given(registry, f"recipe: {recipe}\ntask: {{use: rows, path: data.jsonl}}\n{rewarded}")
    for name, value in RECIPES[recipe].settings.items():
        if name in loaded.components:
            assert loaded.components[name].name == (value["use"] if isinstance(value, dict) else value)
    from posttrain import fitting
    fitting.check(loaded)
    assert RECIPES[recipe].summary and RECIPES[recipe].source


@first_party
def test_a_configuration_is_checked_quickly_and_without_a_framework(folder: Path) -> None:
    (folder / "train.yaml").write_text(WRONG)
    code = ("import sys; from pathlib import Path; from posttrain import config, registry\n"
            "try: config.load(Path('train.yaml'), [], registry.discover())\n"
            "except Exception as e: n = len(e.problems)\n"
            "import json, time\n"
            "heavy = sorted({'torch', 'jax', 'transformers', 'scipy', 'typer', 'rich'} & set(sys.modules))\n"
            "print(json.dumps([n, time.process_time(), heavy]))")
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    n, seconds, heavy = json.loads(done.stdout)
    assert n == 15 and heavy == []
    assert seconds < 2.0, f"{seconds} s of CPU ({time.monotonic() - start} s on the clock)"


# --- sets and enums beyond YAML, and what components refuse by other errors -------------------------------------------

def test_sets_and_enums_from_python_are_written_so_that_the_file_repeats_it(folder: Path, registry: Registry) -> None:
    given_ = {"use": "typed", "mode": Mode.SUM, "word": Word.a, "level": Level.HIGH, "tags": {"b", "a"}, "numbers": {3}}
    toy = {"plugins": ["posttrain.toy"], "policy": "toy", "objective": "toy", "kl": "none", "tokenizer": "bytes",
           "rollout": {"engine": "toy"}}
    first = load({**toy, "estimator": given_}, [], registry)
    again = given(registry, to_yaml(first)).settings.estimator
    assert again == first.settings.estimator
    assert (again.mode, again.word, again.level, again.tags) == (Mode.SUM, Word.a, Level.HIGH, frozenset("ab"))


@pytest.mark.parametrize(("name", "says"), [
    ("config", "estimator: limit and refuses do not go together (train.yaml:4)"),
    ("plugin", "estimator: nothing of that name (train.yaml:2)"),
    ("data", "estimator: the rows are wrong:\n  no number (rows.txt:3)\n  no rows\nmend them (train.yaml:2)")])
def test_what_a_component_refuses_by_an_error_for_users_keeps_its_text_and_has_its_line(
        folder: Path, registry: Registry, name: str, says: str) -> None:
    text = f"steps: 1\nestimator:\n  use: typed\n  refuses: {name}\nplugins: [posttrain.toy]\npolicy: toy\nkl: none\n" \
           "objective: toy\ntokenizer: bytes\nrollout: {engine: toy}\nstepz: 1\n"
    assert problems(registry, text) == [says, "stepz is not a key; did you mean 'steps'? (train.yaml:11)"]


def test_a_task_in_a_file_that_refuses_by_an_error_for_users_keeps_its_text(folder: Path, registry: Registry) -> None:
    (folder / "task.py").write_text("from posttrain.errors import DataError, Problem\ndef rows():\n"
                                    "    raise DataError([Problem('no number', 'rows.txt:3')])\n")
    text = "plugins: [posttrain.toy]\npolicy: toy\nkl: none\nobjective: toy\ntokenizer: bytes\nestimator: toy\n" \
           "rollout: {engine: toy}\ntask: {file: task.py:rows}\n"
    assert problems(registry, text) == ["task.file: no number (rows.txt:3) (train.yaml:8)"]


@dataclass(frozen=True)
class Looking:
    """Looks its choice up in a table."""

    choice: Literal["one", "two"] = "one"

    def __post_init__(self) -> None:
        assert {"one": 1, "two": 2}[self.choice]


class OfLooking:
    """Declares it."""

    @hookimpl
    def components(self) -> list[Component]:
        return [Component("estimator", "looking", f"{__name__}:Looking", "looks its choice up")]


def test_a_component_that_stumbles_over_a_wrong_choice_is_told_the_choice(folder: Path, registry: Registry) -> None:
    text = "plugins: [posttrain.toy]\npolicy: toy\nkl: none\nobjective: toy\ntokenizer: bytes\n" \
           "rollout: {engine: toy}\nestimator: {use: looking, choice: three}\n"
    assert problems(registry.extended([OfLooking()]), text) == [
        "estimator.choice must be one of 'one', 'two', got 'three' (train.yaml:7)"]


class Fieldless:
    """No dataclass, and never made."""

    def __init__(self) -> None:
        raise ConfigError(["not on this machine"])


class OfFieldless:
    """Declares it."""

    @hookimpl
    def components(self) -> list[Component]:
        return [Component("estimator", "fieldless", f"{__name__}:Fieldless", "cannot be made")]


def test_a_class_without_fields_that_refuses_has_its_line(folder: Path, registry: Registry) -> None:
    text = "plugins: [posttrain.toy]\npolicy: toy\nkl: none\nobjective: toy\ntokenizer: bytes\n" \
           "rollout: {engine: toy}\nestimator: fieldless\n"
    assert problems(registry.extended([OfFieldless()]), text) == ["estimator: not on this machine (train.yaml:7)"]
