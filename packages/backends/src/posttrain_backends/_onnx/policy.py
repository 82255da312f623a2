"""Which torch policies ONNX Runtime can draw from: the shape that their graph is written from, or why there is none."""

from __future__ import annotations

import torch
from posttrain.errors import ConfigError

from posttrain_backends._torch.learner import TorchLearner
from posttrain_backends._torch.models.decoder import Decoder
from posttrain_backends._torch.models.interface import AdaptedLanguageModel, LanguageModel
from posttrain_backends._torch.models.projections import has_plain_layers
from posttrain_backends.families.config import misfits, shape_of
from posttrain_backends.families.shape import Shape

_FAMILIES = "graphs are written for llama, qwen2, qwen3 and smollm3"


def shape_to_draw_from(policy: TorchLearner) -> Shape:
    """Raises `ConfigError` that says why there is no graph of the policy, or none that draws what it is."""
    if why := _obstacle(policy):
        raise ConfigError([f"engine 'onnx' does not draw from this policy: {why}"],
                          next_step="Take rollout.engine: batched, which decodes every torch model.")
    return _shape(policy.model)


def _obstacle(policy: TorchLearner) -> str:
    """Why not; empty where nothing stands against it."""
    model = policy.model
    if policy.device.type != "cpu":
        return f"it is on {policy.device.type}, and this engine draws on CPUs"
    if model.compute_dtype == torch.bfloat16:
        return "it computes in bfloat16 and the engine in float32, so what is drawn would be another model's; set " \
            "policy.precision to float32"
    if isinstance(model, AdaptedLanguageModel) and model.has_adapter:
        return "it has an adapter, and the graph has none"
    if not has_plain_layers(model.module):
        return "its weights are quantised; the graph is written for plain ones, and rounds them itself where " \
            "rollout.engine.quantize says so"
    if isinstance(model, Decoder):
        return _FAMILIES + f", and it is a {model.shape.model_type} with experts" if model.shape.num_experts else ""
    said = _config(model)
    if said is None:
        return f"it is a {type(model).__name__}; {_FAMILIES}"
    if wrong := misfits(said):
        return "; ".join(wrong)
    return _FAMILIES + f", and it is a {said['model_type']} with experts" if shape_of(said).num_experts else ""


def _shape(model: LanguageModel) -> Shape:
    return model.shape if isinstance(model, Decoder) else shape_of(_config(model) or {})


def _config(model: LanguageModel) -> dict[str, object] | None:
    """What the `config.json` of a module of transformers says; None of another one."""
    config = getattr(getattr(model, "causal", None), "config", None)
    return None if config is None else dict(config.to_dict())
