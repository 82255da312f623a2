"""Components of the project's own packages by name, installed or not, so that an error can say what to install.

Reads an index that `tools/known_components.py` writes; it is read only after a name was not found, or for `doctor`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from posttrain.registry import ALLOW, Registry, canonical

INDEX = Path(__file__).with_name("known_components.json")

NOT_OFFERED: Mapping[tuple[str, str], str] = {
    ("estimator", "watkins_q"): "its trace ends where an action is not the greedy one, and rollouts do not say which "
                                "is; use tree_backup or retrace (q: q_head)",
    ("estimator", "acer"): "its correction term needs both policies' probabilities and a value of every action that "
                           "was not taken, which rollouts do not carry; use retrace (q: q_head)",
}
"""Kind and name of what the field knows, and why no package of the project has it."""


@dataclass(frozen=True, slots=True)
class Known:
    """A component of one of the project's packages."""

    kind: str
    name: str
    distribution: str
    extra: str = ""
    """Extra of the distribution that brings what it needs."""

    @property
    def install(self) -> str:
        """`pip install 'posttrain-backends[hf]'`."""
        return f"pip install '{self.distribution}[{self.extra}]'" if self.extra else f"pip install {self.distribution}"


def known() -> tuple[Known, ...]:
    """All of them, sorted by distribution, kind and name."""
    return tuple(Known(**entry) for entry in json.loads(INDEX.read_text("utf-8")))


def not_installed(registry: Registry) -> tuple[Known, ...]:
    """Those whose package is not there at all."""
    names = (*(p.distribution for p in registry.plugins), *(b.distribution for b in registry.broken),
             *(f.distribution for f in registry.foreign), *(left.distribution for left in registry.left_out))
    there = {canonical(name) for name in names}
    return tuple(k for k in known() if k.distribution not in there)


def elsewhere(registry: Registry, kind: str, name: str) -> str:
    """Why a component of the project, as `name` or `distribution/name`, is not to be had, and what to do; empty where
    the project has none of that name, or its package is there without it."""
    distribution, _, bare = name.rpartition("/")
    if why := NOT_OFFERED.get((kind, bare)):
        return f"{kind} '{bare}' is not offered: {why}"
    found = [k for k in known() if (k.kind, k.name) == (kind, bare)
             and (not distribution or k.distribution == canonical(distribution))]
    if not found:
        return ""
    home = found[0].distribution
    return f"{kind} '{name}' is in {home}, which {_state(registry, home) or f'is not installed: {found[0].install}'}"


def _state(registry: Registry, home: str) -> str:
    """Why a package that is installed offers nothing, and what to do; empty where it is not installed."""
    update = f"pip install --upgrade posttrain-core {home}"
    said = {
        **{p.distribution: f"is installed as {p.version} without it: {update}" for p in registry.plugins},
        **{f.distribution: f"is installed for '{f.group}', another version of the plugin interface: {update}"
           for f in registry.foreign},
        **{left.distribution: f"{left.by} leaves out: {'add it there' if left.by == ALLOW else 'take it out of there'}"
           for left in registry.left_out},
        **{b.distribution: f"is broken: {b.error}  {b.remedy}" for b in registry.broken}}
    return next((text for name, text in said.items() if canonical(name) == home), "")


def offers(registry: Registry, kind: str) -> tuple[str, ...]:
    """What the project's packages have of a kind, and why it is not to be had, a line for each package and extra."""
    found: dict[tuple[str, str], list[str]] = {}
    for k in known():
        if k.kind == kind:
            found.setdefault((k.distribution, k.install), []).append(k.name)
    return tuple(f"{', '.join(names)}: in {home}, which {_state(registry, home) or f'is not installed: {install}'}"
                 for (home, install), names in found.items()) or (
        f"none is in posttrain's own packages; to see one of yours: posttrain plugins {kind} --plugin FILE_OR_MODULE",)


def nearest(registry: Registry, kind: str, name: str) -> str:
    """`; did you mean 'vtrace' (posttrain-estimators, not installed: pip install ...)?`, or nothing."""
    names = {k.name: k for k in not_installed(registry) if k.kind == kind}
    near = get_close_matches(name.rpartition("/")[2], names, n=1)
    return f"; did you mean '{near[0]}' ({names[near[0]].distribution}, not installed: " \
           f"{names[near[0]].install})?" if near else ""
