"""Sizes and traits of a Mamba-2 model, read from and written to `config.json` in Hugging Face's form."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, final

from posttrain.errors import ConfigError

from posttrain_backends.families.files import CONFIG, NO_FOLDER

MODEL_TYPE = "mamba2"
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "head_dim", "state_size")
"""What every file must say."""
_NATIVE: Mapping[str, object] = {"model_type": MODEL_TYPE, "hidden_act": "silu"}
"""Keys that change the model, and the one value that is computed."""


@final
@dataclass(frozen=True, slots=True)
class Mamba2Shape:
    """Under the names of Hugging Face's configs; what has a default has transformers'."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_heads: int
    head_dim: int
    """P"""
    state_size: int
    """N"""
    n_groups: int = 8
    """Pairs of B and C; each is for `num_heads / n_groups` heads."""
    conv_kernel: int = 4
    """K"""
    chunk_size: int = 256
    """Q"""
    layer_norm_epsilon: float = 1e-5
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    """Least and largest step."""
    use_bias: bool = False
    """On the projections into and out of a layer."""
    use_conv_bias: bool = True
    tie_word_embeddings: bool = False

    @property
    def inner_size(self) -> int:
        """Width of what the recurrence reads and gives."""
        return self.num_heads * self.head_dim

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: the inputs of the recurrence, B and C."""
        return self.inner_size + 2 * self.n_groups * self.state_size


def config_of(shape: Mamba2Shape) -> dict[str, object]:
    """The `config.json` of a model. Special tokens are unknown to it, and said to be."""
    said = asdict(shape)
    if shape.time_step_limit == (0.0, math.inf):
        del said["time_step_limit"]  # infinity is no JSON, and what silence means
    return {"architectures": ["Mamba2ForCausalLM"], **_NATIVE, "torch_dtype": "float32", "bos_token_id": None,
            "eos_token_id": None, "pad_token_id": None, "expand": shape.inner_size // shape.hidden_size, **said}


def read_shape(folder: Path) -> Mamba2Shape:
    """The shape in a folder's `config.json`; raises `ConfigError` where it is another model."""
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError([f"{folder} holds no {CONFIG}"], next_step=NO_FOLDER)
    config = {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if value is not None}
    if problems := list(_problems(config)):
        raise ConfigError(problems, title=f"{path} describes a model the ssm backend does not compute:",
                          next_step=f"Take {{use: torch, weights: {folder}}} for a transformer, and {{use: hf, "
                                    f"weights: {folder}}} for the rest.")
    limit = tuple(map(_number, config.get("time_step_limit", (0.0, math.inf))))
    values = {**config, "time_step_limit": limit}
    return Mamba2Shape(**{f.name: values[f.name] for f in fields(Mamba2Shape) if f.name in values})


def _number(said: object) -> float:
    """A number, or the form that transformers gives one that is no JSON."""
    return float(said["__float__"] if isinstance(said, Mapping) else said)  # type: ignore[arg-type]  # what a file says


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Each thing that a file says and the model cannot do, beside what it can."""
    for key, native in _NATIVE.items():
        if (said := config.get(key, native)) != native:
            yield f"{key} is {said!r}; native is {native!r}"
    if "quantization_config" in config:
        yield "its weights are quantised (quantization_config); native are float32, float16 and bfloat16"
    if missing := [name for name in _SIZES if name not in config]:
        yield f"it does not say {', '.join(missing)}"
        return
    heads, groups = config["num_heads"], config.get("n_groups", 8)
    if heads % groups:
        yield f"num_heads {heads} is not a multiple of n_groups {groups}"
    if (inner := heads * config["head_dim"]) % (hidden := config["hidden_size"]):
        yield f"num_heads * head_dim is {inner}, not a multiple of hidden_size {hidden}"
