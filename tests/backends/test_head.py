"""Chunked log-probs and entropies against the naive form: values, gradients, and the largest array that exists."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from posttrain_backends._torch.head import CHUNK_CELLS, chosen_logprobs, chunk_rows
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)


def inputs(N: int, V: int = 19, H: int = 6, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    r = np.random.default_rng(N + V)
    hidden, weight = (torch.tensor(r.normal(size=s), dtype=dtype, requires_grad=True) for s in ((N, H), (V, H)))
    return hidden, weight, torch.from_numpy(r.integers(0, V, N))


def naive(hidden, weight, chosen, temperature):
    log_p = torch.log_softmax(hidden @ weight.t() / temperature, dim=-1)
    return log_p.gather(1, chosen[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 12, 13, 50, 0])
def test_values_and_gradients_equal_the_naive_form(dtype, tolerance, temperature, rows):
    hidden, weight, chosen = inputs(13, dtype=dtype)
    r = np.random.default_rng(3)
    by_logprob, by_entropy = (torch.tensor(r.normal(size=13), dtype=dtype) for _ in range(2))
    results = []
    for function in (lambda: chosen_logprobs(hidden, weight, chosen, temperature=temperature, rows=rows, entropy=True),
                     lambda: naive(hidden, weight, chosen, temperature)):
        logprobs, entropy = function()
        total = (by_logprob * logprobs).sum() + (by_entropy * entropy).sum()
        results.append((logprobs, entropy, *torch.autograd.grad(total, (hidden, weight))))
    for ours, reference in zip(*results, strict=True):
        scale = max(1.0, float(reference.detach().abs().max()))
        torch.testing.assert_close(ours, reference, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("wanted", ["logprobs", "entropy"])
def test_the_gradient_of_one_output_alone(wanted):
    hidden, weight, chosen = inputs(9)
    pick = ("logprobs", "entropy").index(wanted)
    ours, reference = (
        torch.autograd.grad(out[pick].square().sum(), (hidden, weight))
        for out in (chosen_logprobs(hidden, weight, chosen, rows=4, entropy=True), naive(hidden, weight, chosen, 1.0)))
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradcheck_and_repeated_backward_passes():
    hidden, weight, chosen = inputs(5, V=4, H=3)
    def both(h, w):
        return chosen_logprobs(h, w, chosen, rows=2, entropy=True, temperature=1.3)
    assert torch.autograd.gradcheck(both, (hidden, weight))
    total = sum(x.sum() for x in both(hidden, weight))
    first = torch.autograd.grad(total, weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, weight)[0]), "a slot's pass must leave the next one's intact"


def test_only_the_gradients_that_are_needed():
    hidden, weight, chosen = inputs(6)
    frozen = weight.detach()
    logprobs, entropy = chosen_logprobs(hidden, frozen, chosen, rows=4)
    assert entropy is None
    logprobs.sum().backward()
    expected = torch.autograd.grad(naive(hidden, frozen, chosen, 1.0)[0].sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected, rtol=0, atol=1e-12)


def test_a_certain_token_has_a_logprob_of_at_most_zero():
    generator = torch.Generator().manual_seed(0)
    hidden = 30 * torch.randn(200, 8, generator=generator)
    weight = torch.randn(40, 8, generator=generator)
    chosen = (hidden @ weight.t()).argmax(-1)
    logprobs, entropy = chosen_logprobs(hidden, weight, chosen, entropy=True, rows=32)
    assert logprobs.max() <= 0 and torch.isfinite(entropy).all() and entropy.min() >= -1e-5


def test_logits_far_from_zero_stay_finite():
    hidden, weight = torch.full((2, 1), 1e4), torch.tensor([[1.0], [-1.0]])
    logprobs, entropy = chosen_logprobs(hidden, weight, torch.tensor([0, 1]), entropy=True)
    assert logprobs.tolist() == [0.0, -20000.0] and entropy.abs().max() == 0


def test_no_rows():
    hidden, weight, chosen = inputs(0)
    logprobs, entropy = chosen_logprobs(hidden, weight, chosen, entropy=True)
    (logprobs.sum() + entropy.sum()).backward()
    assert len(logprobs) == len(entropy) == 0 and not weight.grad.any()


def test_bfloat16_matrices_give_float32_results_and_gradients():
    hidden, weight, chosen = inputs(40, V=64, H=16, dtype=torch.float32)
    logprobs, _ = chosen_logprobs(hidden, weight, chosen, compute=torch.bfloat16, rows=8)
    logprobs.sum().backward()
    expected, _ = naive(hidden, weight, chosen, 1.0)
    reference = torch.autograd.grad(expected.sum(), (hidden, weight))
    assert logprobs.dtype == weight.grad.dtype == torch.float32
    assert 0 < (logprobs - expected).abs().max() < 0.1
    for ours, exact in zip((hidden.grad, weight.grad), reference, strict=True):
        assert (ours - exact).norm() < 0.02 * exact.norm()


class Largest(TorchDispatchMode):
    """The most elements that any one tensor made under it has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else (out,)
        self.elements = max([self.elements, *(x.numel() for x in made if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("entropy", [False, True])
def test_no_array_is_larger_than_one_chunk_of_logits(entropy):
    N, V, H, rows = 96, 512, 4, 16
    hidden, weight, chosen = inputs(N, V=V, H=H)
    with Largest() as chunked:
        logprobs, entropies = chosen_logprobs(hidden, weight, chosen, rows=rows, entropy=entropy)
        (logprobs.sum() + (entropies.sum() if entropy else 0)).backward()
    with Largest() as whole:
        naive(hidden, weight, chosen, 1.0)[0].sum().backward()
    assert chunked.elements == rows * V and whole.elements == N * V


def test_no_logits_are_computed_twice_where_one_chunk_holds_all():
    hidden, weight, chosen = inputs(8)
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Products.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
            return func(*args, **(kwargs or {}))
    with Products():
        chosen_logprobs(hidden, weight, chosen, rows=8)[0].sum().backward()
    assert Products.count == 3


def test_chunks_follow_the_device_and_the_vocabulary():
    cpu = torch.device("cpu")
    assert chunk_rows(32768, cpu) == CHUNK_CELLS["cpu"] // 32768 and chunk_rows(10**9, cpu) == 1
