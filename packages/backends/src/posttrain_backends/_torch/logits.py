"""What rows of logits say of chosen tokens, and the gradient of that, written over the logits.

With z the logits of a row over the temperature, l = z - logsumexp(z), p = exp(l), l' and z' the same of a reference,
c chosen: log p(c) = l_c, H = -sum(p l), K = sum(p (l - l')). Their gradients in z_j are [j = c] - p_j,
-p_j (l_j + H) and p_j (l_j - l'_j - K).

A few rows are looked at together, so that what is made of them stays near the cache and nothing as large as the logits
is allocated. `read` and `write_gradient` are a `Form`, `PLAIN`; kernels are others, held against it. Knows no output
matrix and no loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor

BLOCK_CELLS: Mapping[str, int] = {"cpu": 2**18, "cuda": 2**24}
"""Logits looked at together, by device type."""

Rows = slice | Tensor
"""Some of n rows."""


class Slopes(NamedTuple):
    """The gradient of a loss in what was read of n rows, [n] or [n, 1] each; None where it has none."""

    logprobs: Tensor | None
    entropy: Tensor | None = None
    kl: Tensor | None = None

    def at(self, rows: Rows) -> Slopes:
        return Slopes(*(_at(slope, rows) for slope in self))


class Reading(NamedTuple):
    """What was read of n rows, [n] each; None where nobody asked for it."""

    logprobs: Tensor
    lse: Tensor
    """logsumexp(z)"""
    entropy: Tensor | None = None
    kl: Tensor | None = None
    ref_lse: Tensor | None = None
    """logsumexp(z')"""

    def at(self, rows: Rows) -> Reading:
        return Reading(self.logprobs[rows], self.lse[rows], *(_at(column, rows) for column in self[2:]))

    def room(self, n: int) -> Reading:
        """Columns of n rows, to be filled by `put`. What is put there keeps no memory of its own: results of blocks,
        a few numbers each, would lie between the freed memory of the blocks, so that none of it could be taken
        again, and in the end as much as the logits would be in use."""
        others = (None if column is None else column.new_empty(n) for column in self[2:])
        return Reading(self.logprobs.new_empty(n), self.lse.new_empty(n), *others)

    def put(self, rows: slice, part: Reading) -> None:
        """Write what was read of `rows`."""
        for column, own in zip(self, part, strict=True):
            if column is not None and own is not None:
                column[rows] = own

    @staticmethod
    def concat(parts: Sequence[Reading]) -> Reading:
        """Of all rows, at least one part."""
        logprobs, lse, *others = zip(*parts)
        return Reading(torch.cat(logprobs), torch.cat(lse),
                       *(None if column[0] is None else torch.cat(column) for column in others))


class Form(Protocol):
    """Somebody's `read` and `write_gradient`: what they compute is said at those of this module."""

    def read(self, logits: Tensor, chosen: Tensor, temperature: float = 1.0, *, entropy: bool = False,
             reference: Tensor | None = None) -> Reading: ...
    def write_gradient(self, logits: Tensor, chosen: Tensor, reading: Reading, by: Slopes, temperature: float = 1.0, *,
                       reference: Tensor | None = None, kept: Tensor | None = None) -> Tensor: ...


def read(logits: Tensor, chosen: Tensor, temperature: float = 1.0, *, entropy: bool = False,
         reference: Tensor | None = None) -> Reading:
    """What logits [n, V] say of chosen [n], and their KL to the logits of a reference [n, V]; both stay as they are."""
    first, *others = _blocks(len(logits), logits)
    found = _read_block(logits[first], chosen[first], temperature, entropy, _at(reference, first))
    columns = found.room(len(logits))
    columns.put(first, found)
    for b in others:
        columns.put(b, _read_block(logits[b], chosen[b], temperature, entropy, _at(reference, b)))
    return columns


def write_gradient(logits: Tensor, chosen: Tensor, reading: Reading, by: Slopes, temperature: float = 1.0, *,
                   reference: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
    """The gradient of logits [n, V] from that of what they say, `by`, written over them -> [n, V].

    With `kept`, numbers of m rows, it is that of those rows alone, and takes the first m rows -> [m, V]. A row below m
    that is among them stays in its place (see `gathered`), so that none is read after another was written there, in
    whatever order.
    """
    n = len(logits) if kept is None else len(kept)
    by = Slopes(*(None if slope is None else slope[:, None] / temperature for slope in by))
    for b in _blocks(n, logits):
        rows, target = b if kept is None else kept[b], logits[b]
        block = target if kept is None else logits[rows]
        gradient = _block_gradient(block, chosen[rows], reading.at(rows), by.at(rows), temperature,
                                   _at(reference, rows))
        if gradient is not target:
            target.copy_(gradient)
    return logits[:n]


def gathered(alive: Tensor) -> Tensor:
    """Numbers of the m rows that are `alive` [n], each one below m at its own place, and the others where none is.

    >>> gathered(torch.tensor([False, True, False, True, True])).tolist()
    [3, 1, 4]
    """
    kept = alive.nonzero()[:, 0]
    m = len(kept)
    free = (~alive[:m]).nonzero()[:, 0]
    order = torch.arange(m, device=alive.device)
    order[free] = kept[m - len(free):]
    return order


def _blocks(n: int, logits: Tensor) -> Iterator[slice]:
    """Ranges that make up 0 .. n; one empty range where n is 0."""
    step = max(1, BLOCK_CELLS.get(logits.device.type, 2**18) // logits.shape[1])
    return (slice(start, min(start + step, n)) for start in range(0, max(n, 1), step))


def _at(x: Tensor | None, rows: Rows) -> Tensor | None:
    return None if x is None else x[rows]


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """z, in float32 or better; the logits themselves where nothing has to be done."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return z if temperature == 1.0 else z / temperature


def _read_block(logits: Tensor, chosen: Tensor, temperature: float, entropy: bool,
                reference: Tensor | None) -> Reading:
    z = _scaled(logits, temperature)
    top = z.amax(-1, keepdim=True)
    below = z - top
    q = below.exp()  # p times its own sum
    total = q.sum(-1)
    log_total = total.log()
    # z - lse would lose, near a log-prob of 0, what z - top keeps; neither is above 0
    logprobs, lse = below.gather(1, chosen[:, None])[:, 0] - log_total, top[:, 0] + log_total
    entropies = log_total - torch.linalg.vecdot(q, below) / total if entropy else None
    if reference is None:
        return Reading(logprobs, lse, entropies)
    z_ref = _scaled(reference, temperature).to(z.dtype)
    top = z_ref.amax(-1, keepdim=True)
    ref_lse = top[:, 0] + (z_ref - top).exp_().sum(-1).log()
    log_ratio = _log_ratio(z - lse[:, None], z_ref, ref_lse[:, None])
    return Reading(logprobs, lse, entropies, torch.linalg.vecdot(q, log_ratio) / total, ref_lse)


def _log_ratio(log_p: Tensor, z_ref: Tensor, ref_lse: Tensor) -> Tensor:
    """l - l' [n, V]."""
    return log_p - (z_ref - ref_lse)


def _block_gradient(logits: Tensor, chosen: Tensor, reading: Reading, by: Slopes, temperature: float,
                    reference: Tensor | None) -> Tensor:
    """The gradient of logits [n, V], in their place where their type allows; `by` is [n, 1] each."""
    log_p = _scaled(logits, temperature).sub_(reading.lse[:, None])
    factor = torch.zeros_like(log_p[:, :1]) if by.logprobs is None else -by.logprobs
    if by.entropy is not None and reading.entropy is not None:
        factor = (log_p + reading.entropy[:, None]).mul_(-by.entropy).add_(factor)
    if by.kl is not None and reading.kl is not None and reading.ref_lse is not None and reference is not None:
        z_ref = _scaled(reference, temperature).to(log_p.dtype)
        log_ratio = _log_ratio(log_p, z_ref, reading.ref_lse[:, None])
        factor = log_ratio.sub_(reading.kl[:, None]).mul_(by.kl).add_(factor)
    gradient = log_p.exp_().mul_(factor)
    return gradient if by.logprobs is None else gradient.scatter_add_(1, chosen[:, None], by.logprobs)


@final
class _Plain:
    """This module's functions as a form."""

    read = staticmethod(read)
    write_gradient = staticmethod(write_gradient)


PLAIN: Form = _Plain()


def logprobs_of(logits: Tensor, chosen: Tensor, *, temperature: float = 1.0, entropy: bool = False,
                form: Form = PLAIN, in_place: bool = True) -> tuple[Tensor, Tensor | None]:
    """log p(chosen) and, where asked, the entropy of p = softmax(logits / temperature): logits [N, V] that are finite,
    chosen [N] -> [N] and [N], in float32, or float64 where the logits are. Both are differentiable.

    The backward pass writes the gradient over the logits, in their own type, so no second [N, V] array exists; it can
    run once. Where it runs twice, or another operation needs the logits for its own gradient, torch raises. With
    `in_place` off they are kept, and the gradient is an array of its own.
    """
    logprobs, entropies = _OfLogits.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        logits, chosen, temperature, entropy, form, in_place)
    return logprobs, entropies


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, chosen: Tensor, temperature: float, entropy: bool, form: Form,
                in_place: bool) -> tuple[Tensor, Tensor | None]:
        reading = form.read(logits, chosen, temperature, entropy=entropy)
        ctx.save_for_backward(logits, chosen, *reading)
        ctx.temperature, ctx.form, ctx.in_place = temperature, form, in_place
        ctx.set_materialize_grads(False)
        return reading.logprobs, reading.entropy

    @staticmethod
    def backward(ctx: Any, *by: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, chosen, *columns = ctx.saved_tensors
        place = logits.detach() if ctx.in_place else logits.clone()
        gradient = ctx.form.write_gradient(place, chosen, Reading(*columns), Slopes(*by), ctx.temperature)
        return gradient, *[None] * 5
