"""The planner `adaptive`: first fit under a budget that follows memory and speed.

Each use of the models (training, the scoring of each, rollout) has a budget of its own. It begins small and doubles
while a part as large as the budget fits and twice as many tokens give more tokens per second. What a token takes is
learned from the peaks of real passes; the budget is what the free memory has room for at an upper quantile of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np
from posttrain.batching import first_fit
from posttrain.protocols import Pass, Usage

_LARGE = 0.9
"""Passes of at least this share of the largest remembered one say what a token takes: in smaller ones, what does not
grow with the tokens counts for too much."""
_FILLED = 0.5
"""A part of more than this share of the budget has filled it: first fit leaves no two parts that would fit into one."""
_TIMED = 4
"""Passes of one size that are timed; the fastest counts, as what disturbs a clock only adds time. Later ones say no
more, so that the budget comes to rest."""
_LEAP = 4
"""Growth where only memory decides and its peaks are known: what a token takes is then seen too large, if anything."""
_UNPREDICTED = 0.5
"""Share of the free memory that is planned for where only the least is known that a token takes."""
_AFTER_FAILURE, _NEARLY = 0.75, 0.9
"""Shares of what did not fit: what is tried next, and up to where more than that is, if it is known to fit."""


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
    used: int = 0
    """Bytes that were in use before the first pass of a step, as last seen."""
    passes: tuple[tuple[int, int], ...] = ()
    """The last ones that fitted, oldest first: tokens, and bytes above that at the peak, 0 where nobody knows."""
    each: float = 0.0
    """Bytes per token that are planned for; 0 where nobody knows."""
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
        object.__setattr__(self, "passes", tuple((tokens, taken) for tokens, taken in self.passes))  # JSON has lists
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
        learned = replace(self._of(state, use), limit=memory.limit, used=memory.used)
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
        passes = (*learned.passes, (seen.tokens, max(0, seen.peak - learned.used)))[-self.window:]
        e = str(_doublings(seen.tokens))
        pace, n = learned.paces.get(e, (0.0, 0))
        if n < _TIMED and seen.seconds > 0:
            pace, n = max(pace, (seen.work or seen.tokens) / seen.seconds), n + 1
        learned = replace(learned, passes=passes, paces={**learned.paces, e: (pace, n)}, since=learned.since + 1,
                          each=_each(passes, self.quantile) or learned.each)
        if learned.ceiling and learned.since >= self.patience * 2 ** learned.failures:
            return replace(learned, ceiling=max(learned.ceiling + 1, int(1.1 * learned.ceiling)), since=0)
        return learned

    def _failed(self, learned: Learned, seen: Pass) -> Learned:
        """With less than what did not fit: as much as is known to fit, where that is not much less, unless that is
        what failed again."""
        within = (tokens for tokens, _ in learned.passes if tokens <= _NEARLY * seen.tokens)
        fitted = max(within, default=0) if learned.since or not learned.failures else 0
        ceiling = max(1, fitted, int(_AFTER_FAILURE * seen.tokens))
        return replace(learned, ceiling=ceiling, ceiling_limit=learned.limit, failures=learned.failures + 1, since=0)

    def _grown(self, learned: Learned, seen: Pass) -> Learned:
        """Larger where the pass filled the budget and speed has no reason to stop; half as large where it was slower
        than one of half its size."""
        if seen.tokens <= _FILLED * learned.tokens:
            return learned
        if not self.knee:
            leap = _LEAP if learned.limit and seen.peak else 2
            return replace(learned, size=min(self.largest, leap * learned.size)) if _is_free(learned) else learned
        e = _doublings(seen.tokens)
        before, here, after = (learned.paces.get(str(i), (0.0, 0)) for i in (e - 1, e, e + 1))
        if here[1] < _TIMED:
            return learned
        if before[1] == _TIMED and here[0] < before[0]:
            return replace(learned, size=1 << e - 1)
        if _is_free(learned) and all(slow[1] < _TIMED or fast[0] >= (1 + self.knee) * slow[0]
                                     for slow, fast in ((before, here), (here, after)) if fast[1] == _TIMED):
            return replace(learned, size=min(self.largest, 2 * learned.size))
        return learned

    def _settled(self, learned: Learned) -> Learned:
        """With the budget that follows; one that still leaves half the margin free is not given up for less, nor for 1
        % more, so that it comes to rest."""
        if learned.ceiling_limit and learned.limit > 1.02 * learned.ceiling_limit:
            learned = replace(learned, ceiling=0, ceiling_limit=0, since=0)
        most = min(x for x in (learned.size, self.largest, learned.ceiling or learned.size))
        wanted, held = (max(1, min(most, _fitting(learned, margin))) for margin in (self.margin, self.margin / 2))
        if wanted <= learned.tokens <= held or learned.tokens < wanted < min(1.01 * learned.tokens, most):
            return learned
        return replace(learned, tokens=wanted)


def _is_free(learned: Learned) -> bool:
    """Whether the budget is as large as speed decides: no memory holds it back."""
    return learned.tokens >= learned.size


def _doublings(tokens: int) -> int:
    """The exponent of the least power of two that is not less.

    >>> [_doublings(n) for n in (1, 2, 3, 4, 5)]
    [0, 1, 2, 2, 3]
    """
    return (tokens - 1).bit_length()


def _each(passes: Sequence[tuple[int, int]], quantile: float) -> float:
    """An upper quantile of the bytes per token that the largest passes took; 0 where nobody knows of any."""
    known = [(tokens, taken) for tokens, taken in passes if taken]
    largest = max((tokens for tokens, _ in known), default=0)
    each = [taken / tokens for tokens, taken in known if tokens >= _LARGE * largest]
    return float(np.quantile(each, quantile, method="higher")) if each else 0.0


def _fitting(learned: Learned, margin: float) -> int:
    """Tokens that there is room for, as far as anybody knows."""
    if not learned.each or not learned.limit:
        return learned.size
    room = (1 - margin) * max(0, learned.limit - learned.used)
    return min(int(room / learned.each), learned.size)
