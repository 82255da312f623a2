"""Chunked log-probs, entropies and KLs against the naive form: values, gradients, and the largest array that exists."""

from __future__ import annotations

import sys
from weakref import WeakSet

import numpy as np
import pytest
import torch
from own_process import in_a_process
from posttrain_backends._torch import head, logits
from posttrain_backends._torch.head import CHUNK_CELLS, Readout, chosen_logprobs, chunk_rows, compared_logprobs
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


def test_a_host_rounds_each_chunk_s_sum_of_another_type():
    """`addmm` into another type is a card's; asking for it here must neither raise nor say yes."""
    assert not head._adds_unrounded(torch.bfloat16, torch.float32, torch.device("cpu"))
    assert not head._adds_unrounded(torch.float32, torch.float64, torch.device("cpu"))


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


def reference(N: int, V: int = 19, H: int = 9, dtype: torch.dtype = torch.float64) -> Readout:
    """Of another width than the policy."""
    r = np.random.default_rng(N + V + 1)
    return Readout(*(torch.tensor(r.normal(size=s), dtype=dtype) for s in ((N, H), (V, H))), dtype)


def dense_kl(hidden, weight, other, temperature):
    """sum p (log p - log q), with every logit in memory."""
    log_p, log_q = (torch.log_softmax(h @ w.t() / temperature, -1) for h, w in (
        (hidden, weight), (other.hidden.to(hidden.dtype), other.weight.to(hidden.dtype))))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 12, 13, 50, 0])
def test_the_kl_and_its_gradient_are_those_of_the_dense_form_in_float64(dtype, tolerance, temperature, rows):
    hidden, weight, chosen = inputs(13, dtype=dtype)
    r = np.random.default_rng(3)
    by_logprob, by_entropy, by_kl = (torch.tensor(r.normal(size=13)) for _ in range(3))
    results = []
    for dense in (False, True):
        h, w = ((x.detach().double() if dense else x.detach()).requires_grad_() for x in (hidden, weight))
        other = reference(13, dtype=dtype)
        out = (*naive(h, w, chosen, temperature), dense_kl(h, w, other, temperature)) if dense else compared_logprobs(
            h, w, chosen, other, temperature=temperature, rows=rows, entropy=True)
        together = sum((by.to(x.dtype) * x).sum() for by, x in zip((by_logprob, by_entropy, by_kl), out, strict=True))
        alone = torch.autograd.grad((by_kl.to(out[2].dtype) * out[2]).sum(), (h, w), retain_graph=True)
        results.append((*out, *alone, *torch.autograd.grad(together, (h, w))))
    for ours, exact in zip(*results, strict=True):
        scale = max(1.0, float(exact.detach().abs().max()))
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("entropy", [False, True])
def test_gradcheck_of_the_kl_and_none_of_the_reference(entropy):
    hidden, weight, chosen = inputs(5, V=4, H=3)
    other = reference(5, V=4)
    other.hidden.requires_grad_(), other.weight.requires_grad_()
    def all_of(h, w):
        return [x for x in compared_logprobs(h, w, chosen, other, rows=2, entropy=entropy, temperature=1.3)
                if x is not None]
    assert torch.autograd.gradcheck(all_of, (hidden, weight))
    total = sum(x.sum() for x in all_of(hidden, weight))
    first = torch.autograd.grad(total, weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, weight, retain_graph=True)[0])
    total.backward()
    assert other.hidden.grad is None and other.weight.grad is None


def test_logprobs_and_entropy_beside_a_kl_are_those_without():
    hidden, weight, chosen = inputs(13)
    alone = chosen_logprobs(hidden, weight, chosen, rows=4, entropy=True)
    beside = compared_logprobs(hidden, weight, chosen, reference(13), rows=4, entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=False))
    for i in (0, 1):
        gradients = [torch.autograd.grad(out[i].sum(), weight, retain_graph=True)[0] for out in (alone, beside)]
        assert torch.equal(*gradients)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_model_has_no_kl_to_itself(compute):
    hidden, weight, chosen = inputs(13, dtype=torch.float32)
    same = Readout(hidden.detach().clone(), weight.detach().clone(), compute)
    _, _, kl = compared_logprobs(hidden, weight, chosen, same, rows=4, compute=compute, temperature=0.9)
    kl.sum().backward()
    assert not kl.any() and not hidden.grad.any() and not weight.grad.any()


def test_a_kl_of_distributions_without_overlap_is_finite():
    hidden, weight = torch.full((2, 1), 1e3, requires_grad=True), torch.tensor([[1.0], [-1.0]])
    other = Readout(torch.full((2, 1), -1e3), weight, torch.float32)
    _, _, kl = compared_logprobs(hidden, weight, torch.tensor([0, 1]), other)
    kl.sum().backward()
    assert kl.tolist() == [2000.0, 2000.0] and torch.isfinite(hidden.grad).all()


def test_the_kl_of_bfloat16_matrices():
    hidden, weight, chosen = inputs(40, V=64, H=16, dtype=torch.float32)
    other = reference(40, V=64, dtype=torch.float32)
    _, _, kl = compared_logprobs(hidden, weight, chosen, Readout(other.hidden, other.weight, torch.bfloat16),
                                 compute=torch.bfloat16, rows=8)
    kl.sum().backward()
    exact = dense_kl(hidden, weight, other, 1.0)
    reference_gradients = torch.autograd.grad(exact.sum(), (hidden, weight))
    assert kl.dtype == weight.grad.dtype == torch.float32 and kl.min() >= 0
    assert 0 < ((kl - exact).abs() / exact).max() < 0.03
    for ours, dense in zip((hidden.grad, weight.grad), reference_gradients, strict=True):
        assert (ours - dense).norm() < 0.02 * dense.norm()


class Alive(TorchDispatchMode):
    """The most arrays of at least `elements` that were alive together, by their storages."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.most, self.storages = elements, 0, WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.numel() >= self.elements:
                self.storages.add(x.untyped_storage())
        self.most = max(self.most, len(self.storages))
        return out


@pytest.mark.parametrize("entropy", [False, True])
def test_a_kl_holds_two_more_chunks_of_logits(monkeypatch, entropy):
    N, V, rows = 96, 512, 16
    monkeypatch.setattr(logits, "BLOCK_CELLS", {"cpu": V})
    hidden, weight, chosen = inputs(N, V=V, H=4)
    other, most = reference(N, V=V, H=4), []
    for compared in (False, True):
        with Alive(rows * V) as alive, Largest() as largest:
            out = compared_logprobs(hidden, weight, chosen, other, rows=rows, entropy=entropy) if compared else \
                chosen_logprobs(hidden, weight, chosen, rows=rows, entropy=entropy)
            sum(x.sum() for x in out if x is not None).backward()
        most.append(alive.most)
        assert largest.elements == rows * V
    assert most == [2, 4], "one kept, one computed anew, and the same of the reference"


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
            Products.count += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm_.default)
            return func(*args, **(kwargs or {}))
    with Products():
        chosen_logprobs(hidden, weight, chosen, rows=8)[0].sum().backward()
    assert Products.count == 3


def test_chunks_follow_the_device_and_the_vocabulary():
    cpu = torch.device("cpu")
    assert chunk_rows(32768, cpu) == CHUNK_CELLS["cpu"] // 32768 and chunk_rows(10**9, cpu) == 1


RESIDENT = """
import gc
from pathlib import Path
import torch
from posttrain_backends._torch.logits import logprobs_of

torch.set_num_threads(1)
def status(key):
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key)).split()[1])
def entropies(z):
    return logprobs_of(z, torch.zeros(len(z), dtype=torch.long), entropy=True)[0].sum().backward()

entropies(torch.randn(64, 512, requires_grad=True) + 0)
z = torch.randn(2048, 16384)
held = [torch.empty(n) for n in range(1, 65) for _ in range(500)]  # no small block is free
gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
entropies(z.requires_grad_().view_as(z))
extra, size = status("VmHWM") - before, z.nbytes / 1024
assert extra < size / 8, f"{extra} KiB beside logits of {size}"
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads and resets the peak of a process on Linux")
def test_small_results_do_not_keep_the_memory_of_large_ones():
    """What stays of each block of rows must not lie where the next block's memory could be taken again."""
    in_a_process("-c", RESIDENT, OMP_NUM_THREADS="1")
