"""`posttrain memory plan FILE` and `posttrain memory profile FILE`. Thin: the work is in `predict.py` and `plan.py`,
and in core's `profiling.py`. Imported by the command line alone, since typer is known here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

File = Annotated[Path, typer.Argument(metavar="FILE", help="Configuration file (YAML).")]
Settings = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the file's.")]
app = typer.Typer(help="Predict what a run takes of memory, make it fit, or measure it.", no_args_is_help=True,
                  rich_markup_mode=None)


@app.command()
def plan(context: typer.Context, file: File, settings: Settings = None,
         limit: Annotated[str, typer.Option(metavar="SIZE", help="What the process may take, as 24GiB; by default what "
                                            "the machine has free.")] = "",
         output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Where the settings that "
                                                     "make it fit are written; by default FILE's name with .memory.")]
         = None,
         as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False) -> None:
    """Predict the peak of each phase without loading the model, and choose the fastest settings that fit."""
    import psutil
    from posttrain.compose import open_task
    from posttrain.config import load
    from posttrain.fitting import check

    from posttrain_tuning.memory import plan as planning
    from posttrain_tuning.memory.predict import Prediction, predict, process_bytes

    given = settings or []
    loaded = load(file, given, context.obj)
    check(loaded)
    most = planning.size_of(limit) if limit else psutil.virtual_memory().available
    opened = open_task(loaded.settings)

    def predicted(changes: tuple[str, ...]) -> Prediction:
        return predict(load(file, [*given, *changes], context.obj) if changes else loaded, opened)
    process = process_bytes(loaded)
    base = predicted(())
    found = planning.plan(loaded, most - process, lambda changes: predicted(tuple(changes)) if changes else base)
    if as_json:
        print(json.dumps({"limit": most, "process": process, "phases": base.phases, "fits": found.fits,
                          "binding": found.prediction.binding, "settings": found.change.settings,
                          "phases_then": found.prediction.phases, "slowdown": found.slowdown}))
        return
    _tell(base.phases, found.prediction.phases if found.change.settings else {}, process)
    print(f"limit {_mib(most)}; {found.prediction.binding} binds, {_mib(process + found.prediction.peak)} in all")
    if found.change.settings:
        print(f"{'fits' if found.fits else 'does not fit; least'} with {' '.join(found.change.settings)}  "
              f"(an update takes {found.slowdown:.2f} times as long by prediction)")
        path = output or file.with_name(f"{file.stem}.memory.yaml")
        path.write_text(planning.overrides(file, path, [*given, *found.change.settings]), encoding="utf-8")
        print(f"wrote {path}; run it: posttrain train {path}")
    else:
        print("fits as it is" if found.fits else "does not fit, and there is nothing here to change")
    for name, why in planning.UNAVAILABLE.items() if not found.fits else ():
        print(f"not tried: {name} ({why})")
    if not found.fits:
        raise typer.Exit(1)


@app.command()
def profile(context: typer.Context, file: File, settings: Settings = None,
            steps: Annotated[int, typer.Option(min=1, help="Steps that are made.")] = 3) -> None:
    """Run a few steps and say the peak of each phase, in the run's report beside what was predicted."""
    from posttrain import run
    from posttrain.config import load
    from posttrain.profiling import FILE
    from posttrain.report.page import write_page
    from posttrain.rundir import REPORT

    given = [*(settings or []), "memory.profile=true", f"steps={steps}"]
    load(file, given, context.obj)  # what is wrong with it is told first
    predicted = _predicted_elsewhere(file, given)
    done = run.train(file, given, registry=context.obj, output="quiet")
    record = json.loads((done.directory / FILE).read_text("utf-8"))
    measured = record["measured"]
    if predicted:
        record["predicted"] = {"phases": predicted}
        (done.directory / FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        write_page([done.directory], done.directory / REPORT)
    mark = "allocated" if any("allocated" in marks for marks in measured["phases"].values()) else "host"
    base = 0 if mark == "allocated" else measured["base"]
    print("measured, -> predicted" if predicted else "measured")
    _tell({phase: marks[mark] - base for phase, marks in measured["phases"].items() if mark in marks}, predicted, base)
    for name, size in measured["categories"].items():
        print(f"  {name:12} {_mib(size):>14}")
    print(f"wrote {done.directory / FILE} and {REPORT}")


def _predicted_elsewhere(file: Path, settings: Sequence[str]) -> Mapping[str, int]:
    """Bytes by phase, by another process: what a prediction imports would be measured. Nothing where it is refused; why
    stands on standard error."""
    asked = ["memory", "plan", str(file), *settings, "--limit", "1000TiB", "--json"]
    done = subprocess.run([sys.executable, "-m", "posttrain.cli", *asked], stdout=subprocess.PIPE, text=True)
    found: Mapping[str, int] = json.loads(done.stdout)["phases"] if done.returncode == 0 else {}
    return found


def _tell(phases: Mapping[str, int], then: Mapping[str, int], process: int) -> None:
    """A row a phase; with `then` also what the phase takes after the change."""
    print(f"  {'process':12} {_mib(process):>14}")
    for phase, peak in phases.items():
        print(f"  {phase:12} {_mib(peak):>14}" + (f"  -> {_mib(then[phase]):>14}" if phase in then else ""))


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
