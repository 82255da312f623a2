"""The command line: `posttrain COMMAND`. Thin: says what was asked for, prints what came back.

Only here is typer known. What a command needs is imported inside it, so that help and listing import no framework.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.annotations import hints_of
from posttrain.errors import PluginError, PosttrainError, did_you_mean
from posttrain.hookspecs import KINDS
from posttrain.registry import Broken, Registry, discover

if TYPE_CHECKING:
    from posttrain.run import Output

RECIPE = "recipe"
"""Shown beside the kinds of component: `posttrain show recipe grpo`."""

File = Annotated[Path, typer.Argument(metavar="FILE", help="Configuration file (YAML).")]
Settings = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the file's.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line in place of text.")]


def plugins(context: typer.Context, kind: Annotated[str, typer.Argument(help="One kind only.")] = "",
            as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False) -> None:
    """List installed components, and plugins that are broken or of another version."""
    registry: Registry = context.obj
    if kind:
        _require_kind(kind)
    found = [(c, *registry.provider(c)) for c in registry.components(kind or None)]
    if as_json:
        print(json.dumps({
            "components": [{"kind": c.kind, "name": c.name, "summary": c.summary, "target": c.target,
                            "source": c.source, "distribution": d, "version": v} for c, d, v in found],
            "broken": [{"distribution": b.distribution, "error": b.error} for b in registry.broken],
            "foreign": [{"distribution": f.distribution, "group": f.group} for f in registry.foreign]}, indent=2))
        return
    rows: list[tuple[str, ...]] = [(c.kind, c.name, f"{d} {v}".strip(), c.summary) for c, d, v in found]
    if not kind or kind == RECIPE:
        from posttrain.recipes import RECIPES

        rows += [(RECIPE, name, "", recipe.summary) for name, recipe in RECIPES.items()]
    _table(rows)
    _warn(registry)
    if not registry.plugins:
        print("no plugin is installed: pip install posttrain-core posttrain-estimators ...", file=sys.stderr)


def show(context: typer.Context, kind: str, name: str) -> None:
    """Describe a component: its source, who provides it, and its fields; or what a recipe sets."""
    _require_kind(kind)
    if kind == RECIPE:
        _show_recipe(name)
        return
    registry: Registry = context.obj
    component = registry.resolve(kind, name)
    target = registry.load(component)
    print(f"{kind} {component.name}: {component.summary}\n")
    if text := inspect.getdoc(target):
        print(text, end="\n\n")
    for what, value in (("source", component.source), ("provided by", " ".join(registry.provider(component)).strip()),
                        ("class", component.target)):
        print(f"{what + ':':13}{value or 'not given'}")
    if isinstance(target, type) and is_dataclass(target):
        docs, hints = field_docs(target), hints_of(target)
        print(f"\nfields of {component.name}:" if fields(target) else "\nno fields")
        for f in fields(target):
            default = component.defaults.get(f.name, _default(f))
            print(f"  {f.name}: {inspect.formatannotation(hints.get(f.name, f.type))} = {default!r}")
            print(textwrap.indent(textwrap.fill(" ".join(docs.get(f.name, "").split()), 110), "      "))


def config(context: typer.Context, file: File, settings: Settings = None) -> None:
    """Print the whole configuration: defaults, recipe, extended files, file and settings together."""
    from posttrain.config import load, to_yaml

    print(to_yaml(load(file, settings or [], context.obj)), end="")


def check(context: typer.Context, file: File, settings: Settings = None) -> None:
    """Check a configuration and read its rows; print sizes and parts. Loads no model."""
    from posttrain import compose
    from posttrain.config import derived, load

    loaded = load(file, settings or [], context.obj)
    compose.check(loaded)
    print("sizes")
    _table([(f"  {what}", value) for what, value in derived(loaded.settings)])
    print("\nparts")
    _table([(f"  {key}", c.name, " ".join(loaded.registry.provider(c)).strip(), c.summary)
            for key, c in loaded.components.items()])
    print("\nfiles of your own (the first digits of their SHA-256)")
    _table([(f"  {path}", digest[:12]) for path, digest in loaded.files.items()])
    _, rows = compose.open_task(loaded.settings)
    held_out = rows.held_out()
    print("\nrows")
    _table([("  to learn from", f"{rows.rows:,}"), ("  held out", f"{len(held_out):,}"),
            *(("  first", f"{p.text if p.text is not None else p.messages!r} ({p.where})")
              for p in rows.take(0, 1, loaded.settings.seed))])


def init(directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder to write to.")] = Path(".")) -> None:
    """Write a small configuration, rewards and rows of your own to start from."""
    from posttrain import scaffold

    for path in scaffold.write(directory):
        print(f"wrote {path}")
    print(f"next: posttrain check {directory / 'train.yaml'}; posttrain train {directory / 'train.yaml'}")


def train(context: typer.Context, file: File, settings: Settings = None, as_json: Json = False) -> None:
    """Train as a configuration says."""
    from posttrain import run

    run.train(file, settings or [], registry=context.obj, output=_output(as_json))


def resume(context: typer.Context, directory: RunPath, settings: Settings = None, as_json: Json = False) -> None:
    """Go on with a run that was stopped, from its newest checkpoint."""
    from posttrain import run

    run.resume(directory, settings or [], registry=context.obj, output=_output(as_json))


def evaluate(directory: RunPath, settings: Settings = None, as_json: Json = False) -> None:
    """Rewards on the held-out rows with a run's newest checkpoint."""
    from posttrain import run

    metrics = run.evaluate(directory, settings or [])
    if as_json:
        print(json.dumps(metrics))
    else:
        _table([(name, f"{value:.6g}") for name, value in metrics.items()])


def sample(directory: RunPath, prompt: str,
           n: Annotated[int, typer.Option("-n", min=1, help="Answers.")] = 1,
           temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy.")] = None,
           as_json: Json = False) -> None:
    """Answer a prompt with a run's newest checkpoint."""
    from posttrain import run

    for text in run.sample(directory, prompt, n=n, temperature=temperature):
        print(json.dumps({"prompt": prompt, "completion": text}) if as_json else text)


def sync(context: typer.Context, directory: RunPath,
         arguments: Annotated[list[str] | None, typer.Argument(
             metavar="[TRACKER]... [FIELD=VALUE]...", help="Trackers, by default the run's; fields over theirs.")]
         = None) -> None:
    """Send to trackers what they lack of a run, without a point twice; also one that the run did not have."""
    from omegaconf import OmegaConf

    from posttrain.trackers.sync import NotDelivered
    from posttrain.trackers.sync import sync as deliver

    given = arguments or []
    fields = OmegaConf.from_dotlist([text for text in given if "=" in text])
    done = deliver(directory, [text for text in given if "=" not in text],
                   {str(name): fields[name] for name in fields}, context.obj)
    for each in done:
        print(f"{each.tracker}: {each.records} records sent to {each.place}")
    if failed := [f"{each.tracker} does not take records at {each.place}: {each.error}" for each in done if each.error]:
        raise NotDelivered("\n".join([*failed, f"what is missing is kept; try again: posttrain sync {directory}"]))


def report(runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
           output: Annotated[Path, typer.Option("-o", "--output", help="A .html page, or a .png or .svg picture.")]
           = Path("report.html")) -> None:
    """Write one page with the curves, samples, configuration and differences of runs, or a picture of the curves."""
    from posttrain.report import write

    write(runs, output)
    print(f"wrote {output}")


def export(directory: RunPath,
           output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR",
                                                       help="New folder; by default RUN/exports/step-<step>.")] = None,
           step: Annotated[int | None, typer.Option(min=0, help="A step with a checkpoint; by default the newest.")]
           = None) -> None:
    """Write a run's policy as a Hugging Face folder: weights, tokenizer, generation settings, model card."""
    from posttrain.export import export as write

    print(f"wrote {write(directory, output, step=step)}")


def doctor(context: typer.Context,
           as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False) -> None:
    """Say what is installed, what fits together and what the machine offers; ends with 1 where something is broken."""
    from dataclasses import asdict
    from itertools import groupby

    from posttrain.doctor import examine, is_broken

    findings = examine(context.obj)
    if as_json:
        print(json.dumps({"broken": is_broken(findings), "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        marks = {"ok": "", "note": "NOTE", "broken": "BROKEN"}
        for section, group in groupby(findings, key=lambda f: f.section):
            print(section)
            _table([(f"  {f.name}", "  ".join(part for part in (
                marks[f.status], f.value, f.remedy and f"-> {f.remedy}") if part)) for f in group])
    if is_broken(findings):
        raise typer.Exit(1)


COMMANDS: Mapping[str, Callable[..., None]] = {
    "plugins": plugins, "show": show, "init": init, "config": config, "check": check, "train": train, "resume": resume,
    "eval": evaluate, "sample": sample, "sync": sync, "report": report,
    "export": export, "doctor": doctor}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. An error meant for the user is printed without a traceback."""
    registry = discover()
    app = typer.Typer(name="posttrain", help="RL post-training of language models from exchangeable parts.",
                      rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True,
                      add_completion=False)
    for name, command in COMMANDS.items():
        app.command(name)(command)
    _report(registry.hooks.commands(app))
    try:
        typer.main.get_command(app).main(list(sys.argv[1:] if arguments is None else arguments), "posttrain",
                                         obj=registry)
    except PosttrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except SystemExit as end:  # typer's way to end: 0, 2 after wrong usage, 130 after Ctrl-C
        return int(end.code or 0)
    return 0


def field_docs(cls: type) -> dict[str, str]:
    """The string literal under each field of a class, read from its source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    return {line.target.id: doc.value.value for line, doc in pairwise(body)
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
            and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)}


def _output(as_json: bool) -> Output:
    return "json" if as_json else "auto"


def _default(f: Field[Any]) -> Any:
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else "(to be given)"


def _require_kind(kind: str) -> None:
    if kind not in (*KINDS, RECIPE):
        raise PluginError([f"'{kind}' is no kind of component{did_you_mean(kind, (*KINDS, RECIPE))}  "
                           f"kinds: {', '.join((*KINDS, RECIPE))}"])


def _show_recipe(name: str) -> None:
    from omegaconf import OmegaConf

    from posttrain.recipes import RECIPES

    if name not in RECIPES:
        raise PluginError([f"recipe '{name}' not found{did_you_mean(name, RECIPES)}  recipes: {', '.join(RECIPES)}"])
    recipe = RECIPES[name]
    print(f"recipe {name}: {recipe.summary}\nsource: {recipe.source}\n")
    print(OmegaConf.to_yaml(OmegaConf.create(dict(recipe.settings))), end="")


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    """Aligned columns; the last one is as long as it is."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _warn(registry: Registry) -> None:
    """Plugins that offer nothing, loudly."""
    _report(registry.broken)
    for foreign in registry.foreign:
        print(f"IGNORED plugin {foreign.distribution}: it is written for '{foreign.group}', another version of the "
              "plugin interface", file=sys.stderr)


def _report(broken: Iterable[Broken]) -> None:
    for plugin in broken:
        print(f"BROKEN plugin {plugin.distribution}: {plugin.error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
