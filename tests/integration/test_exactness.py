"""However one optimiser step is split, loss and gradient stay the same: for every objective, on the real learner.

Parts split at whole units, chunked heads, a retry after memory ran out, two ranks that share the episodes, and the
slots of combined gradients. Differences are relative to the largest gradient: 1e-6 in float32, 1e-12 in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import posttrain
import pytest
from posttrain.batching import FirstFit, StepData, counts_of, cut, units_of
from posttrain.comm import SingleProcess
from posttrain.data import Counts, MicroBatch, Rollouts, to_numpy
from posttrain.errors import MemoryExhausted
from posttrain.loss import KLTerm, Measured, Sum
from posttrain.protocols import LoadRequest, Objective, Optimization, Output
from posttrain.registry import Registry
from posttrain.update import Trained, optimiser_step, per_action
from ragged import rollouts

torch = pytest.importorskip("torch")

VOCAB = 11
PRECISION = {"float32": 1e-6, "float64": 1e-12}
POLICY = ("ppo", "grpo", "dapo", "dr_grpo", "gspo", "reinforce")
LENGTHS = [(2, 5), (3, 1), (1, 7), (4, 3), (2, 6), (3, 4), (1, 2), (5, 5)]
COEF = {"kl": 0.3, "value": 0.5, "entropy": 0.01}


@pytest.fixture(scope="module")
def registry() -> Registry:
    return posttrain.discover()


pytestmark = pytest.mark.usefixtures("one_thread")


def learner(registry: Registry, precision: str, head_chunk: int = 0, **optimization: Any) -> Any:
    backend = registry.create("backend", "torch", hidden_size=16, layers=2, heads=2, kv_heads=1, max_positions=32,
                              precision=precision, head_chunk=head_chunk, device="cpu")
    return backend.load(LoadRequest(VOCAB, value_heads=1, seed=1, optimization=Optimization(**optimization)))


def whole_loss(registry: Registry, name: str) -> Sum:
    """The named objective with every term that core may add."""
    fields = {"length": 7} if name == "dr_grpo" else {}
    objective = registry.create("objective", name, **fields)
    if name in ("sft", "value"):
        return Sum((objective,))
    kl = registry.create("kl", "fixed", placement="loss", coef=0.3)
    return Sum((objective, KLTerm(kl), registry.create("objective", "value"), registry.create("objective", "entropy"),
                Measured(reference=True)))


def data() -> tuple[Rollouts, np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Eight episodes in three groups, some actions rejected, and columns of every kind."""
    r = replace(rollouts(LENGTHS, group=[0, 0, 0, 1, 1, 2, 2, 2]), tokens=np.random.default_rng(3).integers(
        0, VOCAB, sum(p + a for p, a in LENGTHS)).astype(np.int32))
    rng = np.random.default_rng(4)
    N = int(r.is_action.sum())
    base = -np.log(VOCAB) + 0.2 * rng.normal(size=N)
    columns = {"advantages": rng.normal(size=N), "targets": rng.normal(size=(1, N)),
               "old_logprobs": base, "ref_logprobs": base + 0.3 * rng.normal(size=N), "behavior_logprobs": base,
               "old_values": 0.1 * rng.normal(size=(1, N))}
    keep = rng.random(N) > 0.2
    keep[r.action_episode == 1] = False
    return r, keep, columns, 0.5 + rng.random(N)


def step_data(objective: Sum, counts: Counts | None = None) -> StepData:
    r, keep, columns, correction = data()
    weights = objective.weights(counts or counts_of(r, keep))
    return StepData(r, keep, per_action(weights, keep, correction), columns)


def gradients(found: Any, slots: tuple[str, ...] = ("main",)) -> dict[str, np.ndarray]:
    """The sum over slots of what was accumulated, by parameter."""
    total: dict[str, np.ndarray] = {}
    for sums in found._gradients.values():
        for name, g in sums.items():
            total[name] = total.get(name, 0) + g.numpy().copy()
    return total


def accumulated(model: Any, objective: Objective, parts: list[MicroBatch]) -> tuple[dict[str, np.ndarray], Any]:
    metrics = posttrain.Metrics()
    for part in parts:
        metrics += model.accumulate(part, objective, COEF)
    return gradients(model), metrics


def split(step: StepData, objective: Sum, n: int) -> list[MicroBatch]:
    units = units_of(step.rollouts, step.keep, objective.unit)
    return [cut(step, np.concatenate([units[i] for i in chosen]) if len(chosen) else np.array([], int))
            for chosen in np.array_split(np.random.default_rng(n).permutation(len(units)), n)]


def assert_close(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], tolerance: float) -> None:
    scale = max(np.abs(x).max() for x in a.values())
    assert scale > 1e-3, "the case must have a gradient to compare"
    assert set(a) == set(b)
    worst = max(np.abs(a[name] - b[name]).max() for name in a)
    assert worst <= tolerance * scale, f"{worst / scale:.2e} of the largest gradient"


@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize("name", [*POLICY, "sft", "value"])
def test_parts_and_head_chunks_change_nothing(registry: Registry, name: str, precision: str) -> None:
    objective = whole_loss(registry, name)
    step = step_data(objective)
    one, metrics = accumulated(learner(registry, precision), objective, split(step, objective, 1))
    for n in (2, 4, 8):
        parts, found = accumulated(learner(registry, precision), objective, split(step, objective, n))
        assert_close(one, parts, PRECISION[precision])
        for key, metric in metrics.items():
            assert found[key].value == pytest.approx(metric.value, rel=20 * PRECISION[precision], abs=1e-6), key
    chunked, _ = accumulated(learner(registry, precision, head_chunk=3), objective, split(step, objective, 2))
    assert_close(one, chunked, PRECISION[precision])


@pytest.mark.parametrize("precision", PRECISION)
@pytest.mark.parametrize("name", [*POLICY, "sft"])
def test_a_step_retried_after_memory_ran_out_is_the_same_step(
        registry: Registry, name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failing part has already added some of its gradients when memory runs out."""
    objective = whole_loss(registry, name)
    r, keep, columns, correction = data()
    # plain gradient descent would do, but AdamW's first step hides the scale: compare the gradients that reach it
    seen: list[dict[str, np.ndarray]] = []

    def run(limit: int) -> Any:
        model = learner(registry, precision, lr=1e-3)
        real_accumulate, real_apply = model.accumulate, model.apply

        def accumulate(batch: MicroBatch, *args: Any) -> Any:
            found = real_accumulate(batch, *args)
            if len(batch.tokens) > limit:
                raise MemoryExhausted("pretended")
            return found

        def apply(weights: Any = None) -> Any:
            seen.append(gradients(model))
            return real_apply(weights)

        monkeypatch.setattr(type(model), "accumulate", lambda self, *a: accumulate(*a))
        monkeypatch.setattr(type(model), "apply", lambda self, *a: apply(*a))
        try:
            return optimiser_step([Trained(model, objective)], r, keep, correction, columns, COEF,
                                  batching=FirstFit(), budget=10**6, comm=SingleProcess())[0]
        finally:
            monkeypatch.undo()

    whole, retried = run(10**9), run(24)
    assert retried["batch/memory_retries"].value >= 1 and retried["batch/parts"].value > 1
    assert_close(seen[0], seen[1], PRECISION[precision])
    for key in whole:
        if key.startswith(("loss/", "policy/", "kl/")):
            assert retried[key].value == pytest.approx(whole[key].value, rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("name", POLICY)
def test_two_ranks_sum_to_one(registry: Registry, name: str) -> None:
    """Each rank weighs by the counts of both; their gradients are summed, never averaged."""
    objective = whole_loss(registry, name)
    r, keep, columns, correction = data()
    one, _ = accumulated(learner(registry, "float64"), objective, split(step_data(objective), objective, 1))
    total = counts_of(r, keep)
    summed: dict[str, np.ndarray] = {}
    actions = np.cumsum([0, *r.episode_actions])
    for episodes in (np.array([0, 1, 2]), np.array([3, 4, 5, 6, 7])):
        a = slice(actions[episodes[0]], actions[episodes[-1] + 1])
        own, own_keep = r.select(episodes), keep[a]
        counts = replace(counts_of(own, own_keep), actions=total.actions, episodes=total.episodes)
        step = StepData(own, own_keep, per_action(objective.weights(counts), own_keep, correction[a]),
                        {key: x[..., a] for key, x in columns.items()})
        found, _ = accumulated(learner(registry, "float64"), objective, split(step, objective, 1))
        summed = {key: summed.get(key, 0) + g for key, g in found.items()}
    assert_close(one, summed, 1e-12)


def test_slots_of_combined_gradients_split_exactly_too(registry: Registry) -> None:
    objective = whole_loss(registry, "ppo")
    policy = replace(objective.parts[0], slots=("a", "b"))
    several = Sum((policy, *objective.parts[1:]))
    step = step_data(several)
    step.columns["advantages"] = np.stack([step.columns["advantages"], -0.3 * step.columns["advantages"]])
    gramians = []
    for n in (1, 2, 4):
        model = learner(registry, "float64")
        accumulated(model, several, split(step, several, n))
        gramians.append(model.gramian(("a", "b", "shared")))
    for G in gramians:
        assert np.allclose(G, G.T)
        assert np.abs(G - gramians[0]).max() <= 1e-12 * np.abs(gramians[0]).max()
    assert G[0, 1] < 0 < G[0, 0], "the two columns pull against each other"


def test_a_combiner_with_equal_weights_is_the_sum_of_slots(registry: Registry) -> None:
    objective = whole_loss(registry, "ppo")
    several = Sum((replace(objective.parts[0], slots=("a", "b")), *objective.parts[1:]))
    r, keep, columns, correction = data()
    A = columns["advantages"]

    class Equal:
        def weights(self, gramian: np.ndarray, state: None) -> tuple[np.ndarray, None]:
            assert gramian.shape == (2, 2)
            return np.ones(2), None

    weights = []
    for loss, advantages, combiner in ((objective, A, None), (several, np.stack([0.25 * A, 0.75 * A]), Equal())):
        model = learner(registry, "float64", lr=1e-2)
        optimiser_step([Trained(model, loss)], r, keep, correction, {**columns, "advantages": advantages}, COEF,
                       batching=FirstFit(), budget=20, comm=SingleProcess(), combiner=combiner)
        weights.append({name: to_numpy(x).copy() for name, x in model.params()})
    for name, x in weights[0].items():
        assert np.allclose(x, weights[1][name], atol=1e-9), name


def test_the_learner_gives_what_the_objectives_ask_for(registry: Registry) -> None:
    of_states = learner(registry, "float32").provides
    backend = registry.create("backend", "torch", hidden_size=16, layers=1, heads=2, device="cpu")
    of_actions = backend.load(LoadRequest(VOCAB, action_value_heads=1, optimization=Optimization())).provides
    for component in registry.components("objective"):
        if component.name != "dr_grpo":
            assert registry.create("objective", component.name).outputs <= of_states | of_actions
    assert Output.ACTION_VALUES in of_actions and Output.ACTION_VALUES not in of_states
    assert Output.VALUES in of_states and Output.VALUES not in of_actions
