"""MLflow on its SQLite store, Weights & Biases offline, TensorBoard's event files, and `posttrain sync`."""

import json
import math
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from needed import first_party
from posttrain import checkpoint, trackers
from posttrain.cli import main
from posttrain.errors import ConfigError, PluginError
from posttrain.registry import discover
from posttrain.rundir import RunDirectory
from posttrain.trackers import delivery
from posttrain.trackers import mlflow as ours
from posttrain.trackers.delivery import Courier
from posttrain.trackers.ledger import Status, ledgers
from posttrain.trackers.mlflow import Mlflow
from posttrain.trackers.sync import sync
from posttrain.trackers.tensorboard import TensorBoard, events
from posttrain.trackers.wandb import Wandb

# SQLAlchemy 2.1 deprecates a strategy that MLflow 3.17 uses in every query.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

CONFIG = """\
recipe: grpo
steps: 9
stop: [a, b]
task: {use: rows, path: %s}
kl: {use: adaptive, coef: 0.1}
"""


@dataclass
class Run:
    directory: Path
    steps: int = 9
    loop: str = "rl"
    output: str = "quiet"


@pytest.fixture(autouse=True)
def no_server_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "WANDB_"))]:
        monkeypatch.delenv(name)
    for name, value in ours.ENVIRONMENT.items():  # so that what a connection sets is taken back
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "cache"))


@pytest.fixture
def files(tmp_path: Path) -> Iterator[RunDirectory]:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "1+1="}\n')
    manifest = {"posttrain": "0.1.0", "started": "2026-01-02T03:04:05+00:00"}
    with RunDirectory.create(tmp_path / "runs" / "one", config=CONFIG % data, manifest=manifest) as opened:
        yield opened


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database: making one takes seconds, so all tests copy this one."""
    mlflow, _ = pytest.importorskip("mlflow"), pytest.importorskip("sqlalchemy")
    path = tmp_path_factory.mktemp("store") / "empty.db"
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{path}", registry_uri=f"sqlite:///{path}")
    client.search_experiments()
    return path


@pytest.fixture
def store(empty_store: Path, files: RunDirectory) -> Any:
    """A client of the database beside the run."""
    from mlflow import MlflowClient

    path = files.path.parent / "mlflow.db"
    shutil.copy(empty_store, path)
    return MlflowClient(tracking_uri=f"sqlite:///{path}", registry_uri=f"sqlite:///{path}")


def write(files: RunDirectory, steps: range, clock: float = 1000.0) -> None:
    for step in steps:
        files.append_metrics(step, {
            "x": step / 3, "pass@1 [held out]": 0.5, "odd": math.inf if step == 2 else 1.0, "timing/seconds": 0.5,
            "timing/memory_mb": 7.0, "timing/cpu_percent": 90.0, "timing/unix_time": clock + step})


def bring(tracker: delivery.Remote, name: str, files: RunDirectory, status: Status = "running") -> int:
    courier = Courier(name, tracker, files.path)
    courier.told(status)
    return courier.bring(status)


def points(client: Any, run: str, metric: str) -> list[tuple[int, float, int]]:
    return sorted((p.step, p.value, p.timestamp) for p in client.get_metric_history(run, metric))


def only_run(client: Any) -> Any:
    experiment = client.get_experiment_by_name("posttrain")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development", "its pages show training"
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def test_mlflow_has_the_whole_run(files: RunDirectory, store: Any) -> None:
    write(files, range(0, 9))
    files.append_samples(1, [{"prompt": "p", "completion": "c"}])
    checkpoint.save(files.checkpoints, 4, {"policy": {"w": np.ones(2)}}, {}, keep=0)
    (files.path / "policy").mkdir()
    tracker = Mlflow(register_as="sums", tags={"team": "a"})
    session = trackers.start({"mlflow": tracker}, Run(files.path))
    write(files, range(9, 10))
    session.step_finished(9, {})
    session.finished(None)
    run = only_run(store)
    assert (run.info.status, run.info.run_name, run.info.end_time) == ("FINISHED", "one", 1009000)
    assert run.info.start_time == 1767323045000
    assert points(store, run.info.run_id, "x") == [(s, s / 3, 1000000 + 1000 * s) for s in range(10)]
    assert points(store, run.info.run_id, "pass_1 _held out_")[0] == (0, 0.5, 1000000)
    assert points(store, run.info.run_id, "nonfinite/odd") == [(2, 1.0, 1002000)]
    assert [s for s, _, _ in points(store, run.info.run_id, "odd")] == [0, 1, *range(3, 10)]
    assert points(store, run.info.run_id, "system/process_cpu_percentage")[3] == (3, 90.0, 1003000)
    assert len(points(store, run.info.run_id, "system/process_memory_megabytes")) == 10
    assert run.data.params["kl.coef"] == "0.1" and run.data.params["stop"] == '["a", "b"]'
    assert run.data.tags["team"] == "a" and run.data.tags["posttrain.directory"] == str(files.path)
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.tags[0].value) == ("rows.jsonl", "path") and len(data.dataset.digest) == 32
    there = {file.path for file in store.list_artifacts(run.info.run_id)}
    assert there == {"config.yaml", "manifest.json", "samples.jsonl"}
    models = {m.name: m for m in store.search_logged_models([run.info.experiment_id])}
    assert set(models) == {"checkpoint-000004", "policy"}
    assert models["checkpoint-000004"].params == {"step": "4"} and models["policy"].params == {"step": "9"}
    assert models["policy"].tags["posttrain.path"] == str(files.path / "policy")
    (version,) = store.search_model_versions("name = 'sums'")
    assert version.run_id == run.info.run_id and version.source == models["policy"].artifact_location
    assert not (Path.cwd() / "mlflow.db").exists() and not (Path.cwd() / "mlruns").exists()


def test_mlflow_goes_on_with_the_same_run(files: RunDirectory, store: Any) -> None:
    """After a resume, and after a kill that left the ledger behind: no point twice, not even with another time."""
    tracker = Mlflow()
    write(files, range(0, 7))
    assert bring(tracker, "mlflow", files, "failed") == 7
    first = only_run(store)
    assert first.info.status == "FAILED"
    files.truncate_after(4)
    write(files, range(5, 10), clock=5000.0)
    assert bring(tracker, "mlflow", files) == 3
    assert only_run(store).info.status == "RUNNING"
    (ledger,) = ledgers(files.path)
    (files.path / "tracking").joinpath(ledger.path(files.path).name).unlink()
    ledger.__class__(ledger.tracker, ledger.fields, ledger.place, ledger.key).save(files.path)  # only the key is left
    assert bring(tracker, "mlflow", files, "killed") == 0
    run = only_run(store)
    assert run.info.run_id == first.info.run_id and run.info.status == "KILLED"
    assert points(store, run.info.run_id, "x") == [
        (s, s / 3, (1000 if s < 7 else 5000) * 1000 + 1000 * s) for s in range(10)]


def test_mlflow_resumed_with_other_settings_keeps_its_parameters(files: RunDirectory, store: Any) -> None:
    bring(Mlflow(), "mlflow", files)
    text = (files.path / "config.yaml").read_text()
    (files.path / "config.yaml").write_text(text.replace("0.1", "0.2") + "seed: 3\n")
    bring(Mlflow(), "mlflow", files)
    params = only_run(store).data.params
    assert params["kl.coef"] == "0.1" and params["seed"] == "3"


def test_a_deleted_mlflow_run_is_made_anew(files: RunDirectory, store: Any) -> None:
    write(files, range(0, 3))
    bring(Mlflow(), "mlflow", files)
    deleted = only_run(store).info.run_id
    store.delete_run(deleted)
    assert bring(Mlflow(), "mlflow", files) == 3
    assert only_run(store).info.run_id != deleted


def another(files: RunDirectory, name: str) -> RunDirectory:
    """A second run beside the first."""
    config, manifest = (files.path / "config.yaml").read_text(), json.loads((files.path / "manifest.json").read_text())
    return RunDirectory.create(files.path.parent / name, config=config, manifest=manifest)


def parents(client: Any) -> list[Any]:
    experiment = client.get_experiment_by_name("posttrain")
    return list(client.search_runs([experiment.experiment_id], filter_string=f"tags.`{ours.PARENT}` LIKE '%'"))


def children(client: Any, parent: Any) -> list[str]:
    """Names of the runs that MLflow shows under it."""
    found = client.search_runs([parent.info.experiment_id],
                               filter_string=f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    return sorted(run.info.run_name for run in found)


@pytest.mark.parametrize("name", ["front", "it's a \"front\" of 50% ü"])
def test_mlflow_shows_runs_under_their_parent(name: str, files: RunDirectory, store: Any) -> None:
    """One parent, also after a resume that names another one, and where only the key is left of a ledger."""
    tracker = Mlflow(parent=name)
    write(files, range(0, 3))
    bring(tracker, "mlflow", files, "failed")
    with another(files, "two") as second:
        write(second, range(0, 3))
        bring(tracker, "mlflow", second, "finished")
    write(files, range(3, 5))
    bring(Mlflow(parent="other"), "mlflow", files)
    (ledger,) = ledgers(files.path)
    ledger.__class__(ledger.tracker, ledger.fields, ledger.place, ledger.key).save(files.path)
    bring(tracker, "mlflow", files, "finished")
    (parent,) = parents(store)
    assert (parent.info.run_name, parent.info.status, parent.data.metrics) == (name, "FINISHED", {})
    assert ours.KEY not in parent.data.tags and parent.info.end_time
    assert children(store, parent) == ["one", "two"]
    assert len(store.search_runs([parent.info.experiment_id])) == 3
    files.close()
    write(reopened := RunDirectory.open(files.path), range(5, 6))
    reopened.close()
    (sent,) = sync(files.path, [], {}, discover())
    assert (sent.records, sent.error) == (1, "") and len(store.search_runs([parent.info.experiment_id])) == 3


@pytest.mark.parametrize("broken", ["set_terminated", "create_run"])
def test_a_server_that_dies_while_a_parent_is_made(
        broken: str, files: RunDirectory, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the parent has ended, or before its first child is made: the next connection goes on with it."""
    real = getattr(type(store), broken)

    def dies(client: Any, *arguments: Any, **named: Any) -> Any:
        if broken == "create_run" and "mlflow.parentRunId" not in named["tags"]:
            return real(client, *arguments, **named)
        raise ConnectionError("the server died")

    write(files, range(0, 3))
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(type(store), broken, dies)
        bring(Mlflow(parent="front"), "mlflow", files)
    (parent,) = parents(store)
    assert children(store, parent) == []
    assert bring(Mlflow(parent="front"), "mlflow", files) == 3
    (same,) = parents(store)
    assert same.info.run_id == parent.info.run_id and same.info.status == "FINISHED"
    assert children(store, same) == ["one"]


def test_of_several_mlflow_parents_the_oldest_is_taken_and_no_deleted_one(files: RunDirectory, store: Any) -> None:
    """Two processes may make one at once."""
    bring(Mlflow(), "mlflow", files)
    experiment = store.get_experiment_by_name("posttrain").experiment_id
    _, oldest, deleted = [store.create_run(experiment, start_time=time, tags={ours.PARENT: "front"})
                          for time in (3, 2, 1)]
    store.delete_run(deleted.info.run_id)
    with another(files, "two") as second:
        bring(Mlflow(parent="front"), "mlflow", second)
    assert [run.info.status for run in parents(store)] == 2 * ["FINISHED"] and children(store, oldest) == ["two"]


def test_a_record_larger_than_mlflow_takes_at_once(files: RunDirectory, store: Any) -> None:
    for step in range(2):
        files.append_metrics(step, {**{f"m/{i}": float(i) for i in range(1500)}, "timing/seconds": 1.0})
    assert bring(Mlflow(), "mlflow", files) == 2
    run = only_run(store)
    assert len(run.data.metrics) == 1501 and len(points(store, run.info.run_id, "m/1499")) == 2


def test_a_new_store_is_there_whole_or_not_at_all(files: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted migrations would leave a database that MLflow refuses for ever."""
    mlflow = pytest.importorskip("mlflow")
    real = mlflow.MlflowClient.search_experiments

    def killed(client: Any) -> None:
        real(client)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mlflow.MlflowClient, "search_experiments", killed)
        bring(Mlflow(), "mlflow", files)
    assert list(files.path.parent.glob("*mlflow*")) == []
    write(files, range(0, 3))
    assert bring(Mlflow(), "mlflow", files) == 3
    assert [path.name for path in files.path.parent.glob("*mlflow*")] == ["mlflow.db"]


@pytest.mark.needs("mlflow")
def test_mlflow_place(files: RunDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Mlflow().settled(files.path).tracking_uri == f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    monkeypatch.chdir(tmp_path)
    assert Mlflow(tracking_uri="sqlite:///x.db").settled(files.path).tracking_uri == f"sqlite:///{tmp_path / 'x.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host:1/a")
    assert Mlflow().settled(files.path).place() == "http://host:1/a (experiment posttrain)"
    assert Mlflow(tracking_uri="http://host:2").settled(files.path).tracking_uri == "http://host:2"
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD"):
        Mlflow(tracking_uri="http://me:secret@host:1")


@first_party
@pytest.mark.parametrize(("name", "package"), [
    ("mlflow", "mlflow"), ("wandb", "wandb"), ("tensorboard", "tensorboard"), ("mlflow", "sqlalchemy")])
def test_a_missing_package_is_named_when_the_configuration_is_checked(
        name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = find_spec("json")  # so that the others are found wherever this runs
    monkeypatch.setattr(delivery, "find_spec", lambda wanted: None if wanted == package else there)
    with pytest.raises(ConfigError) as caught:
        discover().create("tracker", name)
    assert (f"tracker '{name}' needs {package}, which is not installed: pip install 'posttrain-core[{name}]'"
            in str(caught.value))


def test_tensorboard_has_the_run_once(files: RunDirectory) -> None:
    pytest.importorskip("tensorboard")
    tracker = TensorBoard()
    write(files, range(0, 7))
    bring(tracker, "tensorboard", files, "killed")
    files.truncate_after(4)
    write(files, range(5, 10))
    (ledger,) = ledgers(files.path)
    ledger.path(files.path).unlink()  # the event files themselves tell what they hold
    bring(tracker, "tensorboard", files, "finished")
    found = list(events(files.path / "tensorboard" / "one"))
    scalars = [(e.step, v.tag, v.simple_value or v.tensor.float_val[0], e.wall_time) for e in found
               for v in e.summary.value if v.tag == "x"]
    assert scalars == [(s, "x", pytest.approx(s / 3), 1000.0 + s) for s in range(10)]
    (text,) = {v.tensor.string_val[0] for e in found for v in e.summary.value if v.tag == "config"}
    assert b"    steps: 9" in text


def offline_records(files: RunDirectory) -> list[Any]:
    """What the files hold that `wandb sync` uploads."""
    from wandb.proto import wandb_internal_pb2

    records = []
    for path in sorted((files.path / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in logged(path.read_bytes()):
            record: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined]  # made at run time by protobuf
            record.ParseFromString(data)
            records.append(record)
    return records


def logged(file: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log: blocks of 32 KiB, fragments of (CRC, 4 bytes; length, 2; kind, 1; data), where kind is
    1 for whole, 2 first, 3 middle and 4 last. wandb puts seven bytes of its own in front of the first block's."""
    position, parts = 7, b""
    while position + 7 <= len(file):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", file, position + 4)
        parts = (b"" if kind in (1, 2) else parts) + file[position + 7:position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield parts


def test_wandb_offline_has_the_run_once(files: RunDirectory) -> None:
    pytest.importorskip("wandb")
    tracker = Wandb(mode="offline", tags=("a",), finish_timeout=30.0)
    write(files, range(0, 7))
    session = trackers.start({"wandb": tracker}, Run(files.path))
    session.finished(KeyboardInterrupt())
    files.truncate_after(4)
    write(files, range(5, 10))
    assert bring(tracker, "wandb", files, "finished") == 3
    records = offline_records(files)
    rows = [{i.nested_key[0] if i.nested_key else i.key: json.loads(i.value_json) for i in r.history.item}
            for r in records if r.HasField("history")]
    assert [(row["_step"], row["x"], row["_timestamp"]) for row in rows] == [
        (s, pytest.approx(s / 3), 1000.0 + s) for s in range(10)]
    runs = {(r.run.run_id, r.run.project, r.run.display_name) for r in records if r.HasField("run")}
    assert runs == {(ledgers(files.path)[0].key, "posttrain", "one")}
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [143, 0]


@pytest.mark.needs("wandb")
def test_wandb_disabled_starts_nothing(files: RunDirectory) -> None:
    session = Wandb(mode="disabled").start(Run(files.path))
    session.finished(None)
    assert ledgers(files.path) == []


def test_sync_sends_a_run_afterwards_and_only_once(files: RunDirectory, store: Any,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    write(files, range(0, 10))
    files.close()
    assert main(["sync", str(files.path), "mlflow", "run_name=later"]) == 0
    run = only_run(store)
    assert run.info.status == "FINISHED" and run.info.run_name == "later"
    assert len(points(store, run.info.run_id, "x")) == 10
    assert main(["sync", str(files.path)]) == 0
    place = f"sqlite:///{files.path.parent / 'mlflow.db'} (experiment posttrain)"
    assert capsys.readouterr().out == (f"mlflow: 10 records sent to {place}\nmlflow: 0 records sent to {place}\n")
    assert len(points(store, run.info.run_id, "x")) == 10


def test_sync_of_a_run_that_was_killed_says_so(files: RunDirectory, store: Any) -> None:
    write(files, range(0, 4))
    files.close()
    (sent,) = sync(files.path, ["mlflow"], {}, discover())
    assert (sent.tracker, sent.records, sent.error) == ("mlflow", 4, "")
    assert only_run(store).info.status == "KILLED"


@pytest.mark.needs("mlflow")
def test_sync_refuses_clearly(files: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    registry = discover()
    assert main(["sync", str(files.path)]) == 2 and "in use by process" in capsys.readouterr().err
    files.close()
    with pytest.raises(ConfigError, match="has no remote tracker; name one: posttrain sync .* mlflow"):
        sync(files.path, [], {}, registry)
    with pytest.raises(ConfigError, match="tracker 'console' keeps nothing that could be sent"):
        sync(files.path, ["console"], {}, registry)
    with pytest.raises(PluginError, match="did you mean 'mlflow'"):
        sync(files.path, ["mlfow"], {}, registry)
    with pytest.raises(ConfigError, match="experimant"):
        sync(files.path, ["mlflow"], {"experimant": "x"}, registry)
    write(files_again := RunDirectory.open(files.path), range(0, 2))
    files_again.close()
    assert main(["sync", str(files.path), "mlflow", "tracking_uri=http://127.0.0.1:1"]) == 1
    shown = capsys.readouterr()
    assert "mlflow: 0 records sent to http://127.0.0.1:1" in shown.out
    assert "mlflow does not take records at http://127.0.0.1:1" in shown.err
    assert f"try again: posttrain sync {files.path}" in shown.err
