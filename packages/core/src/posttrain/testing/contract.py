"""What every component owes, whatever its kind, and how a contract is subclassed, waived and run.

A contract is a class of tests. An author subclasses the one of the kind and lists instances; pytest runs every test on
every instance. Nothing of a contract can be left out in silence: a test is neither overridden nor deleted, and a waived
one must fail. Needs pytest and Hypothesis (`pip install 'posttrain-core[testing]'`).
"""

from __future__ import annotations

import inspect
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, settings

from posttrain.annotations import construct, hints_of, written
from posttrain.catalogue import field_docs
from posttrain.registry import Registry, discover

FRAMEWORKS = frozenset({
    "accelerate", "datasets", "flax", "jax", "matplotlib", "mlflow", "onnx", "onnxruntime", "optuna", "pandas", "peft",
    "pyarrow", "scipy", "tensorflow", "tokenizers", "torch", "transformers", "triton", "vllm", "wandb"})
"""What a module that declares a component does not import: listing and help must stay quick."""

EXAMPLES = settings(max_examples=25, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))
"""How Hypothesis draws in contracts: the same examples in every run."""


class ComponentContract:
    """Tests of every component; one subclass per kind adds the tests of that kind.

    An author writes, in any test module:

        class TestMine(EstimatorContract):
            components = (Mine(), Mine(lam=0.9))

            def oracle(self, component, episodes): ...

    Raises `TypeError` where a subclass replaces or removes a test of the contract, or waives one that there is not.
    """

    kind: ClassVar[str] = ""
    """One of `posttrain.hookspecs.KINDS`."""
    protocol: ClassVar[type]
    """The protocol of the kind in `posttrain.protocols`."""
    hashable: ClassVar[bool] = False
    """Whether the kind must be hashable (it may be a static argument of a compiled function)."""
    components: ClassVar[tuple[Any, ...]] = ()
    """Instances to be tested: the defaults, and whatever settings change what is computed."""
    plugins: ClassVar[tuple[Path | object, ...]] = ()
    """Plugins that no distribution installs: files or modules that declare the components."""
    waived: ClassVar[Mapping[str, str]] = {}
    """Test -> why the component cannot keep it. Such a test must fail: a waiver that is not needed fails itself."""

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        for name in vars(cls):
            if any(name in contract_tests(base) for base in cls.__mro__[1:]):
                raise TypeError(f"{cls.__name__}.{name} replaces a test of the contract; where a component cannot keep "
                                f"it, say why: waived = {{{name!r}: 'reason'}}")
        for name, reason in cls.waived.items():
            if not hasattr(cls, name) or not name.startswith("test_"):
                raise TypeError(f"{cls.__name__}.waived names {name}, which is no test of the contract")
            if not reason.strip():
                raise TypeError(f"{cls.__name__}.waived gives no reason for {name}")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run every test on every component; pytest calls this."""
        if "component" not in metafunc.fixturenames:
            return
        if not self.components:
            pytest.fail(f"{type(self).__name__}.components is empty: list the instances to be tested", pytrace=False)
        reason = self.waived.get(metafunc.function.__name__)
        marks = [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True)]
        metafunc.parametrize("component", [pytest.param(c, marks=marks, id=named(c)) for c in self.components])

    # ---- what it is

    def test_is_a_final_frozen_dataclass(self, component: Any) -> None:
        """Components are values: equal fields, equal behaviour, in every process."""
        if inspect.isfunction(component):
            return
        cls = type(component)
        assert is_dataclass(cls), f"{cls.__name__} must be a dataclass: its fields are its configuration"
        assert cls.__dataclass_params__.frozen, f"{cls.__name__} must be frozen: @dataclass(frozen=True)"  # type: ignore[attr-defined]  # the standard library declares it in no stub
        assert getattr(cls, "__final__", False), f"{cls.__name__} must be final: from typing import final"
        if self.hashable:
            assert hash(component) == hash(pickle.loads(pickle.dumps(component)))

    def test_every_field_is_typed_defaulted_and_documented(self, component: Any) -> None:
        """A configuration says what differs from the defaults; `posttrain show` says what each field is."""
        cls = type(component)
        hints, docs = hints_of(cls), field_docs(cls) if is_dataclass(cls) else {}
        for f in config_fields(component):
            where = f"{cls.__name__}.{f.name}"
            assert f.name in hints, f"{where} has a type that cannot be evaluated: {f.type}"
            assert _has_default(f), f"{where} has no default"
            assert docs.get(f.name, "").strip(), f"{where} has no docstring: write one as a string under the field"

    def test_is_described(self, component: Any) -> None:
        """`posttrain show` prints the docstring."""
        what = component if inspect.isfunction(component) else type(component)
        text = inspect.getdoc(what) or ""
        assert text.strip() and not text.startswith(f"{what.__name__}("), f"{what.__name__} has no docstring"

    def test_survives_a_configuration_file(self, component: Any) -> None:
        """Written as YAML and read again, it is equal: the resolved configuration of a run makes the same run."""
        if inspect.isfunction(component):
            return
        text = yaml.safe_dump({f.name: plain(getattr(component, f.name)) for f in config_fields(component)})
        problems: list[str] = []
        again = construct(type(component), yaml.safe_load(text) or {}, (), lambda _, message: problems.append(message))
        assert not problems, f"{named(component)} cannot be written as YAML:\n{text}{problems}"
        assert again == component, f"{named(component)} became {again!r}"

    def test_can_be_sent_to_another_process(self, component: Any) -> None:
        """Workers receive components by pickle."""
        again = pickle.loads(pickle.dumps(component))
        assert inspect.isfunction(component) or again == component, f"{named(component)} became {again!r}"

    def test_has_the_members_of_its_protocol(self, component: Any) -> None:
        """Every call that core may write, by position or by name as the protocol has it, can be made."""
        if inspect.isfunction(component):
            return
        for name, declared in protocol_members(self.protocol):
            given = inspect.getattr_static(type(component), name, None)
            assert given is not None or hasattr(component, name), \
                f"{type(component).__name__} has no {name}, which {self.protocol.__name__} asks for"
            if inspect.isfunction(declared):
                assert callable(getattr(component, name)), f"{type(component).__name__}.{name} must be a method"
                _require_callable_as(declared, getattr(component, name), f"{type(component).__name__}.{name}")
            else:
                value = getattr(component, name)
                assert not inspect.ismethod(value), f"{type(component).__name__}.{name} must be a property"

    # ---- how it is found

    def test_is_found_by_its_name(self, component: Any) -> None:
        """Some plugin declares it, and the name leads to it."""
        registry, cls = registry_of(self.plugins), component if inspect.isfunction(component) else type(component)
        declared = [c for c in registry.components(self.kind) if c.target.rpartition(":")[2] == cls.__qualname__]
        found = [c for c in declared if _same(registry.load(c), cls)]
        broken = "; ".join(f"{b.distribution}: {b.error}" for b in registry.broken)
        assert found, (f"no plugin declares {cls.__module__}:{cls.__qualname__} as {self.kind}; add it to components() "
                       f"of the plugin, and name single files in `plugins` of the contract{broken and f' ({broken})'}")
        for c in found:
            assert c.summary.strip(), f"{self.kind} '{c.name}' is declared without a summary"
            if isinstance(cls, type) and is_dataclass(cls):
                fields_of_it = {f.name: plain(getattr(component, f.name)) for f in config_fields(component)}
                made = registry.create(self.kind, c.name, **fields_of_it)  # defaults alone may be refused
                assert type(made) is type(component) or _same(type(made), cls)

    def test_is_imported_without_a_framework(self, component: Any) -> None:
        """Naming a component costs nothing: frameworks are imported where it computes."""
        cls = component if inspect.isfunction(component) else type(component)
        heavy = imported_with(cls.__module__, str(inspect.getsourcefile(cls)))
        assert not heavy, f"importing {cls.__module__} imports {', '.join(heavy)}; import them inside functions"


def contract_tests(cls: type) -> dict[str, Callable[..., None]]:
    """The tests that a contract class itself declares; none for an author's subclass."""
    own = ComponentContract.__module__.rpartition(".")[0]
    if cls.__module__.rpartition(".")[0] != own:
        return {}
    return {name: test for name, test in vars(cls).items() if name.startswith("test_")}


def failures(contract: type[ComponentContract], *components: Any, only: str = "",
             **fixtures: Any) -> Iterator[tuple[str, str]]:
    """Tests of `contract` that fail on one of the components (else: its own), with the message: for tests of contracts
    themselves.

    Runs without pytest's collection; `only` names one test, `fixtures` are what tests may ask for beside `component`
    (`tmp_path`). Where that one test can be measured on no component (no torch, say), it is skipped here, too.
    """
    instance, skipped = contract(), list[BaseException]()
    for name, test in inspect.getmembers(contract, inspect.isfunction):
        if not name.startswith("test_") or only not in ("", name):
            continue
        wanted = {k: v for k, v in fixtures.items() if k in inspect.signature(test).parameters}
        for component in components or contract.components:
            try:
                test(instance, component=component, **wanted)
            except pytest.skip.Exception as not_measured:
                skipped.append(not_measured)
            except (Exception, pytest.fail.Exception) as error:
                yield name, f"{type(error).__name__}: {error}"
    if only and len(skipped) == len(components or contract.components):
        raise skipped[0]


def assert_close(got: Any, expected: Any, tolerance: float, what: str) -> None:
    """Equal shapes, and numbers that are equal in float64 up to `tolerance`, relative and absolute."""
    assert np.shape(got) == np.shape(expected), f"{what}: shape {np.shape(got)} and {np.shape(expected)}"
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(expected, np.float64), rtol=tolerance,
                               atol=tolerance, err_msg=what)


# ---- the parts of a component


def named(component: Any) -> str:
    """How a component is called in a report: `GAE(lam=0.9)`, the fields that differ from their defaults."""
    if not is_dataclass(component):
        return str(getattr(component, "__name__", type(component).__name__))
    set_ = [f"{f.name}={getattr(component, f.name)!r}" for f in config_fields(component)
            if not (f.default is not MISSING and getattr(component, f.name) == f.default)
            and not (f.default_factory is not MISSING and getattr(component, f.name) == f.default_factory())]
    return f"{type(component).__name__}({', '.join(set_)})"


def config_fields(component: Any) -> tuple[Field[Any], ...]:
    """The fields that a configuration sets."""
    return tuple(f for f in fields(component) if f.init) if is_dataclass(component) else ()


def plain(value: Any) -> Any:
    """A field's value as YAML holds it; sets in the order of what they print, so that it is the same in every process.

    >>> plain((Path("a"), {"b": (1, 2)}, frozenset({"d", "c"})))
    ['a', {'b': [1, 2]}, ['c', 'd']]
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in config_fields(value)}
    if isinstance(value, Enum):
        return written(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {plain(k): plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return [plain(v) for v in sorted(value, key=repr)]
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def protocol_members(protocol: type) -> Iterator[tuple[str, Any]]:
    """Names a protocol asks for, with what it declares: a function or a property."""
    for base in reversed(protocol.__mro__):
        if base in (object,) or base.__module__ == "typing":
            continue
        for name, declared in vars(base).items():
            if name == "__call__" or not name.startswith("_"):
                yield name, declared


def _has_default(f: Field[Any]) -> bool:
    return f.default is not MISSING or f.default_factory is not MISSING


def _require_callable_as(declared: Callable[..., Any], given: Callable[..., Any], where: str) -> None:
    """Fail where a call that the protocol allows is no call of `given`."""
    parameters = list(inspect.signature(declared).parameters.values())[1:]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_name = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    required = {name: None for name, p in by_name.items() if p.default is p.empty}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        required["another_column"] = None  # the protocol sends names that nobody knows yet
    signature = inspect.signature(given)
    only_by_name = {name: None for name, p in by_name.items() if p.kind is p.KEYWORD_ONLY and name in required}
    only_by_name |= {n: None for n in required if n not in by_name}
    first = [p for p in positional if p.kind is p.POSITIONAL_ONLY]
    calls = [(len(positional), dict.fromkeys(by_name.keys() - {p.name for p in positional}) | only_by_name),
             (len(first), dict.fromkeys(by_name) | only_by_name)]
    for count, names in calls:
        try:
            signature.bind(*[None] * count, **names)
        except TypeError as error:
            raise AssertionError(f"{where}{signature} cannot be called as the protocol has it, "
                                 f"{inspect.signature(declared)}: {error}") from None


def _same(found: Any, cls: Any) -> bool:
    """The same class; a file that is imported under two names gives two."""
    return found is cls or (found.__qualname__ == cls.__qualname__
                            and inspect.getsourcefile(found) == inspect.getsourcefile(cls))


@cache
def registry_of(plugins: tuple[Path | object, ...]) -> Registry:
    """What is installed, and the given plugins; found once."""
    return discover(plugins)


@cache
def imported_with(module: str, file: str) -> tuple[str, ...]:
    """Frameworks that a fresh interpreter holds after importing `module` (or `file`, where no such module is found)."""
    code = ("import importlib, importlib.util, json, sys\n"
            "module, file = sys.argv[1:]\n"
            "try:\n    found = importlib.util.find_spec(module)\n"
            "except (ImportError, ValueError):\n    found = None\n"
            "if found is None or module == '__main__':\n"
            "    from pathlib import Path\n    from posttrain.registry import import_file\n"
            "    import_file(Path(file))\n"
            "else:\n    importlib.import_module(module)\n"
            "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))")
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, "-c", code, module, file], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, f"{module} cannot be imported on its own:\n{done.stderr}"
    return tuple(name for name in json.loads(done.stdout.splitlines()[-1]) if name in FRAMEWORKS)
