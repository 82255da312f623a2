"""The life of a run: start or resume it, go through its steps, record each, save, stop when asked.

Knows files, signals and the order of records; what one iteration does is in `trainer.py` and `supervised.py`.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from posttrain import checkpoint, config, state, supervised, trackers, trainer
from posttrain.compose import build, initial_state, open_task, reward_workers
from posttrain.data import FINISH, Metrics, Prompt, Rollouts
from posttrain.errors import ConfigError, PosttrainError
from posttrain.fitting import check
from posttrain.loss import REFERENCE_KL
from posttrain.named import distribution_of
from posttrain.profiling import FILE as MEMORY
from posttrain.profiling import Profile
from posttrain.progress import doing
from posttrain.protocols import TrackerSession
from posttrain.registry import Broken, Registry, discover
from posttrain.report.page import write_page
from posttrain.rundir import CONFIG, REPORT, RunDirectory, describe, require_run
from posttrain.schema import Settings
from posttrain.state import RunState
from posttrain.steps import episode_rewards
from posttrain.tasks.rows import Rows, write_rows
from posttrain.timing import Phases
from posttrain.trainer import SUM, Parts, resynced, synced

log = logging.getLogger(__name__)

POLICY = "policy"
"""Folder of a finished run that `policy: {weights: RUN/policy}` loads."""

Output = Literal["auto", "plain", "json", "quiet"]
Advance = Callable[[Parts, Settings, RunState, Phases], tuple[RunState, Metrics, Rollouts]]
Assess = Callable[[Parts, Settings, Phases], tuple[Metrics, Rollouts | None]]

LOOPS: Mapping[str, tuple[Advance, Assess]] = {
    "rl": (trainer.iterate, trainer.evaluate),
    "supervised": (supervised.iterate, supervised.evaluate_supervised),
}


class Interrupted(PosttrainError):
    """SIGTERM or Ctrl-C: the step was finished and saved."""

    exit_code = 143


@dataclass
class Run:
    """A run as hooks, trackers and callers see it."""

    directory: Path
    settings: Settings
    state: RunState
    output: Output = "auto"

    @property
    def steps(self) -> int:
        return self.settings.steps

    @property
    def loop(self) -> str:
        return self.settings.loop


def train(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, registry: Registry | None = None,
          output: Output = "auto") -> Run:
    """Train from a config file or a dict; returns the finished run.

    Raises an `InputError` with everything wrong at once before anything heavy is loaded, `RunInUse` where another
    process writes the same directory, `Interrupted` after SIGTERM (the step is saved).
    """
    loaded = config.load(Path(source) if isinstance(source, str) else source, overrides, registry or discover())
    check(loaded)
    opened = open_task(loaded.settings)  # every malformed row is reported before a directory is made
    path = run_path(loaded)
    rows = loaded.settings.task.given() if isinstance(loaded.settings.task, Rows) else {}
    text = config.to_yaml(loaded, {key: str(path.resolve() / f"{key}.jsonl") for key in rows})
    with (RunDirectory.create(path, config=text, manifest=manifest(loaded)) as files,
          reward_workers(loaded.settings) as workers):  # first: they load their rewards while the models load
        for key, given in rows.items():  # rows handed over from Python become files, so that the config runs again
            write_rows(path / f"{key}.jsonl", given)
        profile = profile_of(loaded.settings)
        with (profile or nullcontext)("load"):
            parts = build(loaded, workers, opened)
        run = Run(files.path, loaded.settings, initial_state(parts, loaded.settings), output)
        run.state = synced(parts, run.settings, run.state)
        return _go(run, parts, files, loaded.registry, profile)


def resume(directory: str | Path, overrides: Sequence[str] = (), *, registry: Registry | None = None,
           output: Output = "auto") -> Run:
    """Go on from the newest checkpoint of a run; on the CPU, with equal threads, bit for bit as if never stopped.

    Raises `CheckpointDamaged` (exit code 3) where the newest checkpoint is damaged and `resume.fallback` is false.
    """
    with RunDirectory.open(Path(directory)) as files:
        loaded = config.load(files.path / CONFIG, overrides, registry or discover())
        files.differences(manifest(loaded))
        checkpoint.tidy(files.checkpoints)
        found = checkpoint.newest(files.checkpoints, fallback=loaded.settings.resume.fallback)
        with reward_workers(loaded.settings) as workers:
            profile = profile_of(loaded.settings)
            with (profile or nullcontext)("load"):
                parts = build(loaded, workers)
            run = Run(files.path, loaded.settings, initial_state(parts, loaded.settings), output)
            if found is None:
                run.state = synced(parts, run.settings, run.state)
            else:
                with doing("loading the checkpoint"):
                    restore(run, parts, checkpoint.load(found))
            files.truncate_after(run.state.step if found else -1)
            return _go(run, parts, files, loaded.registry, profile)


def evaluate(directory: str | Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Rewards on the held-out prompts with the newest checkpoint of a run, by metric name."""
    run, parts = opened(directory, overrides)
    with parts.workers, doing("evaluating"):
        metrics, _ = LOOPS[run.loop][1](parts, run.settings, Phases(time.perf_counter))
    if not metrics:
        raise ConfigError(["this run has no held-out rows and rewards to evaluate with (task.held_out, rewards)"])
    return metrics.values_by_name()


def sample(directory: str | Path, prompt: str, *, n: int = 1, temperature: float | None = None,
           overrides: Sequence[str] = ()) -> list[str]:
    """Answers of a run's newest checkpoint to a prompt of the user's own."""
    run, parts = opened(directory, overrides)
    sampling = trainer.sampling_of(run.settings)
    sampling = sampling if temperature is None else replace(sampling, temperature=temperature)
    rollouts = parts.evaluator.rollout([Prompt(text=prompt, where="prompt")] * n, sampling, (run.settings.seed, 0, 4))
    return list(rollouts.completions)


def opened(directory: str | Path, overrides: Sequence[str]) -> tuple[Run, Parts]:
    """A finished or living run to look at: nothing is written and no lock is taken."""
    path = Path(directory)
    require_run(path)
    loaded = config.load(path / CONFIG, overrides, discover())
    found = checkpoint.require_newest(path, fallback=loaded.settings.resume.fallback)
    parts = build(loaded)
    run = Run(path, loaded.settings, initial_state(parts, loaded.settings))
    restore(run, parts, checkpoint.load(found))
    parts.evaluator.sync(parts.policy.params(), parts.policy.version)
    return run, parts


def profile_of(settings: Settings) -> Profile | None:
    """What watches the run's memory, where that is asked."""
    return Profile() if settings.memory.profile else None


def run_path(loaded: config.Loaded) -> Path:
    """Where the run goes: as given, else `runs/<name>` with the first free number behind it."""
    if loaded.settings.run:
        return Path(loaded.settings.run)
    wanted = Path("runs") / loaded.name
    free = (wanted.with_name(f"{wanted.name}-{i}") for i in itertools.count(2))
    return wanted if not wanted.exists() else next(path for path in free if not path.exists())


def manifest(loaded: config.Loaded) -> dict[str, Any]:
    """What a repetition of the run must have equal."""
    settings = loaded.settings
    providers = {loaded.registry.provider(component)[0] for component in loaded.components.values()}
    modules = {name for name in settings.plugins if not name.endswith(".py")}
    providers = (providers - modules - {*loaded.files}) | {distribution_of(name) for name in modules}
    threads = settings.threads or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    return describe(seed=settings.seed, threads=threads, plugins=sorted(providers - {""}),
                    user_files=[Path(path) for path in sorted(loaded.files) if path.endswith(".py")],
                    started=datetime.now(UTC).isoformat(timespec="seconds"))


def restore(run: Run, parts: Parts, saved: checkpoint.Checkpoint) -> None:
    """Put every learner, the state and the sampler where the checkpoint says."""
    for trained, name in zip(parts.trained, LEARNERS, strict=False):
        trained.learner.load_state(saved.arrays[name])
    run.state = state.from_files(saved.arrays, saved.values, run.state)
    if run.state.reference is not None and parts.reference is not None:
        parts.reference.load_params(run.state.reference.params.items(), run.state.reference.version)
    resynced(parts, run.settings, run.state)


LEARNERS = ("policy", "critic")
"""Names of `Parts.trained` in a checkpoint."""


def save(run: Run, parts: Parts, files: RunDirectory) -> None:
    """Publish a checkpoint of everything that resuming needs."""
    files.sync()
    arrays, values = state.to_files(run.state)
    learners = {name: t.learner.state() for t, name in zip(parts.trained, LEARNERS, strict=False)}
    checkpoint.save(files.checkpoints, run.state.step, {**learners, **arrays}, values,
                    keep=run.settings.checkpoint.keep)


def _go(run: Run, parts: Parts, files: RunDirectory, registry: Registry, profile: Profile | None) -> Run:
    """All steps that are left, observed by trackers and hooks; errors are told to them and go on to the caller."""
    if profile is not None:
        profile.watch([*(t.learner for t in parts.trained), parts.reference, parts.initial, parts.sampler,
                       parts.evaluator], files.path)
    session = trackers.start(run.settings.trackers, run)
    _warn(registry.hooks.run_started(run))
    error: BaseException | None = None
    try:
        with stop_requests() as stop:
            _steps(run, parts, files, session, registry, stop, profile)
        parts.policy.save(files.path / POLICY)
    except BaseException as raised:
        error = raised
        raise
    finally:
        if profile is not None:
            profile.write(files.path / MEMORY)
        if run.state.step > 0:
            _report(files.path)
        session.finished(error)
        _warn(registry.hooks.run_finished(run, error))
    return run


def _report(directory: Path) -> None:
    """Write `report.html` into the run directory, for whoever looks there and for trackers to attach; a page that
    cannot be made must not cost the run."""
    try:
        write_page([directory], directory / REPORT)
    except Exception as error:
        log.warning("no report was written: %s; try again: posttrain report %s", error, directory)


def _warn(broken: Sequence[Broken]) -> None:
    for plugin in broken:
        log.warning("plugin %s failed in a hook: %s", plugin.distribution, plugin.error)


def _steps(run: Run, parts: Parts, files: RunDirectory, session: TrackerSession, registry: Registry,
           stop: StopRequest, profile: Profile | None) -> None:
    settings, watched = run.settings, profile or nullcontext
    phases = Phases(time.perf_counter, session.phase_started, watched)
    busy = time.process_time()
    advance, assess = LOOPS[run.loop]

    def record(metrics: Metrics, seconds: float) -> None:
        nonlocal busy
        before, busy = busy, time.process_time()
        values = {**metrics.values_by_name(), **timings(seconds, busy - before, metrics, phases.taken()),
                  **({} if profile is None else profile.taken())}
        files.append_metrics(run.state.step, values)
        session.step_finished(run.state.step, values)
        _warn(registry.hooks.step_finished(run, run.state.step, values))

    every = settings.evaluate.every
    if run.state.step == 0 and every:
        start = time.perf_counter()
        metrics, looked_at = assess(parts, settings, phases)
        files.append_samples(0, samples(looked_at, "held out", 8))
        record(metrics, time.perf_counter() - start)
    if 0 < settings.stop.kl < run.state.ended_at_kl:
        log.warning("the run ended at a KL to the reference of %.3g per action, above stop.kl %g; raise stop.kl to go "
                    "on", run.state.ended_at_kl, settings.stop.kl)
        return
    while run.state.step < settings.steps and not ended_after(run):
        start = time.perf_counter()
        run.state, metrics, rollouts = advance(parts, settings, run.state, phases)
        step, over = run.state.step, over_kl(settings, metrics)
        run.state = replace(run.state, ended_at_kl=metrics[REFERENCE_KL].value if over else 0.0)
        last = over or step in (settings.steps, settings.stop.after)
        if run.loop == "rl":
            files.append_samples(step, samples(rollouts, "train", 2))
        if every and (step % every == 0 or last):
            found, looked_at = assess(parts, settings, phases)
            files.append_samples(step, samples(looked_at, "held out", 8))
            metrics += found
        record(metrics, time.perf_counter() - start)
        saving = settings.checkpoint.every
        if last or stop.requested or (saving and step % saving == 0):
            with watched("checkpoint"):
                save(run, parts, files)
        if stop.requested and not last:
            raise Interrupted(f"stopped by signal after step {step} of {settings.steps}; it is saved\n"
                              f"go on with: posttrain resume {run.directory}")
        if over and step < settings.steps:
            log.warning("ended after step %d of %d: the KL to the reference is %.3g per action, above stop.kl %g; the "
                        "run is saved, and goes on by: posttrain resume %s stop.kl=0", step, settings.steps,
                        metrics[REFERENCE_KL].value, settings.stop.kl, run.directory)
            return


def ended_after(run: Run) -> bool:
    """Whether the run is to go no further for now."""
    over = 0 < run.settings.stop.after <= run.state.step
    if over:
        log.warning("ended after step %d of %d, as stop.after asks; the run is saved, and goes on by: posttrain resume "
                    "%s stop.after=0", run.state.step, run.settings.steps, run.directory)
    return over


def over_kl(settings: Settings, metrics: Metrics) -> bool:
    """Whether the policy has moved further from the reference than the run allows."""
    return bool(settings.stop.kl) and REFERENCE_KL in metrics and metrics[REFERENCE_KL].value > settings.stop.kl


def samples(rollouts: Rollouts | None, kind: str, n: int) -> list[dict[str, Any]]:
    """The first episodes, for a look at them."""
    if rollouts is None:
        return []
    totals = episode_rewards(rollouts, SUM)[0] if SUM in rollouts.rewards else None
    return [{"kind": kind, "prompt": p.text if p.text is not None else p.messages or p.tokens,
             "completion": rollouts.completions[e], "finish": FINISH[rollouts.finish[e]],
             "reward": None if totals is None else float(totals[e])}
            for e, p in enumerate(rollouts.prompts[:n])]


def timings(seconds: float, busy: float, metrics: Metrics, phases: Mapping[str, float]) -> dict[str, float]:
    """What may differ between two equal runs; `busy` are seconds of CPU, of all threads. The time of day is fixed here,
    so that trackers that are sent a record again see that it is the same one."""
    import psutil

    length = metrics.get("episode/length")
    tokens = 0.0 if length is None else length.total
    return {"timing/seconds": seconds, "timing/tokens_per_second": tokens / seconds, "timing/unix_time": time.time(),
            "timing/cpu_percent": 100 * busy / seconds,
            "timing/memory_mb": psutil.Process().memory_info().rss / 2**20,
            **{f"timing/{name}": taken for name, taken in phases.items()}}


@dataclass
class StopRequest:
    """Whether a signal asked the run to stop."""

    requested: bool = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """SIGTERM and Ctrl-C finish the step and save; a second one ends at once. Only the main thread catches signals."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    def request(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        log.warning("%s: finishing this step and saving; once more to stop at once", signal.Signals(number).name)
        for caught, handler in before.items():
            signal.signal(caught, handler)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
