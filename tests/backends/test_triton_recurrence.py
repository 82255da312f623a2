"""The Triton kernel of the recurrence: interpreted, compiled for two GPUs, and run on one where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_process import in_a_process
from posttrain.errors import PluginError
from posttrain_backends.kernels import availability
from posttrain_backends.kernels.recurrence import TritonRecurrence

OFFSETS = np.array([0, 2, 3])


@pytest.mark.needs("torch", "triton")
def test_interpreted_it_keeps_its_contract_and_equals_a_loop() -> None:
    file = Path(__file__).with_name("interpreted_recurrence.py")
    in_a_process("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(file), TRITON_INTERPRET="1")


COMPILE = """
import sys
import triton
from posttrain_backends.kernels import _triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

number, arch = sys.argv[1:]
types = {"N": "i32", "blocks": "i32", "BLOCK": "constexpr", "is_last": "*i8", "open_": "*i32"}
for kernel in (_triton._scan_blocks, _triton._scan_carries, _triton._add_carries):
    signature = {argument: types.get(argument, "*" + number) for argument in kernel.arg_names}
    source = ASTSource(kernel, signature, {"BLOCK": 4096})
    compiled = triton.compile(source, target=GPUTarget("cuda", int(arch), 32), options={"num_warps": 8})
    assert compiled.asm["cubin"] and compiled.metadata.shared < 48 * 1024
"""


@pytest.mark.needs("torch", "triton")
@pytest.mark.parametrize(("number", "arch"), [("fp32", "80"), ("fp64", "90")])
def test_it_compiles_for_gpus_without_one(number: str, arch: str, tmp_path: Path) -> None:
    """The interpreter accepts what Triton's compiler does not."""
    in_a_process("-c", COMPILE, number, arch, TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.needs("torch", "triton")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("lengths", ["one episode", "ragged", "one action each"])
def test_on_a_gpu_it_equals_the_host(dtype: str, lengths: str) -> None:
    import torch
    from posttrain.ops import reverse_recurrence, use_kernels

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: not measured")
    rng, N = np.random.default_rng(0), 5_000_003
    cuts = {"one episode": np.array([], int), "ragged": rng.integers(1, N, 3000), "one action each": np.arange(1, N)}
    offsets = np.unique(np.concatenate([[0], cuts[lengths], [N]]))
    decay, x = (torch.from_numpy(column.astype(dtype)) for column in (rng.uniform(0.9, 1.0, N), rng.normal(size=N)))
    expected = reverse_recurrence(decay.double(), x.double(), offsets)
    kernel = TritonRecurrence()
    assert kernel.supports(decay.cuda(), x.cuda(), offsets)
    for form in (kernel, reverse_recurrence):
        with use_kernels([kernel]):
            got = form(decay.cuda(), x.cuda(), offsets)
        assert got.is_cuda and got.dtype == x.dtype
        tolerance = {"float32": 1e-5, "float64": 1e-12}[dtype]
        assert float((got.cpu().double() - expected).abs().max()) <= tolerance * float(expected.abs().max())
    again = kernel(decay.cuda(), x.cuda(), offsets)
    assert torch.equal(again, kernel(decay.cuda(), x.cuda(), offsets)), "two calls differ"


@pytest.mark.needs("torch", "triton")
def test_it_supports_what_it_computes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose columns they are, how long, and where: asked without a kernel being started."""
    import torch

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernel = TritonRecurrence(device="cpu")

    def supported(decay: Any, x: Any, kernel: TritonRecurrence = kernel) -> bool:
        return kernel.supports(decay, x, OFFSETS)

    x = torch.zeros(3)
    assert supported(x, x) and supported(x.double(), x.double()) and supported(torch.zeros(6)[::2], x)
    assert not supported(x, x, TritonRecurrence()), "a column on the host, the kernel for a card"
    assert not supported(x.double(), x) and not supported(x.half(), x.half()) and not supported(x.int(), x.int())
    assert not supported(x[:2], x) and not supported(x[None], x[None]) and not supported(x.numpy(), x.numpy())
    long = torch.zeros(1).expand(2**31)
    assert not supported(long, long) and supported(long[:2**31 - 5000], long[:2**31 - 5000])
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not supported(x, x), "a column on the host that no interpreter would compute"


def test_without_triton_it_is_never_used_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "is_installed", lambda: False)
    x = np.zeros(3, np.float32)
    assert not TritonRecurrence().supports(x, x, OFFSETS)
    with pytest.raises(PluginError, match=r"pip install 'posttrain-backends\[triton\]'"):
        TritonRecurrence()(x, x, OFFSETS)


@pytest.mark.parametrize("wrong", [{"block": 0}, {"block": 100}, {"warps": 3}, {"warps": 64}])
def test_blocks_and_warps_are_powers_of_2(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="powers of 2"):
        TritonRecurrence(**wrong)
