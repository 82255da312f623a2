"""The report page: it shows what the files of a run say, asks nobody for anything, and executes nothing of a run."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from posttrain import cli, report
from posttrain.errors import DataError, InputError
from posttrain.report import history, svg
from posttrain.rundir import metric_record

FORGED = "</pre><script>alert('x')</script><img src=x onerror=alert(1)>\"'&"


class Page(HTMLParser):
    """Elements, attributes, text and tooltips of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        (self.scripts if self._inside == "script" else self.text).append(data)

    def charts(self) -> dict[str, Any]:
        return {str(attributes["aria-label"]): json.loads(str(attributes["data-chart"]))
                for tag, attributes in self.elements if tag == "svg"}


def metrics_of(step: int, **more: float) -> dict[str, float]:
    return {"reward/mean": 0.1 * step, "reward/std": 0.3, "reward/a/mean": 0.05 * step, "reward/b/mean": 1.0,
            "kl/reference": 0.01 * step, "kl/coef": 0.2, "policy/entropy": 1.0 / step, "episode/length": 4.0,
            "policy/clip_high": 0.1, "policy/clip_low": 0.2, "odd/metric": float(step), "timing/seconds": 2.0,
            "timing/rollout": 0.5, "timing/reward": 0.2, "timing/update": 1.0, "timing/unix_time": 1e9,
            "timing/memory_mb": 100.0 + step, **more}


def make_run(path: Path, *, steps: int = 5, config: str = "steps: 9\nkl: {use: adaptive, target: 0.03}\n",
             samples: Sequence[Mapping[str, Any]] = (), rows: Sequence[Mapping[str, Any]] | None = None) -> Path:
    path.mkdir(parents=True)
    lines = rows if rows is not None else [
        metric_record(step, metrics_of(step, **({"eval/reward/mean": 0.5} if step % 2 else {})))
        for step in range(1, steps + 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    (path / "config.yaml").write_text(config)
    (path / "manifest.json").write_text(json.dumps({"seed": 3, "plugins": {"posttrain-core": "0.1.0"}}))
    return path


def written(tmp_path: Path, *runs: Path) -> tuple[str, Page]:
    output = tmp_path / "out" / "report.html"
    report.write(runs, output)
    text = output.read_text()
    return text, Page(text)


def sample(step: int, reward: float | None, completion: str, prompt: Any = "1+1=") -> dict[str, Any]:
    return {"step": step, "kind": "train", "prompt": prompt, "completion": completion, "finish": "eos",
            "reward": reward}


def test_charts_hold_the_metrics(tmp_path: Path) -> None:
    _, page = written(tmp_path, make_run(tmp_path / "run"))
    charts = page.charts()
    assert charts["Reward"]["lines"][0]["values"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert charts["Reward on held-out prompts"]["lines"][0]["steps"] == [1, 3, 5]
    assert [line["label"] for line in charts["KL to the reference"]["lines"]] == ["measured", "target"]
    assert charts["KL to the reference"]["lines"][1]["values"] == [0.03]
    assert [line["label"] for line in charts["Clip fraction"]["lines"]] == ["above", "below"]
    assert {"Reward a", "Reward b", "KL coefficient", "Entropy of the policy", "Length of answers", "Memory",
            "odd/metric"} <= charts.keys()
    phases = {line["label"]: line["values"] for line in charts["Seconds of a step"]["lines"]}
    assert phases == {"reward": [0.2] * 5, "rollout": [0.3] * 5, "update": [1.0] * 5, "other": [0.5] * 5}
    assert "0.1 → 0.5" in page.text and "5 of 9" in page.text and "stopped" in page.text


def test_a_page_asks_nobody_and_runs_only_its_own_script(tmp_path: Path) -> None:
    text, page = written(tmp_path, make_run(tmp_path / "run"))
    assert not {"link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in page.elements}
    assert not any({"src", "href", "action"} & attributes.keys() for _, attributes in page.elements)
    assert not re.search(r"https?:|url\(|@import|fetch|XMLHttp", text)
    policy = next(str(a["content"]) for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy
    assert len(page.scripts) == 1


def test_no_text_of_a_run_becomes_markup(tmp_path: Path) -> None:
    rows = [metric_record(1, {FORGED: 1.0, "reward/mean": 1.0, f"timing/{FORGED}": 1.0, "timing/seconds": 1.0})]
    messages = [{"role": FORGED, "content": FORGED}]
    run = make_run(tmp_path / "a <b>&", rows=rows, config=f"steps: 1\nnote: {json.dumps(FORGED)}\n", samples=[
        sample(1, 1.0, FORGED, FORGED), sample(1, 0.0, FORGED, messages)])
    (run / "manifest.json").write_text(json.dumps({FORGED: FORGED}))
    other = make_run(tmp_path / "other", rows=rows)
    _, page = written(tmp_path, run, other)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1 and "img" not in tags
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "".join(page.text).count(FORGED) >= 5


@given(st.text(max_size=40))
def test_text_comes_back_from_an_element(text: str) -> None:
    from posttrain.report.html import element

    shown = Page(element("p", text, title=text))
    clean = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "�")
    assert [tag for tag, _ in shown.elements] == ["p"] and "".join(shown.text).replace("\r", "\n") in (text, clean)


def test_living_and_crashed_runs(tmp_path: Path) -> None:
    """A torn last line, a null, and files that are not there yet."""
    run = make_run(tmp_path / "run", rows=[
        metric_record(1, metrics_of(1)), metric_record(2, {"reward/mean": float("nan")}),
        metric_record(3, metrics_of(3))])
    for name in ("config.yaml", "manifest.json", "samples.jsonl"):
        (run / name).unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward/me')
    _, page = written(tmp_path, run)
    assert page.charts()["Reward"]["lines"][0]["values"] == [0.1, None, pytest.approx(0.3)]
    assert "Samples" not in page.text and "Configuration" not in page.text
    (run / ".owner.json").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    assert history.state_of(run) == f"running (process {os.getpid()})"
    (run / ".owner.json").write_text(json.dumps({"pid": 2**22 + 1, "host": socket.gethostname()}))
    assert history.state_of(run) == "stopped"
    (run / "policy").mkdir()
    assert history.state_of(run) == "finished"


def test_several_runs_share_charts_and_show_what_differs(tmp_path: Path) -> None:
    one = make_run(tmp_path / "x" / "run", config="lr: 0.1\nkl: {use: adaptive, target: 0.03}\nseed: 1\n")
    two = make_run(tmp_path / "y" / "run", config="lr: 0.2\nkl: {use: fixed}\nseed: 1\n", steps=3)
    text, page = written(tmp_path, one, two)
    assert [line["label"] for line in page.charts()["Reward"]["lines"]] == ["x/run", "y/run"]
    table = text[text.index("What differs"):text.index("Whole configuration")]
    rows = re.findall(r"<tr><th scope=\"row\">([^<]*)</th><td>([^<]*)</td><td>([^<]*)</td>", table)
    assert rows == [("lr", "0.1", "0.2"), ("kl", "adaptive", "fixed"), ("kl.target", "0.03", "not set")]
    assert {"x/run", "y/run"} <= page.charts().keys(), "one stack of phases each"


def test_first_last_best_and_worst_samples(tmp_path: Path) -> None:
    rows = [sample(s, r, f"answer {s}") for s, r in ((1, 0.5), (2, 0.9), (3, 0.1), (4, 0.4), (5, None))]
    rows += [sample(4, 0.9, "answer 2"), sample(0, 0.9, "as good, earlier")]
    picked = {name: [(s["step"], s["completion"]) for s in pick(rows)] for name, pick in report.page.SORTS.items()}
    assert picked["First"] == [(0, "as good, earlier")] and picked["Last"] == [(5, "answer 5")]
    assert picked["Best"] == [(4, "answer 2"), (0, "as good, earlier"), (1, "answer 1"), (4, "answer 4")]
    assert picked["Worst"][0] == (3, "answer 3")
    _, page = written(tmp_path, make_run(tmp_path / "run", samples=rows))
    assert {"First", "Last", "Best", "Worst"} <= set(page.text)


def test_supervised_runs_show_their_loss(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=[metric_record(s, {"loss/sft": 1 / s, "eval/loss": 2 / s}) for s in (1, 2)])
    _, page = written(tmp_path, run)
    assert {"Training loss/sft", "Loss on held-out answers"} == page.charts().keys()


def test_long_runs_stay_small_and_keep_their_extremes(tmp_path: Path) -> None:
    values = [0.0] * 20_000
    values[12_345] = 7.0
    line = svg.thinned(svg.Line("a", range(20_000), values))
    assert len(line.steps) <= svg.POINTS + 2 and (12_345, 7.0) in zip(line.steps, line.values)
    assert line.steps[0] == 0 and line.steps[-1] == 19_999


@given(st.lists(st.floats(allow_infinity=True, allow_nan=True), min_size=1, max_size=30))
def test_every_column_gives_a_drawing_inside_its_frame(values: list[float]) -> None:
    usable = [v if abs(v) < 1e100 else float("nan") for v in values]
    drawing = svg.line_chart("a < b", [svg.Line("x", range(len(usable)), usable, spread=[0.1] * len(usable))])
    root = ET.fromstring(drawing)
    for circle in root.iter("circle"):
        assert svg.LEFT - 1 <= float(circle.attrib["cx"]) <= svg.WIDTH - svg.RIGHT + 1
        assert svg.TOP - 1 <= float(circle.attrib["cy"]) <= svg.HEIGHT - svg.BOTTOM + 1
    assert len(list(root.iter("circle"))) <= sum(v == v for v in usable)


def test_stacked_bars_have_the_height_of_their_sum() -> None:
    root = ET.fromstring(svg.stacked_chart("t", [1, 2], [svg.Layer("a", [1.0, 2.0]), svg.Layer("b", [3.0, 1.0])]))
    heights = [float(bar.attrib["height"]) for bar in root.iter("rect")]
    assert [h / heights[0] for h in heights] == pytest.approx([1, 2, 3, 1], rel=1e-3)


@given(st.floats(-1e3, 1e3), st.floats(1e-4, 1e6))
def test_ticks_are_few_ordered_and_inside(low: float, width: float) -> None:
    found = svg.ticks(low, low + width)
    assert 1 <= len(found) <= 8 and found == sorted(set(found))
    assert all(low - 1e-6 * width <= t <= low + width * (1 + 1e-6) for t in found)


def test_errors_name_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"a report ends in \.html, \.png, \.svg"):
        report.write([run], tmp_path / "report.pdf")
    with pytest.raises(InputError, match="2 labels were given for 1 runs"):
        report.write([run], tmp_path / "r.html", ["a", "b"])
    empty = make_run(tmp_path / "empty", rows=[])
    with pytest.raises(InputError, match="no metrics to show"):
        report.write([empty], tmp_path / "r.html")
    with pytest.raises(InputError, match="cannot write"):
        report.write([run], run / "metrics.jsonl" / "r.html")
    (run / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        report.write([run], tmp_path / "r.html")
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert "cannot read the metrics" in capsys.readouterr().err


def test_command_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(make_run(tmp_path / "run"))]) == 0
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert capsys.readouterr().out == "wrote report.html\n"


@pytest.mark.parametrize(("ending", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_pictures(tmp_path: Path, ending: str, start: bytes) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / f"curves{ending}"
    report.plot([make_run(tmp_path / "a"), make_run(tmp_path / "b")], output)
    assert output.read_bytes().startswith(start)
