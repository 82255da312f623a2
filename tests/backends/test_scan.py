"""Kernels of the recurrence by other packages: what they are given, when they are taken, and when refused."""

from __future__ import annotations

import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch
from posttrain.errors import ConfigError
from posttrain.protocols import LoadRequest
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models import scan
from posttrain_backends._torch.models.mamba2 import Mamba2
from posttrain_backends._torch.models.scan import by_fla, by_mamba_ssm, by_torch, scan_error, scan_for
from posttrain_backends.families.mamba2 import Mamba2Shape
from posttrain_backends.ssm import SSM

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = Mamba2Shape(vocab_size=13, hidden_size=16, num_hidden_layers=2, num_heads=8, head_dim=4, state_size=6,
                    n_groups=2, chunk_size=5)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FORMS = {"mamba_ssm": by_mamba_ssm, "fla": by_fla}


# ---- the packages' functions, by their signatures, a step at a time


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
                              seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, float("inf")),
                              return_final_states=False, return_varlen_states=False):
    """As of mamba-ssm 2.2 and 2.3: [1, M, ...], and the states at the ends of `cu_seqlens` without a gradient."""
    assert chunk_size & (chunk_size - 1) == 0 and chunk_size >= 16
    assert seq_idx.dtype == torch.int32 and seq_idx.shape == x.shape[:2] and len(x) == 1 and A.shape == x.shape[2:3]
    assert not return_varlen_states or (cu_seqlens.dtype == torch.int32 and not torch.is_grad_enabled())
    R, state, ys, states = x.shape[2] // B.shape[2], None, [], []
    for t in range(x.shape[1]):
        if t == 0 or seq_idx[0, t] != seq_idx[0, t - 1]:
            state = x.new_zeros(*x.shape[2:], B.shape[-1])
        b, c = (v[0, t].repeat_interleave(R, 0) for v in (B, C))
        added = dt[0, t, :, None, None] * x[0, t, :, :, None] * b[:, None]
        state = (dt[0, t] * A).exp()[:, None, None] * state + added
        ys.append((state * c[:, None]).sum(-1))
        if cu_seqlens is not None and t + 1 in cu_seqlens.tolist():
            states.append(state)
    y = torch.stack(ys)[None]
    return (y, torch.stack(states)) if return_varlen_states else y


def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False,
                     cu_seqlens=None, **other):
    """As of fla 0.3 to 0.6: [1, M, heads, ...], states [n, heads, K, V]."""
    assert not other and q.shape == k.shape and q.shape[:3] == v.shape[:3] == g.shape and len(q) == 1
    assert cu_seqlens.dtype == torch.int64 and cu_seqlens[0] == 0 and (cu_seqlens.diff() > 0).all()
    ys, states = [], []
    for a, b in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
        state = q.new_zeros(q.shape[2], q.shape[3], v.shape[3])
        for t in range(a, b):
            state = g[0, t].exp()[:, None, None] * state + k[0, t, :, :, None] * v[0, t, :, None]
            ys.append((scale * q[0, t, :, :, None] * state).sum(1))
        states.append(state)
    return torch.stack(ys)[None], torch.stack(states) if output_final_state else None


@pytest.fixture
def installed(monkeypatch):
    """Put modules of these names, with these functions, where imports find them."""
    def install(path: str, **names) -> None:
        parts = path.split(".")
        for i in range(len(parts)):
            name = ".".join(parts[:i + 1])
            if name not in sys.modules:
                module = ModuleType(name)
                module.__spec__, module.__path__ = ModuleSpec(name, None), []
                monkeypatch.setitem(sys.modules, name, module)
        for name, value in names.items():
            monkeypatch.setattr(sys.modules[path], name, value, raising=False)
    return install


@pytest.fixture
def both(installed):
    installed("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    installed("fla.ops.simple_gla", chunk_simple_gla=chunk_simple_gla)


# ---- what they are given


@pytest.mark.parametrize("kernel", FORMS)
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_kernel_gives_outputs_states_and_gradients_of_the_recurrence(kernel, groups, both):
    shape = Mamba2Shape(13, 16, 1, num_heads=8, head_dim=4, state_size=6, n_groups=groups, chunk_size=5)
    assert scan_error(FORMS[kernel], shape, CPU) < 1e-5


@pytest.mark.parametrize("kernel", FORMS)
def test_a_model_with_a_kernel_equals_one_without(kernel, both):
    ours, theirs = Mamba2(SHAPE), Mamba2(SHAPE, scan=FORMS[kernel])
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 13, 20))
    layout = Layout.from_offsets([0, 7, 7, 8, 20])
    for model in (ours, theirs):
        model.hidden(tokens, layout).sin().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        (x, one), (y, other) = (model.read(tokens, Layout.from_offsets([0, 7, 20])) for model in (ours, theirs))
    torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    for a, b in zip(one.tensors, other.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# ---- which is taken


def on_cuda(kernel, monkeypatch, precision="float32"):
    """What is chosen for a CUDA device, proved on the CPU."""
    monkeypatch.setattr(scan, "scan_error", lambda form, shape, device: scan_error(form, shape, CPU))
    return scan_for(kernel, SHAPE, CUDA, precision)


def test_auto_takes_the_first_that_is_installed_and_torch_elsewhere(installed, monkeypatch):
    assert on_cuda("auto", monkeypatch) is by_torch
    installed("fla.ops.simple_gla", chunk_simple_gla=chunk_simple_gla)
    assert on_cuda("auto", monkeypatch) is by_fla
    installed("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    assert on_cuda("auto", monkeypatch) is by_mamba_ssm
    assert on_cuda("fla", monkeypatch) is by_fla and on_cuda("torch", monkeypatch) is by_torch
    assert on_cuda("auto", monkeypatch, "float64") is scan_for("auto", SHAPE, CPU, "float32") is by_torch


def a_little_off(*given, **named):
    y, states = chunk_simple_gla(*given, **named)
    return 1.001 * y, states


def one_sequence(*given, cu_seqlens, **named):
    """A kernel that does not know where sequences begin."""
    return chunk_simple_gla(*given, cu_seqlens=cu_seqlens[[0, -1]], **named)


def no_number(*given, **named):
    y, states = chunk_simple_gla(*given, **named)
    return y * float("nan"), states


def no_gradient(*given, **named):
    y, states = chunk_simple_gla(*given, **named)
    if y.requires_grad:
        y.register_hook(lambda d: d * float("nan"))
    return y, states


def out_of_resources(*given, **named):
    raise RuntimeError("out of resource: shared memory")


@pytest.mark.parametrize("kernel, says", [
    (a_little_off, r"differs from torch's form by 1\.0e-03 of the largest number \(float32 allows 1e-04\)"),
    (no_number, "differs from torch's form by nan"), (no_gradient, "differs from torch's form by nan"),
    (one_sequence, "differs from torch's form by .*of the largest"),
    (out_of_resources, "RuntimeError: .*out of resource")])
def test_a_kernel_that_gives_something_else_is_refused_by_name_and_passed_over_otherwise(
        kernel, says, installed, monkeypatch, caplog):
    installed("fla.ops.simple_gla", chunk_simple_gla=kernel)
    with pytest.raises(ConfigError, match=f"policy.kernel: fla .*{says}"):
        on_cuda("fla", monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert on_cuda("auto", monkeypatch) is by_torch
    assert "fla is installed and not used" in caplog.text


def test_what_bf16_allows_is_its_own_rounding(installed, monkeypatch):
    installed("fla.ops.simple_gla", chunk_simple_gla=a_little_off)
    assert on_cuda("fla", monkeypatch, "bf16") is by_fla


@pytest.mark.parametrize("fields, says", [
    ({"kernel": "mamba_ssm"}, "needs the module mamba_ssm, which is not installed: pip install mamba-ssm"),
    ({"kernel": "fla"}, "needs the module fla, which is not installed: pip install flash-linear-attention"),
    ({"kernel": "fla", "device": "cpu"}, "kernel fla computes on CUDA, device is cpu"),
    ({"kernel": "fla", "precision": "float64"}, "kernel fla computes in float32, precision is float64")], ids=str)
def test_a_kernel_that_cannot_be_is_refused_in_the_configuration(fields, says, monkeypatch):
    monkeypatch.setattr("posttrain_backends.ssm.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=says):
        SSM(**fields)


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto finds CUDA here")
def test_a_named_kernel_without_cuda_is_refused_at_load(both):
    with pytest.raises(ConfigError, match="policy.kernel: fla computes on CUDA, the policy is on cpu"):
        SSM(kernel="fla").load(LoadRequest(vocab_size=13))
    assert SSM(kernel="auto").load(LoadRequest(vocab_size=13)).model.scan is by_torch


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")  # the library's own, as it finds no GPU
def test_what_fla_is_given_is_the_recurrence_in_its_own_plain_form(monkeypatch):
    """Its reference in plain torch in the kernel's place, a sequence at a time."""
    fla = pytest.importorskip("fla.ops.simple_gla")
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    def plain(q, k, v, g, scale, cu_seqlens, output_final_state):
        lengths = cu_seqlens.diff().tolist()
        found = [naive_recurrent_simple_gla(*part, scale=scale, output_final_state=True)
                 for part in zip(*(x.split(lengths, dim=1) for x in (q, k, v, g)), strict=True)]
        ys, states = zip(*found, strict=True)
        return torch.cat(ys, dim=1), torch.cat(states) if output_final_state else None
    monkeypatch.setattr(fla, "chunk_simple_gla", plain)
    assert scan_error(by_fla, SHAPE, CPU) < 1e-5


@pytest.mark.parametrize("kernel", FORMS)
def test_the_installed_kernel_on_a_gpu(kernel):
    """The packages themselves, with a size of a real model."""
    pytest.importorskip(kernel)
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: not measured")
    shape = Mamba2Shape(1000, 512, 1, num_heads=16, head_dim=64, state_size=128, n_groups=1, chunk_size=64)
    assert scan_error(FORMS[kernel], shape, CUDA) < scan.TOLERANCE["bf16"]
