"""The backend `hf`: any `AutoModelForCausalLM` of Hugging Face transformers, and the tokenizer that belongs to it.

This is the light part: it checks names and values; what computes is imported on load.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

from posttrain.errors import ConfigError
from posttrain.protocols import Exported, LoadRequest, Output, Tokenizer

from posttrain_backends import exports
from posttrain_backends.attention import Attention, require_attention
from posttrain_backends.installed import require
from posttrain_backends.on_torch import OUTPUTS, HeadKernel
from posttrain_backends.quantization import ADD_ADAPTER, QUANTIZERS, Quantizer, check_quantizer, nothing_to_train

if TYPE_CHECKING:
    from posttrain_backends._torch.learner import TorchLearner

Experts = Literal["auto", "eager", "grouped_mm", "batched_mm"]


@final
@dataclass(frozen=True, slots=True)
class Lora:
    """Low-rank adapters on the linear layers (Hu et al. 2021, arXiv 2106.09685); only they are trained and saved."""

    use: Literal["lora"] = "lora"
    """The kind of adapter."""
    rank: int = 16
    """Columns of A and rows of B."""
    alpha: float = 32.0
    """The product B A is scaled by alpha / rank."""
    targets: str | tuple[str, ...] = "all-linear"
    """Names of the layers that get one (`[q_proj, v_proj]`), or all linear layers but the output matrix."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"rank must be at least 1 and alpha positive, got {self.rank} and {self.alpha}")


@final
@dataclass(frozen=True, slots=True)
class HF:
    """A causal language model of transformers, trained by the same learner as the native one.

    As `critic` also a sequence- or token-classification model with a causal trunk, such as a reward model: its linear
    read-out becomes the value head, its rows copied to every reward column where it has one label (the critic of PPO
    practice begins so: Ouyang et al. 2022, arXiv 2203.02155, section 3.5). It reads the policy's token ids, so it must
    have been trained with the policy's tokenizer.

    State-space models and hybrids (Mamba, Mamba-2, Jamba, Qwen3-Next, ...) are padded, and drawn from by their states;
    docs/parity.md says how exactly each architecture is computed.

    >>> HF()
    Traceback (most recent call last):
    ValueError: give weights (a local folder or a .gguf file) or model (a name on the hub, with its revision)
    """

    weights: str = field(default="", metadata={"path": True})
    """A folder with `config.json` and safetensors, or a GGUF file, whose weights are unpacked to float32."""
    model: str = ""
    """Name of a repository on the hub; needs `revision`."""
    revision: str = ""
    """Commit of that repository, 40 hexadecimal digits: branches and tags can move."""
    adapter: Lora | None = None
    """`{use: lora, rank: 16}` trains low-rank adapters and leaves the weights alone; null trains all weights."""
    quantize: Quantizer | None = None
    """Keep the weights of linear layers in `int8` or `nf4` (bitsandbytes), `int8_weight_only`, `int8_dynamic` or `int4`
    (torchao); they stay as they are, and an `adapter` on them is trained. A folder that is quantised already says so
    itself. The output matrix is left as it is."""
    attention: Attention = "auto"
    """`auto` is `sdpa` on a CPU; on CUDA flash where it is installed and `precision` is bf16, else `flex`. It is
    compared with `eager` when the model is loaded."""
    experts: Experts = "auto"
    """How a mixture's experts are multiplied: `eager` one after the other, `batched_mm` with a copy of an expert for
    each token, `grouped_mm` sorted by expert. `auto` is `grouped_mm` in float32 on a CPU, else `eager`."""
    router_replay: bool = True
    """Record which experts each token of a rollout is sent to, and send it there in training (Ma et al. 2025, arXiv
    2510.11370). A mixture whose router is not known is refused, unless this is false: then its routers choose anew."""
    expert_bias_rate: float = 0.0
    """What an optimiser step adds to the bias of each expert that got less than the mean, and takes from each that got
    more, where routers choose by such a bias (Wang et al. 2024, arXiv 2408.15664). 0 leaves the bias as it is."""
    packing: Literal["auto", "always", "never"] = "auto"
    """Sequences in one row, kept apart by positions: `auto` where attention is made for it (flash) and a probe at load
    proves it exact, `always` everywhere (refused where the probe fails, as with recurrent layers), `never` pads."""
    cache: Literal["auto", "never"] = "auto"
    """What answers are drawn with: `auto` takes the keys, values and states that the architecture keeps, where a probe
    at load proves it exact; a recurrent model that fails it is not drawn from. `never` reads an answer anew for each of
    its tokens."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    precision: Literal["float32", "bf16"] = "float32"
    """`bf16` multiplies matrices in bfloat16 and keeps weights, gradients and moments in float32."""
    gradient_checkpointing: bool = False
    """Keep only the layers' inputs for the backward pass: less memory, one more forward pass."""
    head_chunk: int = 0
    """Rows of logits that exist at a time; 0 chooses by device and vocabulary."""
    head_kernel: HeadKernel = "auto"
    """What reads those logits and writes their gradient: `auto` is the kernel on CUDA where the extra `triton` is
    installed, and torch's operations elsewhere; `torch` is always those, and `triton_head` refuses where it cannot be
    used."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. The run's configuration records it."""

    def __post_init__(self) -> None:
        require_source(self.weights, self.model, self.revision)
        if self.head_chunk < 0:
            raise ValueError(f"head_chunk must not be negative, got {self.head_chunk}")
        if not 0 <= self.expert_bias_rate < math.inf:
            raise ValueError(f"expert_bias_rate must be a number from 0, got {self.expert_bias_rate}")
        require_attention(self.attention, self.device, self.precision)
        if self.quantize is not None:
            check_quantizer(self.quantize, self.device, trains=self.adapter is not None)
            if self.weights.endswith(".gguf"):
                raise ValueError("quantize: the weights of a GGUF file are unpacked to float32 and not rounded again; "
                                 "take the model's safetensors, or leave quantize out")

    @property
    def framework(self) -> str:
        return "torch"

    @property
    def provides(self) -> frozenset[Output]:
        return OUTPUTS | ({Output.EXPERT_LOAD} if self.router_replay else set())

    @property
    def approximates(self) -> bool:
        """Whether log-probs of drawing and of reading differ by more than the rounding of floats; see
        `posttrain.protocols.Approximating`."""
        return self.quantize is not None and QUANTIZERS[self.quantize].rounds_inputs

    @property
    def frozen(self) -> str:
        """See `posttrain.protocols.Frozen`."""
        return nothing_to_train(self.quantize, ADD_ADAPTER) if self.adapter is None else ""

    def load(self, request: LoadRequest) -> TorchLearner:
        """The model with its adapter, its value heads and its optimiser. Raises `ConfigError`, `PluginError`."""
        quantisers = [QUANTIZERS[self.quantize].library, "accelerate"] if self.quantize else []
        require("backend 'hf'", "torch", "transformers", *(["peft"] if self.adapter else []),
                *(["gguf"] if self.weights.endswith(".gguf") else []), *quantisers)
        from posttrain_backends._torch.quiet import import_quietly

        import_quietly("torchao", *(["bitsandbytes"] if self.adapter or self.quantize else []))
        from posttrain_backends._torch.hf_loading import load

        return load(self, request)

    @property
    def formats(self) -> tuple[str, ...]:
        """See `posttrain.protocols.Exporting`."""
        return exports.FORMATS

    def export(self, form: str, saved: Path, folder: Path) -> Exported:
        """See `posttrain.protocols.Exporting`; an adapter was merged when its model was saved."""
        if self.quantize is not None:
            raise exports.refuse(f"policy.quantize: the saved weights are rounded ({self.quantize})",
                                 "leave --format out")
        return exports.write(form, saved, folder, HF(weights=str(saved), device="cpu"))


@final
@dataclass(frozen=True, slots=True)
class HFTokenizer:
    """The tokenizer of a model of transformers, with the ids of its special tokens made certain."""

    weights: str = field(default="", metadata={"path": True})
    """A folder with tokenizer files, or a GGUF file."""
    model: str = ""
    """Name of a repository on the hub; needs `revision`."""
    revision: str = ""
    """Commit of that repository, 40 hexadecimal digits."""
    eos: str = ""
    """Token that ends an answer; empty: the one the files name. What they name differs between versions of
    transformers for some models, so a run that must be repeated says it."""
    pad: str = ""
    """Empty: the files' own, else the eos token."""
    bos: str = ""
    """Token in front of text prompts; empty: the one the tokenizer itself puts in front, if it does."""
    chat_template: str = ""
    """Chat template (Jinja); empty: the files' own."""
    trust_remote_code: bool = False
    """Run Python code that comes with the tokenizer."""

    def __post_init__(self) -> None:
        require_source(self.weights, self.model, self.revision)

    def load(self) -> Tokenizer:
        """Raises `ConfigError` where a special token is not in the vocabulary, `PluginError` without transformers."""
        require("tokenizer 'hf'", "transformers", *(["gguf"] if self.weights.endswith(".gguf") else []))
        from posttrain_backends._torch.hf_tokenizer import load

        return load(self)


def source_of(weights: str, model: str, revision: str) -> tuple[str, dict[str, str | bool]]:
    """What `from_pretrained` is given: a folder or a name, and named arguments."""
    if weights.endswith(".gguf"):
        return str(Path(weights).parent), {"gguf_file": Path(weights).name, "local_files_only": True}
    return (weights, {"local_files_only": True}) if weights else (model, {"revision": revision})


def require_source(weights: str, model: str, revision: str) -> None:
    """Raise `ValueError` unless exactly one of a folder and a name with its commit is given."""
    if bool(weights) == bool(model):
        raise ValueError("give weights (a local folder or a .gguf file) or model (a name on the hub, with its "
                         "revision)")
    if model and not re.fullmatch("[0-9a-f]{40}", revision):
        raise ValueError(f"revision of {model} must be a commit of 40 hexadecimal digits, got {revision!r}: branches "
                         "and tags can move; the hub shows it beside the files")


def unreachable(model: str, error: Exception) -> ConfigError:
    """A repository or folder that transformers could not read."""
    reason = str(error).strip().splitlines()[0]
    return ConfigError([f"{model} cannot be loaded: {reason}"],
                       next_step="Check the name and the revision; without a network, download the folder elsewhere "
                                 "and give it as weights.")
