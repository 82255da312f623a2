"""From the backend `hf`'s configuration to a learner: read, unpack, adapt, prove, put on the device."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from posttrain.errors import ConfigError
from posttrain.protocols import LoadRequest
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from posttrain_backends._torch.device import device_of
from posttrain_backends._torch.forms import form_on
from posttrain_backends._torch.hf_classifier import class_of, read_classifier, read_config
from posttrain_backends._torch.learner import TorchLearner, require_no_action_values
from posttrain_backends._torch.models import files
from posttrain_backends._torch.models.hf import (
    HFTrunk,
    adapted,
    attends_to_all,
    require_plain_head,
    tolerance,
    tree_error,
)
from posttrain_backends._torch.models.hf_attention import read_with
from posttrain_backends._torch.models.hf_mixture import choose_experts, with_routes
from posttrain_backends._torch.models.hf_probe import attend_by
from posttrain_backends._torch.models.hf_states import drawable, require_grouped_norm
from posttrain_backends._torch.models.hf_value import HFValueModel, give_heads, require_causal_head
from posttrain_backends._torch.quantised import prepared, quantizer_of, reading, require_trainable
from posttrain_backends._torch.quiet import without_bars
from posttrain_backends.attention import require_device
from posttrain_backends.hf import source_of, unreachable

if TYPE_CHECKING:
    from posttrain_backends.hf import HF, Lora


def load(spec: HF, request: LoadRequest) -> TorchLearner:
    """See `HF.load`."""
    if request.threads:
        torch.set_num_threads(request.threads)
    device = device_of(spec.device, spec.precision)
    require_device(spec.attention, device.type, trained=request.optimization is not None)
    if not spec.weights.endswith(".gguf") and class_of(config := read_config(spec)) is not None:
        return load_critic(spec, config, request, device)
    causal = read(spec).to(device)
    if spec.adapter is not None:
        add_adapter(causal, spec.adapter, request.seed)
    if request.optimization is not None:
        require_trainable(causal, own_adapter=spec.adapter is not None)
    require_grouped_norm(causal)
    choose_experts(causal, spec)
    model = with_routes(drawable(causal, spec.precision, gradient_checkpointing=spec.gradient_checkpointing,
                                 cache=spec.cache), spec)
    require_plain_head(model)
    require_rows(len(model.output_weight), request.vocab_size)
    model.trees = follows_trees(model)
    attend_by(model, spec, trained=request.optimization is not None)
    learner = TorchLearner(model, optimization=request.optimization, value_heads=request.value_heads,
                           action_value_heads=request.action_value_heads, head_rows=spec.head_chunk,
                           comm=request.comm,
                           form=form_on(model.output_weight, model.compute_dtype, spec.head_kernel))
    if spec.weights:
        learner.load_heads(Path(spec.weights))
    return learner


def load_critic(spec: HF, config: Any, request: LoadRequest, device: torch.device) -> TorchLearner:
    """A classification model as a learner of values alone."""
    if spec.quantize is not None or quantizer_of(config) is not None:
        raise ConfigError([f"{spec.weights or spec.model}: a {config.architectures[0]} is trained with its read-out, "
                           "and not quantised yet; leave quantize out, or take a causal language model"])
    require_no_action_values(request.action_value_heads,
                             f"{spec.weights or spec.model} is a {config.architectures[0]}, which")
    if spec.expert_bias_rate:
        raise ConfigError([f"expert_bias_rate is {spec.expert_bias_rate}, and {spec.weights or spec.model} is a "
                           f"{config.architectures[0]}: only a policy's load of experts is known; leave it out"])
    if not request.value_heads:
        raise ConfigError(
            [f"{spec.weights or spec.model} is a {config.architectures[0]}, which gives no log-probs; it can be a "
             "critic (critic: {use: hf, weights: ...}) or a reward (reward_model), not a policy or a reference"],
            next_step="Name a causal language model (...ForCausalLM) here.")
    task, causal = read_classifier(spec, config)
    without_dropout(causal)
    give_heads(causal.to(device), request.value_heads)
    if spec.adapter is not None:
        add_adapter(causal, spec.adapter, request.seed, task="SEQ_CLS")
    choose_experts(causal, spec)
    model = HFValueModel(causal, spec.precision, gradient_checkpointing=spec.gradient_checkpointing)
    model.value_head.requires_grad_(True)  # an adapter leaves all that is not its own alone
    require_causal_head(model, pooled=task == "sequence")
    require_rows(model.embeddings, request.vocab_size)
    model.trees = follows_trees(model)
    attend_by(model, spec, trained=request.optimization is not None)
    return TorchLearner(model, optimization=request.optimization, comm=request.comm)


def read(spec: HF) -> PreTrainedModel:
    """The module in float32, or quantised, without dropout, on the host."""
    name, arguments = source_of(spec.weights, spec.model, spec.revision)
    how = {"dtype": torch.float32} if "gguf_file" in arguments else reading(spec, read_config(spec))
    generator = torch.get_rng_state()  # recurrent layers are drawn first, and then overwritten
    try:
        with without_bars(local=bool(spec.weights)):
            causal = AutoModelForCausalLM.from_pretrained(
                name, attn_implementation=read_with(spec.attention), trust_remote_code=spec.trust_remote_code,
                use_safetensors=True if "gguf_file" not in arguments else None, **arguments, **how)
    except (OSError, ValueError, ImportError) as error:
        raise unreachable(spec.weights or spec.model, error) from error
    torch.set_rng_state(generator)
    if spec.weights.endswith(".gguf"):
        causal = unpacked(causal)
    without_dropout(causal)
    return prepared(causal.eval())


def without_dropout(causal: PreTrainedModel) -> None:
    """Set every rate of dropout and of a router's noise to 0: the ratio to the sampler's log-probs would be noise."""
    for module in causal.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in [n for n, value in vars(module).items()
                     if ("dropout" in n or n == "jitter_noise") and isinstance(value, float)]:
            setattr(module, name, 0.0)


def unpacked(causal: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a module that knows nothing of GGUF: the one that was read refuses to be saved."""
    settings = causal.config.to_dict()
    settings.pop("quantization_config", None)
    config = AutoConfig.for_model(**settings)
    plain: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=causal.config._attn_implementation)
    files.copy_named(causal.state_dict().items(), plain.state_dict(), "the GGUF file")
    plain.generation_config = causal.generation_config
    return plain


def add_adapter(causal: PreTrainedModel, lora: Lora, seed: int, task: str = "CAUSAL_LM") -> None:
    """Low-rank layers in the module, A drawn from `seed` and B zero: the first policy is the model itself. `task` tells
    peft which layer is the read-out, which gets none."""
    from peft import LoraConfig, inject_adapter_in_model

    if adapted(causal):
        raise ConfigError(["policy.adapter: these weights have an adapter already; go on in the run that trained it "
                           "(posttrain resume), or take the weights it is on"])
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=targets,
                        task_type=task, bias="none")
    linear = sorted({name.rpartition(".")[2] for name, module in causal.named_modules()
                     if isinstance(module, torch.nn.Linear)})
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of experts, which are refused below, and of a flag it then sets by itself
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, causal)
        except ValueError as error:
            raise ConfigError([f"policy.adapter.targets: {str(error).splitlines()[0]}; linear layers of this model are "
                               f"{', '.join(linear)}"]) from error
    if any(module is causal.get_output_embeddings() for module in adapted(causal).values()):
        raise ConfigError(["policy.adapter.targets: the output matrix is read as it is, so an adapter on it would "
                           "never be trained; leave it out"])
    odd = [name for name, module in adapted(causal).items() if not hasattr(module, "weight")]
    if odd:
        raise ConfigError([f"policy.adapter: {odd[0]} holds several matrices in one (experts); adapters on them are "
                           "not supported yet: name other layers in policy.adapter.targets"])
    if passed := passed_over(causal):
        raise ConfigError([f"policy.adapter.targets: {type(causal).__name__} reads the weights of {', '.join(passed)} "
                           "itself, so an adapter on them would never be trained; name the other layers: "
                           f"{', '.join(name for name in linear if name not in (*passed, 'lm_head'))}"])


@torch.no_grad()
def passed_over(causal: PreTrainedModel) -> list[str]:
    """Last names of adapted layers whose module is not called where the one around it is."""
    called: set[torch.nn.Module] = set()
    hooks = [module.register_forward_hook(lambda module, given, out: called.add(module))
             for module in causal.modules()]
    try:
        causal(input_ids=torch.zeros(1, 2, dtype=torch.long, device=causal.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return sorted({name.rpartition(".")[2] for name, module in adapted(causal).items()
                   if module not in called and causal.get_submodule(name.rpartition(".")[0]) in called})


def require_rows(rows: int, vocab_size: int) -> None:
    """Raise `ConfigError` where the tokenizer has ids for which the model has no embedding."""
    if vocab_size > rows:
        raise ConfigError(
            [f"the tokenizer has {vocab_size} tokens, the model {rows} embeddings"],
            next_step="Take the tokenizer the weights were trained with (tokenizer: {use: hf, weights: ...}).")


def follows_trees(model: HFTrunk) -> bool:
    """Whether prompts can be computed once for all their answers."""
    try:
        return attends_to_all(model.causal.config) and tree_error(model) <= tolerance(model.causal)
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):  # the module takes no such mask
        return False
