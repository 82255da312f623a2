"""What a report knows of a run: metrics, samples, configuration, manifest and whether it lives; all from its directory.

Needs no lock and no plugin, so living and crashed runs are read as well as finished ones. Knows nothing of drawing.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from posttrain.checkpoint import JSON
from posttrain.errors import DataError, InputError, Problem
from posttrain.rundir import CONFIG, MANIFEST, SAMPLES, TIMING, read_metrics

MISSING = ""
"""Stands in a table where a run has no such key."""


@final
@dataclass(frozen=True, slots=True)
class Curves:
    """The metrics of one run."""

    label: str
    records: Sequence[Mapping[str, JSON]]
    """Lines of `metrics.jsonl`."""

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values where the run has the metric; null, which was not finite, is a gap (NaN).

        >>> Curves("a", [{"step": 1, "x": None, "timing": {"seconds": 2.0}}]).column("timing/seconds")
        ([1], [2.0])
        """
        key = name.removeprefix(TIMING)
        found = [(r["step"], fields[key]) for r in self.records
                 if key in (fields := r.get("timing", {}) if name.startswith(TIMING) else r)]
        return [step for step, _ in found], [math.nan if value is None else value for _, value in found]

    def first(self, names: Sequence[str]) -> str | None:
        """The first of `names` that the run has."""
        return next((name for name in names if self.column(name)[0]), None)

    def names(self) -> list[str]:
        """All metrics, those of `timing` with their prefix, sorted."""
        found = {name for r in self.records for name, value in r.items() if isinstance(value, (int, float, type(None)))}
        timed = {TIMING + name for r in self.records for name in r.get("timing", {})}
        return sorted((found - {"step", "nonfinite"}) | timed)


@final
@dataclass(frozen=True, slots=True)
class History:
    """One run as a report shows it."""

    path: Path
    curves: Curves
    samples: Sequence[Mapping[str, JSON]]
    """Lines of `samples.jsonl`."""
    config: str
    """Text of `config.yaml`; empty where it is missing."""
    settings: Mapping[str, str]
    """The configuration, flat: dotted key -> value as text."""
    manifest: Mapping[str, str]
    """The manifest, flat."""
    state: str
    """`finished`, `running (process 12)` or `stopped`."""

    @property
    def label(self) -> str:
        return self.curves.label

    @property
    def steps(self) -> int:
        """Steps done."""
        return max((r["step"] for r in self.curves.records), default=0)


def read(path: Path, label: str) -> History:
    """Read a run's directory. Raises `InputError` where there are no metrics, `DataError` where a file is damaged."""
    config = _text(path / CONFIG)
    return History(
        path=path, curves=Curves(label, read_metrics(path)), config=config,
        samples=read_metrics(path / SAMPLES) if (path / SAMPLES).is_file() else (),
        settings=flat(_parsed_yaml(config, path / CONFIG)), manifest=flat(_parsed_json(path / MANIFEST)),
        state=state_of(path))


def labels_of(paths: Sequence[Path]) -> list[str]:
    """The runs' directory names, with as many parents as tell them apart.

    >>> labels_of([Path("/runs/0/rl"), Path("/runs/1/rl")])
    ['0/rl', '1/rl']
    """
    whole = [path.resolve() for path in paths]
    longest = max((len(path.parts) for path in whole), default=1)
    for depth in range(1, longest):
        labels = ["/".join(path.parts[-depth:]) for path in whole]
        if len(set(labels)) == len(set(whole)):
            return labels
    return [str(path) for path in whole]


def checked_labels(paths: Sequence[Path], labels: Sequence[str] | None) -> list[str]:
    """The given labels, or those of the paths. Raises `InputError` where their number is wrong."""
    names = labels_of(paths) if labels is None else list(labels)
    if len(names) != len(paths):
        raise InputError([f"{len(names)} labels were given for {len(paths)} runs"])
    return names


def flat(tree: Any, key: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys; a component's `use` stands under the component's own key, lists stay whole.

    >>> flat({"kl": {"use": "adaptive", "target": 0.2}, "betas": [0.9, 0.999], "critic": None})
    {'kl': 'adaptive', 'kl.target': '0.2', 'betas': '[0.9, 0.999]', 'critic': 'null'}
    """
    if not isinstance(tree, Mapping) or (key and not tree):
        return {key: tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False, default=str)}
    return {dotted: text for name, value in tree.items()
            for dotted, text in flat(value, _joined(key, str(name))).items()}


def differences(tables: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Keys on which the runs do not agree, with each run's value.

    >>> differences([{"lr": "1", "seed": "0"}, {"lr": "2", "seed": "0", "kl": "fixed"}])
    {'lr': ['1', '2'], 'kl': ['', 'fixed']}
    """
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = {key: [table.get(key, MISSING) for table in tables] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def state_of(path: Path) -> str:
    """Whether a run is finished, still running, or stopped before its end."""
    import psutil

    from posttrain.run import POLICY

    try:
        owner = json.loads((path / ".owner.json").read_text("utf-8"))
        if owner["host"] == socket.gethostname() and psutil.pid_exists(owner["pid"]):
            return f"running (process {owner['pid']})"
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nobody holds it
    return "finished" if (path / POLICY).is_dir() else "stopped"


def _joined(key: str, name: str) -> str:
    return key if name == "use" and key else f"{key}.{name}" if key else name


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise InputError([Problem(f"cannot be read: {error}", str(path))]) from error


def _parsed_yaml(text: str, path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise DataError([Problem(f"not YAML: {' '.join(str(error).split())}", str(path))]) from error


def _parsed_json(path: Path) -> Any:
    text = _text(path)
    try:
        return json.loads(text) if text else {}
    except ValueError as error:
        raise DataError([Problem(f"not JSON: {error}", str(path))]) from error
