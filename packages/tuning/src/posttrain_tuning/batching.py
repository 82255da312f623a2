"""The planner `adaptive`: first fit under a budget that follows memory and speed.

Each use of the models (training, the scoring of each, rollout) has a budget of its own. It begins small and doubles
while a part as large as the budget fits and twice as many tokens give more tokens per second. What a token takes is
learned from the peaks of real passes; the budget is what the free memory has room for at an upper quantile of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np
from posttrain.batching import first_fit
from posttrain.protocols import Pass, Usage

_LARGE = 0.8
"""Passes of at least this share of the largest remembered one say what a token takes: in smaller ones, what does not
grow with the tokens counts for too much."""
_FILLED = 0.5
"""A part of more than this share of the budget has filled it: first fit leaves no two parts that would fit into one."""
_TIMED = 4
"""Passes of one size that are timed; the fastest counts, as what disturbs a clock only adds time. Later ones say no
more, so that the budget comes to rest."""
_UNPREDICTED = 0.5
"""Share of the free memory that is planned for where only the least is known that a token takes."""
_AFTER_FAILURE = 0.75
"""Share of what did not fit that is tried next, unless more than that is known to fit."""


@final
@dataclass(frozen=True, slots=True)
class Learned:
    """What is known of one use."""

    tokens: int
    """The budget in force."""
    size: int
    """The budget as far as speed decides: doubled until it does not pay."""
    limit: int = 0
    """Bytes that may be in use, as last seen; 0 where nobody knows."""
    passes: tuple[tuple[int, int, int], ...] = ()
    """The last ones that fitted, oldest first: tokens, bytes in use before, bytes at the peak."""
    paces: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """Exponent e of passes of 2^(e-1) < tokens <= 2^e -> the most tokens per second, and how many passes there were."""
    ceiling: int = 0
    """What memory has run out above; 0 where it has not."""
    ceiling_limit: int = 0
    """The limit at that time."""
    failures: int = 0
    since: int = 0
    """Passes since the ceiling was last moved."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(tuple(x) for x in self.passes))  # JSON made lists of them
        object.__setattr__(self, "paces", {e: (pace, n) for e, (pace, n) in self.paces.items()})


@final
@dataclass(frozen=True, slots=True)
class Budgets:
    """What is known of every use, by name."""

    of: Mapping[str, Learned] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known: Mapping[str, Any] = self.of
        object.__setattr__(self, "of", {
            use: x if isinstance(x, Learned) else Learned(**x) for use, x in known.items()})


@final
@dataclass(frozen=True, slots=True)
class Adaptive:
    """First fit under a budget that is learned from each pass: as large as memory allows and speed rewards.

    Loss and gradient do not depend on it, but for rounding: the clock has a say in where parts end. A run that shall be
    repeated to the last bit takes `first_fit` with the budget that was found (`timing/batch_tokens`).
    """

    tokens: int = 1024
    """The budget to begin with; each part that fills it may be followed by one of twice as many tokens."""
    largest: int = 1 << 20
    """No budget is larger."""
    margin: float = 0.02
    """Share of the memory for tokens that is left free."""
    quantile: float = 0.95
    """Of the bytes per token that recent large passes took: what is planned for."""
    knee: float = 0.03
    """Do not grow where a doubling gave less than this many more tokens per second, as a share; 0 grows as far as
    memory goes."""
    window: int = 32
    """Passes of each use that are remembered."""
    patience: int = 64
    """Passes after which more is tried than memory once ran out with, a tenth at a time; twice as many after each
    failure."""

    def __post_init__(self) -> None:
        for name in ("tokens", "largest", "window", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.margin < 1 or not 0 < self.quantile <= 1 or not self.knee >= 0:
            raise ValueError(f"margin lies in [0, 1), quantile in (0, 1], and knee is not negative; got {self.margin}, "
                             f"{self.quantile} and {self.knee}")

    def plan(self, costs: np.ndarray, budget: int) -> list[np.ndarray]:
        return first_fit(costs, budget)

    # ---- see `posttrain.protocols.Adapting`

    def init(self) -> Budgets:
        return Budgets()

    def budget(self, state: Budgets, use: str) -> int:
        return self._of(state, use).tokens

    def prepared(self, state: Budgets, use: str, memory: Usage, token_bytes: int = 0) -> Budgets:
        new = use not in state.of
        learned = replace(self._of(state, use), limit=memory.limit)
        if new and token_bytes and memory.limit:
            room = _UNPREDICTED * max(0, memory.limit - memory.used)
            predicted = min(self.largest, max(1, int(room / token_bytes)))
            learned = replace(learned, tokens=predicted, size=predicted)
        return self._with(state, use, learned)

    def observed(self, state: Budgets, use: str, seen: Pass) -> Budgets:
        learned = replace(self._of(state, use), limit=seen.start.limit)
        learned = self._failed(learned, seen) if seen.failed else self._grown(self._remembered(learned, seen), seen)
        return self._with(state, use, learned)

    def _of(self, state: Budgets, use: str) -> Learned:
        first = min(self.tokens, self.largest)
        return state.of.get(use) or Learned(first, first)

    def _with(self, state: Budgets, use: str, learned: Learned) -> Budgets:
        return Budgets({**state.of, use: self._settled(learned)})

    def _remembered(self, learned: Learned, seen: Pass) -> Learned:
        """With a pass that fitted, and a ceiling that is lifted when it has held long enough."""
        passes = (*learned.passes, (seen.tokens, seen.start.used, seen.peak))[-self.window:]
        e = str(_doublings(seen.tokens))
        pace, n = learned.paces.get(e, (0.0, 0))
        if n < _TIMED and seen.seconds > 0:
            pace, n = max(pace, (seen.work or seen.tokens) / seen.seconds), n + 1
        learned = replace(learned, passes=passes, paces={**learned.paces, e: (pace, n)}, since=learned.since + 1)
        if learned.ceiling and learned.since >= self.patience * 2 ** learned.failures:
            return replace(learned, ceiling=max(learned.ceiling + 1, int(1.1 * learned.ceiling)), since=0)
        return learned

    def _failed(self, learned: Learned, seen: Pass) -> Learned:
        """With less than what did not fit: as much as is known to fit, where that is not much less."""
        fitted = max((tokens for tokens, _, _ in learned.passes if tokens < seen.tokens), default=0)
        ceiling = max(1, min(max(fitted, int(_AFTER_FAILURE * seen.tokens)), seen.tokens - 1))
        return replace(learned, ceiling=ceiling, ceiling_limit=learned.limit, failures=learned.failures + 1, since=0)

    def _grown(self, learned: Learned, seen: Pass) -> Learned:
        """Twice as large where the pass filled the budget, and where speed has a reason to go on."""
        if learned.tokens < learned.size or seen.tokens <= _FILLED * learned.tokens or not self._pays(learned, seen):
            return learned
        return replace(learned, size=min(self.largest, 2 * learned.size))

    def _pays(self, learned: Learned, seen: Pass) -> bool:
        """Whether passes of this size are faster per token than those half as large."""
        e = _doublings(seen.tokens)
        (pace, n), (before, m) = (learned.paces.get(str(i), (0.0, 0)) for i in (e, e - 1))
        return self.knee == 0 or (n >= _TIMED and (m < _TIMED or pace >= (1 + self.knee) * before))

    def _settled(self, learned: Learned) -> Learned:
        """With the budget that follows; one that still leaves half the margin free is not given up for less, nor for 1
        % more, so that it comes to rest."""
        if learned.ceiling_limit and learned.limit > 1.02 * learned.ceiling_limit:
            learned = replace(learned, ceiling=0, ceiling_limit=0, since=0)
        most = min(x for x in (learned.size, self.largest, learned.ceiling or learned.size))
        wanted, held = (max(1, min(most, _fitting(learned, self.quantile, margin)))
                        for margin in (self.margin, self.margin / 2))
        if wanted <= learned.tokens <= held or learned.tokens < wanted < min(1.01 * learned.tokens, most):
            return learned
        return replace(learned, tokens=wanted)


def _doublings(tokens: int) -> int:
    """The exponent of the least power of two that is not less.

    >>> [_doublings(n) for n in (1, 2, 3, 4, 5)]
    [0, 1, 2, 2, 3]
    """
    return (tokens - 1).bit_length()


def _fitting(learned: Learned, quantile: float, margin: float) -> int:
    """Tokens that there is room for, by what the largest passes took per token above the least in use before any."""
    known = [x for x in learned.passes if x[2]]
    if not known or not learned.limit:
        return learned.size
    least, largest = min(used for _, used, _ in known), max(tokens for tokens, _, _ in known)
    each = [(peak - least) / tokens for tokens, _, peak in known if tokens >= _LARGE * largest]
    taken = float(np.quantile(each, quantile, method="higher"))
    room = (1 - margin) * (learned.limit - least)
    return learned.size if taken <= 0 else max(1, min(int(room / taken), learned.size))
