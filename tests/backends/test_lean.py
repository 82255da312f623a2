"""Norm and SwiGLU: values and gradients against autograd's own, in every precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from posttrain_backends._torch.models.lean import Norm, swiglu

torch.set_num_threads(1)


def drawn(*sizes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def plain_swiglu(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return F.linear(F.silu(gate) * up, down)


def norm(eps: float, weight: torch.Tensor) -> Norm:
    module = Norm(len(weight), eps)
    module.weight = torch.nn.Parameter(weight.detach().clone())
    return module


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 9), inner=st.integers(1, 7), outer=st.integers(1, 7), seed=st.integers(0, 99))
def test_swiglu_equals_autograd(rows, inner, outer, seed):
    inputs = drawn((rows, inner), (rows, inner), (outer, inner), seed=seed)
    out, expected = swiglu(*inputs), plain_swiglu(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    by_output = torch.cos(out.detach())
    for found, wanted in zip(torch.autograd.grad(out, inputs, by_output),
                             torch.autograd.grad(expected, inputs, by_output), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 9), width=st.integers(1, 7), scale=st.sampled_from([0.0, 1e-4, 1.0, 1e4]),
       seed=st.integers(0, 99))
def test_norm_equals_autograd_also_where_eps_rules(rows, width, scale, seed):
    x, weight = drawn((rows, width), (width,), seed=seed)
    x = (x * scale).detach().requires_grad_()
    module = norm(1e-6, weight)
    out, expected = module(x), F.rms_norm(x, (width,), module.weight, 1e-6)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    by_output = torch.cos(out.detach())
    for found, wanted in zip(torch.autograd.grad(out, (x, module.weight), by_output),
                             torch.autograd.grad(expected, (x, module.weight), by_output), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10 * max(1.0, wanted.abs().max().item()))


def test_numerical_derivatives():
    gate, up, down = drawn((3, 4), (3, 4), (2, 4))
    assert torch.autograd.gradcheck(swiglu, (gate, up, down))
    x, weight = drawn((3, 4), (4,))
    module = norm(1e-3, weight)
    assert torch.autograd.gradcheck(module, (x,))


@pytest.mark.parametrize("grad", [True, False])
def test_values_do_not_depend_on_whether_a_gradient_is_kept(grad):
    gate, up, down, x, weight = drawn((5, 4), (5, 4), (3, 4), (5, 4), (4,), dtype=torch.float32)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(swiglu(gate, up, down), plain_swiglu(gate, up, down), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(norm(1e-6, weight)(x), F.rms_norm(x, (4,), weight, 1e-6), rtol=1e-6, atol=1e-6)


def test_under_autocast_gradients_have_the_type_of_their_inputs_and_stay_near_float32():
    gate, up, down = drawn((64, 32), (64, 32), (16, 32), dtype=torch.float32)
    exact = torch.autograd.grad(plain_swiglu(gate, up, down).square().sum(), (gate, up, down))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = (gate.bfloat16(), up.bfloat16())
        out = swiglu(*half, down)
    assert out.dtype == torch.bfloat16
    found = torch.autograd.grad(out.float().square().sum(), (gate, up, down))
    for g, e in zip(found, exact, strict=True):
        assert g.dtype == torch.float32
        assert (g - e).norm() < 0.02 * e.norm()


def test_frozen_parameters_cost_no_gradient():
    gate, up, down = drawn((3, 4), (3, 4), (2, 4))
    assert torch.autograd.grad(swiglu(gate, up, down.detach()).sum(), (gate, up))
    x, weight = drawn((3, 4), (4,))
    module = norm(1e-6, weight).requires_grad_(False)
    module(x).sum().backward()
    assert module.weight.grad is None and x.grad is not None


def test_only_the_two_inputs_of_the_width_are_kept():
    kept: list[int] = []
    gate, up, down = drawn((5, 7), (5, 7), (3, 7))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        swiglu(gate, up, down)
    assert kept == [gate.data_ptr(), up.data_ptr(), down.data_ptr()]


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 9), width=st.integers(1, 7), outer=st.lists(st.integers(1, 5), min_size=1, max_size=3),
       seed=st.integers(0, 99))
def test_normed_linears_equal_autograd(rows, width, outer, seed):
    x, weight, *matrices = drawn((rows, width), (width,), *((n, width) for n in outer), seed=seed)
    module = norm(1e-6, weight)
    inputs = (x, module.weight, *matrices)
    found = module.linears(x, *matrices)
    plain = F.rms_norm(x, (width,), module.weight, 1e-6)
    wanted = [F.linear(plain, matrix) for matrix in matrices]
    by_outputs = [torch.cos(y.detach()) for y in wanted]
    for y, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for g, expected in zip(torch.autograd.grad(found, inputs, by_outputs),
                           torch.autograd.grad(wanted, inputs, by_outputs), strict=True):
        torch.testing.assert_close(g, expected, rtol=1e-8, atol=1e-10 * max(1.0, expected.abs().max().item()))


def test_normed_linears_keep_their_input_and_not_the_normed_one():
    kept: list[int] = []
    x, weight, a, b = drawn((5, 7), (7,), (3, 7), (2, 7))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        norm(1e-6, weight).linears(x, a, b)
    assert kept == [35, 7, 5, 21, 14]


def test_normed_linears_under_autocast_stay_near_float32():
    x, weight, a, b = drawn((64, 32), (32,), (16, 32), (8, 32), dtype=torch.float32)
    module = norm(1e-6, weight)
    inputs = (x, module.weight, a, b)
    exact = torch.autograd.grad(sum(y.square().sum() for y in module.linears(x, a, b)), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = module.linears(x, a, b)
    assert {y.dtype for y in half} == {torch.bfloat16}
    for g, e in zip(torch.autograd.grad(sum(y.float().square().sum() for y in half), inputs), exact, strict=True):
        assert g.dtype == torch.float32
        assert (g - e).norm() < 0.02 * e.norm()


def test_normed_linears_take_frozen_parameters_and_give_numerical_derivatives():
    x, weight, a, b = drawn((3, 4), (4,), (2, 4), (3, 4))
    module = norm(1e-3, weight)
    assert torch.autograd.gradcheck(module.linears, (x, a, b))
    module.requires_grad_(False)
    sum(y.sum() for y in module.linears(x, a.detach(), b)).backward()
    assert module.weight.grad is None and a.grad is None and x.grad is not None and b.grad is not None
