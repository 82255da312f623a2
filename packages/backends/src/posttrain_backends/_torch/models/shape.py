"""Sizes of the native decoder, and the `config.json` of a Hugging Face Llama folder that holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import final

from posttrain.errors import ConfigError

from posttrain_backends._torch.models.files import CONFIG

_REFUSED: Mapping[str, tuple[object, ...]] = {
    "rope_scaling": (None,), "attention_bias": (None, False), "mlp_bias": (None, False), "hidden_act": (None, "silu")}
"""Keys of a Llama config that change the model, and the values the native decoder computes."""


@final
@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder, under the names of Hugging Face's `LlamaConfig`."""

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


def llama_config(shape: Shape) -> dict[str, object]:
    """The `config.json` of a native decoder."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "torch_dtype": "float32", **asdict(shape)}


def read_shape(folder: Path) -> Shape:
    """The sizes in a folder's `config.json`; raises `ConfigError` where the native decoder is another model."""
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError([f"{folder} holds no {CONFIG}"],
                          next_step="policy.weights names a folder written by a run, or a Hugging Face Llama folder.")
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}  # where newer transformers write rope_theta and rope_scaling
    config.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    problems = [f"{key} is {config[key]!r}" for key, allowed in _REFUSED.items() if config.get(key) not in allowed]
    if config.get("model_type") != "llama":
        problems.insert(0, f"model_type is {config.get('model_type')!r}, the native decoder is 'llama'")
    if problems:
        raise ConfigError(problems, title=f"{path} describes a model the torch backend does not compute:",
                          next_step="Use policy: {use: hf, model: ...} for it.")
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    if config.get("head_dim") is None:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    return Shape(**{f.name: config[f.name] for f in fields(Shape) if f.name in config})
