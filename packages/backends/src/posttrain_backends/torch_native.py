"""The backend `torch`: a native transformer, or a module of the user's own, on CPU or CUDA.

This is the light part: it checks sizes and names; what computes is imported on load.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

from posttrain.errors import ConfigError
from posttrain.protocols import Exported, LoadRequest, Output

from posttrain_backends import exports
from posttrain_backends.attention import Attention, candidates, choose, require_attention, require_device
from posttrain_backends.families.described import check_sizes, new_shape, rounded_up, shape_in
from posttrain_backends.installed import require
from posttrain_backends.on_torch import OUTPUTS, HeadKernel, native_learner
from posttrain_backends.quantization import ADAPT_IN_HF, Quantizer, check_quantizer, nothing_to_train

if TYPE_CHECKING:
    import torch
    from posttrain.watermark import Watermark

    from posttrain_backends._torch.learner import TorchLearner
    from posttrain_backends._torch.models.decoder import Decoder
    from posttrain_backends._torch.models.user import UserModel
    from posttrain_backends.families.shape import Shape

_MIXTURES = frozenset({"qwen2_moe", "qwen3_moe"})
"""Families of new models that have experts."""
_ADAPT_YOURS = "adapters on a module of yours are for its own code to have; leave quantize out"


@final
@dataclass(frozen=True, slots=True)
class Torch:
    """A decoder-only transformer (Llama, Qwen, SmolLM, Mixtral), or your own module (`file`), trained with torch.

    A folder of `weights` may be any of these families: Llama with positions stretched as in 3.1 or linearly, SmolLM and
    SmolLM2, which are Llamas, SmolLM3, and with experts Mixtral, Qwen2-MoE and Qwen3-MoE. What is saved loads in
    transformers as the same family.

    >>> Torch(hidden_size=96, heads=5)
    Traceback (most recent call last):
    ValueError: hidden_size 96 is not a multiple of heads 5: take one of the divisors 1, 2, 3, 4, 6, 8, 12, 16
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
    head's query and key, `smollm3` no positions in every fourth layer. The last two are `qwen2` and `qwen3` with
    `experts` in place of the MLP, and `qwen2_moe` with one more that reads all tokens."""
    experts: int = 0
    """MLPs of a layer, of which a router chooses some for each token; for `qwen2_moe` and `qwen3_moe`."""
    experts_per_token: int = 2
    """How many it chooses."""
    expert_size: int = 0
    """Width of an expert; 0 makes those of a token together as wide as `intermediate_size`, or a little wider."""
    shared_expert_size: int = 0
    """Width of the expert of `qwen2_moe` that reads all tokens; 0 takes that of one of the others."""
    normalise_experts: bool = True
    """Whether the weights of a token's experts add up to 1, or to the probability that the router gave them."""
    weights: str = field(default="", metadata={"path": True})
    """A folder written by a run, or a Hugging Face folder of one of the families with safetensors. Family and sizes
    then come from its `config.json`."""
    file: str = field(default="", metadata={"path": True})
    """`model.py:build`: your own module, `build(vocab_size) -> torch.nn.Module`, with `forward(tokens[S, T],
    positions[S, T]) -> hidden [S, T, H]` and `lm_head`. Sizes above do not apply to it."""
    attention: Attention = "auto"
    """How whole sequences are read. `auto` is `sdpa` on a CPU; on CUDA flash where it is installed and `precision` is
    bf16, else `flex`, which both compute what answers share once and nothing for padding. It is compared with `eager`
    before it is used."""
    quantize: Quantizer | None = None
    """Keep the weights of linear layers in `int8` or `nf4` (bitsandbytes), `int8_weight_only`, `int8_dynamic` or `int4`
    (torchao): for a reference, as nothing here can learn on them. The output matrix is left as it is."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    precision: Literal["float32", "bf16", "float64"] = "float32"
    """`bf16` multiplies matrices in bfloat16 and keeps weights, gradients and moments in float32."""
    gradient_checkpointing: bool = False
    """Keep only the layers' inputs for the backward pass: less memory, one more forward pass."""
    head_chunk: int = 0
    """Rows of logits that exist at a time; 0 chooses by device and vocabulary."""
    head_kernel: HeadKernel = "auto"
    """What reads those logits and writes their gradient: `auto` is the kernel on CUDA where the extra `triton` is
    installed, and torch's operations elsewhere; `torch` is always those, and `triton_head` refuses where it cannot be
    used."""

    def __post_init__(self) -> None:
        check_sizes(self)
        self._check_experts()
        require_attention(self.attention, self.device, self.precision)
        if self.quantize is not None:
            check_quantizer(self.quantize, self.device, precision=self.precision)
        if self.file and self.attention != "auto":
            raise ValueError("attention is for the native transformer; a module from `file` computes its own")
        if self.file and self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing is for the native transformer; a module from `file` uses "
                             "torch.utils.checkpoint itself")

    def _check_experts(self) -> None:
        sizes = (self.experts, self.expert_size, self.shared_expert_size)
        if min(sizes) < 0:
            raise ValueError("experts, expert_size and shared_expert_size must not be negative")
        if self.family in _MIXTURES and not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(f"experts_per_token is {self.experts_per_token}, of {self.experts} experts: a "
                             f"{self.family} chooses at least 1 of them, and at most all")
        if self.family not in _MIXTURES and any(sizes):
            raise ValueError(f"a {self.family} has no experts; set family to {' or '.join(sorted(_MIXTURES))}, or "
                             "leave out experts, expert_size and shared_expert_size")
        if self.quantize is not None and self.family in _MIXTURES:
            raise ValueError("quantize: experts hold several matrices in one, which would stay as they are; leave it "
                             "out, or take a family without experts")
        if self.shared_expert_size and self.family != "qwen2_moe":
            raise ValueError(f"a {self.family} has no shared expert; set family to qwen2_moe, or leave out "
                             "shared_expert_size")

    @property
    def framework(self) -> str:
        return "torch"

    @property
    def provides(self) -> frozenset[Output]:
        experts = {Output.EXPERT_LOAD} if self.family in _MIXTURES or self.weights else set()
        return OUTPUTS | experts

    @property
    def frozen(self) -> str:
        """See `posttrain.protocols.Frozen`."""
        return nothing_to_train(self.quantize, _ADAPT_YOURS if self.file else ADAPT_IN_HF % "")

    def load(self, request: LoadRequest) -> TorchLearner:
        """The model with its weights, its value heads and its optimiser. Raises `ConfigError`, `PluginError`."""
        require("backend 'torch'", "torch", extra="torch")
        return native_learner(request, self._model, self.weights, self.head_chunk, self.head_kernel,
                              self.quantize, self.frozen)

    def imagined(self, drawn: int) -> AbstractContextManager[Watermark]:
        """See `posttrain.protocols.Imagining`; memory is that of a CPU."""
        require("backend 'torch'", "torch", extra="torch")
        from posttrain_backends._torch.imagined import imagined

        return imagined(drawn)

    @property
    def formats(self) -> tuple[str, ...]:
        """See `posttrain.protocols.Exporting`."""
        return exports.FORMATS

    def export(self, form: str, saved: Path, folder: Path) -> Exported:
        """See `posttrain.protocols.Exporting`; a mixture of experts and a module of the user's are refused."""
        if self.file:
            raise exports.refuse("policy.file is code of its own", "leave --format out, or write your module with "
                                                                   "torch.onnx.export")
        return exports.write(form, saved, folder, Torch(weights=str(saved), device="cpu"))

    def _model(self, request: LoadRequest) -> Decoder | UserModel:
        import torch

        if request.optimization is not None:
            torch.manual_seed(request.seed)  # dropout in a module of the user's draws from torch's own generator
        return self._user_model(request) if self.file else self._decoder(request)

    def _decoder(self, request: LoadRequest) -> Decoder:
        from posttrain_backends._torch.device import device_of
        from posttrain_backends._torch.models.decoder import Decoder

        shape, device = self._shape(request.vocab_size), device_of(self.device, self.precision)
        return Decoder(
            shape, seed=request.seed, device=device, precision=self.precision,
            gradient_checkpointing=self.gradient_checkpointing,
            attention=self._proved(shape, device, trained=request.optimization is not None))

    def _proved(self, shape: Shape, device: torch.device, *, trained: bool) -> str:
        """Name of the attention, compared with eager. Raises `ConfigError`."""
        from posttrain_backends._torch.models.attention import fault_of
        from posttrain_backends._torch.models.interface import COMPUTE_DTYPE

        require_device(self.attention, device.type, trained=trained)
        return choose(self.attention, candidates(device.type, self.precision), lambda name: fault_of(
            name, heads=shape.num_attention_heads, kv_heads=shape.num_key_value_heads, head_dim=shape.head_dim,
            dtype=COMPUTE_DTYPE[self.precision], device=device, trained=trained))

    def _user_model(self, request: LoadRequest) -> UserModel:
        from posttrain_backends._torch.device import device_of
        from posttrain_backends._torch.models.user import load_user_model

        if not request.vocab_size:
            raise ConfigError(["policy.file needs a tokenizer with a vocabulary, to build its embedding"])
        return load_user_model(self.file, request.vocab_size, seed=request.seed, precision=self.precision,
                               device=device_of(self.device, self.precision))

    def _shape(self, vocab_size: int) -> Shape:
        """Sizes and traits of the decoder, from the folder of weights where there is one."""
        if self.weights:
            return shape_in(Path(self.weights), vocab_size, "torch")
        shape = new_shape(self, vocab_size, "torch")
        if not self.experts:
            return shape
        expert = self.expert_size or rounded_up(shape.intermediate_size / self.experts_per_token, 16)
        return replace(
            shape, num_experts=self.experts, moe_intermediate_size=expert, num_experts_per_tok=self.experts_per_token,
            shared_expert_intermediate_size=(self.shared_expert_size or expert) if self.family == "qwen2_moe" else 0,
            norm_topk_prob=self.normalise_experts)
