"""posttrain: reinforcement-learning post-training of language models from exchangeable parts.

The public API in one list. Importing it loads no framework; what needs the loops is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from posttrain.data import Episodes, Estimate, Loss, Metric, Metrics, MicroBatch, Prompt, Rollouts, Sampling, Term
from posttrain.hookspecs import Component, hookimpl
from posttrain.ops import Ops, reverse_recurrence, segment_sum
from posttrain.registry import Registry, discover

if TYPE_CHECKING:
    from posttrain.run import Run, evaluate, resume, sample, train

__version__ = "0.1.0"

__all__ = [
    "Component", "Episodes", "Estimate", "Loss", "Metric", "Metrics", "MicroBatch", "Ops", "Prompt", "Registry",
    "Rollouts", "Run", "Sampling", "Term", "discover", "evaluate", "hookimpl", "resume", "reverse_recurrence", "sample",
    "segment_sum", "train",
]

_OF_RUN = frozenset({"Run", "evaluate", "resume", "sample", "train"})


def __getattr__(name: str) -> Any:
    if name in _OF_RUN:
        return getattr(import_module("posttrain.run"), name)
    raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
