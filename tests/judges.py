"""Tiny reward models that transformers writes, with a tokenizer of one token per character; rows to score. Needs
transformers.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

CHARACTERS = "abcdefghijklmnopqrstuvwxyz 0123456789+=?"
TEMPLATE = ("{% for m in messages %}[{{ m.role[0] }}]{{ m.content.strip() }}<eos>{% endfor %}"
            "{% if add_generation_prompt %}[a]{% endif %}")
V = 4 + len(CHARACTERS) + 2
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
GROUPED = {**SIZES, "num_key_value_heads": 2}
TWO = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
KINDS = {
    "qwen3, two labels": (transformers.Qwen3ForSequenceClassification, {**GROUPED, "head_dim": 8}, TWO),
    "llama": (transformers.LlamaForSequenceClassification, GROUPED, {"num_labels": 1}),
    "llama, padding named": (transformers.LlamaForSequenceClassification, {**GROUPED, "pad_token_id": 1},
                             {"num_labels": 1}),
    "qwen2": (transformers.Qwen2ForSequenceClassification, {**GROUPED, "tie_word_embeddings": True}, {"num_labels": 1}),
    "qwen3": (transformers.Qwen3ForSequenceClassification, {**GROUPED, "head_dim": 8}, {"num_labels": 1}),
    "gpt2": (transformers.GPT2ForSequenceClassification,
             {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, {"num_labels": 1}),
    "bert": (transformers.BertForSequenceClassification, SIZES, {"num_labels": 1}),
    "llama, tokens": (transformers.LlamaForTokenClassification, GROUPED, {"num_labels": 1}),
    "qwen3, tokens": (transformers.Qwen3ForTokenClassification, {**GROUPED, "head_dim": 8}, TWO),
    "bert, tokens": (transformers.BertForTokenClassification, SIZES, TWO),
}
SEQUENCE = tuple(name for name in KINDS if not name.endswith("tokens"))
TOKEN = tuple(name for name in KINDS if name.endswith("tokens"))
PROMPTS = ["what is 1+1?", "a", "say something long about b and c", "x", "a"]
COMPLETIONS = ["2", "the quick brown fox", " b ", "", "abc def"]


def written(folder: Path, name: str) -> Path:
    """The folder, with random weights and a tokenizer."""
    kind, sizes, labels = KINDS[name]
    torch.manual_seed(3)
    model = kind(kind.config_class(**sizes, **labels))
    for p in model.parameters():  # larger than drawn, so that answers differ by more than rounding
        p.data.mul_(3)
    model.save_pretrained(folder)
    characters(folder, encoder=name.startswith("bert"))
    return folder


def characters(path: Path, encoder: bool = False) -> None:
    """Write a tokenizer of one token per character; that of an encoder knows how to put its own around a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    ids = {t: i for i, t in enumerate(["<eos>", "<pad>", "[CLS]", "[SEP]", *CHARACTERS, "[", "]"])}
    library = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    if encoder:
        library.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, eos_token="<eos>", pad_token="<pad>" if encoder else None)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)


def chats() -> list[list[dict[str, str]]]:
    return [[{"role": "system", "content": "s"}, {"role": "user", "content": p}] for p in PROMPTS]
