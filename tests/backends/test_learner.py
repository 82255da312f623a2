"""The torch learner: exact under any split into parts, resumable bit for bit, safe when a step fails."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from frameworks import FRAMEWORKS, HALVES
from posttrain.batching import StepData, cut
from posttrain.comm import Comm, SingleProcess
from posttrain.data import Counts, Loss, Prompt, Rollouts, Term, Weights, offsets_of, to_numpy
from posttrain.errors import ConfigError, Diverged, MemoryExhausted
from posttrain.protocols import LoadRequest, Need, Optimization, Output
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.learner import TorchLearner
from posttrain_backends.schedule import lr_at
from posttrain_backends.torch_native import Torch

torch.set_num_threads(1)

ALL = frozenset({Output.LOGPROBS, Output.ENTROPY, Output.VALUES, Output.BOOTSTRAP_VALUES})
LOGPROBS = frozenset({Output.LOGPROBS})
V = 29
SETTINGS = Optimization()


@dataclass(frozen=True)
class Clipped:
    """A stand-in with every kind of term: clipped ratio, entropy, squared value error; one slot or one per row."""

    slots: tuple[str, ...] = ("main",)
    values: bool = True
    needs = frozenset({Need.ADVANTAGES})
    unit = "action"

    @property
    def outputs(self):
        return ALL if self.values else frozenset({Output.LOGPROBS, Output.ENTROPY})

    def weights(self, counts: Counts) -> Weights:
        return Weights()

    def __call__(self, ops, out, batch, coef: Mapping[str, float]) -> Loss:
        xp = ops.xp
        ratio = xp.exp(out.logprobs - batch.old_logprobs)
        rows = batch.advantages if len(self.slots) > 1 else batch.advantages[None]
        terms = {f"policy_{slot}": Term(
            -xp.sum(batch.weight * xp.minimum(ratio * a, xp.clip(ratio, 0.8, 1.2) * a)), slot=slot)
            for slot, a in zip(self.slots, rows)}
        shared = "shared" if len(self.slots) > 1 else self.slots[0]
        terms["entropy"] = Term(-xp.sum(batch.kl_weight * out.entropy), coef["entropy"], shared)
        if self.values:
            error = out.values - batch.targets
            terms["value"] = Term(xp.sum(batch.value_weight * 0.5 * error * error), 0.5, shared)
        return Loss(terms, {"ratio": (xp.sum(ratio), float(len(ratio)))})


@dataclass(frozen=True)
class Spoiled(Clipped):
    """A loss whose gradient is NaN, though its value is not."""

    def __call__(self, ops, out, batch, coef):
        return Loss({"policy": Term(ops.xp.sum(ops.xp.sqrt(out.logprobs - out.logprobs)))})


COEF = {"entropy": 0.01}


def rollouts(E: int = 16, seed: int = 0) -> Rollouts:
    """Episodes of uneven length; every third is split over two sequences, some actions stand between other tokens."""
    r = np.random.default_rng(seed)
    lengths, episode, is_action = [], [], []
    for e in range(E):
        for _ in range(2 if e % 3 == 0 else 1):
            n = int(r.integers(3, 14))
            lengths.append(n)
            episode.append(e)
            is_action.append(np.concatenate([[False], r.random(n - 2) < 0.7, [True]]))
    action = np.concatenate(is_action)
    offsets = offsets_of(np.array(lengths))
    return Rollouts(
        tokens=r.integers(0, V, len(action)).astype(np.int32), offsets=offsets, episode=np.array(episode),
        is_action=action, group=np.arange(E) // 2, finish=np.zeros(E, np.int8), terminated=np.ones(E, bool),
        prompts=tuple(Prompt(text="x") for _ in range(E)), completions=("",) * E)


def step_data(rows: int = 1, heads: int = 1, seed: int = 0) -> StepData:
    data = rollouts(seed=seed)
    r, N = np.random.default_rng(seed + 1), int(data.is_action.sum())
    advantages = r.normal(size=(rows, N)) if rows > 1 else r.normal(size=N)
    return StepData(
        data, keep=r.random(N) < 0.9, weights=Weights(weight=np.full(N, 1 / N), kl_weight=r.random(N) / N,
                                                      value_weight=r.random(N) / N),
        columns={"advantages": advantages, "old_logprobs": -3.4 + 0.3 * r.normal(size=N),
                 "targets": r.normal(size=(heads, N))})


def learner(precision: str = "float64", heads: int = 1, optimization: Optimization | None = SETTINGS,
            seed: int = 0, comm: Comm = SingleProcess(), **fields) -> TorchLearner:
    component = Torch(hidden_size=16, layers=2, heads=4, kv_heads=2, max_positions=64, precision=precision, **fields)
    found = component.load(LoadRequest(V, heads, seed=seed, optimization=optimization, comm=comm))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # larger than the initial 0.02, so that every parameter matters
        for _, p in found.model.named_parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
        if found.value_head is not None:
            found.value_head.weight.add_(torch.randn(found.value_head.weight.shape, generator=generator))
    return found


def accumulate(model: TorchLearner, data: StepData, parts: int, objective: Clipped = Clipped()):
    metrics = [model.accumulate(cut(data, episodes), objective, COEF)
               for episodes in np.array_split(np.arange(data.rollouts.n_episodes), parts)]
    return sum(metrics[1:], metrics[0])


def gradients(model: TorchLearner, slot: str = "main") -> dict[str, torch.Tensor]:
    return {name: g.clone() for name, g in model._gradients[slot].items()}


def assert_states_equal(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_load_sets_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        Torch(hidden_size=8, heads=2).load(LoadRequest(V, threads=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---- scoring

@pytest.mark.oracle
def test_scores_equal_a_literal_computation():
    model, data = learner(heads=2), rollouts(E=5)
    out = model.score(data, ALL, temperature=0.7)
    logprobs, entropy, values, bootstrap = [], [], [], {}
    for s, e in enumerate(data.episode):
        a, b = data.offsets[s:s + 2]
        tokens = torch.from_numpy(data.tokens[a:b].astype(np.int64))
        hidden = model.model.hidden(tokens, Layout.from_offsets([0, b - a])).detach()
        read = hidden @ model.value_head.weight.detach().t() + model.value_head.bias.detach()
        for t in range(1, b - a):
            if data.is_action[a + t]:
                log_p = torch.log_softmax(hidden[t - 1] @ model.model.output_weight.detach().t() / 0.7, -1)
                logprobs.append(float(log_p[tokens[t]]))
                entropy.append(float(-(log_p.exp() * log_p).sum()))
                values.append(read[t - 1].numpy())
        bootstrap[e] = read[-1].numpy()
    np.testing.assert_allclose(out.logprobs, logprobs, atol=1e-12)
    np.testing.assert_allclose(out.entropy, entropy, atol=1e-12)
    np.testing.assert_allclose(out.values, np.array(values).T, atol=1e-12)
    np.testing.assert_allclose(out.bootstrap_values, np.array([bootstrap[e] for e in range(5)]).T, atol=1e-12)
    assert isinstance(out.logprobs, np.ndarray) and out.values.shape == (2, len(logprobs))


def test_only_what_is_asked_is_computed():
    model, data = learner(), rollouts(E=4)
    out = model.score(data, frozenset({Output.VALUES}), 1.0)
    assert np.isnan(out.logprobs).all() and len(out.logprobs) == len(data.source)
    assert out.entropy is None and out.bootstrap_values is None and np.isfinite(out.values).all()
    assert model.score(data, LOGPROBS, 1.0).values is None


def test_values_without_a_head_are_refused():
    model = learner(heads=0)
    assert model.provides == {Output.LOGPROBS, Output.ENTROPY}
    with pytest.raises(ConfigError, match="no value head was asked for"):
        model.score(rollouts(E=2), ALL, 1.0)


def test_values_begin_at_zero():
    found = Torch(hidden_size=16, heads=4).load(LoadRequest(V, 3)).score(rollouts(E=3), ALL, 1.0)
    assert found.values.shape[0] == 3 and not found.values.any() and not found.bootstrap_values.any()


def test_a_scorer_holds_nothing_that_trains():
    model = learner(optimization=None)
    assert not any(p.requires_grad for p in model.model.parameters())
    assert not any(name.startswith("exp_avg") for name in model.state())
    with pytest.raises(RuntimeError, match="loaded for scoring"):
        accumulate(model, step_data(), 1)


# ---- gradients

@pytest.mark.parametrize("precision, tolerance", [("float64", 1e-12), ("float32", 1e-6)])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_the_split_into_parts_does_not_change_the_gradient(precision, tolerance, parts):
    data, found = step_data(), []
    for n in (1, parts):
        model = learner(precision)
        metrics = accumulate(model, data, n)
        found.append((gradients(model), metrics.values_by_name()))
    (whole, logged), (split, logged_split) = found
    largest = max(float(g.abs().max()) for g in whole.values())
    assert whole.keys() == dict(model.model.named_parameters()).keys() | {"value_head.weight", "value_head.bias"}
    for name, g in whole.items():
        assert float((g - split[name]).abs().max()) <= tolerance * largest, name
    for name, number in logged.items():
        assert logged_split[name] == pytest.approx(number, rel=1e-5), name


@pytest.mark.parametrize("fields", [{"head_chunk": 3}, {"gradient_checkpointing": True}], ids=str)
def test_what_saves_memory_does_not_change_the_gradient(fields):
    data, found = step_data(), []
    for given in ({}, fields):
        model = learner(**given)
        accumulate(model, data, 2)
        found.append(gradients(model))
    largest = max(float(g.abs().max()) for g in found[0].values())
    assert all(float((found[0][n] - found[1][n]).abs().max()) <= 1e-12 * largest for n in found[0])


def test_metrics_are_raw_sums_and_means():
    model, data = learner(), step_data()
    metrics = accumulate(model, data, 3)
    out = model.score(data.rollouts, ALL, 1.0)
    N = data.keep.sum()
    entropy = -(data.weights.kl_weight * out.entropy)[data.keep].sum()
    ratio = np.exp(out.logprobs - data.columns["old_logprobs"])[data.keep]
    assert metrics["loss/entropy"].value == pytest.approx(entropy) and metrics["loss/entropy"].reduction == "sum"
    assert metrics["ratio"].weight == N and metrics["ratio"].value == pytest.approx(ratio.mean())


def test_an_empty_part_adds_nothing():
    data, models = step_data(), [learner(), learner()]
    for model in models:
        accumulate(model, data, 1)
    assert len(models[0].accumulate(cut(data, np.array([], np.int64)), Clipped(), COEF)) == 0
    for model in models:
        model.apply()
    assert_states_equal(models[0].state(), models[1].state())


def test_a_step_of_empty_parts_alone_has_a_zero_gradient():
    model = learner()
    before = {name: x.clone() for name, x in model.params()}
    model.accumulate(cut(step_data(), np.array([], np.int64)), Clipped(), COEF)
    assert model.apply()["grad_norm"].value == 0 and model.version == 1
    assert all(torch.equal(before[name], x) for name, x in model.params())


# ---- slots

def two_slots() -> tuple[TorchLearner, StepData, Clipped]:
    return learner(), step_data(rows=2), Clipped(slots=("first", "second"))


def test_slots_hold_the_gradients_of_their_own_terms():
    model, data, objective = two_slots()
    accumulate(model, data, 3, objective)
    for i, slot in enumerate(objective.slots):
        alone = learner()
        only = replace(data, columns={**data.columns, "advantages": data.columns["advantages"][i]})
        accumulate(alone, only, 1, PolicyOnly())
        expected, found = gradients(alone), gradients(model, slot)
        for name, g in expected.items():
            torch.testing.assert_close(found[name], g, rtol=0, atol=1e-14)


@dataclass(frozen=True)
class PolicyOnly(Clipped):
    """The policy term of `Clipped` alone."""

    values: bool = False

    def __call__(self, ops, out, batch, coef):
        loss = super().__call__(ops, out, batch, coef)
        return Loss({"policy": loss.terms["policy_main"]})


def test_the_gramian_is_that_of_the_flat_gradients():
    model, data, objective = two_slots()
    accumulate(model, data, 4, objective)
    slots = (*objective.slots, "shared", "absent")
    def flat(slot, pattern=""):
        sums = model._gradients.get(slot, {})
        return torch.cat([sums[n].flatten() if n in sums else torch.zeros(p.numel(), dtype=torch.float64)
                          for n, p in model._parameters.items() if pattern in n]).numpy()
    for pattern in ("", "layers.1", "value_head"):
        J = np.stack([flat(slot, pattern) for slot in slots])
        G = model.gramian(slots, pattern)
        assert G.dtype == np.float64
        np.testing.assert_allclose(G, J @ J.T, rtol=1e-12, atol=1e-18)
    assert not G[:2, :2].any() and G[2, 2] > 0, "policy slots do not touch the value head"
    with pytest.raises(ConfigError, match="no parameter matches 'nothing'"):
        model.gramian(slots, "nothing")


def test_the_gramian_of_float32_gradients_adds_up_in_float64():
    model = learner("float32")
    accumulate(model, step_data(), 1)
    g = torch.cat([x.flatten() for x in gradients(model).values()]).double()
    assert model.gramian(("main",))[0, 0] == pytest.approx(float(g @ g), rel=1e-13)


@pytest.mark.parametrize("weights", [None, {"first": 0.25, "second": 2.0},
                                     {"first": 1.0, "second": 0.5, "shared": 0.0}])
def test_apply_mixes_slots_by_their_weights(weights):
    model, data, objective = two_slots()
    accumulate(model, data, 2, objective)
    by_slot = {slot: gradients(model, slot) for slot in (*objective.slots, "shared")}
    used = {"shared": 1.0, **(weights or {"first": 1.0, "second": 1.0})}
    mixed = {name: sum(used[s] * sums[name] for s, sums in by_slot.items() if name in sums)
             for name in model._parameters}
    norm = math.sqrt(sum(float((g * g).sum()) for g in mixed.values()))
    assert model.apply(weights)["grad_norm"].value == pytest.approx(norm, rel=1e-12)
    moments = {n.removeprefix("exp_avg."): a for n, a in model.state().items() if n.startswith("exp_avg.")}
    clip = min(1.0, 1.0 / (norm + 1e-6))
    for name, g in mixed.items():
        np.testing.assert_allclose(moments[name], 0.1 * clip * g.numpy(), rtol=1e-9, atol=1e-18)


def test_a_slot_without_a_weight_is_refused():
    model, data, objective = two_slots()
    accumulate(model, data, 1, objective)
    with pytest.raises(ValueError, match=r"\['second'\] have gradients but no weight"):
        model.apply({"first": 1.0})


# ---- ranks

class Ranks:
    """Learners in threads of one process as a group: each sum waits for all."""

    def __init__(self, size: int) -> None:
        self.size, self.given = size, {}
        self.barrier = threading.Barrier(size, timeout=30)

    def member(self, rank: int) -> Comm:
        group = self

        class Member:
            size = group.size

            def __init__(self) -> None:
                self.rank = rank

            def sum(self, x: np.ndarray) -> np.ndarray:
                group.given[rank] = x.copy()
                group.barrier.wait()
                total = sum(group.given[r] for r in range(group.size))
                group.barrier.wait()
                return total

            def max(self, n: int) -> int:
                return int(self.sum(np.array([n == r for r in range(1000)])).nonzero()[0].max())

            def any(self, flag: bool) -> bool:
                return bool(self.sum(np.array([flag])).any())
        return Member()


def test_ranks_step_like_one_process_even_where_one_has_nothing():
    single, data, objective = two_slots()
    accumulate(single, data, 1, objective)
    expected = single.gramian(objective.slots)
    single.apply({"first": 0.5, "second": 1.0})
    group = Ranks(3)
    models = [learner(comm=group.member(rank)) for rank in range(3)]
    shares = [np.arange(0, 7), np.arange(7, 16), np.array([], np.int64)]

    def step(rank: int) -> np.ndarray:
        model = models[rank]
        model.accumulate(cut(data, shares[rank]), objective, COEF)
        G = model.gramian(objective.slots)
        model.apply({"first": 0.5, "second": 1.0})
        return G
    with ThreadPoolExecutor(3) as pool:
        gramians = list(pool.map(step, range(3)))
    for G, model in zip(gramians, models):
        np.testing.assert_allclose(G, expected, rtol=1e-10)
        for (name, a), (_, b) in zip(model.params(), single.params()):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=name)


# ---- the optimiser

def test_steps_equal_torch_adamw_with_clipping_and_decay_on_matrices():
    settings = Optimization(lr=0.01, weight_decay=0.1, clip_norm=0.05, betas=(0.9, 0.95))
    model, data = learner(optimization=settings), step_data()
    reference = {n: torch.nn.Parameter(p.detach().clone()) for n, p in model._parameters.items()}
    adamw = torch.optim.AdamW([{"params": [p for p in reference.values() if p.ndim >= 2], "weight_decay": 0.1},
                               {"params": [p for p in reference.values() if p.ndim < 2], "weight_decay": 0.0}],
                              lr=0.01, betas=(0.9, 0.95))
    for _ in range(3):
        accumulate(model, data, 2)
        for name, g in gradients(model).items():
            reference[name].grad = g
        torch.nn.utils.clip_grad_norm_(reference.values(), 0.05)
        adamw.step()
        metrics = model.apply()
        assert metrics["grad_norm"].value > 0.05 and metrics["lr"].value == 0.01 and model.version > 0
        for name, p in model._parameters.items():
            torch.testing.assert_close(p, reference[name], rtol=1e-12, atol=1e-14)


def test_moments_exist_before_the_first_step():
    state = learner().state()
    names = {n.removeprefix("weights.") for n in state if n.startswith("weights.")}
    assert {f"exp_avg_sq.{n}" for n in names} | {f"exp_avg.{n}" for n in names} <= state.keys()


def torch_schedule(settings: Optimization, steps: int) -> list[float]:
    """The same rates from torch's own schedulers."""
    from torch.optim import lr_scheduler as s

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.lr)
    decay = settings.total_steps - settings.warmup_steps
    after = {"constant": lambda: s.ConstantLR(optimizer, factor=1.0),
             "linear": lambda: s.LinearLR(optimizer, 1.0, settings.min_lr_ratio, decay),
             "cosine": lambda: s.CosineAnnealingLR(optimizer, decay, settings.lr * settings.min_lr_ratio)}
    if settings.warmup_steps:
        tiny = 1e-12  # LinearLR refuses to start at exactly 0
        warm = s.LinearLR(optimizer, tiny, 1.0, settings.warmup_steps)
        scheduler = s.SequentialLR(optimizer, [warm, after[settings.schedule]()], [settings.warmup_steps])
    else:
        scheduler = after[settings.schedule]()
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:The epoch parameter")  # torch's own SequentialLR calls its deprecated form
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup, ratio", [(0, 0.0), (4, 0.0), (4, 0.1)])
def test_the_schedule_equals_torchs(schedule, warmup, ratio):
    settings = Optimization(lr=0.3, schedule=schedule, warmup_steps=warmup, min_lr_ratio=ratio, total_steps=20)
    ours = [lr_at(step, settings) for step in range(21)]
    np.testing.assert_allclose(ours, torch_schedule(settings, 21), rtol=1e-9, atol=1e-12)


def test_the_schedule_ends_at_its_floor_and_stays_there():
    settings = Optimization(lr=1.0, schedule="cosine", total_steps=10, min_lr_ratio=0.25)
    assert lr_at(10, settings) == lr_at(1000, settings) == 0.25


def test_the_learner_follows_the_schedule():
    settings = Optimization(lr=0.1, schedule="linear", warmup_steps=2, total_steps=4)
    model, data = learner(optimization=settings), step_data()
    rates = []
    for _ in range(5):
        accumulate(model, data, 1)
        rates.append(model.apply()["lr"].value)
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.05, 0.0])


def test_a_schedule_without_an_end_is_refused():
    with pytest.raises(ConfigError, match="needs total_steps above warmup_steps"):
        learner(optimization=Optimization(schedule="cosine"))


# ---- steps that fail

def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
    model, data = learner(), step_data()
    before = model.state()
    accumulate(model, data, 2, Spoiled())
    metrics = model.apply()
    assert metrics["skipped"].value == 1 and "grad_norm" not in metrics and model.version == 0
    after = model.state()
    assert after.pop("bad_steps") == 1 and before.pop("bad_steps") == 0
    assert_states_equal(after, before)
    accumulate(model, data, 2)
    assert model.apply()["skipped"].value == 0 and model.state()["bad_steps"] == 0 and model.version == 1


def test_too_many_bad_steps_in_a_row_raise_and_name_parameters():
    model, data = learner(optimization=Optimization(max_bad_steps=2)), step_data()
    for _ in range(2):
        accumulate(model, data, 1, Spoiled())
        model.apply()
    accumulate(model, data, 1, Spoiled())
    with pytest.raises(Diverged, match=r"in 3 consecutive steps \(first in model.embed_tokens.weight"):
        model.apply()


def test_discard_forgets_gradients_and_restores_random_state():
    model, data = learner(), step_data()
    clean = learner()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    accumulate(model, data, 2)
    torch.rand(100)
    model.discard()
    assert torch.equal(torch.rand(3), expected)
    for each in (model, clean):
        accumulate(each, data, 4)
        each.apply()
    weights = [{n: a for n, a in each.state().items() if not n.startswith("random.")} for each in (model, clean)]
    assert_states_equal(*weights)


def test_discard_without_a_step_leaves_random_state_alone():
    model = learner()
    state = torch.get_rng_state()
    torch.rand(1)
    moved = torch.get_rng_state()
    model.discard()
    assert torch.equal(torch.get_rng_state(), moved) and not torch.equal(moved, state)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nlong text"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("not enough memory: you tried to allocate 1 bytes.")], ids=["cuda", "cpu", "windows"])
def test_running_out_of_memory_is_translated_and_the_step_can_be_redone(monkeypatch, error):
    model, clean, data = learner(), learner(), step_data()
    real, calls = model.model.hidden, []

    def fails_the_second_time(*args):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return real(*args)
    monkeypatch.setattr(model.model, "hidden", fails_the_second_time)
    with pytest.raises(MemoryExhausted) as raised:
        accumulate(model, data, 2)
    assert raised.value.__context__ is None and "\n" not in str(raised.value)
    model.discard()
    for each in (model, clean):
        accumulate(each, data, 4)
        each.apply()
    for (name, a), (_, b) in zip(model.params(), clean.params()):
        assert torch.equal(a, b), name
    monkeypatch.setattr(model.model, "hidden", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(MemoryExhausted):
        model.score(data.rollouts, ALL, 1.0)


def test_other_runtime_errors_are_not_translated(monkeypatch):
    model = learner()
    monkeypatch.setattr(model.model, "hidden", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        accumulate(model, step_data(), 1)


# ---- state

def test_state_continues_bit_for_bit():
    settings = Optimization(lr=0.02, schedule="cosine", total_steps=9, warmup_steps=2, weight_decay=0.1)
    model, data = learner("float32", optimization=settings), step_data()
    def train(each: TorchLearner, steps: int) -> None:
        for _ in range(steps):
            accumulate(each, data, 2)
            each.apply()
    train(model, 3)
    saved = {name: x.copy() for name, x in model.state().items()}
    train(model, 3)
    other = learner("float32", optimization=settings, seed=9)
    other.load_state(saved)
    assert_states_equal(other.state(), saved)
    train(other, 3)
    assert other.version == 6
    assert_states_equal(other.state(), model.state())


def test_state_is_a_copy_and_flat_numpy():
    model = learner()
    state = model.state()
    assert all(type(x) is np.ndarray for x in state.values())
    before = {name: x.copy() for name, x in state.items()}
    accumulate(model, step_data(), 1)
    model.apply()
    assert_states_equal(state, before)


def test_loading_state_forgets_a_step_that_was_begun():
    model, data = learner(), step_data()
    saved = model.state()
    accumulate(model, data, 1)
    model.load_state(saved)
    assert model.apply()["grad_norm"].value == 0


def test_state_of_another_model_is_refused_and_nothing_is_written():
    model = learner()
    before = model.state()
    with pytest.raises(ConfigError, match="value_head.weight has shape|value_head.weight is unknown"):
        model.load_state(learner(heads=3).state())
    assert_states_equal(model.state(), before)


def test_something_else_than_a_state_is_refused():
    with pytest.raises(ConfigError, match=r"not a learner's:\n  version is missing"):
        learner().load_state({"weights.x": np.zeros(1)})


def test_params_are_live_and_load_params_replaces_them():
    model, other = learner(), learner(seed=3, heads=0)
    live = dict(model.params())
    assert "value_head.weight" not in live and "model.norm.weight" in live
    model.load_params(((name, x.numpy()) for name, x in other.params()), version=12)
    assert model.version == 12
    assert all(torch.equal(live[name], x) for name, x in other.params())
    with pytest.raises(ConfigError, match=r"model.norm.weight is missing"):
        model.load_params(((n, x) for n, x in other.params() if n != "model.norm.weight"), version=1)


@pytest.mark.parametrize("make", [*HALVES.values(), *FRAMEWORKS.values()], ids=[*HALVES, *FRAMEWORKS])
def test_takes_the_arrays_of_every_framework_as_copies(make: Callable[[np.ndarray], Any]):
    model = learner("float32", heads=0, optimization=None)
    given = {name: make(to_numpy(x) + np.float32(0.5)) for name, x in model.params()}
    expected = {name: to_numpy(x).astype(np.float32) for name, x in given.items()}
    model.load_params(given.items(), version=3)
    for name, x in model.params():
        assert np.array_equal(x.numpy(), expected[name]), name
        x.zero_()
        assert np.array_equal(to_numpy(given[name]), expected[name]), "what becomes of the model leaves it alone"



# ---- folders

@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_folder_loads_again(tmp_path: Path, tied):
    model = learner("float32", heads=2, tied_embeddings=tied)
    model.save(tmp_path / "out")
    again = Torch(weights=str(tmp_path / "out")).load(LoadRequest(V, 2))
    for (name, a), (_, b) in zip(model.params(), again.params(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(model.value_head.weight, again.value_head.weight)
    data = rollouts(E=4)
    np.testing.assert_array_equal(model.score(data, ALL, 1.0).logprobs, again.score(data, ALL, 1.0).logprobs)
    plain = Torch(weights=str(tmp_path / "out")).load(LoadRequest(0, 0, optimization=None))
    assert plain.value_head is None and plain.model.output_weight.shape[0] == V


@pytest.mark.oracle
@pytest.mark.parametrize("tied", [False, True])
def test_folders_are_exchanged_with_transformers(tmp_path: Path, tied):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = learner("float32", tied_embeddings=tied, rope_theta=500.0)
    model.save(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = Torch(weights=str(tmp_path / "theirs")).load(LoadRequest(V))
    tokens, layout = torch.arange(20), Layout.from_offsets([0, 20])
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
        for each in (model, again):
            logits = each.model.hidden(tokens, layout) @ each.model.output_weight.t()
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_weights_of_another_vocabulary_are_refused(tmp_path: Path):
    learner().save(tmp_path)
    with pytest.raises(ConfigError, match=r"has a vocabulary of 29, the tokenizer needs 30\n.*tokenizer the weights"):
        Torch(weights=str(tmp_path)).load(LoadRequest(30))


def test_a_folder_of_another_model_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"holds no config.json"):
        Torch(weights=str(tmp_path)).load(LoadRequest(V))
    learner().save(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"mamba"').replace('"silu"', '"gelu"'))
    with pytest.raises(ConfigError, match=r"model_type is 'mamba'(.|\n)*hidden_act is 'gelu'(.|\n)*use: hf"):
        Torch(weights=str(tmp_path)).load(LoadRequest(V))


def test_a_value_head_of_another_size_is_refused(tmp_path: Path):
    learner(heads=2).save(tmp_path)
    with pytest.raises(ConfigError, match=r"value head in .* does not fit(.|\n)*weight has shape \(2, 16\)"):
        Torch(weights=str(tmp_path)).load(LoadRequest(V, 1))


def test_a_user_module_is_trained_saved_and_loaded(tmp_path: Path):
    (tmp_path / "model.py").write_text("""
import torch
from torch import nn

class Bag(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(vocab_size, 8), nn.Linear(8, vocab_size, bias=False)
    def forward(self, tokens, positions):
        return torch.tanh(self.embed(tokens).cumsum(1))

def build(vocab_size): return Bag(vocab_size)
""")
    component = Torch(file=f"{tmp_path}/model.py:build", precision="float64")
    model, data = component.load(LoadRequest(V, 0, optimization=Optimization(lr=0.1))), step_data()
    accumulate(model, data, 1, PolicyOnly())
    first = model.gramian(("main",))[0, 0]
    model.apply()
    accumulate(model, data, 4, PolicyOnly())
    assert model.version == 1 and model.gramian(("main",))[0, 0] != first
    model.discard()
    model.save(tmp_path / "out")
    again = replace(component, weights=str(tmp_path / "out")).load(LoadRequest(V))
    np.testing.assert_allclose(again.score(data.rollouts, LOGPROBS, 1.0).logprobs,
                               model.score(data.rollouts, LOGPROBS, 1.0).logprobs, rtol=1e-12)


# ---- learning

def test_training_raises_the_log_probability_of_what_is_rewarded():
    model, data = learner("float32", optimization=Optimization(lr=0.01)), step_data()
    data = replace(data, columns={**data.columns, "advantages": np.ones(len(data.keep))})
    before = model.score(data.rollouts, LOGPROBS, 1.0).logprobs[data.keep].mean()
    for _ in range(15):
        old = model.score(data.rollouts, LOGPROBS, 1.0).logprobs.astype(np.float64)
        accumulate(model, replace(data, columns={**data.columns, "old_logprobs": old}), 2)
        model.apply()
    assert model.score(data.rollouts, LOGPROBS, 1.0).logprobs[data.keep].mean() > before + 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-4), ("bf16", 0.05)])
def test_a_cuda_device_gives_the_gradients_of_the_cpu(precision, tolerance):
    data, found = step_data(), []
    for device, kind in (("cpu", "float32"), ("cuda", precision)):
        model = learner(kind, device=device)
        accumulate(model, data, 2)
        found.append({n: g.cpu() for n, g in gradients(model).items()})
        model.apply()
        model.load_state(model.state())
    norm = math.sqrt(sum(float(g.square().sum()) for g in found[0].values()))
    gap = math.sqrt(sum(float((found[0][n] - found[1][n]).square().sum()) for n in found[0]))
    assert gap <= tolerance * norm


def test_bf16_gradients_stay_near_float32_and_weights_stay_float32():
    data, found = step_data(), []
    for precision in ("float32", "bf16"):
        model = learner(precision)
        accumulate(model, data, 2)
        found.append(gradients(model))
    assert {g.dtype for g in found[1].values()} == {torch.float32}
    norm, gap = (math.sqrt(sum(float(x.square().sum()) for x in xs))
                 for xs in (found[0].values(), [found[0][n] - found[1][n] for n in found[0]]))
    assert 0 < gap < 0.05 * norm


@pytest.mark.parametrize(("text", "line", "what"), [
    ("import torch\nx = (\n", 2, "SyntaxError"),
    ("def build(vocab_size):\n    raise ValueError('no such size')\n", 2, "ValueError: no such size"),
])
def test_what_the_users_file_raises_is_named_by_its_line(tmp_path: Path, text: str, line: int, what: str) -> None:
    file = tmp_path / "model.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=what) as raised:
        Torch(file=f"{file}:build", device="cpu").load(LoadRequest(11))
    assert raised.value.problems[0].where == f"{file}:{line}"
