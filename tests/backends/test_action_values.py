"""The action-value head of the torch learner against the naive form over the whole vocabulary: what it says, its
gradients, its memory, and that it is saved, resumed and refused as it should be."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from posttrain.batching import StepData, cut
from posttrain.data import Counts, Loss, Prompt, Rollouts, Term, Weights, offsets_of
from posttrain.errors import ConfigError
from posttrain.protocols import LoadRequest, Optimization, Output
from posttrain_backends._torch.head import chosen_action_values, expected_values
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.learner import TorchLearner
from posttrain_backends.hf import HF, Lora
from posttrain_backends.torch_native import Torch
from ragged import answers_to_one_prompt
from torch.utils._python_dispatch import TorchDispatchMode

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of transformers, peft

V, COEF = 29, {"value": 1.0}
TAKEN = frozenset({Output.ACTION_VALUES})
EXPECTED = frozenset({Output.EXPECTED_ACTION_VALUES})
BOTH = TAKEN | EXPECTED
SETTINGS = Optimization(lr=0.05)


def action_value() -> Any:
    """The loss of the package of objectives."""
    value = pytest.importorskip("posttrain_objectives.value", reason="posttrain_objectives is not installed")
    return value.ActionValue()


# ---- the functions alone


def matrices(N: int, k: int = 2, V: int = 19, H: int = 6, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """hidden, weight, q_weight, q_bias, and chosen tokens, some of them alike."""
    r = np.random.default_rng(N + 10 * k)
    found = [torch.tensor(r.normal(size=shape), dtype=dtype) for shape in ((N, H), (V, H), (k, V, H), (k, V))]
    return [*found, torch.from_numpy(r.integers(0, V, N) % 11)]


def every_q(hidden, q_weight, q_bias):
    """[k, N, V]"""
    return torch.einsum("nh,kvh->knv", hidden, q_weight) + q_bias[:, None]


def naive_expected(hidden, weight, q_weight, q_bias, temperature):
    p = torch.softmax(hidden @ weight.t() / temperature, dim=-1)
    return (p * every_q(hidden, q_weight, q_bias)).sum(-1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("k, rows", [(1, 0), (1, 4), (2, 1), (2, 5), (2, 12), (2, 13), (2, 50), (3, 0)])
def test_expected_values_equal_the_naive_form(dtype, tolerance, temperature, k, rows):
    hidden, weight, q_weight, q_bias, _ = matrices(13, k, dtype=dtype)
    found = expected_values(hidden, weight, q_weight, q_bias, temperature=temperature, rows=rows)
    expected = naive_expected(hidden, weight, q_weight, q_bias, temperature)
    assert found.shape == (k, 13) and found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_equal_action_values_are_their_own_mean_whatever_the_policy():
    hidden, weight, q_weight, q_bias, _ = matrices(9)
    q_weight, q_bias = q_weight[:, :1].expand_as(q_weight), q_bias[:, :1].expand_as(q_bias)
    found = expected_values(hidden, weight, q_weight, q_bias, rows=2)
    torch.testing.assert_close(found, every_q(hidden, q_weight, q_bias)[..., 0], rtol=0, atol=1e-12)


def test_expected_values_carry_no_gradient():
    given = [x.requires_grad_() for x in matrices(4)[:4]]
    assert not expected_values(*given).requires_grad


@pytest.mark.parametrize("k", [1, 3])
def test_chosen_values_and_their_gradients_equal_the_naive_form(k):
    hidden, _, q_weight, q_bias, chosen = matrices(13, k)
    given = [x.requires_grad_() for x in (hidden, q_weight, q_bias)]
    by_value = torch.tensor(np.random.default_rng(1).normal(size=(k, 13)))
    found = chosen_action_values(*given, chosen)
    expected = every_q(*given).gather(-1, chosen.expand(k, -1)[..., None])[..., 0]
    assert found.shape == (k, 13)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad((found * by_value).sum(), given),
                    torch.autograd.grad((expected * by_value).sum(), given), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_chosen_values_by_finite_differences():
    hidden, _, q_weight, q_bias, chosen = matrices(5, 2, V=7, H=3)
    given = [x.requires_grad_() for x in (hidden, q_weight, q_bias)]
    assert torch.autograd.gradcheck(lambda *x: chosen_action_values(*x, chosen % 7), given)


def test_no_states():
    hidden, weight, q_weight, q_bias, chosen = matrices(0)
    assert expected_values(hidden, weight, q_weight, q_bias).shape == (2, 0)
    assert chosen_action_values(hidden, q_weight, q_bias, chosen).shape == (2, 0)


def test_the_policy_of_bfloat16_logits_is_the_one_of_the_log_probs():
    hidden, weight, q_weight, q_bias, _ = matrices(40, V=64, H=16, dtype=torch.float32)
    found = expected_values(hidden, weight, q_weight, q_bias, compute=torch.bfloat16, rows=8)
    p = torch.softmax((hidden.bfloat16() @ weight.bfloat16().t()).float(), dim=-1)
    torch.testing.assert_close(found, (p * every_q(hidden, q_weight, q_bias)).sum(-1), rtol=0, atol=1e-4)
    assert found.dtype == torch.float32


class Largest(TorchDispatchMode):
    """The most elements that any one tensor made under it has, apart from those of the given sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None for r in func._schema.returns)
        if isinstance(out, torch.Tensor) and not is_view:
            self.elements = max(self.elements, out.numel())
        return out


def test_no_array_is_larger_than_one_chunk():
    N, k, V, H, rows = 96, 3, 512, 4, 16
    hidden, weight, q_weight, q_bias, chosen = matrices(N, k, V, H)
    with Largest() as chunked:
        expected_values(hidden, weight, q_weight, q_bias, rows=rows)
    with Largest() as gathered:
        chosen_action_values(hidden, q_weight, q_bias, chosen)
    with Largest() as whole:
        naive_expected(hidden, weight, q_weight, q_bias, 1.0)
    assert chunked.elements == rows * V and gathered.elements == k * N * H and whole.elements == k * N * V


# ---- the learner


def rollouts(E: int = 12, seed: int = 0) -> Rollouts:
    """Pairs of answers to one prompt; every third episode is split over two sequences, and some tokens between actions
    were not chosen."""
    r = np.random.default_rng(seed)
    rows, episode, is_action = [], [], []
    for e in range(E):
        prompt = np.random.default_rng([seed, e // 2]).integers(0, V, 2 + e % 5)
        for _ in range(2 if e % 3 == 0 else 1):
            rest = int(r.integers(2, 9))
            rows.append(np.concatenate([prompt, r.integers(0, V, rest)]))
            is_action.append(np.concatenate([np.zeros(len(prompt), bool), r.random(rest - 1) < 0.7, [True]]))
            episode.append(e)
    return Rollouts(
        tokens=np.concatenate(rows).astype(np.int32), offsets=offsets_of(np.array([len(row) for row in rows])),
        episode=np.array(episode), is_action=np.concatenate(is_action), group=np.arange(E) // 2,
        finish=np.zeros(E, np.int8), terminated=np.ones(E, bool),
        prompts=tuple(Prompt(text="x") for _ in range(E)), completions=("",) * E)


def disturb(learner: TorchLearner, seed: int = 0) -> TorchLearner:
    """Weights and heads large enough that everything matters; equal for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in learner.trunk.named_parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
        for head in (learner.value_head, learner.action_value_head):
            for p in () if head is None else head.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
    return learner


def load(k: int = 2, heads: int = 0, optimization: Optimization | None = SETTINGS, precision: str = "float64",
         **fields) -> TorchLearner:
    component = Torch(hidden_size=16, layers=2, heads=4, kv_heads=2, max_positions=64, device="cpu",
                      precision=precision, **fields)
    return component.load(LoadRequest(V, heads, k, optimization=optimization))


def step_data(k: int = 2, seed: int = 0) -> StepData:
    data = rollouts(seed=seed)
    r, N = np.random.default_rng(seed + 1), int(data.is_action.sum())
    return StepData(data, keep=r.random(N) < 0.9, weights=Weights(value_weight=r.random(N) / N),
                    columns={"targets": r.normal(size=(k, N))})


def accumulate(learner: TorchLearner, data: StepData, parts: int = 1) -> None:
    for episodes in np.array_split(np.arange(data.rollouts.n_episodes), parts):
        learner.accumulate(cut(data, episodes), action_value(), COEF)


def step(learner: TorchLearner, seed: int = 0) -> None:
    accumulate(learner, step_data(2, seed))
    learner.apply()


def every_state(learner: TorchLearner, data: Rollouts):
    """Per action the hidden state before it, its id; per episode the hidden state of its last token: one sequence at a
    time, with gradients."""
    before, chosen, last = [], [], {}
    for s, e in enumerate(data.episode):
        a, b = data.offsets[s:s + 2]
        tokens = torch.from_numpy(data.tokens[a:b].astype(np.int64))
        hidden = learner.trunk.hidden(tokens, Layout.from_offsets([0, b - a]))
        for t in np.flatnonzero(data.is_action[a:b]):
            before.append(hidden[t - 1])
            chosen.append(int(tokens[t]))
        last[e] = hidden[-1]
    return torch.stack(before), torch.tensor(chosen), torch.stack([last[e] for e in range(data.n_episodes)])


def naive_q(learner: TorchLearner, hidden: torch.Tensor) -> torch.Tensor:
    """[k, n, V]"""
    head, width = learner.action_value_head, len(learner.model.output_weight)
    k = head.out_features // width
    return torch.stack([hidden @ head.weight[j * width:(j + 1) * width].t() + head.bias[j * width:(j + 1) * width]
                        for j in range(k)])


def naive_outputs(learner: TorchLearner, data: Rollouts, temperature: float):
    """action values [k, N], their means [k, N] and, after the last tokens, [k, E]."""
    before, chosen, last = every_state(learner, data)

    def mean(hidden):
        return (torch.softmax(hidden @ learner.model.output_weight.t() / temperature, -1)
                * naive_q(learner, hidden)).sum(-1)
    return naive_q(learner, before)[:, torch.arange(len(chosen)), chosen], mean(before), mean(last)


@pytest.mark.oracle
@pytest.mark.parametrize("k, temperature, fields", [
    (1, 1.0, {}), (2, 0.7, {"head_chunk": 3}), (3, 1.6, {"tied_embeddings": True, "head_chunk": 1})], ids=str)
def test_scores_equal_a_literal_computation(k, temperature, fields):
    learner, data = disturb(load(k, **fields)), rollouts()
    out = learner.score(data, BOTH, temperature)
    expected = (x.detach().numpy() for x in naive_outputs(learner, data, temperature))
    found = (out.action_values, out.expected_action_values, out.expected_bootstrap_values)
    for ours, reference in zip(found, expected, strict=True):
        assert isinstance(ours, np.ndarray) and ours.shape == reference.shape and ours.std() > 0.1
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-12)


def test_only_what_is_asked_is_computed():
    learner, data = disturb(load(heads=1)), rollouts()
    everything = learner.score(data, learner.provides, 0.8)
    for asked, columns in {TAKEN: {"action_values"}, frozenset({Output.VALUES}): {"values"},
                           EXPECTED: {"expected_action_values", "expected_bootstrap_values"}}.items():
        out = learner.score(data, asked, 0.8)
        for name in ("entropy", "values", "bootstrap_values", "action_values", "expected_action_values",
                     "expected_bootstrap_values"):
            assert (getattr(out, name) is not None) == (name in columns), name
            if name in columns:
                np.testing.assert_allclose(getattr(out, name), getattr(everything, name), rtol=0, atol=1e-12)
        assert np.isnan(out.logprobs).all()


def test_they_begin_at_zero_and_shift_no_policy():
    out = load(3).score(rollouts(), BOTH, 1.0)
    assert out.action_values.shape[0] == 3
    assert not out.action_values.any() and not out.expected_action_values.any()
    assert not out.expected_bootstrap_values.any()
    np.testing.assert_array_equal(*(x.score(rollouts(), frozenset({Output.LOGPROBS}), 1.0).logprobs
                                    for x in (load(3), load(0))))


def test_provides_what_was_asked_for():
    assert not load(0).provides & BOTH and load(1).provides >= BOTH
    assert Torch().provides >= BOTH and HF(weights="model").provides >= BOTH


@pytest.mark.parametrize("fields", [{}, {"gradient_checkpointing": True}], ids=str)
def test_gradients_are_those_of_the_naive_form(fields):
    learner, data = disturb(load(2, **fields)), step_data()
    accumulate(learner, data, parts=2)
    G = torch.from_numpy(data.columns["targets"])
    weight = torch.from_numpy(np.where(data.keep, data.weights.value_weight, 0.0))
    Q, _, _ = naive_outputs(learner, data.rollouts, 1.0)
    names, parameters = zip(*learner._named_parameters(), strict=True)
    expected = torch.autograd.grad((weight * 0.5 * (Q - G) ** 2).sum(), parameters, allow_unused=True)
    moved = 0
    for name, reference in zip(names, expected, strict=True):
        found = learner._gradients["main"][name]
        reference = torch.zeros_like(found) if reference is None else reference
        assert float((found - reference).abs().max()) <= 1e-12, name
        moved += bool(reference.any())
    assert moved > 10 and learner._gradients["main"]["action_value_head.weight"].any()


@pytest.mark.parametrize("precision, tolerance", [("float64", 1e-12), ("float32", 1e-6)])
@pytest.mark.parametrize("parts", [2, 5, 12])
def test_the_split_into_parts_does_not_change_the_gradient(precision, tolerance, parts):
    found = []
    for n in (1, parts):
        learner = disturb(load(2, precision=precision))
        accumulate(learner, step_data(), n)
        found.append(learner._gradients["main"])
    largest = max(float(g.abs().max()) for g in found[0].values())
    for name, g in found[0].items():
        assert float((g - found[1][name]).abs().max()) <= tolerance * largest, name


def test_training_reaches_the_targets_of_both_columns():
    learner, data = load(2, optimization=Optimization(lr=0.03)), step_data()
    target = data.columns["targets"][:, data.keep]

    def error() -> float:
        values = learner.score(data.rollouts, TAKEN, 1.0).action_values[:, data.keep]
        return float(((values - target) ** 2).mean())
    first = error()
    for _ in range(60):
        accumulate(learner, data)
        learner.apply()
    assert first == pytest.approx((target**2).mean()) and error() < 0.1 * first


def test_the_mean_has_no_gradient_and_is_refused_in_training():
    @dataclass(frozen=True)
    class Wrong:
        outputs = EXPECTED
        slots = ("main",)

        def __call__(self, ops, out, batch, coef):
            return Loss({"value": Term(ops.xp.sum(out.expected_action_values))})
    learner = load()
    before = dict(learner.state())
    with pytest.raises(ConfigError, match=r"expected_action_values carry no gradient(.|\n)*Wrong"):
        learner.accumulate(cut(step_data(), np.arange(3)), Wrong(), COEF)
    assert before.keys() == learner.state().keys()


def test_without_a_head_they_are_refused():
    learner = load(0, heads=1)
    for asked in (TAKEN, EXPECTED):
        with pytest.raises(ConfigError, match=f"no {next(iter(asked))} .no action-value head was asked for"):
            learner.score(rollouts(), asked, 1.0)
    with pytest.raises(ConfigError, match="no action-value head was asked for"):
        accumulate(learner, step_data())


# ---- state and files


def test_resumes_bit_for_bit():
    first = disturb(load(2, heads=1))
    step(first, 0)
    saved = dict(first.state())
    assert {f"{kind}action_value_head.{part}" for kind in ("weights.", "exp_avg.", "exp_avg_sq.")
            for part in ("weight", "bias")} <= saved.keys()
    other = load(2, heads=1)
    other.load_state(saved)
    for learner in (first, other):
        step(learner, 1)
    for name, x in first.state().items():
        np.testing.assert_array_equal(x, other.state()[name], err_msg=name)
    assert not np.array_equal(saved["weights.action_value_head.weight"],
                              first.state()["weights.action_value_head.weight"])


@pytest.mark.parametrize("k", [0, 1, 3])
def test_a_state_of_another_number_of_heads_is_refused(k):
    saved, other = dict(load(2).state()), load(k)
    with pytest.raises(ConfigError, match=r"action_value_head\.weight (has shape|is unknown)"):
        other.load_state(saved)


def test_the_policys_weights_hold_no_head():
    assert not [name for name, _ in load(2, heads=1).params() if "value" in name]


def test_what_is_saved_loads_again(tmp_path: Path):
    learner = disturb(load(2, heads=2))
    learner.save(tmp_path)
    assert (tmp_path / "action_value_head.safetensors").is_file()
    found = Torch(weights=str(tmp_path), precision="float64", device="cpu")
    again = found.load(LoadRequest(V, 2, 2))
    a, b = (x.score(rollouts(), learner.provides, 0.9) for x in (learner, again))
    for name in ("logprobs", "values", "bootstrap_values", "action_values", "expected_action_values",
                 "expected_bootstrap_values"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert found.load(LoadRequest(V)).action_value_head is None, "who asks for none gets none"
    with pytest.raises(ConfigError, match=r"action value head in .* does not fit(.|\n)*weight has shape \(58, 16\)"):
        found.load(LoadRequest(V, 0, 3))


def test_a_folder_without_a_head_gives_one_that_begins_at_zero(tmp_path: Path):
    load(0).save(tmp_path)
    assert not (tmp_path / "action_value_head.safetensors").exists()
    again = Torch(weights=str(tmp_path), precision="float64", device="cpu").load(LoadRequest(V, 0, 1))
    assert not again.score(rollouts(), BOTH, 1.0).action_values.any()


# ---- models of transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    transformers = pytest.importorskip("transformers")
    path: Path = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True)).save_pretrained(path)
    return path


def test_prompts_computed_once_change_nothing(folder: Path):
    """Behind a long prompt the answers are computed as a tree; one by one they are not."""
    learner = disturb(HF(weights=str(folder), device="cpu").load(LoadRequest(V, 0, 2)))
    data = answers_to_one_prompt(20, (3, 9, 1, 14), low=0, high=V)
    assert learner.trunk.shares_prompts
    whole = learner.score(data, BOTH, 0.7)
    parts = [learner.score(data.select(np.array([e])), BOTH, 0.7) for e in range(4)]
    for name in ("action_values", "expected_action_values", "expected_bootstrap_values"):
        np.testing.assert_allclose(getattr(whole, name), np.concatenate([getattr(p, name) for p in parts], axis=1),
                                   rtol=0, atol=1e-4)


def test_beside_an_adapter_the_head_is_trained_in_full(folder: Path, tmp_path: Path):
    pytest.importorskip("peft")
    def loaded(path: Path, adapter: Lora | None) -> TorchLearner:
        return HF(weights=str(path), device="cpu", adapter=adapter).load(
            LoadRequest(V, 0, 2, optimization=replace(SETTINGS, lr=0.02)))
    learner = loaded(folder, Lora(rank=2))
    trained = set(learner._parameters)
    assert {"action_value_head.weight", "action_value_head.bias"} < trained
    assert all("lora" in name for name in trained if not name.startswith("action_value_head"))
    for seed in range(3):
        step(learner, seed)
    out = learner.score(rollouts(), BOTH, 0.7)
    for ours, reference in zip((out.action_values, out.expected_action_values, out.expected_bootstrap_values),
                               naive_outputs(learner, rollouts(), 0.7), strict=True):
        assert np.abs(ours).max() > 0.01
        np.testing.assert_allclose(ours, reference.detach(), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="without its adapter gives no action_values"):
        learner.base().score(rollouts(), TAKEN, 1.0)
    learner.save(tmp_path)
    again = loaded(tmp_path, None).score(rollouts(), BOTH, 0.7)
    np.testing.assert_allclose(again.expected_action_values, out.expected_action_values, rtol=0, atol=1e-5)


def test_a_model_without_log_probs_refuses_the_head(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    transformers.LlamaForTokenClassification(transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_labels=1)).save_pretrained(tmp_path)
    critic = HF(weights=str(tmp_path), device="cpu")
    for heads in (0, 1):
        with pytest.raises(ConfigError, match=r"LlamaForTokenClassification, which gives no log-probs") as raised:
            critic.load(LoadRequest(V, heads, 1))
        assert "critic: policy" in str(raised.value)
    with pytest.raises(ConfigError, match="no log-probs"):
        TorchLearner(critic.load(LoadRequest(V, 1)).trunk, action_value_heads=1)


def test_weights_of_the_objective_are_its_own():
    weights = action_value().weights(Counts(4, 2, np.array([3, 1])))
    np.testing.assert_allclose(weights.value_weight, 0.25)
