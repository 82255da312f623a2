"""The command line: `posttrain COMMAND`. Thin: says what was asked for, prints what came back.

Only here is typer known. What a command needs is imported inside it, so that help and listing import no framework.
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.errors import PluginError, PosttrainError, did_you_mean
from posttrain.hookspecs import KINDS
from posttrain.registry import Broken, Registry, discover

if TYPE_CHECKING:
    from posttrain.catalogue import Card
    from posttrain.run import Output

RECIPE = "recipe"
"""Shown beside the kinds of component: `posttrain show recipe grpo`."""

File = Annotated[Path, typer.Argument(metavar="FILE", help="Configuration file (YAML).")]
Settings = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the file's.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line in place of text.")]
Named = Annotated[list[str] | None, typer.Option("--plugin", metavar="FILE_OR_MODULE", help="A plugin that is not "
                                                 "installed, as under plugins: of a configuration; may be repeated.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; warnings and errors only.")]


def plugins(context: typer.Context, kind: Annotated[str, typer.Argument(help="One kind only.")] = "",
            named: Named = None,
            as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
            verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Target, source and defaults of each; the "
                                                  "time that each plugin took.")] = False) -> None:
    """List installed components, and plugins that are broken or of another version.

    What `--json` prints is described at `posttrain.catalogue.listing`.
    """
    from posttrain.catalogue import entries, listing

    if kind:
        _require_kind(kind)
    registry = _with_named(context.obj, named)
    if as_json:
        print(json.dumps(listing(registry, kind), indent=2, default=repr))
        return
    rows: list[tuple[str, ...]] = []
    for e in entries(registry, kind):
        rows.append((e.kind, e.use, e.provider, e.summary))
        if verbose:
            defaults = ", ".join(f"{name}={value!r}" for name, value in e.defaults.items())
            rows += [("", "", "", f"{what}: {text}") for what, text in (
                ("target", e.target), ("source", e.source), ("defaults", defaults)) if text]
    if not kind or kind == RECIPE:
        from posttrain.recipes import RECIPES

        rows += [(RECIPE, name, "", recipe.summary) for name, recipe in RECIPES.items()]
    _listed(("kind", "name", "provider", "summary"), rows)
    if verbose:
        print("\nplugins")
        _table([(f"  {p.distribution}", p.version, f"{len(p.components)} components", f"{1e3 * p.seconds:.1f} ms")
                for p in registry.plugins])
    _warn(registry)
    if kind and not rows:
        from posttrain.known import offers

        print(f"no {kind} is installed", *offers(registry, kind), sep="\n  ", file=sys.stderr)
    if not registry.plugins:
        print("no plugin is installed: pip install posttrain-core posttrain-estimators ...", file=sys.stderr)


def show(context: typer.Context, kind: str, name: str, named: Named = None,
         as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False) -> None:
    """Describe a component: its source, who provides it, and its fields; or what a recipe sets."""
    _require_kind(kind)
    if kind == RECIPE:
        _show_recipe(name)
        return
    from dataclasses import asdict

    from posttrain.catalogue import card

    registry = _with_named(context.obj, named)
    found = card(registry, registry.resolve(kind, name))
    if as_json:
        print(json.dumps(asdict(found), indent=2, default=repr))
    else:
        _show_card(found)
    if found.problem and not found.install:
        raise PluginError([found.problem])
    if found.install:
        print(f"not installed: {', '.join(found.missing)}; to use it: {found.install}", file=sys.stderr)


def config(context: typer.Context, file: File, settings: Settings = None) -> None:
    """Print the whole configuration: defaults, recipe, extended files, file and settings together."""
    from posttrain.config import load, to_yaml

    print(to_yaml(load(file, settings or [], context.obj)), end="")


def check(context: typer.Context, file: File, settings: Settings = None, quiet: Quiet = False) -> None:
    """Check a configuration and read its rows; print sizes and parts. Loads no model."""
    from posttrain import compose, fitting
    from posttrain.config import derived, load
    from posttrain.following import following

    loaded = load(file, settings or [], context.obj)
    fitting.check(loaded)
    print("sizes")
    _table([(f"  {what}", value) for what, value in derived(loaded.settings)])
    print("\nparts")
    _table([(f"  {key}", c.name, " ".join(loaded.registry.provider(c)).strip(), c.summary)
            for key, c in loaded.components.items()])
    print("\nfiles of your own and of plugins: (the first digits of their SHA-256)")
    _table([(f"  {path}", digest[:12]) for path, digest in loaded.files.items()])
    with following(not quiet):
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


def new(context: typer.Context,
        kind: Annotated[str, typer.Argument(help="estimator, objective, kl, reward, task, tracker or backend.")],
        name: Annotated[str, typer.Argument(help="Name of the component: small letters, digits and '_'.")],
        directory: Annotated[Path, typer.Option("-d", "--directory", metavar="DIR", help="Where its folder is made.")]
        = Path(".")) -> None:
    """Write a package of your own with one component, its tests and a run to try it: to be changed and published."""
    from posttrain import authoring

    written = authoring.new(kind, name, directory, context.obj)
    for path in written:
        print(f"wrote {path}")
    root = directory / authoring.Names(name).distribution
    print(f"next: cd {root}; pip install --editable . 'posttrain-core[testing]'; pytest; posttrain train train.yaml")


def train(context: typer.Context, file: File, settings: Settings = None, as_json: Json = False, quiet: Quiet = False
          ) -> None:
    """Train as a configuration says."""
    from posttrain import run
    from posttrain.following import following

    output = _output(as_json, quiet)
    with following(output == "auto"):
        run.train(file, settings or [], registry=context.obj, output=output)


def resume(context: typer.Context, directory: RunPath, settings: Settings = None, as_json: Json = False,
           quiet: Quiet = False) -> None:
    """Go on with a run that was stopped, from its newest checkpoint."""
    from posttrain import run
    from posttrain.following import following

    output = _output(as_json, quiet)
    with following(output == "auto"):
        run.resume(directory, settings or [], registry=context.obj, output=output)


def evaluate(directory: RunPath, settings: Settings = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Rewards on the held-out rows with a run's newest checkpoint."""
    from posttrain import run
    from posttrain.following import following

    with following(not as_json and not quiet):
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
           = None,
           form: Annotated[str, typer.Option("--format", metavar="NAME",
                                             help="Another format, which the policy's backend writes: onnx.")]
           = "huggingface") -> None:
    """Write a run's policy as a Hugging Face folder: weights, tokenizer, generation settings, model card."""
    from posttrain.export import export as write

    print(f"wrote {write(directory, output, step=step, form=form, say=print)}")


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
    "plugins": plugins, "show": show, "init": init, "new": new, "config": config, "check": check, "train": train,
    "resume": resume,
    "eval": evaluate, "sample": sample, "sync": sync, "report": report,
    "export": export, "doctor": doctor}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. An error meant for the user is printed without a traceback."""
    try:
        registry = discover()
    except KeyboardInterrupt as stop:
        print(*getattr(stop, "__notes__", ["interrupted"]), sep="\n", file=sys.stderr)
        return 130
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


def _output(as_json: bool, quiet: bool) -> Output:
    return "json" if as_json else "quiet" if quiet else "auto"


def _with_named(registry: Registry, names: Sequence[str] | None) -> Registry:
    """The registry with what `--plugin` names. Raises `PluginError` with all that cannot be had."""
    if not names:
        return registry
    from posttrain.named import extended

    found = extended(registry, names, Path.cwd())
    if found.problems:
        raise PluginError([f"--plugin {problem}" for problem in found.problems])
    return found.registry


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


def _show_card(found: Card) -> None:
    print(f"{found.kind} {found.name}: {found.summary}\n")
    if found.doc:
        print(found.doc, end="\n\n")
    for what, value in (("source", found.source), ("provided by", f"{found.distribution} {found.version}".strip()),
                        ("class", found.target), ("file", found.file)):
        print(f"{what + ':':13}{value or 'not given'}")
    for aspect, values in found.aspects.items():
        print(f"{aspect + ':':13}{', '.join(values) or 'nothing'}")
    print(f"\nfields of {found.name}:" if found.fields else "\nno fields")
    for f in found.fields:
        print(f"  {f.name}: {f.type} = {f.default or '(to be given)'}")
        print(textwrap.indent(textwrap.fill(f.doc, 110), "      "))


def _listed(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Rows under titles, the last column folded to the terminal; elsewhere a plain line a row, for other programs to
    read. Not by rich: importing it takes a third of the time that all of the listing has."""
    if not sys.stdout.isatty():
        return _table(rows)
    lines = [titles, *rows]
    taken = sum(max(map(len, column)) + 2 for column in zip(*(line[:-1] for line in lines)))
    folded: list[tuple[str, ...]] = []
    for *row, last in lines:
        first, *more = textwrap.wrap(last, max(16, shutil.get_terminal_size().columns - taken)) or [""]
        folded += [(*row, first), *((*("" for _ in row), line) for line in more)]
    _table(folded)


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    """Aligned columns; the last one is as long as it is."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _warn(registry: Registry) -> None:
    """Plugins that offer nothing, loudly."""
    from posttrain.catalogue import remedy

    _report(registry.broken)
    for foreign in registry.foreign:
        why = foreign.misnamed and "no such group of entry points is read"
        why = why or f"it is written for '{foreign.group}', another version of the plugin interface"
        print(f"IGNORED plugin {foreign.distribution}: {why}\n  -> {remedy(foreign)}", file=sys.stderr)
    for left in registry.left_out:
        print(f"left out by {left.by}: {left.distribution}", file=sys.stderr)


def _report(broken: Iterable[Broken]) -> None:
    for plugin in broken:
        print(f"BROKEN plugin {plugin.distribution}: {plugin.error}", file=sys.stderr)
        if plugin.remedy:
            print(f"  -> {plugin.remedy}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
