"""The backend `onnx`: a model of a native family that ONNX Runtime scores tokens with, for references.

This is the light part: it checks the configuration; what computes is imported on load.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

from posttrain.errors import ConfigError
from posttrain.protocols import LoadRequest, Output

from posttrain_backends.installed import require_onnx

if TYPE_CHECKING:
    from posttrain_backends._onnx.scorer import OnnxScorer

_FROZEN = ("use: onnx has nothing to train with: ONNX Runtime gave training up. Take torch, hf or flax; ONNX can be "
           "the policy's reference (reference: {use: onnx, weights: FOLDER}), draw its answers (rollout.engine: onnx), "
           "judge them (a reward with use: onnx_reward), and is what `posttrain export RUN --format onnx` writes")


@final
@dataclass(frozen=True, slots=True)
class Onnx:
    """A Llama, Qwen2, Qwen3 or SmolLM in float32 from a folder of weights, for a reference.

    >>> Onnx(weights="runs/demo/final", head_chunk=-1)
    Traceback (most recent call last):
    ValueError: head_chunk must not be negative, got -1
    """

    weights: str = field(default="", metadata={"path": True})
    """A folder written by a run, or a Hugging Face folder of one of the families with safetensors. No .onnx file is
    needed: the graph is written from `config.json` in milliseconds."""
    device: Literal["cpu", "cuda"] = "cpu"
    """`cuda` needs the extra `onnx-gpu` in place of `onnx`."""
    head_chunk: int = 0
    """Rows of logits that exist at a time; 0 chooses by vocabulary."""

    def __post_init__(self) -> None:
        if self.head_chunk < 0:
            raise ValueError(f"head_chunk must not be negative, got {self.head_chunk}")

    @property
    def framework(self) -> str:
        return "onnx"

    @property
    def provides(self) -> frozenset[Output]:
        return frozenset({Output.LOGPROBS, Output.ENTROPY})

    @property
    def frozen(self) -> str:
        """See `posttrain.protocols.Frozen`."""
        return _FROZEN

    def load(self, request: LoadRequest) -> OnnxScorer:
        """The model, for scoring. Raises `ConfigError`, `PluginError`."""
        if request.optimization is not None:
            raise ConfigError([_FROZEN])
        if request.value_heads or request.action_value_heads:
            raise ConfigError(["the onnx backend gives log-probs and no values; take use: torch for a critic"])
        if not self.weights:
            raise ConfigError(["use: onnx makes no new models: weights names no folder"],
                              next_step="Set weights to a folder written by a run, or to a Hugging Face folder of a "
                                        "Llama, Qwen2, Qwen3 or SmolLM.")
        require_onnx("backend 'onnx'", self.device)
        from posttrain_backends._onnx.scorer import read_scorer

        return read_scorer(Path(self.weights), request.vocab_size, threads=request.threads, device=self.device,
                           head_chunk=self.head_chunk)
