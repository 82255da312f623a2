"""MLflow: parameters, metrics, files, data sets, checkpoints and the trained policy of a run, through `delivery.py`.

Uses the client alone, with short retries; neither autologging nor MLflow's own asynchronous logging, which loses points
without a word. mlflow itself is imported in the thread that delivers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, final
from urllib.parse import quote, urlsplit, urlunsplit

import yaml

from posttrain.protocols import ObservedRun, TrackerSession
from posttrain.rundir import CONFIG, MANIFEST
from posttrain.trackers.delivery import Delivery, require
from posttrain.trackers.ledger import Ledger, Record, Status

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

NAME = "mlflow"

POLICY = "policy"
"""Folder of the trained policy in a run directory."""

KEY = "posttrain.key"
"""Tag by which a run is found whose making was not answered."""

PARENT = "posttrain.parent"
"""Tag by which a run is found that others are shown under: its name, without the quotes that no search can hold."""

SOURCE = {"mlflow.source.name": "posttrain", "mlflow.source.type": "LOCAL"}
"""Tags of every run that is made here."""

MARKER = "timing/seconds"
"""Metric that every record has: its history tells which steps have arrived. Sent last of a record."""

MOST_METRICS, MOST_PARAMS, LONGEST_VALUE = 1000, 100, 6000
"""MLflow's limits: metrics and parameters of one call, characters of a parameter."""

SYSTEM = {"timing/memory_mb": "system/process_memory_megabytes",
          "timing/cpu_percent": "system/process_cpu_percentage"}
"""Metrics that MLflow's page of system metrics shows when they have such a name."""

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the courier tries again by itself, later
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # a server that has just started needs many seconds
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""What the user has not set is set in this process."""

STATUS: Mapping[Status, str] = {"running": "RUNNING", "finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}

KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Tag by which MLflow's pages show charts of training, and not of conversations."""


@final
@dataclass(frozen=True, slots=True)
class Mlflow:
    """Sends the run to an MLflow tracking server, or into a SQLite file beside the run directory.

    `mlflow ui --backend-store-uri sqlite:///RUNS/mlflow.db` shows the latter. A server that is down, slow or hanging
    neither slows the run nor loses a point; `posttrain sync RUN` sends what did not arrive.

    >>> Mlflow(experiment="sums").experiment
    'sums'
    """

    tracking_uri: str = ""
    """Empty takes `MLFLOW_TRACKING_URI`, and without that `mlflow.db` in the folder that holds the run directory."""
    experiment: str = "posttrain"
    """Made where it does not exist."""
    run_name: str = ""
    """Empty takes the name of the run directory."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Further tags of the run."""
    parent: str = ""
    """Name of a run of the experiment that this one is shown under; made where it does not exist. Runs that name the
    same one share it, wherever they are, and a run that is there already keeps the one that it was made with."""
    system_metrics: bool = True
    """Also show memory and CPU of the training process among MLflow's system metrics."""
    register_as: str = ""
    """Name in the model registry for the policy of a finished run; empty registers nothing. No weights are copied:
    the registered model points to the folder in the run directory."""
    finish_timeout: float = 10.0
    """Seconds to wait at the end of the run for what has not arrived."""

    def __post_init__(self) -> None:
        require(NAME, "mlflow")
        if _is_sqlite(self.tracking_uri or _environment_uri()):
            require(NAME, "sqlalchemy", "alembic")
        if urlsplit(self.tracking_uri).password:
            raise ValueError("tracking_uri holds a password, which would be written to the run directory; set "
                             "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment")
        if not self.experiment:
            raise ValueError("experiment must not be empty")
        if self.finish_timeout < 0:
            raise ValueError(f"finish_timeout must not be negative, got {self.finish_timeout}")

    def start(self, run: ObservedRun) -> TrackerSession:
        """Starts the thread that delivers; connects to nothing by itself."""
        return Delivery(NAME, self, run)

    def settled(self, directory: Path) -> Mlflow:
        uri = self.tracking_uri or _without_password(_environment_uri()) or (
            f"sqlite:///{directory.resolve().parent / 'mlflow.db'}")
        if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
            uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
        return replace(self, tracking_uri=uri)

    def place(self) -> str:
        return f"{self.tracking_uri} (experiment {self.experiment})"

    def fields(self) -> Mapping[str, object]:
        return asdict(self)

    def connect(self, directory: Path, ledger: Ledger) -> _MlflowRun:
        """Finds the run by its identity or its key, or makes it; then says what it is and what it learns from."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if _is_sqlite(self.tracking_uri):
            _make_store(Path(self.tracking_uri.removeprefix("sqlite:///")))
        from mlflow import MlflowClient

        uri = self.tracking_uri
        uri = _environment_uri() if _without_password(_environment_uri()) == uri else uri
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        experiment = _experiment(client, self.tracking_uri, self.experiment)
        run = _found(client, experiment, ledger) or _made(client, experiment, self, directory, ledger)
        if ledger.status == "running" and run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
        _describe(client, run, directory)
        return _MlflowRun(client, run, self, directory)


@final
class _MlflowRun:
    """The sink: one run at a tracking server."""

    def __init__(self, client: MlflowClient, run: Run, tracker: Mlflow, directory: Path) -> None:
        self._client, self._tracker, self._directory = client, tracker, directory
        self._id, self._experiment = run.info.run_id, run.info.experiment_id

    @property
    def remote(self) -> str:
        return str(self._id)

    def last_step(self) -> int | None:
        history = self._client.get_metric_history(self._id, key(MARKER))
        return max((point.step for point in history), default=-1)

    def deliver(self, records: Sequence[Record]) -> None:
        """A step is there whole or not at all, since its metrics go in one call; equal points again are one point."""
        from mlflow.entities import Metric

        points = list[Any]()
        for record in records:
            stamp = round(1000 * record.time)
            metrics = [Metric(name, value, stamp, record.step) for name, value in self._named(record)]
            if points and len(points) + len(metrics) > MOST_METRICS:
                self._client.log_batch(self._id, metrics=points, synchronous=True)
                points = []
            points += metrics
        for first in range(0, len(points), MOST_METRICS):
            self._client.log_batch(self._id, metrics=points[first:first + MOST_METRICS], synchronous=True)

    def _named(self, record: Record) -> Iterator[tuple[str, float]]:
        for name, value in sorted(record.metrics.items(), key=lambda item: item[0] == MARKER):
            if name in SYSTEM and self._tracker.system_metrics:
                yield SYSTEM[name], value
            yield key(name), value

    def attach(self, file: Path) -> None:
        self._client.log_artifact(self._id, str(file))

    def checkpoint(self, step: int, path: Path) -> None:
        self._model(path.name.replace("step", "checkpoint"), step, path)

    def close(self, status: Status, time: float) -> None:
        policy = self._directory / POLICY
        if status == "finished" and policy.is_dir():
            model = self._model(POLICY, self.last_step() or 0, policy)
            if self._tracker.register_as:
                self._register(self._tracker.register_as, model)
        self._client.set_terminated(self._id, STATUS[status], end_time=round(1000 * time) or None)

    def _model(self, name: str, step: int, path: Path) -> Any:
        """A logged model that points to a folder; the one of that name where there is one already."""
        from mlflow.entities import LoggedModelOutput
        from mlflow.models.model import MLMODEL_FILE_NAME
        from mlflow.models.utils import get_external_mlflow_model_spec
        from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

        found = self._client.search_logged_models(
            [self._experiment], filter_string=f"name = '{name}' AND source_run_id = '{self._id}'")
        ready = [model for model in found if model.status == "READY"]
        if ready:
            return ready[0]
        model = self._client.create_logged_model(
            self._experiment, name=name, source_run_id=self._id, params={"step": str(step)},
            tags={MLFLOW_MODEL_IS_EXTERNAL: "true", "posttrain.path": str(path.resolve())})
        with tempfile.TemporaryDirectory() as folder:  # the registry asks for this file
            get_external_mlflow_model_spec(model).save(str(Path(folder, MLMODEL_FILE_NAME)))
            self._client.log_model_artifacts(model.model_id, folder)
        self._client.log_outputs(self._id, [LoggedModelOutput(model.model_id, step)])
        return self._client.finalize_logged_model(model.model_id, "READY")

    def _register(self, name: str, model: Any) -> None:
        """A new version of a registered model, unless this model is one already."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = self._client.search_model_versions(f"name = '{name}'")
        if not any(version.run_id == self._id for version in versions):
            self._client.create_model_version(name, source=model.artifact_location, run_id=self._id,
                                              tags=model.tags, await_creation_for=0)


def key(name: str) -> str:
    """A name with the characters that MLflow takes.

    >>> key("reward/pass@1 [held out]")
    'reward/pass_1 _held out_'
    """
    return re.sub(r"[^\w\-./: ]", "_", name, flags=re.ASCII)[:250]


def flattened(tree: object, prefix: str = "") -> dict[str, str]:
    """Leaves of a configuration by dotted key; lists as JSON.

    >>> flattened({"kl": {"coef": 0.1, "use": None}, "stop": ["a"]})
    {'kl.coef': '0.1', 'kl.use': 'None', 'stop': '["a"]'}
    """
    if isinstance(tree, Mapping) and (tree or not prefix):
        return {name: value for part, below in tree.items()
                for name, value in flattened(below, f"{prefix}.{part}" if prefix else str(part)).items()}
    return {prefix: json.dumps(tree, default=str) if isinstance(tree, list | Mapping) else str(tree)}


def _environment_uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI", "")


def _is_sqlite(uri: str) -> bool:
    return not uri or uri.startswith("sqlite:")


def _without_password(uri: str) -> str:
    """
    >>> _without_password("https://me:secret@host:5000/x")
    'https://host:5000/x'
    """
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts.password else uri


def _make_store(path: Path) -> None:
    """A new SQLite file, whole or not at all: one whose migrations were interrupted is of no use to MLflow."""
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # each migration is a line otherwise
    if path.exists():
        return
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".mlflow-") as folder:
        made = Path(folder, path.name)
        MlflowClient(tracking_uri=f"sqlite:///{made}", registry_uri=f"sqlite:///{made}").search_experiments()
        with suppress(FileExistsError):  # another process was faster
            os.link(made, path)


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    """Identity of the experiment; a new one in a SQLite file keeps its artifacts beside that file."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    beside = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / re.sub(r"\W", "_", name)
    try:
        return str(client.create_experiment(
            name, artifact_location=beside.as_uri() if _is_sqlite(uri) else None, tags=KIND))
    except MlflowException as error:
        made = client.get_experiment_by_name(name)  # by another process in this moment
        if error.error_code != "RESOURCE_ALREADY_EXISTS" or made is None:
            raise
        return str(made.experiment_id)


def _found(client: MlflowClient, experiment: str, ledger: Ledger) -> Run | None:
    """The run that the ledger names, or the one with its key; None where there is none (any more)."""
    from mlflow.exceptions import MlflowException

    if ledger.remote:
        try:
            run = client.get_run(ledger.remote)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        else:
            return run if run.info.lifecycle_stage == "active" else None
    return next(iter(client.search_runs([experiment], filter_string=f"tags.`{KEY}` = '{ledger.key}'")), None)


def _made(client: MlflowClient, experiment: str, tracker: Mlflow, directory: Path, ledger: Ledger) -> Run:
    manifest = json.loads((directory / MANIFEST).read_text("utf-8"))
    started = manifest.get("started")
    tags = {**SOURCE, KEY: ledger.key,
            "posttrain.version": str(manifest.get("posttrain")), "posttrain.directory": str(directory.resolve()),
            **{str(name): str(value) for name, value in tracker.tags.items()}}
    if tracker.parent:
        tags["mlflow.parentRunId"] = _parent(client, experiment, tracker.parent)
    return client.create_run(experiment, run_name=tracker.run_name or directory.resolve().name, tags=tags,
                             start_time=round(1000 * datetime.fromisoformat(started).timestamp()) if started else None)


def _parent(client: MlflowClient, experiment: str, name: str) -> str:
    """Identity of the run of that name that others are shown under, made where there is none; the oldest of several.
    It holds no metrics, so it has ended."""
    def by_age() -> Sequence[Run]:
        return client.search_runs([experiment], filter_string=f"tags.`{PARENT}` = '{quote(name)}'",
                                  order_by=["attributes.start_time ASC"])

    found = by_age()
    if not found:
        made = client.create_run(experiment, run_name=name, tags={**SOURCE, PARENT: quote(name)})
        found = by_age() or [made]  # another process may have made one in this moment
    for run in found:
        if run.info.status != "FINISHED":  # also one whose making was not answered
            client.set_terminated(run.info.run_id)
    return str(found[0].info.run_id)


def _describe(client: MlflowClient, run: Run, directory: Path) -> None:
    """The configuration as parameters, those that are not there yet: MLflow refuses to change one. And the data."""
    from mlflow.entities import Param

    tree = yaml.safe_load((directory / CONFIG).read_text("utf-8")) or {}
    values = {key(name): value[:LONGEST_VALUE] for name, value in flattened(tree).items()}
    params = [Param(name, value) for name, value in values.items() if name not in run.data.params]
    for first in range(0, len(params), MOST_PARAMS):
        client.log_batch(run.info.run_id, params=params[first:first + MOST_PARAMS], synchronous=True)
    if tree.get("task") and not (run.inputs and run.inputs.dataset_inputs):
        client.log_inputs(run.info.run_id, _datasets(tree["task"]))


def _datasets(task: object) -> list[Any]:
    """Files that the task names, each with the first half of its SHA-256 (MLflow keeps 36 characters); a task without
    files by its own configuration."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    fields = task if isinstance(task, Mapping) else {"use": task}
    files = {name: Path(value) for name, value in fields.items() if isinstance(value, str) and Path(value).is_file()}
    text = json.dumps(fields, sort_keys=True, default=str)
    found = [(path.name, _digest(path), str(path), name) for name, path in files.items()]
    found = found or [(str(fields.get("use")), hashlib.sha256(text.encode()).hexdigest()[:32], text, "task")]
    return [DatasetInput(Dataset(name=name, digest=digest, source_type="posttrain", source=source),
                         [InputTag("mlflow.data.context", context)]) for name, digest, source, context in found]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
