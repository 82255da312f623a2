"""Write docs/components: an index, and a page for each component of the project's own packages.

A page says what `posttrain show KIND NAME` says, by the same `catalogue.card`, so it is mended where the component
is written. Run after a component or its docstrings were changed: python tools/component_pages.py
"""

from __future__ import annotations

import ast
import importlib
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from doctest import DocTestParser
from importlib import metadata
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import posttrain
import yaml
from posttrain.annotations import Key, dotted
from posttrain.catalogue import Card, card
from posttrain.doctor import PACKAGES
from posttrain.hookspecs import ENTRY_POINT_GROUP, KINDS, Component
from posttrain.known import Known
from posttrain.layers import at, slots
from posttrain.recipes import RECIPES
from posttrain.registry import Registry, discover

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "components"
GUIDE = ROOT / "docs" / "plugins"
ABOUT = {"estimator": "estimators.md", "correction": "estimators.md", "objective": "losses.md", "kl": "kl.md",
         "constraint": "constraints.md", "combiner": "trading_off.md", "gradient_combiner": "trading_off.md"}
"""Kind -> a page of docs/ that compares its components."""

FIELDS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("backend", "hf"): {"weights": "path/to/folder", "adapter": {"use": "lora", "rank": 16}},
    ("backend", "quantized"): {"weights": "path/to/folder"},
    ("objective", "ppo"): {"clip_low": 0.2, "clip_high": 0.2},
    ("objective", "dr_grpo"): {"length": "${rollout.max_new_tokens}"},
    ("reward", "regex"): {"pattern": r"#### (\d+)", "answer_key": "answer", "which": "last"},
    ("reward", "reward_model"): {"weights": "path/to/folder"},
    ("task", "hub"): {"name": "openai/gsm8k", "config": "main", "prompt_key": "question"},
    ("task", "reasoning_gym"): {"names": ["chain_sum", "gcd"], "size": 1000},
    ("task", "rows"): {"path": "data/train.jsonl", "held_out": "data/held_out.jsonl"},
    ("tokenizer", "characters"): {"alphabet": "0123456789+="},
    ("tokenizer", "hf"): {"weights": "path/to/folder"},
    ("tokenizer", "json"): {"path": "path/to/tokenizer.json", "eos": "</s>"},
    ("tracker", "jsonl"): {"path": "mirror.jsonl"},
    ("tracker", "tensorboard"): {"path": "logs"},
}
"""Fields in the example of a component that cannot be made of its defaults, or shows little with them."""

AROUND: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("backend", "onnx"): {"reference": {"use": "onnx", "weights": "path/to/folder"}, "kl": "adaptive"},
    ("objective", "action_value"): {
        "critic": "policy", "estimator": {"use": "retrace", "q": "q_head"}, "value_objective": "action_value"},
    **{("constraint", name): {"constraint": name, "rewards": {
        "correct": "exact_match", "length": {"use": "size", "unit": "tokens", "at_most": 40}}}
       for name in ("augmented_lagrangian", "crpo", "lagrangian", "log_lagrangian", "p3o", "pid_lagrangian")},
    ("kl", "constrained"): {"kl": {"use": "constrained", "at_most": 0.05}, "constraint": "pid_lagrangian"},
    ("objective", "entropy"): {"update": {"entropy_coef": 0.01}},
    ("objective", "value"): {"critic": "policy", "estimator": "gae", "value_objective": {"use": "value", "clip": 0.2}},
}
"""Examples of components that are not simply chosen by the key of their kind."""

OPENING = (
    "What a configuration can choose, by kind. `posttrain plugins` lists what is installed, other people's plugins "
    "too, and `posttrain show KIND NAME` says what a page here says. [Writing one of your own](../plugins/README.md) "
    "takes one file.",
    "A component is chosen by its name, `estimator: vtrace`, or with fields beside it, `estimator: {use: vtrace, lam: "
    "0.95}`; on the command line that is `estimator=vtrace estimator.lam=0.95`. A field that is left out has its "
    "default. Under `rewards` and `trackers` each has a name of your own: `rewards: {correct: exact_match}`.",
    f"`recipe: NAME` chooses several that fit together; it is one of {', '.join(f'`{name}`' for name in RECIPES)}.")
"""Paragraphs above the index."""

CRITIC: Mapping[str, Mapping[str, str]] = {
    "values": {"critic": "policy"}, "action_values": {"critic": "policy", "value_objective": "action_value"}}
"""What an estimator that needs a column asks for beside it."""


# --- Markdown ---------------------------------------------------------------------------------------------------------

_NAMES = frozenset(("alpha", "beta", "gamma", "delta", "lam", "lambda", "mu", "pi", "rho", "sigma", "vs", "std", "eps",
                    "KL", "exp", "log", "sqrt", "min", "max", "clip", "sum", "k1", "k2", "k3"))
"""Words that are letters or functions of the mathematics."""
_OPERATORS = frozenset(("=", "+", "-", "*", "/", "<", ">", "<=", ">=", "<-", "->", "||"))
_BEFORE = _OPERATORS | {"log", "exp"}
"""What the next word belongs to, whatever it is."""

EXAMPLE = "```python\n"
"""How an example begins."""


def code(text: str) -> str:
    """A code span, whatever the text holds."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{room}{text}{room}{fence}"


def inline(text: str) -> str:
    """A paragraph of a docstring as one line of Markdown: formulas become code, arXiv numbers links, and nothing else
    is read as markup but code spans.

    >>> inline("A_t = G_t - b, with *b* of arXiv 1506.02438")
    '`A_t = G_t - b`, with \\\\*b\\\\* of [arXiv 1506.02438](https://arxiv.org/abs/1506.02438)'
    """
    spans = re.split(r"(`+[^`]+`+)", " ".join(text.split()))
    return "".join(span if i % 2 else _formulas(span) for i, span in enumerate(spans))


def _formulas(text: str) -> str:
    """Prose without code spans, with its formulas as such."""
    words, start = re.split(r"(?<=\S) +(?=\S)", text), 0
    done: list[str] = []
    while start < len(words):
        end = _end(words, start)
        if end > start and _telling(words[start:end]):
            if words[start] in _OPERATORS and done and done[-1] == words[start - 1]:  # it belongs to the word before
                start, _ = start - 1, done.pop()
            done.append(_spanned(" ".join(words[start:end])))
            start = end
        else:
            done.append(_prose(words[start]))
            start += 1
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", " ".join(done))


def _end(words: list[str], start: int) -> int:
    """Index behind the last word of the formula that begins at `start`; `start` where none does."""
    end, open_brackets = start, 0
    while end < len(words):
        word = words[end]
        follows = end > start and words[end - 1] in _BEFORE
        if not (follows or open_brackets > 0 or _mathematical(word)):
            break
        open_brackets += sum(map(word.count, "([{")) - sum(map(word.count, ")]}"))
        end += 1
        if word[-1:] in ".;:" or (word.endswith(",") and open_brackets <= 0):
            break
    return end


def _mathematical(word: str) -> bool:
    """Whether a word can be a part of a formula: of letters, numbers, operators, or a name with an underscore."""
    bare = word.strip(" .,;:")
    names = re.findall(r"[A-Za-z]\w*", bare)
    known = bool({"^", "_"} & set(bare)) or all(n in _NAMES or (len(n) == 1 and n not in "aI") for n in names)
    calls = (match := re.match(r"[(\-]*([a-z]+)([(\[])", bare)) is not None and (match[1] in _NAMES or match[2] == "[")
    return bare in _OPERATORS or calls or (known and bool(re.fullmatch(r"[\w+\-*/^=<>|()\[\]{}.,$]+", bare)))


def _telling(words: list[str]) -> bool:
    """Whether these are a formula, not numbers or letters in prose."""
    text = " ".join(words)
    called = re.search(r"\b[A-Za-z]\w*[(\[]\S", text)
    operated = len(words) > 1 and bool(_OPERATORS & set(words)) and words != ["-", *words[1:]]
    return bool(re.search(r"[\w}]_|_\w|\w\^|[A-Za-z]/[A-Za-z]", text) or called or operated)


def _spanned(formula: str) -> str:
    """A formula as code, without the punctuation and the brackets of the sentence around it."""
    before, body, after = re.fullmatch(r"(\s*)(.*?)([\s.,;:]*)", formula).groups()  # type: ignore[union-attr]  # any text
    while body.endswith(")") and body.count(")") > body.count("("):
        body, after = body[:-1], f"){after}"
    while body.startswith("(") and body.count("(") > body.count(")"):
        before, body = f"{before}(", body[1:]
    if body.endswith(" ("):
        body, after = body[:-2], f" ({after}"
    return f"{before}{code(body)}{after}"


def _prose(word: str) -> str:
    """A word in which nothing is markup; an address is a link."""
    if re.match(r"https?://", word):
        return f"<{word}>"
    return re.sub(r"([*_<\\])", r"\\\1", word)


def blocks(doc: str) -> Iterator[str]:
    """The blocks of a docstring as Markdown: paragraphs, lists, examples."""
    for text in re.split(r"\n\s*\n", doc.strip()):
        if text.startswith((">>>", "    ")):
            yield f"{EXAMPLE}{textwrap.dedent(text)}\n```"
        elif text.startswith("- "):
            yield "\n".join(f"- {inline(item)}" for item in re.split(r"(?:^|\n)- ", text)[1:])
        else:
            yield inline(text)


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; cells are Markdown."""
    titles = list(titles)
    lines = [titles, ["---"] * len(titles), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in line) + " |" for line in lines)


# --- pages ------------------------------------------------------------------------------------------------------------

def pages() -> dict[Path, str]:
    """Every page as it must be for the packages that are installed here, by its place below `PAGES`."""
    registry = own()
    declared = sorted(registry.components(), key=lambda c: (KINDS.index(c.kind), c.name))
    cards = [card(registry, c) for c in declared]
    if problems := [found.problem for found in cards if found.problem and not found.missing]:
        raise SystemExit("\n".join(problems))
    return {Path("README.md"): index(registry, declared)} | {
        Path(c.kind, f"{c.name}.md"): page(registry, c, found) for c, found in zip(declared, cards)}


def own() -> Registry:
    """The project's own packages, and no other plugin."""
    points = [point for name in PACKAGES for point in metadata.distribution(name).entry_points
              if point.group == ENTRY_POINT_GROUP]
    registry = discover(environ={}, entry_points=points)
    if registry.broken:
        raise SystemExit(f"broken: {registry.broken}")
    return registry


def index(registry: Registry, declared: Iterable[Component]) -> str:
    """All components by kind, a line each."""
    parts = ["# Components", *OPENING]
    guide = _guide()
    for kind, of_kind in groupby(declared, key=lambda c: c.kind):
        found = list(of_kind)
        what, authors = guide[kind]
        keys = _listed(dotted(key) for key, _ in _keys(kind)) or "none, it is chosen by itself"
        more = f" Compared in [`{ABOUT[kind]}`](../{ABOUT[kind]})." if kind in ABOUT else ""
        packages = ", ".join(dict.fromkeys(registry.provider(c)[0] for c in found))
        parts += [f"## {kind}", f"{what[:1].upper()}{what[1:]}. Key: {keys}. In {packages}.{more} "
                                f"[For authors](../plugins/{authors})."]
        parts.append(table(("name", "what it is"), (
            (f"[{c.name}]({kind}/{c.name}.md)", inline(c.summary)) for c in found)))
    return "\n\n".join(parts) + "\n"


def _keys(kind: str) -> list[tuple[Key, Mapping[str, Any]]]:
    """The keys of a configuration that hold a component of a kind, and what the schema says of each."""
    return [(key, meta) for key, meta in slots() if meta["kind"] == kind]


def _guide() -> dict[str, tuple[str, str]]:
    """Kind -> what it is and the page for authors, as the map of the guide has them."""
    text = (GUIDE / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| (`.+?`) \| (.+?) \| \[.+?\]\((\w+\.md)\) \|$", text, re.MULTILINE)
    found: dict[str, tuple[str, str]] = {}
    for kinds, what, file in rows:
        names, texts = re.findall(r"`(\w+)`", kinds), what.split("; ")
        found |= {kind: (text, file) for kind, text in zip(
            names, texts if len(texts) == len(names) else [what] * len(names))}
    return found


def page(registry: Registry, component: Component, found: Card) -> str:
    """All that is said of one component."""
    parts = [f"# {found.name}", f"[{found.kind}](../README.md#{found.kind}): {inline(found.summary)}",
             *_preset(registry, component), *_described(component, found.doc)]
    if _keys(found.kind):
        parts += ["## In a configuration", f"```yaml\n{snippet(component, found)}```"]
    if found.fields:
        parts += ["## Fields", table(("field", "type", "default", "meaning"), (
            (code(f.name), _type(f.type), code(f.default) if f.default else "to be given", inline(f.doc))
            for f in found.fields))]
    return "\n\n".join((*parts, "## Facts", "\n".join(_facts(registry, component, found)))) + "\n"


def _preset(registry: Registry, component: Component) -> Iterator[str]:
    """What a second name of a component changes, and in which."""
    if component.defaults:
        of = [_linked(c) for c in _same(registry, component) if not c.defaults]
        yield f"A preset{f' of {of[0]}' if of else ''} with " + _listed(
            f"{name}: {yaml.safe_dump(value, default_flow_style=True).strip().removesuffix('...').strip()}"
            for name, value in component.defaults.items()) + "."


def _same(registry: Registry, component: Component) -> list[Component]:
    """Other names of the same class."""
    return [c for c in registry.components(component.kind) if c.target == component.target and c is not component]


def _linked(component: Component) -> str:
    return f"[{component.name}]({component.name}.md)"


def _described(component: Component, doc: str) -> list[str]:
    """A docstring, whose first example begins with the imports that it takes for granted."""
    found = list(blocks(doc))
    first = next((i for i, text in enumerate(found) if text.startswith(f"{EXAMPLE}>>>")), None)
    if first is not None:
        imports = "".join(f">>> {line}\n" for line in _imports(component, doc))
        found[first] = f"{EXAMPLE}{imports}{found[first].removeprefix(EXAMPLE)}"
    return found


def _imports(component: Component, doc: str) -> list[str]:
    """The imports that make the examples of a docstring run outside its module."""
    module = importlib.import_module(component.target.partition(":")[0])
    tree = ast.parse("".join(example.source for example in DocTestParser().get_examples(doc)))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    held = {name: vars(module)[name] for name in used & set(vars(module))}
    return sorted(f"import {value.__name__} as {name}" if isinstance(value, ModuleType) else
                  f"from {'posttrain' if name in posttrain.__all__ else value.__module__} import {name}"
                  for name, value in held.items())


def snippet(component: Component, found: Card) -> str:
    """Keys of a configuration that choose the component."""
    tree = AROUND.get((component.kind, component.name)) or _chosen(component, found)
    return "".join(yaml.safe_dump({key: value}, sort_keys=False, width=float("inf"),
                                  default_flow_style=None if isinstance(value, Mapping) else False)
                   for key, value in tree.items())


def _chosen(component: Component, found: Card) -> dict[str, Any]:
    """The component under the first key of its kind, below what it needs beside it."""
    key, meta = _keys(component.kind)[0]
    given = FIELDS.get((component.kind, component.name)) or ({} if component.defaults else _first(found))
    node: Any = {"use": component.name, **given} if given else component.name
    for part in reversed((*key, component.name) if meta.get("many") else key):  # a map has names of the user's
        node = {part: node}
    return {**_beside(found), **node}


def _beside(found: Card) -> dict[str, str]:
    """What a component's needs ask for in the rest of a configuration."""
    needs = found.aspects.get("needs", ())
    if found.kind == "objective" and "needs" in found.aspects and not {"advantages", "targets"} & set(needs):
        return {"loop": "supervised"}
    return {k: v for need in needs if found.kind == "estimator" for k, v in CRITIC.get(need, {}).items()}


def _first(found: Card) -> dict[str, Any]:
    """The first fields with their defaults, to show where fields are written."""
    plain = [f for f in found.fields if re.fullmatch(r"True|False|-?[\d.e-]+|'[\w ]+'", f.default)]
    return {f.name: ast.literal_eval(f.default) for f in plain[:2]}


def _type(text: str) -> str:
    """A type as code; choices one by one, so that a line may end between them."""
    chosen = re.fullmatch(r"Literal\[(.+)\]", text)
    return ", ".join(code(repr(value)) for value in ast.literal_eval(f"({chosen[1]},)")) if chosen else code(text)


def _facts(registry: Registry, component: Component, found: Card) -> Iterator[str]:
    """Where it comes from, what it is called and what it asks for, as a list."""
    for aspect, values in found.aspects.items():
        yield f"- {aspect}{', by default' if found.fields else ''}: {_listed(values) or 'nothing'}"
    if others := _same(registry, component):
        yield f"- the same class with other defaults: {', '.join(map(_linked, others))}"
    if recipes := [name for name, recipe in RECIPES.items() if _names(recipe.settings, component)]:
        yield f"- in recipes: {_listed(recipes)}"
    if component.source:
        yield f"- source: {inline(component.source)}"
    known = Known(component.kind, component.name, registry.provider(component)[0], component.extra)
    module, _, name = component.target.partition(":")
    file = next((ROOT / "packages").glob(f"*/src/{module.replace('.', '/')}.py"))
    yield f"- installed by {code(known.install)}"
    yield f"- code: [{code(f'{module}:{name}')}](../../../{file.relative_to(ROOT).as_posix()})"


def _listed(values: Iterable[str]) -> str:
    return ", ".join(map(code, values))


def _names(settings: Mapping[str, Any], component: Component) -> bool:
    """Whether a recipe chooses the component."""
    found = (at(dict(settings), key) for key, _ in _keys(component.kind))
    return any((node.get("use") if isinstance(node, dict) else node) == component.name for node in found)


def write() -> None:
    """Make the folder hold these pages and no others."""
    made = pages()
    for path in PAGES.rglob("*.md"):
        if path.relative_to(PAGES) not in made:
            path.unlink()
    for path, text in made.items():
        (PAGES / path).parent.mkdir(parents=True, exist_ok=True)
        (PAGES / path).write_text(text, "utf-8")
    print(f"wrote {len(made)} pages to {PAGES.relative_to(ROOT)}")


if __name__ == "__main__":
    write()
