"""Sizes and traits of the native decoder, and the families of models that have them. Knows no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, final

from posttrain_backends.families.rope import Scaling

ModelType = Literal["llama", "qwen2", "qwen3", "smollm3", "mixtral", "qwen2_moe", "qwen3_moe"]


@final
@dataclass(frozen=True, slots=True)
class Family:
    """The models of one `model_type`: what they all have, what a file may say of one, and what its silence means."""

    architecture: str
    """Their class in transformers."""
    qkv_bias: bool = False
    """Queries, keys and values have a bias, whatever the file says, and no other matrix has."""
    qk_norm: bool = False
    """Each head's query and key pass an RMSNorm before they are turned (as in 2302.05442, there a LayerNorm)."""
    normalises_experts: bool = False
    """The weights of a token's experts add up to 1, whatever the file says."""
    experts_key: str = "num_experts"
    """What its files call the number of experts."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Parts of parameters' names -> what its files call them."""
    fixed: Mapping[str, object] = field(default_factory=dict)
    """Keys that change its models, and the one value that the native decoder computes."""
    traits: frozenset[str] = frozenset()
    """Keys of a file that it heeds, of those that not all families do."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """What transformers takes where the file has no such key; in most families Llama's."""


_BIASES = frozenset({"attention_bias", "mlp_bias"})
_WINDOWS = frozenset({"use_sliding_window", "max_window_layers"})
_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_EXPERTS = frozenset({"num_experts", "num_experts_per_tok"})
_SOME_LAYERS = _EXPERTS | {"moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers",
                           "use_sliding_window"}
FAMILIES: Mapping[ModelType, Family] = {
    "llama": Family("LlamaForCausalLM", traits=_BIASES),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, traits=_WINDOWS, defaults=_QWEN),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, traits=_WINDOWS | {"attention_bias"},
                    defaults={**_QWEN, "head_dim": 128}),
    "smollm3": Family("SmolLM3ForCausalLM",
                      traits=_BIASES | {"no_rope_layers", "no_rope_layer_interval", "use_sliding_window"},
                      defaults={"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True,
                                "no_rope_layer_interval": 4}),
    "mixtral": Family(
        "MixtralForCausalLM", normalises_experts=True, experts_key="num_local_experts",
        names={"mlp": "block_sparse_moe", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
        fixed={"router_jitter_noise": 0.0}, traits=_EXPERTS | {"use_sliding_window"},
        defaults={"num_key_value_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_experts": 8,
                  "num_experts_per_tok": 2, "use_sliding_window": True}),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM", qkv_bias=True, fixed={"qkv_bias": True},
        traits=_SOME_LAYERS | {"shared_expert_intermediate_size"},
        defaults={"num_key_value_heads": 16, "sliding_window": 4096, "num_experts": 60, "num_experts_per_tok": 4,
                  "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", qk_norm=True, traits=_SOME_LAYERS | {"attention_bias"},
        defaults={"num_key_value_heads": 4, "sliding_window": 4096, "num_experts": 128, "num_experts_per_tok": 8,
                  "moe_intermediate_size": 768}),
}
"""Touvron et al. 2023 (2302.13971), also SmolLM and SmolLM2; Yang et al. 2024 (2407.10671) and 2025 (2505.09388);
Bakouch et al. 2025, whose layers without positions follow 2501.18795. With experts: Jiang et al. 2024 (2401.04088), and
the Qwen ones as above."""


@final
@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes and traits of a decoder, under the names of Hugging Face's configs."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    model_type: ModelType = "llama"
    rope_scaling: Scaling | None = None
    attention_bias: bool = False
    """On queries, keys, values and the output of attention."""
    mlp_bias: bool = False
    """On all three matrices."""
    no_rope_layers: tuple[int, ...] = ()
    """Per layer 1 where it has rotary positions and 0 where it has none; () gives all layers theirs."""
    num_experts: int = 0
    """Of each layer that has some."""
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    """Width of an expert; 0 makes it `intermediate_size`."""
    shared_expert_intermediate_size: int = 0
    """Width of the expert that reads all tokens; 0 for none."""
    norm_topk_prob: bool = False
    """Whether the weights of a token's experts add up to 1."""
    mlp_only_layers: tuple[int, ...] = ()
    """Layers without experts."""

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias or FAMILIES[self.model_type].qkv_bias

    @property
    def qk_norm(self) -> bool:
        return FAMILIES[self.model_type].qk_norm

    @property
    def normalises_experts(self) -> bool:
        return self.norm_topk_prob or FAMILIES[self.model_type].normalises_experts

    @property
    def expert_size(self) -> int:
        return self.moe_intermediate_size or self.intermediate_size

    def has_experts(self, layer: int) -> bool:
        return self.num_experts > 0 and layer not in self.mlp_only_layers

    def has_rope(self, layer: int) -> bool:
        return not self.no_rope_layers or bool(self.no_rope_layers[layer])


def no_rope_layers(layers: int, interval: int = 4) -> tuple[int, ...]:
    """`Shape.no_rope_layers` of a model whose every `interval`-th layer has no positions.

    >>> no_rope_layers(5)
    (1, 1, 1, 0, 1)
    """
    return tuple(int((layer + 1) % interval != 0) for layer in range(layers))


def name_in_files(name: str, model_type: ModelType) -> str:
    """A parameter's name in the files of a family.

    >>> name_in_files("model.layers.0.mlp.experts.3.up_proj.weight", "mixtral")
    'model.layers.0.block_sparse_moe.experts.3.w3.weight'
    """
    names = FAMILIES[model_type].names
    return ".".join(names.get(part, part) for part in name.split("."))
