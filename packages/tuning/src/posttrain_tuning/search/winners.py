"""The best configurations of a study as files that are ready to train."""

from __future__ import annotations

from pathlib import Path

from posttrain import config
from posttrain.registry import Registry
from posttrain.rundir import replace_text

from posttrain_tuning.search.plan import Plan
from posttrain_tuning.search.study import Study, Trial

BEST = "best.yaml"


def write(plan: Plan, study: Study, registry: Registry) -> list[Path]:
    """`best.yaml`, or `front-<trial>.yaml` for each trial of a front; returns the paths. What is no longer the best
    vanishes."""
    wanted = {_name(study, trial): trial for trial in study.best()}
    for path in (*plan.directory.glob("front-*.yaml"), *plan.directory.glob(BEST)):
        if path.name not in wanted:
            path.unlink()
    written = []
    for name, trial in wanted.items():
        path = plan.directory / name
        loaded = config.load(plan.file, [*plan.of_trial(trial.values), "run=''"], registry)
        measured = ", ".join(f"{goal.name} {x:.6g}" for goal, x in zip(study.goals, trial.result))
        text = f"# {plan.run(trial.number).name} of {plan.name}: {measured}.\n{config.to_yaml(loaded)}"
        if not path.is_file() or path.read_text("utf-8") != text:
            replace_text(path, text)
        written.append(path)
    return written


def _name(study: Study, trial: Trial) -> str:
    return BEST if len(study.goals) == 1 else f"front-{trial.number:04d}.yaml"
