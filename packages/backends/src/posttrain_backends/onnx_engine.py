"""The rollout engine `onnx`: draws the answers of a torch policy in ONNX Runtime, on CPUs. Imports no framework."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from posttrain.errors import ConfigError
from posttrain.protocols import Sampler, Scorer, Tokenizer

from posttrain_backends.installed import require, require_onnx

if TYPE_CHECKING:
    from posttrain_backends._onnx.generate import Weighted
    from posttrain_backends._torch.learner import TorchLearner

_BITS = {"int8": 8, "int4": 4}


@final
@dataclass(frozen=True, slots=True)
class OnnxEngine:
    """Answers of a torch policy, drawn in ONNX Runtime: a Llama, Qwen2, Qwen3 or SmolLM in float32, without an adapter.

    The graph is written from the policy's shape in milliseconds, and what is drawn is what `batched` draws, to the
    rounding of floats. Prompts are copied for each answer.

    >>> OnnxEngine(quantize="int4", weights="inputs")
    Traceback (most recent call last):
    ValueError: quantize needs weights: constants, which alone can be packed in few bits
    """

    slots: int = 0
    """Answers decoded at once; 0 decodes all of a rollout at once. The metric `rollout/busy` is their share in use."""
    cache_tokens: int = 0
    """Most tokens that keys and values are kept of: fewer answers at once where that is less than answers times the
    longest prompt and answer. 0 does not limit."""
    prefill_tokens: int = 8192
    """Most prompt tokens of one call; a single longer prompt is still one. Attention holds a score for each two tokens
    of a prompt."""
    weights: Literal["constants", "inputs"] = "constants"
    """How the graph has its weights. As `constants` they are packed for faster products when the session is made, which
    is done after each update; `inputs` are written in place, which is done sooner, and decode slower."""
    quantize: Literal["int8", "int4"] | None = None
    """Draw for training from matrices of so many bits, rounded anew after each update, with inputs in int8; the trainer
    corrects for it. Embedding and output matrix stay in float32. Evaluation draws from the policy's own numbers."""
    threads: int = 0
    """Of each operator; 0 takes torch's number."""

    def __post_init__(self) -> None:
        if min(self.slots, self.cache_tokens, self.threads) < 0:
            raise ValueError(f"slots, cache_tokens and threads must not be negative, got {self.slots}, "
                             f"{self.cache_tokens} and {self.threads}")
        if self.prefill_tokens < 1:
            raise ValueError(f"prefill_tokens must be at least 1, got {self.prefill_tokens}")
        if self.quantize is not None and self.weights != "constants":
            raise ValueError("quantize needs weights: constants, which alone can be packed in few bits")

    @property
    def approximates(self) -> bool:
        """See `posttrain.protocols.Approximating`."""
        return self.quantize is not None

    def start(self, policy: Scorer, tokenizer: Tokenizer, *, shared: bool) -> Sampler:
        """A sampler with the policy's weights. Raises `ConfigError` for a policy that has no graph, `PluginError` where
        a library is missing."""
        require("engine 'onnx'", "torch", extra="torch")
        require_onnx("engine 'onnx'")
        from posttrain_backends._onnx.generate import OnnxModel
        from posttrain_backends._torch.generate import TorchSampler
        from posttrain_backends._torch.learner import TorchLearner

        if not isinstance(policy, TorchLearner):
            kind = f"{type(policy).__module__}.{type(policy).__qualname__}"
            raise ConfigError(
                [f"engine 'onnx' draws from torch policies; the policy is a {kind}"],
                next_step="Take rollout.engine: batched, which draws in the policy's own framework, or a torch policy "
                          "(policy: torch).")
        model = OnnxModel(self._graph(policy, shared=shared), policy.params if shared else None)
        return TorchSampler(model, tokenizer, self, policy.version)

    def _graph(self, policy: TorchLearner, *, shared: bool) -> Weighted:
        """With the policy's weights; those that it shares are not rounded."""
        import torch

        from posttrain_backends._onnx.generate import Packed, Refreshed
        from posttrain_backends._onnx.policy import shape_to_draw_from

        shape, threads = shape_to_draw_from(policy), self.threads or torch.get_num_threads()
        if self.weights == "inputs":
            return Refreshed(shape, policy.params(), threads)
        bits = None if shared or self.quantize is None else _BITS[self.quantize]
        return Packed(shape, policy.params(), threads, bits)
