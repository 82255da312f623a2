"""`posttrain export`: a Hugging Face folder of a run's checkpoint: weights, tokenizer, sampling settings, model card;
or a folder in another format that the policy's backend writes.

The folder appears whole or not at all. Knows the policy and the tokenizer by their protocols only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from posttrain import checkpoint, config
from posttrain.compose import importing, policy_request
from posttrain.errors import InputError, Problem, did_you_mean
from posttrain.fitting import name_of, scores_answers
from posttrain.protocols import Exported, Exporting, Learner, Tokenizer
from posttrain.registry import Registry, discover
from posttrain.report import history
from posttrain.rundir import CONFIG, require_run
from posttrain.schema import Settings

HUGGING_FACE = "huggingface"
"""The format that every backend writes."""
MODEL_CONFIG, GENERATION, CARD = "config.json", "generation_config.json", "README.md"

_WITH_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```"""
_WITH_ITS_CODE = """```python
# the model is code of its own: policy: {use: torch, file: ..., weights: FOLDER}
```"""
MEASURES = {"eval/reward/mean": "held-out reward", "reward/mean": "training reward", "eval/loss": "held-out loss",
            "eval/preference/accuracy": "held-out pairs in the right order",
            "kl/reference": "KL to the reference, nats per token", "policy/entropy": "entropy, nats per token",
            "episode/length": "length of answers, tokens"}
"""Metrics of the card's table, where the run has them, and what they are called there."""


def export(directory: str | Path, output: str | Path | None = None, *, step: int | None = None,
           form: str = HUGGING_FACE, registry: Registry | None = None,
           say: Callable[[str], object] = lambda line: None) -> Path:
    """Write the policy of a run's newest checkpoint, or of `step`, as a Hugging Face folder, or as `form`; returns the
    folder's path.

    `output` is `RUN/exports/step-<step>` by default, with the name of another format behind it. `say` is told how far a
    model in another format is from what the run saved. The run is only read, so it may be running. Raises `InputError`
    where there is no such run or checkpoint or format or the folder is not empty, `CheckpointDamaged` where it is
    damaged.
    """
    path = Path(directory)
    require_run(path)
    loaded = config.load(path / CONFIG, (), registry or discover())
    require_format(form, loaded)
    source = _checkpoint(path, step, loaded.settings.resume.fallback)
    saved = checkpoint.load(source)
    name = source.name if form == HUGGING_FACE else f"{source.name}-{form}"
    target = Path(output) if output is not None else path / "exports" / name
    require_empty(target)
    tokenizer = loaded.settings.tokenizer.load()
    with importing(loaded, "policy"):
        policy = loaded.settings.policy.load(policy_request(loaded.settings, tokenizer))
    policy.load_state(saved.arrays["policy"])
    stage = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        stage.mkdir(parents=True)
        written = _write_model(policy, loaded, form, stage)
        tokenizer.save(stage)
        _write_settings(stage, loaded.settings, tokenizer)
        run = history.read(path, path.resolve().name)
        (stage / CARD).write_text(card(run, loaded, saved.step, _is_transformers(stage), form, written), "utf-8")
        if target.is_dir():
            target.rmdir()  # it is empty
        stage.rename(target)
    except OSError as error:
        raise InputError([Problem(f"cannot write: {error.strerror or error}", str(target))],
                         next_step="make room or give the rights, or choose another folder: --output DIR") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # nothing is there after it was renamed
    if written is not None:
        say(written.compared)
    return target


def require_format(form: str, loaded: config.Loaded) -> None:
    """Raise `InputError` where the policy's backend does not write this format."""
    policy: object = loaded.settings.policy
    known = (HUGGING_FACE, *(policy.formats if isinstance(policy, Exporting) else ()))
    if form not in known:
        raise InputError([Problem(f"backend '{name_of(loaded, 'policy')}' writes no format '{form}'"
                                  f"{did_you_mean(form, known)}", "--format")],
                         next_step=f"What it writes: {', '.join(known)}.")
    if form != HUGGING_FACE and scores_answers(loaded.settings):
        raise InputError([Problem(f"the run trained a model that scores answers, and '{form}' is written of one that "
                                  "gives them", "--format")], next_step="Leave --format out for a Hugging Face folder.")


def require_empty(target: Path) -> None:
    """Raise `InputError` where something would be overwritten."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError([Problem("this folder already holds something, and an export overwrites nothing",
                                  str(target))], next_step="choose another: --output DIR")


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """Ids under the names that transformers gives them."""
    return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}


def generation(settings: Settings) -> dict[str, Any]:
    """The run's sampling under the names that transformers gives it."""
    rollout = settings.rollout
    found = {"do_sample": True, "temperature": rollout.temperature, "top_p": rollout.top_p, "top_k": rollout.top_k,
             "max_new_tokens": rollout.max_new_tokens}
    return {**found, **({"min_p": rollout.min_p} if rollout.min_p else {})}


def card(run: history.History, loaded: config.Loaded, step: int, transformers: bool, form: str = HUGGING_FACE,
         written: Exported | None = None) -> str:
    """The model card in Markdown; `transformers` says whether plain transformers can load the folder of a run, and
    `written` what is to be said of a model in another format."""
    import yaml

    settings, seed = run.settings, run.settings.get("seed", "0")
    method = settings.get("recipe", settings.get("loop", "rl"))
    base = _hub_name(settings.get("policy.model", ""))
    scores = scores_answers(loaded.settings)
    front: dict[str, Any] = {"pipeline_tag": "text-classification" if scores else "text-generation",
                             "tags": ["posttrain", method, *([] if written is None else [form])]}
    front |= {"library_name": "transformers"} if transformers and written is None else {}
    front |= {"base_model": base} if base else {}
    use = f"{written.usage}\n\n{written.compared}" if written is not None else \
        "```yaml\nrewards: {judge: {use: reward_model, weights: FOLDER}}\n```" if scores else \
        _WITH_TRANSFORMERS if transformers else _WITH_ITS_CODE
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=True)}# license: yours to choose; mind that of the base model and of "
        "the data\n---",
        f"# {run.label}, step {step}",
        f"Trained with posttrain {run.manifest.get('posttrain', 'unknown')} by `{method}`, seed {seed}, "
        f"{step} of {settings.get('steps', 'unknown')} steps.",
        "## Results", _markdown(("measure", "first", "last"), _measures(run.curves, step)),
        "## Use", use, *_stop(loaded.settings),
        "## Where it comes from", _markdown(("what", "which", "SHA-256 at export"), _origins(run, loaded, base)),
        "## Versions", _markdown(("what", "which"), [
            (key, value) for key, value in run.manifest.items()
            if key.partition(".")[0] in ("posttrain", "plugins", "frameworks", "python", "platform", "seed", "threads",
                                         "cpu", "accelerators")]),
    ]
    return "\n\n".join(sections) + "\n"


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and SHA-256s of a folder's files."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    lines = (f"{digest(p)}  {p.relative_to(path).as_posix()}\n" for p in sorted(path.rglob("*")) if p.is_file())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _write_model(policy: Learner, loaded: config.Loaded, form: str, stage: Path) -> Exported | None:
    """The policy's files in the empty folder `stage`, and what is said of another format."""
    if form == HUGGING_FACE:
        policy.save(stage)
        return None
    backend: object = loaded.settings.policy
    assert isinstance(backend, Exporting), "`require_format` looked"
    with TemporaryDirectory(dir=stage.parent, prefix=f"{stage.name}-") as saved:
        policy.save(Path(saved))
        with importing(loaded, "policy"):
            return backend.export(form, Path(saved), stage)


def _checkpoint(path: Path, step: int | None, fallback: bool) -> Path:
    if step is None:
        return checkpoint.require_newest(path, fallback=fallback)
    there = dict(checkpoint.published(path / checkpoint.FOLDER))
    if step not in there:
        raise InputError([Problem(f"there is no checkpoint of step {step}", str(path / checkpoint.FOLDER))],
                         next_step=f"steps with one: {', '.join(map(str, there)) or 'none'} "
                                   "(checkpoint.keep says how many stay)")
    return there[step]


def _write_settings(folder: Path, settings: Settings, tokenizer: Tokenizer) -> None:
    """Special ids into the model's description and sampling beside it; what the model itself says of ids stays."""
    described, sampled = _read(folder / MODEL_CONFIG), _read(folder / GENERATION)
    ids = special_ids(tokenizer)
    _write(folder / MODEL_CONFIG, {**described, **_absent(ids, described)})
    if not scores_answers(settings):
        _write(folder / GENERATION, {**sampled, **generation(settings), **_absent(ids, sampled)})


def _absent(values: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if known.get(key) is None}


def _is_transformers(folder: Path) -> bool:
    return "architectures" in _read(folder / MODEL_CONFIG)


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _measures(curves: history.Curves, step: int) -> Iterator[tuple[str, str, str]]:
    """First and last finite value up to `step` of each measure, and of each named reward on held-out rows."""
    named = {name: f"held-out reward `{name.split('/')[2]}`" for name in curves.names()
             if name.startswith("eval/reward/") and name.count("/") == 3 and name.endswith("/mean")}
    for name, title in {**MEASURES, **named}.items():
        known = [(s, v) for s, v in zip(*curves.column(name)) if s <= step and math.isfinite(v)]
        if known:
            first, last = (f"{value:.4g} (step {at})" for at, value in (known[0], known[-1]))
            yield title, first, last


def _origins(run: history.History, loaded: config.Loaded, base: str) -> Iterator[tuple[str, str, str]]:
    """Base model, data and configuration, with hashes of what are files; paths are cut to their last two parts."""
    if base:
        yield "base model", f"{base} {run.settings.get('policy.revision', '')}".strip(), ""
    for what, component in (("base model", loaded.settings.policy), ("data", loaded.settings.task)):
        for path in _paths(component):
            yield what, "/".join(path.parts[-2:]), digest(path)
    yield "configuration", CONFIG, digest(run.path / CONFIG)


def _paths(component: Any) -> Iterable[Path]:
    """Files and folders that a component's fields name; `config.load` made them absolute."""
    values = [getattr(component, f.name) for f in fields(component)]
    found = [Path(value) for value in values if isinstance(value, str) and value]
    return [path for path in found if path.is_absolute() and path.exists()]


def _hub_name(model: str) -> str:
    return "" if not model or model == "null" or Path(model).is_absolute() else model


def _stop(settings: Settings) -> list[str]:
    stop = settings.rollout.stop
    return [f"In training an answer also ended at {', '.join(map(repr, stop))}."] if stop else []


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
                     for line in lines)
