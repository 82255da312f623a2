"""posttrain: reinforcement-learning post-training of language models from exchangeable parts.

The public API in one list. Importing it loads nothing, each name is imported on first use, so that listing plugins does
not pay for arrays.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.data import Episodes, Estimate, Loss, Metric, Metrics, MicroBatch, Prompt, Rollouts, Sampling, Term
    from posttrain.hookspecs import Component, hookimpl
    from posttrain.ops import Ops, reverse_recurrence, segment_sum
    from posttrain.protocols import Need, Output
    from posttrain.registry import Registry, discover
    from posttrain.run import Run, evaluate, resume, sample, train

__version__ = "0.1.0"

__all__ = [
    "Component", "Episodes", "Estimate", "Loss", "Metric", "Metrics", "MicroBatch", "Need", "Ops", "Output", "Prompt",
    "Registry", "Rollouts", "Run", "Sampling", "Term", "discover", "evaluate", "hookimpl", "resume",
    "reverse_recurrence", "sample", "segment_sum", "train",
]

_MODULE = {name: module for module, names in {
    "data": ("Episodes", "Estimate", "Loss", "Metric", "Metrics", "MicroBatch", "Prompt", "Rollouts", "Sampling",
             "Term"),
    "hookspecs": ("Component", "hookimpl"),
    "ops": ("Ops", "reverse_recurrence", "segment_sum"),
    "protocols": ("Need", "Output"),
    "registry": ("Registry", "discover"),
    "run": ("Run", "evaluate", "resume", "sample", "train"),
}.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"posttrain.{_MODULE[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
