"""Trains a tiny model of transformers for two steps; run by a test in an environment that holds only what it needs."""

from __future__ import annotations

import sys
from pathlib import Path

import posttrain
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers


def made(folder: Path) -> str:
    """A Llama of a few thousand weights and a tokenizer of digits."""
    library = Tokenizer(models.WordLevel({"<eos>": 0, **{c: i for i, c in enumerate("0123456789+=", 1)}}, "<eos>"))
    library.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=13, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32)).save_pretrained(folder)
    return str(folder)


def main(directory: Path) -> None:
    base = made(directory / "base")
    run = posttrain.train({
        "recipe": "grpo", "steps": 2, "run": str(directory / "run"), "threads": 1,
        "policy": {"use": "hf", "weights": base, "device": "cpu"}, "tokenizer": {"use": "hf", "weights": base},
        "task": {"use": "rows", "rows": [{"prompt": "1+2=", "answer": "3"}]},
        "rewards": {"digits": {"use": "regex", "pattern": r"\d"}},
        "rollout": {"prompts_per_step": 1, "group_size": 4, "max_new_tokens": 4},
    }, output="quiet")
    print("steps", run.state.step)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
