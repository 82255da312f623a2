"""The output head's Triton kernels on the host: the contract, float64 oracles written out literally, the torch form.

Not collected by its name: Triton's interpreter has to be chosen before Triton is imported, so `test_triton_head` runs
this file in a process of its own. Tiny shapes and small blocks, since the interpreter takes milliseconds per program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
import pytest
import torch
from posttrain.batching import StepData, counts_of, cut
from posttrain.data import Array, Counts, Loss, MicroBatch, Term, TokenOutputs, Weights
from posttrain.ops import Ops
from posttrain.protocols import LoadRequest, Need, Optimization, Output
from posttrain.testing import KernelContract
from posttrain_backends._torch import forms, guard
from posttrain_backends._torch.head import Readout, chosen_logprobs, compared_logprobs, walk
from posttrain_backends._torch.logits import PLAIN, Reading, Slopes, gathered, logprobs_of
from posttrain_backends.kernels.head import TritonHead
from posttrain_backends.torch_native import Torch
from ragged import rollouts

KERNEL = TritonHead(block=16, warps=1, device="cpu")
SHAPES = {"one logit": (2, 1), "one row": (1, 7), "one tile": (3, 16), "one logit more than a tile": (2, 17),
          "three tiles and a half": (5, 56)}
TOLERANCE = {torch.bfloat16: 4e-6, torch.float16: 4e-6, torch.float32: 4e-6, torch.float64: 1e-12}
"""Of what is read, relative to the largest logit and at least 1: sums are in float32 or better whatever the logits."""
ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11, torch.float32: 4e-6, torch.float64: 1e-12}
"""Of the gradient, which is written in the type of the logits; the interpreter cuts bfloat16 off where cards round."""


class TestContract(KernelContract):
    components = (TritonHead(block=512, warps=1, device="cpu"),)


def literal(z: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log p(c) [N], H [N] and p [N, V] of logits [N, V], one number at a time."""
    logprobs, entropies, p = np.zeros(len(z)), np.zeros(len(z)), np.zeros(z.shape)
    for n, row in enumerate(z):
        top = max(row)
        total = sum(np.exp(x - top) for x in row)
        for v, x in enumerate(row):
            p[n, v] = np.exp(x - top) / total
            entropies[n] -= p[n, v] * (x - top - np.log(total)) if p[n, v] > 0 else 0.0
        logprobs[n] = row[chosen[n]] - top - np.log(total)
    return logprobs, entropies, p


def literal_gradient(z: np.ndarray, chosen: np.ndarray, by: Slopes, temperature: float) -> np.ndarray:
    """d (sum of by.logprobs log p(c) + by.entropy H) / d logits, one number at a time."""
    _, H, p = literal(z, chosen)
    gradient = np.zeros(z.shape)
    for n in range(len(z)):
        for v in range(z.shape[1]):
            slope = float(by.logprobs[n]) * (float(v == chosen[n]) - p[n, v])
            if p[n, v] > 0:
                slope -= float(by.entropy[n]) * p[n, v] * (np.log(p[n, v]) + H[n])
            gradient[n, v] = slope / temperature
    return gradient


def rows(shape: tuple[int, int], dtype: torch.dtype, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, Slopes]:
    """Logits [N, V], chosen [N], slopes [N] of both outputs."""
    N, V = shape
    rng = np.random.default_rng(N + V)
    exact = torch.promote_types(dtype, torch.float32)
    slopes = (torch.from_numpy(rng.normal(size=N)).to(exact) for _ in range(2))
    return torch.from_numpy(spread * rng.normal(size=shape)).to(dtype), torch.from_numpy(rng.integers(0, V, N)), \
        Slopes(*slopes)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", SHAPES)
def test_rows_and_their_gradients_are_the_literal_ones_in_float64(name: str, dtype: torch.dtype,
                                                                 temperature: float) -> None:
    logits, chosen, by = rows(SHAPES[name], dtype)
    z = logits.double().numpy() / temperature
    logprobs, entropies, _ = literal(z, chosen.numpy())
    atol = TOLERANCE[dtype] * max(1.0, float(np.abs(z).max()))
    reading = KERNEL.read(logits, chosen, temperature, entropy=True)
    assert reading.logprobs.dtype == torch.promote_types(dtype, torch.float32)
    np.testing.assert_allclose(reading.logprobs, logprobs, rtol=0, atol=atol)
    np.testing.assert_allclose(reading.entropy, entropies, rtol=0, atol=atol)
    np.testing.assert_allclose(reading.lse, np.logaddexp.reduce(z, axis=1), rtol=0, atol=atol)
    assert KERNEL.read(logits, chosen, temperature).entropy is None
    expected = literal_gradient(z, chosen.numpy(), by, temperature)
    place = logits.clone()
    gradient = KERNEL.write_gradient(place, chosen, reading, by, temperature)
    assert gradient.data_ptr() == place.data_ptr() and gradient.dtype == dtype
    np.testing.assert_allclose(gradient.double(), expected, rtol=ROUNDING[dtype], atol=atol)


@pytest.mark.parametrize("wanted", ["logprobs", "entropy"])
def test_the_gradient_of_one_output_alone(wanted: str) -> None:
    logits, chosen, by = rows((3, 20), torch.float64)
    alone = Slopes(by.logprobs, None) if wanted == "logprobs" else Slopes(None, by.entropy)
    other = torch.zeros(3, dtype=torch.float64)
    expected = literal_gradient(logits.numpy(), chosen.numpy(),
                                Slopes(*(other if slope is None else slope for slope in alone[:2])), 1.0)
    reading = KERNEL.read(logits, chosen, entropy=True)
    np.testing.assert_allclose(KERNEL.write_gradient(logits, chosen, reading, alone), expected, rtol=0, atol=1e-12)


def test_gradcheck() -> None:
    logits, chosen, _ = rows((2, 18), torch.float64)
    assert torch.autograd.gradcheck(lambda z: KERNEL(z, chosen, 1.3), logits.requires_grad_())


@pytest.mark.parametrize("alive", [[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 1, 1], [1, 1, 1, 0, 0]])
def test_rows_whose_gradient_is_zero_are_left_out(alive: list[int]) -> None:
    logits, chosen, by = rows((5, 20), torch.float64)
    kept = gathered(torch.tensor(alive, dtype=torch.bool))
    expected = literal_gradient(logits.numpy(), chosen.numpy(), by, 1.0)[kept.numpy()]
    reading = KERNEL.read(logits, chosen, entropy=True)
    np.testing.assert_allclose(KERNEL.write_gradient(logits, chosen, reading, by, kept=kept), expected, atol=1e-12)


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")  # NumPy interprets
def test_impossible_tokens_have_no_part_and_rows_of_none_show() -> None:
    logits, chosen, by = rows((4, 40), torch.float64)
    logits[0, :16] = logits[1, 20:] = logits[2, 1::2] = -torch.inf  # a whole tile in front, the last ones, every second
    logits[3] = -torch.inf
    chosen[:3] = torch.tensor([17, 3, 5])  # the last of these is impossible
    reading = KERNEL.read(logits, chosen, entropy=True)
    possible = logits[:3].numpy(), chosen[:3].numpy()
    logprobs, entropies, _ = literal(*possible)
    np.testing.assert_allclose(reading.logprobs[:3], logprobs, atol=1e-12)
    np.testing.assert_allclose(reading.entropy[:3], entropies, atol=1e-12)
    assert reading.logprobs[2] == -torch.inf
    assert reading.logprobs[3].isnan() and not reading.lse[3].isfinite(), "the step must see that a row is broken"
    expected = literal_gradient(*possible, by, 1.0)
    gradient = KERNEL.write_gradient(logits, chosen, reading, by)
    np.testing.assert_allclose(gradient[:3], expected, atol=1e-12)
    assert gradient[3].isnan().any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_in_its_row_alone(wrong: float) -> None:
    logits, chosen, by = rows((3, 40), torch.float32)
    logits[1, 35] = wrong
    reading = KERNEL.read(logits, chosen, entropy=True)
    assert reading.logprobs.isfinite().tolist() == reading.lse.isfinite().tolist() == [True, False, True]
    gradient = KERNEL.write_gradient(logits, chosen, reading, by)
    assert gradient.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_log_probs_are_at_most_zero(dtype: torch.dtype, temperature: float) -> None:
    logits, _, _ = rows((24, 40), dtype, spread=30.0)
    reading = KERNEL.read(logits, logits.float().argmax(-1), temperature, entropy=True)
    guard.require_logprobs(reading.logprobs)
    assert reading.logprobs.max() == 0 and reading.entropy is not None and reading.entropy.min() >= -1e-5


def test_an_id_outside_the_vocabulary_reads_nothing_there() -> None:
    logits, chosen, _ = rows((3, 20), torch.float32)
    chosen[:2] = torch.tensor([20, -1])
    assert KERNEL.read(logits, chosen).logprobs.isnan().tolist() == [True, True, False]


def test_no_rows() -> None:
    logits, chosen, by = rows((0, 5), torch.float32)
    reading = KERNEL.read(logits, chosen, entropy=True)
    assert len(reading.logprobs) == len(KERNEL.write_gradient(logits, chosen, reading, by)) == 0


def test_two_calls_give_the_same_numbers() -> None:
    logits, chosen, by = rows((3, 56), torch.float32)
    readings = [KERNEL.read(logits, chosen, 0.7, entropy=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*(reading[:3] for reading in readings)))  # type: ignore[arg-type]
    # None stands for no KL
    gradients = [KERNEL.write_gradient(logits.clone(), chosen, readings[0], by) for _ in range(2)]
    assert torch.equal(*gradients)


def test_given_logits_are_overwritten_by_their_gradient() -> None:
    logits, chosen, by = rows((3, 20), torch.float32)
    given = logits.clone().requires_grad_()
    inner = given * 1.0
    logprobs, entropy = logprobs_of(inner, chosen, temperature=0.7, entropy=True, form=KERNEL)
    (by.logprobs * logprobs + by.entropy * entropy).sum().backward()
    expected = literal_gradient(logits.double().numpy() / 0.7, chosen.numpy(), by, 0.7)
    np.testing.assert_allclose(given.grad, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(inner.detach(), expected, rtol=0, atol=1e-5)


# ---- in the head


def states(N: int, V: int = 19, H: int = 6, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    rng = np.random.default_rng(N + V)
    hidden, weight = (torch.tensor(rng.normal(size=s), dtype=dtype, requires_grad=True) for s in ((N, H), (V, H)))
    return hidden, weight, torch.from_numpy(rng.integers(0, V, N))


def plain(hidden: torch.Tensor, weight: torch.Tensor, chosen: torch.Tensor, temperature: float) -> Any:
    log_p = torch.log_softmax(hidden @ weight.t() / temperature, dim=-1)
    return log_p.gather(1, chosen[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("rows_of_chunk", [1, 3, 0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_two_passes_equal_autograd_in_float64(temperature: float, rows_of_chunk: int) -> None:
    hidden, weight, chosen = states(7)
    _, _, by = rows((7, 19), torch.float64)
    results = []
    for logprobs, entropy in (
            chosen_logprobs(hidden, weight, chosen, temperature=temperature, rows=rows_of_chunk, entropy=True,
                            form=KERNEL), plain(hidden, weight, chosen, temperature)):
        total = (by.logprobs * logprobs).sum() + (by.entropy * entropy).sum()
        results.append((logprobs, entropy, *torch.autograd.grad(total, (hidden, weight))))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    guard.require_plain_form(hidden, weight, chosen, *results[0][:2], temperature=temperature, compute=torch.float64)


@pytest.mark.parametrize("rows_of_chunk", [2, 3, 0])
def test_one_pass_equals_autograd_in_float64(rows_of_chunk: int) -> None:
    """Of a loss that gives some rows no gradient."""
    hidden, weight, chosen = states(7)
    cut = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)

    def slopes(part: slice, reading: Reading) -> Slopes:
        assert reading.entropy is not None
        return Slopes(2 * cut[part] * reading.logprobs, cut[part] * reading.entropy)

    d_weight = torch.zeros_like(weight)
    reading, d_hidden = walk(hidden, weight, chosen, slopes, d_weight=d_weight, temperature=0.7, rows=rows_of_chunk,
                             entropy=True, form=KERNEL)
    logprobs, entropy = plain(hidden, weight, chosen, 0.7)
    expected = torch.autograd.grad((cut * (logprobs.square() + entropy.square() / 2)).sum(), (hidden, weight))
    torch.testing.assert_close(reading.logprobs, logprobs.detach(), rtol=0, atol=1e-12)
    assert d_hidden is not None
    for ours, exact in zip((d_hidden, d_weight), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


def test_in_bf16_it_equals_the_torch_form() -> None:
    hidden, weight, chosen = states(6, V=40, H=16, dtype=torch.float32)
    found = []
    for form in (KERNEL, PLAIN):
        logprobs, entropy = chosen_logprobs(hidden, weight, chosen, compute=torch.bfloat16, rows=4, entropy=True,
                                            form=form)
        assert entropy is not None
        found.append((logprobs, entropy, *torch.autograd.grad((logprobs + 0.1 * entropy).sum(), (hidden, weight))))
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=0, atol=2e-2 * float(torchs.detach().abs().max()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-5)


def test_the_kl_to_a_reference_is_torchs() -> None:
    hidden, weight, chosen = states(4)
    other_hidden, other_weight, _ = states(4, V=19, H=5)
    reference = Readout(other_hidden.detach(), other_weight.detach(), torch.float64)
    found = []
    for form in (KERNEL, PLAIN):
        logprobs, entropy, kl = compared_logprobs(hidden, weight, chosen, reference, rows=3, entropy=True, form=form)
        assert entropy is not None
        total = (logprobs + entropy + kl).sum()
        found.append((logprobs, entropy, kl, *torch.autograd.grad(total, (hidden, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@final
@dataclass(frozen=True, slots=True)
class Bandit:
    """The loss -sum(advantage * log p) - 0.1 sum(entropy), over actions or, the same, over episodes."""

    unit: Literal["action", "episode"]
    needs: frozenset[Need] = frozenset({Need.ADVANTAGES})
    outputs: frozenset[Output] = frozenset({Output.LOGPROBS, Output.ENTROPY})
    slots: tuple[str, ...] = ("main",)

    def weights(self, counts: Counts) -> Weights:
        return Weights(weight=np.ones(counts.actions))

    def __call__(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Array]) -> Loss:
        gain = batch.advantages * out.logprobs + 0.1 * batch.weight * out.entropy
        return Loss({"policy": Term(-ops.xp.sum(gain))})


@pytest.mark.parametrize("unit", ["action", "episode"])
@pytest.mark.parametrize("precision", ["float64", "bf16"])
def test_a_learner_trains_with_it_as_without(precision: Literal["float64", "bf16"], unit: Literal["action", "episode"],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """In one pass, which a unit of actions takes, and in two."""
    monkeypatch.setattr(forms, "_KERNELS", {"auto": (KERNEL,), "torch": ()})
    r = rollouts([(2, 3), (3, 1), (1, 4)])
    advantages = np.random.default_rng(1).normal(size=int(r.is_action.sum()))
    keep = np.ones(len(advantages), bool)
    step = StepData(r, keep, Bandit(unit).weights(counts_of(r, keep)), {"advantages": advantages})
    gradients, kernels = [], ("auto", "torch")
    for kernel in kernels:
        model = Torch(hidden_size=16, layers=1, heads=2, kv_heads=1, device="cpu", precision=precision, head_chunk=5,
                      head_kernel=kernel).load(LoadRequest(19, optimization=Optimization()))
        assert model._form is (KERNEL if kernel == "auto" else PLAIN)
        metrics = model.accumulate(cut(step, np.arange(3)), Bandit(unit), {})
        gradients.append({**model._gradients["main"], "loss": torch.tensor(metrics["loss/policy"].total)})
    tolerance = {"float64": 1e-12, "bf16": 2e-2}[precision]
    for name, ours in gradients[0].items():
        expected = gradients[1][name]
        torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * max(1e-3, float(expected.abs().max())))
