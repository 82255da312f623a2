"""The reward `onnx`: what a sequence-classification model says, computed by ONNX Runtime; no torch is needed.

This is the light part: it checks names and values; what computes is imported on load.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, final

from posttrain_backends.installed import require, require_onnx

if TYPE_CHECKING:
    from posttrain_backends._onnx.judge import Judge


@final
@dataclass(frozen=True, slots=True)
class OnnxReward:
    """The score that a model gives an answer, read through the model's own tokenizer; the same number as `reward_model`
    gives of the same folder.

    The model has one label. It is a Llama, Qwen2, Qwen3 or SmolLM3 for sequence classification, or a run with
    `recipe: reward_model`, as `posttrain export` wrote it, and its graph is then written here; or any model of whatever
    architecture that another program exported as `model.onnx`.

    The text is made as `reward_model` makes it, and never cut: a row longer than the model reads is an error, for which
    `on_error` has the rule.

    >>> OnnxReward()
    Traceback (most recent call last):
    ValueError: give weights: a folder with a reward model, as safetensors or as model.onnx, and its tokenizer
    """

    weights: str = field(default="", metadata={"path": True})
    """A folder with the model's tokenizer and either `model.onnx` (token ids and mask -> one number per row) or
    `config.json` and safetensors."""
    until: Literal["auto", "template", "answer"] = "auto"
    """How far messages are read: with all that the chat template writes behind the answer, or up to the answer's end,
    as `recipe: reward_model` trains. `auto`: `answer` where the read-out is a run's value head, else `template`."""
    special_tokens: Literal["none", "add"] = "none"
    """Whether the tokenizer puts its own (`[CLS]`, bos) around a plain text, as encoders need it; a chat template
    writes its own."""
    batch_tokens: int = 4096
    """Padded tokens of one call; rows are sorted by length and padded on the right."""
    max_tokens: int = 0
    """Longest row, prompt and answer; 0: as many as `config.json` says that the model has positions."""
    device: Literal["cpu", "cuda"] = "cpu"
    """`cuda` needs the extra `onnx-gpu` in place of `onnx`."""

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("give weights: a folder with a reward model, as safetensors or as model.onnx, and its "
                             "tokenizer")
        if self.batch_tokens < 1 or self.max_tokens < 0:
            raise ValueError(f"batch_tokens must be at least 1 and max_tokens not negative, got {self.batch_tokens} "
                             f"and {self.max_tokens}")

    def load(self, threads: int) -> Judge:
        """See `posttrain.protocols.RewardSource`. Raises `ConfigError`, `PluginError`."""
        require_onnx("reward 'onnx'", self.device)
        require("reward 'onnx'", "transformers", extra="hf-tokenizer")
        from posttrain_backends._onnx.judge import load

        return load(self, threads)
