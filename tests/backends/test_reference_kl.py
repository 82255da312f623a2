"""The KL to a reference over the whole vocabulary, as a torch learner says it: against a sum over all continuations and
dense logits, however a step is split, with copies, adapters and other models as reference; and what is refused."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("posttrain_objectives")

from posttrain.batching import StepData, counts_of, cut, units_of  # after the check that the libraries are there
from posttrain.data import Rollouts, to_numpy
from posttrain.errors import ConfigError
from posttrain.loss import KLTerm, Sum
from posttrain.protocols import Comparing, LoadRequest, Optimization, Output
from posttrain.testing.tiny_models import log_table
from posttrain_backends._torch.layout import Layout
from posttrain_backends.hf import HF, Lora
from posttrain_backends.torch_native import Torch
from posttrain_objectives.kl import FixedKL
from posttrain_objectives.policy_gradient import PolicyGradient
from ragged import rollouts

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]  # the libraries' own

V = 13
LENGTHS = [(2, 5), (3, 1), (1, 7), (4, 3), (2, 6)]
KL = frozenset({Output.REFERENCE_KL})
TOLERANCE = {"float64": 1e-12, "float32": 2e-6}


def load(seed: int, *, train: bool = False, width: int = 16, vocab: int = V, **fields: Any) -> Any:
    """A native model whose log-probs are far from uniform."""
    model = Torch(hidden_size=width, layers=1, heads=2, kv_heads=1, max_positions=64, device="cpu", **fields).load(
        LoadRequest(vocab, seed=seed, optimization=Optimization(lr=0.05) if train else None))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in model.trunk.named_parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def data(seed: int = 3, temperature: float = 1.0) -> Rollouts:
    r = rollouts(LENGTHS, group=[0, 0, 1, 1, 2])
    tokens = np.random.default_rng(seed).integers(0, V, len(r.tokens)).astype(np.int32)
    return replace(r, tokens=tokens, sampling=replace(r.sampling, temperature=temperature))


def prefixes_of(r: Rollouts) -> list[list[int]]:
    """The tokens before each action."""
    start = r.offsets[np.searchsorted(r.offsets, r.source, side="right") - 1]
    return [r.tokens[a:b].tolist() for a, b in zip(start, r.source, strict=True)]


def over_all_continuations(policy: Any, reference: Any, r: Rollouts, temperature: float) -> np.ndarray:
    """[N] from scored log-probs of every token of the vocabulary behind every prefix."""
    logp, logq = (log_table(m, prefixes_of(r), V, temperature).astype(np.float64) for m in (policy, reference))
    k: np.ndarray = (np.exp(logp) * (logp - logq)).sum(axis=1)
    return k


OBJECTIVE = Sum((PolicyGradient(), KLTerm(FixedKL(placement="loss", estimator="exact"))))
COEF = {"kl": 0.7}


def step_data(r: Rollouts) -> StepData:
    rng = np.random.default_rng(4)
    N = int(r.is_action.sum())
    keep = rng.random(N) > 0.2
    keep[0] = True
    weights = OBJECTIVE.weights(counts_of(r, keep))
    def spread(x: np.ndarray) -> np.ndarray:
        full = np.zeros(N)
        full[keep] = x
        return full
    kl_weight = weights.weight if weights.kl_weight is None else weights.kl_weight
    return StepData(r, keep, replace(weights, weight=spread(weights.weight), kl_weight=spread(kl_weight)),
                    {"advantages": rng.normal(size=N)})


def accumulated(model: Any, step: StepData, parts: int, objective: Any = OBJECTIVE) -> tuple[dict[str, Any], Any]:
    units, total = units_of(step.rollouts, step.keep, "action"), None
    for chosen in np.array_split(np.arange(len(units)), parts):
        found = model.accumulate(cut(step, np.concatenate([units[i] for i in chosen])), objective, COEF)
        total = found if total is None else total + found
    return {name: g.double().clone() for name, g in next(iter(model._gradients.values())).items()}, total


def furthest(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Relative to the largest entry."""
    scale = max(float(x.abs().max()) for x in b.values())
    assert set(a) == set(b) and scale > 1e-3
    return max(float((a[name] - b[name]).abs().max()) for name in a) / scale


def with_reference(model: Any, reference: Any) -> Any:
    assert isinstance(model, Comparing) and Output.REFERENCE_KL not in model.provides
    model.compare_with(reference)
    assert Output.REFERENCE_KL in model.provides
    return model


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("head_chunk", [0, 1, 2, 5])
def test_its_value_is_the_sum_over_all_continuations(precision: str, temperature: float, head_chunk: int) -> None:
    """The reference has other sizes than the policy, but the vocabulary."""
    policy, reference = load(1, precision=precision, head_chunk=head_chunk), load(2, precision=precision, width=8)
    r = data()
    out = with_reference(policy, reference).score(r, policy.provides, temperature)
    expected = over_all_continuations(policy, reference, r, temperature)
    assert out.reference_kl.shape == expected.shape and expected.min() > 0.01
    np.testing.assert_allclose(out.reference_kl, expected, rtol=0, atol=20 * TOLERANCE[precision])
    alone = load(1, precision=precision, head_chunk=head_chunk).score(r, policy.provides - KL, temperature)
    assert np.array_equal(out.logprobs, alone.logprobs) and np.array_equal(out.entropy, alone.entropy)
    assert alone.reference_kl is None


def dense_gradient(policy: Any, reference: Any, step: StepData) -> dict[str, Any]:
    """Of the whole loss by autograd, with all logits and in float64."""
    def log_softmax(model: Any) -> Any:
        hidden = model.trunk.hidden(torch.tensor(r.tokens, dtype=torch.int64),
                                    Layout.from_offsets(r.offsets.tolist(), torch.device("cpu")))
        z = hidden[torch.tensor(r.source - 1)] @ model.model.output_weight.t()
        return torch.log_softmax(z / r.sampling.temperature, -1)
    r, keep = step.rollouts, step.keep
    logp = log_softmax(policy)
    with torch.no_grad():
        logq = log_softmax(reference)
    k = (logp.exp() * (logp - logq)).sum(-1)
    chosen = logp[torch.arange(len(k)), torch.tensor(r.tokens[r.source], dtype=torch.int64)]
    weight, kl_weight, advantages = (torch.tensor(np.where(keep, x, 0.0)) for x in (
        step.weights.weight, step.weights.kl_weight, step.columns["advantages"]))
    loss = -(weight * advantages * chosen).sum() + COEF["kl"] * (kl_weight * k).sum()
    named = dict(policy.trunk.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("head_chunk", [0, 1, 2, 5])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_the_gradient_of_a_step_is_the_dense_one_however_it_is_split(temperature: float, head_chunk: int,
                                                                     parts: int) -> None:
    step, reference = step_data(data(temperature=temperature)), load(2, precision="float64", width=8)
    model = with_reference(load(1, train=True, precision="float64", head_chunk=head_chunk), reference)
    found, metrics = accumulated(model, step, parts)
    expected = dense_gradient(load(1, train=True, precision="float64"), reference, step)
    assert furthest(found, expected) < 1e-12
    k = over_all_continuations(model, reference, step.rollouts, temperature)[step.keep]
    assert metrics["kl/reference"].value == pytest.approx(k.mean(), rel=1e-11)
    assert metrics["loss/kl"].value == pytest.approx(float(step.weights.kl_weight[step.keep] @ k), rel=1e-11)


def test_gradients_of_several_slots_leave_the_kl_one_of_its_own() -> None:
    """A pass backwards for each slot through one chunked head."""
    step, reference = step_data(data()), load(2, precision="float64")
    single, several = (with_reference(load(1, train=True, precision="float64", head_chunk=3), reference)
                       for _ in range(2))
    whole, _ = accumulated(single, step, 2)
    a = step.columns["advantages"]
    apart = replace(step, columns={"advantages": np.stack([0.3 * a, 0.7 * a])})
    accumulated(several, apart, 2, Sum((PolicyGradient(slots=("a", "b")), *OBJECTIVE.parts[1:])))
    sums = several._gradients
    assert set(sums) == {"a", "b", "shared"} and any(g.any() for g in sums["shared"].values())
    assert furthest({name: sum(slot[name] for slot in sums.values()) for name in whole}, whole) < 1e-12


@pytest.mark.parametrize(("fields", "tolerance"), [({}, 1e-5), ({"precision": "bf16"}, 0.05),
                                                   ({"gradient_checkpointing": True}, 1e-5)])
def test_in_less_precision_it_is_near(fields: dict[str, Any], tolerance: float) -> None:
    step = step_data(data())
    pair = [with_reference(load(1, train=True, **f), load(2, **f)) for f in (fields, {})]
    double = with_reference(load(1, train=True, precision="float64"), load(2, precision="float64"))
    for to, source in ((double, pair[1]), (double._reference, pair[1]._reference)):
        to.load_params([(name, to_numpy(x).astype(np.float64)) for name, x in source.params()], 0)
    (found, _), (exact, _) = (accumulated(m, step, 2) for m in (pair[0], double))
    assert furthest(found, exact) < tolerance


def test_the_model_itself_costs_nothing_and_pulls_nowhere() -> None:
    step, kl = step_data(data()), Sum((KLTerm(FixedKL(placement="loss", estimator="exact")),))
    same = {precision: accumulated(with_reference(
        load(1, train=True, precision=precision), load(1, precision=precision)), step, 2, kl)
        for precision in ("float32", "bf16")}
    found, metrics = same["float32"]
    assert metrics["kl/reference"].value == 0 and not any(g.any() for g in found.values())
    assert 0 <= same["bf16"][1]["kl/reference"].value < 1e-3, "bfloat16 rounds otherwise where gradients are taken"


def test_a_reference_that_is_given_other_weights_is_the_other_model() -> None:
    policy, reference = load(1, precision="float64"), load(2, precision="float64")
    with_reference(policy, reference)
    reference.load_params([(name, to_numpy(x).copy()) for name, x in policy.params()], 1)
    assert not policy.score(data(), KL, 1.0).reference_kl.any()


# ---- backend hf, with and without an adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose output matrix is its embedding."""
    path: Path = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        initializer_range=0.3)).save_pretrained(path)
    return path


def load_hf(path: Path, *, train: bool = False, **fields: Any) -> Any:
    return HF(weights=str(path), device="cpu", **fields).load(
        LoadRequest(V, seed=5, optimization=Optimization(lr=0.05) if train else None))


@pytest.mark.parametrize("fields", [{}, {"gradient_checkpointing": True}, {"precision": "bf16"},
                                    {"packing": "always"}], ids=str)
def test_the_policy_without_its_adapter_is_the_reference_that_is_loaded_on_its_own(folder: Path,
                                                                                   fields: dict[str, Any]) -> None:
    """Value, gradient and the weights after each of three steps, bit for bit."""
    adapter, step = Lora(rank=4), step_data(data(temperature=0.8))
    own, other = (load_hf(folder, train=True, adapter=adapter, **fields) for _ in range(2))
    with_reference(own, own.base())
    with_reference(other, load_hf(folder, **fields))
    for turn in range(3):
        (a, found), (b, _) = (accumulated(model, step, 2) for model in (own, other))
        assert all(torch.equal(a[name], b[name]) for name in a) and any(g.any() for g in a.values())
        assert (found["kl/reference"].value == 0) == (turn == 0), "at first the adapter does nothing"
        own.apply(), other.apply()
    r = step.rollouts
    if fields.get("precision") != "bf16":
        np.testing.assert_allclose(own.score(r, KL, 0.8).reference_kl,
                                   over_all_continuations(own, own.base(), r, 0.8), atol=1e-5)


def test_models_of_both_backends_can_be_compared(folder: Path) -> None:
    policy, reference, r = load_hf(folder), load(2), data()
    expected = over_all_continuations(policy, reference, r, 1.0)
    np.testing.assert_allclose(with_reference(policy, reference).score(r, KL, 1.0).reference_kl, expected, atol=2e-5)


# ---- what is refused


def test_without_a_reference_there_is_none() -> None:
    model = load(1, train=True)
    with pytest.raises(ConfigError, match="gives no reference_kl .no comparison with a reference was asked for"):
        model.score(data(), KL, 1.0)
    with pytest.raises(ConfigError, match="gives no reference_kl"):
        accumulated(model, step_data(data()), 1)


class Foreign:
    """A scorer of another framework."""


@pytest.mark.parametrize(("reference", "says"), [
    (Foreign(), "the reference is a Foreign, whose output matrix a torch learner cannot read"),
    (load(2, vocab=V + 1), "vocabulary of 14, the policy one of 13")])
def test_what_cannot_be_compared_is_told(reference: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){says}.*kl.estimator=k2"):
        load(1).compare_with(reference)
