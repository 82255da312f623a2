"""The reward `countdown`: whether an answer's expression solves its puzzle. Runs in a worker process."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, final

from posttrain_countdown.expression import evaluated


@final
@dataclass(frozen=True, slots=True)
class CountdownScore:
    """1 where the expression reaches the target, `form` where it only uses the row's numbers rightly, else 0.

    The expression is the answer up to its first `=`. Each of the row's numbers may stand in it once. None, which leaves
    the episode out, where a row is no puzzle.

    Raises `LookupError` where no row has the columns `numbers` and `target`.

    >>> CountdownScore()(prompts=[""] * 3, completions=["(5 - 2) * 4 = 12", "5 + 2", "6 + 6"],
    ...                  numbers=[[2, 4, 5]] * 3, target=[12] * 3)
    [1.0, 0.1, 0.0]
    """

    form: float = 0.1
    """For an expression of the row's numbers that misses the target: what can be learned before the first success."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.form < 1.0:
            raise ValueError(f"form must lie in [0, 1), got {self.form}")

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        """One number per completion, in their order."""
        if missing := [name for name in ("numbers", "target") if name not in columns]:
            raise LookupError(f"no row has a column {' or '.join(missing)}; the reward countdown scores rows of the "
                              f"task countdown, the columns are {', '.join(sorted(columns)) or 'none'}")
        return [None if numbers is None or target is None else self._score(text, numbers, target)
                for text, numbers, target in zip(completions, columns["numbers"], columns["target"], strict=True)]

    def _score(self, text: str, numbers: list[int], target: int) -> float:
        found = evaluated(text.partition("=")[0])
        if found is None or Counter(found.numbers) - Counter(numbers):
            return 0.0
        return 1.0 if found.value == target else self.form
