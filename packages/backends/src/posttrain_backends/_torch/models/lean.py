"""Root-mean-square norm and SwiGLU with backward passes of their own, for less time and memory on a CPU.

Autograd keeps four arrays of the MLP's width where two are enough, and differentiates the norm by a chain of small
operations. Knows tensors only; gradients are first-order, and equal autograd's in the tests.
"""

from __future__ import annotations

from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def swiglu(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(silu(gate) * up) @ down.T (2002.05202, eq. 6): gate and up [M, I], down [H, I] -> [M, H]."""
    if torch.is_grad_enabled():
        return cast(Tensor, _SwiGLU.apply(gate, up, down))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return F.linear(F.silu(gate).mul_(up), down)


@final
class Norm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis of [M, H] (1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.device.type == "cpu":  # elsewhere one kernel does it
            return cast(Tensor, _RMSNorm.apply(x, self.weight, self.eps))  # type: ignore[no-untyped-call]  # as above
        return super().forward(x)

    def linears(self, x: Tensor, *matrices: Tensor) -> tuple[Tensor, ...]:
        """The normed x [M, H] times each of the matrices [O, H], transposed."""
        if torch.is_grad_enabled() and x.device.type == "cpu":
            made = _NormedLinears.apply(x, self.weight, self.eps, *matrices)  # type: ignore[no-untyped-call]  # as above
            return cast(tuple[Tensor, ...], made)
        normed = self(x)
        return tuple(F.linear(normed, matrix) for matrix in matrices)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) and the product are computed anew. Under autocast each gradient has the type of what it is of."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, down)
        return F.linear(F.silu(gate).mul_(up), down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_output: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, down = ctx.saved_tensors
        opened = F.silu(gate)
        by_down = (by_output.t() @ (opened * up)).to(down.dtype) if ctx.needs_input_grad[2] else None
        by_product = by_output @ down.to(by_output.dtype)
        by_up = opened.mul_(by_product)
        return torch.ops.aten.silu_backward(by_product.mul_(up), gate), by_up, by_down


class _RMSNorm(torch.autograd.Function):
    """With r = (mean(x^2) + eps)^(-1/2): y = x r * weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, r)
        y: Tensor = (x * r).mul_(weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_output: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        return *_norm_gradients(by_output * weight, by_output, x * r, r, ctx.needs_input_grad[1]), None


class _NormedLinears(torch.autograd.Function):
    """Keeps x and r; the normed x is computed anew, which is cheaper than reading it back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, *matrices: Tensor) -> tuple[Tensor, ...]:
        r = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, r, *matrices)
        normed = (x * r).mul_(weight)
        return tuple(F.linear(normed, matrix) for matrix in matrices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *by_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r, *matrices = ctx.saved_tensors
        n = x * r
        normed = (n * weight).to(by_outputs[0].dtype)
        by_matrices = [(by_output.t() @ normed).to(matrix.dtype) if needed else None
                       for by_output, matrix, needed in zip(by_outputs, matrices, ctx.needs_input_grad[3:])]
        by_normed = torch.mm(by_outputs[0], matrices[0].to(by_outputs[0].dtype), out=normed)
        for by_output, matrix in zip(by_outputs[1:], matrices[1:]):
            by_normed.addmm_(by_output, matrix.to(by_output.dtype))
        by_normed = by_normed.to(x.dtype)
        return *_norm_gradients(by_normed * weight, by_normed, n, r, ctx.needs_input_grad[1]), None, *by_matrices


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """[M, H] -> [M, 1]."""
    mean_square: Tensor = torch.linalg.vecdot(x, x).div_(x.shape[-1])
    return mean_square.add_(eps).rsqrt_()[:, None]


def _norm_gradients(g: Tensor, by_output: Tensor, n: Tensor, r: Tensor, weight: bool) -> tuple[Tensor, Tensor | None]:
    """With n = x r and g = dy * weight: dx = r (g - n mean(g n)), made in the place of g; dweight = sum(dy n)."""
    by_weight = torch.linalg.vecdot(by_output, n, dim=0) if weight else None
    mean = torch.linalg.vecdot(g, n)[:, None].div_(n.shape[-1])
    return g.addcmul_(n, mean, value=-1).mul_(r), by_weight
