"""What output matrices say of hidden states, without ever holding all logits: log-probs and entropies of chosen tokens,
the KL to another model over the whole vocabulary, action values of chosen tokens, and action values averaged under the
policy.

Rows go through the output matrix in chunks, and the gradient of a chunk's logits takes their place. `walk` forms it
while they exist, so a step costs what logits in memory would, 6NHV operations; it needs a loss that is a sum over rows.
`chosen_logprobs` and `compared_logprobs` are differentiated by autograd, whatever the loss: the backward pass computes
each chunk's logits anew, 8NHV, and the last chunk is kept. A model to compare with adds the product of its own logits,
once or twice, and one array of one chunk. Rows whose gradient is zero take part in no product of the gradient.
How a chunk's logits are read and their gradient written is a `Form`: torch's operations, or a kernel. Knows no model
and no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain_backends._torch.logits import PLAIN, Form, Reading, Slopes, gathered

CHUNK_CELLS: Mapping[str, int] = {"cpu": 2**23, "cuda": 2**28}
"""Logits of one chunk by device type: every chunk reads the output matrix and its gradient once more, so fewer rows
cost time, and more of them memory. On CUDA 512 MiB in bf16, 1766 rows of V = 151936: by arithmetic a gradient in
float32 is then moved (8HV bytes) in 14 % of the time that a chunk's products take (6 rows H V operations, at 4.3 TB/s
and 790 TFLOP/s), if nothing overlaps."""


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of one chunk where the user leaves them open."""
    return max(1, CHUNK_CELLS.get(device.type, 2**23) // vocab_size)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Readout:
    """What a model's logits are made of: hidden @ weight.T, multiplied in `compute`. Carries no gradient."""

    hidden: Tensor
    """[N, H]; H is the model's own."""
    weight: Tensor
    """[V, H]"""
    compute: torch.dtype


def chosen_logprobs(hidden: Tensor, weight: Tensor, chosen: Tensor, *, temperature: float = 1.0, rows: int = 0,
                    entropy: bool = False, compute: torch.dtype | None = None,
                    form: Form = PLAIN) -> tuple[Tensor, Tensor | None]:
    """log p(chosen) and, where asked, the entropy of p = softmax(hidden @ weight.T / temperature).

    hidden [N, H], weight [V, H], chosen [N] -> logprobs [N] (at most 0) and entropy [N], in float32, or float64 where
    `weight` is. Both are differentiable in `hidden` and `weight`; gradients of `weight` add up over chunks in its own
    type. Matrices are multiplied in `compute` (default: the type of `weight`).
    """
    rows = rows or chunk_rows(len(weight), weight.device)
    logprobs, entropies, _ = _ChosenLogProbs.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        hidden, weight, chosen, float(temperature), rows, entropy, compute or weight.dtype, form, None, None, None)
    return logprobs, entropies


def compared_logprobs(hidden: Tensor, weight: Tensor, chosen: Tensor, reference: Readout, *, temperature: float = 1.0,
                      rows: int = 0, entropy: bool = False, compute: torch.dtype | None = None,
                      form: Form = PLAIN) -> tuple[Tensor, Tensor | None, Tensor]:
    """What `chosen_logprobs` gives, and KL(p || q) = sum_a p_a (log p_a - log q_a) of each row over the whole
    vocabulary, q = softmax(reference.hidden @ reference.weight.T / temperature).

    The KL [N] is differentiable in `hidden` and `weight` as the others are, and in nothing of the reference. Beside
    what the others need, the reference's logits of one chunk are kept, and those of one more exist for a time.
    """
    rows = rows or chunk_rows(len(weight), weight.device)
    logprobs, entropies, kl = _ChosenLogProbs.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        hidden, weight, chosen, float(temperature), rows, entropy, compute or weight.dtype, form,
        reference.hidden, reference.weight, reference.compute)
    return logprobs, entropies, kl


def chosen_action_values(hidden: Tensor, q_weight: Tensor, q_bias: Tensor, chosen: Tensor) -> Tensor:
    """Q_j(s, c) = q_weight[j, c] . h(s) + q_bias[j, c] of each state and its chosen token c, for the k heads j.

    hidden [N, H], q_weight [k, V, H], q_bias [k, V], chosen [N] -> [k, N] in the type of `q_weight`; differentiable in
    all three. Only the chosen rows are read: memory is [k, N, H], in the backward pass also one gradient of the size of
    `q_weight`, and nothing is as large as [N, V].
    """
    k, V, H = q_weight.shape
    rows = chosen + V * torch.arange(k, device=chosen.device)[:, None]
    weight = F.embedding(rows, q_weight.reshape(k * V, H))
    bias = F.embedding(rows, q_bias.reshape(k * V, 1))[..., 0]
    values: Tensor = torch.linalg.vecdot(weight, hidden.to(q_weight.dtype))
    return values + bias


@torch.no_grad()
def expected_values(hidden: Tensor, weight: Tensor, q_weight: Tensor, q_bias: Tensor, *, temperature: float = 1.0,
                    rows: int = 0, compute: torch.dtype | None = None) -> Tensor:
    """E_pi Q_j(s, .) = sum_a pi(a|s) Q_j(s, a) over the whole vocabulary, with pi = softmax(h @ weight.T / temperature)
    and Q_j(s, a) = q_weight[j, a] . h(s) + q_bias[j, a]; carries no gradient.

    hidden [N, H], weight [V, H], q_weight [k, V, H], q_bias [k, V] -> [k, N] in the type of `q_weight`. Logits are
    multiplied in `compute` (default: the type of `weight`), so that pi is the one of `chosen_logprobs`; action values
    in their own type, as in `chosen_action_values`, so that Q - E_pi Q is not the rounding of one of them.

    The average is taken of the rows of `q_weight` before they meet the state, (pi @ q_weight[j]) . h + pi . q_bias[j]:
    as many operations, and the [rows, V] action values never exist. Peak memory is one chunk of logits and its softmax,
    2 [rows, V] arrays, and [rows, H], whatever k.
    """
    rows = rows or chunk_rows(len(weight), weight.device)
    exact = torch.promote_types(weight.dtype, torch.float32)
    expected = torch.empty(len(q_weight), len(hidden), dtype=q_weight.dtype, device=hidden.device)
    for part, z in _logits(hidden, weight.to(compute or weight.dtype), _parts(len(hidden), rows)):
        p = torch.softmax(z.to(exact) / temperature if temperature != 1.0 else z.to(exact), -1).to(q_weight.dtype)
        state = hidden[part].to(q_weight.dtype)
        for j, (W, b) in enumerate(zip(q_weight, q_bias)):
            expected[j, part] = torch.linalg.vecdot(p @ W, state) + p @ b
    return expected


LossOfRows = Callable[[slice, Reading], Slopes]
"""Some rows and what was read of them -> the gradient, in that, of a loss that is a sum over rows."""


@torch.no_grad()
def walk(hidden: Tensor, weight: Tensor, chosen: Tensor, loss: LossOfRows, *, d_weight: Tensor | None = None,
         reference: Readout | None = None, temperature: float = 1.0, rows: int = 0, entropy: bool = False,
         compute: torch.dtype | None = None, form: Form = PLAIN) -> tuple[Reading, Tensor | None]:
    """What `compared_logprobs` says of all rows, and the gradient in `hidden` of a loss that is a sum over rows, in one
    pass: `loss` is asked about a chunk while its logits exist, so they are computed once.

    -> [N] each, and [N, H]: None where `hidden` needs none, and where it is zero in all rows. The gradient in `weight`
    is added to `d_weight` [V, H], where that is given. Peak memory beside these is one chunk of logits, with a
    reference two, in the type they are multiplied in.
    """
    rows, readings, found = rows or chunk_rows(len(weight), weight.device), [], False
    gradients = _Gradients(hidden, weight.to(compute or weight.dtype), chosen, temperature, form,
                           torch.zeros_like(hidden) if hidden.requires_grad else None, d_weight)
    for part, z, z_ref in _chunks(hidden, gradients.matrix, reference, _parts(len(hidden), rows)):
        reading = form.read(z, chosen[part], temperature, entropy=entropy, reference=z_ref)
        readings.append(reading)
        found |= gradients.add(part, z, z_ref, reading, loss(part, reading))
    return Reading.concat(readings), gradients.d_hidden if found else None


class _ChosenLogProbs(torch.autograd.Function):
    """What `read` says, with the gradient of `write_gradient`, of logits that are computed in chunks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, chosen: Tensor, temperature: float, rows: int, entropy: bool,
                compute: torch.dtype, form: Form, ref_hidden: Tensor | None, ref_weight: Tensor | None,
                ref_compute: torch.dtype | None) -> tuple[Tensor | None, ...]:
        ctx.temperature, ctx.rows, ctx.compute, ctx.ref_compute = temperature, rows, compute, ref_compute
        ctx.form = form
        ctx.set_materialize_grads(False)
        reference, readings = _readout(ref_hidden, ref_weight, ref_compute), []
        for part, z, z_ref in _chunks(hidden, weight.to(compute), reference, _parts(len(hidden), rows)):
            readings.append(form.read(z, chosen[part], temperature, entropy=entropy, reference=z_ref))
        reading = Reading.concat(readings)
        ctx.save_for_backward(hidden, weight, chosen, ref_hidden, ref_weight, z, z_ref, *reading)
        return reading.logprobs, reading.entropy, reading.kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, chosen, ref_hidden, ref_weight, last, last_ref, *columns = ctx.saved_tensors
        reading, by = Reading(*columns), Slopes(*grads)
        gradients = _Gradients(
            hidden, weight.to(ctx.compute), chosen, ctx.temperature, ctx.form,
            torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None,
            torch.zeros_like(weight) if ctx.needs_input_grad[1] else None)
        reference = None if by.kl is None else _readout(ref_hidden, ref_weight, ctx.ref_compute)
        parts = _parts(len(hidden), ctx.rows)
        # the last chunk was kept, so one never recurs; it is copied, since slots run the backward pass again
        for part, z, z_ref in _chunks(hidden, gradients.matrix, reference, parts, (last, last_ref)):
            gradients.add(part, z, z_ref, reading.at(part), by.at(part))
        return gradients.d_hidden, gradients.d_weight, *[None] * 9


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Gradients:
    """Sums that the gradients of chunks are added to, where somebody needs them, and what they are made from."""

    hidden: Tensor
    matrix: Tensor
    chosen: Tensor
    temperature: float
    form: Form
    d_hidden: Tensor | None
    """[N, H], zero in rows that are not there yet."""
    d_weight: Tensor | None
    """[V, H]"""

    def add(self, part: slice, z: Tensor, z_ref: Tensor | None, reading: Reading, by: Slopes) -> bool:
        """Those of the rows `part`, whose logits `z` are used up -> whether any of them is not zero."""
        slopes = [slope != 0 for slope in by if slope is not None]
        if not slopes or (self.d_hidden is None and self.d_weight is None):
            return False
        # a row that is not finite has no gradient of zero, whatever its slope: it must reach the check of the step
        alive = gathered(torch.stack([~reading.lse.isfinite(), *slopes]).any(0))
        if len(alive) == 0:
            return False
        kept = None if len(alive) == len(z) else alive
        by = Slopes(*(None if slope is None or not bool(slope.any()) else slope for slope in by))
        hidden = self.hidden[part] if kept is None else self.hidden[part][kept]
        d_logits = self.form.write_gradient(z, self.chosen[part], reading, by, self.temperature, reference=z_ref,
                                            kept=kept)
        if self.d_hidden is not None:
            self.d_hidden[part][slice(None) if kept is None else kept] = (d_logits @ self.matrix).to(hidden.dtype)
        if self.d_weight is not None:
            _add_outer(self.d_weight, d_logits, hidden.to(d_logits.dtype))
        return True


def _readout(hidden: Tensor | None, weight: Tensor | None, compute: torch.dtype | None) -> Readout | None:
    return None if hidden is None or weight is None or compute is None else Readout(hidden, weight, compute)


def _parts(N: int, rows: int) -> list[slice]:
    """Ranges that make up 0 .. N; one empty range where N is 0."""
    return [slice(start, min(start + rows, N)) for start in range(0, max(N, 1), rows)]


def _chunks(hidden: Tensor, matrix: Tensor, reference: Readout | None, parts: Sequence[slice],
            last: tuple[Tensor | None, Tensor | None] = (None, None)) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Logits [C, V] of one part after the other, and those of the reference; see `_logits`."""
    own = _logits(hidden, matrix, parts, last[0])
    if reference is None:
        yield from ((part, z, None) for part, z in own)
    else:
        others = _logits(reference.hidden, reference.weight.to(reference.compute), parts, last[1])
        yield from ((part, z, z_ref) for (part, z), (_, z_ref) in zip(own, others))


def _logits(hidden: Tensor, matrix: Tensor, parts: Sequence[slice],
            last: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """hidden[part] @ matrix.T, each in the memory of the one before; of the last part a copy of `last`, if given."""
    memory = matrix.new_empty(max(part.stop - part.start for part in parts), len(matrix))
    for part in parts:
        z = memory[:part.stop - part.start]
        if last is not None and part is parts[-1]:
            yield part, z.copy_(last)
        else:
            yield part, torch.mm(hidden[part].to(matrix.dtype), matrix.t(), out=z)


def _add_outer(total: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """total[V, H] += d_logits.T @ hidden, in the type of `total`."""
    if d_logits.dtype == total.dtype:
        total.addmm_(d_logits.t(), hidden)
    elif _adds_unrounded(d_logits.dtype, total.dtype, total.device):
        torch.addmm(total, d_logits.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        total.add_(d_logits.t() @ hidden)


@cache
def _adds_unrounded(dtype: torch.dtype, total_dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch adds a product of matrices of one type to a matrix of another, in place, without an array of the
    product: it does on CUDA, in float32, in newer versions. Asked of a small one, whose result must be exact."""
    ones, total = torch.ones(64, 64, dtype=dtype, device=device), torch.full((64, 64), 2.0**-9, device=device)
    total = total.to(total_dtype)
    try:
        torch.addmm(total, ones, ones, out_dtype=total_dtype, out=total)
    except (RuntimeError, TypeError):  # not for this device or these types; not known to this version
        return False
    return bool((total == 64 + 2.0**-9).all())
