"""The pages of `docs/components/`: as the components describe themselves, rendered as meant, with examples that run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, make_dataclass
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, DocTestParser, DocTestRunner
from functools import cache
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from needed import first_party
from posttrain import config, fitting
from posttrain.catalogue import card
from posttrain.hookspecs import Component, hookimpl
from posttrain.known import known
from posttrain.registry import Registry, discover, import_file

ROOT = Path(__file__).parents[2]
TOOL = import_file(ROOT / "tools" / "component_pages.py")
WRITTEN = {path.relative_to(TOOL.PAGES).as_posix(): path.read_text("utf-8") for path in TOOL.PAGES.rglob("*.md")}
OF_COMPONENTS = sorted(name for name in WRITTEN if name != "README.md")
MARKDOWN = MarkdownIt().enable("table")
HOW = "run: python tools/component_pages.py"


def fenced(page: str, language: str) -> Iterator[str]:
    for token in parsed(page):
        if token.type == "fence" and token.info == language:
            yield token.content


@cache
def parsed(page: str) -> list[Token]:
    """The tokens of a page, those inside of lines after their line."""
    return [inner for token in MARKDOWN.parse(WRITTEN[page]) for inner in (token, *(token.children or ()))]


@cache
def own() -> Registry:
    found: Registry = TOOL.own()
    return found


# --- what is there ----------------------------------------------------------------------------------------------------

@first_party
@pytest.mark.needs("posttrain_tuning")
def test_the_pages_are_fresh() -> None:
    made = {path.as_posix(): text for path, text in TOOL.pages().items()}
    assert set(made) == set(WRITTEN), HOW
    assert [name for name, text in made.items() if text != WRITTEN[name]] == [], HOW


def test_every_component_of_ours_has_a_page_in_the_index() -> None:
    wanted = {f"{k.kind}/{k.name}.md" for k in known()}
    assert wanted == set(OF_COMPONENTS), f"run: python tools/known_components.py; {HOW}"
    assert set(re.findall(r"^\| \[\w+\]\((\w+/\w+\.md)\)", WRITTEN["README.md"], re.MULTILINE)) == wanted, HOW


@pytest.mark.parametrize("page", sorted(WRITTEN))
def test_links_lead_to_what_exists(page: str) -> None:
    links = [str(t.attrs["href"]) for t in parsed(page) if t.type == "link_open"]
    headings = {f"#{line.removeprefix('## ')}" for line in WRITTEN["README.md"].splitlines() if line.startswith("## ")}
    for link in links:
        path, mark, anchor = link.partition("#")
        if not link.startswith("https://"):
            assert (TOOL.PAGES / page).parent.joinpath(path).is_file(), link
            assert not mark or f"#{anchor}" in headings, link
    assert links


@first_party
def test_a_page_says_what_the_terminal_says() -> None:
    registry = own()
    found = card(registry, registry.resolve("estimator", "vtrace"))
    text = WRITTEN["estimator/vtrace.md"]
    assert len(found.fields) > 10 and all(f"| `{f.name}` | " in text and f" | `{f.default}` | " in text
                                          for f in found.fields)
    assert found.summary in text and "`behavior_logprobs`, `logprobs`, `values`" in text


def test_fields_of_a_nested_block_are_fields() -> None:
    assert "| `adapter.rank` | `int` | `16` | Columns of A and rows of B. |" in WRITTEN["backend/hf.md"]


Sourceless = make_dataclass("Sourceless", [("depth", int, 2)], frozen=True)


@dataclass(frozen=True)
class Nested:
    """Holds one of its own and one that was made by a call."""

    within: Nested | None = None
    """Another one."""
    made: Sourceless | None = None  # type: ignore[valid-type]  # made by a call

    def __call__(self, prompts: object, completions: list[str], **columns: object) -> list[float]:
        return [0.0] * len(completions)


class Plugin:
    """Declares `Nested`."""

    @hookimpl
    def components(self) -> Iterable[Component]:
        yield Component("reward", "nested", f"{__name__}:Nested", "")


def test_a_block_within_itself_or_without_source_ends_the_card() -> None:
    registry = discover([Plugin()], environ={}, entry_points=())
    found = card(registry, registry.resolve("reward", "nested"))
    assert [(f.name, f.type, f.default) for f in found.fields] == [
        ("within", "Nested | None", "None"), ("made", "Sourceless | None", "None"), ("made.depth", "int", "2")]


# --- that it is right -------------------------------------------------------------------------------------------------

@first_party
@pytest.mark.parametrize("page", [name for name in OF_COMPONENTS if "```yaml" in WRITTEN[name]])
def test_its_configuration_can_be_used(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a small configuration it is accepted, and puts the component in."""
    for file in ("data/train.jsonl", "data/held_out.jsonl", "path/to/folder/config.json", "path/to/tokenizer.json"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    (text,) = fenced(page, "yaml")
    rewards = "" if "loop: supervised" in text else "rewards: {correct: exact_match}\n"
    (tmp_path / "base.yaml").write_text(f"task: {{use: rows, path: data/train.jsonl}}\n{rewards}")
    (tmp_path / "train.yaml").write_text(f"extends: base.yaml\n{text}")
    registry = own()
    loaded = config.load(tmp_path / "train.yaml", [], registry)
    fitting.check(loaded)
    kind, name = page.removesuffix(".md").split("/")
    assert registry.resolve(kind, name) in loaded.components.values() or loaded.settings.update.entropy_coef > 0


@first_party
@pytest.mark.parametrize("page", [name for name in OF_COMPONENTS if ">>> " in WRITTEN[name]])
def test_its_examples_run_as_they_are(page: str) -> None:
    runner = DocTestRunner(optionflags=ELLIPSIS | NORMALIZE_WHITESPACE)
    runner.run(DocTestParser().get_doctest("\n".join(fenced(page, "python")), {}, page, page, 0))
    assert runner.summarize(verbose=False) == (0, runner.tries) and runner.tries


@pytest.mark.parametrize("page", sorted(WRITTEN))
def test_nothing_of_a_formula_is_taken_for_markup(page: str) -> None:
    found = list(parsed(page))
    assert not {t.type for t in found} & {"em_open", "strong_open", "html_block", "html_inline", "hr", "code_block",
                                          "ordered_list_open", "blockquote_open"}
    names = {Path(name).stem for name in OF_COMPONENTS} | {Path(name).parent.name for name in OF_COMPONENTS}
    prose = " ".join(t.content for t in found if t.type == "text" and t.content not in names)
    assert "`" not in prose and not re.search(r"\w_[{\w]|\w\^", prose), "a name or a formula that is no code"


@pytest.mark.parametrize("page", sorted(WRITTEN))
def test_tables_have_their_columns(page: str) -> None:
    """A bar inside a cell would make further ones, which are dropped where it is rendered."""
    lines = [line for line in WRITTEN[page].splitlines() if line.startswith("| ")]
    columns = {len(re.findall(r"(?<!\\)\|", line)) - 1 for line in lines}
    cells = sum(t.type in ("td_open", "th_open") for t in parsed(page))
    rules = sum(line.startswith("| ---") for line in lines)
    assert len(columns) <= 1 and cells == (len(lines) - rules) * max(columns, default=0)


# --- how text becomes Markdown ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "markdown"), [
    ("A_t = G_t - b with b the reward", "`A_t = G_t - b` with b the reward"),
    ("targets G and advantages G - v.", "targets G and advantages `G - v`."),
    ("for actions with low <= rho_bar <= high, the others", "for actions with `low <= rho_bar <= high`, the others"),
    ("proportional to min(rho_max mu, pi), which is pi", "proportional to `min(rho_max mu, pi)`, which is pi"),
    ("1 - l / n (`uniform`), lam^l (`geometric`)", "`1 - l / n` (`uniform`), `lam^l` (`geometric`)"),
    ("(decay[N], x[N]) -> y[N], float32", "`(decay[N], x[N]) -> y[N]`, float32"),
    ("with Delta the log-ratio log pi - log ref of it", "with Delta the log-ratio `log pi - log ref` of it"),
    ("A_t = b, - c_t and x", "`A_t = b`, `- c_t` and x"),
    ("in [0, 1]: 0 is one step - a choice", "in [0, 1]: 0 is one step - a choice"),
    ("usually ${rollout.max_new_tokens}.", "usually `${rollout.max_new_tokens}`."),
    ("(Hu 2025, arXiv 2501.03262): b", "(Hu 2025, [arXiv 2501.03262](https://arxiv.org/abs/2501.03262)): b"),
    ("*all* of <it>", r"\*all\* of \<it>"),
    ("`a*b` and ``c`d``", "`a*b` and ``c`d``"),
])
def test_prose_and_formulas(text: str, markdown: str) -> None:
    assert TOOL.inline(text) == markdown


@first_party
def test_no_word_is_lost() -> None:
    def bare(text: str) -> str:
        return re.sub(r"[`\\<>]", "", " ".join(text.split()))

    cards = [card(own(), component) for component in own().components()]
    texts = [text for c in cards for text in (c.summary, c.source, c.doc, *(f.doc for f in c.fields))]
    written = [re.sub(r"\[(arXiv [\d.]+)\]\([^)]+\)", r"\1", TOOL.inline(text)) for text in texts]
    assert [bare(text) for text in written] == [bare(text) for text in texts]


@pytest.mark.parametrize("text", ["plain", "a`b", "`", "``x`"])
def test_code_is_shown_as_it_is(text: str) -> None:
    (line,) = (t for t in MARKDOWN.parse(TOOL.code(text)) if t.type == "inline")
    assert [(t.type, t.content) for t in line.children or ()] == [("code_inline", text)]


def test_lists_and_code_stay_what_they_are() -> None:
    assert list(TOOL.blocks("Two:\n\n- one\n  and more\n- rho_t\n\n    with a:\n        b")) == [
        "Two:", "- one and more\n- `rho_t`", "```python\nwith a:\n    b\n```"]


def test_pages_of_what_is_no_more_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(TOOL, "ROOT", tmp_path)
    monkeypatch.setattr(TOOL, "PAGES", tmp_path / "components")
    monkeypatch.setattr(TOOL, "pages", lambda: {Path("reward/new.md"): "# new\n"})
    (tmp_path / "components" / "kl").mkdir(parents=True)
    (tmp_path / "components" / "kl" / "old.md").touch()
    TOOL.write()
    assert [p.name for p in (tmp_path / "components").rglob("*.md")] == ["new.md"]
    assert capsys.readouterr().out == "wrote 1 pages to components\n"


def test_the_yaml_of_a_page_is_one_block_of_keys() -> None:
    assert all(isinstance(yaml.safe_load(text), dict) for page in OF_COMPONENTS for text in fenced(page, "yaml"))
