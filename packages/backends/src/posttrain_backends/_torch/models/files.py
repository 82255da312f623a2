"""Model folders: safetensors under Hugging Face names, and `config.json`. Knows no learner.

A folder of the native decoder is a Hugging Face Llama folder and the other way round. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path

import torch
from posttrain.errors import ConfigError
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain_backends._torch.models.decoder import Shape

CONFIG, WEIGHTS, VALUE_HEAD = "config.json", "model.safetensors", "value_head.safetensors"
_REFUSED: Mapping[str, tuple[object, ...]] = {
    "rope_scaling": (None,), "attention_bias": (None, False), "mlp_bias": (None, False), "hidden_act": (None, "silu")}
"""Keys of a Llama config that change the model, and the values the native decoder computes."""


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


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's model, from one file or from several; the value head apart."""
    paths = sorted(p for p in folder.glob("*.safetensors") if p.name != VALUE_HEAD)
    if not paths:
        raise ConfigError([f"{folder} holds no *.safetensors"],
                          next_step="policy.weights names a folder written by a run, or a Hugging Face Llama folder.")
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}


def read_value_head(folder: Path) -> dict[str, Tensor]:
    """`weight` and `bias` of the folder's value head; nothing where it has none."""
    return load_file(folder / VALUE_HEAD) if (folder / VALUE_HEAD).is_file() else {}


def write(folder: Path, config: Mapping[str, object], weights: Mapping[str, Tensor],
          value_head: Mapping[str, Tensor]) -> None:
    """Write a folder that `weights:` of a config can load again."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(_plain(weights), folder / WEIGHTS, metadata={"format": "pt"})
    if value_head:
        save_file(_plain(value_head), folder / VALUE_HEAD, metadata={"format": "pt"})


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def copy_named(source: Iterable[tuple[str, Tensor]], target: Mapping[str, Tensor], what: str) -> None:
    """Write every source tensor into the target of its name; all names and shapes must fit, or nothing is written.

    Raises `ConfigError` that lists what is missing, unknown or of another shape.
    """
    given = dict(source)
    problems = [f"{name} is missing" for name in target if name not in given]
    problems += [f"{name} is unknown to the model" for name in given if name not in target]
    problems += [f"{name} has shape {tuple(given[name].shape)}, the model has {tuple(t.shape)}"
                 for name, t in target.items() if name in given and given[name].shape != t.shape]
    if problems:
        shown = [*problems[:5], *([f"and {len(problems) - 5} more"] if len(problems) > 5 else [])]
        raise ConfigError(shown, title=f"{what} does not fit the model:")
    with torch.no_grad():
        for name, t in target.items():
            t.copy_(given[name])
