"""The Triton kernels of the output head: interpreted, compiled for two GPUs, run on one where there is one, and chosen
where they fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from own_process import in_a_process
from posttrain.errors import ConfigError, PluginError
from posttrain_backends.kernels import availability
from posttrain_backends.kernels.head import TritonHead


@pytest.mark.needs("torch", "triton")
def test_interpreted_it_keeps_its_contract_and_equals_the_literal_form() -> None:
    file = Path(__file__).with_name("interpreted_head.py")
    in_a_process("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(file), TRITON_INTERPRET="1")


COMPILE = """
import sys
import triton
from posttrain_backends.kernels import _triton_head
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

number, arch = sys.argv[1:]
exact = "fp64" if number == "fp64" else "fp32"
types = {"logits": "*" + number, "chosen": "*i64", "kept": "*i64", "stride": "i64", "V": "i32", "tiles": "i32",
         "ENTROPY": "constexpr", "MOVED": "constexpr", "BLOCK": "constexpr"}
for kernel, others in ((_triton_head._read_rows, ()), (_triton_head._write_gradient, (True, False))):
    for entropy in (True, False):
        for moved in others or (None,):
            signature = {argument: types.get(argument, "*" + exact) for argument in kernel.arg_names}
            constants = {"ENTROPY": entropy, "BLOCK": 4096, **({} if moved is None else {"MOVED": moved})}
            source = ASTSource(kernel, signature, constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", int(arch), 32), options={"num_warps": 8})
            assert compiled.asm["cubin"] and compiled.metadata.shared < 48 * 1024
            assert "atom" not in compiled.asm["ptx"] and ".local" not in compiled.asm["ptx"]
"""


@pytest.mark.needs("torch", "triton")
@pytest.mark.parametrize(("number", "arch"), [("bf16", "90"), ("fp32", "80"), ("fp64", "90"), ("fp16", "80")])
def test_it_compiles_for_gpus_without_one(number: str, arch: str, tmp_path: Path) -> None:
    """The interpreter accepts what Triton's compiler does not. No sum depends on an order: there is no atomic."""
    in_a_process("-c", COMPILE, number, arch, TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.needs("torch", "triton")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("V", [151936, 50257, 1])
def test_on_a_gpu_it_equals_float64(dtype: str, V: int) -> None:
    import torch
    from posttrain_backends._torch.logits import PLAIN, Slopes, gathered

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: not measured")
    generator = torch.Generator("cuda").manual_seed(0)
    logits = (5.0 * torch.randn(67, V, generator=generator, device="cuda")).to(getattr(torch, dtype))
    chosen = torch.randint(V, (67,), generator=generator, device="cuda")
    exact = torch.promote_types(logits.dtype, torch.float32)
    by = Slopes(*(torch.randn(67, generator=generator, device="cuda", dtype=exact) for _ in range(2)))
    kernel, tolerance = TritonHead(), {"bfloat16": 3e-5, "float32": 3e-5, "float64": 1e-11}[dtype]
    assert kernel.supports(logits, chosen, 0.7)
    reading = kernel.read(logits, chosen, 0.7, entropy=True)
    expected = PLAIN.read(logits.double(), chosen, 0.7, entropy=True)
    for ours, literal in zip(reading[:3], expected[:3], strict=True):
        torch.testing.assert_close(ours.double(), literal, rtol=0, atol=tolerance * 30)
    assert float(reading.logprobs.max()) <= 0
    kept = gathered(torch.arange(67, device="cuda") % 3 > 0)
    for rows in (None, kept):
        slopes = Slopes(*(slope.double() for slope in by[:2] if slope is not None))
        gradient = PLAIN.write_gradient(logits.double(), chosen, expected, slopes, 0.7, kept=rows)
        got = kernel.write_gradient(logits.clone(), chosen, reading, by, 0.7, kept=rows)
        assert torch.equal(got, kernel.write_gradient(logits.clone(), chosen, reading, by, 0.7, kept=rows))
        rounding = 2.0**-8 if dtype == "bfloat16" else tolerance
        torch.testing.assert_close(got.double(), gradient, rtol=rounding, atol=tolerance)


@pytest.mark.needs("torch", "triton")
@pytest.mark.parametrize("total", ["bfloat16", "float32"])
def test_on_a_gpu_one_pass_over_an_output_matrix_equals_float64(total: str) -> None:
    """Up to the rounding of logits and their gradient to bf16; with the matrix and its gradient in either type."""
    import torch
    from posttrain_backends._torch.head import walk
    from posttrain_backends._torch.logits import PLAIN, Form, Reading, Slopes

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: not measured")
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(300, 128, generator=generator, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(5003, 128, generator=generator, device="cuda").mul(128**-0.5).bfloat16()
    weight = weight.to(getattr(torch, total))
    chosen = torch.randint(5003, (300,), generator=generator, device="cuda")
    d_logprobs = torch.randn(300, generator=generator, device="cuda") * (torch.arange(300, device="cuda") % 4 > 0)

    def slopes(part: slice, reading: Reading) -> Slopes:
        return Slopes(d_logprobs[part], 0.1 * d_logprobs[part])

    def gradients(hidden: Any, weight: Any, form: Form, compute: Any) -> tuple[Any, Any]:
        d_weight = torch.zeros_like(weight)
        _, d_hidden = walk(hidden, weight, chosen, slopes, d_weight=d_weight, rows=128, entropy=True, compute=compute,
                           form=form)
        return d_hidden, d_weight

    ours = gradients(hidden, weight, TritonHead(), torch.bfloat16)
    exact = gradients(hidden.detach().double().requires_grad_(), weight.double(), PLAIN, torch.float64)
    for got, expected in zip(ours, exact, strict=True):
        assert float((got.double() - expected).norm()) <= 0.02 * float(expected.norm())


@pytest.mark.needs("torch", "triton")
def test_on_a_gpu_rows_beyond_32_bits_are_found() -> None:
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 2**34:
        pytest.skip("no CUDA device of 16 GiB: not measured")
    V = 2**17
    logits = torch.zeros(2**14 + 3, V, dtype=torch.bfloat16, device="cuda")
    logits[-1, -1] = 5.0
    chosen = torch.full((len(logits),), V - 1, device="cuda")
    reading = TritonHead().read(logits, chosen, entropy=True)
    expected = torch.log_softmax(logits[-1].double(), -1)
    assert float(reading.logprobs[-1]) == pytest.approx(float(expected[-1]), abs=1e-4)


@pytest.mark.needs("torch", "triton")
def test_it_supports_what_it_computes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernel, z, c = TritonHead(device="cpu"), torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)

    def supported(logits: Any, chosen: Any, kernel: TritonHead = kernel) -> bool:
        return kernel.supports(logits, chosen, 1.0)

    assert all(supported(z.to(dtype), c) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64))
    assert supported(torch.zeros(6, 5)[::2], c) and supported(z[:0], c[:0])
    assert not supported(z, c, TritonHead()), "logits on the host, the kernel for a card"
    assert not supported(z.long(), c) and not supported(z, c.int()) and not supported(z, c.double())
    assert not supported(z[0], c[0]) and not supported(z, c[:2]) and not supported(z.numpy(), c.numpy())
    assert not supported(torch.zeros(5, 3).t(), c), "columns in a row"
    assert not supported(torch.zeros(3, 1).expand(3, 2**31), c) and not supported(torch.zeros(3, 0), c)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not supported(z, c), "logits on the host that no interpreter would compute"


def output_matrix(device: str) -> Any:
    """[19, 6], of a card also where there is none: it holds no numbers then."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    if device == "cpu":
        return torch.zeros(19, 6)
    with FakeTensorMode():
        return torch.empty(19, 6, device=device)


@pytest.mark.needs("torch", "triton")
@pytest.mark.parametrize(("device", "wanted", "found"), [
    ("cuda", "auto", "triton_head"), ("cuda", "triton_head", "triton_head"), ("cuda", "torch", "torch"),
    ("cpu", "auto", "torch"), ("cpu", "torch", "torch")])
@pytest.mark.parametrize("compute", ["bfloat16", "float32", "float64"])
def test_a_learner_takes_it_on_cuda_alone(device: str, wanted: Any, found: str, compute: str) -> None:
    import torch
    from posttrain_backends._torch.forms import form_on
    from posttrain_backends._torch.logits import PLAIN

    form = form_on(output_matrix(device), getattr(torch, compute), wanted)
    assert form == {"triton_head": TritonHead(), "torch": PLAIN}[found]


@pytest.mark.needs("torch", "triton")
def test_by_name_it_is_refused_where_it_does_not_fit() -> None:
    import torch
    from posttrain_backends._torch.forms import form_on

    with pytest.raises(ConfigError, match=r"head_kernel 'triton_head' is for CUDA.* on cpu with logits in bfloat16"):
        form_on(output_matrix("cpu"), torch.bfloat16, "triton_head")


@pytest.mark.needs("torch")
def test_without_triton_torch_computes_and_the_name_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from posttrain_backends._torch.forms import form_on
    from posttrain_backends._torch.logits import PLAIN

    monkeypatch.setattr(availability, "is_installed", lambda: False)
    logits, chosen = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    assert not TritonHead().supports(logits, chosen, 1.0)
    assert form_on(output_matrix("cuda"), torch.float32, "auto") is PLAIN
    for use in (lambda: TritonHead()(logits, chosen, 1.0),
                lambda: form_on(output_matrix("cuda"), torch.float32, "triton_head")):
        with pytest.raises(PluginError, match=r"'triton_head' needs Triton.*pip install 'posttrain-backends\[tri"):
            use()


@pytest.mark.parametrize("wrong", [{"block": 0}, {"block": 100}, {"warps": 3}, {"warps": 64}])
def test_blocks_and_warps_are_powers_of_2(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="powers of 2"):
        TritonHead(**wrong)
