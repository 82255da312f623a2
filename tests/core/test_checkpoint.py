"""Checkpoints: round trips bit for bit, selection, pruning, damage. Kills and full disks: faults/test_files.py."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from posttrain import checkpoint
from posttrain.errors import CheckpointDamaged, PosttrainError

DTYPES = (np.float32, np.float64, np.float16, np.int64, np.int32, np.uint8, np.bool_)


def state(step: int) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, object]]:
    rng = np.random.default_rng(step)
    return ({"policy": {"w": rng.normal(size=(4, 3)).astype(np.float32), "b": rng.normal(size=3)},
             "replay": {"tokens": rng.integers(0, 99, 7)}},
            {"state": {"step": step, "coef": 0.1 + step}, "note": ["ü", None, True]})


def save(root: Path, step: int, keep: int = 0) -> Path:
    return checkpoint.save(root, step, *state(step), keep=keep)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def assert_equal(loaded: checkpoint.Checkpoint, step: int) -> None:
    groups, values = state(step)
    assert loaded.step == step
    assert loaded.values == values
    assert {g: set(loaded.arrays[g]) for g in loaded.arrays} == {g: set(groups[g]) for g in groups}
    for group, named in groups.items():
        for name, array in named.items():
            np.testing.assert_array_equal(loaded.arrays[group][name], array, strict=True)


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path / "ein Lauf é" / "checkpoints", 40)
    assert path.name == "step-000040"
    assert names(path) == ["manifest.json", "note.json", "policy.safetensors", "replay.safetensors", "state.json"]
    assert_equal(checkpoint.load(path), 40)
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_array_comes_back_bit_for_bit(tmp_path: Path, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    x = data.draw(arrays(dtype, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)))
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    y = checkpoint.load(checkpoint.save(tmp_path / "c", 1, {"g": {"x": x}}, {}, keep=0)).arrays["g"]["x"]
    assert (y.dtype, y.shape, y.tobytes()) == (x.dtype, x.shape, x.tobytes())  # NaN payloads and -0.0 included


def test_memory_layout_does_not_matter(tmp_path: Path) -> None:
    x = np.arange(24.0).reshape(4, 6)
    views = {"transposed": x.T, "strided": x[::2, 1::2], "reversed": x[::-1], "fortran": np.asfortranarray(x),
             "broadcast": np.broadcast_to(x[0], (3, 6)), "big_endian": x.astype(">f8"), "scalar": np.float64(2.5)}
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, {"g": views}, {}, keep=0)).arrays["g"]
    for name, view in views.items():
        np.testing.assert_array_equal(loaded[name], view)
        assert loaded[name].flags.writeable and loaded[name].dtype.isnative


@given(value=st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                          lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_comes_back(tmp_path: Path, value: object) -> None:
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    back = checkpoint.load(checkpoint.save(tmp_path / "c", 1, {}, {"v": value}, keep=0)).values["v"]
    assert repr(back) == repr(value)


def test_what_the_formats_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="texts.safetensors.*<U1"):
        checkpoint.save(tmp_path, 1, {"texts": {"x": np.array(["a"])}}, {}, keep=0)
    with pytest.raises(TypeError, match="state.json/weights: the key 3"):
        checkpoint.save(tmp_path, 1, {}, {"state": {"weights": {3: 1.0}}}, keep=0)
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoint.save(tmp_path, 1, {}, {"state": object()}, keep=0)
    for name in ("../escape", "a/b", ".hidden", "manifest"):
        with pytest.raises(ValueError, match="cannot be the name"):
            checkpoint.save(tmp_path, 1, {}, {name: 1}, keep=0)
    assert names(tmp_path) == []


def test_keep_prunes_the_oldest(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-000030", "step-000040"]
    save(tmp_path, 50, keep=1)
    assert names(tmp_path) == ["step-000050"]
    for step in (60, 70):
        save(tmp_path, step, keep=0)
    assert names(tmp_path) == ["step-000050", "step-000060", "step-000070"]


def test_steps_ahead_are_neither_counted_nor_deleted(tmp_path: Path) -> None:
    save(tmp_path, 40)
    save(tmp_path, 20, keep=1)
    save(tmp_path, 30, keep=1)
    assert names(tmp_path) == ["step-000030", "step-000040"]


def test_newest_goes_by_step_and_not_by_time(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "nowhere", fallback=False) is None
    for step in (999_999, 1_000_000, 20):
        os.utime(save(tmp_path, step), (step % 7, step % 7))
    assert checkpoint.newest(tmp_path, fallback=False) == tmp_path / "step-1000000"


def test_unpublished_is_never_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10)
    shutil.copytree(tmp_path / "step-000010", tmp_path / "step-000020")
    (tmp_path / "step-000020" / "manifest.json").unlink()
    shutil.copytree(tmp_path / "step-000010", tmp_path / ".stage-000030-1")
    with caplog.at_level(logging.INFO):
        assert checkpoint.newest(tmp_path, fallback=False) == tmp_path / "step-000010"
    assert "step-000020 has no manifest.json" in caplog.text
    save(tmp_path, 20)
    assert_equal(checkpoint.load(tmp_path / "step-000020"), 20)


def test_an_equal_step_is_left_and_another_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    before = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in path.iterdir()}
    assert save(tmp_path, 10) == path
    assert {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in path.iterdir()} == before
    with pytest.raises(PosttrainError, match=r"step-000010 already holds other content"):
        checkpoint.save(tmp_path, 10, *state(11), keep=0)
    assert names(tmp_path) == ["step-000010"]
    assert_equal(checkpoint.load(path), 10)


def flip(file: Path, position: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["manifest.json", "note.json", "policy.safetensors", "replay.safetensors",
                                  "state.json"])
def test_every_flipped_bit_is_found_and_named(tmp_path: Path, name: str) -> None:
    intact, newest = save(tmp_path, 10), save(tmp_path, 20)
    file = newest / name
    original = file.read_bytes()
    rng = np.random.default_rng(0)
    places = [(0, 0), (len(original) - 1, 7), *zip(rng.integers(0, len(original), 24), rng.integers(0, 8, 24))]
    for position, bit in places:
        flip(file, int(position), int(bit))
        for read in (checkpoint.load, checkpoint.verify):
            with pytest.raises(CheckpointDamaged, match=f"{name} .*\n.*resume.fallback=true"):
                read(newest)
        file.write_bytes(original)
    flip(file, 3)
    with pytest.raises(CheckpointDamaged, match=name) as caught:
        checkpoint.newest(tmp_path, fallback=False)
    assert caught.value.exit_code == 3
    assert checkpoint.newest(tmp_path, fallback=True) == intact


def test_damage_states_both_hashes(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    stated = json.loads((path / "manifest.json").read_text())["files"]["state.json"]["sha256"]
    flip(path / "state.json", 1)
    with pytest.raises(CheckpointDamaged, match=rf"has sha256 [0-9a-f]{{12}}\.\.\., its manifest states {stated[:12]}"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", ["manifest.json", "policy.safetensors", "state.json"])
def test_truncated_and_missing_files(tmp_path: Path, name: str) -> None:
    intact, newest = save(tmp_path, 10), save(tmp_path, 20)
    data = (newest / name).read_bytes()
    (newest / name).write_bytes(data[:-1])
    with pytest.raises(CheckpointDamaged, match=name):
        checkpoint.load(newest)
    assert checkpoint.newest(tmp_path, fallback=True) == intact
    (newest / name).unlink()
    with pytest.raises(CheckpointDamaged, match=f"{name} cannot be read: No such file"):
        checkpoint.load(newest)
    assert checkpoint.newest(tmp_path, fallback=True) == intact


def test_fallback_warns_and_fails_where_nothing_is_intact(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (10, 20):
        flip(save(tmp_path, step) / "state.json", 0)
    with pytest.raises(CheckpointDamaged, match="step-000020"):
        checkpoint.newest(tmp_path, fallback=True)
    assert "step-000010 is damaged" in caplog.text


def test_a_damaged_step_is_replaced_when_reached_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10)
    flip(save(tmp_path, 20) / "policy.safetensors", 30)
    assert checkpoint.newest(tmp_path, fallback=True) == tmp_path / "step-000010"
    assert_equal(checkpoint.load(save(tmp_path, 20, keep=2)), 20)
    assert "it is replaced" in caplog.text
    assert names(tmp_path) == ["step-000010", "step-000020"]


def test_a_later_format_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 10)
    monkeypatch.setattr(checkpoint, "FORMAT", 0)
    with pytest.raises(PosttrainError, match="has checkpoint format 1, written by posttrain"):
        checkpoint.load(path)


def test_a_copy_under_another_name_loads(tmp_path: Path) -> None:
    shutil.copytree(save(tmp_path / "c", 10), tmp_path / "best")
    assert_equal(checkpoint.load(tmp_path / "best"), 10)


def test_no_space_names_path_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    needed = sum(x.nbytes for group in state(20)[0].values() for x in group.values())
    with pytest.raises(PosttrainError, match=f"No space left(.|\n)*need {needed} bytes, the disk has [0-9]+ bytes"):
        save(tmp_path, 20)
    assert names(tmp_path) == ["step-000010"]


def test_a_path_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PosttrainError, match="was not saved in .*file/checkpoints: Not a directory"):
        save(tmp_path / "file" / "checkpoints", 10)


def test_tidy_spares_living_processes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint.tidy(tmp_path / "nowhere")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    save(tmp_path, 10)
    for name in (f".stage-000020-{dead.pid}", f".deleting-000005-{dead.pid}", f".stage-000020-{os.getpid()}",
                 f".stage-000020-{os.getppid()}", ".unrelated"):
        (tmp_path / name / "inner").mkdir(parents=True)
    with caplog.at_level(logging.INFO):
        checkpoint.tidy(tmp_path)
    assert names(tmp_path) == [f".stage-000020-{os.getppid()}", ".unrelated", "step-000010"]
    assert caplog.text.count("removed") == 3
