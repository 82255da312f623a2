"""The recurrence of Mamba-2 in the form in chunks of torch, and by the kernels of mamba-ssm and of fla for CUDA.

All give the same as `ssd.py`, which is proved with the sizes of the model before a kernel is taken. They read whole
sequences; the steps of decoding stay torch's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from posttrain.errors import ConfigError
from torch import Tensor

from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models.interface import Precision
from posttrain_backends._torch.models.ssd import Packing, ssd
from posttrain_backends.families.mamba2 import Mamba2Shape
from posttrain_backends.ssm import KERNELS

log = logging.getLogger(__name__)

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Packing], tuple[Tensor, Tensor]]
"""Inputs x [M, heads, P], steps dt [M, heads], A [heads] below 0, B and C [M, groups, N] -> y [M, heads, P] of
h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t, and the states at `packing.ends` [S, heads, P, N]."""

TOLERANCE: Mapping[Precision, float] = {"float32": 1e-4, "bf16": 5e-3}
"""What a kernel may differ from torch's form, relative to the largest number: less than the precision itself does."""


def by_torch(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """See `ssd`."""
    return ssd(x * dt[..., None], dt * A, B, C, packing)


def by_mamba_ssm(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """`mamba_chunk_scan_combined`, told which sequence each token is of. It has no gradient where it gives states."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    chunk = max(16, 1 << (packing.columns - 1).bit_length())  # the powers of two that it is made for
    given: dict[str, Any] = {"seq_idx": packing.sequence[None]}
    if len(packing.ends):
        given |= {"cu_seqlens": packing.offsets.int(), "return_varlen_states": True}
    found = mamba_chunk_scan_combined(x[None], dt[None], A, B[None], C[None], chunk, **given)
    y, states = found if len(packing.ends) else (found, x.new_zeros(0, *x.shape[1:], B.shape[-1]))
    return y[0], states.to(x.dtype)


def by_fla(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """`chunk_simple_gla`: linear attention with a decay per head, of which the queries are C, the keys B and the values
    dt x; each head has its own, so B and C are repeated for the heads of their group."""
    from fla.ops.simple_gla import chunk_simple_gla

    q, k = (z.repeat_interleave(x.shape[1] // z.shape[1], dim=1)[None] for z in (C, B))
    y, states = chunk_simple_gla(
        q=q, k=k, v=(x * dt[..., None])[None], g=(dt * A)[None], scale=1.0, cu_seqlens=packing.offsets,
        output_final_state=len(packing.ends) > 0)
    return y[0], x.new_zeros(0, *x.shape[1:], B.shape[-1]) if states is None else states.mT.to(x.dtype)


_FORMS: Mapping[str, Scan] = {"torch": by_torch, "mamba_ssm": by_mamba_ssm, "fla": by_fla}


def scan_for(kernel: Literal["auto", "torch", "mamba_ssm", "fla"], shape: Mamba2Shape, device: torch.device,
             precision: Precision) -> Scan:
    """The form that `kernel` names; `auto` is the first kernel that is installed and proved, on CUDA, and else torch's.
    Raises `ConfigError` where a kernel is named and does not compute this."""
    if kernel == "torch" or (kernel == "auto" and (device.type != "cuda" or precision not in TOLERANCE)):
        return by_torch
    if device.type != "cuda":
        raise ConfigError([f"policy.kernel: {kernel} computes on CUDA, the policy is on {device.type}"],
                          next_step="Set policy.kernel: auto, or policy.device: cuda where there is one.")
    for name in [n for n in KERNELS if find_spec(n) is not None] if kernel == "auto" else [kernel]:
        if not (wrong := misfit(name, shape, device, precision)):
            return _FORMS[name]
        if kernel == name:
            raise ConfigError([f"policy.kernel: {name} {wrong}"],
                              next_step="Set policy.kernel: auto, which takes what gives equal results.")
        log.warning("%s is installed and not used: it %s", name, wrong)
    return by_torch


def misfit(name: str, shape: Mamba2Shape, device: torch.device, precision: Precision) -> str:
    """Why the kernel `name` does not compute a model of this shape; empty where it does."""
    try:
        error = scan_error(_FORMS[name], shape, device)
    except Exception as raised:  # compilers of kernels raise what they like
        return f"fails on this model's sizes: {type(raised).__name__}: {str(raised).splitlines()[:1]}"
    if not error <= TOLERANCE[precision]:
        return f"differs from torch's form by {error:.1e} of the largest number ({precision} allows " \
               f"{TOLERANCE[precision]:.0e})"
    return ""


def scan_error(scan: Scan, shape: Mamba2Shape, device: torch.device) -> float:
    """Largest difference of outputs, last states and gradients from torch's form on packed sequences of uneven length,
    each relative to the largest of its kind."""
    lengths = np.array([5, 70, 1, 16])
    layout = Layout.from_offsets(np.concatenate([[0], lengths.cumsum()]), device)
    generator, M = torch.Generator().manual_seed(0), int(lengths.sum())

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)
    given = (normal(M, shape.num_heads, shape.head_dim), torch.nn.functional.softplus(normal(M, shape.num_heads)),
             -normal(shape.num_heads).exp(), *(normal(M, shape.n_groups, shape.state_size) for _ in range(2)))
    weight, found = normal(M, shape.num_heads, shape.head_dim), []
    for form in (scan, by_torch):
        x, dt, A, B, C = inputs = [x.clone().requires_grad_() for x in given]
        y, _ = form(x, dt, A, B, C, Packing.of(layout, shape.chunk_size, 1, final=False))
        with torch.no_grad():
            _, states = form(x, dt, A, B, C, Packing.of(layout, shape.chunk_size, 1, final=True))
        found.append([y.detach(), states, *torch.autograd.grad((y * weight).sum(), inputs)])
    errors = [(ours - exact).abs().max() / exact.abs().max() for ours, exact in zip(*found, strict=True)]
    return float(torch.stack(errors).max())  # torch's maximum: what is no number stays one
