"""What other libraries call our keys, so that the error for such a key can say how it is called here.

The tables of `docs/coming_from.md` hold the same and say where meanings differ; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping

CALLED_HERE: Mapping[str, str] = {
    # TRL
    "num_generations": "rollout.group_size",
    "per_device_train_batch_size": "rollout.prompts_per_step",
    "gradient_accumulation_steps": "update.steps_per_rollout",
    "num_iterations": "update.epochs",
    "max_completion_length": "rollout.max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "beta": "kl.coef",
    "epsilon": "objective.clip_low",
    "epsilon_high": "objective.clip_high",
    "delta": "objective.dual_clip",
    "scale_rewards": "estimator.scale",
    "reward_funcs": "rewards",
    "learning_rate": "optimizer.lr",
    "lr_scheduler_type": "optimizer.schedule",
    "max_grad_norm": "optimizer.clip_norm",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "max_steps": "steps",
    "eval_steps": "evaluate.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "bf16": "policy.precision",
    "peft_config": "policy.adapter",
    "report_to": "trackers",
    "run_name": "run",
    "output_dir": "run",
    # RL2
    "total_steps": "steps",
    "prompts_per_rollout": "rollout.prompts_per_step",
    "responses_per_prompt": "rollout.group_size",
    "update_per_rollout": "update.steps_per_rollout",
    "max_length_per_device": "batching.tokens",
    "avg_level": "objective.denominator",
    "lamda": "estimator.lam",
    "test_freq": "evaluate.every",
    "save_freq": "checkpoint.every",
    # verl
    "train_batch_size": "rollout.prompts_per_step",
    "ppo_mini_batch_size": "update.steps_per_rollout",
    "ppo_epochs": "update.epochs",
    "max_response_length": "rollout.max_new_tokens",
    "clip_ratio_low": "objective.clip_low",
    "clip_ratio_high": "objective.clip_high",
    "clip_ratio_c": "objective.dual_clip",
    "lr_warmup_steps": "optimizer.warmup_steps",
    "grad_clip": "optimizer.clip_norm",
    "total_training_steps": "steps",
    "total_epochs": "steps",
}
"""Key elsewhere, without its block -> key here, with its block."""


def called_here(name: str, block: str) -> str:
    """The key that another library calls `name`, as an answer to somebody who wrote it in `block`; empty where none is
    known.

    >>> called_here("learning_rate", "optimizer"), called_here("learning_rate", "")
    ("; is called 'lr' here", "; is called 'optimizer.lr' here")
    """
    key = CALLED_HERE.get(name, "")
    home, _, last = key.rpartition(".")
    beside = bool(block) and block.rpartition(".")[2].rpartition("_")[2] == home  # critic_optimizer is an optimizer
    return f"; is called '{last if beside else key}' here" if key else ""
