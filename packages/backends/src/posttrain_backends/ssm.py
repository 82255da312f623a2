"""The backend `ssm`: a native Mamba-2 language model, on CPU or CUDA.

This is the light part: it checks sizes and names; what computes is imported on load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

from posttrain.errors import ConfigError
from posttrain.protocols import LoadRequest, Output

from posttrain_backends.installed import require
from posttrain_backends.on_torch import OUTPUTS, HeadKernel, native_learner
from posttrain_backends.quantization import ADAPT_IN_HF, Quantizer, check_quantizer, nothing_to_train

KERNELS: Mapping[str, str] = {
    "mamba_ssm": "pip install mamba-ssm --no-build-isolation (it is built with the CUDA compiler)",
    "fla": "pip install flash-linear-attention",
}
"""Module with a kernel of the recurrence -> how to get it; in the order in which `auto` takes them."""

if TYPE_CHECKING:
    from posttrain_backends._torch.learner import TorchLearner
    from posttrain_backends._torch.models.mamba2 import Mamba2
    from posttrain_backends.families.mamba2 import Mamba2Shape


@final
@dataclass(frozen=True, slots=True)
class SSM:
    """A Mamba-2 state-space model, trained with torch: what it keeps of a text has one size, however long the text is.

    Answers are decoded from that state, which the answers to one prompt begin with copies of; texts of any length fit.
    Training reads a prompt anew for each of its answers. What is saved loads in transformers as `mamba2`.

    >>> SSM(hidden_size=96, head_dim=36)
    Traceback (most recent call last):
    ValueError: expand * hidden_size is 192, not a multiple of head_dim 36: take one of its divisors 1, 2, 3, 4, 6, 8, \
12, 16, 24, 32, 48, 64, 96, 192
    """

    hidden_size: int = 128
    """Width of the hidden states."""
    layers: int = 4
    """Layers, each a gated recurrence; there are no others."""
    state_size: int = 64
    """Numbers that a head remembers for each of its inputs."""
    expand: int = 2
    """Inputs of a layer's recurrence, in widths of the hidden states."""
    head_dim: int = 32
    """Inputs of one head: there are `expand * hidden_size / head_dim` heads."""
    groups: int = 1
    """Heads are in so many groups; those of one group write and read the state in the same directions."""
    conv_kernel: int = 4
    """Tokens that the convolution before the recurrence sees, its own included."""
    chunk_size: int = 64
    """Tokens in one step of the recurrence's form in chunks: of time and memory, not of the result. Best near
    `sqrt(state_size * head_dim)`."""
    tied_embeddings: bool = False
    """Whether the output matrix is the embedding."""
    weights: str = field(default="", metadata={"path": True})
    """A folder written by a run, or a Hugging Face folder of a `mamba2` model with safetensors. Sizes then come from
    its `config.json`."""
    quantize: Quantizer | None = None
    """Keep the weights of linear layers in `int8` or `nf4` (bitsandbytes), `int8_weight_only`, `int8_dynamic` or `int4`
    (torchao): for a reference, as nothing here can learn on them. The output matrix is left as it is."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    precision: Literal["float32", "bf16", "float64"] = "float32"
    """`bf16` multiplies by the layers' matrices in bfloat16 and keeps the recurrence, weights, gradients and moments in
    float32."""
    kernel: Literal["auto", "torch", "mamba_ssm", "fla"] = "auto"
    """What reads whole texts: `auto` takes a kernel of mamba-ssm or fla on CUDA where one is installed and a probe at
    load proves it equal to torch's form, and else that form; a kernel that is named and fails is refused. Answers are
    drawn by torch's steps."""
    gradient_checkpointing: bool = False
    """Keep only the layers' inputs for the backward pass: less memory, one more forward pass."""
    head_chunk: int = 0
    """Rows of logits that exist at a time; 0 chooses by device and vocabulary."""
    head_kernel: HeadKernel = "auto"
    """What reads those logits and writes their gradient: `auto` is the kernel on CUDA where the extra `triton` is
    installed, and torch's operations elsewhere; `torch` is always those, and `triton_head` refuses where it cannot be
    used."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "layers", "state_size", "expand", "head_dim", "groups", "conv_kernel",
                     "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.quantize is not None:
            check_quantizer(self.quantize, self.device, precision=self.precision)
        if self.head_chunk < 0:
            raise ValueError(f"head_chunk must not be negative (0 chooses), got {self.head_chunk}")
        self._check_kernel()
        if (inner := self.expand * self.hidden_size) % self.head_dim:
            divisors = ", ".join(str(n) for n in range(1, inner + 1) if inner % n == 0)
            raise ValueError(f"expand * hidden_size is {inner}, not a multiple of head_dim {self.head_dim}: take one "
                             f"of its divisors {divisors}")
        if (heads := inner // self.head_dim) % self.groups:
            raise ValueError(f"the {heads} heads (expand * hidden_size / head_dim) are not a multiple of groups "
                             f"{self.groups}")

    def _check_kernel(self) -> None:
        if self.kernel not in KERNELS:
            return
        if self.device == "cpu":
            raise ValueError(f"kernel {self.kernel} computes on CUDA, device is cpu; set kernel to auto or torch")
        if self.precision == "float64":
            raise ValueError(f"kernel {self.kernel} computes in float32, precision is float64; set kernel to torch")
        if find_spec(self.kernel) is None:
            raise ValueError(f"kernel {self.kernel} needs the module {self.kernel}, which is not installed: "
                             f"{KERNELS[self.kernel]}; or set kernel to auto")

    @property
    def framework(self) -> str:
        return "torch"

    @property
    def provides(self) -> frozenset[Output]:
        return OUTPUTS

    @property
    def frozen(self) -> str:
        """See `posttrain.protocols.Frozen`."""
        return nothing_to_train(self.quantize, 
            ADAPT_IN_HF % ", adapter: {use: lora, targets: [in_proj]}")

    def load(self, request: LoadRequest) -> TorchLearner:
        """The model with its weights, its value heads and its optimiser. Raises `ConfigError`, `PluginError`."""
        require("backend 'ssm'", "torch", extra="torch")
        return native_learner(request, self._model, self.weights, self.head_chunk, self.head_kernel,
                              self.quantize, self.frozen)

    def _model(self, request: LoadRequest) -> Mamba2:
        from posttrain_backends._torch.device import device_of
        from posttrain_backends._torch.models.mamba2 import Mamba2
        from posttrain_backends._torch.models.scan import scan_for

        shape, device = self._shape(request.vocab_size), device_of(self.device, self.precision)
        return Mamba2(
            shape, seed=request.seed, device=device, precision=self.precision,
            gradient_checkpointing=self.gradient_checkpointing,
            scan=scan_for(self.kernel, shape, device, self.precision))

    def _shape(self, vocab_size: int) -> Mamba2Shape:
        """Sizes of the model, from the folder of weights where there is one."""
        from posttrain_backends.families.files import check_vocabulary
        from posttrain_backends.families.mamba2 import Mamba2Shape, read_shape

        if self.weights:
            shape = read_shape(Path(self.weights))
            check_vocabulary(Path(self.weights), shape.vocab_size, vocab_size)
            return shape
        if not vocab_size:
            raise ConfigError(["a new ssm model needs a tokenizer with a vocabulary, to size its embedding"])
        return Mamba2Shape(
            vocab_size=vocab_size, hidden_size=self.hidden_size, num_hidden_layers=self.layers,
            num_heads=self.expand * self.hidden_size // self.head_dim, head_dim=self.head_dim,
            state_size=self.state_size, n_groups=self.groups, conv_kernel=self.conv_kernel,
            chunk_size=self.chunk_size, tie_word_embeddings=self.tied_embeddings)
