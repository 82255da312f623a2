"""The parity matrix: every architecture, tiny and random, against transformers, against itself packed, and as drawn.

For each row of the table in docs/parity.md:
  logits   largest difference from the logits that transformers computes of each sequence on its own
  packed   largest difference of hidden states between sequences in one row and each on its own; of the native
           transformer and the user's module, in one ragged pass
  drawn    largest difference between the log-probs that the engine `batched` records while it draws (3 rows, so that
           finished ones are refilled) and those that the learner scores
The first two relative to the largest number compared, all float32 on a CPU. A further architecture or trait is a row of
`CASES`, a further measure a column of `MEASURES`.

    python tools/parity.py [--write] [--only mamba2 jamba]

`--write` puts the table into the page. Needs transformers 5.23 or later for all rows.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from posttrain.data import Prompt, Sampling, offsets_of
from posttrain.errors import ConfigError
from posttrain.protocols import LoadRequest, Output
from posttrain.tokenizers import Characters
from posttrain_backends._torch.layout import Layout
from posttrain_backends.engines import Batched
from posttrain_backends.hf import HF, Lora
from posttrain_backends.ssm import SSM
from posttrain_backends.torch_native import Torch

PAGE = Path(__file__).parents[1] / "docs" / "parity.md"
TOKENIZER = Characters("abcdefgh01+").load()
"""pad 0, eos 1, then the alphabet."""
V = TOKENIZER.vocab_size
LENGTHS = [5, 40, 1, 11]
PROMPTS = [Prompt(text=text, group=i) for i, text in enumerate(["a", "0+1", "abcdefgh", "hh", "1+0+1"])
           for _ in range(3)]
SAMPLING = Sampling(max_new_tokens=16)

TOKENS = {"vocab_size": V, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
MAMBA = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2}
MAMBA2 = {**MAMBA, "num_heads": 8, "head_dim": 8, "state_size": 6, "n_groups": 2, "chunk_size": 5}
ATTENTION = {**MAMBA, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
             "max_position_embeddings": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPED_EXPERTS = {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2,
                   "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
                   "num_hidden_layers": 3}
SHARED = {"shared_expert_intermediate_size": 16}
BAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 6, "mamba_n_groups": 1, "mamba_chunk_size": 5}
DELTA = {"head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
         "linear_value_head_dim": 8, "num_hidden_layers": 4}

USER = """
import torch


class Sums(torch.nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.embed, self.lm_head = torch.nn.Embedding(vocab_size, 16), torch.nn.Linear(16, vocab_size, bias=False)

    def forward(self, tokens, positions):
        x = self.embed(tokens).cumsum(1)
        return torch.tanh(x / (1 + positions[..., None]) ** 0.5)


def build(vocab_size):
    return Sums(vocab_size)
"""


@dataclass(frozen=True)
class Case:
    """One row: a backend, a model of transformers (none for the user's module), and traits of the backend."""

    backend: str
    name: str
    model: str = ""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    traits: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", ATTENTION), "qwen2": ("qwen2", ATTENTION), "qwen3": ("qwen3", {**ATTENTION, "head_dim": 8}),
    "smollm3": ("smollm3", ATTENTION), "mixtral": ("mixtral", {**ATTENTION, "num_local_experts": 4}),
    "qwen2_moe": ("qwen2_moe", {**ATTENTION, **EXPERTS, **SHARED}),
    "qwen3_moe": ("qwen3_moe", {**ATTENTION, **EXPERTS, "head_dim": 8})}
"""Those that are native too."""
LIBRARY: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **FAMILIES,
    "gpt2": ("gpt2", {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "bloom": ("bloom", {**TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mistral, window of 16": ("mistral", {**ATTENTION, "sliding_window": 16}),
    "deepseek_v3": ("deepseek_v3", {
        **ATTENTION, **GROUPED_EXPERTS, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8}),
    "glm4_moe": ("glm4_moe", {**ATTENTION, **GROUPED_EXPERTS, "head_dim": 8}),
    "mamba": ("mamba", {**MAMBA, "state_size": 4}),
    "mamba2": ("mamba2", MAMBA2),
    "mamba2, time_step_limit": ("mamba2", {**MAMBA2, "time_step_limit": (0.4, 1.5)}),
    "falcon_mamba": ("falcon_mamba", {**MAMBA, "state_size": 4}),
    "jamba": ("jamba", {**ATTENTION, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
                        "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4, "mamba_d_state": 4,
                        "mamba_dt_rank": 4, "use_mamba_kernels": False}),
    "qwen3_next": ("qwen3_next", {**ATTENTION, **EXPERTS, **SHARED, **DELTA}),
    "qwen3_5": ("qwen3_5_text", {**ATTENTION, **DELTA}),
    "bamba": ("bamba", {**ATTENTION, **BAMBA, "num_hidden_layers": 3, "attn_layer_indices": [1]}),
    "granitemoehybrid": ("granitemoehybrid", {
        **ATTENTION, **BAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 4,
        "num_experts_per_tok": 2, "shared_intermediate_size": 16}),
    "falcon_h1": ("falcon_h1", {**ATTENTION, **BAMBA, "head_dim": 8, "mamba_d_ssm": 64}),
    "nemotron_h": ("nemotron_h", {
        **ATTENTION, "layers_block_type": ["mamba", "attention", "mlp", "moe"], "head_dim": 8, "mamba_num_heads": 8,
        "mamba_head_dim": 8, "ssm_state_size": 6, "n_groups": 2, "chunk_size": 5, "n_routed_experts": 4,
        "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1}),
    "zamba2": ("zamba2", {
        **ATTENTION, "num_hidden_layers": 4, "layers_block_type": ["mamba", "mamba", "hybrid", "mamba"],
        "mamba_d_state": 6, "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 5,
        "num_mem_blocks": 1}),
    "lfm2": ("lfm2", {**ATTENTION, "layer_types": ["conv", "full_attention"], "block_ff_dim": 48}),
}
ROUNDED: Mapping[str, float] = {"bf16": 5e-2, "int8": 0.1, "nf4": 2e-5, "int8_weight_only": 2e-5, "int8_dynamic": 0.1}
"""Numbers or weights that are rounded -> what is promised of drawn and scored log-probs; of logits nothing is."""
UNREPLAYED = {name: {"router_replay": False} for name in ("jamba", "qwen3_next", "granitemoehybrid", "nemotron_h")}
"""Architecture -> what must be said of its experts, which only a known router replays."""
CASES: Sequence[Case] = (
    *(Case("torch", name, model, sizes) for name, (model, sizes) in FAMILIES.items()),
    Case("torch", "a module of the user's"),
    Case("ssm", "mamba2", "mamba2", MAMBA2),
    Case("ssm", "mamba2, time_step_limit", *LIBRARY["mamba2, time_step_limit"]),
    *(Case("hf", name, model, sizes, UNREPLAYED.get(name, {})) for name, (model, sizes) in LIBRARY.items()),
    Case("hf", "mamba2, time_step_limit, cache: never", *LIBRARY["mamba2, time_step_limit"], {"cache": "never"}),
    *(Case("torch", f"{model}, {label}", *LIBRARY[model], traits) for model, label, traits in (
        ("llama", "attention: eager", {"attention": "eager"}), ("llama", "attention: flex", {"attention": "flex"}),
        ("llama", "precision: bf16", {"precision": "bf16"}), ("qwen3_moe", "precision: bf16", {"precision": "bf16"}))),
    *(Case("hf", f"{model}, {label}", *LIBRARY[model], traits) for model, label, traits in (
        ("llama", "attention: eager", {"attention": "eager"}), ("llama", "attention: flex", {"attention": "flex"}),
        ("llama", "packing: always", {"packing": "always"}), ("llama", "adapter: lora", {"adapter": Lora(rank=2)}),
        *(("qwen3_moe", f"experts: {kind}", {"experts": kind}) for kind in ("eager", "batched_mm")),
        *(("llama", f"quantize: {kind}", {"quantize": kind}) for kind in ROUNDED if kind != "bf16"),
        ("llama", "precision: bf16", {"precision": "bf16"}))),
)
COMPONENTS: Mapping[str, Callable[..., Any]] = {"torch": Torch, "ssm": SSM, "hf": HF}
DRAWN_WITH = {"CachedRows": "keys and values", "RecurrentRows": "states", "HybridRows": "keys, values and states",
              "RecomputedRows": "all tokens anew"}


# ---- models


def written(case: Case, folder: Path) -> Any:
    """The folder with a model of the case, each weight moved so that none is 0 and none alike; and that model."""
    import transformers

    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(case.model, **case.sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    model.save_pretrained(folder)
    return model


def loaded(case: Case, folder: Path) -> Any:
    """The learner of the case's backend on the model in the folder, or on the user's module."""
    source = {"weights": str(folder)}
    if not case.model:
        (folder / "model.py").write_text(USER)
        source = {"file": f"{folder / 'model.py'}:build"}
    return COMPONENTS[case.backend](**source, **case.traits, device="cpu").load(LoadRequest(V))


def texts(lengths: Sequence[int]) -> tuple[torch.Tensor, Layout]:
    """Tokens, none of them the pad token: transformers gives it no embedding."""
    tokens = torch.from_numpy(np.random.default_rng(2).integers(1, V, sum(lengths)))
    return tokens, Layout.from_offsets(offsets_of(np.array(lengths)))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# ---- what is measured


@torch.no_grad()
def logits(learner: Any, reference: Any) -> str:
    if reference is None:
        return "not of transformers"
    model, (tokens, layout) = learner.model, texts(LENGTHS)
    theirs = [reference(input_ids=part[None]).logits[0] for part in torch.split(tokens, LENGTHS)]
    return f"{difference(model.hidden(tokens, layout) @ model.output_weight.t(), torch.cat(theirs)):.1e}"


@torch.no_grad()
def packed(learner: Any, reference: Any) -> str:
    from posttrain_backends._torch.models.hf import TOLERANCE, HFTrunk, packing_error

    model = learner.model
    if isinstance(model, HFTrunk):
        error = packing_error(model)
        return f"{error:.1e}, {'kept apart' if error <= TOLERANCE else 'only padded'}"
    tokens, layout = texts(LENGTHS)
    apart = [model.hidden(part, texts([len(part)])[1]) for part in torch.split(tokens, LENGTHS)]
    return f"{difference(model.hidden(tokens, layout), torch.cat(apart)):.1e}, kept apart"


def drawn(learner: Any, reference: Any) -> str:
    from posttrain_backends._torch.rows import Room, rows_for

    try:
        sampler = Batched(slots=3).start(learner, TOKENIZER, shared=True)
    except ConfigError as refused:
        found = re.search(r"differ by (\S+)", str(refused))
        return f"**refused**: {found[1] if found else refused}"
    rollouts = sampler.rollout(PROMPTS, SAMPLING, (0,))
    scored = learner.score(rollouts, frozenset({Output.LOGPROBS}), 1.0).logprobs
    with torch.inference_mode():
        how = DRAWN_WITH[type(rows_for(learner.model, Room(rows=1, columns=2, new=1, prompts=0))).__name__]
    replayed = "" if rollouts.routes is None else ", experts replayed"
    return f"{np.abs(rollouts.behavior_logprobs - scored).max():.1e}, with {how}{replayed}"


MEASURES: Mapping[str, Callable[[Any, Any], str]] = {"logits": logits, "packed": packed, "drawn": drawn}


def row_of(case: Case) -> list[str]:
    """The cells of a case."""
    with tempfile.TemporaryDirectory() as folder:
        reference = written(case, Path(folder)) if case.model else None
        learner = loaded(case, Path(folder))
        return [f"`{case.backend}`", case.name, *(measure(learner, reference) for measure in MEASURES.values())]


def table(cases: Iterable[Case]) -> str:
    lines = [["backend", "architecture", *MEASURES], ["---"] * (2 + len(MEASURES)), *map(row_of, cases)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    found = table(case for case in CASES if case.name in given.only)
    print(found, end="")
    if given.write:
        before, _, after = re.split(r"(^\|(?:.|\n)*\|\n)", PAGE.read_text("utf-8"), maxsplit=1, flags=re.MULTILINE)
        PAGE.write_text(before + found + after, "utf-8")


if __name__ == "__main__":
    main()
