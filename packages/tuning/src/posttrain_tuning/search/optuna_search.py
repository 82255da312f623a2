"""A study of Optuna behind `posttrain.protocols.Search`. Optuna's trials carry the number and the folder of ours.

Imports Optuna. Its heartbeat does not cover ask and tell: whether a trial lives is known to the study's own leases.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from posttrain.errors import ConfigError
from posttrain.search import Choice, Domain, Goal, Result, Space, Values

if TYPE_CHECKING:
    import optuna

    from posttrain_tuning.optuna import Optuna

JOURNAL = "optuna.log"
"""File in the study's folder, where no other storage is named."""
TRIAL = "posttrain.trial"
"""Attribute of Optuna's trials: folder and number of ours."""


@final
class OptunaSearch:
    """A `Search`: asks a sampler that is made anew for each trial, so that a proposal follows from what was told."""

    def __init__(self, searcher: Optuna, space: Space, goals: Sequence[Goal], directory: Path) -> None:
        import optuna

        self._searcher, self._space, self._goals = searcher, space, goals
        self._place = str(directory.resolve())
        self._sampler = searcher.chosen(goals)
        self._grid = list(space.grid()) if self._sampler == "grid" else []
        directions = ["maximize" if goal.maximize else "minimize" for goal in goals]
        try:
            with _quiet():
                storage = searcher.storage or _journal(directory)
                self._study = optuna.create_study(storage=storage, study_name=directory.resolve().name,
                                                  directions=directions, load_if_exists=True)  # type: ignore[arg-type]  # literals, joined
        except Exception as error:  # of whatever database it is
            raise ConfigError([f"storage: {type(error).__name__}: {str(error).splitlines()[0]}"]) from error
        if [d.name.lower() for d in self._study.directions] != directions:
            raise ConfigError([f"the storage holds a study {self._study.study_name} of other objectives; choose "
                               "another name: tune.study=DIR"])

    def ask(self, trial: int) -> Values | None:
        """See `posttrain.protocols.Search`."""
        import optuna

        if self._grid and trial >= len(self._grid):
            return None
        with _quiet():
            known = self._known().get(trial)
            if known is not None and known.state.is_finished():
                return dict(known.params)
            self._study.sampler = self._made(trial)
            if known is None:
                if self._grid:
                    self._study.enqueue_trial(self._grid[trial])
                asked = self._study.ask()
                asked.set_user_attr(TRIAL, [self._place, trial])
            else:
                asked = optuna.trial.Trial(self._study, known._trial_id)
            return self._space.draw(lambda name, domain: _suggested(asked, name, domain))

    def tell(self, trial: int, result: Result) -> None:
        """See `posttrain.protocols.Search`."""
        import optuna

        with _quiet():
            known = self._known()[trial]
            if known.state.is_finished():
                return
            asked = optuna.trial.Trial(self._study, known._trial_id)
            for name, violation in result.violations.items():
                asked.set_constraint(name, violation)
            states = optuna.trial.TrialState
            if result.status == "complete":
                self._study.tell(asked, list(result.values))
                return
            if result.status == "pruned" and result.values and len(self._goals) == 1:
                asked.report(result.values[0], result.step)
            self._study.tell(asked, state=states.PRUNED if result.status == "pruned" else states.FAIL)

    def _known(self) -> dict[int, Any]:
        """Number of ours -> Optuna's trial."""
        trials = self._study.get_trials(deepcopy=False)
        ours = ((t.user_attrs.get(TRIAL), t) for t in trials)
        return {mark[1]: trial for mark, trial in ours if mark and mark[0] == self._place}

    def _made(self, trial: int) -> optuna.samplers.BaseSampler:
        """The sampler with a seed of its own for each trial."""
        from optuna import samplers

        searcher = self._searcher
        seed = int.from_bytes(hashlib.sha256(f"{searcher.seed} {trial}".encode()).digest()[:4], "big")
        makers: Mapping[str, Callable[[], optuna.samplers.BaseSampler]] = {
            "tpe": lambda: samplers.TPESampler(seed=seed, n_startup_trials=searcher.startup),
            "gp": lambda: samplers.GPSampler(seed=seed, n_startup_trials=searcher.startup),
            "cmaes": lambda: samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
            "nsga2": lambda: samplers.NSGAIISampler(seed=seed, population_size=searcher.population),
            "nsga3": lambda: samplers.NSGAIIISampler(seed=seed, population_size=searcher.population),
            "random": lambda: samplers.RandomSampler(seed=seed),
            "grid": lambda: samplers.RandomSampler(seed=seed)}  # the grid's points are put before it
        return makers[self._sampler]()


def _journal(directory: Path) -> optuna.storages.BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(directory.resolve() / JOURNAL)))


def _suggested(trial: optuna.Trial, name: str, domain: Domain) -> Any:
    if isinstance(domain, Choice):
        return trial.suggest_categorical(name, [option.label for option in domain.options])
    if domain.whole:
        step = int(domain.step) or 1
        return trial.suggest_int(name, int(domain.low), int(domain.high), log=domain.log, step=step)
    high = domain.low + math.floor((domain.high - domain.low) / domain.step + 1e-9) * domain.step if domain.step else (
        domain.high)
    return trial.suggest_float(name, domain.low, high, log=domain.log, step=domain.step or None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna's own lines, and its warnings of what may change, are for authors of studies in Python."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
