"""`posttrain pareto FILE`: covers a front, and writes its record, page and picture. Thin: the work is in `pareto/`
(`plan`, `covering`, `page`), which is imported when the command runs. Imported by the command line alone, since typer
is known here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from posttrain.errors import PluginError


def pareto(context: typer.Context,
           file: Annotated[Path, typer.Argument(metavar="FILE", help="Front (YAML): base, objectives, method, ...")],
           settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...",
                                                                help="Settings over the file's.")] = None,
           quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; warnings and errors only.")] = False
           ) -> None:
    """Cover a Pareto front: one run or soup for each trade-off between rewards; goes on where it was stopped."""
    from posttrain.following import following
    from posttrain.rundir import replace_text

    from posttrain_objectives.pareto import page
    from posttrain_objectives.pareto.covering import RECORD, Front, cover
    from posttrain_objectives.pareto.plan import read

    plan = read(file, settings or [], context.obj)

    def tell(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr, flush=True)

    def shown(front: Front) -> None:
        replace_text(plan.directory / page.PAGE, page.page(front, plan.name))

    with following(not quiet):
        front = cover(plan, registry=context.obj, output="quiet" if quiet else "auto", tell=tell, after=shown)
    shown(front)
    written = [RECORD, page.PAGE]
    try:
        page.draw(front, plan.name, plan.directory / page.PICTURE)
        written.append(page.PICTURE)
    except PluginError as error:
        tell(str(error))
    archive = front.archive()
    knee = archive.knee()
    print(f"{len(archive)} of {len(front.points)} points are on the front, hypervolume {archive.hypervolume():.6g}")
    print(f"recommended: {knee.tag}, weights in {plan.directory / knee.checkpoint}")
    print(f"wrote {', '.join(written)} in {plan.directory}")
