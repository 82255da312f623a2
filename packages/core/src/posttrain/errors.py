"""Every error the user may meet: what failed, where, the likely fix. Knows nothing about what raises it.

An error that derives from `PosttrainError` is meant for the person at the keyboard: the command line prints its text
without a traceback and ends with its `exit_code`. Anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches


class PosttrainError(Exception):
    """An error with a message for the user; `exit_code` is what the process ends with."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with the input, and where it stands (`train.yaml:14`, `data.jsonl:7`, a key)."""

    message: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.message} ({self.where})" if self.where else self.message


SHOWN = 20
"""Rows that one error lists; the rest are counted."""


class InputError(PosttrainError):
    """All problems found in one input at once, so that they can be mended at once."""

    exit_code = 2

    def __init__(self, problems: Iterable[Problem | str], title: str = "", next_step: str = "") -> None:
        self.problems: Sequence[Problem] = tuple(
            p if isinstance(p, Problem) else Problem(p) for p in problems
        )
        lines = [title] if title else []
        lines += [f"  {p}" if title else str(p) for p in self.problems]
        lines += [next_step] if next_step else []
        super().__init__("\n".join(lines))


class ConfigError(InputError):
    """The configuration cannot be run as it stands."""


class PluginError(InputError):
    """A component is not found, is ambiguous, is broken, or needs a package that is not installed."""


class DataError(InputError):
    """Rows of a data set that cannot be used, each named by file and line."""


class RewardError(PosttrainError):
    """A reward function raised, or returned the wrong length, a wrong type or a number that is not finite."""

    exit_code = 2


class RunInUse(PosttrainError):
    """Another living process holds the run directory."""

    exit_code = 2


class CheckpointDamaged(PosttrainError):
    """A published checkpoint does not match its manifest."""

    exit_code = 3


class Diverged(PosttrainError):
    """Training was stopped because gradients or losses stayed non-finite."""

    exit_code = 4


class MemoryExhausted(PosttrainError):
    """A backend ran out of memory. After it only `Learner.discard()` is legal; core then plans smaller parts."""

    exit_code = 5


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'vtrace'?"` for the nearest known name, or nothing.

    >>> did_you_mean("vtrce", ["gae", "vtrace"])
    "; did you mean 'vtrace'?"
    """
    match = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""
