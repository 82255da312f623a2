"""A sequence- or token-classification model of transformers as a reward: texts in, one number per row out.

Knows lists of prompts and answers; no rollouts, no learner. Batches of it are padded on the right, which a probe at
load proves harmless; where it is not, rows are scored one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np
import torch
import torch.nn.functional as F
from posttrain.errors import ConfigError, did_you_mean
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from posttrain_backends._torch.device import device_of
from posttrain_backends._torch.memory import translating_memory_errors
from posttrain_backends._torch.models import files
from posttrain_backends._torch.models.attention import BOUND, relative
from posttrain_backends._torch.models.hf_attention import attending, read_with, switch
from posttrain_backends._torch.models.hf_value import head_of
from posttrain_backends._torch.models.interface import COMPUTE_DTYPE
from posttrain_backends._torch.quiet import errors_alone, without_bars
from posttrain_backends._transformers.tokenizer import read
from posttrain_backends.attention import choose, differs, raised, require_device
from posttrain_backends.families.files import VALUE_HEAD
from posttrain_backends.hf import source_of, unreachable
from posttrain_backends.judging import Parts, Reader, Row, pad_of, padded

if TYPE_CHECKING:
    from posttrain_backends.hf import HF
    from posttrain_backends.reward_models import RewardModel

log = logging.getLogger(__name__)

Task = Literal["sequence", "token"]
CLASSES: Mapping[str, tuple[Task, Any]] = {
    "ForSequenceClassification": ("sequence", AutoModelForSequenceClassification),
    "ForTokenClassification": ("token", AutoModelForTokenClassification),
}
"""Ending of a name in a model's `architectures` -> what its logits are of, and the class that loads it."""
TOLERANCE = 1e-4
"""Of the padding probe, in float32 and relative to the largest score: what is not exact is far above it."""


# ---- reading a classification model


def read_config(spec: HF | RewardModel) -> Any:
    """The model's `config.json`. Raises `ConfigError` where it cannot be read."""
    name, arguments = source_of(spec.weights, spec.model, spec.revision)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=spec.trust_remote_code, **arguments)
    except (OSError, ValueError, ImportError) as error:
        raise unreachable(spec.weights or spec.model, error) from error


def class_of(config: Any) -> tuple[Task, Any] | None:
    """What a classification model's logits are of, and the class that loads it; None for another model."""
    names = config.architectures or []
    return next((found for ending, found in CLASSES.items() for name in names if name.endswith(ending)), None)


def read_classifier(spec: HF | RewardModel, config: Any) -> tuple[Task, PreTrainedModel]:
    """The module in float32, in evaluation mode, on the host.

    Raises `ConfigError` where it is no classification model, or its weights hold no trained read-out.
    """
    source = spec.weights or spec.model
    found, head = class_of(config), value_head_of(spec)
    if found is None and head:
        return "sequence", read_with_head(spec, head)
    if found is None:
        raise ConfigError(
            [f"{source} is {' or '.join(config.architectures or ['of no architecture'])}; a reward model is one of "
             f"{', '.join(f'...{ending}' for ending in CLASSES)} (architectures of its config.json)"],
            next_step="Name a trained reward model. A model that judges in words is asked from a Python reward.")
    task, loader = found
    if config.is_encoder_decoder:
        raise ConfigError([f"{source} has an encoder and a decoder; classification models of that kind are not "
                           "supported, take a decoder or an encoder"])
    name, arguments = source_of(spec.weights, spec.model, spec.revision)
    attention = read_with(spec.attention)
    try:
        with without_bars(local=bool(spec.weights)):
            module, loading = loader.from_pretrained(
                name, dtype=torch.float32, attn_implementation=attention, trust_remote_code=spec.trust_remote_code,
                use_safetensors=True, output_loading_info=True, **arguments)
    except (OSError, ValueError, ImportError) as error:
        raise unreachable(source, error) from error
    if missing := sorted(loading["missing_keys"]):
        raise ConfigError([f"the weights of {source} lack {', '.join(missing[:3])}, so its scores would be random"],
                          next_step="Name a model that was trained as a classifier, with its read-out saved.")
    return task, module.eval()


def value_head_of(spec: HF | RewardModel) -> dict[str, Tensor]:
    """Weight and bias of the value head that a run saved beside its model; nothing where the folder holds none."""
    return files.read_head(Path(spec.weights), VALUE_HEAD) if spec.weights else {}


def read_with_head(spec: HF | RewardModel, head: Mapping[str, Tensor]) -> PreTrainedModel:
    """A causal language model with a run's value head as a sequence-classification model. Raises `ConfigError` where
    transformers knows no such model of that architecture."""
    attention, labels = read_with(spec.attention), len(head["weight"])
    try:
        with without_bars(), errors_alone():  # else: the output matrix is not used, and the read-out is not there
            module, loading = AutoModelForSequenceClassification.from_pretrained(
                spec.weights, num_labels=labels, dtype=torch.float32, attn_implementation=attention,
                trust_remote_code=spec.trust_remote_code, use_safetensors=True, output_loading_info=True,
                local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise unreachable(spec.weights, error) from error
    name, own = head_of(module)
    if lost := sorted(key for key in loading["missing_keys"] if not key.startswith(f"{name}.")):
        raise ConfigError([f"the weights of {spec.weights} lack {', '.join(lost[:3])}, so its scores would be random"])
    readout = torch.nn.Linear(own.in_features, labels)
    files.copy_named(head.items(), readout.state_dict(), f"the value head in {spec.weights}")
    setattr(module, name, readout)
    return module.eval()


# ---- from logits to a number


def _logit(logits: Tensor, alone: bool) -> Tensor:
    return logits


def _logprob(logits: Tensor, alone: bool) -> Tensor:
    return F.logsigmoid(logits) if alone else logits.log_softmax(-1)


def _probability(logits: Tensor, alone: bool) -> Tensor:
    return logits.sigmoid() if alone else logits.softmax(-1)


OUTPUTS: Mapping[str, Callable[[Tensor, bool], Tensor]] = {
    "logit": _logit, "logprob": _logprob, "probability": _probability}
"""[..., labels] -> [..., labels]; `alone`: every label is a question of its own."""
REDUCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "last": lambda scores: scores[-1], "mean": lambda scores: scores.mean(), "min": lambda scores: scores.min()}
"""[n] scores of the answer's tokens -> the row's."""


def label_of(given: str | int, config: Any) -> int:
    """The place of the label's logit. Raises `ConfigError` where it is not known, or not said which of several."""
    names = {str(name): int(i) for i, name in config.id2label.items()}
    if given == "" and config.num_labels == 1:
        return 0
    if str(given) in names:
        return names[str(given)]
    if str(given).isdigit() and int(given) < config.num_labels:
        return int(given)
    what = "the model has several labels; which is the reward?" if given == "" else (
        f"label {given!r} is none of the model's{did_you_mean(str(given), names)}")
    raise ConfigError([f"{what} Set label to one of: {', '.join(names)} (or 0 to {config.num_labels - 1})"])


# ---- the reward


@final
class LoadedRewardModel:
    """See `posttrain.protocols.Reward`. `rows_alone` scores every row in a forward pass of its own."""

    def __init__(self, spec: RewardModel, task: Task, module: PreTrainedModel, tokenizer: Any) -> None:
        self.module, self.tokenizer = module, tokenizer
        self._task, self._label = task, label_of(spec.label, module.config)
        self._alone = module.config.num_labels == 1 or module.config.problem_type == "multi_label_classification"
        self._output, self._reduce = OUTPUTS[spec.output], REDUCTIONS[spec.tokens]
        self._pad: int = _text_config(module).pad_token_id
        special = spec.special_tokens == "add" or (spec.special_tokens == "auto" and not is_causal(module))
        self._reader = Reader(tokenizer, special, whole=spec.until == "template" or (
            spec.until == "auto" and not value_head_of(spec)), finds_answers=task == "token",
            limit=spec.max_tokens or max_positions(module))
        self._parts, self.rows_alone = Parts(spec.batch_tokens, self._free), False

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        """One score per row; None where a token-classification model finds no token in the answer. Raises `DataError`
        for a row that cannot be read, `MemoryExhausted` where a single row does not fit."""
        rows = [self._reader(p, c) for p, c in zip(prompts, completions, strict=True)]
        return self._parts(rows, self.scored, alone=self.rows_alone)

    def _free(self) -> None:
        if self.module.device.type == "cuda":
            torch.cuda.empty_cache()

    def scored(self, rows: Sequence[Row]) -> list[float]:
        """Scores of rows in one forward pass. Raises `MemoryExhausted`."""
        def computed() -> list[float]:
            logits = self.logits([row.ids for row in rows])
            if self._task == "token":
                chosen = self._output(logits, self._alone)[..., self._label]
                return [float(self._reduce(chosen[i, list(row.answer or ())])) for i, row in enumerate(rows)]
            numbers: list[float] = self._output(logits, self._alone)[:, self._label].tolist()
            return numbers
        return translating_memory_errors(computed)

    @torch.no_grad()
    def logits(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Of rows padded on the right: [rows, labels], or [rows, columns, labels] of a token-classification model; in
        float32."""
        table, real = padded(ids, self._pad)
        device = self.module.device
        out = self.module(input_ids=torch.from_numpy(table).to(device),
                          attention_mask=torch.from_numpy(real.astype(np.int64)).to(device))
        logits: Tensor = out.logits.float()
        return logits


def load(spec: RewardModel, threads: int) -> LoadedRewardModel:
    """See `RewardModel.load`."""
    if threads:
        torch.set_num_threads(threads)
    device = device_of(spec.device, spec.precision)
    require_device(spec.attention, device.type, trained=False)
    task, module = read_classifier(spec, read_config(spec))
    tokenizer = read(spec.weights, spec.model, spec.revision, trust_remote_code=spec.trust_remote_code)
    if task == "token" and not tokenizer.is_fast:
        raise ConfigError([f"{type(tokenizer).__name__} of {spec.weights or spec.model} does not tell where its tokens "
                           "stand in a text, so the answer's cannot be found; give the folder a tokenizer.json"])
    set_pad(task, module, tokenizer)
    reward = LoadedRewardModel(spec, task, module, tokenizer)
    difference = padding_error(reward)
    module.to(device, COMPUTE_DTYPE[spec.precision]).requires_grad_(False)
    attend_by(reward, spec)
    if not difference <= TOLERANCE:
        log.warning("scores of %s change by %.1e of the largest where rows are padded, so rows are scored one by one, "
                    "which is slow", type(module).__name__, difference)
        reward.rows_alone = True
    return reward


def attend_by(reward: LoadedRewardModel, spec: RewardModel) -> None:
    """Give the model the attention that is named; `auto` leaves it the library's choice. Raises `ConfigError` where its
    scores are not those of eager."""
    if spec.attention != "auto":
        switch(reward.module, choose(spec.attention, (), lambda name: fault_of(reward, name)))


def fault_of(reward: LoadedRewardModel, name: str) -> str:
    """What is wrong with scores of padded rows by this attention; empty where nothing is."""
    rows = padded_rows(reward.module)
    with attending(reward.module, "eager"):
        expected = reward.logits(rows)
    try:
        with attending(reward.module, name):
            found = reward.logits(rows)
    except Exception as error:  # whatever a kernel that is not ours raises, of whatever library
        return raised(error)
    ends = [len(row) if expected.ndim == 3 else None for row in rows]  # scores of tokens, or one of the whole row
    return differs(max(relative(a[:end], b[:end]) for a, b, end in zip(found, expected, ends, strict=True)),
                   "scores", BOUND[reward.module.dtype])


def set_pad(task: Task, module: PreTrainedModel, tokenizer: Any) -> None:
    """Give the model an id for padding where it names none: the tokenizer's, else the end of a text's.

    Classification models with a causal trunk read their score at the last token that is not this id, also where the
    text itself ends with it.
    """
    config = _text_config(module)
    if config.pad_token_id is not None:
        return
    config.pad_token_id = pad_of(tokenizer, config.eos_token_id, type(module).__name__, at_last=task == "sequence")


def max_positions(module: PreTrainedModel) -> int | None:
    """Longest text; None where the model sets no limit. Ids of RoBERTa's positions begin behind that of padding."""
    config = _text_config(module)
    limit = getattr(config, "max_position_embeddings", None)
    embedded = next((m for name, m in module.named_modules() if name.endswith("position_embeddings")
                     and isinstance(m, torch.nn.Embedding)), None)
    first = 0 if embedded is None or embedded.padding_idx is None else embedded.padding_idx + 1
    return None if limit is None else int(limit) - first


def _text_config(module: PreTrainedModel) -> Any:
    return module.config.get_text_config()


@torch.no_grad()
def is_causal(module: PreTrainedModel) -> bool:
    """Whether no token of the trunk sees a later one."""
    ids = probe_ids(module, 6)
    other = ids.clone()
    other[0, -1] = ids[0, 0]
    first, second = (module.base_model(input_ids=x).last_hidden_state[0, :-1] for x in (ids, other))
    return float((first - second).abs().max() / first.abs().max()) <= TOLERANCE


def probe_ids(module: PreTrainedModel, length: int) -> Tensor:
    """[1, length] ids that differ from each other and from the one for padding."""
    rows, pad = module.get_input_embeddings().num_embeddings, _text_config(module).pad_token_id
    ids = [i for i in ((7919 * i) % rows for i in range(1, length + 2)) if i != pad][:length]
    return torch.tensor([ids], device=module.device)


def padded_rows(module: PreTrainedModel) -> list[list[int]]:
    """Ids of three rows of several lengths."""
    ids = probe_ids(module, 7)[0].tolist()
    return [ids, ids[:4], ids[2:3]]


def padding_error(reward: LoadedRewardModel) -> float:
    """Largest difference between scores of rows padded in one batch and of each alone, relative to the largest."""
    rows = padded_rows(reward.module)
    alone, together = [reward.logits([row])[0] for row in rows], reward.logits(rows)
    padded = [x if x.ndim == 1 else x[:len(row)] for x, row in zip(together, rows, strict=True)]
    largest = max(float(x.abs().max()) for x in alone)
    return max(float((a - b).abs().max()) for a, b in zip(alone, padded, strict=True)) / max(largest, 1e-12)
