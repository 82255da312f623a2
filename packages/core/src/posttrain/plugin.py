"""Core's own components, declared through the same door as anybody's. Imports none of them."""

from __future__ import annotations

from collections.abc import Iterable

from posttrain.hookspecs import Component, hookimpl


@hookimpl
def components() -> Iterable[Component]:
    """Tokenizers, the task of rows, rule rewards, the first-fit planner and the two trackers without dependencies."""
    yield Component("tokenizer", "characters", "posttrain.tokenizers:Characters", "one token per character")
    yield Component("tokenizer", "bytes", "posttrain.tokenizers:Bytes", "one token per byte of UTF-8")
    yield Component("tokenizer", "json", "posttrain.tokenizers:TokenizersJSON", "a `tokenizer.json` file or its folder",
                    extra="tokenizers")
    yield Component("task", "rows", "posttrain.tasks.rows:Rows", "prompts from files or a Python list")
    yield Component("task", "hub", "posttrain.tasks.hub:Hub", "prompts from a data set of the Hugging Face hub",
                    extra="hub")
    yield Component("task", "reasoning_gym", "posttrain.tasks.reasoning:ReasoningGym", "puzzles of reasoning-gym",
                    extra="reasoning-gym")
    yield Component("reward", "reasoning_gym", "posttrain.tasks.reasoning:ReasoningGymScore",
                    "the score that reasoning-gym's own rule gives", extra="reasoning-gym")
    yield Component("reward", "exact_match", "posttrain.rewards.rules:ExactMatch", "1 where the answer is the column's")
    yield Component("reward", "regex", "posttrain.rewards.rules:Regex", "1 where a pattern finds the answer")
    yield Component("reward", "size", "posttrain.rewards.rules:Size", "characters, words or tokens of an answer")
    yield Component("reward", "length", "posttrain.rewards.rules:Length", "0 up to a soft limit, then falling to -1",
                    source="Yu et al. 2025, arXiv 2503.14476, equation 13")
    yield Component("reward", "math", "posttrain.rewards.math:Math", "1 where the answer equals the column's, as maths",
                    extra="math")
    yield Component("reward", "code", "posttrain.rewards.code:Code", "share of the row's tests that the code passes")
    yield Component("kl", "none", "posttrain.loss:NoKL", "no reference and no KL")
    yield Component("batching", "first_fit", "posttrain.batching:FirstFit", "first fit by a token budget, by group",
                    source="Johnson 1973, Near-optimal bin packing algorithms")
    yield Component("tracker", "console", "posttrain.trackers.console:Console", "one line per step, or a live table")
    yield Component("tracker", "jsonl", "posttrain.trackers.jsonl:Jsonl", "the metrics in a second file")
    yield Component("tracker", "mlflow", "posttrain.trackers.mlflow:Mlflow", "an MLflow server, or a file beside runs",
                    extra="mlflow")
    yield Component("tracker", "wandb", "posttrain.trackers.wandb:Wandb", "Weights & Biases, online or offline",
                    extra="wandb")
    yield Component("tracker", "tensorboard", "posttrain.trackers.tensorboard:TensorBoard", "TensorBoard's event files",
                    extra="tensorboard")
