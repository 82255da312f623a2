"""Asks verl for critic-free advantages, whitened GAE and importance weights: `pip install -r verl.txt`, then
`pip install --no-deps verl==0.9.1`, then `python from_verl.py`.

Its functions take rows of tokens with a mask of those the policy chose. Actions of ours stand at random places of such
a row, so that a mask has holes, as tool output leaves them, and what stands in the holes is noise. Only rewards are 0
there: verl drops those, where ours go to the action before. A row has no other end than its last token, so a cut
episode is one that ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import cases
import numpy as np
import torch
from cases import Batch
from omegaconf import OmegaConf
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask

SEED, BATCHES, EPISODES = 14, 14, 14
GAMMAS, LAMBDAS = (1.0, 0.99, 0.9), (0.0, 0.5, 0.95, 1.0)
Answer = Mapping[str, Any]


class Rows:
    """A batch as [E, T] with a mask."""

    def __init__(self, batch: Batch, rng: np.random.Generator) -> None:
        self.group, self.greedy = batch.group, torch.from_numpy(batch.greedy_rewards)
        T = max(batch.lengths) + 4
        self.places = [np.sort(rng.choice(T, length, replace=False)) for length in batch.lengths]
        self.noise = rng.normal(size=(len(batch.lengths), T))
        self.mask = self.of([np.ones(length) for length in batch.lengths], 0.0)
        self.rewards = self.of([e.rewards for e in batch.sequences], 0.0)
        self.values = self.of([e.values[:-1] for e in batch.sequences])
        self.log_pi = self.of([e.log_pi for e in batch.sequences])
        self.log_mu = self.of([e.log_mu for e in batch.sequences])
        self.turns = [e.turn for e in batch.sequences]

    def of(self, columns: Sequence[np.ndarray], elsewhere: float | None = None) -> torch.Tensor:
        """[E, T] with each episode's column at its places, and noise or one number elsewhere."""
        found = self.noise.copy() if elsewhere is None else np.full(self.noise.shape, elsewhere)
        for row, places, column in zip(found, self.places, columns):
            row[places] = column
        return torch.from_numpy(found)

    def flat(self, x: torch.Tensor) -> np.ndarray:
        """[N], what stands at the actions."""
        return np.concatenate([row[places] for row, places in zip(x.numpy(), self.places)])


def gae(rows: Rows, gamma: float, lam: float) -> Answer:
    """The advantages are whitened."""
    A, returns = core_algos.compute_gae_advantage_return(rows.rewards, rows.values, rows.mask, gamma, lam)
    return {"advantages": rows.flat(A), "returns": rows.flat(returns)}


def of_group(function: Callable[..., Any], rows: Rows, **settings: Any) -> Answer:
    """A function that compares the answers to one prompt. Groups have two or more: of one, verl gives the raw reward
    and not a difference. It writes into the scores that it makes of rewards, not into these."""
    return {"advantages": rows.flat(function(rows.rewards, rows.mask, rows.group, **settings)[0])}


def grpo(rows: Rows, norm_adv_by_std_in_grpo: bool) -> Answer:
    return of_group(core_algos.compute_grpo_outcome_advantage, rows, norm_adv_by_std_in_grpo=norm_adv_by_std_in_grpo)


def gdpo(rows: Rows, norm_adv_by_std_in_grpo: bool) -> Answer:
    """Of one reward: what GRPO says, whitened over all tokens."""
    return of_group(core_algos.compute_gdpo_outcome_advantage, rows, norm_adv_by_std_in_grpo=norm_adv_by_std_in_grpo)


def rloo(rows: Rows) -> Answer:
    return of_group(core_algos.compute_rloo_outcome_advantage, rows)


def rloo_vectorized(rows: Rows) -> Answer:
    return of_group(core_algos.compute_rloo_vectorized_outcome_advantage, rows)


def opo(rows: Rows) -> Answer:
    return of_group(core_algos.compute_opo_outcome_advantage, rows)


def reinforce_plus_plus_baseline(rows: Rows) -> Answer:
    return of_group(core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage, rows)


def reinforce_plus_plus(rows: Rows, gamma: float) -> Answer:
    A, returns = core_algos.compute_reinforce_plus_plus_outcome_advantage(
        rows.rewards, rows.mask, config=OmegaConf.create({"gamma": gamma}))
    return {"advantages": rows.flat(A), "returns": rows.flat(returns)}


def remax(rows: Rows) -> Answer:
    A, returns = core_algos.compute_remax_outcome_advantage(rows.rewards, rows.greedy, rows.mask)
    return {"advantages": rows.flat(A), "returns": rows.flat(returns)}


def grpo_of_steps(rows: Rows, norm_adv_by_std_in_grpo: bool) -> Answer:
    """Process rewards by two functions of verl: each turn is a row of its own for GRPO, which standardises what turns
    earned within the group; put back at the last actions of turns, these are summed up from behind by ReMax's returns.
    """
    earned, group, last = [], [], []
    for e, (row, places, turns) in enumerate(zip(rows.rewards.numpy(), rows.places, rows.turns)):
        for turn in np.unique(turns):
            members = places[turns == turn]
            earned.append(row[members].sum())
            group.append(rows.group[e])
            last.append((e, members[-1]))
    steps = torch.tensor(earned, dtype=torch.float64)[:, None]
    z, _ = core_algos.compute_grpo_outcome_advantage(
        steps, torch.ones_like(steps), np.array(group), norm_adv_by_std_in_grpo=norm_adv_by_std_in_grpo)
    at_ends = torch.zeros_like(rows.mask)
    at_ends[tuple(torch.tensor(last).T)] = z[:, 0]
    _, returns = core_algos.compute_remax_outcome_advantage(at_ends, torch.zeros(len(at_ends)), rows.mask)
    return {"advantages": rows.flat(returns)}


def rollout_correction(rows: Rows, **settings: Any) -> tuple[torch.Tensor, torch.Tensor, Mapping[str, float]]:
    """Weights [E, T], ones where none are asked for, the mask that is left [E, T], and metrics."""
    weights, mask, metrics = compute_rollout_correction_and_rejection_mask(
        rows.log_pi, rows.log_mu, rows.mask, **settings)
    weights = torch.ones_like(mask) if weights is None else weights.batch["rollout_is_weights"]
    return weights, mask, {name.removeprefix("rollout_corr/"): value for name, value in metrics.items()}


def corrected(rows: Rows, **settings: Any) -> Answer:
    weights, mask, metrics = rollout_correction(rows, **settings)
    found = {"weights": rows.flat(weights), "keep": rows.flat(mask), "k1": metrics["kl"], "k3": metrics["k3_kl"]}
    sample_size = {"ess": metrics["rollout_is_eff_sample_size"]} if "rollout_is" in settings else {}
    return found | sample_size


def truncated(rows: Rows, unit: str, cap: float) -> Answer:
    return corrected(rows, rollout_is=unit, rollout_is_threshold=cap)


def truncated_and_normalised(rows: Rows, cap: float) -> Answer:
    """Per token: verl divides weights of sequences by their mean over these, each once, and ours over the actions."""
    return corrected(rows, rollout_is="token", rollout_is_threshold=cap, rollout_is_batch_normalize=True)


def icepop(rows: Rows, low: float, high: float) -> Answer:
    """A threshold of two numbers gives weight 0 outside them, to which our rejection corresponds."""
    return corrected(rows, rollout_is="token", rollout_is_threshold=f"{low}_{high}")


def rejected(rows: Rows, option: str, low: float, high: float) -> Answer:
    """Bounds of pi/mu; those of verl's k1 options are bounds of mu/pi, its inverse."""
    return corrected(rows, rollout_rs=option, rollout_rs_threshold=f"{1 / high!r}_{1 / low!r}")


def weighted_grpo(rows: Rows, unit: str, cap: float) -> Answer:
    """Advantages as a loss of verl takes them: times the truncated weight."""
    weights, _, _ = rollout_correction(rows, rollout_is=unit, rollout_is_threshold=cap)
    A, _ = core_algos.compute_grpo_outcome_advantage(rows.rewards, rows.mask, rows.group,
                                                     norm_adv_by_std_in_grpo=False)
    return {"advantages": rows.flat(A * weights)}


def weighted_returns(rows: Rows, gamma: float, unit: str, cap: float) -> Answer:
    """The same of reward-to-go."""
    weights, _, _ = rollout_correction(rows, rollout_is=unit, rollout_is_threshold=cap)
    _, returns = core_algos.compute_reinforce_plus_plus_outcome_advantage(
        rows.rewards, rows.mask, config=OmegaConf.create({"gamma": gamma}))
    return {"advantages": rows.flat(returns * weights)}


UNITS, CAPS = ("token", "sequence"), (1.0, 1.5, 2.0, 5.0)
BY_STD = {"norm_adv_by_std_in_grpo": (True, False)}
FUNCTIONS: Mapping[Callable[..., Answer], Mapping[str, Sequence[Any]]] = {
    gae: {"gamma": GAMMAS, "lam": LAMBDAS}, grpo: BY_STD, gdpo: BY_STD, rloo: {}, rloo_vectorized: {}, opo: {},
    reinforce_plus_plus: {"gamma": GAMMAS}, reinforce_plus_plus_baseline: {}, remax: {}, grpo_of_steps: BY_STD,
    truncated: {"unit": UNITS, "cap": CAPS}, truncated_and_normalised: {"cap": CAPS},
    icepop: {"low": (0.2, 0.5, 0.9), "high": (1.1, 2.0, 5.0)},
    rejected: {"option": ("token_k1", "seq_mean_k1"), "low": (0.5, 0.8, 0.99), "high": (1.01, 1.25, 3.0)},
    weighted_grpo: {"unit": UNITS, "cap": CAPS}, weighted_returns: {"gamma": GAMMAS, "unit": UNITS, "cap": CAPS}}
"""Function -> the settings that are drawn for each batch."""


def main() -> None:
    torch.set_num_threads(1)
    rng, fixture = np.random.default_rng(SEED), cases.Fixture(cases.batches(SEED, BATCHES, EPISODES))
    for function, choices in FUNCTIONS.items():
        for i, batch in enumerate(fixture.batches):
            settings = cases.drawn(rng, choices)
            fixture.add(function.__name__, i, settings, function(Rows(batch, rng), **settings))
    fixture.save("verl", SEED, verl=version("verl"), torch=version("torch"))


if __name__ == "__main__":
    main()
