"""Losses over actions in one pass over the output matrix: the gradients and metrics of two passes for every objective,
which of them take it, what is left out exactly, the form on given logits, and the guard that stops a broken head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("posttrain_objectives")

from posttrain.batching import StepData, counts_of, cut, units_of  # after the check that it is there
from posttrain.data import Loss, Metrics, MicroBatch, Rollouts, Term
from posttrain.errors import Diverged
from posttrain.loss import KLTerm, Measured, Sum
from posttrain.protocols import LoadRequest, Objective, Optimization, Output
from posttrain_backends._torch import guard, head, learner, logits
from posttrain_backends._torch.one_pass import _COLUMNS, LossOfChunks, actions_of, takes_one_pass
from posttrain_backends.torch_native import Torch
from posttrain_objectives.entropy import Entropy
from posttrain_objectives.kl import FixedKL
from posttrain_objectives.likelihood import SFT
from posttrain_objectives.policy_gradient import PolicyGradient
from posttrain_objectives.preference import DPO
from posttrain_objectives.value import ActionValue, Value
from ragged import rollouts
from torch.utils._python_dispatch import TorchDispatchMode

V = 13
LENGTHS = [(2, 5), (3, 1), (1, 7), (4, 3), (2, 6), (3, 4)]
COEF = {"kl": 0.7, "entropy": 0.3, "value": 0.4}
IN_LOSS = {name: KLTerm(FixedKL(placement="loss", estimator=name)) for name in ("k2", "k3", "k3+", "exact")}
TERMS: dict[str, Objective] = {
    "ppo": PolicyGradient(), "dual clip": PolicyGradient(dual_clip=3.0), "cispo": PolicyGradient(surrogate="cispo"),
    "sapo": PolicyGradient(surrogate="sapo"), "reinforce": PolicyGradient(surrogate="reinforce"),
    "dr_grpo": PolicyGradient(denominator="constant", length=9), "decoupled": PolicyGradient(behavior_cap=2.0),
    "sft": SFT(denominator="sequence_mean"), "entropy alone": Entropy(), "measured alone": Measured(reference=True),
    "ppo, entropy": Sum((PolicyGradient(), Entropy(), Measured(reference=True))),
    "ppo, value": Sum((PolicyGradient(), Value(clip=0.2))),
    "ppo, action values": Sum((PolicyGradient(), ActionValue(), Entropy())),
    **{f"ppo, {name}": Sum((PolicyGradient(), kl)) for name, kl in IN_LOSS.items()},
    "ppo, exact, entropy": Sum((PolicyGradient(), IN_LOSS["exact"], Entropy(), Measured()))}


pytestmark = pytest.mark.usefixtures("one_thread")


def load(seed: int = 0, heads: int = 1, **fields: Any) -> Any:
    """A model whose log-probs are far from uniform, with a reference and every head."""
    component = Torch(**{"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "max_positions": 64,
                         "device": "cpu", "precision": "float64", "head_chunk": 4, **fields})
    model, other = (component.load(LoadRequest(V, heads, heads, seed=seed + i, optimization=Optimization(lr=0.05)))
                    for i in range(2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (*model._parameters.values(), *other._parameters.values()):
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    model.compare_with(other)
    return model


def test_every_field_of_a_batch_is_of_actions_or_known_not_to_be() -> None:
    """A column that is added to `MicroBatch` must be cut with the actions."""
    others = {"tokens", "sequence", "positions", "token_weight", "group", "count", "last", "routes", "temperature",
              "constants"}
    assert {f.name for f in fields(MicroBatch)} == {*_COLUMNS, *others} and not others.intersection(_COLUMNS)


def data(temperature: float = 1.0) -> Rollouts:
    r = rollouts(LENGTHS, group=[0, 0, 1, 1, 2, 2])
    tokens = np.random.default_rng(3).integers(0, V, len(r.tokens)).astype(np.int32)
    return replace(r, tokens=tokens, sampling=replace(r.sampling, temperature=temperature))


def step_data(objective: Objective, temperature: float = 1.0, heads: int = 1, **columns: np.ndarray) -> StepData:
    r, rng = data(temperature), np.random.default_rng(4)
    N = int(r.is_action.sum())
    weights = objective.weights(counts_of(r, np.ones(N, bool)))
    kl_weight = weights.weight if weights.kl_weight is None else weights.kl_weight
    old = -2.5 + 0.5 * rng.normal(size=N)
    made = {"advantages": rng.normal(size=N), "old_logprobs": old, "behavior_logprobs": old + 0.2 * rng.normal(size=N),
            "ref_logprobs": old + 0.2 * rng.normal(size=N), "targets": rng.normal(size=(heads, N)),
            "old_values": rng.normal(size=(heads, N))}
    if isinstance(objective, Measured):
        kl_weight = np.full(N, 1 / N)
    return StepData(r, np.ones(N, bool), replace(weights, kl_weight=kl_weight), {**made, **columns})


def accumulated(model: Any, step: StepData, objective: Objective, parts: int = 1) -> tuple[dict[str, Any], Metrics]:
    units, metrics = units_of(step.rollouts, step.keep, objective.unit), Metrics()
    for chosen in np.array_split(np.arange(len(units)), parts):
        metrics += model.accumulate(cut(step, np.concatenate([units[i] for i in chosen])), objective, COEF)
    return {name: g.double().clone() for name, g in next(iter(model._gradients.values())).items()}, metrics


def two_passes(patch: pytest.MonkeyPatch, run: Callable[[], Any]) -> Any:
    with patch.context() as undo:
        undo.setattr(learner, "takes_one_pass", lambda objective: False)
        return run()


def assert_same(a: tuple[dict[str, Any], Metrics], b: tuple[dict[str, Any], Metrics], tolerance: float) -> None:
    """Gradients relative to the largest entry of all, metrics relative to themselves."""
    scale = max(float(g.abs().max()) for g in b[0].values())
    assert a[0].keys() == b[0].keys()
    for name, g in a[0].items():
        assert float((g - b[0][name]).abs().max()) <= tolerance * scale, name
    assert a[1].keys() == b[1].keys()
    for name, metric in a[1].items():
        assert metric.total == pytest.approx(b[1][name].total, rel=100 * tolerance, abs=tolerance), name
        assert metric.weight == b[1][name].weight, name


@pytest.mark.parametrize("name", TERMS)
def test_gradients_and_metrics_are_those_of_two_passes(monkeypatch, name):
    objective = TERMS[name]
    assert takes_one_pass(objective)
    step = step_data(objective)
    found, plain = accumulated(load(), step, objective), two_passes(
        monkeypatch, lambda: accumulated(load(), step, objective))
    assert len(found[1]) and (name == "measured alone" or any(g.any() for g in plain[0].values()))
    assert_same(found, plain, 1e-12)


@pytest.mark.parametrize("fields", [
    {"tied_embeddings": True}, {"head_chunk": 0}, {"head_chunk": 1}, {"gradient_checkpointing": True},
    {"precision": "float32"}], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_in_every_setting_of_the_model(monkeypatch, fields, temperature):
    objective = Sum((PolicyGradient(), IN_LOSS["exact"], Entropy(), Value(), Measured()))
    step = step_data(objective, temperature, heads=2)
    found, plain = accumulated(load(heads=2, **fields), step, objective), two_passes(
        monkeypatch, lambda: accumulated(load(heads=2, **fields), step, objective))
    assert_same(found, plain, 2e-6 if "precision" in fields else 1e-12)


@pytest.mark.parametrize("precision, tolerance", [("float64", 1e-12), ("float32", 1e-6)])
@pytest.mark.parametrize("parts", [2, 3, 6])
def test_the_split_into_parts_changes_nothing(precision, tolerance, parts):
    objective = Sum((PolicyGradient(), IN_LOSS["k3"], Entropy(), Value(), Measured(reference=True)))
    step = step_data(objective)
    whole, split = (accumulated(load(precision=precision), step, objective, n) for n in (1, parts))
    assert_same(split, whole, tolerance)


def test_it_is_deterministic():
    objective = TERMS["ppo, entropy"]
    first, second = (accumulated(load(precision="float32"), step_data(objective), objective)[0] for _ in range(2))
    assert all(torch.equal(g, second[name]) for name, g in first.items())


def test_bfloat16_products_stay_near_two_passes(monkeypatch):
    objective = TERMS["ppo, exact, entropy"]
    step = step_data(objective)
    found, plain = accumulated(load(precision="bf16"), step, objective), two_passes(
        monkeypatch, lambda: accumulated(load(precision="bf16"), step, objective))
    assert_same(found, plain, 1e-2)


def test_a_frozen_output_matrix_gets_no_gradient_and_the_trunk_gets_its_own(monkeypatch):
    objective = TERMS["ppo, entropy"]
    def frozen() -> Any:
        model = load()
        del model._parameters["lm_head.weight"]
        model.output_weight.requires_grad_(False)
        return accumulated(model, step_data(objective), objective)
    found, plain = frozen(), two_passes(monkeypatch, frozen)
    assert "lm_head.weight" not in found[0]
    assert_same(found, plain, 1e-12)


def test_an_output_matrix_that_is_made_of_parameters(monkeypatch):
    objective = TERMS["ppo"]
    def made() -> Any:
        model = load()
        own = model.model.lm_head
        torch.nn.utils.parametrizations.weight_norm(own)
        model._parameters = {n: p for n, p in model._named_parameters() if p.requires_grad}
        monkeypatch.setattr(type(model.model), "output_weight", property(lambda self: self.lm_head.weight))
        return accumulated(model, step_data(objective), objective)
    found, plain = made(), two_passes(monkeypatch, made)
    assert any("original" in name and g.any() for name, g in found[0].items())
    assert_same(found, plain, 1e-12)


# ---- which objectives take it


@dataclass(frozen=True)
class Changed:
    """An objective that says something else of itself."""

    inner: Objective
    unit: str = "action"
    outputs: frozenset[Output] = frozenset({Output.LOGPROBS})
    slots: tuple[str, ...] = ("main",)


@pytest.mark.parametrize("objective", [
    PolicyGradient(ratio="sequence"), DPO(), Value(), PolicyGradient(slots=("first", "second")),
    Sum((PolicyGradient(), KLTerm(FixedKL(placement="loss", estimator="seq_k2")))),
    Changed(PolicyGradient(), outputs=frozenset({Output.LOGPROBS, Output.BOOTSTRAP_VALUES})),
    Changed(PolicyGradient(), unit="group")], ids=lambda o: type(o).__name__)
def test_what_is_not_a_sum_over_actions_of_one_slot_takes_two_passes(objective):
    assert not takes_one_pass(objective)


@pytest.mark.parametrize("objective, expected", [(PolicyGradient(), ["walk"]),
                                                 (PolicyGradient(ratio="sequence"), ["chosen_logprobs"])],
                         ids=["token", "sequence"])
def test_the_learner_goes_the_way_that_the_objective_says(monkeypatch, objective, expected):
    taken, model = [], load()
    for name in ("walk", "chosen_logprobs"):
        inner = getattr(learner, name)
        monkeypatch.setattr(learner, name, lambda *a, _name=name, _inner=inner, **k: taken.append(_name) or _inner(
            *a, **k))
    accumulated(model, step_data(objective), objective)
    assert taken == expected


def test_every_column_of_actions_is_cut_and_nothing_else():
    step = step_data(PolicyGradient(), heads=2)
    batch = cut(step, np.arange(len(LENGTHS)))
    part, N = actions_of(batch, slice(3, 7)), len(batch.source)
    for name in batch.__dataclass_fields__:
        whole, cut_out = getattr(batch, name), getattr(part, name)
        if isinstance(whole, np.ndarray) and whole.shape[-1] == N and name not in ("tokens", "sequence", "positions"):
            np.testing.assert_array_equal(cut_out, whole[..., 3:7], err_msg=name)
        else:
            assert cut_out is whole, name


# ---- rows without a gradient


class Products(TorchDispatchMode):
    """Rows of logits that products of matrices were made from or of, and how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
            self.sizes.append((*args[0].shape, args[1].shape[1]))
        if func is torch.ops.aten.addmm_.default:
            self.sizes.append((*args[1].shape, args[2].shape[1]))
        return func(*args, **(kwargs or {}))


def problem(N: int = 12, H: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r = np.random.default_rng(N)
    hidden, weight = (torch.tensor(r.normal(size=s), requires_grad=True) for s in ((N, H), (V, H)))
    return hidden, weight, torch.from_numpy(r.integers(0, V, N))


def dense(hidden, weight, chosen, by_logprob, by_entropy):
    """Gradients of sum(by_logprob log p(c) + by_entropy H), with every logit in memory."""
    log_p = torch.log_softmax(hidden @ weight.t(), -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.autograd.grad(by_logprob @ log_p.gather(1, chosen[:, None])[:, 0] + by_entropy @ entropy,
                               (hidden, weight))


@pytest.mark.parametrize("zero", [[], [0], [1, 2, 3], [4, 5, 6, 7], [0, 3, 4, 9, 11], list(range(12))], ids=str)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_rows_without_a_gradient_take_part_in_no_product(monkeypatch, zero, with_entropy):
    monkeypatch.setattr(logits, "BLOCK_CELLS", {"cpu": 2 * V})
    hidden, weight, chosen = problem()
    r = np.random.default_rng(1)
    by = torch.tensor(r.normal(size=(2, 12)))
    by[:, zero] = 0
    by[1] *= with_entropy
    d_weight = torch.zeros_like(weight)
    def loss(part, reading):
        return logits.Slopes(by[0, part], by[1, part])
    with Products() as made:
        _, d_hidden = head.walk(hidden, weight, chosen, loss, d_weight=d_weight, rows=4, entropy=True)
    kept = [len(set(range(start, start + 4)) - set(zero)) for start in (0, 4, 8)]
    assert made.sizes == [size for n in kept for size in [(4, 5, V), *([(n, V, 5), (V, n, 5)] if n else [])]]
    expected = dense(hidden, weight, chosen, *by)
    if len(zero) == 12:
        assert d_hidden is None and not d_weight.any()
    else:
        torch.testing.assert_close(d_hidden, expected[0], rtol=0, atol=1e-13)
        torch.testing.assert_close(d_weight, expected[1], rtol=0, atol=1e-13)
        assert not d_hidden[zero].any()


def test_two_passes_leave_them_out_of_the_second_one():
    hidden, weight, chosen = problem()
    by = torch.tensor(np.random.default_rng(1).normal(size=12))
    by[2:9] = 0
    logprobs, _ = head.chosen_logprobs(hidden, weight, chosen, rows=4)
    with Products() as made:
        found = torch.autograd.grad(by @ logprobs, (hidden, weight))
    assert [size for size in made.sizes if V in size[:2]] == [(2, V, 5), (V, 2, 5), (3, V, 5), (V, 3, 5)]
    for ours, expected in zip(found, dense(hidden, weight, chosen, by, torch.zeros(12, dtype=by.dtype)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)


def test_solved_groups_are_left_out_and_others_unchanged(monkeypatch):
    objective = Sum((PolicyGradient(), Measured()))
    step = step_data(objective)
    advantages = np.where(step.rollouts.action_episode >= 2, 0.0, step.columns["advantages"])
    step = replace(step, columns={**step.columns, "advantages": advantages})
    with Products() as made:
        found = accumulated(load(), step, objective)
    rows = sum(size[0] for size in made.sizes if size[1:] == (V, 16))
    assert 0 < rows <= int((advantages != 0).sum()), "only those with an advantage go back"
    assert_same(found, two_passes(monkeypatch, lambda: accumulated(load(), step, objective)), 1e-12)


def test_a_part_without_any_gradient_does_not_enter_the_trunk(monkeypatch):
    objective, model = PolicyGradient(), load()
    step = step_data(objective)
    step = replace(step, columns={**step.columns, "advantages": np.zeros(len(step.keep))})
    monkeypatch.setattr(torch.autograd, "backward", lambda *a, **k: pytest.fail("there is nothing to go back for"))
    gradients, metrics = accumulated(model, step, objective)
    assert not any(g.any() for g in gradients.values()) and metrics["policy/ratio"].weight == len(step.keep)


@dataclass(frozen=True)
class NotANumber:
    """A loss whose slope in log-probs is NaN."""

    needs = frozenset()
    outputs = frozenset({Output.LOGPROBS})
    unit = "action"
    slots = ("main",)

    def __call__(self, ops, out, batch, coef) -> Loss:
        return Loss({"policy": Term(ops.xp.sum(ops.xp.sqrt(out.logprobs - out.logprobs)))})


def test_a_slope_that_is_not_a_number_is_not_taken_for_zero():
    model = load()
    model.accumulate(cut(step_data(PolicyGradient()), np.arange(3)), NotANumber(), COEF)
    assert model.apply()["skipped"].value == 1


# ---- the walk itself


@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize("rows", [1, 2, 5, 7, 0])
def test_the_walk_gives_the_gradient_of_autograd(rows, temperature):
    hidden, weight, chosen = problem(7)
    by = torch.tensor(np.random.default_rng(5).normal(size=(2, 7)))
    def loss(part, reading):
        return logits.Slopes(2 * by[0, part] * reading.logprobs, by[1, part])  # of by0 logp^2 + by1 H
    d_weight = torch.ones_like(weight)
    reading, d_hidden = head.walk(hidden, weight, chosen, loss, d_weight=d_weight, rows=rows, entropy=True,
                                  temperature=temperature)
    logprobs, entropy = head.chosen_logprobs(hidden, weight, chosen, entropy=True, temperature=temperature, rows=3)
    expected = torch.autograd.grad((by[0] * logprobs**2 + by[1] * entropy).sum(), (hidden, weight))
    torch.testing.assert_close(reading.logprobs, logprobs.detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(reading.entropy, entropy.detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(d_hidden, expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(d_weight - 1, expected[1], rtol=0, atol=1e-12)


def test_the_walk_holds_one_chunk_of_logits():
    r = np.random.default_rng(0)
    hidden = torch.tensor(r.normal(size=(96, 4)), requires_grad=True)
    weight, sizes = torch.tensor(r.normal(size=(512, 4))), []
    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not any(
                    out.data_ptr() == x.data_ptr() for x in (*args, *(kwargs or {}).values())
                    if isinstance(x, torch.Tensor)):
                sizes.append(out.numel())
            return out
    logits_of_block = 2 * 512
    with pytest.MonkeyPatch.context() as patch, Made():
        patch.setattr(logits, "BLOCK_CELLS", {"cpu": logits_of_block})
        head.walk(hidden, weight, torch.zeros(96, dtype=torch.long), lambda part, reading: logits.Slopes(
            reading.logprobs, reading.logprobs), rows=16, entropy=True, d_weight=torch.zeros_like(weight))
    large = [n for n in sizes if n > logits_of_block and n != weight.numel()]
    assert large == [16 * 512], "one array for the logits of all chunks and of their gradients"


def test_no_row():
    hidden, weight, chosen = problem(0)
    reading, d_hidden = head.walk(hidden, weight, chosen, lambda part, reading: logits.Slopes(reading.logprobs))
    assert len(reading.logprobs) == 0 and d_hidden is None


def test_the_losses_of_chunks_add_up(monkeypatch):
    objective = TERMS["ppo, value"]
    step = step_data(objective)
    model, kept = load(head_chunk=4), []
    inner = LossOfChunks.__call__
    monkeypatch.setattr(LossOfChunks, "__call__", lambda self, *a: kept.append(self) or inner(self, *a))
    _, metrics = accumulated(model, step, objective)
    losses = kept[0].losses
    assert len(losses) == -(-len(step.keep) // 4)
    assert not any(term.total.requires_grad for loss in losses for term in loss.terms.values())
    assert metrics["loss/policy"].value == pytest.approx(sum(float(x.terms["policy"].total) for x in losses))


# ---- from given logits


def given_logits(dtype: torch.dtype = torch.float64, N: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    r = np.random.default_rng(2)
    return torch.tensor(r.normal(size=(N, V)) * 3, dtype=dtype), torch.from_numpy(r.integers(0, V, N))


@pytest.mark.parametrize("block", [1, 2 * V, 10**6])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy", [False, True])
def test_given_logits_are_overwritten_by_their_gradient(monkeypatch, block, dtype, tolerance, temperature, entropy):
    monkeypatch.setattr(logits, "BLOCK_CELLS", {"cpu": block})
    values, chosen = given_logits(dtype)
    by = torch.tensor(np.random.default_rng(1).normal(size=(2, 9)))
    leaf, exact = values.clone().requires_grad_(), values.double().requires_grad_()
    at_hand = leaf * 1
    logprobs, entropies = logits.logprobs_of(at_hand, chosen, temperature=temperature, entropy=entropy)
    log_p = torch.log_softmax(exact / temperature, -1)
    plain = log_p.gather(1, chosen[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    assert torch.equal(at_hand, values) and (entropies is not None) == entropy
    total, total_plain = by[0] @ logprobs.double(), by[0] @ plain[0]
    if entropy:
        total, total_plain = total + by[1] @ entropies.double(), total_plain + by[1] @ plain[1]
        torch.testing.assert_close(entropies.double(), plain[1].detach(), rtol=0, atol=1e-5)
    total.backward()
    total_plain.backward()
    assert logprobs.dtype == torch.promote_types(dtype, torch.float32) and logprobs.max() <= 0
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=0, atol=tolerance * float(exact.grad.abs().max()))
    assert torch.equal(at_hand.detach(), leaf.grad), "the gradient stands where the logits were"


def test_logits_that_are_needed_again_are_refused_by_torch():
    values, chosen = given_logits()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.logprobs_of(torch.tanh(values.requires_grad_()), chosen)[0].sum().backward()
    total = logits.logprobs_of(values * 1, chosen)[0].sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


# ---- the guard


def test_the_guard_lets_a_sound_head_pass_in_every_precision():
    for precision in ("float64", "float32", "bf16"):
        model, objective = load(precision=precision), TERMS["ppo, entropy"]
        with torch.no_grad():
            model.output_weight.mul_(20)  # sharp, so that rounding counts
        accumulated(model, step_data(objective), objective)
        model.score(data(0.8), frozenset({Output.LOGPROBS, Output.ENTROPY}), 0.8)


BREAKS: dict[str, tuple[Callable[[logits.Reading], logits.Reading], str]] = {
    "above 0": (lambda r: r._replace(logprobs=r.logprobs + 30), r"log-probs are above 0, as .* in row 0"),
    "log-probs": (lambda r: r._replace(logprobs=1.01 * r.logprobs - 0.01), "the log-prob of row 0 is"),
    "entropy": (lambda r: r._replace(entropy=r.entropy + 0.01), "the entropy of row 0 is")}


@pytest.mark.parametrize("bug", BREAKS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_the_guard_stops_a_broken_head(monkeypatch, bug, ratio):
    spoil, message = BREAKS[bug]
    objective = Sum((PolicyGradient(ratio=ratio), Measured()))
    monkeypatch.setattr(type(logits.PLAIN), "read", staticmethod(lambda *a, **k: spoil(logits.read(*a, **k))))
    with pytest.raises(Diverged, match=message):
        accumulated(load(), step_data(objective), objective)
    with pytest.raises(Diverged, match=message):
        load().score(data(), objective.outputs, 1.0)


def test_rows_are_compared_every_so_many_versions(monkeypatch):
    compared, model, objective = [], load(), PolicyGradient()
    monkeypatch.setattr(guard, "EVERY", 3)
    monkeypatch.setattr(guard, "require_plain_form", lambda *a, **k: compared.append(model.version))
    for _ in range(7):
        accumulated(model, step_data(objective), objective)
        model.apply()
    assert compared == [0, 3, 6]


def test_what_is_not_a_number_is_left_to_the_gradient():
    model, objective = load(), PolicyGradient()
    with torch.no_grad():
        model.output_weight[0, 0] = float("nan")
    accumulated(model, step_data(objective), objective)
    assert model.apply()["skipped"].value == 1
