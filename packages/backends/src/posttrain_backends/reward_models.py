"""The reward `reward_model`: what a sequence- or token-classification model of Hugging Face transformers says.

This is the light part: it checks names and values; what computes is imported on load.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, final

from posttrain_backends.attention import LibraryAttention, require_attention
from posttrain_backends.hf import require_source
from posttrain_backends.installed import require

if TYPE_CHECKING:
    from posttrain_backends._torch.hf_classifier import LoadedRewardModel


@final
@dataclass(frozen=True, slots=True)
class RewardModel:
    """The score that a model gives an answer, read through the model's own tokenizer.

    The model is a sequence- or token-classification model, or a causal language model with the value head of a run
    beside it, as `posttrain export` writes of a run with `recipe: reward_model`.

    The text is made as TRL makes it for a reward model: messages and the answer as the assistant's through the chat
    template of the reward model's own tokenizer; a text prompt and its answer as one text. It is never cut: a row
    longer than the model reads is an error, for which `on_error` has the rule.

    A causal model with one score per text reads it at the last token that is not its id for padding. Where the files
    name no such id, it is the tokenizer's, or else that of the end of a text, as in TRL.

    The model lives in the training process, beside the policy and on its device unless `device` says otherwise. Where
    the device's memory runs out, `batch_tokens` is halved until the scores fit.

    >>> RewardModel(weights="model.gguf")
    Traceback (most recent call last):
    ValueError: weights must be a folder: a GGUF file holds no classification model
    """

    weights: str = field(default="", metadata={"path": True})
    """A folder with `config.json`, safetensors and the model's tokenizer."""
    model: str = ""
    """Name of a repository on the hub; needs `revision`."""
    revision: str = ""
    """Commit of that repository, 40 hexadecimal digits."""
    tokens: Literal["last", "mean", "min"] = "last"
    """Of a token-classification model: which of the scores of the answer's tokens counts. `min` is a process reward
    model's usual choice (Lightman et al. 2023, arXiv 2305.20050 take the product or the minimum). What the chat
    template writes around the answer does not count, and an answer without a token has no score (None)."""
    until: Literal["auto", "template", "answer"] = "auto"
    """How far messages are read: with all that the chat template writes behind the answer, or up to the answer's end,
    as `recipe: reward_model` trains. `auto`: `answer` where the read-out is a run's value head, else `template`."""
    label: str | int = ""
    """Name or number of the logit that is the score; a model with one label needs none."""
    output: Literal["logit", "logprob", "probability"] = "logit"
    """The logit itself, or its log-probability or probability among the labels; of one label, and where the model's
    `problem_type` is multi-label, the logistic function's."""
    special_tokens: Literal["auto", "add", "none"] = "auto"
    """Whether the tokenizer puts its own (`[CLS]`, bos) around a plain text; a chat template writes its own. `auto`:
    `add` for encoders, `none` for causal models, as TRL has it."""
    batch_tokens: int = 16384
    """Padded tokens of one forward pass; rows are sorted by length and padded on the right."""
    max_tokens: int = 0
    """Longest row, prompt and answer; 0: as many as the model has positions."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    precision: Literal["float32", "bf16"] = "float32"
    """Of weights and matrices; nothing is trained, so `bf16` keeps no weights in float32."""
    attention: LibraryAttention = "auto"
    """`auto` is torch's scaled dot-product attention; another one is compared with `eager` when the model is loaded."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. The run's configuration records it."""

    def __post_init__(self) -> None:
        require_source(self.weights, self.model, self.revision)
        require_attention(self.attention, self.device, self.precision)
        if self.weights.endswith(".gguf"):
            raise ValueError("weights must be a folder: a GGUF file holds no classification model")
        if self.batch_tokens < 1 or self.max_tokens < 0:
            raise ValueError(f"batch_tokens must be at least 1 and max_tokens not negative, got {self.batch_tokens} "
                             f"and {self.max_tokens}")

    def load(self, threads: int) -> LoadedRewardModel:
        """See `posttrain.protocols.RewardSource`. Raises `ConfigError`, `PluginError`."""
        require("reward 'reward_model'", "torch", "transformers")
        from posttrain_backends._torch.hf_classifier import load

        return load(self, threads)
