"""`posttrain doctor`: what is installed, what fits together, what the machine offers, and what to do where it does not.

A list of findings by section. Frameworks are asked in a process of their own, so that a broken one breaks nothing here.
Knows distributions by their metadata alone.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from posttrain.catalogue import remedy
from posttrain.checkpoint import found_version
from posttrain.registry import Registry, optional_requirements
from posttrain.rewards.pool import usable_cores

PACKAGES = ("posttrain-core", "posttrain-estimators", "posttrain-objectives", "posttrain-backends", "posttrain-tuning",
            "posttrain")
"""Distributions of the project, which carry one version; `posttrain` only pins the others."""

Status = Literal["ok", "note", "broken"]
Installed = Callable[[str], "str | None"]
"""Version of a distribution, or None where it is not installed."""


@final
@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    section: str
    name: str
    value: str
    status: Status = "ok"
    """`note` is worth knowing, `broken` does not work as it stands."""
    remedy: str = ""
    """What to do about it."""


@final
@dataclass(frozen=True, slots=True)
class Conflict:
    """Distributions that do not work side by side."""

    distributions: tuple[str, ...]
    why: str
    remedy: str


CONFLICTS = (
    Conflict(("onnxruntime", "onnxruntime-gpu"), "both install the module onnxruntime, and the later one overwrites "
             "the other's files", "pip uninstall -y onnxruntime onnxruntime-gpu, then install one of the two"),
    Conflict(("mlflow", "mlflow-skinny"), "have different versions and share the module mlflow",
             "pip install --upgrade mlflow, which brings the fitting mlflow-skinny"),
)
"""Known ones; what an extra asks for is in the distributions' own metadata."""

SAME_VERSION = frozenset({("mlflow", "mlflow-skinny")})
"""Conflicts that are none where the versions are equal."""

_ASK_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({"version": torch.__version__, "built for CUDA": torch.version.cuda,
    "MPS": torch.backends.mps.is_available(), "threads": torch.get_num_threads(),
    "devices": [[p.name, p.total_memory, f"{p.major}.{p.minor}"] for p in
                map(torch.cuda.get_device_properties, range(torch.cuda.device_count() if cuda else 0))]}))
"""


_ASK_COMPONENTS = """
import json, time
from contextlib import redirect_stdout
from dataclasses import asdict
from sys import stderr
from posttrain.catalogue import faults
from posttrain.registry import discover
start = time.perf_counter()
with redirect_stdout(stderr):
    registry = discover()
    found = [asdict(fault) for fault in faults(registry)]
print(json.dumps({"number": len(registry.components()), "seconds": time.perf_counter() - start, "faults": found}))
"""


def examine(registry: Registry, installed: Installed | None = None) -> list[Finding]:
    """Everything, in the order of the sections. `installed` is asked for versions, by default of this environment."""
    version = found_version if installed is None else installed
    return [*_python(), *packages(version), *libraries(extras(version), version), *conflicts(version), *machine(),
            *devices(version), *plugins(registry), *components(), *not_installed(registry)]


def packages(installed: Installed) -> Iterator[Finding]:
    """The project's distributions; one of another version than core is broken."""
    core = installed(PACKAGES[0])
    for name in PACKAGES:
        found = installed(name)
        if found is None:
            yield Finding("packages", name, "not installed", "note" if name == PACKAGES[0] else "ok")
        elif found != core:
            yield Finding("packages", name, f"{found}, but {PACKAGES[0]} is {core}", "broken",
                          f"install one version of all: pip install '{name}=={core}'")
        else:
            yield Finding("packages", name, found)


def extras(installed: Installed) -> dict[str, list[tuple[str, str]]]:
    """Optional library -> (`distribution[extra]`, least version) of each extra of the project that brings it."""
    found: dict[str, list[tuple[str, str]]] = {}
    for distribution in PACKAGES[:-1]:
        for name, extra, least in optional_requirements(distribution) if installed(distribution) else ():
            found.setdefault(name, []).append((f"{distribution}[{extra}]", least))
    return dict(sorted(found.items()))


def libraries(offered: Mapping[str, Sequence[tuple[str, str]]], installed: Installed) -> Iterator[Finding]:
    """Optional libraries: their version, or which extra brings them; one that is too old is broken, for those extras of
    which nothing is missing: the others are not in use."""
    in_part = {extra for name, brought in offered.items() if installed(name) is None for extra, _ in brought}
    for name, brought in offered.items():
        found, by = installed(name), ", ".join(extra for extra, _ in brought)
        if found is None:
            yield Finding("optional libraries", name, f"not installed; for {by}",
                          remedy=f"pip install '{brought[0][0]}'")
            continue
        old = [(extra, least) for extra, least in brought if extra not in in_part and least and older(found, least)]
        if old:
            yield Finding("optional libraries", name, f"{found}; {old[0][0]} needs at least {old[0][1]}", "broken",
                          f"pip install --upgrade '{old[0][0]}'")
        else:
            yield Finding("optional libraries", name, f"{found}; for {by}")


def conflicts(installed: Installed) -> Iterator[Finding]:
    """Known conflicts that are there."""
    for conflict in CONFLICTS:
        versions = [installed(name) for name in conflict.distributions]
        equal = conflict.distributions in SAME_VERSION and len(set(versions)) == 1
        if None not in versions and not equal:
            there = " and ".join(f"{name} {found}" for name, found in zip(conflict.distributions, versions))
            yield Finding("conflicts", there, conflict.why, "broken", conflict.remedy)


def older(version: str, least: str) -> bool:
    """Whether a release comes before another; local parts (`+cpu`) and what follows the numbers do not count.

    >>> older("2.9.1+cpu", "2.11"), older("2.11.0", "2.11")
    (True, False)
    """
    ours, theirs = ([int(n) for n in re.findall(r"\d+", v.partition("+")[0])] for v in (version, least))
    length = max(len(ours), len(theirs))
    return ours + [0] * (length - len(ours)) < theirs + [0] * (length - len(theirs))


def machine() -> Iterator[Finding]:
    """Processors, threads and memory."""
    import psutil

    cores, usable = os.cpu_count() or 1, usable_cores()
    set_by = os.environ.get("OMP_NUM_THREADS")
    yield Finding("machine", "processors", f"{cores}, of which this process may use {usable}")
    yield Finding("machine", "OMP_NUM_THREADS", set_by or "not set",
                  "note" if set_by and set_by.isdigit() and int(set_by) > usable else "ok",
                  "more threads than processors slow every step; set it to their number, or threads: in the config"
                  if set_by and set_by.isdigit() and int(set_by) > usable else "")
    memory = psutil.virtual_memory()
    yield Finding("machine", "memory", f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f} GiB")


def devices(installed: Installed, python: str = sys.executable) -> Iterator[Finding]:
    """What torch finds, asked in a process of its own, against what the driver shows."""
    from posttrain.rundir import accelerators

    shown = accelerators()
    for name in shown:
        yield Finding("devices", "NVIDIA driver", name)
    if installed("torch") is None:
        yield Finding("devices", "torch", "not installed", remedy="pip install 'posttrain-backends[torch]'")
        return
    said, error = ask(python, _ASK_TORCH)
    if said is None:
        yield Finding("devices", "torch", f"is installed and does not work: {error}", "broken",
                      "install it anew: pip install --force-reinstall torch")
        return
    yield Finding("devices", "torch", f"{said['version']}, {said['threads']} threads")
    for name, memory, capability in said["devices"]:
        yield Finding("devices", "CUDA", f"{name}, {memory / 2**30:.1f} GiB, compute capability {capability}")
    if said["MPS"]:
        yield Finding("devices", "MPS", "there, but no backend here trains on it; device: auto takes the CPU", "note")
    if shown and not said["devices"]:
        why = "torch is a build without CUDA" if not said["built for CUDA"] else "torch cannot use the driver"
        yield Finding("devices", "CUDA", f"the driver shows a device, but {why}", "note",
                      "install torch's CUDA build: pip install --force-reinstall torch")
    elif not said["devices"]:
        yield Finding("devices", "CUDA", "no device; training runs on the CPU")


def ask(python: str, code: str, timeout: float = 120.0) -> tuple[dict[str, Any] | None, str]:
    """The JSON object that `code` prints in a process of its own, or None and the last line of its error."""
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=timeout, check=False)
        if done.returncode == 0:
            return dict(json.loads(done.stdout.strip().rpartition("\n")[2])), ""
        return None, done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        return None, f"no answer within {timeout:g} s"
    except (OSError, ValueError) as error:
        return None, str(error)


def plugins(registry: Registry) -> Iterator[Finding]:
    """Plugins that work, are broken, left out or of another version, and names that clash."""
    for plugin in registry.plugins:
        yield Finding("plugins", plugin.distribution,
                      f"{plugin.version} offers {len(plugin.components)} components".strip())
    for broken in registry.broken:
        yield Finding("plugins", broken.distribution, broken.error, "broken", broken.remedy)
    for foreign in registry.foreign:
        why = f"is in the group '{foreign.group}'" if foreign.misnamed else f"is written for '{foreign.group}'"
        yield Finding("plugins", foreign.distribution, f"{why}; ignored", "note",
                      remedy(foreign))
    for left in registry.left_out:
        yield Finding("plugins", left.distribution, f"is left out by {left.by}", "note", f"unset {left.by} to have it")
    yield from _clashes(registry)


def components(python: str = sys.executable) -> Iterator[Finding]:
    """Components that cannot be used as they are declared; each is imported, in a process of its own."""
    said, error = ask(python, _ASK_COMPONENTS)
    if said is None:
        yield Finding("components", "import", f"the components cannot be looked at: {error}", "broken",
                      "import them one by one: posttrain show KIND NAME")
        return
    yield Finding("components", "imported", f"{said['number']} in {said['seconds']:.1f} s")
    for fault in said["faults"]:
        yield Finding("components", f"{fault['component']} ({fault['distribution']})", fault["what"], fault["status"],
                      fault["remedy"])


def not_installed(registry: Registry) -> Iterator[Finding]:
    """Components of the project whose package is not there, by package and kind."""
    from posttrain import known

    there = known.not_installed(registry)
    for home in dict.fromkeys(k.distribution for k in there):
        offered: dict[str, list[str]] = {}
        for k in there:
            if k.distribution == home:
                offered.setdefault(k.kind, []).append(k.name)
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in offered.items())
        yield Finding("not installed", home, listed, remedy=f"pip install {home}")


def _clashes(registry: Registry) -> Iterator[Finding]:
    owners: dict[tuple[str, str], list[str]] = {}
    for plugin in registry.plugins:
        for component in plugin.components:
            owners.setdefault((component.kind, component.name), []).append(plugin.distribution)
    for (kind, name), several in owners.items():
        if len(several) > 1:
            yield Finding("plugins", f"{kind} '{name}'", f"is offered by {' and '.join(several)}", "note",
                          f"name the one you mean: {' or '.join(f'{owner}/{name}' for owner in several)}")


def _python() -> Iterator[Finding]:
    supported = sys.version_info >= (3, 11)
    yield Finding("python", "python", f"{platform.python_version()} ({platform.python_implementation()}) at "
                  f"{sys.executable}", "ok" if supported else "broken", "" if supported else "use Python 3.11 or later")
    yield Finding("python", "platform", platform.platform())


def is_broken(findings: Iterable[Finding]) -> bool:
    """Whether something does not work as it stands."""
    return any(finding.status == "broken" for finding in findings)
