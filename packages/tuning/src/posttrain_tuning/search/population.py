"""Population-based training by Ray Tune: members train side by side, the worst take over the weights of the best and
change their settings (Jaderberg et al. 2017, arXiv 1711.09846).

Ray places the members, also on a cluster, and keeps the population's state; each member is an ordinary run in the
study's folder, which goes on from the checkpoint that Ray gives it. Imports Ray.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from posttrain import checkpoint
from posttrain.errors import PosttrainError
from posttrain.registry import discover
from posttrain.rundir import CONFIG, read_metrics
from posttrain.search import Range, Space
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

from posttrain_tuning.search import jobs, study
from posttrain_tuning.search.plan import Plan, read
from posttrain_tuning.search.study import Record, Study

STATE = "ray"
"""Folder of Ray's own state in that of the study."""
STEP = "step"
QUIET = {"RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_AIR_NEW_OUTPUT": "0", "RAY_USAGE_STATS_ENABLED": "0"}
"""What the user has not set is set: members stay in the folder of the command, Ray prints no tables of its own and
sends nothing home."""
SAVED = "checkpoint"
"""Folder in what Ray keeps of a member: the run's checkpoint."""

Tell = Callable[[str], None]


def run(plan: Plan, tell: Tell) -> Study:
    """Train the population of a plan, or go on with it. The folder is held by the caller. Raises `PosttrainError` where
    no member comes to the end."""
    study.require_same(plan.directory, plan.goals, plan.fingerprint())
    record = Record(plan.directory, plan.goals)
    try:
        if not record.study.trials:
            _write(plan, record, _trained(plan, tell))
    finally:
        record.close()
    return record.study


def _trained(plan: Plan, tell: Tell) -> Sequence[Any]:
    """What Ray says of every member at its end."""
    settings, state = plan.settings, plan.directory.resolve() / STATE
    population = settings.population
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    ray.init(address=population.cluster or None, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
             configure_logging=True, **({} if population.cluster else {"num_cpus": settings.workers}))
    try:
        goal = plan.goals[0]
        domains = {name: _ray_domain(domain) for name, domain in plan.space.domains.items()}
        trainable = _member(str(plan.file.resolve()), list(plan.overrides), str(plan.directory.resolve()))
        if tune.Tuner.can_restore(state / plan.name):
            tuner = tune.Tuner.restore(str(state / plan.name), trainable, resume_unfinished=True, restart_errored=True,
                                       param_space=domains)
        else:
            scheduler = PopulationBasedTraining(
                time_attr=STEP, perturbation_interval=population.every,
                hyperparam_mutations=_changes(plan.space, domains), quantile_fraction=population.quantile,
                resample_probability=population.resample, synch=True, custom_explore_fn=_Within(plan.space))
            tuner = tune.Tuner(
                trainable, param_space=domains,
                tune_config=tune.TuneConfig(metric=goal.name, mode="max" if goal.maximize else "min",
                                            scheduler=scheduler, num_samples=settings.trials),
                run_config=tune.RunConfig(name=plan.name, storage_path=str(state), verbose=0,
                                          failure_config=tune.FailureConfig(max_failures=settings.retries),
                                          callbacks=[_Progress(tell, goal.name)]))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Consider boosting PBT performance")
            found = tuner.fit()
        return [found[i] for i in range(len(found))]
    finally:
        ray.shutdown()


def _write(plan: Plan, record: Record, members: Sequence[Any]) -> None:
    """A trial for each member, with the settings that it ended with."""
    for number, member in enumerate(sorted(members, key=lambda m: _number(m.path))):
        values = {name: value for name, value in (member.config or {}).items() if name in plan.space.domains}
        record.append(number, values=values)
        metrics = member.metrics or {}
        if member.error is not None or plan.goals[0].name not in metrics:
            record.append(number, status="failed", reason=str(member.error).splitlines()[-1][:300])
        else:
            record.append(number, status="complete", result=[metrics[plan.goals[0].name]], step=metrics[STEP])
    if all(trial.status == "failed" for trial in record.study.trials):
        raise PosttrainError(f"no member of the population came to its end: {record.study.trials[0].reason}\n"
                             f"what they said is in {plan.directory / jobs.LOGS}")


def _member(file: str, overrides: list[str], directory: str) -> Callable[[Mapping[str, Any]], None]:
    """What Ray calls in a process of its own: trains a run from one report to the next."""
    folder = os.getcwd()

    def member(config: Mapping[str, Any]) -> None:
        os.chdir(folder)
        plan = read(Path(file), [*overrides, f"tune.study={json.dumps(directory)}"], discover())
        number = int(str(tune.get_context().get_trial_id()).rpartition("_")[2])
        values, path = {name: config[name] for name in plan.space.domains}, plan.run(number)
        if (given := tune.get_checkpoint()) is not None:
            with given.as_directory() as kept:
                _take_over(Path(kept) / SAVED, path)
        step = _newest(path)
        last = plan.loaded.settings.steps
        while step < last:
            step = min(step + plan.settings.population.every, last)
            _train(plan, number, values, step)
            value = plan.settings.objectives[0].value(read_metrics(path))
            if value is None:
                raise PosttrainError(f"no finite {plan.goals[0].name} was measured")
            with tempfile.TemporaryDirectory() as kept:
                newest = checkpoint.published(path / checkpoint.FOLDER)[-1][1]
                shutil.copytree(newest, Path(kept) / SAVED / newest.name)
                tune.report({plan.goals[0].name: value, STEP: step}, checkpoint=tune.Checkpoint.from_directory(kept))

    return member


def _train(plan: Plan, number: int, values: Mapping[str, Any], step: int) -> None:
    """Up to a step, in a process of its own, with the settings of now. Raises `PosttrainError` where it fails."""
    path, settings = plan.run(number), [*plan.of_trial(values), f"stop.after={step}"]
    if (path / CONFIG).is_file():
        command = ["resume", str(path), *settings]
    else:
        command = ["train", str(plan.file), *plan.of_run(number, values), f"stop.after={step}"]
    (plan.directory / jobs.LOGS).mkdir(parents=True, exist_ok=True)
    with (plan.directory / jobs.LOGS / f"{path.name}.txt").open("ab") as log:
        code = subprocess.run([sys.executable, "-m", "posttrain.cli", *command, "--quiet"], stdin=subprocess.DEVNULL,
                              stdout=log, stderr=log, env=jobs.environment(plan, 0)).returncode
    if code:
        raise PosttrainError(f"the run of {path.name} ended with exit code {code}")


def _take_over(kept: Path, path: Path) -> None:
    """Put the checkpoint that Ray gives into the run, in place of its own from that step on."""
    given = next(kept.glob("step-*"))
    own = path / checkpoint.FOLDER
    for _, later in [(s, p) for s, p in checkpoint.published(own) if p.name >= given.name]:
        shutil.rmtree(later)
    own.mkdir(parents=True, exist_ok=True)
    shutil.copytree(given, own / given.name)


def _newest(path: Path) -> int:
    saved = checkpoint.published(path / checkpoint.FOLDER)
    return saved[-1][0] if saved else 0


def _number(path: str) -> int:
    """Of a member: behind the last `_` of its trial's id, which is in the name of Ray's folder."""
    return int(Path(path).name.split("_")[2])


def _ray_domain(domain: Any) -> Any:
    """What Ray draws from."""
    if not isinstance(domain, Range):
        return tune.choice([option.label for option in domain.options])
    if domain.whole:
        draw = tune.lograndint if domain.log else tune.randint
        return draw(int(domain.low), int(domain.high) + 1)
    return (tune.loguniform if domain.log else tune.uniform)(domain.low, domain.high)


def _changes(space: Space, domains: Mapping[str, Any]) -> dict[str, Any]:
    """How Ray changes a setting: options are a list, in which it moves to a neighbour."""
    return {name: domains[name] if isinstance(domain, Range) else [option.label for option in domain.options]
            for name, domain in space.domains.items()}


class _Within:
    """Keeps what a member changes inside the space: Ray multiplies numbers by 0.8 or 1.2."""

    def __init__(self, space: Space) -> None:
        self.ranges = {name: d for name, d in space.domains.items() if isinstance(d, Range)}

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        for name, domain in self.ranges.items():
            value = min(domain.high, max(domain.low, config[name]))
            config[name] = int(value) if domain.whole else value
        return config


class _Progress(tune.Callback):  # type: ignore[misc]  # Ray is untyped here
    """A line for each report."""

    def __init__(self, tell: Tell, metric: str) -> None:
        self.tell, self.metric = tell, metric

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
                        ) -> None:
        self.tell(f"member {trial.trial_id.rpartition('_')[2]}: {self.metric} {result[self.metric]:.4g} at step "
                  f"{result[STEP]}")
