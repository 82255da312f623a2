"""What to change so that a run fits into memory, for the least time.

Only what changes neither the loss nor the gradient is tried, but for moments in 8 bits, which are tried last. Changes
are ordered by the operations and the traffic that they cost a step; the first set that fits by prediction is taken.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import product
from pathlib import Path
from typing import Any, final

from omegaconf import OmegaConf
from posttrain.config import Loaded
from posttrain.errors import ConfigError
from posttrain.passes import first_budget
from posttrain.schema import Settings

from posttrain_tuning.memory.predict import Prediction

_SMALLEST, _HALVINGS = 256, 6
"""Tokens of a part below which it is not cut, and how often it may be halved."""
_PER_BYTE = 10
"""Operations in the time of moving a byte: about 50 GFLOP/s and 5 GB/s of one core; an accelerator has more of both."""
_OPTIMISER_BYTES: Mapping[str, float] = {"float32": 28, "int8": 5 * 28}
"""Moved for a parameter in one step: it, its gradient and two moments, three of them written back; in 8 bits as many
times as slow as was measured on a CPU (docs/memory.md)."""
UNAVAILABLE: Mapping[str, str] = {
    "LoRA": "changes what is trained, which is not the planner's to choose: policy: {use: hf, lora: ...}",
    "quantised reference": "changes the KL: reference: {use: quantized, ...}; its layers cannot be imagined",
    "selective checkpointing": "backend torch checkpoints whole layers",
    "optimiser in the backward pass": "gradients are summed over parts and clipped by their common norm, so all "
                                      "of them must be there before the first is used",
    "optimiser or activations on the host": "the backends here keep both on the device",
}
"""What others offer and is not chosen here, and why."""


@final
@dataclass(frozen=True, slots=True)
class Change:
    """Some settings, and what they do."""

    settings: tuple[str, ...] = ()
    checkpointing: bool = False
    halvings: int = 0
    moments: str = "float32"
    slots: int = 0


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """A way to run."""

    change: Change
    prediction: Prediction
    slowdown: float
    """Predicted time of an update over that of the configuration as it is."""
    fits: bool
    tried: int
    """Predictions that were made."""


_UNITS: Mapping[str, int] = {"": 1, **{f"{p}B": 1000**i for i, p in enumerate(("", "K", "M", "G", "T"))},
                             **{f"{p}iB": 1024**i for i, p in enumerate(("", "K", "M", "G", "T"))}}


def size_of(text: str) -> int:
    """Bytes of a size as people write it. Raises `ConfigError`.

    >>> size_of("24GiB"), size_of("1.5 GB"), size_of("4096")
    (25769803776, 1500000000, 4096)
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?i?B|)\s*", text)
    if not found or found[2] not in _UNITS or found[1].count(".") > 1 or found[1] == ".":
        raise ConfigError([f"--limit must be a size such as 24GiB or 512MiB, got {text!r}"])
    return int(float(found[1]) * _UNITS[found[2]])


def plan(loaded: Loaded, room: int, predicted: Callable[[Sequence[str]], Prediction]) -> Plan:
    """The fastest way to run in `room` bytes above what the process takes anyway; where none fits, the one that takes
    least. `predicted` says what the configuration takes with some settings over it."""
    known: list[tuple[Change, Prediction]] = []
    base = predicted(())
    parameters = base.categories.get("gradients", 0) // 4
    changes = sorted(_changes(loaded.settings, base), key=lambda c: cost(loaded.settings, c, parameters))
    slowest = cost(loaded.settings, Change(), parameters)
    for change in changes:
        if known and _hopeless(change, known, room):
            continue
        prediction = predicted(change.settings) if change.settings else base
        known.append((change, prediction))
        if prediction.peak <= room:
            break
    change, prediction = min(known, key=lambda pair: (pair[1].peak > room, pair[1].peak)) \
        if known[-1][1].peak > room else known[-1]
    return Plan(change, prediction, cost(loaded.settings, change, parameters) / slowest, prediction.peak <= room,
                len(known))


def _hopeless(change: Change, known: Sequence[tuple[Change, Prediction]], room: int) -> bool:
    """Whether a phase did not fit that this change leaves as it was."""
    for other, prediction in known:
        over = {phase for phase, peak in prediction.phases.items() if peak > room and phase != "update"}
        same = change.moments == other.moments
        if same and over & {"load", "optimiser", "sync", "checkpoint"}:
            return True
        if same and "backward" in over and change.checkpointing <= other.checkpointing \
                and change.halvings <= other.halvings:
            return True
        if same and "rollout" in over and change.slots in (0, other.slots) and other.slots <= change.slots:
            return True
    return False


def _changes(settings: Settings, base: Prediction) -> Iterator[Change]:
    """Every combination of what the configuration has keys for."""
    budget = first_budget(settings.batching)
    tokens = min(budget, base.tokens) if isinstance(budget, int) else 0
    halvings = max(0, min(_HALVINGS, int(math.log2(max(1, tokens) / _SMALLEST)))) if tokens else 0
    checkpointing = (False, True) if _has(settings.policy, "gradient_checkpointing") else (False,)
    moments = ("float32", "int8") if settings.optimizer.moments == "float32" else ("int8",)
    episodes = settings.rollout.prompts_per_step * settings.rollout.group_size
    slots = [0, *(n for n in (episodes // 2, episodes // 4, episodes // 8) if n)] \
        if _has(settings.rollout.engine, "slots") and settings.loop == "rl" else [0]
    for c, h, m, s in product(checkpointing, range(halvings + 1), moments, slots):
        written = [*(["policy.gradient_checkpointing=true"] if c else []),
                   *([f"batching.tokens={tokens >> h}"] if h else []),
                   *([f"optimizer.moments={m}"] if m != settings.optimizer.moments else []),
                   *([f"rollout.engine.slots={s}"] if s else [])]
        yield Change(tuple(written), c, h, m, s)


def _has(part: Any, name: str) -> bool:
    """Whether a component has such a field that is not set already."""
    return is_dataclass(part) and name in {f.name for f in fields(part)} and not getattr(part, name)


def cost(settings: Settings, change: Change, parameters: int) -> float:
    """Operations of an iteration, and what is moved in units of them: 2 a parameter and token forwards, 4 backwards, 2
    more where layers are computed again (2203.16487, sec. 2); weights and gradients once for each part; weights once
    for each decoding pass."""
    rollout, update = settings.rollout, settings.update
    new = rollout.max_new_tokens if settings.loop == "rl" else 0
    episodes = rollout.prompts_per_step * rollout.group_size if settings.loop == "rl" else settings.batch_size
    tokens = episodes * max(new, 1)
    budget = first_budget(settings.batching)
    parts = max(1, tokens // (budget if isinstance(budget, int) else tokens)) << change.halvings
    passes = new * (episodes / change.slots if change.slots else 1)
    computed = (6 + 2 * change.checkpointing) * tokens * update.epochs
    steps = update.epochs * update.steps_per_rollout
    moved = 12 * parts * update.epochs + _OPTIMISER_BYTES[change.moments] * steps + 4 * passes
    return float(parameters) * (computed + _PER_BYTE * moved)


def overrides(file: Path, target: Path, settings: Sequence[str]) -> str:
    """A configuration (YAML) that extends another one by some settings.

    >>> print(overrides(Path("a/train.yaml"), Path("a/small.yaml"), ["batching.tokens=512"]), end="")
    extends: train.yaml
    batching:
      tokens: 512
    """
    base = os.path.relpath(file.resolve(), target.resolve().parent)
    return OmegaConf.to_yaml(OmegaConf.create({"extends": base, **OmegaConf.from_dotlist(list(settings))}))
