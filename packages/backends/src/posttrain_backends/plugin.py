"""What this package offers, as data: listing it imports neither the components nor a framework."""

from __future__ import annotations

from collections.abc import Iterable

from posttrain.hookspecs import Component, hookimpl


@hookimpl
def components() -> Iterable[Component]:
    """Model backends, their tokenizers, rollout engines, and GPU kernels."""
    return (
        Component("backend", "torch", "posttrain_backends.torch_native:Torch",
                  "native transformer (Llama, Qwen2, Qwen3, SmolLM, Mixtral) or your own torch module, CPU or CUDA",
                  source="Touvron et al. 2023, arXiv 2302.13971", extra="torch"),
        Component("backend", "moe", "posttrain_backends.torch_native:Torch",
                  "native transformer whose layers are mixtures of experts, CPU or CUDA",
                  defaults={"family": "qwen3_moe", "experts": 8}, extra="torch",
                  source="Shazeer et al. 2017, arXiv 1701.06538; Yang et al. 2025, arXiv 2505.09388"),
        Component("backend", "ssm", "posttrain_backends.ssm:SSM",
                  "native Mamba-2, a state-space model whose memory does not grow with the text, CPU or CUDA",
                  source="Dao & Gu 2024, arXiv 2405.21060", extra="torch"),
        Component("backend", "hf", "posttrain_backends.hf:HF",
                  "any causal language model of Hugging Face transformers, also with low-rank adapters",
                  source="Hu et al. 2021, arXiv 2106.09685 (adapters)", extra="hf"),
        Component("backend", "quantized", "posttrain_backends.hf:HF",
                  "a causal language model of transformers in 4 bits, with low-rank adapters that are trained (QLoRA)",
                  defaults={"quantize": "nf4", "adapter": {"use": "lora"}}, extra="quantized",
                  source="Dettmers et al. 2023, arXiv 2305.14314"),
        Component("backend", "onnx", "posttrain_backends.onnx:Onnx",
                  "a frozen transformer (Llama, Qwen2, Qwen3, SmolLM) that ONNX Runtime scores with, as a reference",
                  source="ONNX Runtime, onnxruntime.ai", extra="onnx"),
        Component("reward", "reward_model", "posttrain_backends.reward_models:RewardModel",
                  "score of a sequence- or token-classification model of Hugging Face transformers",
                  source="Ouyang et al. 2022, arXiv 2203.02155", extra="hf"),
        Component("tokenizer", "hf", "posttrain_backends.hf:HFTokenizer",
                  "the tokenizer of a model of Hugging Face transformers", extra="hf"),
        Component("engine", "batched", "posttrain_backends.engines:Batched",
                  "own decoding loop on the policy's torch weights, finished rows refilled at once", extra="torch"),
        Component("engine", "onnx", "posttrain_backends.onnx_engine:OnnxEngine",
                  "decoding loop of a torch policy in ONNX Runtime on CPUs, also in 8 and 4 bits",
                  source="ONNX Runtime, onnxruntime.ai", extra="onnx"),
        Component("kernel", "triton_recurrence", "posttrain_backends.kernels.recurrence:TritonRecurrence",
                  "the recurrence behind returns and advantages, for CUDA tensors", extra="triton",
                  source="Blelloch 1990, Prefix sums and their applications"),
        Component("kernel", "triton_head", "posttrain_backends.kernels.head:TritonHead",
                  "log-probs and entropies of logits and their gradient in place, for CUDA tensors", extra="triton",
                  source="Milakov & Gimelshein 2018, arXiv 1805.02867"),
    )
