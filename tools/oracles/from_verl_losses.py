"""Asks verl for the losses of policies and critics, and for their gradients: `pip install -r verl.txt`, then
`pip install --no-deps verl==0.9.1`, then `python from_verl_losses.py`.

Of a batch, `logprobs` are of the policy that is trained, `behavior_logprobs` of the old one and rewards are advantages;
`values` are those of the critic that is trained, `expected_action_values` those before and `action_values` the returns.
Rows are padded, and a mask marks what the policy chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

import cases
import numpy as np
import torch
from cases import Batch
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

SEED, BATCHES, EPISODES = 23, 6, 12
CLIPS = ((0.2, 0.2), (0.2, 0.28), (0.1, 0.4))
MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
NONE = 1e9
"""A bound that never binds."""
Answer = Mapping[str, Any]


def padded(batch: Batch, column: np.ndarray, fill: float) -> torch.Tensor:
    """[N] -> [E, T + 2], with `fill` behind each episode's end."""
    rows = np.split(column, np.cumsum(batch.lengths)[:-1])
    T = max(batch.lengths) + 2
    return torch.tensor(np.stack([np.concatenate([row, np.full(T - len(row), fill)]) for row in rows]))


def answer(loss: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> Answer:
    """The loss, and its gradient [N] at the actions."""
    (gradient,) = torch.autograd.grad(loss, x)
    return {"loss": loss.item(), "gradient": gradient[mask > 0].numpy()}


def policy(name: str, batch: Batch, mode: str, *, scale: int | None = None, weighed: bool = False,
           **settings: float) -> Answer:
    columns = batch.columns()
    mask = padded(batch, np.ones(sum(batch.lengths)), 0.0)
    x = padded(batch, columns["logprobs"], -0.7).requires_grad_()
    old, A = padded(batch, columns["behavior_logprobs"], -0.4), padded(batch, columns["rewards"], 1.3)
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **settings)
    config.global_batch_info.update({"loss_scale_factor": scale} if scale else {})
    weights = padded(batch, 0.5 + np.exp(columns["behavior_logprobs"]), 0.9) if weighed else None
    loss, _ = core_algos.get_policy_loss_fn(name)(old, x, A, mask, mode, config, weights)
    return answer(loss, x, mask)


def value(batch: Batch, mode: str, clip: float) -> Answer:
    columns = batch.columns()
    mask = padded(batch, np.ones(sum(batch.lengths)), 0.0)
    x = padded(batch, columns["values"], 0.3).requires_grad_()
    G, old = padded(batch, columns["action_values"], -1.0), padded(batch, columns["expected_action_values"], 2.0)
    loss, _ = core_algos.compute_value_loss(x, G, old, mask, clip, mode)
    return answer(loss, x, mask)


FUNCTIONS: Mapping[str, Callable[..., Answer]] = {
    **{name: partial(policy, name) for name in ("vanilla", "gspo", "cispo", "sapo")}, "value": value}


def questions(i: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The functions that are asked about batch `i`, each with its settings."""
    low, high = CLIPS[i % len(CLIPS)]
    clip, mean = {"clip_ratio_low": low, "clip_ratio_high": high}, MODES[2 * (i % 2)]
    for mode in MODES:
        yield "vanilla", {"mode": mode, **clip, "clip_ratio_c": NONE, **({"scale": 17} if "norm" in mode else {})}
    yield "vanilla", {"mode": mean, **clip, "clip_ratio_c": (3.0, 1.5)[i % 2]}
    yield "vanilla", {"mode": mean, **clip, "clip_ratio_c": 3.0, "weighed": True}
    for bounds in ({"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}, clip):
        yield "gspo", {"mode": MODES[2], **bounds}
    for cap in (1.28, 5.0):  # from 1 - clip_ratio_low, 0, to 1 + clip_ratio_high
        yield "cispo", {"mode": mean, "clip_ratio_low": 1.0, "clip_ratio_high": cap - 1.0}
    for positive, negative in ((1.0, 1.05), (2.0, 4.0)):
        yield "sapo", {"mode": MODES[2], "tau_pos": positive, "tau_neg": negative}
    for bound in (0.2, 1.0, NONE):
        yield "value", {"mode": mean, "clip": bound}


def main() -> None:
    torch.set_num_threads(1)
    fixture = cases.Fixture(cases.batches(SEED, BATCHES, EPISODES))
    for i, batch in enumerate(fixture.batches):
        for function, settings in questions(i):
            fixture.add(function, i, settings, FUNCTIONS[function](batch, **settings))
    fixture.save("verl_losses", SEED, verl=version("verl"), torch=version("torch"))


if __name__ == "__main__":
    main()
