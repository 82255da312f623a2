"""`posttrain tune FILE`: searches over settings, and writes a record, a page and the best configuration. Thin: the work
is in `search/`, which is imported when the command runs. Imported by the command line alone, since typer is known here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def tune(context: typer.Context,
         file: Annotated[Path, typer.Argument(metavar="FILE", help="Configuration (YAML) with a block tune:.")],
         settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...",
                                                              help="Settings over the file's.")] = None,
         quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; warnings and errors only.")] = False
         ) -> None:
    """Search over settings: each trial a run; goes on where it was stopped."""
    from posttrain.following import following
    from posttrain.rundir import replace_text

    from posttrain_tuning.search import page, running
    from posttrain_tuning.search.plan import read, require_runnable
    from posttrain_tuning.search.study import RECORD, Study
    from posttrain_tuning.search.winners import write

    plan = read(file, settings or [], context.obj)
    require_runnable(plan, context.obj)

    def tell(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr, flush=True)

    def shown(study: Study) -> None:
        replace_text(plan.directory / page.PAGE, page.page(study, plan.space, plan.name, live=True))
        write(plan, study, context.obj)

    with following(not quiet):
        study = running.run(plan, tell=tell, after=shown)
    replace_text(plan.directory / page.PAGE, page.page(study, plan.space, plan.name, live=False))
    written = write(plan, study, context.obj)
    best = study.best()
    print(f"{len(study.trials)} trials: " + ", ".join(
        f"{count} {status}" for status in ("complete", "pruned", "failed", "waiting")
        if (count := sum(t.status == status for t in study.trials))))
    for trial, path in zip(best, written):
        measured = ", ".join(f"{goal.name} {x:.6g}" for goal, x in zip(study.goals, trial.result))
        place = "best" if len(study.goals) == 1 else "on the front"
        print(f"{place}: {plan.run(trial.number).name}, {measured}; train it: posttrain train {path}")
    if not best:
        print("no trial came to its end within the constraints")
    print(f"wrote {', '.join([RECORD, page.PAGE, *(path.name for path in written)])} in {plan.directory}")
