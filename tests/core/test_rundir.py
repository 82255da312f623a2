"""Run directories: lines that are whole, history cut back on resuming, manifests, clear refusals."""

import hashlib
import json
import logging
import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from posttrain.errors import DataError, InputError, RunInUse
from posttrain.rundir import CONFIG, METRICS, SAMPLES, JsonLines, RunDirectory, describe, metric_record, read_metrics

STARTED = "2026-01-02T03:04:05+00:00"


def new(path: Path, **manifest: object) -> RunDirectory:
    return RunDirectory.create(path, config="steps: 3  # ü\n", manifest=manifest)


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


@pytest.mark.parametrize("name", ["plain", "mit Leerzeichen", "Übung-模型-'$x'"])
def test_create_and_open(tmp_path: Path, name: str) -> None:
    path = tmp_path / "runs" / name
    with new(path, seed=3) as run:
        assert run.checkpoints == path / "checkpoints" and run.checkpoints.is_dir()
    with RunDirectory.open(path) as run:
        assert (path / CONFIG).read_text("utf-8") == "steps: 3  # ü\n"
        assert run.manifest == {"seed": 3}
    assert sorted(p.name for p in path.iterdir() if not p.name.startswith(".")) == [
        "checkpoints", "config.yaml", "manifest.json", "metrics.jsonl", "samples.jsonl"]


def test_one_run_one_holder(tmp_path: Path) -> None:
    with new(tmp_path / "run"), pytest.raises(RunInUse, match=f"process {os.getpid()} on"):
        RunDirectory.open(tmp_path / "run")
    run = RunDirectory.open(tmp_path / "run")
    run.close()
    with RunDirectory.open(tmp_path / "run") as other:
        run.close()  # a second time, which must not take away the other's lock
        with pytest.raises(RunInUse, match=f"process {os.getpid()} on"):
            RunDirectory.open(tmp_path / "run")
        assert other.manifest == {}


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    new(tmp_path / "run").close()
    with pytest.raises(InputError, match=r"already holds a run(.|\n)*posttrain resume") as caught:
        new(tmp_path / "run")
    assert caught.value.exit_code == 2
    with RunDirectory.open(tmp_path / "run"):  # the refusal kept no lock
        pass


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write: (.|\n)*run=PATH"):
        new(tmp_path / "file" / "run")
    with pytest.raises(InputError, match="cannot write: File name too long"):
        new(tmp_path / ("x" * 300))
    new(tmp_path / "runs" / "first").close()
    with pytest.raises(InputError, match=r"frist is not a run directory: it does not exist; did you mean 'first'\?"):
        RunDirectory.open(tmp_path / "runs" / "frist")
    with pytest.raises(InputError, match="is not a run directory: it has no config.yaml"):
        RunDirectory.open(tmp_path / "runs")
    with pytest.raises(InputError, match="does not exist"):
        RunDirectory.open(tmp_path / "no" / "such")


def test_a_directory_without_write_permission(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write everywhere")
        with pytest.raises(InputError, match="cannot write: Permission denied"):
            new(tmp_path / "run")
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_a_file_where_a_folder_should_be_keeps_no_lock(tmp_path: Path) -> None:
    new(tmp_path).close()
    (tmp_path / METRICS).unlink()
    (tmp_path / METRICS).mkdir()
    for _ in range(2):
        with pytest.raises(InputError, match="metrics.jsonl"):
            RunDirectory.open(tmp_path)


def test_what_may_differ_stands_apart(tmp_path: Path) -> None:
    metrics = {"reward/mean": 0.5, "episodes": 8, "kl/reference": np.float32(0.25), "timing/seconds": 1.5}
    with new(tmp_path) as run:
        run.append_metrics(1, metrics)
        run.append_metrics(2, dict(reversed(metrics.items())) | {"timing/seconds": 9.0})
        assert len(read_metrics(tmp_path)) == 2  # there before closing
    first, second = read_metrics(tmp_path)
    assert first == {"step": 1, "reward/mean": 0.5, "episodes": 8, "kl/reference": 0.25, "timing": {"seconds": 1.5}}
    assert list(first) == list(second)
    assert {**first, "step": 2, "timing": second["timing"]} == second


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    with new(tmp_path) as run:
        run.append_metrics(1, {"a": math.nan, "b": -math.inf, "c": np.float64("inf"), "d": 1.0, "timing/x": math.nan})
        run.append_samples(1, [{"reward": math.nan, "rewards": [1.0, math.inf], "n": np.arange(2)}])
    strict = {"parse_constant": pytest.fail}
    record = json.loads((tmp_path / METRICS).read_text(), **strict)
    assert record == {"step": 1, "a": None, "b": None, "c": None, "d": 1.0, "nonfinite": 3, "timing": {"x": None}}
    sample = json.loads((tmp_path / SAMPLES).read_text(), **strict)
    assert sample == {"step": 1, "reward": None, "rewards": [1.0, None], "n": [0, 1]}


def test_names_of_the_line_itself_are_refused() -> None:
    for name in ("step", "timing", "nonfinite"):
        with pytest.raises(ValueError, match=name):
            metric_record(1, {name: 1.0})


@given(text=st.text(st.characters(codec=None, exclude_categories=())))
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_one_line_and_comes_back(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.jsonl").unlink(missing_ok=True)
    lines = JsonLines(tmp_path / "x.jsonl")
    lines.append([{"step": 1, "completion": text}])
    lines.close()
    record, = read_metrics(tmp_path / "x.jsonl")
    assert record["completion"] == text or [*map(ord, record["completion"])] == utf16_pairs_joined(text)


def utf16_pairs_joined(text: str) -> list[int]:
    """Code points after two lone surrogates that stand side by side as a pair became one character."""
    return [*map(ord, text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass"))]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    with new(tmp_path) as run:
        for step in (1, 2):
            run.append_metrics(step, {"x": float(step)})
    whole = (tmp_path / METRICS).read_bytes()
    for cut in (1, 5, 20):
        (tmp_path / METRICS).write_bytes(whole[:-cut])
        assert steps(tmp_path) == [1]
        with RunDirectory.open(tmp_path) as run:
            run.append_metrics(2, {"x": 2.0})
        assert (tmp_path / METRICS).read_bytes() == whole
    (tmp_path / METRICS).write_bytes(b"x" * 200_000)  # longer than one read
    with RunDirectory.open(tmp_path):
        assert (tmp_path / METRICS).read_bytes() == b""


def test_a_long_torn_line_behind_whole_ones(tmp_path: Path) -> None:
    with new(tmp_path) as run:
        run.append_samples(1, [{"completion": "a" * 100_000}])
    whole = (tmp_path / SAMPLES).read_bytes()
    (tmp_path / SAMPLES).write_bytes(whole + b'{"step": 2, "completion": "' + b"b" * 150_000)
    RunDirectory.open(tmp_path).close()
    assert (tmp_path / SAMPLES).read_bytes() == whole


def test_truncated_history_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    def history(run: RunDirectory, steps: range) -> None:
        for step in steps:
            run.append_samples(step, [{"completion": f"{step}-{i}"} for i in range(2)])
            run.append_metrics(step, {"x": step / 3})

    with new(tmp_path / "a") as run:
        history(run, range(9))
    with new(tmp_path / "b") as run:
        history(run, range(7))
    with RunDirectory.open(tmp_path / "b") as run:
        run.truncate_after(4)
        run.sync()
        assert steps(tmp_path / "b") == [0, 1, 2, 3, 4]
        history(run, range(5, 9))
    for name in (METRICS, SAMPLES):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with RunDirectory.open(tmp_path / "b") as run:
        run.truncate_after(-1)
    assert steps(tmp_path / "b") == []
    assert not [p for p in (tmp_path / "b").iterdir() if p.name.startswith((".metrics", ".samples"))]


def test_garbage_after_the_checkpoint_goes_and_before_it_is_named(tmp_path: Path) -> None:
    with new(tmp_path) as run:
        for step in (1, 2):
            run.append_metrics(step, {})
    one, two = (tmp_path / METRICS).read_bytes().splitlines(keepends=True)
    (tmp_path / METRICS).write_bytes(one + b"\0\0\0\n" + two)
    with pytest.raises(DataError, match=r"metrics.jsonl:2"):
        read_metrics(tmp_path)
    with RunDirectory.open(tmp_path) as run:
        with pytest.raises(DataError, match=r"metrics.jsonl:2"):
            run.truncate_after(2)
        assert (tmp_path / METRICS).read_bytes() == one + b"\0\0\0\n" + two  # nothing was lost by the refusal
        run.truncate_after(1)
    assert (tmp_path / METRICS).read_bytes() == one


def test_reading_where_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the metrics: No such file"):
        read_metrics(tmp_path)
    with pytest.raises(InputError, match="cannot read the metrics: No such file"):
        read_metrics(tmp_path / "nowhere")


def manifest(**changes: object) -> dict[str, object]:
    return {**describe(seed=1, threads=2, plugins=["numpy", "no-such"], user_files=[], started=STARTED), **changes}


def test_manifest_says_what_matters(tmp_path: Path) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text("x = 1\n")
    found = describe(seed=1, threads=2, plugins=["numpy", "no-such"], user_files=[reward], started=STARTED)
    assert found["plugins"] == {"no-such": "unknown", "numpy": np.__version__}
    assert found["user_files"] == {str(reward): hashlib.sha256(b"x = 1\n").hexdigest()}
    assert (found["seed"], found["threads"], found["started"]) == (1, 2, STARTED)
    assert found["cpu"] and found["platform"] and found["memory_bytes"] > 0 and found["cpus"] == os.cpu_count()
    assert json.loads(json.dumps(found)) == found
    with pytest.raises(InputError, match="gone.py"):
        describe(seed=1, threads=2, plugins=[], user_files=[tmp_path / "gone.py"], started=STARTED)


@pytest.mark.parametrize(("script", "names"), [
    ("echo 'NVIDIA A'; echo 'NVIDIA B'", ["NVIDIA A", "NVIDIA B"]), ("echo broken; exit 9", [])])
def test_manifest_names_the_accelerators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str,
                                         names: list[str]) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert manifest()["accelerators"] == names


def test_differences_end_the_promise_of_equal_bits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with new(tmp_path, **manifest()) as run:
        assert run.differences(manifest(started="later", host="elsewhere")) == []
        torch = {**manifest()["frameworks"], "torch": "0"}  # type: ignore[dict-item]  # a map
        found = run.differences(manifest(threads=1, cpu="another", frameworks=torch))
    assert [text.split(" was ")[0] for text in found] == ["threads", "frameworks: torch", "cpu"]
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == found
    assert "threads was 2 and is now 1: the resumed run is no longer bitwise equal" in found[0]


def test_of_files_and_plugins_only_what_changed_is_named(tmp_path: Path) -> None:
    then = {"/a/same.py": "1" * 64, "/a/changed.py": "2" * 64, "/a/gone.py": "3" * 64}
    now = {"/a/same.py": "1" * 64, "/a/changed.py": "4" * 64, "/a/new.py": "5" * 64}
    with new(tmp_path, **manifest(user_files=then, plugins={"a": "1.0", "b": "1.0"})) as run:
        plugins, files = run.differences(manifest(user_files=now, plugins={"a": "1.0", "b": "1.1"}))
    end = ": the resumed run is no longer bitwise equal to an uninterrupted one"
    assert plugins == f"plugins: b was '1.0' and is now '1.1'{end}"
    assert files == (f"user_files: /a/changed.py was '{'2' * 64}' and is now '{'4' * 64}'; "
                     f"/a/gone.py was '{'3' * 64}' and is gone; /a/new.py was added as '{'5' * 64}'{end}")
