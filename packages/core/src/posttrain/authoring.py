"""`posttrain new KIND NAME`: a package of an author's own, complete and green, to be changed into theirs.

What it writes lies in `templates/`: `package` holds what all kinds have, a folder of the kind's name the rest; where
both have a file, the kind's is taken. `about.toml` of the kind fills the common texts. Knows names and texts; runs
nothing.
"""

from __future__ import annotations

import ast
import builtins
import keyword
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from string import Template
from typing import final

from posttrain import __version__
from posttrain.errors import InputError, Problem, did_you_mean
from posttrain.hookspecs import ENTRY_POINT_GROUP, KINDS
from posttrain.known import known
from posttrain.registry import Registry, canonical
from posttrain.scaffold import SUFFIX, TEMPLATES, filled, put

OFFERS: Mapping[str, tuple[str, ...]] = {
    "estimator": ("estimator",), "objective": ("objective",), "kl": ("kl",), "reward": ("reward",), "task": ("task",),
    "tracker": ("tracker",), "backend": ("backend", "engine")}
"""Kind that `posttrain new` writes -> the kinds of component of its package."""

NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
"""One name serves as a component's, a module's and a distribution's."""

ABOUT = "about.toml"
"""Of each template folder: what fills the common texts. It is not written."""


def core_requirement(version: str = __version__) -> str:
    """What a package written for this posttrain-core requires. The one place where the policy stands: until 1.0 a minor
    release, from then on a major one, may change what plugins are called with.

    >>> core_requirement("0.3.1"), core_requirement("1.4.0")
    ('posttrain-core>=0.3,<0.4', 'posttrain-core>=1.4,<2')
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    return f"posttrain-core>={major}.{minor},<{f'0.{minor + 1}' if major == 0 else major + 1}"


@final
@dataclass(frozen=True, slots=True)
class Names:
    """The names of a package, all made of its component's.

    >>> names = Names("group_median")
    >>> names.distribution, names.package, names.cls
    ('posttrain-group-median', 'posttrain_group_median', 'GroupMedian')
    """

    name: str

    @property
    def distribution(self) -> str:
        """What pip installs, and the folder that is written."""
        return f"posttrain-{self.name.replace('_', '-')}"

    @property
    def package(self) -> str:
        """What Python imports."""
        return f"posttrain_{self.name}"

    @property
    def cls(self) -> str:
        """The class of the component."""
        return "".join(word[:1].upper() + word[1:] for word in self.name.split("_"))


def new(kind: str, name: str, directory: Path, registry: Registry) -> list[Path]:
    """Write the folder `posttrain-NAME` into `directory`. Raises one `InputError` with everything that is wrong."""
    root = directory / Names(name).distribution
    if problems := [*_kind_problems(kind), *_name_problems(kind, name, registry), *_folder_problems(root)]:
        raise InputError(problems, title=f"posttrain new {kind} {name} writes nothing:",
                         next_step=f"posttrain new KIND NAME [--directory DIR], KIND one of {', '.join(OFFERS)}")
    return put({root / path: text for path, text in texts(kind, name).items()},
               "choose another folder: posttrain new KIND NAME --directory DIR")


def texts(kind: str, name: str) -> dict[str, str]:
    """Path -> text of the package that `posttrain new` writes."""
    names = Names(name)
    values = {"kind": kind, "name": name, "distribution": names.distribution, "package": names.package,
              "cls": names.cls, "requirement": core_requirement(), "group": ENTRY_POINT_GROUP}
    about = _about("package", values) | _about(kind, values)
    files = filled("package", **values, **about) | filled(kind, **values, **about)
    return {path: text for path, text in sorted(files.items()) if path != ABOUT}


def _about(folder: str, values: Mapping[str, str]) -> dict[str, str]:
    text = (TEMPLATES / folder / f"{ABOUT}{SUFFIX}").read_text("utf-8")
    return {key: str(value) for key, value in tomllib.loads(Template(text).substitute(values)).items()}


def _kind_problems(kind: str) -> Iterator[Problem]:
    if kind in KINDS and kind not in OFFERS:
        yield Problem(f"there is no template for kind '{kind}'; its protocol is in posttrain.protocols")
    elif kind not in KINDS:
        yield Problem(f"'{kind}' is no kind of component{did_you_mean(kind, OFFERS)}")


def _name_problems(kind: str, name: str, registry: Registry) -> Iterator[Problem]:
    """What keeps a name from being a component's, a module's and a distribution's at once, or somebody has it."""
    if not NAME.fullmatch(name):
        near = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()).strip("_0123456789")
        yield Problem(f"'{name}' is no name: small letters and digits, words joined by '_', a letter first"
                      + (f"; for example '{near}'" if NAME.fullmatch(near) else ""))
        return
    for offered in OFFERS.get(kind, ()):
        if owner := _owner(registry, offered, name):
            yield Problem(f"{offered} '{name}' is already offered by {owner}: with both installed, a configuration "
                          f"would have to write {Names(name).distribution}/{name}; take another name")
    if owner := _distribution_owner(Names(name).distribution):
        yield Problem(f"distribution {Names(name).distribution} is {owner}; take another name")
    if kind in OFFERS and Names(name).cls in _taken_names(kind):
        yield Problem(f"the class would be called {Names(name).cls}, which its module uses for something else; take "
                      "another name")


def _owner(registry: Registry, kind: str, name: str) -> str:
    """The distribution that offers a component of that name: installed, or one of the project's own."""
    installed = next((c for c in registry.components(kind) if c.name == name), None)
    if installed is not None:
        return " ".join(registry.provider(installed)).strip()
    return next((k.distribution for k in known() if (k.kind, k.name) == (kind, name)), "")


def _distribution_owner(distribution: str) -> str:
    if distribution in {canonical(k.distribution) for k in known()}:
        return "one of posttrain's own"
    try:
        return f"installed already, version {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:
        return ""


def _taken_names(kind: str) -> frozenset[str]:
    """Names that the modules of a kind's package use beside the component's class, and Python's own."""
    taken = {*dir(builtins), *keyword.kwlist}
    for path, text in texts(kind, "placeholder").items():
        if path.endswith(".py"):
            for node in ast.walk(ast.parse(text)):
                taken |= {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
                taken |= {node.id} if isinstance(node, ast.Name) else set()
    return frozenset(taken) - {"Placeholder"}


def _folder_problems(root: Path) -> Iterator[Problem]:
    if root.exists():
        yield Problem("this exists and is not overwritten", str(root))
