"""`posttrain init`: three files of the user's own to start from. Writes text, runs nothing, overwrites nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from posttrain.errors import InputError, Problem

TRAIN = """\
# Trains a tiny transformer from random weights to answer sums of two digits, in about a minute on a CPU.
#   posttrain check train.yaml                 sizes, parts and rows, before anything is loaded
#   posttrain train train.yaml                 train; any key can follow: steps=50 optimizer.lr=1e-3
#   posttrain plugins                          every name that can stand after a key
#   posttrain show estimator grpo              the fields of one of them

recipe: grpo                  # estimator, objective and KL that belong together; ppo, rloo, dr_grpo, dapo, gspo, ...
steps: 400                    # rollouts
seed: 0

policy: {use: torch, hidden_size: 64, layers: 2, heads: 4, kv_heads: 4, max_positions: 64}
tokenizer: {use: characters, alphabet: "0123456789+="}
task: {use: rows, path: data.jsonl, held_out_fraction: 0.2}

rewards:                      # summed, each times its `weight:`
  close: {file: "rewards.py:close"}
  correct: {use: exact_match, weight: 1.0}

rollout:
  prompts_per_step: 16
  group_size: 8               # answers to each prompt, compared with one another
  max_new_tokens: 4
update:
  steps_per_rollout: 2        # optimiser steps, on disjoint halves of the episodes
  entropy_coef: 0.02          # keeps answers varied
kl: none                      # the start is random weights: nothing to stay close to
optimizer: {lr: 1e-3}
evaluate: {every: 100}        # greedy answers to the held-out rows
"""

REWARDS = '''\
"""Rewards of your own: one function each, named in train.yaml as `file: rewards.py:NAME`."""


def close(prompts, completions, answer, **columns):
    """One number per completion: 1 for the right number, less the further it is off, 0 for no number.

    `answer` is the column of data.jsonl; all other columns arrive as keywords, too. None leaves an episode out.
    """
    scores = []
    for completion, wanted in zip(completions, answer):
        if completion.isdigit():
            scores.append(1.0 / (1.0 + abs(int(completion) - int(wanted))))
        else:
            scores.append(0.0)
    return scores
'''


def files() -> Mapping[str, str]:
    """Name -> text of the files that a new folder gets."""
    rows = (json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a in range(10) for b in range(10))
    return {"train.yaml": TRAIN, "rewards.py": REWARDS, "data.jsonl": "\n".join(rows) + "\n"}


def write(directory: Path) -> list[Path]:
    """Write the files; raises `InputError`, and writes nothing, where one of them exists."""
    new = {directory / name: text for name, text in files().items()}
    if there := [path for path in new if path.exists()]:
        raise InputError([Problem("this file exists and is not overwritten", str(path)) for path in there],
                         next_step="choose another folder: posttrain init DIR")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path, text in new.items():
            path.write_text(text)
    except OSError as error:
        raise InputError([Problem(f"cannot write: {error.strerror or error}", str(directory))],
                         next_step="choose another folder: posttrain init DIR") from error
    return list(new)
