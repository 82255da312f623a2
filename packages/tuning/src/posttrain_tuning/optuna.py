"""Searcher `optuna`: its samplers by ask and tell, on a journal in the study's folder or a database that machines
share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, final

from posttrain.protocols import Search
from posttrain.search import Choice, Goal, Range, Space

NEEDS = {"gp": ("torch", "scipy"), "cmaes": ("cmaes",)}
"""Sampler -> packages that Optuna imports only when it draws; without them a study would fail in its midst."""
MANY = 3
"""Goals up to which `auto` takes TPE: the volumes that it compares grow with their number."""


@final
@dataclass(frozen=True, slots=True)
class Optuna:
    """Proposes trials by a sampler of Optuna (Akiba et al. 2019, arXiv 1907.10902).

    A proposal depends on the seed, the trial's number and what was told before, so a study that was stopped goes on as
    if it had not been, as far as results arrive in the same order (one worker).
    """

    sampler: Literal["auto", "tpe", "gp", "cmaes", "nsga2", "nsga3", "random", "grid"] = "auto"
    """`auto` is TPE, and NSGA-III with more than three goals. `gp` needs torch and scipy, `cmaes` the package of that
    name, one goal and two numbers that are searched in every trial; `grid` tries all combinations of options and steps.
    """
    seed: int = 0
    """Of all draws."""
    startup: int = 10
    """Trials that `tpe` and `gp` draw at random before they learn."""
    population: int = 24
    """Trials of a generation of `nsga2` and `nsga3`."""
    storage: str = ""
    """URL of a database, such as `sqlite:///trials.db` or `postgresql://user@host/name`: studies of one name on several
    machines learn from each other there. Empty takes a journal in the study's folder, which is faster."""

    def __post_init__(self) -> None:
        if self.seed < 0 or self.startup < 1 or self.population < 2:
            raise ValueError("seed must not be negative, startup at least 1 and population at least 2")

    def problems(self, space: Space, goals: Sequence[Goal]) -> Iterable[str]:
        """Combinations that Optuna refuses only when it draws, if at all."""
        return list(_problems(self.sampler, space, goals))

    def start(self, space: Space, goals: Sequence[Goal], directory: Path) -> Search:
        """Opens the journal or the database, which is made where there is none."""
        from posttrain_tuning.search.optuna_search import OptunaSearch

        return OptunaSearch(self, space, goals, directory)

    def chosen(self, goals: Sequence[Goal]) -> str:
        """The sampler, where `auto` is decided."""
        return self.sampler if self.sampler != "auto" else "tpe" if len(goals) <= MANY else "nsga3"


def _problems(sampler: str, space: Space, goals: Sequence[Goal]) -> Iterator[str]:
    if find_spec("optuna") is None:
        yield "searcher optuna needs the package optuna, which is not installed: pip install 'posttrain-tuning[optuna]'"
    missing = [name for name in NEEDS.get(sampler, ()) if find_spec(name) is None]
    if missing:
        yield f"sampler: {sampler} needs {' and '.join(missing)}: pip install {' '.join(missing)}; or use sampler: tpe"
    if sampler == "cmaes" and len(goals) > 1:
        yield f"sampler: cmaes has one objective, got {len(goals)}; use tpe, nsga2 or nsga3"
    numbers = [name for name, domain, always in space.parameters() if always and isinstance(domain, Range)]
    if sampler == "cmaes" and len(numbers) < 2:
        yield "sampler: cmaes needs two numbers at least that are searched in every trial; use sampler: tpe"
    if sampler == "grid":
        yield from (f"sampler: grid needs a step for {name}, or a choice of values"
                    for name, domain, _ in space.parameters() if not _countable(domain))


def _countable(domain: Range | Choice) -> bool:
    return isinstance(domain, Choice) or (domain.whole and not domain.log) or bool(domain.step)
