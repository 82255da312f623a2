"""Folding on the action axis, estimates per reward column, and what is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from posttrain.batching import FirstFit
from posttrain.data import Array, Episodes, Estimate, Metrics, Rollouts, TokenOutputs
from posttrain.errors import MemoryExhausted, RewardError
from posttrain.protocols import Corrected, Need, Output
from posttrain.steps import (
    Annotations,
    advantages,
    described,
    episode_rewards,
    episodes_of,
    folded,
    has_variance,
    sampler_gap,
    score,
    with_cost,
)
from ragged import three_episodes


def literal_fold(r: Rollouts, column: np.ndarray) -> list[float]:
    """Walk each episode's tokens and hand every reward to the latest action."""
    out: list[float] = []
    token_episode = np.repeat(r.episode, np.diff(r.offsets))
    for e in range(r.n_episodes):
        own: list[float] = []
        for t in np.flatnonzero(token_episode == e):
            if r.is_action[t]:
                own.append(0.0)
            if own:
                own[-1] += column[t]
        out += own
    return out


def test_folding_gives_a_reward_to_the_action_that_caused_it() -> None:
    r = three_episodes()
    column = np.array([0, 1, 2, 0, 4, 8, 16, 32, 64, 0, 0, 128.0])
    assert folded(r, column).tolist() == literal_fold(r, column) == [1, 2, 28, 32, 64, 128]


def test_a_reward_before_the_first_action_is_refused() -> None:
    column = np.zeros(12)
    column[9] = 1.0
    with pytest.raises(RewardError, match=r"episode 2 .* before its first action"):
        folded(three_episodes(), column)


def test_episodes_without_an_action_are_dropped_whatever_their_reward() -> None:
    r = three_episodes(is_action=np.array([0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1], bool), behavior_logprobs=None,
                 rewards={"r": np.ones(12) * np.array([0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1])}, excluded={})
    episodes, chosen = episodes_of(r, "r", Annotations())
    assert episodes.lengths.tolist() == [2, 1] and chosen.tolist() == [0, 1, 2]
    assert episodes.group.tolist() == [4, 5] and episodes.terminated.tolist() == [True, True]
    assert described(r, {"r": "reward"})["episode/empty"].value == 1


def test_excluded_episodes_leave_their_column_only() -> None:
    r = three_episodes(rewards={"r": np.array([0, 0, 1.0] + [0] * 8 + [3.0]), "q": np.zeros(12)})
    notes = Annotations(values=np.arange(12.0).reshape(2, 6), bootstrap_values=np.arange(6.0).reshape(2, 3))
    episodes, chosen = episodes_of(r, "r", notes, row=1)
    assert chosen.tolist() == [0, 1, 5]
    assert episodes.values is not None and episodes.values.tolist() == [6, 7, 11]
    assert episodes.bootstrap_values is not None and episodes.bootstrap_values.tolist() == [3, 5]
    assert episodes_of(r, "q", notes)[0].n_episodes == 3


@dataclass(frozen=True)
class Returns:
    """Advantage = the episode's reward; keeps what is positive."""

    needs: frozenset[Need] = frozenset()

    def __call__(self, episodes: Episodes) -> Estimate:
        total = np.bincount(episodes.episode, episodes.rewards)[episodes.episode]
        return Estimate(total, targets=2 * total, keep=total > 0)


@dataclass(frozen=True)
class Average:
    """A combiner."""

    def init(self, columns: Sequence[str]) -> None:
        return None

    def combine(self, estimates: Mapping[str, Estimate], state: None) -> Estimate:
        rows = list(estimates.values())
        return Estimate(np.mean([e.advantages for e in rows], axis=0), keep=np.all([e.keep for e in rows], axis=0))


@dataclass(frozen=True)
class RejectFirst:
    """A correction that rejects each episode's first action and halves the rest."""

    needs: frozenset[Need] = frozenset()

    def __call__(self, episodes: Episodes) -> Corrected:
        keep = np.ones(len(episodes.rewards), bool)
        keep[episodes.offsets[:-1]] = False
        return Corrected(np.full(len(keep), 0.5), keep, Metrics())


def two_columns() -> Rollouts:
    r = np.zeros(12)
    r[[2, 8, 11]] = [1.0, 5.0, 3.0]
    return three_episodes(rewards={"r": r, "q": -2 * r}, excluded={"r": np.array([False, True, False])})


def test_one_column() -> None:
    signal = advantages(two_columns(), Annotations(), Returns(), ["r"])
    assert signal.advantages.tolist() == [1, 1, 0, 0, 0, 3]
    assert signal.keep.tolist() == [True, True, False, False, False, True]
    assert signal.targets is not None and signal.targets.tolist() == [[2, 2, 0, 0, 0, 6]]


def test_several_columns_are_stacked_or_combined() -> None:
    r = two_columns()
    stacked = advantages(r, Annotations(), Returns(), ["r", "q"])
    assert stacked.advantages.tolist() == [[1, 1, 0, 0, 0, 3], [-2, -2, -10, -10, -10, -6]]
    assert stacked.keep.tolist() == [True, True, False, False, False, True]
    mixed = advantages(r, Annotations(), Returns(), ["r", "q"], combiner=Average())
    assert mixed.advantages.tolist() == [-0.5, -0.5, -5, -5, -5, -1.5]
    assert not mixed.keep.any()
    assert mixed.targets is not None and mixed.targets.shape == (2, 6)


def test_a_correction_weighs_and_rejects() -> None:
    r = replace(two_columns(), excluded={})
    signal = advantages(r, Annotations(), Returns(), ["r"], correction=RejectFirst())
    assert signal.keep.tolist() == [False, True, False, True, True, False]
    assert signal.correction.tolist() == [0.5] * 6


def test_a_correction_reaches_every_episode_that_some_reward_keeps() -> None:
    """The first reward excludes an episode, the second keeps it: its stale tokens are corrected like all others."""
    @dataclass(frozen=True)
    class Half:
        needs: frozenset[Need] = frozenset()

        def __call__(self, episodes: Episodes) -> Corrected:
            return Corrected(np.full(len(episodes.rewards), 0.5), np.ones(len(episodes.rewards), bool), Metrics())
    r, both = two_columns(), np.array([False, True, False])
    signal = advantages(r, Annotations(), Returns(), ["r", "q"], correction=Half())
    assert signal.correction.tolist() == [0.5] * 6
    nobody = replace(r, excluded={"r": both, "q": both})
    assert advantages(nobody, Annotations(), Returns(), ["r", "q"], correction=Half()).correction.tolist() == [
        0.5, 0.5, 1, 1, 1, 0.5]


def test_a_penalty_is_taken_from_each_action() -> None:
    r = replace(two_columns(), excluded={})
    signal = advantages(r, Annotations(), Returns(), ["r"], penalty=np.array([0.5, 0, 0, 1, 1, 0]))
    assert signal.advantages.tolist() == [0.5, 0.5, 3, 3, 3, 3]


def test_variance_is_judged_within_groups_and_over_applicable_episodes() -> None:
    r = three_episodes(group=np.array([1, 1, 2]), rewards={"r": np.array([0, 0, 1.0] + [0] * 9)}, excluded={})
    assert has_variance(r, "r").tolist() == [True, True, False]
    assert has_variance(replace(r, excluded={"r": np.array([False, True, False])}), "r").tolist() == [False] * 3
    assert episode_rewards(r, "r")[0].tolist() == [1, 0, 0]


@dataclass
class Positions:
    """A scorer that answers with token ids, and runs out of memory above a number of tokens."""

    limit: int
    calls: int = 0
    provides: frozenset[Output] = frozenset({Output.LOGPROBS, Output.VALUES})

    def score(self, r: Rollouts, outputs: frozenset[Output], temperature: float) -> TokenOutputs:
        self.calls += 1
        if len(r.tokens) > self.limit:
            raise MemoryExhausted("too many tokens")
        x: Array = r.tokens[r.source].astype(np.float64)
        last = np.cumsum(r.episode_tokens) - 1
        return TokenOutputs(x, values=np.stack([x, -x]), bootstrap_values=r.tokens[last][None].astype(np.float64))


@pytest.mark.parametrize("limit", [6, 8, 12])
def test_scoring_in_parts_keeps_the_order_and_survives_little_memory(limit: int) -> None:
    r = three_episodes()
    out, budget = score(Positions(limit), r, frozenset({Output.LOGPROBS}), FirstFit(), 100)
    assert out.logprobs.tolist() == r.tokens[r.source].tolist()
    assert out.values.tolist() == [r.tokens[r.source].tolist(), (-r.tokens[r.source]).tolist()]
    assert out.bootstrap_values.tolist() == [[2, 8, 11]]
    assert budget == (100 if limit == 12 else 6)


def test_scoring_gives_up_at_a_single_episode() -> None:
    with pytest.raises(MemoryExhausted, match="single unit"):
        score(Positions(5), three_episodes(), frozenset(), FirstFit(), 100)


def test_sampler_gap() -> None:
    r = three_episodes()
    assert r.behavior_logprobs is not None
    gap = sampler_gap(r, Annotations(logprobs=r.behavior_logprobs + np.array([0, 0.5, 0, 0, 0, -1])))
    assert gap["sampler/gap"].value == pytest.approx(0.25) and gap["sampler/gap_max"].value == pytest.approx(1.0)
    assert len(sampler_gap(r, Annotations())) == 0


def test_a_critic_has_nothing_to_learn_where_its_column_does_not_apply() -> None:
    """Another column keeps the actions; the target of this one is then what the critic says already."""
    r, values = two_columns(), np.arange(12.0).reshape(2, 6)
    signal = advantages(r, Annotations(values=values), Returns(), ["r", "q"])
    assert signal.targets is not None
    out = r.excluded["r"][r.action_episode]
    assert signal.targets[0][out].tolist() == values[0][out].tolist() and out.any()
    assert signal.targets[0][~out].tolist() != values[0][~out].tolist()


def test_the_kl_as_a_cost_counts_where_some_reward_does() -> None:
    r, cost = two_columns(), np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.9])
    r = replace(r, rewards={**r.rewards, "end": r.rewards["r"]},
                excluded={**r.excluded, "end": np.zeros(3, bool), "q": r.excluded["r"]})
    found = with_cost(r, "kl", cost, ("r", "q", "kl"))
    assert found.excluded["kl"].tolist() == r.excluded["r"].tolist(), "not where a reward of ends alone applies"
    placed = found.rewards["kl"][found.source]
    assert placed == pytest.approx(cost - 0.4) and np.delete(found.rewards["kl"], found.source).tolist() == [0.0] * 6
