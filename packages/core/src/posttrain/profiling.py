"""Where a run's memory goes: the peak of each phase, what takes it, and whether it grows from step to step.

Peaks are the kernel's and the allocator's own marks, read when a phase begins and ends, so nothing is sampled. All of
it may differ between equal runs, and is recorded under `timing/memory/`, in MiB.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import final

from posttrain.memory import HOST, RESIDENT
from posttrain.protocols import Accounted
from posttrain.rundir import TIMING
from posttrain.watermark import Watermark

log = logging.getLogger(__name__)

PREFIX = TIMING + "memory/"
FILE = "memory.json"
"""In a run directory: the peaks of a run, by phase and mark, and what was predicted."""
_MIB = 2**20
_HELD, _COMPUTED = ("parameters", "buffers", "gradients", "optimiser", "kv_cache"), "activations"
CATEGORIES = (*_HELD, _COMPUTED)
"""What memory is taken by. Activations are the part of the largest backward pass's peak that came on top of what there
was before it, without the gradients that it left: what the pass keeps, and what each operation needs for a time."""
_ASKED_AFTER = ("rollout", "backward")
"""Phases after which models are asked what they hold: keys and values are new then, and gradients are there. To go
through all tensors takes a millisecond or two of a model of 24 layers, so it is not done after every phase."""
_SETTLED, _LOOKED_AT = 4, 24
"""Steps after which memory may be called a leak, as arenas and caches fill first; and the steps that are looked at."""
_SURE = 4.0
"""Standard deviations of Mann-Kendall's statistic."""
_WORTH_TELLING = 8 * _MIB
"""Bytes that the steps looked at must have added."""


@final
@dataclass(frozen=True, slots=True)
class Growth:
    """A trend that chance does not explain."""

    per_step: float
    """Bytes: the median of the slopes between all pairs of steps (Theil 1950, Sen 1968)."""
    steps: int


def growth(levels: Sequence[float]) -> Growth | None:
    """The trend of memory after each step, oldest first; None where it is not sure to rise. Sure is what the test of
    Mann (1945) and Kendall says at 4 standard deviations, without any assumption on how memory scatters.

    >>> growth([100.0, 101.0] * 12) is None
    True
    >>> growth([100.0 + 3 * i + i % 2 for i in range(24)])
    Growth(per_step=3.0, steps=24)
    """
    n = len(levels)
    pairs = [(j - i, levels[j] - levels[i]) for i in range(n) for j in range(i + 1, n)]
    rises = sum((d > 0) - (d < 0) for _, d in pairs)
    deviation = math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    if not pairs or rises <= _SURE * deviation:
        return None
    return Growth(median(d / steps for steps, d in pairs), n)


@final
@dataclass(slots=True)
class Peaks:
    """The most that was in use, in bytes."""

    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    """Phase -> mark -> bytes."""
    categories: dict[str, int] = field(default_factory=dict)

    def add(self, other: Peaks) -> None:
        """Keep the larger of each."""
        for phase, marks in other.phases.items():
            _keep_larger(self.phases.setdefault(phase, {}), marks)
        _keep_larger(self.categories, other.categories)


def _main(marks: Mapping[str, int]) -> str:
    """The one that says what is needed."""
    return "allocated" if "allocated" in marks else HOST


def _keep_larger(known: dict[str, int], seen: Mapping[str, int]) -> None:
    for name, value in seen.items():
        known[name] = max(known.get(name, 0), value)


@final
class Profile:
    """Watches the phases of a run.

        profile = Profile()
        with profile("load"):
            parts = ...
        profile.watch([learner, sampler])
        with profile("rollout"):
            ...
        profile.taken()    # of this step
    """

    def __init__(self, host: Watermark = RESIDENT) -> None:
        self._host, self._devices = host, [host]
        self._models: list[Accounted] = []
        self._step, self.run = Peaks(), Peaks()
        self._levels: deque[float] = deque(maxlen=_LOOKED_AT)
        self._steps = 0
        self._told = False
        self.base = 0
        """Bytes of the process that no model holds, after loading: code, and what was imported."""

    def watch(self, models: Sequence[object], folder: Path | None = None) -> None:
        """Ask these models, too, from now on; where one runs out of memory, what explains it goes to the folder."""
        self._models = [m for m in {id(m): m for m in models}.values() if isinstance(m, Accounted)]
        devices = {id(mark): mark for m in self._models if (mark := m.watermark()) is not None}
        self._devices = [self._host, *devices.values()]
        held = 0 if devices else sum(sum(m.held().values()) for m in self._models)
        self.base = max(0, self._host.level()[HOST] - held)
        if folder is not None:
            for model in self._models:
                model.explain(folder)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        with ExitStack() as stack:
            spans = [stack.enter_context(device.span()) for device in self._devices]
            yield
        held: dict[str, int] = {}
        for model in self._models if phase in _ASKED_AFTER else ():
            for name, value in model.held().items():
                held[name] = held.get(name, 0) + value
        if phase == "backward":
            span, main = spans[-1], _main(spans[-1].peak)
            held[_COMPUTED] = max(0, span.peak[main] - span.start[main] - held.get("gradients", 0))
        peaks = {name: value for span in spans for name, value in span.peak.items()}
        self._step.add(Peaks({phase: peaks}, held))

    def taken(self) -> dict[str, float]:
        """The peaks since the last call as metrics, and begin anew. Warns once where memory grows."""
        found, self._step = self._step, Peaks()
        self.run.add(found)
        metrics = {f"{PREFIX}{phase}/{name}_mb": value / _MIB
                   for phase, marks in found.phases.items() for name, value in marks.items()}
        metrics |= {f"{PREFIX}{name}_mb": value / _MIB for name, value in found.categories.items() if value}
        return metrics | self._growth()

    def _growth(self) -> dict[str, float]:
        """What is in use between two steps, and how it grows."""
        level = self._devices[-1].level()
        now = level[_main(level)]
        self._steps += 1
        if self._steps > _SETTLED:
            self._levels.append(now)
        found = growth(self._levels)
        slope = 0.0 if found is None or found.steps < _LOOKED_AT else found.per_step
        if slope * _LOOKED_AT > _WORTH_TELLING and not self._told:
            self._told = True
            log.warning("memory grows by %.1f MiB a step, over the last %d steps: something keeps what each step makes "
                        "(a reward, a task or a plugin of your own is the first place to look)", slope / _MIB,
                        _LOOKED_AT)
        return {PREFIX + "between_steps_mb": now / _MIB, PREFIX + "growth_mb": slope / _MIB}

    def write(self, path: Path) -> None:
        """The peaks of the run as JSON, beside what the file says already."""
        self.run.add(self._step)
        known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        measured = {"base": self.base, "phases": self.run.phases, "categories": self.run.categories}
        path.write_text(json.dumps({**known, "measured": measured}, indent=2) + "\n", encoding="utf-8")
