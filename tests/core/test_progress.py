"""What a command is busy with: what is said of it, when it is shown, where, and that nothing else is let through."""

from __future__ import annotations

import logging
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from needed import first_party
from posttrain import cli, following, progress, scaffold
from posttrain.following import Follower, Lines
from posttrain.progress import Activity, doing, shown
from posttrain.protocols import RowRules
from posttrain.tasks import records, storage
from posttrain.tasks.rows import Rows
from posttrain.tokenizers import Bytes


class Recorder:
    """A display that keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def show(self, text: str, seconds: float) -> None:
        self.seen.append(f"{text} {seconds:.0f}")

    def clear(self) -> None:
        self.seen.append("")


def record(text: str, activity: Activity) -> logging.LogRecord:
    made = logging.LogRecord("posttrain.progress", logging.DEBUG, "", 0, text, None, None)
    made.activity = activity
    return made


def test_the_latest_that_takes_long_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "TICK", 1000.0)  # looks are asked for here
    now, display = [0.0], Recorder()
    follower = Follower(display, lambda: now[0])
    rows, count = Activity(), Activity()
    follower.handle(record("reading the rows", rows))
    now[0] = 1.9
    follower.look()
    follower.handle(record("10 of 20", count))
    now[0] = 2.5
    follower.look()
    now[0] = 4.0
    follower.handle(record("15 of 20", count))
    follower.look()
    count.over = True
    follower.handle(record("all", count))
    follower.look()
    assert display.seen == ["", "reading the rows 2", "15 of 20 2", "reading the rows 4"]
    assert any(t.name == "progress" for t in threading.enumerate())
    rows.over = True
    follower.handle(record("done", rows))
    assert display.seen[-1] == "" and not any(t.name == "progress" for t in threading.enumerate())


def test_lines_come_every_so_often(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    for seconds in range(2, 30):
        lines.show(f"row {seconds}", seconds)
    lines.clear()
    lines.show("loading policy", 3.0)
    assert capsys.readouterr() == ("", "row 2 (0:02)\nrow 12 (0:12)\nrow 22 (0:22)\nloading policy (0:03)\n")


def test_what_takes_long_is_in_the_log_of_python_users(caplog: pytest.LogCaptureFixture,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO)
    with doing("loading policy"):
        pass
    assert list(shown("abc", "letters: checked", 3, "letters")) == list("abc")
    assert caplog.messages == []
    monkeypatch.setattr(progress, "QUIET", 0.0)
    monkeypatch.setattr(progress, "OFTEN", 0.0)
    with doing("loading policy"):
        pass
    assert list(shown("abc", "letters: checked", 3, "letters")) == list("abc")
    assert caplog.messages == [
        "loading policy: 0 s", "letters: checked 1 of 3 letters", "letters: checked all 3 letters"]


def test_reading_a_file_larger_than_is_kept_says_how_far_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "KEPT", 0)
    monkeypatch.setattr(records, "BLOCK", 16)
    monkeypatch.setattr(progress, "QUIET", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(progress, "OFTEN", 0.0)
    caplog.set_level(logging.INFO, "posttrain.progress")
    (path := tmp_path / "rows.jsonl").write_text('{"prompt": "abc"}\n' * 4)
    Rows(path=str(path)).load(Bytes().load(), RowRules())
    assert caplog.messages == [
        *(f"{path}: found the rows of {n} of 72 bytes" for n in (16, 32, 48, 64, 72)),
        f"{path}: found the rows of all 72 bytes",
        *(f"{path}: checked {n} of 4 rows" for n in range(1, 5)), f"{path}: checked all 4 rows"]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes a moment takes long."""
    monkeypatch.setattr(following, "QUIET", 0.0)
    monkeypatch.setattr(following, "TICK", 0.001)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    scaffold.write(tmp_path)
    rows = (tmp_path / "data.jsonl").read_text()
    assert rows
    (tmp_path / "data.jsonl").write_text(rows * (200_000 // len(rows) + 1))
    return tmp_path


@first_party
@pytest.mark.usefixtures("eager")
def test_check_says_what_it_reads_and_stays_quiet_when_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(folder / "train.yaml")]) == 0
    out, err = capsys.readouterr()
    assert "reading the rows (0:00)\n" in err and "reading" not in out
    assert cli.main(["check", str(folder / "train.yaml"), "--quiet"]) == 0
    assert capsys.readouterr() == (out, "")


@pytest.mark.usefixtures("eager")
def test_no_other_log_is_let_through(capsys: pytest.CaptureFixture[str]) -> None:
    before = progress.log.level, len(progress.log.handlers)
    with following.following(), doing("loading policy"):
        for name in ("transformers", "posttrain", "posttrain.tasks.source", ""):
            logging.getLogger(name).info("from %s", name)
        time.sleep(0.1)
    assert set(capsys.readouterr().err.splitlines()) == {"loading policy (0:00)"}
    assert (progress.log.level, len(progress.log.handlers)) == before


ON_A_TERMINAL = """
import sys, time
from posttrain import following
from posttrain.progress import doing
following.QUIET, following.TICK = 0.05, 0.01
with following.following():
    with doing("loading policy"):
        time.sleep(0.3)
        print("a warning", file=sys.stderr)
        print("a result")
        time.sleep(0.1)
    with doing("short"):
        pass
    from rich.progress import Progress
    from rich.console import Console
    with Progress(console=Console(file=sys.stderr)), doing("sending"):
        time.sleep(0.3)
print("end", file=sys.stderr)
"""


def test_a_terminal_has_one_line_that_vanishes() -> None:
    """Standard output goes its own way; above the bar of the training there are whole lines."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    environment.pop("CI", None)
    with subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL], stderr=theirs, stdout=subprocess.PIPE,
                          env=environment) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                seen += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
        assert process.stdout is not None and process.stdout.read() == b"a result\n"
    os.close(ours)
    text = seen.decode()
    before, _, after = text.partition("a warning\r\n")
    assert before.count("loading policy (0:00)") > 3 and "loading policy (0:00)\r\n" not in before
    assert "loading policy (0:00)" in after and "short" not in text  # what is shown goes on below what was written
    assert "\x1b[2K" in after.partition("sending")[0] and "sending (0:00)" in after
    assert text.rstrip().endswith("end") and process.returncode == 0
