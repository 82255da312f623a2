"""The task `countdown`: puzzles that have a solution, since each is made from one. Knows nothing of answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
from posttrain.protocols import PromptSource, RowRules, Tokenizer
from posttrain.tasks import Keys, Split, Table, given_rows, load

TEMPLATE = "Make {target} from {numbers}, using each number at most once, with + - * / and brackets. Answer: "


@final
@dataclass(frozen=True, slots=True)
class Countdown:
    """Rows with a prompt and the columns `numbers` and `target`, which the reward `countdown` reads.

    A target is made by joining all numbers of the row, in a random order, by random operators; partial results stay
    positive whole numbers, and the target is none of the numbers.

    Raises `ValueError` on construction where a field is out of its range.

    >>> from posttrain.tokenizers import Bytes
    >>> prompt, = Countdown(size=1, template="{target} from {numbers}").load(Bytes().load(), RowRules()).take(0, 1, 0)
    >>> prompt.text == f"{prompt.extra['target']} from {' '.join(map(str, prompt.extra['numbers']))}"
    True
    """

    size: int = 1000
    """Puzzles."""
    numbers: int = 3
    """Numbers of a puzzle."""
    largest: int = 20
    """Numbers are drawn from 1 to this one."""
    seed: int = 0
    """Of the puzzles; their order in an epoch has the run's seed."""
    template: str = TEMPLATE
    """The prompt, with {numbers} and {target}."""
    held_out_fraction: float = 0.0
    """Part of the puzzles that is kept for evaluation."""

    def __post_init__(self) -> None:
        if self.size < 1 or self.numbers < 2 or self.largest < 2 or self.seed < 0:
            raise ValueError("size is at least 1, numbers and largest at least 2, and seed not negative")
        if "{numbers}" not in self.template or "{target}" not in self.template:
            raise ValueError(f"template must hold {{numbers}} and {{target}}, got {self.template!r}")
        if not 0.0 <= self.held_out_fraction < 1.0:
            raise ValueError(f"held_out_fraction must lie in [0, 1), got {self.held_out_fraction}")

    def load(self, tokenizer: Tokenizer, rules: RowRules) -> PromptSource:
        """Make all puzzles; raises one `DataError` with every prompt that the tokenizer or `rules` do not allow."""
        rows = given_rows("countdown", [self._row(i) for i in range(self.size)])
        split = Split(self.held_out_fraction, self.seed)
        return load(Table("countdown", rows), None, Keys(), split, True, tokenizer, rules)

    def _row(self, i: int) -> dict[str, object]:
        rng = np.random.default_rng([self.seed, i])
        while True:
            numbers = rng.integers(1, self.largest, self.numbers, endpoint=True).tolist()
            target = _joined(numbers, rng)
            if target not in numbers:
                break
        text = self.template.replace("{target}", str(target)).replace("{numbers}", " ".join(map(str, numbers)))
        return {"prompt": text, "numbers": numbers, "target": target}


def _joined(numbers: list[int], rng: np.random.Generator) -> int:
    """The numbers in a random order, joined from the left by random operators."""
    value, *rest = rng.permutation(numbers).tolist()
    for x in rest:
        results = [value + x, value * x]
        results += [abs(value - x)] if value != x else []
        results += [value // x] if value % x == 0 else []
        value = results[rng.integers(len(results))]
    return int(value)
