"""The backend `flax`: the native transformer in flax.nnx, or a module of the user's own, trained with JAX and optax.

This is the light part: it checks sizes and names; what computes is imported on load.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

from posttrain.errors import ConfigError
from posttrain.protocols import Exported, LoadRequest, Output

from posttrain_backends import exports
from posttrain_backends.families.described import check_sizes, new_shape, shape_in
from posttrain_backends.hf import Lora
from posttrain_backends.installed import require
from posttrain_backends.quantization import Quantizer

if TYPE_CHECKING:
    from posttrain_backends._jax.learner import JaxLearner
    from posttrain_backends.families.shape import Shape


@final
@dataclass(frozen=True, slots=True)
class Flax:
    """A decoder-only transformer without experts (Llama, Qwen2, Qwen3, SmolLM), or your own module (`file`), trained
    with JAX.

    A folder of `weights` may be any that `policy.use=torch` reads, but for mixtures of experts; what is saved loads
    there and in transformers. A new model begins with the weights that torch gives it for the same seed.

    >>> Flax(family="qwen3_moe")
    Traceback (most recent call last):
    ValueError: family qwen3_moe has experts, which the flax backend does not compute yet: use policy.use=moe
    """

    hidden_size: int = 128
    """Width of the hidden states."""
    layers: int = 4
    """Transformer layers."""
    heads: int = 4
    """Attention heads; must divide `hidden_size`."""
    kv_heads: int = 2
    """Key and value heads, each shared by `heads / kv_heads` queries."""
    intermediate_size: int = 0
    """Width of the MLP; 0 takes 8/3 of `hidden_size`, rounded up to a multiple of 32."""
    max_positions: int = 2048
    """Longest sequence, prompt and answer together."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    tied_embeddings: bool = False
    """Whether the output matrix is the embedding."""
    family: Literal["llama", "qwen2", "qwen3", "smollm3", "qwen2_moe", "qwen3_moe"] = "llama"
    """What a new model has beside Llama's parts: `qwen2` biases on queries, keys and values, `qwen3` a norm of each
    head's query and key, `smollm3` no positions in every fourth layer. The last two are refused: they have experts."""
    weights: str = field(default="", metadata={"path": True})
    """A folder written by a run, or a Hugging Face folder of one of the families with safetensors. Family and sizes
    then come from its `config.json`."""
    file: str = field(default="", metadata={"path": True})
    """`model.py:build`: your own module, `build(vocab_size, rngs) -> flax.nnx.Module`, with `__call__(tokens[S, T],
    positions[S, T]) -> hidden [S, T, H]` and `lm_head`. Sizes above do not apply to it."""
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """`auto` takes what JAX finds best."""
    precision: Literal["float32", "bf16", "float64"] = "float32"
    """`bf16` multiplies matrices in bfloat16 and keeps weights, gradients and moments in float32."""
    gradient_checkpointing: bool = False
    """Keep only the layers' inputs for the backward pass: less memory, one more forward pass. XLA undoes it on CPUs."""
    head_chunk: int = 0
    """At most so many rows of logits exist at a time, rounded down to a power of two; 0 chooses by vocabulary."""
    data_parallel: int = 1
    """Devices over which the rows of a batch are spread, each with all it needs of the weights."""
    tensor_parallel: int = 1
    """Devices over which each matrix is spread; must divide the heads, the key and value heads, the MLP's width and the
    vocabulary. A model takes `data_parallel` times `tensor_parallel` devices."""
    adapter: Lora | None = None
    """Not there yet: refused."""
    quantize: Quantizer | None = None
    """Not there yet: refused."""

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.data_parallel < 1 or self.tensor_parallel < 1:
            raise ValueError(f"data_parallel and tensor_parallel must be at least 1, got {self.data_parallel} and "
                             f"{self.tensor_parallel}")
        if self.family in ("qwen2_moe", "qwen3_moe"):
            raise ValueError(f"family {self.family} has experts, which the flax backend does not compute yet: use "
                             "policy.use=moe")
        if self.file and (self.gradient_checkpointing or self.precision == "bf16"):
            raise ValueError("gradient_checkpointing and precision bf16 are for the native transformer; a module from "
                             "`file` uses jax.checkpoint and bfloat16 itself")
        if self.file and self.tensor_parallel > 1:
            raise ValueError("tensor_parallel is for the native transformer, whose matrices are known by name; a "
                             "module from `file` can have data_parallel")
        if self.adapter is not None:
            raise ValueError("adapter: the flax backend has no low-rank adapters yet; leave it out, or use "
                             "policy.use=hf")
        if self.quantize is not None:
            raise ValueError("quantize: the flax backend has no quantised weights yet; leave it out, or use "
                             "policy.use=torch for a reference and policy.use=quantized for a policy")

    @property
    def framework(self) -> str:
        return "jax"

    @property
    def provides(self) -> frozenset[Output]:
        return frozenset({Output.LOGPROBS, Output.ENTROPY, Output.VALUES, Output.BOOTSTRAP_VALUES, Output.ACTION_VALUES,
                          Output.EXPECTED_ACTION_VALUES, Output.REFERENCE_KL})

    def load(self, request: LoadRequest) -> JaxLearner:
        """The model with its weights, its heads and its optimiser. Raises `ConfigError`, `PluginError`."""
        require("backend 'flax'", "flax", "jax", "optax", extra="flax")
        if self.file:
            return self._user_learner(request)
        shape = self._shape(request.vocab_size)
        from posttrain_backends._jax.native import decoder_learner

        return decoder_learner(
            request, shape, weights=self.weights, device=self.device, precision=self.precision,
            gradient_checkpointing=self.gradient_checkpointing, head_chunk=self.head_chunk,
            data_parallel=self.data_parallel, tensor_parallel=self.tensor_parallel)

    def _user_learner(self, request: LoadRequest) -> JaxLearner:
        if not request.vocab_size:
            raise ConfigError(["policy.file needs a tokenizer with a vocabulary, to build its embedding"])
        from posttrain_backends._jax.native import user_learner

        return user_learner(request, self.file, weights=self.weights, device=self.device, precision=self.precision,
                            head_chunk=self.head_chunk, data_parallel=self.data_parallel)

    @property
    def formats(self) -> tuple[str, ...]:
        """See `posttrain.protocols.Exporting`."""
        return exports.FORMATS

    def export(self, form: str, saved: Path, folder: Path) -> Exported:
        """See `posttrain.protocols.Exporting`."""
        return exports.write(form, saved, folder, Flax(weights=str(saved), device="cpu"))

    def _shape(self, vocab_size: int) -> Shape:
        """Sizes and traits of the decoder, from the folder of weights where there is one. Raises `ConfigError` for
        one with experts."""
        if not self.weights:
            return new_shape(self, vocab_size, "flax")
        shape = shape_in(Path(self.weights), vocab_size, "flax")
        if shape.num_experts:
            raise ConfigError([f"the model in {self.weights} is a {shape.model_type}, whose experts the flax backend "
                               "does not compute yet"],
                              next_step=f"Use policy: {{use: torch, weights: {self.weights}}} for it.")
        return shape
