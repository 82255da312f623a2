"""`config.json` of the native families: read to a `Shape`, written from one, and refused where it says another model.

Reads the keys of transformers 5 (`rope_parameters`) and of older ones (`rope_theta`, `rope_scaling`), and writes the
older ones, which all of them read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError

from posttrain_backends.families.files import CONFIG, NO_FOLDER
from posttrain_backends.families.rope import SCALINGS
from posttrain_backends.families.shape import FAMILIES, Family, Shape, no_rope_layers

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "max_position_embeddings")
"""What every file must say."""
_TRAITS = frozenset({"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval",
                     "use_sliding_window", "max_window_layers", "num_experts", "num_experts_per_tok",
                     "moe_intermediate_size", "shared_expert_intermediate_size", "norm_topk_prob",
                     "decoder_sparse_step", "mlp_only_layers"})
"""Keys that some families know and the others ignore."""
_NATIVE: Mapping[str, object] = {"hidden_act": "silu", "partial_rotary_factor": 1.0}
"""Keys that change the model, and the one value the native decoder computes."""
_OTHER_BACKENDS: Mapping[object, str] = {"mamba2": "ssm"}
"""model_type -> the native backend that computes it."""

Config = Mapping[str, Any]
"""A file's keys in one mapping, without those that are null."""


def config_of(shape: Shape) -> dict[str, object]:
    """The `config.json` of a native decoder. Special tokens are unknown to it, and said to be: else transformers takes
    those of the family's published models."""
    family = FAMILIES[shape.model_type]
    said = {**asdict(shape), "no_rope_layers": [int(shape.has_rope(i)) for i in range(shape.num_hidden_layers)]}
    return {"architectures": [family.architecture], "hidden_act": "silu", "torch_dtype": "float32",
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
            **{_key(key, family): value for key, value in said.items() if key not in _TRAITS or key in family.traits}}


def _key(name: str, family: Family) -> str:
    """What a family's files call a field of `Shape`."""
    return family.experts_key if name == "num_experts" else name


def read_shape(folder: Path) -> Shape:
    """The shape in a folder's `config.json`; raises `ConfigError` where the native decoder is another model."""
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError([f"{folder} holds no {CONFIG}"], next_step=NO_FOLDER)
    said = json.loads(path.read_text(encoding="utf-8"))
    if problems := misfits(said):
        backend = _OTHER_BACKENDS.get(said.get("model_type"), "hf")
        raise ConfigError(problems, title=f"{path} describes a model the torch backend does not compute:",
                          next_step=f"Use policy: {{use: {backend}, weights: {folder}}} for it.")
    return shape_of(said)


def misfits(said: Mapping[str, Any]) -> list[str]:
    """Each thing that a `config.json` says and the native decoder does not compute."""
    return list(_problems(_flat(said)))


def shape_of(said: Mapping[str, Any]) -> Shape:
    """The shape that a `config.json` without `misfits` describes."""
    return _shape(_flat(said))


def _flat(said: Mapping[str, Any]) -> Config:
    """What the file says and what its silence means, rotary positions at the top level: there the older key stands
    before the newer one, and both before the rest, as in transformers."""
    family = FAMILIES.get(said.get("model_type"))  # type: ignore[arg-type]  # what a file says may be no family
    rope = said.get("rope_scaling") or said.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    original = {"original_max_position_embeddings": said.get("max_position_embeddings")}
    experts = {"num_experts": said.get("num_experts", said["num_local_experts"])} if "num_local_experts" in said else {}
    flat = {**(family.defaults if family else {}), **original, **said, **rope, **experts, "rope_type": kind}
    foreign = {"rope_scaling", *(_TRAITS.difference(family.traits) if family else ())}
    return {key: value for key, value in flat.items() if value is not None and key not in foreign}


def _shape(config: Config) -> Shape:
    heads, kind = config["num_attention_heads"], config["rope_type"]
    scaling = SCALINGS[kind](**{name: config[name] for name in _asked(kind)}) if kind in SCALINGS else None
    values = {"num_key_value_heads": heads, "head_dim": config["hidden_size"] // heads, **config,
              "rope_scaling": scaling, "no_rope_layers": _layers_with_rope(config),
              "mlp_only_layers": _layers_without_experts(config)}
    return Shape(**{f.name: values[f.name] for f in fields(Shape) if f.name in values})


def _asked(rope_type: str) -> frozenset[str]:
    """What a file with this scaling must say."""
    return frozenset(f.name for f in fields(SCALINGS[rope_type])) - {"rope_type"}


def _layers_with_rope(config: Config) -> tuple[int, ...]:
    """`Shape.no_rope_layers`: a list, or each layer but every so manieth, or all."""
    layers, interval = config["num_hidden_layers"], config.get("no_rope_layer_interval")
    every = no_rope_layers(layers, interval) if interval else ()
    return tuple(config.get("no_rope_layers", every)[:layers])


def _layers_without_experts(config: Config) -> tuple[int, ...]:
    """Those of a list, and all but every so manieth; none where no layer has any."""
    step, named = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers", ())
    layers = range(config["num_hidden_layers"] if config.get("num_experts") else 0)
    return tuple(layer for layer in layers if layer in named or (layer + 1) % step)


# ---- what the native decoder does not compute


def _problems(config: Config) -> Iterator[str]:
    """Each thing that a file says and the decoder cannot do, beside what it can."""
    family = FAMILIES.get(config.get("model_type"))  # type: ignore[arg-type]  # as above
    if family is None:
        yield f"model_type is {config.get('model_type')!r}; native are {', '.join(FAMILIES)}"
    for key, native in {**_NATIVE, **(family.fixed if family else {})}.items():
        if (said := config.get(key, native)) != native:
            yield f"{key} is {said!r}; native is {native!r}"
    if "quantization_config" in config:
        yield "its weights are quantised (quantization_config); native are float32, float16 and bfloat16"
    yield from _rope_problems(config)
    if missing := [name for name in _SIZES if name not in config]:
        yield f"it does not say {', '.join(missing)}"
    elif family is not None:
        yield from _layer_problems(config)


def _rope_problems(config: Config) -> Iterator[str]:
    kind = config["rope_type"]
    if kind in SCALINGS:
        if missing := sorted(_asked(kind) - config.keys()):
            yield f"rope_type is {kind!r}, but it does not say {', '.join(missing)}"
    elif kind != "default":
        yield f"rope_type is {kind!r}; native are default, {', '.join(SCALINGS)}"


def _layer_problems(config: Config) -> Iterator[str]:
    """Layers that attend to fewer tokens than the longest sequence has, and layers of which nothing is said."""
    layers, positions = config["num_hidden_layers"], config["max_position_embeddings"]
    kinds = config.get("layer_types", ())
    if others := sorted({*kinds} - {"full_attention", "sliding_attention"}):
        yield f"layer_types has {', '.join(others)}; native is full_attention"
    slides = "sliding_attention" in kinds if kinds else \
        config.get("use_sliding_window", False) and config.get("max_window_layers", 0) < layers
    if slides and (window := config.get("sliding_window", positions)) < positions:
        yield (f"sliding_window is {window}, below max_position_embeddings {positions}, and some layers use it; native "
               "is full attention")
    experts, chosen = config.get("num_experts", 0), config.get("num_experts_per_tok", 0)
    if experts and not 1 <= chosen <= experts:
        yield f"num_experts_per_tok is {chosen}, of {experts} experts"
    if 0 < (said := len(_layers_with_rope(config))) < layers:
        yield f"no_rope_layers says something of {said} layers, num_hidden_layers is {layers}"
