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
from posttrain.hookspecs import ENTRY_POINT_GROUP
from posttrain.registry import FRAMEWORKS, Registry, discover
from posttrain.shape import misshapen, protocol_members

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
            bad = [f.name for f in config_fields(component) if not _hashable(getattr(component, f.name))]
            assert not bad, (f"{cls.__name__}.{bad[0]} is {getattr(component, bad[0])!r}, which is not hashable, and "
                             f"the {self.kind} must be (it may be a constant of a compiled function): for a list take "
                             f"a tuple and annotate it tuple[...]")
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
        for name, value in _without_annotation(cls, self.protocol).items():
            pytest.fail(f"{cls.__name__}.{name} has no annotation, so it is no field and no configuration can set it; "
                        f"write {name}: {type(value).__name__} = {value!r}, or ClassVar[...] for a constant",
                        pytrace=False)

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
        changed = [f.name for f in config_fields(component) if getattr(again, f.name) != getattr(component, f.name)]
        assert again == component, f"{named(component)} became {again!r}{_of_a_list(component, again, changed)}"

    def test_can_be_sent_to_another_process(self, component: Any) -> None:
        """Workers receive components by pickle."""
        again = pickle.loads(pickle.dumps(component))
        assert inspect.isfunction(component) or again == component, f"{named(component)} became {again!r}"

    def test_has_the_members_of_its_protocol(self, component: Any) -> None:
        """Every call that core may write, by position or by name as the protocol has it, can be made."""
        if inspect.isfunction(component):
            return
        faults = "; ".join(map(str, misshapen(component, self.protocol)))
        assert not faults, faults

    # ---- how it is found

    def test_is_found_by_its_name(self, component: Any) -> None:
        """Some plugin declares it, and the name leads to it."""
        registry, cls = registry_of(self.plugins), component if inspect.isfunction(component) else type(component)
        declared = [c for c in registry.components(self.kind) if c.target.rpartition(":")[2] == cls.__qualname__]
        found = [c for c in declared if _same(registry.load(c), cls)]
        broken = [f"{b.distribution}: {b.error}" for b in registry.broken]
        foreign = [f"{f.distribution} has its entry point in the group '{f.group}'" for f in registry.foreign]
        why = "; ".join([*broken, *foreign])
        assert found, (f"no plugin that is found declares {cls.__module__}:{cls.__qualname__} as {self.kind}: it must "
                       "stand in components() of the plugin, and the plugin must be found, by an entry point in the "
                       f"group '{ENTRY_POINT_GROUP}' of an installed package (pip install --editable .), or as a file "
                       f"or module that `plugins` of the contract names{f' ({why})' if why else ''}")
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
    set_ = [f"{f.name}={_written(getattr(component, f.name))}" for f in config_fields(component)
            if not (f.default is not MISSING and getattr(component, f.name) == f.default)
            and not (f.default_factory is not MISSING and getattr(component, f.name) == f.default_factory())]
    return f"{type(component).__name__}({', '.join(set_)})"


def _written(value: Any) -> str:
    """As `repr`, but sets in an order that does not change from process to process: it is part of a test's name."""
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__}({{{', '.join(sorted(map(repr, value)))}}})"
    return repr(value)


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


def _without_annotation(cls: type, protocol: type) -> dict[str, Any]:
    """Public values in the body of a component's class that look like fields and are none."""
    known = {*vars(cls).get("__annotations__", {}), *(name for name, _ in protocol_members(protocol))}
    return {name: value for name, value in vars(cls).items()
            if not name.startswith("_") and name not in known and not callable(value) and not _descriptor(value)}


def _descriptor(value: Any) -> bool:
    """Properties, class methods, slots: what a class looks up by a method of its own."""
    return inspect.isdatadescriptor(value) or isinstance(value, classmethod | staticmethod)


def _of_a_list(component: Any, again: Any, changed: list[str]) -> str:
    """What became of lists, where a field that is one came back as something else."""
    lists = [name for name in changed if list in (type(getattr(component, name)), type(getattr(again, name)))]
    return "" if not lists else (
        f": {lists[0]} was {getattr(component, lists[0])!r} and is {getattr(again, lists[0])!r}. A sequence of a "
        "configuration becomes what the annotation says, and lists are not hashable: annotate it tuple[...] and give "
        "it a tuple")


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _has_default(f: Field[Any]) -> bool:
    return f.default is not MISSING or f.default_factory is not MISSING


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
