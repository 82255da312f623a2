"""Trackers: exact lines by a given clock, the live display, the mirror, the circuit breaker; and pictures of runs."""

import io
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from posttrain import trackers
from posttrain.errors import InputError, PluginError
from posttrain.report import plot
from posttrain.rundir import METRICS, RunDirectory, read_metrics
from posttrain.trackers.console import FORMS, Console, JsonObjects, Live, Plain, duration
from posttrain.trackers.jsonl import Jsonl


@dataclass
class Run:
    directory: Path = Path("runs/x")
    steps: int = 100
    loop: str = "rl"
    output: str = "plain"


class Clock:
    """Goes only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


METRICS_OF_A_STEP = {
    "reward/mean": 0.53, "reward/std": 0.21, "kl/reference": 0.011, "kl/coef": 0.04, "policy/entropy": 1.32,
    "episode/length": 5.1, "loss/policy": -0.2, "finish/eos": 0.9, "timing/tokens_per_second": 4210.3,
    "timing/memory_mb": 412.4, "timing/seconds": 0.5}


def plain(run: Run, every: int = 1) -> tuple[Plain, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    return Plain(run, every, out, clock), out, clock


def test_plain_lines() -> None:
    session, out, clock = plain(Run())
    session.step_finished(0, {"eval/reward/mean": 0.1, "eval/reward/std": 0.3, "eval/loss": 2.5})
    for step in range(1, 13):
        clock.now += 0.466
        session.phase_started("rollout")
        session.step_finished(step, METRICS_OF_A_STEP)
    session.step_finished(100, METRICS_OF_A_STEP | {"eval/reward": 0.61, "kl/coef": 0.0, "kl/reference": 2e-5})
    clock.now += 3600
    session.finished(None)
    lines = out.getvalue().splitlines()
    assert lines[0] == "eval 0/100  reward 0.10±0.30  loss 2.500"
    assert lines[12] == ("step 12/100  reward 0.53±0.21  kl 0.011  coef 0.040  entropy 1.32  length 5.1  4210 tok/s"
                         "  412 MB  eta 0:41")
    assert lines[13:] == [
        "step 100/100  reward 0.53±0.21  kl 2.0e-05  entropy 1.32  length 5.1  4210 tok/s  412 MB",
        "eval 100/100  reward 0.61", "finished 100/100 steps in 1:00:06  runs/x"]


def test_time_left_after_resuming_counts_this_process_alone() -> None:
    session, out, clock = plain(Run())
    for step in (51, 52):
        clock.now += 2.0
        session.step_finished(step, {"reward/mean": 1.0})
    assert out.getvalue().splitlines()[-1] == "step 52/100  reward 1.00  eta 1:36"


def test_supervised_runs_show_losses() -> None:
    session, out, _ = plain(Run(loop="supervised", steps=2))
    session.step_finished(1, {"loss/nll": 2.3456, "episode/length": 7.0})
    session.step_finished(2, {"loss/nll": 2.0, "loss/value": math.nan, "eval/loss": 1.9})
    assert out.getvalue().splitlines() == [
        "step 1/2  loss 2.346  length 7.0", "step 2/2  loss/nll 2.000  loss/value nan", "eval 2/2  loss 1.900"]


def test_every_prints_some_steps_all_evaluations_and_the_last() -> None:
    session, out, _ = plain(Run(steps=11), every=5)
    for step in range(1, 12):
        session.step_finished(step, {"reward/mean": 0.0} | ({"eval/reward": 0.5} if step == 7 else {}))
    places = [line.split()[:2] for line in out.getvalue().splitlines()]
    assert places == [["step", "5/11"], ["eval", "7/11"], ["step", "10/11"], ["step", "11/11"]]
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        Console(every=0)


def test_an_error_ends_the_lines() -> None:
    session, out, _ = plain(Run())
    session.step_finished(3, {})
    session.finished(RuntimeError("boom"))
    assert out.getvalue() == "stopped after step 3/100 by RuntimeError  runs/x\n"


def test_json_lines_are_strict_and_as_in_the_run_directory() -> None:
    out = io.StringIO()
    session = JsonObjects(Run(steps=2), 1, out, Clock())
    session.step_finished(1, {"reward/mean": math.nan, "timing/seconds": 0.5})
    session.finished(ValueError("ü"))
    assert [json.loads(line, parse_constant=pytest.fail) for line in out.getvalue().splitlines()] == [
        {"event": "started", "directory": "runs/x", "steps": 2, "loop": "rl"},
        {"event": "step", "step": 1, "reward/mean": None, "nonfinite": 1, "timing": {"seconds": 0.5}},
        {"event": "finished", "directory": "runs/x", "error": "ValueError: ü"}]


def test_live_display() -> None:
    from rich.console import Console as Terminal

    terminal = Terminal(record=True, file=io.StringIO(), force_terminal=True, width=140)
    clock = Clock()
    session = Live(Run(), 1, terminal, clock)
    session.phase_started("rollout")
    clock.now += 5.0
    session.step_finished(50, METRICS_OF_A_STEP | {"reward/mean": 0.25})
    session._bar.refresh()
    drawn = terminal.file.getvalue()  # what was on the screen, the bar included
    session.finished(None)
    kept = terminal.export_text()
    assert "rollout 0:05" in drawn and "50/100" in drawn and "eta 4:10" in drawn
    assert "step 50/100  reward 0.25±0.21" in kept and "finished 50/100 steps in 0:05" in kept
    assert not session._bar.live.is_started


@pytest.mark.parametrize(("terminal", "environment", "form"), [
    (True, {}, Live), (False, {}, Plain), (True, {"TERM": "dumb"}, Plain), (True, {"CI": "true"}, Plain)])
def test_auto_draws_only_where_somebody_looks(monkeypatch: pytest.MonkeyPatch, terminal: bool,
                                              environment: Mapping[str, str], form: type) -> None:
    for name, value in ({"TERM": "xterm"} | dict(environment)).items():
        monkeypatch.setenv(name, value)
    if "CI" not in environment:
        monkeypatch.delenv("CI", raising=False)
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", stream)
    session = Console().start(Run(output="auto"))
    session.finished(None)
    assert isinstance(session, form)


def test_quiet_and_unknown_outputs(capsys: pytest.CaptureFixture[str]) -> None:
    session = Console().start(Run(output="quiet"))
    session.phase_started("rollout")
    session.step_finished(1, METRICS_OF_A_STEP)
    session.finished(None)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="unknown output 'plian'; did you mean 'plain'"):
        Console().start(Run(output="plian"))
    assert set(FORMS) == {"plain", "json", "live", "quiet"}


def test_duration() -> None:
    assert [duration(x) for x in (0, 59.4, 59.6, 3599.6)] == ["0:00", "0:59", "1:00", "1:00:00"]


@pytest.fixture
def files(tmp_path: Path) -> Iterator[RunDirectory]:
    with RunDirectory.create(tmp_path / "run", config="", manifest={}) as opened:
        yield opened


def test_mirror_follows_through_a_resume(files: RunDirectory, tmp_path: Path) -> None:
    mirror = tmp_path / "elsewhere" / "mirror.jsonl"
    run = Run(files.path)

    def session_of(first: int, last: int) -> None:
        session = Jsonl(path=str(mirror)).start(run)
        for step in range(first, last):
            files.append_metrics(step, {"x": step / 3, "timing/seconds": 1.0})
            session.step_finished(step, {"x": step / 3, "timing/seconds": 1.0})
        session.finished(None)

    session_of(1, 6)
    assert mirror.read_bytes() == (files.path / METRICS).read_bytes()
    files.truncate_after(3)
    session_of(4, 8)
    assert mirror.read_bytes() == (files.path / METRICS).read_bytes()
    assert [r["step"] for r in read_metrics(mirror)] == list(range(1, 8))


def test_mirror_spares_the_files_of_others(files: RunDirectory, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"step": 1, "x": 5.0}\n')
    with pytest.raises(InputError, match=r"holds the metrics of another run(.|\n)*trackers.jsonl.path"):
        Jsonl(path=str(other)).start(Run(files.path))
    assert other.read_text() == '{"step": 1, "x": 5.0}\n'
    for path in ("", str(files.path / METRICS), str(files.path / ".." / "run" / METRICS)):
        session = Jsonl(path=path).start(Run(files.path))
        session.step_finished(1, {"x": 1.0})
        session.finished(None)
    assert read_metrics(files.path) == []


class Recorder:
    """A tracker and its own session that notes what it is told and raises when asked to."""

    def __init__(self, raises: str = "",
                 error: Callable[[], BaseException] = lambda: OSError("server is gone")) -> None:
        self.told: list[object] = []
        self._raises, self._error = raises, error

    def _note(self, name: str, what: object) -> None:
        self.told.append((name, what))
        if name == self._raises:
            raise self._error()

    def start(self, run: trackers.ObservedRun) -> trackers.TrackerSession:
        self._note("start", run.steps)
        return self

    def phase_started(self, phase: str) -> None:
        self._note("phase_started", phase)

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        self._note("step_finished", step)

    def finished(self, error: BaseException | None) -> None:
        self._note("finished", type(error))


def observe(*recorders: Recorder) -> None:
    session = trackers.start({f"t{i}": recorder for i, recorder in enumerate(recorders)}, Run())
    session.phase_started("rollout")
    session.step_finished(1, {"x": 1.0})
    session.step_finished(2, {"x": 1.0})
    session.finished(None)


EVERYTHING = [("start", 100), ("phase_started", "rollout"), ("step_finished", 1), ("step_finished", 2),
              ("finished", type(None))]


@pytest.mark.parametrize(("raises", "told"), [
    ("", EVERYTHING), ("start", EVERYTHING[:1]), ("phase_started", [*EVERYTHING[:2], ("finished", OSError)]),
    ("step_finished", [*EVERYTHING[:3], ("finished", OSError)]), ("finished", [*EVERYTHING, ("finished", OSError)])])
def test_a_tracker_that_raises_is_switched_off_once(raises: str, told: list[object],
                                                    caplog: pytest.LogCaptureFixture) -> None:
    bad, good = Recorder(raises), Recorder()
    observe(bad, good)
    assert bad.told == told and good.told == EVERYTHING
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == bool(raises)
    assert all("tracker 't0' failed" in w and "OSError: server is gone" in w for w in warnings)


def test_a_broken_release_of_the_terminal_is_not_told_twice(caplog: pytest.LogCaptureFixture) -> None:
    class Hopeless(Recorder):
        def finished(self, error: BaseException | None) -> None:
            raise RuntimeError("again")

    observe(Hopeless("step_finished"), good := Recorder())
    assert good.told == EVERYTHING and len(caplog.records) == 1


def test_ctrl_c_is_not_the_trackers_error() -> None:
    with pytest.raises(KeyboardInterrupt):
        observe(Recorder("step_finished", KeyboardInterrupt))


def history(path: Path, **columns: Callable[[int], float]) -> Path:
    with RunDirectory.create(path, config="", manifest={}) as run:
        for step in range(1, 31):
            run.append_metrics(step, {name.replace("__", "/"): column(step) for name, column in columns.items()})
    return path


def rl_history(path: Path) -> Path:
    return history(path, reward__mean=lambda s: s / 30, reward__std=lambda s: 0.1, kl__reference=lambda s: s / 1000,
                   kl__coef=lambda s: 0.1 / s, policy__entropy=lambda s: math.nan if s == 9 else 3 - s / 20,
                   episode__length=lambda s: 5.0 + s, eval__reward__mean=lambda s: s / 40)


@pytest.mark.needs("matplotlib")
def test_plot_draws_curves(tmp_path: Path) -> None:
    runs = [rl_history(tmp_path / "first run"), rl_history(tmp_path / "2$x_$")]
    plot(runs, tmp_path / "out" / "curves.png")
    from matplotlib.image import imread

    pixels = imread(tmp_path / "out" / "curves.png")
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1000
    assert 0.5 < (pixels[..., :3] == 1).all(axis=-1).mean() < 0.97  # curves on white
    plot(runs, tmp_path / "curves.svg", labels=["gae", "vtrace"])
    svg = (tmp_path / "curves.svg").read_text()
    for text in ("Reward", "Reward on held-out prompts", "KL to the reference", "coefficient (dashed)",
                 "Entropy of the policy", "Length of answers", "step", "gae", "vtrace"):
        assert f"<!-- {text} -->" in svg
    assert "Training" not in svg and "Loss" not in svg


@pytest.mark.needs("matplotlib")
def test_plot_of_a_supervised_run_shows_its_loss(tmp_path: Path) -> None:
    run = history(tmp_path / "sft", loss__nll=lambda s: 3 / s, eval__loss=lambda s: 4 / s)
    plot([run], tmp_path / "sft.svg")
    svg = (tmp_path / "sft.svg").read_text()
    assert "<!-- Training loss/nll -->" in svg and "<!-- Loss on held-out answers -->" in svg
    assert "<!-- sft -->" in svg and "Reward" not in svg


@pytest.mark.needs("matplotlib")
def test_plot_refuses_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = rl_history(tmp_path / "run")
    with pytest.raises(InputError, match=r"a picture ends in .png or .svg \(curves.pdf\)"):
        plot([run], Path("curves.pdf"))
    with pytest.raises(InputError, match="1 labels were given for 2 runs"):
        plot([run, run], tmp_path / "x.png", labels=["one"])
    with pytest.raises(InputError, match="no metrics to draw"):
        plot([history(tmp_path / "empty")], tmp_path / "x.png")
    with pytest.raises(InputError, match="cannot read the metrics"):
        plot([tmp_path / "nowhere"], tmp_path / "x.png")
    with pytest.raises(InputError, match="cannot write: "):
        plot([run], run / METRICS / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PluginError, match=r"pip install 'posttrain-core\[report\]'"):
        plot([run], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
