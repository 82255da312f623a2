"""Core's own components, declared through the same door as anybody's. Imports none of them."""

from __future__ import annotations

from collections.abc import Iterable

from posttrain.hookspecs import Component, hookimpl


@hookimpl
def components() -> Iterable[Component]:
    """Tokenizers, the task of rows, rule rewards, the first-fit planner and the two trackers without dependencies."""
    yield Component("tokenizer", "characters", "posttrain.tokenizers:Characters", "one token per character")
    yield Component("tokenizer", "bytes", "posttrain.tokenizers:Bytes", "one token per byte of UTF-8")
    yield Component("tokenizer", "json", "posttrain.tokenizers:TokenizersJSON", "a `tokenizer.json` file or its folder")
    yield Component("task", "rows", "posttrain.tasks.rows:Rows", "prompts from a JSONL file or a Python list")
    yield Component("reward", "exact_match", "posttrain.rewards.rules:ExactMatch", "1 where the answer is the column's")
    yield Component("reward", "regex", "posttrain.rewards.rules:Regex", "1 where a pattern finds the answer")
    yield Component("reward", "length", "posttrain.rewards.rules:Length", "0 up to a soft limit, then falling to -1",
                    source="Yu et al. 2025, arXiv 2503.14476, equation 13")
    yield Component("batching", "first_fit", "posttrain.batching:FirstFit", "first-fit decreasing by a token budget",
                    source="Johnson 1973, Near-optimal bin packing algorithms")
    yield Component("tracker", "console", "posttrain.trackers.console:Console", "one line per step, or a live table")
    yield Component("tracker", "jsonl", "posttrain.trackers.jsonl:Jsonl", "the metrics in a second file")
