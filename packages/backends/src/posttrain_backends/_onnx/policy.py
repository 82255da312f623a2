"""Which torch policies ONNX Runtime can draw from: the shape that their graph is written from, or why there is none."""

from __future__ import annotations

import torch
from posttrain.errors import ConfigError

from posttrain_backends._onnx.decoder import decoding
from posttrain_backends._torch.learner import TorchLearner
from posttrain_backends._torch.models.decoder import Decoder
from posttrain_backends._torch.models.interface import AdaptedLanguageModel, LanguageModel
from posttrain_backends._torch.models.projections import has_plain_layers
from posttrain_backends.families.config import misfits, shape_of
from posttrain_backends.families.shape import Shape


def shape_to_draw_from(policy: TorchLearner) -> Shape:
    """Raises `ConfigError` that says why there is no graph of the policy, or none that draws what it is."""
    if why := _obstacles(policy):
        raise ConfigError([f"engine 'onnx' does not draw from this policy: {reason}" for reason in why],
                          next_step="Take rollout.engine: batched, which decodes every torch model.")
    return _shape(policy.model)


def _obstacles(policy: TorchLearner) -> list[str]:
    """Why not; empty where nothing stands against it."""
    model = policy.model
    if policy.device.type != "cpu":
        return [f"it is on {policy.device.type}, and this engine draws on CPUs"]
    if model.compute_dtype == torch.bfloat16:
        return ["it computes in bfloat16 and the engine in float32, so what is drawn would be another model's; set "
                "policy.precision to float32"]
    if isinstance(model, AdaptedLanguageModel) and model.has_adapter:
        return ["it has an adapter, and the graph has none"]
    if not has_plain_layers(model.module):
        return ["its weights are quantised; the graph is written for plain ones, and rounds them itself where "
                "rollout.engine.quantize says so"]
    if isinstance(model, Decoder):
        return _without_a_graph(model.shape)
    if (said := _config(model)) is None:
        return [f"it is a {type(model).__name__}; graphs are written for llama, qwen2, qwen3 and smollm3"]
    return misfits(said) or _without_a_graph(shape_of(said))


def _without_a_graph(shape: Shape) -> list[str]:
    """Why there is no graph of the shape."""
    try:
        decoding(shape)
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


def _shape(model: LanguageModel) -> Shape:
    return model.shape if isinstance(model, Decoder) else shape_of(_config(model) or {})


def _config(model: LanguageModel) -> dict[str, object] | None:
    """What the `config.json` of a module of transformers says; None of another one."""
    config = getattr(getattr(model, "causal", None), "config", None)
    return None if config is None else dict(config.to_dict())
